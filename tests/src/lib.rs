//! The lab: real packets, really dropped between network namespaces, and compared with counters
//! that someone else keeps.
//!
//! | module | what it is |
//! |---|---|
//! | [`lab`] | client, router, server and a second pair, as network namespaces that clean up after themselves |
//! | [`place`] | the names of its hosts and addresses |
//! | [`objects`] | the lab's addresses as Kubernetes objects, for `--objects` |
//! | [`packet`] | packets as bytes, also those that no socket would send |
//! | [`traffic`] | connects, bursts and raw packets, sent from inside a namespace |
//! | [`bystander`] | allowed traffic of the second pair, which must never be blamed |
//! | [`connects`] | TCP connects, many at once, held, and the fate of each |
//! | [`listeners`] | TCP servers that accept everyone, or nobody |
//! | [`dns_server`] | a DNS server whose answer the name decides |
//! | [`dns_client`] | DNS clients with ids that a test chooses |
//! | [`queries`] | DNS queries by what becomes of them |
//! | [`port`] | TCP ports by what becomes of a connect |
//! | [`sockets`] | the TCP sockets of a host, as the kernel lists them |
//! | [`tracked`] | a conntrack table with entries in it |
//! | [`watching`] | a running conntrack source by itself, and traffic for it |
//! | [`counters`] | counters that someone else keeps: nft, iptables, tc, SNMP, conntrack |
//! | [`kernel`] | what the kernel can do, and the programs and maps that a process has in it |
//! | [`memory`] | what a process may take and has taken, and a cgroup with a limit |
//! | [`xdp`] | an XDP program that drops UDP, as an object file for `ip link` |
//! | [`agent`] | the agent as a process: start, scrape, read events, stop |
//! | [`free_port`](mod@free_port) | TCP ports for programs that a test starts |
//! | [`scrape`] | what an agent serves over TCP |
//! | [`scene`] | a lab with a dropper, an agent and a bystander: what nearly every test needs |
//! | [`silence`] | thousands of connects and queries, a tenth unanswered |
//! | [`bench`] | `cargo xtask bench`: what is measured, each beside a peer |
//! | [`expect`](mod@expect) | what the agent must show for a lab, and nothing else |
//! | [`unanswered`] | what it must say of attempts that nobody answered |
//! | [`tallies`] | what it counts of a workload's connects and DNS |
//! | [`patience`] | how late all that may be |
//!
//! An agent sees the whole node, so also the drops of tests that run at the same time. Every lab
//! therefore has addresses of its own, and what is checked is checked by pair. A test on node-wide
//! sums stands in `tests/exact.rs`, `tests/limits.rs` or `tests/memory.rs`: cargo runs one test binary after the other,
//! and those files take the lab's lock for themselves, so that no other lab runs meanwhile.

pub mod agent;
pub mod bench;
pub mod bystander;
pub mod connects;
pub mod counters;
pub mod dns_client;
pub mod dns_server;
pub mod expect;
pub mod free_port;
pub mod kernel;
pub mod lab;
pub mod listeners;
pub mod memory;
pub mod objects;
pub mod packet;
pub mod patience;
pub mod place;
pub mod port;
pub mod queries;
pub mod scene;
pub mod scrape;
pub mod silence;
pub mod sockets;
pub mod tallies;
pub mod tracked;
pub mod traffic;
pub mod unanswered;
pub mod watching;
pub mod xdp;

/// Makes of each function `fn name(family: Family) -> Result<()>` two tests, `name::ipv4` and
/// `name::ipv6`.
#[macro_export]
macro_rules! on_both_families {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            #[test]
            fn ipv4() -> anyhow::Result<()> {
                super::$name($crate::lab::Family::V4)
            }

            #[test]
            fn ipv6() -> anyhow::Result<()> {
                super::$name($crate::lab::Family::V6)
            }
        }
    )+};
}
