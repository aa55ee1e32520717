//! `cargo xtask bench`: what is measured, each figure beside a peer in the same run.
//!
//! | module | what it measures |
//! |---|---|
//! | [`exactness`] | `flood`, `overflow`: whether every drop is counted |
//! | [`cost`] | `cost`, `sender`: what a drop costs |
//! | [`passing`] | `passing`: what traffic costs that is not dropped |
//! | [`quiet`] | `quiet`: what it costs with all sources on, by kind of traffic |
//! | [`hooks`] | `hooks`: what it would cost at other hooks, which are in [`candidates`] |
//! | [`upkeep`] | `memory`, `idle`: what the agent takes by being there |
//! | [`namespaces`] | `namespaces`: what a node full of network namespaces takes |
//! | [`answers`] | `latency`, `scrape`: how soon it says what it knows |
//! | [`silence`] | `silence`, `hang`: whether it tells what nobody answers, and how soon |
//! | [`conntrack`] | `conntrack`: what dumps, look-ups and listening to conntrack take |
//! | [`inflight`] | `inflight`: 100,000 connects that hang at once |
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
pub mod conntrack;
pub mod cost;
pub mod ends;
pub mod exactness;
pub mod flows;
pub mod hooks;
pub mod inflight;
pub mod kernel;
pub mod namespaces;
pub mod passing;
pub mod quiet;
pub mod report;
pub mod silence;
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
pub const ALL: [Benchmark; 16] = [
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
        name: "namespaces",
        about: "200 network namespaces with 2,000 processes, and 2,000 cgroups",
        run: namespaces::namespaces,
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
    Benchmark {
        name: "quiet",
        about: "what traffic costs of which nothing is dropped, with all sources on",
        run: quiet::quiet,
    },
    Benchmark {
        name: "silence",
        about: "2,000 connects and 5,000 DNS queries, a tenth of each unanswered for six reasons",
        run: silence::silence,
    },
    Benchmark {
        name: "hang",
        about: "from the end of an attempt's time to its line",
        run: silence::hang,
    },
    Benchmark {
        name: "inflight",
        about: "100,000 connects that hang at once",
        run: inflight::inflight,
    },
    Benchmark {
        name: "conntrack",
        about: "the conntrack table: dumps, look-ups, and connects while someone listens to their end",
        run: conntrack::conntrack,
    },
];
