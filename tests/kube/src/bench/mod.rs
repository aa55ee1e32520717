//! `cargo xtask bench cluster`.
//!
//! | module | what it measures |
//! |---|---|
//! | [`lookup`] | from address to names, in an index of a large cluster |
//! | [`large`] | the agent's memory with a generated cluster of 150,000 pods |
//! | [`real`] | memory, CPU and requests with a real API server and 10,000 pods |
//!
//! [`objects`] makes the objects.

pub mod large;
pub mod lookup;
pub mod objects;
pub mod real;
