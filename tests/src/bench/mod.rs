//! `cargo xtask bench`: what is measured, each figure beside a peer in the same run.
//!
//! | module | what it measures |
//! |---|---|
//! | [`exactness`] | `flood`, `overflow`: whether every drop is counted |
//! | [`cost`] | `cost`, `sender`: what a drop costs |
//! | [`passing`] | `passing`: what traffic costs that is not dropped |
//! | [`hooks`] | `hooks`: what it would cost at other hooks, which are in [`candidates`] |
//! | [`upkeep`] | `memory`, `idle`: what the agent takes by being there |
//! | [`answers`] | `latency`, `scrape`: how soon it says what it knows |
//!
//! What they share: [`report`] (tables, JSON), [`flows`] (traffic over many flows), [`ends`] (traffic of one
//! thread), [`watch`] (who
//! watches the drops: nobody, a peer, bpftrace, the agent) and [`kernel`] (what the kernel says of
//! programs and maps).
//!
//! Another load on the machine makes every time longer, so times are compared within rounds in which
//! everyone has a turn, and medians over the rounds are shown. Each benchmark keeps the labs of
//! other processes out while it runs.

pub mod answers;
pub mod candidates;
pub mod cost;
pub mod ends;
pub mod exactness;
pub mod flows;
pub mod hooks;
pub mod kernel;
pub mod passing;
pub mod report;
pub mod upkeep;
pub mod watch;

use anyhow::Result;

use report::Report;

/// A benchmark: its name, what it is about, and how to run it.
pub struct Benchmark {
    /// As on the command line.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Runs it.
    pub run: fn(&mut Report) -> Result<()>,
}

/// All of them, in the order in which they run.
pub const ALL: [Benchmark; 10] = [
    Benchmark {
        name: "flood",
        about: "1,000,000 drops as fast as possible, over 5,000 flows, in each family",
        run: exactness::flood,
    },
    Benchmark {
        name: "overflow",
        about: "1,000,000 drops over more flows than the maps hold, in each family",
        run: exactness::overflow,
    },
    Benchmark {
        name: "cost",
        about: "time in the program for each drop, by bpf stats, the cost of an empty program taken off",
        run: cost::cost,
    },
    Benchmark {
        name: "memory",
        about: "kernel memory of all maps",
        run: upkeep::memory,
    },
    Benchmark {
        name: "sender",
        about: "what is left of the sender's rate when every packet is dropped",
        run: cost::sender,
    },
    Benchmark {
        name: "passing",
        about: "what is left of the rate of traffic that is not dropped",
        run: passing::passing,
    },
    Benchmark {
        name: "hooks",
        about: "what each hook where DNS or answers could be seen adds to traffic that is not dropped",
        run: hooks::hooks,
    },
    Benchmark {
        name: "idle",
        about: "an agent with nothing to see",
        run: upkeep::idle,
    },
    Benchmark {
        name: "latency",
        about: "from the application's send to the line in `whydrop tail -f -o json`",
        run: answers::latency,
    },
    Benchmark {
        name: "scrape",
        about: "10,000 series scraped while drops go on",
        run: answers::scrape,
    },
];
