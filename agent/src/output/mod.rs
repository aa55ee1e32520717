//! Stub.
pub mod stream;
