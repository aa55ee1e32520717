//! Building for the other architecture: with Debian's C compiler for it, which links, and a standard
//! library that is built from rust-src, as rustup's may be out of reach.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Result, anyhow, ensure};
use rustc_build_sysroot::{SysrootBuilder, SysrootConfig, SysrootStatus, rustc_sysroot_src};

use crate::{
    architecture::Architecture,
    build,
    command::{cargo_path, command, find},
    rust_src,
};

/// A program of the C compiler's for an architecture, as `strip`; for this machine's own that is its name.
pub fn tool(architecture: Architecture, name: &str) -> Result<String> {
    if architecture == Architecture::own()? {
        return Ok(name.to_owned());
    }
    let tool = format!("{}-{name}", architecture.gnu());
    ensure!(
        find(&tool).is_some(),
        "there is no {tool}, which building for {architecture} needs: install Debian's packages gcc-{0} \
         and libc6-dev-{architecture}-cross",
        architecture.gnu().replace('_', "-")
    );
    Ok(tool)
}

/// Tells a build how to link for another architecture; the flags that rustc needs beside.
pub fn prepare(build: &mut Command, architecture: Architecture) -> Result<Vec<String>> {
    let target = architecture.target();
    let variable = target.to_uppercase().replace('-', "_");
    let linker = (
        format!("CARGO_TARGET_{variable}_LINKER"),
        tool(architecture, "gcc")?,
    );
    build.envs([linker.clone()]);
    let library = rust_src::sysroot()?.join("lib/rustlib").join(target);
    if library.join("lib").is_dir() {
        return Ok(Vec::new());
    }
    let folder = standard_library(architecture, linker)?;
    Ok(vec![format!("--sysroot={}", folder.display())])
}

/// The folder of a standard library of the active toolchain's own source; built if it is not there.
///
/// Not by cargo's `-Z build-std` in the build itself: that needs RUSTC_BOOTSTRAP for every crate, and
/// switches nightly features on in dependencies.
fn standard_library(architecture: Architecture, linker: (String, String)) -> Result<PathBuf> {
    let folder = build::target().join("sysroot");
    let mut cargo = command(cargo_path());
    cargo.envs([linker]).env("RUSTC_BOOTSTRAP", "1");
    cargo.stderr(Stdio::inherit());
    let built = SysrootBuilder::new(&folder, architecture.target())
        .sysroot_config(SysrootConfig::WithStd {
            std_features: vec!["backtrace".to_owned()],
        })
        .cargo(cargo)
        .when_build_required(|| eprintln!("+ building Rust's standard library for {architecture}"))
        .build_from_source(&rustc_sysroot_src(command("rustc"))?);
    match built {
        Ok(SysrootStatus::AlreadyCached | SysrootStatus::SysrootBuilt) => Ok(folder),
        Err(error) => Err(anyhow!(
            "no standard library for {architecture}: {error:#}; `rustup target add {}` has one as well",
            architecture.target()
        )),
    }
}
