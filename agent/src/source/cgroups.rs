//! From a cgroup's id to the pod that it belongs to.
//!
//! The id that the kernel gives to programs (`bpf_get_current_cgroup_id`, `bpf_skb_cgroup_id`) is
//! the inode number of the cgroup's directory in cgroup version 2 (kernel/cgroup/cgroup.c,
//! `cgroup_id`; since 5.5 on 64 bits). The kubelet puts the pod's UID into the path.
//!
//! Ids that are not known make it walk the whole tree, as seldom as [`Cgroups::pod_uid`] says.

use std::collections::HashMap;
use std::fs::{self, DirEntry};
use std::io;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::load::SourceStatus;
use crate::cluster::PodUid;
use crate::cpu_time::cpu_time;

/// Its name in `/v1/status` and `whydrop_source_up`.
pub const SOURCE: &str = "pod_cgroups";
const LOST_WITHOUT: &str = "host-network pods are told apart only by the ports that they declare";

/// Where the hierarchy may be: seen with the eyes of the node's first process, for an agent in a
/// container, which has a view of its own; and `unified` where version 1 has the place.
const PLACES: [&str; 4] = [
    "/proc/1/root/sys/fs/cgroup",
    "/proc/1/root/sys/fs/cgroup/unified",
    "/sys/fs/cgroup",
    "/sys/fs/cgroup/unified",
];

/// Cgroups that one walk looks at: 110 pods make some 500.
const MAX_CGROUPS: usize = 32_768;
/// How deep it goes: containers are 4 or 5 deep, those of a cluster within a container twice that.
const MAX_DEPTH: usize = 16;
/// The shortest time between two walks; where a walk takes more than [`SHARE`] of it, longer.
const WALK_EVERY: Duration = Duration::from_secs(1);
const SHARE: u32 = 100;
/// How long an id that no walk found is taken to be nobody's.
const UNKNOWN_TTL: Duration = Duration::from_secs(30);
const MAX_UNKNOWN: usize = 4_096;
/// How long a cgroup that is gone is remembered: as long as its pod is in the index. An id is not
/// given again.
const GONE_TTL: Duration = Duration::from_secs(600);
/// Cgroups that are remembered, those that are gone among them.
const MAX_REMEMBERED: usize = 2 * MAX_CGROUPS;

/// The cgroups of this node.
#[derive(Debug)]
pub struct Cgroups {
    /// Where the hierarchy of version 2 is mounted.
    root: Result<PathBuf, String>,
    known: HashMap<u64, Known>,
    unknown: HashMap<u64, Instant>,
    walk_at: Option<Instant>,
    last: Walk,
}

#[derive(Debug)]
struct Known {
    pod: Option<PodUid>,
    seen: Instant,
}

/// What a walk did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Cgroups that it found.
    pub cgroups: usize,
    /// Directories past the limits.
    pub left_out: usize,
    /// Directories that could not be read.
    pub errors: usize,
    /// How much CPU time it took.
    pub took: Duration,
}

impl Cgroups {
    /// Those of this node; nothing is read yet.
    pub fn open() -> Self {
        let place = PLACES.into_iter().find(|place| {
            statfs(*place).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
        });
        Self::at(place.map(PathBuf::from).ok_or_else(|| {
            "cgroup version 2 is not mounted: this node has version 1 alone".to_owned()
        }))
    }

    fn at(root: Result<PathBuf, String>) -> Self {
        Self {
            root,
            known: HashMap::new(),
            unknown: HashMap::new(),
            walk_at: None,
            last: Walk::default(),
        }
    }

    /// The UID of the pod that a cgroup belongs to, or belonged to until a while ago. `None` for
    /// one that is no pod's, and for one that is not known.
    ///
    /// An id that is not known makes it walk the tree, at most once a second and for a hundredth
    /// of one CPU's time; one that the walk does not find is `None` for 30 s, one that came since
    /// the last walk until the next is due.
    pub fn pod_uid(&mut self, id: u64) -> Option<PodUid> {
        self.pod_uid_at(id, Instant::now())
    }

    fn pod_uid_at(&mut self, id: u64, now: Instant) -> Option<PodUid> {
        if let Some(known) = self.known.get(&id) {
            return known.pod.clone();
        }
        let is_unknown = self.unknown.get(&id).is_some_and(|until| now < *until);
        if is_unknown || self.walk_at.is_some_and(|at| now < at) {
            return None;
        }
        self.walk(now);
        let known = self.known.get(&id);
        if known.is_none() {
            self.unknown.retain(|_, until| now < *until);
            if self.unknown.len() < MAX_UNKNOWN {
                self.unknown.insert(id, now + UNKNOWN_TTL);
            }
        }
        known.and_then(|known| known.pod.clone())
    }

    /// Reads the whole tree.
    fn walk(&mut self, now: Instant) {
        let Ok(root) = self.root.clone() else {
            return;
        };
        let started = cpu_time();
        let mut walk = Walk::default();
        if let Ok(root) = fs::metadata(&root) {
            self.remember(root.ino(), None, now);
        }
        let mut directories = vec![(root, None, 1)];
        while let Some((directory, above, depth)) = directories.pop() {
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                // Removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(_) => {
                    walk.errors += 1;
                    continue;
                }
            };
            for entry in entries.flatten().filter(is_directory) {
                if walk.cgroups == MAX_CGROUPS {
                    walk.left_out += 1;
                    continue;
                }
                walk.cgroups += 1;
                let name = entry.file_name();
                let pod: Option<PodUid> = above
                    .clone()
                    .or_else(|| name.to_str().and_then(PodUid::of_cgroup));
                self.remember(entry.ino(), pod.clone(), now);
                let path = directory.join(name);
                if is_leaf(&path) {
                    continue;
                }
                match depth < MAX_DEPTH {
                    true => directories.push((path, pod, depth + 1)),
                    false => walk.left_out += 1,
                }
            }
        }
        let is_full = self.known.len() > MAX_REMEMBERED;
        self.known.retain(|_, known| {
            let gone = now.saturating_duration_since(known.seen);
            gone.is_zero() || (!is_full && gone < GONE_TTL)
        });
        walk.took = cpu_time().saturating_sub(started);
        self.walk_at = Some(now + WALK_EVERY.max(walk.took * SHARE));
        self.last = walk;
        tracing::debug!(?walk, "cgroups were walked");
    }

    fn remember(&mut self, id: u64, pod: Option<PodUid>, seen: Instant) {
        self.known.insert(id, Known { pod, seen });
    }

    /// What the last walk did.
    pub fn last_walk(&self) -> Walk {
        self.last
    }

    /// Whether pods can be found, and why not.
    pub fn status(&self) -> SourceStatus {
        let hook = self
            .root
            .as_ref()
            .map(|root| format!("{} (cgroup2)", root.display()));
        let why = match &self.root {
            Err(why) => Some(why.clone()),
            Ok(_) if self.last.left_out > 0 => {
                Some("there are more cgroups than are looked at".to_owned())
            }
            Ok(_) => None,
        };
        SourceStatus {
            source: SOURCE,
            up: self.root.is_ok(),
            hook: hook.ok(),
            why,
            lost: self.root.is_err().then_some(LOST_WITHOUT),
        }
    }
}

fn is_directory(entry: &DirEntry) -> bool {
    entry.file_type().is_ok_and(|kind| kind.is_dir())
}

/// Whether a directory has none in it, by its count of links: its name, itself, and `..` of each
/// one below. So most cgroups need not be read, each of which has some 60 files. File systems
/// without such a count show 1.
fn is_leaf(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|directory| directory.nlink() == 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "9f0c5a1e-2b7d-4f60-8a43-1d2e3f405162";

    fn cgroups(root: &Path) -> Cgroups {
        Cgroups::at(Ok(root.to_owned()))
    }

    /// Makes a directory with those above it; its inode number.
    fn make(root: &Path, path: &str) -> u64 {
        let path = root.join(path);
        fs::create_dir_all(&path).unwrap();
        fs::metadata(path).unwrap().ino()
    }

    fn text(uid: Option<PodUid>) -> Option<String> {
        uid.map(|uid| uid.to_string())
    }

    #[test]
    fn a_cgroup_is_its_pods_at_any_depth() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let pod = format!(
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{}.slice",
            UID.replace('-', "_")
        );
        let below = make(root, &format!("{pod}/cri-containerd-3c1f.scope/inner/init"));
        let of_pod = make(root, &pod);
        let slice = make(root, "kubepods.slice");
        let service = make(root, "system.slice/containerd.service");
        let mut cgroups = cgroups(root);
        assert_eq!(text(cgroups.pod_uid(below)).as_deref(), Some(UID));
        assert_eq!(text(cgroups.pod_uid(of_pod)).as_deref(), Some(UID));
        assert_eq!(
            (cgroups.pod_uid(slice), cgroups.pod_uid(service)),
            (None, None)
        );
        assert_eq!(cgroups.last_walk().cgroups, 8);
        assert_eq!(cgroups.unknown.len(), 0, "what is no pod's is known");
    }

    #[test]
    fn a_walk_is_made_for_an_unknown_id_and_not_too_often() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let first = make(root, &format!("kubepods/pod{UID}"));
        let mut cgroups = cgroups(root);
        let start = Instant::now();
        let at = |s| start + Duration::from_millis(s);
        assert_eq!(text(cgroups.pod_uid_at(first, at(0))).as_deref(), Some(UID));
        // A container comes: known at the next walk, which is not due yet.
        let second = make(root, &format!("kubepods/pod{UID}/3c1f"));
        let due = cgroups.walk_at.unwrap() - start;
        assert!(due >= WALK_EVERY);
        assert_eq!(cgroups.pod_uid_at(second, at(500)), None);
        assert!(cgroups.unknown.is_empty(), "it was not looked for");
        assert_eq!(
            text(cgroups.pod_uid_at(second, start + due)).as_deref(),
            Some(UID)
        );
        // An id that nobody has makes one walk in its time.
        let later = start + due + Duration::from_secs(3_600);
        assert_eq!(cgroups.pod_uid_at(u64::MAX, later), None);
        let walked = cgroups.walk_at;
        let soon = later + UNKNOWN_TTL - Duration::from_millis(1);
        assert_eq!(cgroups.pod_uid_at(u64::MAX, soon), None);
        assert_eq!(cgroups.walk_at, walked);
        assert_eq!(cgroups.pod_uid_at(u64::MAX, later + UNKNOWN_TTL), None);
        assert!(cgroups.walk_at > walked);
    }

    #[test]
    fn a_cgroup_that_went_is_remembered_for_a_while() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let path = format!("kubepods/pod{UID}");
        let id = make(root, &path);
        let mut cgroups = cgroups(root);
        let start = Instant::now();
        assert!(cgroups.pod_uid_at(id, start).is_some());
        fs::remove_dir(root.join(path)).unwrap();
        let walk_at = |cgroups: &mut Cgroups, after: Duration| {
            cgroups.unknown.clear();
            // However long the last walk took.
            cgroups.walk_at = None;
            assert_eq!(cgroups.pod_uid_at(u64::MAX, start + after), None);
        };
        walk_at(&mut cgroups, GONE_TTL - Duration::from_secs(1));
        assert!(cgroups.known.contains_key(&id));
        walk_at(&mut cgroups, GONE_TTL + Duration::from_secs(10));
        assert!(!cgroups.known.contains_key(&id));
    }

    #[test]
    fn without_version_2_nothing_is_known_and_that_is_said() {
        let mut cgroups = Cgroups::at(Err("version 1 alone".to_owned()));
        assert_eq!(cgroups.pod_uid(1), None);
        let status = cgroups.status();
        assert!(!status.up && status.lost.is_some());
        assert_eq!(status.why.as_deref(), Some("version 1 alone"));
    }
}
