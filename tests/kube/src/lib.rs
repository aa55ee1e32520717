//! A real etcd and kube-apiserver, objects in them, and agents that follow them; a real kubelet, and the agent
//! as it runs in a pod.
//!
//! `cargo xtask test kube` builds the programs and runs the tests; they are Kubernetes' own, at the
//! version of go.mod beside this package.

pub mod bench;
pub mod certificates;
pub mod cluster;
pub mod controllers;
pub mod follower;
pub mod node;
pub mod objects;
pub mod proxy;
pub mod server;

use std::path::PathBuf;

use anyhow::{Context as _, Result};

/// What `cargo xtask test kube` makes or fetches, by the variable that names it.
///
/// # Errors
/// It is not set.
pub fn made(variable: &str) -> Result<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    path.with_context(|| format!("{variable} is not set: `cargo xtask test kube` sets it"))
}
