//! Builds the eBPF programs and leaves the object in `OUT_DIR`, where `source::load` includes it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

fn main() -> Result<()> {
    // The eBPF target needs `-Z build-std`, so its build, and only its build, runs with
    // RUSTC_BOOTSTRAP. Set on a child of this script: on the whole workspace it would switch
    // nightly features on in dependencies.
    if std::env::var_os("RUSTC_BOOTSTRAP").is_none_or(|v| v != "1") {
        let out = std::env::var("OUT_DIR").context("cargo sets OUT_DIR")?;
        let mut build = Command::new(std::env::current_exe()?);
        build.env("RUSTC_BOOTSTRAP", "1");
        // The programs are the same in whatever build of the agent: checked, tested, released. What they
        // are made of is built once for all of them, beside these builds. Cargo's own tag marks the target folder,
        // and in it that of a target that was asked for by name.
        let is_marked = |folder: &&Path| folder.join("CACHEDIR.TAG").is_file();
        let above = Path::new(&out).ancestors().skip_while(|f| !is_marked(f));
        if let Some(target) = above.take_while(is_marked).last() {
            build.env("CARGO_BUILD_BUILD_DIR", target.join("ebpf"));
        }
        let status = build.status().context("could not start the eBPF build")?;
        if !status.success() {
            bail!("the eBPF programs were not built; `cargo xtask setup` installs what they need");
        }
        // Read by tests/build.rs: the benchmarks' peers are built in the same go.
        println!("cargo::metadata=programs={out}");
        return Ok(());
    }
    let toolchain = std::env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".to_owned());
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "whydrop-ebpf",
            root_dir: "../agent-ebpf",
            features: &["programs"],
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(&toolchain),
    )
}
