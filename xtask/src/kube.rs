//! The programs of a real Kubernetes: from `KUBEBUILDER_ASSETS`, by envtest's convention, where they
//! are; else built once from their Go modules (tests/kube/go.mod) into `target/kube/`.

use std::{env, fs, path::PathBuf, time::Instant};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::{
    architecture::Architecture,
    build,
    command::{command, find, output, root, run as execute},
    oci::{self, Image},
};

/// What the tests run, and each one's Go package.
const PROGRAMS: [(&str, &str); 7] = [
    ("etcd", "go.etcd.io/etcd/server/v3"),
    ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    (
        "kube-controller-manager",
        "k8s.io/kubernetes/cmd/kube-controller-manager",
    ),
    ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
    ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
];
/// The image of the real node's pods; tests/kube/src/node.rs asks for the same one.
const BUSYBOX: &str = "localhost/busybox:1";

/// The folder with all programs. Six minutes on two idle cores where they must be built.
///
/// # Errors
/// There is no Go, no module proxy answers, or a program does not build.
pub fn programs() -> Result<PathBuf> {
    if let Some(assets) = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from)
        && PROGRAMS.iter().all(|(name, _)| assets.join(name).is_file())
    {
        return Ok(assets);
    }
    let source = root().join("tests/kube");
    let folder = build::target().join("kube/bin");
    // A program is as old as what it was built from.
    let stamp = build::target().join("kube/go.sum");
    let wanted = fs::read(source.join("go.sum")).context("read tests/kube/go.sum")?;
    let is_current = fs::read(&stamp).is_ok_and(|built| built == wanted);
    let go = |arguments: &[&str]| {
        let mut go = command("go");
        go.current_dir(&source).args(arguments);
        // Static: the programs run wherever they are copied.
        go.env("CGO_ENABLED", "0").env("GOFLAGS", "-mod=readonly");
        go
    };
    let mut missing = PROGRAMS.to_vec();
    missing.retain(|(name, _)| !is_current || !folder.join(name).is_file());
    if missing.is_empty() {
        return Ok(folder);
    }
    find("go").context("no Go, and KUBEBUILDER_ASSETS names no folder with these programs")?;
    let version = output(&mut go(&[
        "list",
        "-m",
        "-f",
        "{{.Version}}",
        "k8s.io/kubernetes",
    ]))?;
    let flags = version_flags(version.trim());
    for (name, package) in missing {
        eprintln!("kube: building {name} {}", version.trim());
        let started = Instant::now();
        let to = folder.join(name);
        let build = ["build", "-trimpath", "-ldflags", &flags, "-o"];
        execute(go(&build).arg(&to).arg(package)).with_context(|| format!("build {name}"))?;
        eprintln!("kube: built in {} s", started.elapsed().as_secs());
    }
    fs::write(&stamp, wanted).with_context(|| format!("write {}", stamp.display()))?;
    Ok(folder)
}

/// The image of the real node's pods, and of what holds a pod's namespaces, as an archive: Debian's static
/// busybox. No registry is asked for one.
///
/// # Errors
/// There is no busybox.
pub fn busybox() -> Result<PathBuf> {
    let binary = find("busybox").context("there is no busybox (package busybox-static)")?;
    let program = fs::read(&binary).with_context(|| format!("read {}", binary.display()))?;
    let image = Image {
        name: BUSYBOX,
        file: "busybox",
        programs: &[(Architecture::own()?, program)],
        // By itself it does nothing for as long as it is let.
        entrypoint: &["/busybox", "sleep", "2147483647"],
        labels: json!({}),
    };
    let path = build::target().join("kube/busybox.oci.tar");
    oci::write(&path, &oci::archive(&image)?)?;
    Ok(path)
}

/// The version that the programs tell; without it an API server says that it is v0.0.0.
fn version_flags(version: &str) -> String {
    let at = "k8s.io/component-base/version";
    let minor = version.split('.').nth(1).unwrap_or_default();
    format!(
        "-s -w -X {at}.gitVersion={version} -X {at}.gitMajor=1 -X {at}.gitMinor={minor} \
         -X {at}.gitTreeState=clean -X {at}.buildDate=1970-01-01T00:00:00Z"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minor_version_is_told() {
        let flags = version_flags("v1.34.4");
        assert!(flags.contains("version.gitMinor=34 "), "{flags}");
        assert!(flags.contains("version.gitVersion=v1.34.4 "), "{flags}");
    }
}
