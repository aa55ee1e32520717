//! The tools of a machine whose architecture is not this machine's: Debian's packages, unpacked.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::initramfs;
use crate::{
    apt::Apt,
    architecture::Architecture,
    command::{command, quietly},
};

/// What has the tools that the labs call, and a shell.
const PACKAGES: [&str; 8] = [
    "bash",
    "busybox-static",
    "dash",
    "iproute2",
    "ipset",
    "iptables",
    "kmod",
    "nftables",
];
/// What of it is needed; documentation and translations would only fill the machine's memory.
const FOLDERS: [&str; 4] = ["etc", "usr/bin", "usr/lib", "usr/sbin"];

/// Writes an archive of the tools for the initramfs; `work` is a folder that is not there yet. The suite
/// must have all in `/usr`, as Debian has since 13.
pub fn tools(architecture: Architecture, suite: &str, work: &Path, to: &Path) -> Result<()> {
    let (apt_folder, tree, root) = (work.join("apt"), work.join("tree"), work.join("root"));
    for folder in [&apt_folder, &tree, &root] {
        fs::create_dir_all(folder)?;
    }
    let apt = Apt::of(architecture, &apt_folder, suite)?;
    for package in apt.download(&apt.closure(&PACKAGES)?)? {
        quietly(command("dpkg-deb").arg("-x").arg(package).arg(&tree))?;
    }
    fs::create_dir(root.join("usr"))?;
    for folder in FOLDERS {
        fs::rename(tree.join(folder), root.join(folder))
            .with_context(|| format!("the packages have no {folder}"))?;
    }
    initramfs::archive(&root, to)
}
