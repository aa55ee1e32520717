//! Stub.
pub mod index;
pub use index::Index;
