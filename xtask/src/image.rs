//! `cargo xtask image`: the static binary as an OCI image archive.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::{
    build::{self, target},
    oci::{self, Image},
    setup,
};

/// The image's name without its version. deploy/ asks for the same one, and no registry is part of it.
const REPOSITORY: &str = "localhost/whydrop";
/// What the archive may have at most. A node pulls it while somebody waits for an answer.
const MAX_BYTES: usize = 15 << 20;

/// Sets up, builds and prints the archive's path, name and size.
pub fn run() -> Result<()> {
    setup::run()?.ready_to_build()?;
    let path = make()?;
    let bytes = fs::metadata(&path)?.len();
    println!(
        "{} ({:.1} MiB): {}",
        path.display(),
        bytes as f64 / 1048576.0,
        name()
    );
    Ok(())
}

/// Builds the binary and writes the archive.
pub fn make() -> Result<PathBuf> {
    let binary = build::without_debug_info()?;
    let program = fs::read(&binary).with_context(|| format!("reading {}", binary.display()))?;
    let bytes = archive(&program)?;
    ensure!(
        bytes.len() <= MAX_BYTES,
        "the image has {} bytes, {MAX_BYTES} are allowed",
        bytes.len()
    );
    let path = target().join("whydrop.oci.tar");
    oci::write(&path, &bytes)?;
    Ok(path)
}

/// As [`make`], twice, and the second archive is the first one to the byte.
pub fn made_twice() -> Result<PathBuf> {
    let first = fs::read(make()?)?;
    let path = make()?;
    ensure!(
        fs::read(&path)? == first,
        "{} differs from what the same source gave a moment ago",
        path.display()
    );
    Ok(path)
}

/// The image's name, as `localhost/whydrop:0.1.0`.
pub fn name() -> String {
    format!("{REPOSITORY}:{}", env!("CARGO_PKG_VERSION"))
}

/// The archive of a binary: `/whydrop` and nothing else.
fn archive(program: &[u8]) -> Result<Vec<u8>> {
    oci::archive(&Image {
        name: &name(),
        architecture: oci::architecture()?,
        file: "whydrop",
        program,
        entrypoint: &["/whydrop"],
        labels: json!({
            "org.opencontainers.image.title": "whydrop",
            "org.opencontainers.image.description": "Names the pods whose packets a node drops, and why",
            "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
            "org.opencontainers.image.licenses": "Apache-2.0 OR MIT",
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::root;
    use crate::oci::tests::{files, parsed};

    #[test]
    fn its_name_is_the_one_that_the_manifest_asks_for() {
        let index = parsed(&files(&archive(b"program").unwrap())["index.json"]);
        let annotations = &index["manifests"][0]["annotations"];
        assert_eq!(annotations["io.containerd.image.name"], name());
        assert_eq!(annotations["org.opencontainers.image.ref.name"], name());
        let manifest = root().join("deploy/base/daemonset.yaml");
        let manifest = fs::read_to_string(manifest).unwrap();
        let asked: Vec<_> = manifest
            .lines()
            .filter_map(|line| line.trim().strip_prefix("image: "))
            .collect();
        assert_eq!(asked, [name()]);
    }
}
