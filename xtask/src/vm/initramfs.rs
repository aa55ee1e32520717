//! What the machine boots into: this machine's own network tools with their libraries, busybox for
//! the rest, and the programs to run. All are read from memory; there is no disk. A machine of another
//! architecture has Debian's tools (`foreign.rs`).

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use super::kernels::Kernel;
use crate::{
    architecture::Architecture,
    command::{command, find, output},
    cross,
};

/// The first process.
const INIT: &str = include_str!("init.sh");
/// The tools that the labs call, and those that somebody who looks around wants.
const TOOLS: [&str; 25] = [
    "bash",
    "bridge",
    "env",
    "ethtool",
    "ip",
    "ip6tables",
    "ip6tables-legacy",
    "ip6tables-nft",
    "ipset",
    "iptables",
    "iptables-legacy",
    "iptables-nft",
    "kmod",
    "modprobe",
    "nft",
    "nsenter",
    "ping",
    "setpriv",
    // busybox's prefer its own applets to every program.
    "sh",
    "ss",
    "sysctl",
    "taskset",
    "tc",
    "timeout",
    "unshare",
];
/// Folders of what those tools load by name.
const PLUGINS: [&str; 3] = ["xtables", "tc", "iproute2"];
/// Where those tools look names up.
const NAMES: [&str; 2] = ["/etc/protocols", "/etc/services"];

/// Writes the initramfs: the tools, a kernel's modules, programs, and the steps (a shell script that
/// `init.sh` reads).
pub fn write(
    to: &Path,
    kernel: &Kernel,
    programs: &[(PathBuf, String)],
    steps: &str,
) -> Result<()> {
    let folder = to.parent().context("the initramfs has no folder")?;
    let root = TempDir::with_prefix_in("root-", folder)?;
    let root = root.path();
    for name in ["bin", "sbin", "lib"] {
        fs::create_dir_all(root.join("usr").join(name))?;
        symlink(format!("usr/{name}"), root.join(name))?;
    }
    symlink("usr/lib", root.join("lib64"))?;
    symlink("lib", root.join("usr/lib64"))?;
    let mut others = vec![kernel.modules()];
    match kernel.tools() {
        Some(archive) => others.push(archive),
        None => tools(root)?,
    }
    for (program, path) in programs {
        copy(program, &root.join(path.trim_start_matches('/')))?;
    }
    fs::write(root.join("init"), INIT)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    fs::write(root.join("steps"), steps)?;
    archive(root, to)?;
    // The kernel unpacks one archive after the other.
    let mut file = fs::OpenOptions::new().append(true).open(to)?;
    for other in others {
        let mut other =
            fs::File::open(&other).with_context(|| format!("open {}", other.display()))?;
        io::copy(&mut other, &mut file)?;
    }
    file.flush()?;
    Ok(())
}

/// Writes a folder as an archive that the kernel unpacks.
pub fn archive(root: &Path, to: &Path) -> Result<()> {
    // cpio wants the names on its standard input.
    let mut names = command("find")
        .args([".", "-mindepth", "1", "-print0"])
        .current_dir(root)
        .stdout(Stdio::piped())
        .spawn()
        .context("could not start find")?;
    let list = names.stdout.take().context("find has no output")?;
    let status = command("cpio")
        .args(["--create", "--format=newc", "--null", "--quiet"])
        .args(["--owner=0:0", "--reproducible"])
        .current_dir(root)
        .stdin(list)
        .stdout(fs::File::create(to).with_context(|| format!("create {}", to.display()))?)
        .status()
        .context("could not start cpio")?;
    ensure!(
        names.wait()?.success() && status.success(),
        "cpio failed with {status}"
    );
    Ok(())
}

fn tools(root: &Path) -> Result<()> {
    let bin = root.join("usr/bin");
    let mut loaded = vec![find("busybox").context("there is no busybox")?];
    copy(&loaded[0], &bin.join("busybox"))?;
    for tool in TOOLS {
        // What a lab misses it names; the machine must not depend on a tool that no lab calls.
        if let Some(path) = find(tool) {
            copy(&path, &bin.join(tool))?;
            loaded.push(path);
        }
    }
    // kernel.modprobe, by which the kernel itself loads modules.
    symlink("../bin/modprobe", root.join("usr/sbin/modprobe"))?;
    let mut others = plugins()?;
    loaded.extend(others.iter().cloned());
    others.extend(libraries(&loaded)?);
    others.extend(
        NAMES
            .map(PathBuf::from)
            .into_iter()
            .filter(|file| file.is_file()),
    );
    for file in others {
        copy(&file, &root.join(file.strip_prefix("/").unwrap_or(&file)))?;
    }
    Ok(())
}

/// The files of the folders in [`PLUGINS`], wherever this distribution has them.
fn plugins() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut parents = vec![PathBuf::from("/usr/lib"), PathBuf::from("/usr/lib64")];
    // Debian has them in a folder that is named after the architecture.
    parents.extend(
        fs::read_dir("/usr/lib")?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.to_string_lossy().ends_with("-linux-gnu")),
    );
    for folder in parents {
        for name in PLUGINS {
            let Ok(entries) = fs::read_dir(folder.join(name)) else {
                continue;
            };
            let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
            found.extend(files.filter(|path| path.is_file()));
        }
    }
    Ok(found)
}

/// The libraries of programs, by the dynamic loader itself.
fn libraries(files: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for file in files {
        // It fails for what is linked statically.
        let text = command("ldd").arg(file).stderr(Stdio::null()).output();
        let text = text.context("could not start ldd")?;
        for path in shared(&String::from_utf8_lossy(&text.stdout)) {
            if !found.contains(&path) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// The paths in what ldd prints: `libc.so.6 => /lib/libc.so.6 (0x…)` or `/lib/ld.so (0x…)`.
fn shared(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            line.split_whitespace()
                .find(|word| word.starts_with('/'))
                .map(PathBuf::from)
        })
        .collect()
}

/// Copies a file without what debuggers need, which would be nine tenths of the machine's memory.
pub fn strip(architecture: Architecture, from: &Path, to: &Path) -> Result<()> {
    let strip = cross::tool(architecture, "strip")?;
    if find(&strip).is_none() {
        return copy(from, to);
    }
    output(command(strip).arg("-o").arg(to).arg(from)).map(drop)
}

/// Copies what a path leads to, with its mode.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\
            \tlibmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            shared(text),
            [
                Path::new("/lib/x86_64-linux-gnu/libmnl.so.0"),
                Path::new("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert_eq!(
            shared("\tnot a dynamic executable\n"),
            [""; 0].map(PathBuf::from)
        );
    }
}
