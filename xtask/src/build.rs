//! `cargo xtask build`: the `whydrop` binary. agent/build.rs puts the eBPF object into it.

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{
    command::{cargo, host, root, run as execute},
    setup,
};

#[derive(clap::Args)]
pub struct Args {
    /// Build with optimisation
    #[arg(long)]
    release: bool,
    /// Link the C library in, so that the binary runs on any Linux and in an empty image
    #[arg(long)]
    r#static: bool,
}

/// Sets up, builds and prints the binary's path and size.
pub fn run(args: &Args) -> Result<()> {
    setup::run()?.ready_to_build()?;
    let binary = binary(args)?;
    let bytes = fs::metadata(&binary)
        .with_context(|| format!("{} is not there after the build", binary.display()))?
        .len();
    println!("{} ({:.1} MiB)", binary.display(), bytes as f64 / 1048576.0);
    Ok(())
}

/// The optimised binary for this machine, as `demo` and `bench` use it.
pub fn release() -> Result<PathBuf> {
    binary(&Args {
        release: true,
        r#static: false,
    })
}

fn binary(args: &Args) -> Result<PathBuf> {
    let mut build = cargo("build");
    build.args(["--package", "whydrop", "--bin", "whydrop"]);
    let mut folder = env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().join("target"), |dir| root().join(dir));
    if args.r#static {
        // With --target the flags reach the binary only; build scripts stay as they are.
        let host = host()?;
        build.args(["--target", &host]);
        let flags = env::var("RUSTFLAGS").unwrap_or_default();
        build.env("RUSTFLAGS", format!("{flags} -Ctarget-feature=+crt-static"));
        folder.push(host);
    }
    if args.release {
        build.arg("--release");
    }
    execute(&mut build)?;
    folder.push(if args.release { "release" } else { "debug" });
    Ok(folder.join("whydrop"))
}
