//! The commands.
//!
//! | module | is |
//! |---|---|
//! | [`config`] | every flag of every command |
//! | [`units`] | sizes and durations as flags take them |
//! | [`telemetry`] | the program's own log |
//! | [`agent`] | the node agent |
//! | [`tail`] | the drop stream, with [`mod@format`] for how a line looks |
//! | [`status`] | what an agent says of itself |
//! | [`check`] | what this kernel allows |
//! | [`client`] | the local API as a client sees it |

pub mod agent;
pub mod check;
pub mod client;
pub mod config;
pub mod format;
pub mod status;
pub mod tail;
pub mod telemetry;
pub mod units;
