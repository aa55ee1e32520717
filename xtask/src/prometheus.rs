//! Prometheus' programs: those on PATH, else from Debian's package, unpacked into target/prometheus/. It is
//! not installed, because that would start a server on a machine that nobody asked to run one.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    build::target,
    command::{command, find, quietly},
    go::Module,
};

const PACKAGE: &str = "prometheus";
const PROGRAMS: [&str; 2] = ["prometheus", "promtool"];

/// Where a program is, if it is there.
pub fn program(name: &str) -> Option<PathBuf> {
    let unpacked = target().join("prometheus/usr/bin").join(name);
    find(name).or_else(|| unpacked.is_file().then_some(unpacked))
}

/// Prometheus with the discovery of Kubernetes, which Debian builds it without. Five minutes on two idle
/// cores where it must be built.
///
/// # Errors
/// There is no Go, no module proxy answers, or it does not build.
pub fn with_discovery() -> Result<PathBuf> {
    let module = Module {
        source: "tests/kube/prometheus",
        to: "prometheus-kubernetes",
        programs: &[(
            "prometheus",
            "github.com/prometheus/prometheus/cmd/prometheus",
        )],
        // The discovery of every cloud there is would take most of the build.
        tags: "remove_all_sd,enable_kubernetes_sd",
    };
    Ok(module.built(|| Ok(String::new()))?.join("prometheus"))
}

/// Gets what is missing.
pub fn fetch() -> Result<()> {
    let has_all = || PROGRAMS.iter().all(|name| program(name).is_some());
    if has_all() {
        return Ok(());
    }
    for tool in ["apt-get", "dpkg-deb"] {
        ensure!(find(tool).is_some(), "there is no {tool}");
    }
    eprintln!("setup: fetching {PACKAGE}");
    fs::create_dir_all(target())?;
    let work = tempfile::tempdir_in(target())?;
    let package = download(work.path())?;
    let unpacked = work.path().join("unpacked");
    quietly(command("dpkg-deb").arg("-x").arg(package).arg(&unpacked))?;
    let kept = target().join("prometheus");
    if kept.exists() {
        fs::remove_dir_all(&kept)?;
    }
    fs::rename(unpacked, kept)?;
    ensure!(has_all(), "Debian's {PACKAGE} lacks one of {PROGRAMS:?}");
    Ok(())
}

/// The package of this machine's own release, as a file.
fn download(folder: &Path) -> Result<PathBuf> {
    let apt = |arguments: &[&str]| {
        quietly(
            command("apt-get")
                .args(["-qq", "-o", "APT::Sandbox::User=root"])
                .args(arguments)
                .current_dir(folder),
        )
    };
    if apt(&["download", PACKAGE]).is_err() {
        // The lists may be older than the mirror. Who is not root cannot refresh them.
        let updated = apt(&["update"]);
        apt(&["download", PACKAGE]).or_else(|error| updated.and(Err(error)))?;
    }
    fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get left no package {PACKAGE}"))
}
