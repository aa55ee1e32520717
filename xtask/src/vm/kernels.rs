//! Debian's kernels, fetched by apt and kept in `target/vm/kernels/SUITE`, of another architecture in
//! `SUITE-ARCHITECTURE` with the tools for it. A folder there is whole: it appears by one rename. Removing
//! it is how to get the suite's newest kernel.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    apt::Apt,
    architecture::Architecture,
    command::{command, quietly},
    vm::{self, foreign, initramfs},
};

/// The package that names a suite's newest kernel for virtual machines, before the architecture.
const META: &str = "linux-image-cloud-";
/// What its parts are called, before their version; the image alone until 7.x.
const PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];
/// Modules that the labs can need, below `kernel/`; all others would only fill the machine's memory.
const MODULES: [&str; 6] = ["arch", "crypto", "drivers", "lib", "net", "security"];
const DRIVERS: [&str; 1] = ["net"];
/// Drivers of hardware that no virtual machine has.
const NO_DRIVERS: [&str; 3] = ["ethernet", "wireless", "wwan"];

const TOOLS: &str = "tools.cpio";

/// A kernel that is ready to boot.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` shows it.
    pub release: String,
    /// What it runs on.
    pub architecture: Architecture,
    folder: PathBuf,
}

impl Kernel {
    /// The image.
    pub fn image(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// Its modules, as an archive for the initramfs.
    pub fn modules(&self) -> PathBuf {
        self.folder.join("modules.cpio")
    }

    /// The tools of its architecture, as an archive for the initramfs; none if this machine's own will do.
    pub fn tools(&self) -> Option<PathBuf> {
        Some(self.folder.join(TOOLS)).filter(|file| file.is_file())
    }
}

/// The kernel of a suite: the one that was kept, else the newest that apt finds.
pub fn get(suite: &str, architecture: Architecture) -> Result<Kernel> {
    let kernels = vm::folder().join("kernels");
    let own = architecture == Architecture::own()?;
    let folder = kernels.join(if own {
        suite.to_owned()
    } else {
        format!("{suite}-{architecture}")
    });
    if !folder.exists() {
        fs::create_dir_all(&kernels)?;
        let work = vm::work()?;
        let ready = fetch(suite, architecture, work.path())
            .with_context(|| format!("no kernel of Debian's {suite} for {architecture}"))?;
        // Somebody else may have been quicker; theirs is as good.
        if let Err(error) = fs::rename(&ready, &folder)
            && !folder.exists()
        {
            return Err(error).with_context(|| format!("cannot create {}", folder.display()));
        }
    }
    let release = fs::read_to_string(folder.join("release"))
        .with_context(|| format!("{} is no kernel; remove it", folder.display()))?;
    Ok(Kernel {
        release,
        architecture,
        folder,
    })
}

/// Makes a kernel's folder below `work`.
fn fetch(suite: &str, architecture: Architecture, work: &Path) -> Result<PathBuf> {
    eprintln!("vm: fetching the kernel of Debian's {suite} for {architecture}");
    let (apt_folder, tree, ready) = (work.join("apt"), work.join("tree"), work.join("ready"));
    for folder in [&apt_folder, &tree, &ready] {
        fs::create_dir(folder)?;
    }
    let apt = Apt::of(architecture, &apt_folder, suite)?;
    let meta = format!("{META}{architecture}");
    for package in apt.download(&parts(&meta, |package| apt.depends(package))?)? {
        quietly(command("dpkg-deb").arg("-x").arg(package).arg(&tree))?;
    }
    if architecture != Architecture::own()? {
        foreign::tools(architecture, suite, &work.join("tools"), &ready.join(TOOLS))?;
    }
    let (modules, release) = modules_folder(&tree)?;
    let image = [
        modules.join("vmlinuz"),
        tree.join(format!("boot/vmlinuz-{release}")),
    ];
    let image = image.iter().find(|file| file.is_file());
    let image = image.with_context(|| format!("the packages of {release} hold no vmlinuz"))?;
    fs::rename(image, ready.join("vmlinuz"))?;

    let root = work.join("root");
    let target = root.join("usr/lib/modules").join(&release);
    fs::create_dir_all(target.join("kernel"))?;
    prune(&modules.join("kernel"))?;
    fs::rename(modules.join("kernel"), target.join("kernel"))?;
    symlink("usr/lib", root.join("lib"))?;
    // It warns of lists that some releases keep in another package; nothing here needs them.
    let mut depmod = command("depmod");
    quietly(
        depmod
            .arg("-b")
            .arg(&root)
            .arg(&release)
            .stderr(Stdio::null()),
    )?;
    // The tools' own archive has this link as well.
    fs::remove_file(root.join("lib"))?;
    initramfs::archive(&root, &ready.join("modules.cpio"))?;
    fs::write(ready.join("release"), &release)?;
    Ok(ready)
}

/// The packages that a kernel is made of, from its meta package's dependencies down.
fn parts(meta: &str, depends: impl Fn(&str) -> Result<Vec<String>>) -> Result<Vec<String>> {
    let (mut parts, mut next) = (Vec::new(), vec![meta.to_owned()]);
    while let Some(package) = next.pop() {
        for dependency in depends(&package)? {
            let is_part = PARTS.iter().any(|start| {
                dependency
                    .strip_prefix(start)
                    .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
            });
            if is_part && !parts.contains(&dependency) {
                parts.push(dependency.clone());
                next.push(dependency);
            }
        }
    }
    ensure!(!parts.is_empty(), "{meta} depends on no kernel");
    Ok(parts)
}

/// The one folder of modules, and the release that it is named after.
fn modules_folder(tree: &Path) -> Result<(PathBuf, String)> {
    for folder in ["usr/lib/modules", "lib/modules"] {
        if let Ok(mut entries) = fs::read_dir(tree.join(folder))
            && let Some(entry) = entries.next()
        {
            let entry = entry?;
            return Ok((
                entry.path(),
                entry.file_name().to_string_lossy().into_owned(),
            ));
        }
    }
    anyhow::bail!("the packages hold no modules")
}

/// Removes the modules that no lab needs.
fn prune(kernel: &Path) -> Result<()> {
    keep(kernel, |name| MODULES.contains(&name))?;
    keep(&kernel.join("drivers"), |name| DRIVERS.contains(&name))?;
    keep(&kernel.join("drivers/net"), |name| {
        !NO_DRIVERS.contains(&name)
    })
}

fn keep(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let entry = entry?;
        if wanted(&entry.file_name().to_string_lossy()) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = "linux-image-cloud-amd64";

    fn of(depends: &[(&str, &[&str])]) -> Result<Vec<String>> {
        let find = |package: &str| {
            let entry = depends.iter().find(|(name, _)| *name == package);
            let names = entry.map_or(&[][..], |(_, names)| names);
            Ok(names.iter().map(|name| (*name).to_owned()).collect())
        };
        parts(META, find)
    }

    #[test]
    fn follows_the_meta_package_to_the_parts() {
        let one = [
            (META, &["linux-image-6.1.0-9-cloud-amd64"][..]),
            ("linux-image-6.1.0-9-cloud-amd64", &["kmod", "linux-base"]),
        ];
        assert_eq!(of(&one).unwrap(), ["linux-image-6.1.0-9-cloud-amd64"]);
        let three = [
            (
                META,
                &["linux-base-cloud-amd64", "linux-image-7.2-cloud"][..],
            ),
            (
                "linux-image-7.2-cloud",
                &[
                    "linux-base-7.2-cloud",
                    "linux-binary-7.2-cloud",
                    "linux-modules-7.2-cloud",
                ],
            ),
            ("linux-binary-7.2-cloud", &["linux-modules-7.2-cloud"]),
        ];
        assert_eq!(
            of(&three).unwrap(),
            [
                "linux-image-7.2-cloud",
                "linux-binary-7.2-cloud",
                "linux-modules-7.2-cloud"
            ]
        );
        assert!(of(&[(META, &["linux-base"])]).is_err());
    }
}
