//! Pod UIDs: how objects and cgroups write them, and pods by them.

use std::collections::VecDeque;
use std::fmt;
use std::hash::{DefaultHasher, Hasher as _};
use std::num::NonZeroU64;
use std::sync::Arc;

use jiff::Timestamp;

use super::FastMap;
use super::claims::{TOMBSTONE_TTL, TOMBSTONES_MAX};
use super::objects::Pod;

/// A pod's UID in lower case with dashes, whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodUid(Arc<str>);

impl PodUid {
    /// A UID as the API, systemd (`_` for `-`) or cgroupfs writes it.
    pub fn new(text: &str) -> Self {
        let text: String = text.bytes().map(normal).map(char::from).collect();
        Self(text.into())
    }

    /// The pod whose cgroup a path leads into: the first directory called `podUID` (cgroupfs
    /// driver) or `...-podUID.slice` (systemd driver). A UID is a UUID, or, of a static pod, the
    /// 32 hexadecimal digits of its configuration's hash.
    ///
    /// The directory alone decides, not the `kubepods` above it: seen from another cgroup
    /// namespace the path begins with `/..` in its place.
    pub fn of_cgroup(path: &str) -> Option<Self> {
        path.split('/').find_map(|directory| {
            let name = directory.strip_suffix(".slice").unwrap_or(directory);
            let uid = name
                .strip_prefix("pod")
                .or_else(|| name.rsplit_once("-pod").map(|(_, uid)| uid))?;
            has_form(uid).then(|| Self::new(uid))
        })
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the index knows it by.
    pub fn hash(&self) -> UidHash {
        UidHash::of(&self.0)
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn normal(byte: u8) -> u8 {
    match byte {
        b'_' => b'-',
        // Not ASCII: no UID, and not to be torn apart.
        128.. => b'?',
        _ => byte.to_ascii_lowercase(),
    }
}

/// Whether this is a UUID or a hash in hexadecimal digits.
fn has_form(uid: &str) -> bool {
    let bytes = uid.as_bytes();
    let is_dash = |at: usize| matches!(bytes[at], b'-' | b'_');
    let dashes = [8, 13, 18, 23];
    match bytes.len() {
        32 => is_config_hash(uid),
        36 => (0..36).all(|at| match dashes.contains(&at) {
            true => is_dash(at),
            false => bytes[at].is_ascii_hexdigit(),
        }),
        _ => false,
    }
}

/// Whether this is the hash that the kubelet takes for the UID of a static pod: an MD5 sum in
/// hexadecimal digits (pkg/kubelet/config/common.go). No UID of the API looks so.
pub fn is_config_hash(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A hash of a UID, only ever compared: 8 bytes for each pod in place of 36. Of 150,000 pods two
/// have the same one with a probability of 1 to a billion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UidHash(NonZeroU64);

impl UidHash {
    /// The hash of a UID, however it is written.
    pub fn of(uid: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        for byte in uid.bytes() {
            hasher.write_u8(normal(byte));
        }
        Self(NonZeroU64::new(hasher.finish()).unwrap_or(NonZeroU64::MIN))
    }
}

/// Pods by UID, and for a while those that are gone. A UID is given once, so no time is asked for.
#[derive(Debug, Default)]
pub(super) struct ByUid {
    pods: FastMap<UidHash, Arc<Pod>>,
    /// In the order in which they went.
    tombstones: VecDeque<(Timestamp, Arc<Pod>)>,
    evicted: u64,
}

impl ByUid {
    /// A pod comes, changes (`same`), goes, or makes place for another of its name.
    pub fn change(
        &mut self,
        old: Option<&Arc<Pod>>,
        new: Option<&Arc<Pod>>,
        same: bool,
        at: Timestamp,
    ) {
        if let Some(old) = old {
            match same {
                true => self.forget(old),
                false => self.bury(old, at),
            }
        }
        if let Some(new) = new {
            for uid in new.uids() {
                self.pods.insert(uid, new.clone());
            }
        }
    }

    fn bury(&mut self, pod: &Arc<Pod>, at: Timestamp) {
        if pod.uids().next().is_none() {
            return;
        }
        if self.tombstones.len() >= TOMBSTONES_MAX
            && let Some((_, oldest)) = self.tombstones.pop_front()
        {
            self.forget(&oldest);
            self.evicted += 1;
        }
        self.tombstones.push_back((at, pod.clone()));
    }

    fn forget(&mut self, pod: &Arc<Pod>) {
        for uid in pod.uids() {
            // A static pod that came back has the UID of the one before.
            if self.pods.get(&uid).is_some_and(|p| Arc::ptr_eq(p, pod)) {
                self.pods.remove(&uid);
            }
        }
    }

    /// The pod that has or had a UID.
    pub fn get(&self, uid: UidHash) -> Option<&Arc<Pod>> {
        self.pods.get(&uid)
    }

    /// Forgets what went [`TOMBSTONE_TTL`] ago. Returns how many.
    pub fn purge(&mut self, now: Timestamp) -> usize {
        let Ok(limit) = now.checked_sub(TOMBSTONE_TTL) else {
            return 0;
        };
        let before = self.tombstones.len();
        while let Some((_, pod)) = self.tombstones.pop_front_if(|(went, _)| *went <= limit) {
            self.forget(&pod);
        }
        before - self.tombstones.len()
    }

    /// How many are kept that are gone.
    pub fn tombstones(&self) -> usize {
        self.tombstones.len()
    }

    /// How many were forgotten early, because there were too many.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Whether nothing is kept.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.tombstones.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "9f0c5a1e-2b7d-4f60-8a43-1d2e3f405162";
    const HASH: &str = "5b0cf4a1d2e3f40516279f0c5a1e2b7d";

    #[test]
    fn every_way_to_write_a_uid_is_one_uid() {
        let systemd = UID.replace('-', "_").to_uppercase();
        assert_eq!(PodUid::new(&systemd).as_str(), UID);
        assert_eq!(UidHash::of(&systemd), UidHash::of(UID));
        assert_eq!(PodUid::new(UID).hash(), UidHash::of(UID));
        assert_ne!(UidHash::of(UID), UidHash::of(HASH));
    }

    #[test]
    fn the_uid_is_in_the_path_of_the_cgroup() {
        let systemd = UID.replace('-', "_");
        let container = "3c1f".repeat(16);
        for (path, uid) in [
            // systemd driver: containerd, CRI-O, guaranteed, kind.
            (
                format!(
                    "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{systemd}.slice/cri-containerd-{container}.scope"
                ),
                Some(UID),
            ),
            (
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice/crio-{container}.scope/container"
                ),
                Some(UID),
            ),
            (
                format!("/kubepods.slice/kubepods-pod{systemd}.slice/docker-{container}.scope"),
                Some(UID),
            ),
            (
                format!(
                    "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{systemd}.slice"
                ),
                Some(UID),
            ),
            // cgroupfs driver, with what a second runtime nests below.
            (
                format!("/kubepods/besteffort/pod{UID}/{container}"),
                Some(UID),
            ),
            (
                format!("/kubepods/pod{UID}/{container}/docker/{container}"),
                Some(UID),
            ),
            // Static pods.
            (
                format!("/kubepods/burstable/pod{HASH}/{container}"),
                Some(HASH),
            ),
            (
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{HASH}.slice/cri-containerd-{container}.scope"
                ),
                Some(HASH),
            ),
            // Seen from another pod's cgroup namespace.
            (format!("/../../pod{UID}/{container}"), Some(UID)),
            (
                format!(
                    "/../../kubepods-besteffort-pod{systemd}.slice/cri-containerd-{container}.scope"
                ),
                Some(UID),
            ),
            // No pods of Kubernetes.
            ("/".to_owned(), None),
            ("/system.slice/containerd.service".to_owned(), None),
            ("/kubepods.slice/kubepods-besteffort.slice".to_owned(), None),
            (format!("/machine.slice/libpod-{container}.scope"), None),
            (
                format!("/machine.slice/machine-libpod_pod_{container}.slice"),
                None,
            ),
            ("/user.slice/podman".to_owned(), None),
            (
                "/kubepods/podé9f0c5a1e-2b7d-4f60-8a43-1d2e3f4051".to_owned(),
                None,
            ),
        ] {
            assert_eq!(
                PodUid::of_cgroup(&path).as_ref().map(PodUid::as_str),
                uid,
                "{path}"
            );
        }
    }
}
