//! `cargo xtask demo`: real drops between network namespaces, seen and named.

use anyhow::Result;

use crate::{
    build,
    command::{cargo, run as execute},
    setup,
};

/// Sets up, builds and runs the demo; its exit code goes through.
pub fn run() -> Result<()> {
    setup::run()?.ready_to_build()?;
    build::release()?;
    execute(cargo("run").args(["--release", "--package", "whydrop-tests", "--bin", "demo"]))
}
