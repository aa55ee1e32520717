//! `cargo xtask bench`: the benchmarks, each beside a peer in the same run.

use anyhow::Result;

use crate::{
    build,
    command::{cargo, run as execute},
    setup,
};

#[derive(clap::Args)]
pub struct Args {
    /// The benchmark to run; all of them if it is left out
    name: Option<String>,
}

/// Sets up, builds and runs the benchmarks; their exit code goes through.
pub fn run(args: &Args) -> Result<()> {
    setup::run()?.ready_to_build()?;
    build::release()?;
    execute(
        cargo("run")
            .args([
                "--release",
                "--package",
                "whydrop-tests",
                "--bin",
                "bench",
                "--",
            ])
            .args(&args.name),
    )
}
