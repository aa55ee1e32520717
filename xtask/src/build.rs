//! `cargo xtask build`: the `whydrop` binary. agent/build.rs puts the eBPF object into it.

use std::{env, fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    command::{cargo, host, output, root, run as execute},
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

/// The binary as it is shipped: optimised and static.
pub fn shipped() -> Result<PathBuf> {
    binary(&Args {
        release: true,
        r#static: true,
    })
}

/// The binary as it goes into the image: static, and without what only a debugger reads, which is more
/// than four fifths of it. Function names stay, for backtraces. cargo keeps what it compiled, and only
/// links again.
pub fn without_debug_info() -> Result<PathBuf> {
    let mut build = cargo("rustc");
    build.args(["--package=whydrop", "--bin=whydrop", "--release"]);
    let folder = target().join(statically(&mut build)?);
    execute(build.args(["--", "-Cstrip=debuginfo"]))?;
    Ok(folder.join("release/whydrop"))
}

/// The labs' test executables, built as [`shipped`], so that they need no library where they run.
pub fn shipped_labs(names: &[&str]) -> Result<Vec<PathBuf>> {
    let mut build = cargo("test");
    statically(&mut build)?;
    build.args(["--package=whydrop-tests", "--release", "--no-run"]);
    build.arg("--message-format=json-render-diagnostics");
    for name in names {
        build.args(["--test", name]);
    }
    eprintln!("+ building the labs: {}", names.join(", "));
    let messages = output(&mut build)?;
    let find = |name: &&str| {
        executable(&messages, name).with_context(|| format!("cargo built no test {name}"))
    };
    names.iter().map(find).collect()
}

/// The executable of a test target in cargo's messages.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| {
            message["reason"] == "compiler-artifact"
                && message["target"]["name"] == name
                && message["target"]["kind"][0] == "test"
        })
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
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
    let mut folder = target();
    if args.r#static {
        folder.push(statically(&mut build)?);
    }
    if args.release {
        build.arg("--release");
    }
    execute(&mut build)?;
    folder.push(if args.release { "release" } else { "debug" });
    Ok(folder.join("whydrop"))
}

/// Links the C library in. The folder's name below [`target`].
fn statically(build: &mut Command) -> Result<String> {
    // With --target the flags reach the binary only; build scripts stay as they are.
    let host = host()?;
    build.args(["--target", &host]);
    let flags = env::var("RUSTFLAGS").unwrap_or_default();
    build.env("RUSTFLAGS", format!("{flags} -Ctarget-feature=+crt-static"));
    Ok(host)
}

/// Where cargo puts what it builds.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}
