//! The programs of a real Kubernetes: from `KUBEBUILDER_ASSETS`, by envtest's convention, where they
//! are; else built once from their Go modules (tests/kube/go.mod) into `target/kube/`.

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::{
    architecture::Architecture,
    build,
    command::find,
    go::{Module, downloaded},
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
/// The Go module that defines the admin and baseline tiers, in the last version of each, and the sums of these.
const TIERS: &str = "sigs.k8s.io/network-policy-api";
const TIER_VERSIONS: [(&str, &str); 2] = [
    // AdminNetworkPolicy and BaselineAdminNetworkPolicy.
    ("v0.1.7", "h1:obY2FTEidLXVdRYu7gJ4q1RYE57pBnrpMqoE2LZgp4g="),
    // ClusterNetworkPolicy.
    ("v0.3.0", "h1:RL6fVXiix9IW1pj0ImkW645m+EWmb3dBGCiW19bg5+k="),
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
    let module = Module {
        source: "tests/kube",
        to: "kube",
        programs: &PROGRAMS,
        tags: "",
    };
    module
        .built(|| Ok(version_flags(&module.version_of("k8s.io/kubernetes")?)))
        .context("KUBEBUILDER_ASSETS names no folder with all programs, and they cannot be built")
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

/// A folder with the CustomResourceDefinitions of the admin and baseline tiers, as their authors publish them.
///
/// # Errors
/// No module proxy answers.
pub fn tiers() -> Result<PathBuf> {
    let to = build::target().join("kube/tiers");
    if to.exists() {
        // What a newer version does not have any more.
        fs::remove_dir_all(&to).with_context(|| format!("remove {}", to.display()))?;
    }
    fs::create_dir_all(&to).with_context(|| format!("make {}", to.display()))?;
    for (version, sum) in TIER_VERSIONS {
        // With the fields that not every implementation has to know.
        let from = downloaded(TIERS, version, sum)?.join("config/crd/experimental");
        for entry in fs::read_dir(&from).with_context(|| format!("read {}", from.display()))? {
            let name = entry?.file_name();
            if name
                .to_string_lossy()
                .starts_with("policy.networking.k8s.io_")
            {
                // Written anew, for the module cache is not to be written to.
                let text = fs::read(from.join(&name))?;
                fs::write(to.join(&name), text)?;
            }
        }
    }
    Ok(to)
}

/// The version that the programs tell; without it an API server says that it is v0.0.0.
fn version_flags(version: &str) -> String {
    let at = "k8s.io/component-base/version";
    let minor = version.split('.').nth(1).unwrap_or_default();
    format!(
        "-X {at}.gitVersion={version} -X {at}.gitMajor=1 -X {at}.gitMinor={minor} \
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
