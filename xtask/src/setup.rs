//! `cargo xtask setup`: finds or installs what building and testing need, without asking. It looks
//! at files only while nothing is missing, and says by name what it cannot install.

use std::env;

use anyhow::{Context as _, Error, Result, bail, ensure};
use nix::unistd::geteuid;

use crate::{
    command::{cargo, command, find, output, run as execute},
    prometheus,
    rust_src::{self, rustup_add},
};

/// The linker of the eBPF programs; the version that the programs are tested with.
const BPF_LINKER: &str = "0.10.3";

/// What a missing part keeps from working.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing can be built.
    Build,
    /// The labs and benchmarks cannot run.
    Lab,
    /// Nothing can be built for the other architecture.
    Cross,
    /// No other kernel can be run in a virtual machine.
    Vm,
    /// None of the other architecture can.
    CrossVm,
    /// No API server can be built to test against.
    Kube,
    /// No kubelet can run pods.
    Node,
    /// The fuzz targets cannot be built.
    Fuzz,
    /// Prometheus can neither check the rules nor scrape.
    Prometheus,
    /// `cargo fmt` cannot run.
    Format,
    /// `cargo clippy` cannot run.
    Clippy,
}

/// A part that is not there and could not be installed.
#[derive(Debug)]
pub struct Missing {
    /// Its name.
    pub what: String,
    /// What does not work without it.
    pub need: Need,
    /// Why it could not be installed, and what the user can do.
    pub advice: String,
}

/// What set-up could not install; empty on a machine that can do everything.
#[derive(Debug, Default)]
pub struct Found {
    missing: Vec<Missing>,
}

impl Found {
    /// An error that names what building lacks.
    pub fn ready_to_build(&self) -> Result<()> {
        let names = self.names(Need::Build);
        ensure!(
            names.is_empty(),
            "cannot build without {}",
            names.join(", ")
        );
        Ok(())
    }

    /// Installs what virtual machines need as well: an emulator is much for somebody who only builds.
    pub fn with_vm(mut self) -> Self {
        let known = self.missing.len();
        packages(&mut self, |need| need == Need::Vm);
        self.say(known);
        self
    }

    /// Installs what virtual machines of the other architecture need as well.
    pub fn with_other_vm(mut self) -> Self {
        let known = self.missing.len();
        packages(&mut self, |need| {
            matches!(need, Need::Cross | Need::CrossVm)
        });
        self.say(known);
        self
    }

    /// Installs the C compiler for the other architecture as well.
    pub fn with_cross(mut self) -> Self {
        let known = self.missing.len();
        packages(&mut self, |need| need == Need::Cross);
        self.say(known);
        self
    }

    /// Installs what building a Kubernetes and running a node of it needs as well.
    pub fn with_kube(mut self) -> Self {
        let known = self.missing.len();
        packages(&mut self, |need| matches!(need, Need::Kube | Need::Node));
        self.say(known);
        self
    }

    /// Fetches Prometheus: 20 MB that only the groups `deploy` and `kube` need.
    pub fn with_prometheus(mut self) -> Self {
        let known = self.missing.len();
        if let Err(error) = prometheus::fetch() {
            self.missing.push(Missing {
                what: "prometheus".to_owned(),
                need: Need::Prometheus,
                advice: format!("{error:#}; install Prometheus"),
            });
        }
        self.say(known);
        self
    }

    /// Says what is missing, from a part on.
    fn say(&self, from: usize) {
        for part in &self.missing[from..] {
            eprintln!("setup: {} is missing; {}", part.what, part.advice);
        }
    }

    fn names(&self, need: Need) -> Vec<&str> {
        let parts = self.missing.iter().filter(|part| part.need == need);
        parts.map(|part| part.what.as_str()).collect()
    }

    /// Why something cannot run here; none if nothing it needs is missing.
    pub fn lacks(&self, need: Need) -> Option<String> {
        let first = self.missing.iter().find(|part| part.need == need)?;
        let names = self.names(need).join(", ");
        Some(format!("{names} missing; {}", first.advice))
    }

    /// What `cargo xtask setup` says at its end; an error only if nothing can be built.
    pub fn report(&self) -> Result<()> {
        self.ready_to_build()?;
        println!(
            "setup: {}",
            if self.missing.is_empty() {
                "everything is there"
            } else {
                "ready to build; the tests that need a missing part are skipped"
            }
        );
        Ok(())
    }
}

/// A system package by its Debian name, and the programs by which it is recognised.
struct Package {
    name: &'static str,
    programs: &'static [&'static str],
    need: Need,
}

const PACKAGES: &[Package] = &[
    lab("nftables", &["nft"]),
    lab(
        "iptables",
        &["iptables-nft", "iptables-legacy", "ip6tables-legacy"],
    ),
    lab("ipset", &["ipset"]),
    lab("iproute2", &["ip", "tc", "ss"]),
    lab("bpftrace", &["bpftrace"]),
    lab("iputils-ping", &["ping"]),
    lab("procps", &["sysctl"]),
    lab("ethtool", &["ethtool"]),
    vm("qemu-system-x86", &["qemu-system-x86_64"]),
    vm("busybox-static", &["busybox"]),
    vm("cpio", &["cpio"]),
    vm("kmod", &["depmod", "modprobe"]),
    Package {
        name: "qemu-system-arm",
        programs: &["qemu-system-aarch64"],
        need: Need::CrossVm,
    },
    Package {
        name: "golang-go",
        programs: &["go"],
        need: Need::Kube,
    },
    node(
        "containerd",
        &["containerd", "ctr", "containerd-shim-runc-v2"],
    ),
    node("runc", &["runc"]),
    // Programs that no PATH names.
    node(
        "containernetworking-plugins",
        &["/usr/lib/cni/ptp", "/usr/lib/cni/host-local"],
    ),
    node("busybox-static", &["busybox"]),
    Package {
        name: "g++",
        programs: &["c++"],
        need: Need::Fuzz,
    },
];

/// What builds for the architecture that this machine does not have.
const CROSS: [Package; 2] = if cfg!(target_arch = "aarch64") {
    [
        cross("gcc-x86-64-linux-gnu", &["x86_64-linux-gnu-gcc"]),
        cross(
            "libc6-dev-amd64-cross",
            &["/usr/x86_64-linux-gnu/lib/libc.a"],
        ),
    ]
} else {
    [
        cross("gcc-aarch64-linux-gnu", &["aarch64-linux-gnu-gcc"]),
        cross(
            "libc6-dev-arm64-cross",
            &["/usr/aarch64-linux-gnu/lib/libc.a"],
        ),
    ]
};

const fn lab(name: &'static str, programs: &'static [&'static str]) -> Package {
    Package {
        name,
        programs,
        need: Need::Lab,
    }
}

const fn vm(name: &'static str, programs: &'static [&'static str]) -> Package {
    Package {
        name,
        programs,
        need: Need::Vm,
    }
}

const fn cross(name: &'static str, programs: &'static [&'static str]) -> Package {
    Package {
        name,
        programs,
        need: Need::Cross,
    }
}

const fn node(name: &'static str, programs: &'static [&'static str]) -> Package {
    Package {
        name,
        programs,
        need: Need::Node,
    }
}

impl Package {
    fn lacks(&self) -> Vec<&'static str> {
        let programs = self.programs.iter().copied();
        programs.filter(|program| find(program).is_none()).collect()
    }
}

/// Installs what is missing, but not what virtual machines or a cluster need. Errors only where the toolchain
/// itself does not answer; a part that cannot be installed is reported in what it returns.
pub fn run() -> Result<Found> {
    let mut found = Found::default();
    rust_components(&mut found)?;
    bpf_linker(&mut found);
    packages(&mut found, |need| {
        !matches!(
            need,
            Need::Vm | Need::Cross | Need::CrossVm | Need::Kube | Need::Node
        )
    });
    found.say(0);
    Ok(found)
}

fn rust_components(found: &mut Found) -> Result<()> {
    let sysroot = rust_src::sysroot()?;
    if !rust_src::there(&sysroot)
        && let Err(error) = rust_src::install(&sysroot)
    {
        found.missing.push(Missing {
            what: "rust-src".to_owned(),
            need: Need::Build,
            advice: rust_advice(&error, "rust-src"),
        });
    }
    for (component, program, need) in [
        ("rustfmt", "cargo-fmt", Need::Format),
        ("clippy", "cargo-clippy", Need::Clippy),
    ] {
        // A distribution's Rust has them on PATH. rustup's proxies are there as well, but they do
        // nothing without the component, so a rustup toolchain is looked at itself.
        let there = sysroot.join("bin").join(program).is_file()
            || (find("rustup").is_none() && find(program).is_some());
        if !there && let Err(error) = rustup_add(component) {
            found.missing.push(Missing {
                what: component.to_owned(),
                need,
                advice: rust_advice(&error, component),
            });
        }
    }
    Ok(())
}

fn rust_advice(error: &Error, component: &str) -> String {
    if find("rustup").is_some() {
        format!("{error:#}; run `rustup component add {component}`")
    } else {
        format!("{error:#}")
    }
}

fn bpf_linker(found: &mut Found) {
    let version = || {
        find("bpf-linker")
            .and_then(|linker| output(command(linker).arg("--version")).ok())
            .is_some_and(|text| text.trim() == format!("bpf-linker {BPF_LINKER}"))
    };
    if version() {
        return;
    }
    eprintln!("setup: installing bpf-linker {BPF_LINKER}");
    let package = format!("bpf-linker@{BPF_LINKER}");
    let advice = match execute(cargo("install").args([&package, "--force"])) {
        Ok(()) if version() => return,
        Ok(()) => "it was installed, but PATH finds another version first".to_owned(),
        Err(error) => format!("{error:#}; run `cargo install {package} --locked --force`"),
    };
    found.missing.push(Missing {
        what: format!("bpf-linker {BPF_LINKER}"),
        need: Need::Build,
        advice,
    });
}

fn packages(found: &mut Found, wanted: impl Fn(Need) -> bool) {
    let lacking =
        |packages: &mut Vec<&Package>| packages.retain(|package| !package.lacks().is_empty());
    let mut missing: Vec<_> = PACKAGES.iter().chain(&CROSS).collect();
    missing.retain(|package| wanted(package.need));
    lacking(&mut missing);
    if missing.is_empty() {
        return;
    }
    let (apt, root) = (find("apt-get").is_some(), geteuid().is_root());
    let mut failure = None;
    if apt && root {
        failure = apt_install(&missing).err();
        lacking(&mut missing);
    }
    let names: Vec<_> = missing.iter().map(|package| package.name).collect();
    let names = names.join(" ");
    let advice = match failure {
        Some(error) => format!("{error:#}"),
        None if apt && root => "its package was installed, but PATH does not find it".to_owned(),
        None if apt => format!("not root; run `sudo apt-get install {names}`"),
        None => {
            format!("this is no Debian or Ubuntu; install what your distribution calls {names}")
        }
    };
    found.missing.extend(missing.iter().map(|package| Missing {
        what: format!("{} (package {})", package.lacks().join(", "), package.name),
        need: package.need,
        advice: advice.clone(),
    }));
}

fn apt_install(packages: &[&Package]) -> Result<()> {
    let names: Vec<_> = packages.iter().map(|package| package.name).collect();
    eprintln!("setup: installing {}", names.join(" "));
    let apt = |arguments: &[&str]| {
        execute(
            command("apt-get")
                .env("DEBIAN_FRONTEND", "noninteractive")
                .arg("-qq")
                .args(arguments),
        )
    };
    // A source of somebody else's that does not answer must not stop Debian's own packages.
    let updated = apt(&["update"]);
    let install = ["install", "--yes", "--no-install-recommends"];
    if apt(&[&install[..], &names].concat()).is_ok() {
        return Ok(());
    }
    // One package that this release lacks must not keep the others away.
    let mut refused = Vec::new();
    for name in names {
        if apt(&[&install[..], &[name]].concat()).is_err() {
            refused.push(name);
        }
    }
    if refused.is_empty() {
        return Ok(());
    }
    updated.context("apt-get could not refresh its package lists")?;
    bail!("apt-get cannot install {}", refused.join(" "))
}

/// The value of an environment variable, if it is set and not empty.
pub fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(what: &str, need: Need) -> Missing {
        Missing {
            what: what.to_owned(),
            need,
            advice: "run `x`".to_owned(),
        }
    }

    #[test]
    fn only_what_building_needs_is_an_error() {
        let lab_only = Found {
            missing: vec![missing("nft", Need::Lab), missing("ip", Need::Lab)],
        };
        assert!(lab_only.ready_to_build().is_ok());
        assert!(lab_only.report().is_ok());
        assert_eq!(
            lab_only.lacks(Need::Lab).unwrap(),
            "nft, ip missing; run `x`"
        );
        assert_eq!(lab_only.lacks(Need::Fuzz), None);

        let no_linker = Found {
            missing: vec![missing("bpf-linker", Need::Build)],
        };
        let error = no_linker.report().unwrap_err().to_string();
        assert_eq!(error, "cannot build without bpf-linker");
    }

    #[test]
    fn a_package_names_the_programs_it_lacks() {
        let package = lab("some", &["sh", "no-such-program"]);
        assert_eq!(package.lacks(), ["no-such-program"]);
    }
}
