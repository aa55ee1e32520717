//! Stub.

/// Stub.
pub fn parse(bytes: &[u8]) -> Option<usize> {
    bytes.first().map(|b| usize::from(*b))
}
