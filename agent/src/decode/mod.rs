//! Stub.

pub mod packet;
