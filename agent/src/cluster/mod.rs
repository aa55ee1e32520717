//! The cluster: Kubernetes objects, and who held which address when.
//!
//! | module | holds |
//! |---|---|
//! | [`objects`] | the objects, stripped to what is used |
//! | [`parse`] | one object from JSON or YAML values, or why it is malformed |
//! | [`document`] | all objects of one file's text |
//! | [`files`] | `--objects`: reading files and folders, and noticing that they changed |
//! | [`watch`] | `--cluster`: the API server's objects, kept up to date |
//! | [`changes`] | which policy or label changed last, and when |
//! | [`mod@list`] | the API server's objects, read once |
//! | [`claims`] | who held something, from when to when |
//! | [`ranges`] | the nodes' pod ranges |
//! | [`uid`] | pods by UID, as objects and cgroups write it |
//! | [`index`] | address and port to pod, node and Service, at a time |

pub mod changes;
pub mod claims;
pub mod document;
pub mod files;
#[cfg(test)]
pub(crate) mod fixture;
pub mod index;
pub mod list;
pub mod objects;
pub mod parse;
pub mod ranges;
pub mod uid;
pub mod watch;

/// A map whose hash takes a fifth of the standard one's time: every packet's addresses are looked up. The
/// standard one resists who chooses keys that collide, and here the API server chooses them.
type FastMap<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;
/// Likewise.
type FastSet<T> = std::collections::HashSet<T, foldhash::fast::RandomState>;

pub use index::Index;
pub use objects::{Change, Key, Object, ObjectKind};
pub use uid::PodUid;
