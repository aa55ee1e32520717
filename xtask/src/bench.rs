//! `cargo xtask bench`: the benchmarks, each beside a peer in the same run.

use anyhow::Result;

use crate::{
    build,
    command::{cargo, run as execute},
    kube, setup,
};

/// The benchmark that needs an API server, and is a program of its own for that.
const CLUSTER: &str = "cluster";

#[derive(clap::Args)]
pub struct Args {
    /// The benchmark to run; all of them if it is left out
    name: Option<String>,
}

/// Sets up, builds and runs the benchmarks; their exit code goes through.
pub fn run(args: &Args) -> Result<()> {
    setup::run()?.with_kube().ready_to_build()?;
    build::release()?;
    if args.name.as_deref() != Some(CLUSTER) {
        execute(
            cargo("run")
                .args(["--release", "--package=whydrop-tests", "--bin=bench", "--"])
                .args(&args.name),
        )?;
    }
    if args.name.as_deref().is_none_or(|name| name == CLUSTER) {
        execute(
            cargo("run")
                .args([
                    "--release",
                    "--package=whydrop-kube-tests",
                    "--bin=bench_cluster",
                ])
                .env("WHYDROP_KUBE_PROGRAMS", kube::programs()?),
        )?;
    }
    Ok(())
}
