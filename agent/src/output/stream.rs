//! Stub.
/// Stub.
#[derive(Debug)]
pub struct Stream;
