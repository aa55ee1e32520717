//! Where events and counters leave the agent.
//!
//! | module | is |
//! |---|---|
//! | [`stream`] | the last lines, and everyone who follows them |
//! | [`query`] | what a reader of `/v1/drops` asks for |
//! | [`mod@explain`] | `/v1/explain` |
//! | [`connections`] | `/v1/connections` |
//! | [`metrics`] | every metric |
//! | [`classic`] | the same in Prometheus' older text format |
//! | [`http`] | `/metrics` over TCP, the local API over the unix socket |
//! | [`socket`] | a unix socket that only one agent owns |

pub mod classic;
pub mod connections;
pub mod explain;
pub mod http;
pub mod metrics;
pub mod query;
pub mod socket;
pub mod stream;
