//! The kernel edge: the only place that knows aya and /proc.
//!
//! | file | what |
//! |---|---|
//! | `load.rs` | load the programs and take out their maps |
//! | `hooks.rs` | the hooks, each attached on its own by the first way that works |
//! | `btf.rs` | field offsets and reason names of the running kernel |
//! | `budget.rs` | map sizes from `--map-memory` |
//! | `events.rs` | the ring buffer as a stream of events, and its clock |
//! | `drain.rs` | the exact counts, generation by generation |
//! | `attempts.rs` | connects and DNS queries that nobody answered |
//! | `lockdown.rs` | what the kernel forbids even to root |
//! | `namespaces.rs` | the network namespaces of this node, and whose they are |
//! | `accept_queues.rs` | connections lost to a full accept queue, by namespace |
//! | `cgroups.rs` | cgroup to pod |
//! | `retry.rs` | attach later what could not be attached at start |
//! | `symbols.rs` | address to function name |
//! | `sys.rs` | the only `unsafe` of the agent |

pub mod accept_queues;
pub mod attempts;
pub mod btf;
pub mod budget;
pub mod cgroups;
pub mod conntrack;
pub mod drain;
pub mod events;
pub mod hooks;
pub mod load;
pub mod lockdown;
pub mod namespaces;
pub mod retry;
pub mod symbols;
pub mod sys;
