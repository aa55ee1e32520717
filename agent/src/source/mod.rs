//! The kernel edge: the only place that knows aya.
//!
//! | file | what |
//! |---|---|
//! | `load.rs` | load and attach the programs, each on its own |
//! | `btf.rs` | field offsets and reason names of the running kernel |
//! | `budget.rs` | map sizes from `--map-memory` |
//! | `events.rs` | the ring buffer as a stream of events, and its clock |
//! | `drain.rs` | the exact counts, generation by generation |
//! | `symbols.rs` | address to function name |
//! | `sys.rs` | the only `unsafe` of the agent |

pub mod btf;
pub mod budget;
pub mod conntrack;
pub mod drain;
pub mod events;
pub mod load;
pub mod symbols;
pub mod sys;
