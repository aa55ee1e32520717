//! A real etcd and kube-apiserver, objects in them, and agents that follow them.
//!
//! `cargo xtask test kube` builds the programs and runs the tests; they are Kubernetes' own, at the
//! version of go.mod beside this package.

pub mod bench;
pub mod follower;
pub mod objects;
pub mod proxy;
pub mod server;
