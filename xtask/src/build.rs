//! `cargo xtask build`: the `whydrop` binary. agent/build.rs puts the eBPF object into it.

use std::{env, fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    architecture::Architecture,
    command::{cargo, command, host, output, root, run as execute},
    cross, setup,
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
    let binary = binary(args, Architecture::own()?)?;
    let bytes = fs::metadata(&binary)
        .with_context(|| format!("{} is not there after the build", binary.display()))?
        .len();
    println!("{} ({:.1} MiB)", binary.display(), bytes as f64 / 1048576.0);
    Ok(())
}

/// The binary as it is shipped: optimised and static.
pub fn shipped(architecture: Architecture) -> Result<PathBuf> {
    let args = Args {
        release: true,
        r#static: true,
    };
    binary(&args, architecture)
}

/// Makes the next [`shipped`] link the binary again.
pub fn forget_shipped(architecture: Architecture) -> Result<()> {
    let binary = shipped(architecture)?;
    let folder = binary.with_file_name("deps");
    // Cargo's own copies; a hash follows the name, and an executable's name has no ending.
    for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("whydrop-") && path.extension().is_none() {
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// The binary as it goes into the image: without what only a debugger reads, which is more than four
/// fifths of it. Function names stay, for backtraces.
pub fn without_debug_info(architecture: Architecture) -> Result<PathBuf> {
    let shipped = shipped(architecture)?;
    let stripped = shipped.with_file_name("whydrop-without-debug-info");
    let mut strip = command(cross::tool(architecture, "strip")?);
    execute(
        strip
            .args(["--strip-debug", "-o"])
            .arg(&stripped)
            .arg(&shipped),
    )?;
    Ok(stripped)
}

/// The labs' test executables, built as [`shipped`], so that they need no library where they run.
pub fn shipped_labs(architecture: Architecture, names: &[&str]) -> Result<Vec<PathBuf>> {
    let mut build = cargo("test");
    statically(&mut build, architecture)?;
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

/// The benchmarks, built as [`shipped`].
pub fn shipped_bench(architecture: Architecture) -> Result<PathBuf> {
    let mut build = whydrop();
    let folder = target().join(statically(&mut build, architecture)?);
    execute(build.args(["--bin=bench", "--release"]))?;
    Ok(folder.join("release/bench"))
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
    let args = Args {
        release: true,
        r#static: false,
    };
    binary(&args, Architecture::own()?)
}

fn binary(args: &Args, architecture: Architecture) -> Result<PathBuf> {
    let mut build = whydrop();
    let mut folder = target();
    if args.r#static {
        folder.push(statically(&mut build, architecture)?);
    }
    if args.release {
        build.arg("--release");
    }
    execute(&mut build)?;
    folder.push(if args.release { "release" } else { "debug" });
    Ok(folder.join("whydrop"))
}

/// The build of the binary. With the labs' package beside it, so that what both depend on is built with
/// the same features, once.
pub fn whydrop() -> Command {
    let mut build = cargo("build");
    build.args([
        "--package=whydrop",
        "--package=whydrop-tests",
        "--bin=whydrop",
    ]);
    build
}

/// Links the C library in. The folder's name below [`target`].
fn statically(build: &mut Command, architecture: Architecture) -> Result<String> {
    let own = architecture == Architecture::own()?;
    let flags = env::var("RUSTFLAGS").unwrap_or_default();
    let mut flags: Vec<_> = flags.split_whitespace().map(str::to_owned).collect();
    let target = if own {
        host()?
    } else {
        flags.extend(cross::prepare(build, architecture)?);
        architecture.target().to_owned()
    };
    flags.push("-Ctarget-feature=+crt-static".to_owned());
    // With --target the flags reach the binary only; build scripts stay as they are.
    build.args(["--target", &target]);
    // As cargo separates them, for a path may have blanks.
    build.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    Ok(target)
}

/// Where cargo puts what it builds.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}
