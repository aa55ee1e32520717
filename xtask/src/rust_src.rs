//! rust-src for the active toolchain: `core`'s source, which `-Z build-std=core` compiles for the
//! eBPF target. From rustup; where its server is out of reach, from Debian's package of exactly the
//! same version. `RUST_SRC_FROM=rustup|debian|auto` chooses.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;

use crate::{
    apt::Apt,
    command::{command, field, find, output, quietly, root},
    setup::variable,
};

/// Without an answer from its server rustup waits without end.
const RUSTUP_LIMIT: Duration = Duration::from_secs(20);
/// Where Debian keeps new Rust versions for its stable release.
const DEBIAN_SUITE: &str = "trixie-backports";

/// The folder of the active toolchain.
pub fn sysroot() -> Result<PathBuf> {
    let path = output(command("rustc").args(["--print", "sysroot"]))?;
    Ok(PathBuf::from(path.trim()))
}

fn folder(sysroot: &Path) -> PathBuf {
    sysroot.join("lib/rustlib/src/rust")
}

/// Whether the source is there and whole.
pub fn there(sysroot: &Path) -> bool {
    let library = folder(sysroot).join("library");
    library.join("core/src/lib.rs").is_file() && library.join("Cargo.lock").is_file()
}

/// Installs it, in place of an incomplete copy if there is one.
pub fn install(sysroot: &Path) -> Result<()> {
    let from = variable("RUST_SRC_FROM").unwrap_or_else(|| "auto".to_owned());
    // A toolchain that rustup does not manage belongs to a distribution's package manager: nothing
    // is put into it unless Debian is asked for by name.
    let (rustup, debian) = match from.as_str() {
        "rustup" => (true, false),
        "debian" => (false, true),
        "auto" => (true, find("rustup").is_some()),
        other => bail!("RUST_SRC_FROM={other} is none of rustup, debian, auto"),
    };
    // rustup refuses to install over an incomplete copy ("detected conflict").
    let folder = folder(sysroot);
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot replace the incomplete {}", folder.display()))?;
    }
    let mut failures = Vec::new();
    if rustup {
        match rustup_add("rust-src") {
            Ok(()) if there(sysroot) => return Ok(()),
            // rustup neither repairs nor removes a component whose files are gone.
            Ok(()) => failures.push(
                "rustup takes it for installed; `rustup toolchain uninstall` and `install` repair it"
                    .to_owned(),
            ),
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    if debian {
        match from_debian(&folder) {
            Ok(()) if there(sysroot) => return Ok(()),
            Ok(()) => failures.push("Debian's package is incomplete".to_owned()),
            Err(error) => failures.push(format!("from Debian: {error:#}")),
        }
    }
    bail!(failures.join("; "))
}

/// Adds a component to the active toolchain, within a limit.
pub fn rustup_add(component: &str) -> Result<()> {
    ensure!(
        find("rustup").is_some(),
        "there is no rustup; install your distribution's {component}, or Rust by https://rustup.rs"
    );
    eprintln!("setup: installing {component} by rustup");
    within(
        command("rustup").args(["component", "add", component]),
        RUSTUP_LIMIT,
    )
    .with_context(|| format!("rustup cannot install {component}"))
}

fn within(command: &mut Command, limit: Duration) -> Result<()> {
    let mut child = command.spawn().context("it could not be started")?;
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "it failed with {status}");
            return Ok(());
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("no end after {} s", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn from_debian(destination: &Path) -> Result<()> {
    ensure!(find("tar").is_some(), "there is no tar");
    let release = field(&output(command("rustc").arg("-vV"))?, "release")?;
    eprintln!("setup: installing rust-src {release} from Debian's {DEBIAN_SUITE}");

    let target = root().join("target");
    fs::create_dir_all(&target)?;
    let work = TempDir::with_prefix_in("rust-src-", &target)?;
    let apt = Apt::new(work.path(), DEBIAN_SUITE)?;
    let versions = output(apt.tool("apt-cache").args(["madison", "rust-src"]))?;
    let version = debian_version(&versions, &release)
        .with_context(|| format!("{DEBIAN_SUITE} has no rust-src {release}"))?;
    let packages = apt.download(&[format!("rust-src={version}")])?;
    let package = packages.first().context("apt-get left no package")?;

    // Beside the destination, so that it appears whole, by one rename, or not at all.
    let parent = destination.parent().context("the sysroot has no folder")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot write to {}", parent.display()))?;
    let staging = TempDir::with_prefix_in("whydrop-", parent)
        .with_context(|| format!("cannot write to {}", parent.display()))?;
    extract(package, &release, staging.path())?;
    fs::create_dir_all(destination)?;
    fs::rename(staging.path().join("library"), destination.join("library"))?;
    Ok(())
}

/// Only the standard library, and not its vendor/ folder, which Debian has pruned: rustup ships
/// none, and cargo takes those crates from the registry.
fn extract(package: &Path, release: &str, into: &Path) -> Result<()> {
    let library = format!("./usr/src/rustc-{release}/library");
    let mut unpack = command("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("could not start dpkg-deb")?;
    let stream = unpack.stdout.take().context("dpkg-deb has no output")?;
    let untarred = quietly(
        command("tar")
            .arg("-xC")
            .arg(into)
            .args([
                "--strip-components=4",
                &format!("--exclude={library}/vendor"),
                &library,
            ])
            .stdin(stream),
    );
    let unpacked = unpack.wait()?;
    untarred?;
    ensure!(unpacked.success(), "dpkg-deb failed with {unpacked}");
    Ok(())
}

/// The package version of exactly this release in the output of `apt-cache madison`.
fn debian_version(madison: &str, release: &str) -> Option<String> {
    let start = format!("{release}+dfsg");
    madison
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(str::trim)
        .find(|version| version.starts_with(&start))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_exactly_the_release_of_the_toolchain() {
        let madison = "\
            rust-src | 1.96.0+dfsg1-1~bpo13+1 | http://deb.debian.org/debian trixie-backports/main amd64 Packages\n\
            rust-src | 1.95.0+dfsg2-1~bpo13+1 | http://deb.debian.org/debian trixie-backports/main amd64 Packages\n";
        assert_eq!(
            debian_version(madison, "1.95.0").as_deref(),
            Some("1.95.0+dfsg2-1~bpo13+1")
        );
        assert_eq!(debian_version(madison, "1.95"), None);
        assert_eq!(debian_version("", "1.95.0"), None);
    }

    #[test]
    fn an_incomplete_copy_is_not_there() {
        let sysroot = TempDir::new().unwrap();
        let library = folder(sysroot.path()).join("library");
        fs::create_dir_all(library.join("core/src")).unwrap();
        fs::write(library.join("core/src/lib.rs"), "").unwrap();
        assert!(!there(sysroot.path()));
        fs::write(library.join("Cargo.lock"), "").unwrap();
        assert!(there(sysroot.path()));
    }

    #[test]
    fn a_command_without_end_is_ended() {
        let error = within(command("sleep").arg("60"), Duration::ZERO).unwrap_err();
        assert_eq!(error.to_string(), "no end after 0 s");
        let error = within(&mut command("false"), Duration::from_secs(60)).unwrap_err();
        assert!(error.to_string().starts_with("it failed with"), "{error}");
    }
}
