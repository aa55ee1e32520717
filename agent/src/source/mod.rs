//! The kernel edge: the only place that knows aya and /proc.
//!
//! | file | what |
//! |---|---|
//! | `load.rs` | load and attach the programs, each on its own |
//! | `btf.rs` | field offsets and reason names of the running kernel |
//! | `budget.rs` | map sizes from `--map-memory` |
//! | `events.rs` | the ring buffer as a stream of events, and its clock |
//! | `drain.rs` | the exact counts, generation by generation |
//! | `namespaces.rs` | the network namespaces of this node, and whose they are |
//! | `accept_queues.rs` | connections lost to a full accept queue, by namespace |
//! | `cgroups.rs` | cgroup to pod |
//! | `symbols.rs` | address to function name |
//! | `sys.rs` | the only `unsafe` of the agent |

pub mod accept_queues;
pub mod btf;
pub mod budget;
pub mod cgroups;
pub mod drain;
pub mod events;
pub mod load;
pub mod namespaces;
pub mod symbols;
pub mod sys;
