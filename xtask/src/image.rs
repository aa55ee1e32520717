//! `cargo xtask image`: the static binary as an OCI image archive.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::{
    architecture::Architecture,
    build::{self, target},
    oci::{self, Image},
    setup,
};

/// The image's name without its version. deploy/ asks for the same one, and no registry is part of it.
const REPOSITORY: &str = "localhost/whydrop";
/// What an archive may have at most for each architecture. A node pulls it while somebody waits for an answer.
const MAX_BYTES: usize = 15 << 20;

#[derive(clap::Args)]
pub struct Args {
    /// For this architecture, into target/whydrop-ARCHITECTURE.oci.tar
    #[arg(long, conflicts_with = "all")]
    architecture: Option<Architecture>,
    /// For every architecture, in one archive of which each node takes its own
    #[arg(long)]
    all: bool,
}

/// What an archive is for, and its file's name.
pub struct Selection {
    architectures: Vec<Architecture>,
    file: String,
}

impl Selection {
    /// This machine's architecture.
    pub fn own() -> Result<Self> {
        Ok(Self {
            architectures: vec![Architecture::own()?],
            file: "whydrop.oci.tar".to_owned(),
        })
    }

    /// One that was named.
    pub fn one(architecture: Architecture) -> Self {
        Self {
            architectures: vec![architecture],
            file: format!("whydrop-{architecture}.oci.tar"),
        }
    }

    fn of(args: &Args) -> Result<Self> {
        match args.architecture {
            Some(architecture) => Ok(Self::one(architecture)),
            None if args.all => Ok(Self {
                architectures: Architecture::ALL.to_vec(),
                ..Self::own()?
            }),
            None => Self::own(),
        }
    }
}

/// Sets up, builds and prints the archive's path, size, name and architectures.
pub fn run(args: &Args) -> Result<()> {
    let selection = Selection::of(args)?;
    let mut found = setup::run()?;
    let own = [Architecture::own()?];
    if selection.architectures != own {
        found = found.with_cross();
    }
    found.ready_to_build()?;
    let path = make(&selection)?;
    let bytes = fs::metadata(&path)?.len();
    let architectures = selection.architectures.iter().map(|of| of.name());
    println!(
        "{} ({:.1} MiB): {} for {}",
        path.display(),
        bytes as f64 / 1048576.0,
        name(),
        architectures.collect::<Vec<_>>().join(" and "),
    );
    Ok(())
}

/// Builds the binaries and writes the archive.
pub fn make(selection: &Selection) -> Result<PathBuf> {
    let mut programs = Vec::new();
    for architecture in &selection.architectures {
        let binary = build::without_debug_info(*architecture)?;
        let program = fs::read(&binary).with_context(|| format!("reading {}", binary.display()))?;
        programs.push((*architecture, program));
    }
    let bytes = archive(&programs)?;
    let allowed = MAX_BYTES * programs.len();
    ensure!(
        bytes.len() <= allowed,
        "the image has {} bytes, {allowed} are allowed",
        bytes.len()
    );
    let path = target().join(&selection.file);
    oci::write(&path, &bytes)?;
    Ok(path)
}

/// As [`make`], twice: linked, stripped and packed again, the second archive is the first one to the byte.
pub fn made_twice(selection: &Selection) -> Result<PathBuf> {
    let first = fs::read(make(selection)?)?;
    for architecture in &selection.architectures {
        build::forget_shipped(*architecture)?;
    }
    let path = make(selection)?;
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

/// The archive of these binaries: `/whydrop` and nothing else.
fn archive(programs: &[(Architecture, Vec<u8>)]) -> Result<Vec<u8>> {
    oci::archive(&Image {
        name: &name(),
        file: "whydrop",
        programs,
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
        let program = (Architecture::Arm64, b"program".to_vec());
        let index = parsed(&files(&archive(&[program]).unwrap())["index.json"]);
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
