//! OCI image archives from scratch: one layer with one file, for one architecture or several. `ctr images
//! import` and `podman load` read them.
//!
//! Nothing in one depends on when or where it was made, so the same program gives the same bytes.

use std::{fs::Permissions, io::Write as _, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use crate::architecture::Architecture;

/// Everything belongs to the time when nothing was made.
const CREATED: &str = "1970-01-01T00:00:00Z";

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// What an image is made of.
pub struct Image<'a> {
    /// Its name with its version, as `localhost/whydrop:0.1.0`.
    pub name: &'a str,
    /// The name of the one file, which lies in `/`.
    pub file: &'a str,
    /// What is in it: a static program of each architecture.
    pub programs: &'a [(Architecture, Vec<u8>)],
    /// What a container of it runs.
    pub entrypoint: &'a [&'a str],
    /// What registries show.
    pub labels: Value,
}

/// Whoever reads it at the same time sees the old archive or the new one, never half of one.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().context("the archive needs a folder")?;
    // Who loads it may be somebody else than who made it.
    let mut file = tempfile::Builder::new()
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.persist(path)
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(())
}

/// The archive: an OCI image layout with one image. Of several architectures it is an index of images, of
/// which each node takes its own.
pub fn archive(image: &Image<'_>) -> Result<Vec<u8>> {
    let mut blobs = Vec::new();
    let mut described = Vec::new();
    for (architecture, program) in image.programs {
        described.push(add(&mut blobs, image, *architecture, program)?);
    }
    let mut named = match <[Value; 1]>::try_from(described) {
        Ok([manifest]) => manifest,
        Err(manifests) => {
            let index = Blob::json(INDEX, &index(manifests))?;
            let descriptor = index.descriptor();
            blobs.push(index);
            descriptor
        }
    };
    named["annotations"] = json!({
        // What containerd goes by, and what the specification and podman do.
        "io.containerd.image.name": image.name,
        "org.opencontainers.image.ref.name": image.name,
    });
    let index = serde_json::to_vec(&index(vec![named]))?;

    let mut blobs: Vec<_> = blobs
        .into_iter()
        .map(|blob| (blob.path(), blob.bytes))
        .collect();
    blobs.sort();
    let mut entries = vec![
        Entry::File("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644),
        Entry::File("index.json", &index, 0o644),
        Entry::Folder("blobs/"),
        Entry::Folder("blobs/sha256/"),
    ];
    entries.extend(
        blobs
            .iter()
            .map(|(path, bytes)| Entry::File(path, bytes, 0o644)),
    );
    tar(entries)
}

/// Adds the layer, config and manifest of an architecture; the manifest's descriptor.
fn add(
    blobs: &mut Vec<Blob>,
    image: &Image<'_>,
    architecture: Architecture,
    program: &[u8],
) -> Result<Value> {
    let files = tar([Entry::File(image.file, program, 0o755)])?;
    // GzBuilder writes neither a time nor a system unless it is told to.
    let mut gzip = GzBuilder::new().write(Vec::new(), Compression::best());
    gzip.write_all(&files)?;
    let layer = Blob::new(LAYER, gzip.finish()?);
    let config = Blob::json(
        CONFIG,
        &json!({
            "created": CREATED,
            "architecture": architecture.name(),
            "os": "linux",
            "config": {
                "Entrypoint": image.entrypoint,
                // So that `kubectl exec POD -- whydrop tail` finds it.
                "Env": ["PATH=/"],
                // Root: a process of another user keeps none of the capabilities that its pod is given,
                // and files cannot give them either under `allowPrivilegeEscalation: false`.
                "User": "0:0",
                "Labels": image.labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [digest(&files)]},
            "history": [{"created": CREATED, "created_by": "cargo xtask image"}],
        }),
    )?;
    let manifest = Blob::json(
        MANIFEST,
        &json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor(),
            "layers": [layer.descriptor()],
        }),
    )?;
    let mut described = manifest.descriptor();
    described["platform"] = json!({"architecture": architecture.name(), "os": "linux"});
    blobs.extend([config, layer, manifest]);
    Ok(described)
}

fn index(manifests: Vec<Value>) -> Value {
    json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests})
}

/// Bytes that others name by their digest.
struct Blob {
    media_type: &'static str,
    digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(media_type: &'static str, bytes: Vec<u8>) -> Self {
        Self {
            media_type,
            digest: digest(&bytes),
            bytes,
        }
    }

    fn json(media_type: &'static str, value: &Value) -> Result<Self> {
        Ok(Self::new(media_type, serde_json::to_vec(value)?))
    }

    fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest, "size": self.bytes.len()})
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

/// What a tar archive holds: name, content, mode.
enum Entry<'a> {
    Folder(&'a str),
    File(&'a str, &'a [u8], u32),
}

/// An archive whose files belong to root and to no time.
fn tar<'a>(entries: impl IntoIterator<Item = Entry<'a>>) -> Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    for entry in entries {
        let (name, content, mode, kind) = match entry {
            Entry::Folder(name) => (name, &[][..], 0o755, EntryType::Directory),
            Entry::File(name, content, mode) => (name, content, mode, EntryType::Regular),
        };
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, content)?;
    }
    Ok(builder.into_inner()?)
}

#[cfg(test)]
pub mod tests {
    use std::{collections::BTreeMap, fs, io::Read as _};

    use flate2::read::GzDecoder;

    use super::*;
    use crate::architecture::Architecture::{Amd64, Arm64};
    use crate::command::{command, output};

    /// Stands for the binary.
    const PROGRAM: &[u8] = b"\x7fELF, and what else a program has\n";

    /// The regular files of an archive, read by the same crate but not by the code above.
    pub fn files(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(bytes).entries().unwrap() {
            let mut entry = entry.unwrap();
            let header = entry.header();
            assert_eq!(header.mtime().unwrap(), 0);
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            if header.entry_type().is_file() {
                let name = entry.path().unwrap().to_str().unwrap().to_owned();
                let mut content = Vec::new();
                entry.read_to_end(&mut content).unwrap();
                files.insert(name, content);
            }
        }
        files
    }

    pub fn parsed(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    /// What a descriptor points to, of the right size.
    fn blob(files: &BTreeMap<String, Vec<u8>>, descriptor: &Value) -> Vec<u8> {
        let digest = descriptor["digest"].as_str().unwrap();
        let bytes = &files[&format!("blobs/{}", digest.replace(':', "/"))];
        assert_eq!(descriptor["size"], bytes.len());
        bytes.clone()
    }

    /// The archive of a program for each of these architectures.
    fn made(program: &[u8], architectures: &[Architecture]) -> Vec<u8> {
        let programs = architectures.iter().map(|of| (*of, program.to_vec()));
        archive(&Image {
            name: "localhost/some:1",
            file: "some",
            programs: &programs.collect::<Vec<_>>(),
            entrypoint: &["/some", "word"],
            labels: json!({"title": "some"}),
        })
        .unwrap()
    }

    #[test]
    fn the_same_program_gives_the_same_bytes() {
        let first = made(PROGRAM, &[Amd64]);
        assert_eq!(first, made(PROGRAM, &[Amd64]));
        assert_ne!(first, made(b"another", &[Amd64]));
        assert_ne!(first, made(PROGRAM, &[Arm64]));
        // The same bytes on any machine and day: no time, name or system is in the layer.
        let files = files(&first);
        let layers = files
            .values()
            .filter(|bytes| bytes.starts_with(&[0x1f, 0x8b]));
        for layer in layers {
            assert_eq!(layer[3..8], [0; 5], "flags and time of the gzip header");
            assert_eq!(layer[9], 255, "the system of the gzip header");
        }
    }

    #[test]
    fn every_digest_is_that_of_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = made(PROGRAM, &[Amd64]);
        tar::Archive::new(&bytes[..]).unpack(folder.path()).unwrap();
        let blobs = folder.path().join("blobs/sha256");
        let mut count = 0;
        for entry in fs::read_dir(&blobs).unwrap() {
            let path = entry.unwrap().path();
            // Somebody else's SHA-256.
            let sum = output(command("sha256sum").arg(&path)).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            assert_eq!(sum.split_whitespace().next(), Some(name));
            count += 1;
        }
        assert_eq!(count, 3, "config, layer and manifest");
    }

    #[test]
    fn the_layer_is_the_program_alone_and_the_config_starts_it() {
        let files = files(&made(PROGRAM, &[Arm64]));
        assert_eq!(
            parsed(&files["oci-layout"]),
            json!({"imageLayoutVersion": "1.0.0"})
        );
        let index = parsed(&files["index.json"]);
        assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
        let manifest = parsed(&blob(&files, &index["manifests"][0]));
        let config = parsed(&blob(&files, &manifest["config"]));
        assert_eq!(config["architecture"], "arm64");
        assert_eq!(config["os"], "linux");
        assert_eq!(config["config"]["Entrypoint"], json!(["/some", "word"]));
        assert_eq!(config["config"]["User"], "0:0");

        assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
        let mut layer = Vec::new();
        let zipped = blob(&files, &manifest["layers"][0]);
        GzDecoder::new(&zipped[..]).read_to_end(&mut layer).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"], json!([digest(&layer)]));
        let mut layer = tar::Archive::new(&layer[..]);
        let mut entries = layer.entries().unwrap();
        let mut entry = entries.next().unwrap().unwrap();
        assert_eq!(entry.path().unwrap(), Path::new("some"));
        assert_eq!(entry.header().mode().unwrap(), 0o755);
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        assert_eq!(content, PROGRAM);
        assert!(entries.next().is_none());
    }

    #[test]
    fn of_several_architectures_each_node_finds_its_own() {
        let files = files(&made(PROGRAM, &Architecture::ALL));
        let index = parsed(&files["index.json"]);
        // One name, and behind it all of them: an importer takes the first manifest of a name.
        let [named] = index["manifests"].as_array().unwrap().as_slice() else {
            panic!("{index}");
        };
        assert_eq!(named["mediaType"], INDEX);
        let image = "localhost/some:1";
        let annotations = &named["annotations"];
        assert_eq!(annotations["io.containerd.image.name"], image);
        assert_eq!(annotations["org.opencontainers.image.ref.name"], image);
        let platforms = parsed(&blob(&files, named));
        let mut found = Vec::new();
        for described in platforms["manifests"].as_array().unwrap() {
            let manifest = parsed(&blob(&files, described));
            let config = parsed(&blob(&files, &manifest["config"]));
            assert_eq!(
                config["architecture"],
                described["platform"]["architecture"]
            );
            found.push(described["platform"].clone());
        }
        let platform = |name| json!({"architecture": name, "os": "linux"});
        assert_eq!(found, [platform("amd64"), platform("arm64")]);
    }
}
