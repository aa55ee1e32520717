//! Which network namespaces this node has, and whose they are.
//!
//! A namespace is found by the processes in it (`/proc/PID/ns/net`), or, without any, by its bind
//! mount (`/run/netns/...`). It is a pod's by its processes' cgroup, else by the addresses on its
//! devices; the node's own is never a pod's.
//!
//! A scan reads one link a process, and the list of mounts if it changed; only what is new is
//! looked at closer, and what is known once a minute.
//!
//! What cannot be told: a namespace that a thread or an open file alone kept, and that gets its
//! first process later, seems to be new then.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cluster::PodUid;
use reader::{Reader, is_gone, link};

pub mod parse;
pub mod reader;

/// Namespaces that are known at a time: some 40 times the pods that a node is built for.
const MAX_NAMESPACES: usize = 4_096;
/// Processes that a scan looks at.
const MAX_PROCESSES: usize = 65_536;
/// Processes remembered for each namespace: one ends, another still leads into it.
const PIDS: usize = 4;
/// Addresses remembered for each namespace.
const MAX_ADDRESSES: usize = 256;
/// A known namespace is looked at again after 1, 2, 4 and so on scans, and then after so many.
const MAX_WAIT_SCANS: u64 = 32;

/// A network namespace, as of the last scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Inode number of `/proc/PID/ns/net`: the `netns` of events. The kernel gives it to another
    /// namespace as soon as this one is gone.
    pub id: u32,
    /// Tells it from an earlier one with the same number.
    pub serial: u64,
    /// The node's own.
    pub host: bool,
    /// It was made after the scans began.
    pub born: bool,
    /// The pod of its processes' cgroup.
    pub pod: Option<PodUid>,
    /// The addresses on its devices that are neither loopback nor link-local, sorted.
    pub addresses: Vec<IpAddr>,
    /// Processes in it, the oldest first.
    pids: Vec<u32>,
    /// Where it is mounted.
    mount: Option<PathBuf>,
}

/// The namespaces of the last scan, for every thread.
#[derive(Debug, Default)]
pub struct Namespaces(RwLock<Arc<HashMap<u32, Arc<Namespace>>>>);

impl Namespaces {
    /// All of them by inode number.
    pub fn all(&self) -> Arc<HashMap<u32, Arc<Namespace>>> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The one with an inode number.
    pub fn get(&self, id: u32) -> Option<Arc<Namespace>> {
        self.all().get(&id).cloned()
    }

    /// Those with an address on one of their devices: several, where networks overlap.
    pub fn with_address(&self, ip: IpAddr) -> Vec<Arc<Namespace>> {
        let ip = ip.to_canonical();
        let all = self.all();
        let with = all
            .values()
            .filter(|n| n.addresses.binary_search(&ip).is_ok());
        with.cloned().collect()
    }
}

/// What a scan saw, and what it had to leave out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Processes whose namespace was read.
    pub processes: usize,
    /// Processes whose namespace the kernel does not show.
    pub refused: usize,
    /// Namespaces without a process that cannot be entered: CAP_SYS_ADMIN is missing.
    pub closed: usize,
    /// Namespaces and processes past the limits.
    pub left_out: usize,
    /// Looks into a namespace that failed otherwise.
    pub errors: usize,
}

impl Scan {
    /// Whether most processes do not show their namespace, as without CAP_SYS_PTRACE. Single ones
    /// may be guarded by a security module.
    pub fn is_blind(&self) -> bool {
        self.refused > self.processes
    }

    /// Whether what the next scan finds more is new.
    fn is_complete(&self) -> bool {
        !self.is_blind() && self.left_out == 0
    }
}

/// Looks for namespaces, on one thread.
#[derive(Debug)]
pub struct Scanner {
    proc: PathBuf,
    reader: Reader,
    mounts: Mounts,
    known: HashMap<u32, Known>,
    scans: u64,
    serials: u64,
    /// The last scan was complete: what the next one finds more is new.
    complete: bool,
}

#[derive(Debug)]
struct Known {
    namespace: Arc<Namespace>,
    /// The scan that looks at it again.
    look_at: u64,
    wait: u64,
    /// It cannot be entered.
    closed: bool,
}

/// What a scan finds of a namespace without looking at it.
#[derive(Debug, Default)]
struct Found {
    pids: Vec<u32>,
    mount: Option<PathBuf>,
}

impl Default for Scanner {
    fn default() -> Self {
        Self::new(Path::new("/proc"))
    }
}

impl Scanner {
    /// `proc` is where procfs is mounted.
    pub fn new(proc: &Path) -> Self {
        Self {
            proc: proc.to_owned(),
            reader: Reader::new(proc),
            mounts: Mounts::new(proc),
            known: HashMap::new(),
            scans: 0,
            serials: 0,
            complete: false,
        }
    }

    /// Scans, and publishes what is there.
    ///
    /// # Errors
    /// `/proc` cannot be read; what was published stays.
    pub fn scan(&mut self, publish: &Namespaces) -> io::Result<Scan> {
        let mut scan = Scan::default();
        let mut found = self.processes(&mut scan)?;
        for (id, mount) in self.mounts.read() {
            found
                .entry(*id)
                .or_default()
                .mount
                .get_or_insert_with(|| mount.clone());
        }
        let host = self.host()?;
        let before = self.known.len();
        self.known.retain(|id, _| found.contains_key(id));
        let mut changed = self.known.len() != before;
        for (id, found) in found {
            changed |= match self.known.remove(&id) {
                Some(known) => self.again(known, found, &mut scan),
                None => self.meet(id, found, id == host, &mut scan),
            };
        }
        scan.closed = self.known.values().filter(|known| known.closed).count();
        self.complete = scan.is_complete();
        self.scans += 1;
        if changed {
            let all = self
                .known
                .iter()
                .map(|(id, known)| (*id, known.namespace.clone()));
            let all = Arc::new(all.collect());
            *publish.0.write().unwrap_or_else(PoisonError::into_inner) = all;
        }
        Ok(scan)
    }

    /// The namespaces of all processes.
    fn processes(&self, scan: &mut Scan) -> io::Result<HashMap<u32, Found>> {
        let mut found: HashMap<u32, Found> = HashMap::new();
        // procfs lists them by number: the first ones are nearly always the oldest.
        for entry in std::fs::read_dir(&self.proc)? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            if scan.processes + scan.refused == MAX_PROCESSES {
                scan.left_out += 1;
                break;
            }
            match link(&self.proc.join(name).join("ns/net")) {
                Ok(Some(id)) => {
                    scan.processes += 1;
                    let pids = &mut found.entry(id).or_default().pids;
                    if pids.len() < PIDS {
                        pids.push(pid);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => scan.refused += 1,
                // It ended, and a zombie is in no namespace.
                Err(error) if is_gone(&error) => {}
                Ok(None) | Err(_) => scan.errors += 1,
            }
        }
        found.values_mut().for_each(|f| f.pids.sort_unstable());
        Ok(found)
    }

    /// The node's own: that of the first process, which is the node's where the agent shares its
    /// processes. Where it does not show it the agent's own, as it runs on the node's network.
    fn host(&self) -> io::Result<u32> {
        let of = |process: &str| link(&self.proc.join(process).join("ns/net"));
        let id = of("1").or_else(|_| of("self"))?;
        id.ok_or_else(|| io::Error::other("/proc/self/ns/net is no network namespace"))
    }

    fn meet(&mut self, id: u32, found: Found, host: bool, scan: &mut Scan) -> bool {
        if self.known.len() >= MAX_NAMESPACES && !host {
            scan.left_out += 1;
            return false;
        }
        self.serials += 1;
        let mut namespace = Namespace {
            id,
            serial: self.serials,
            host,
            born: self.complete,
            pod: None,
            addresses: Vec::new(),
            pids: found.pids,
            mount: found.mount,
        };
        let closed = self.look(&mut namespace, scan);
        self.keep(namespace, closed, 1);
        true
    }

    /// A namespace that was there at the last scan: whether anything of it changed.
    fn again(&mut self, known: Known, found: Found, scan: &mut Scan) -> bool {
        let Known {
            namespace: old,
            look_at,
            wait,
            closed,
        } = known;
        // Nothing that led into it does any more: it may be another one with its number.
        let is_doubtful = !found.pids.iter().any(|pid| old.pids.contains(pid))
            && (found.mount.is_none() || found.mount != old.mount);
        let is_unnamed = !old.host && old.pod.is_none() && found.pids != old.pids;
        let is_same = found.pids == old.pids && found.mount == old.mount;
        if !is_doubtful && !is_unnamed && self.scans < look_at {
            let namespace = match is_same {
                true => old,
                false => Arc::new(Namespace {
                    pids: found.pids,
                    mount: found.mount,
                    ..Namespace::clone(&old)
                }),
            };
            let known = Known {
                namespace,
                look_at,
                wait,
                closed,
            };
            self.known.insert(known.namespace.id, known);
            return !is_same;
        }
        let mut new = Namespace {
            pids: found.pids,
            mount: found.mount,
            ..Namespace::clone(&old)
        };
        if is_doubtful {
            new.pod = None;
        }
        let closed = self.look(&mut new, scan);
        let is_another = is_doubtful
            && match (&old.pod, &new.pod) {
                (Some(old), Some(new)) => old != new,
                _ => old.addresses != new.addresses,
            };
        if is_another {
            self.serials += 1;
            (new.serial, new.born) = (self.serials, self.complete);
        }
        let wait = match is_another || is_unnamed {
            true => 1,
            false => (wait * 2).min(MAX_WAIT_SCANS),
        };
        let changed = new != *old;
        self.keep(new, closed, wait);
        changed
    }

    fn keep(&mut self, namespace: Namespace, closed: bool, wait: u64) {
        let known = Known {
            look_at: self.scans + wait,
            wait,
            closed,
            namespace: Arc::new(namespace),
        };
        self.known.insert(known.namespace.id, known);
    }

    /// Finds out whose a namespace is; whether it cannot be entered.
    fn look(&mut self, namespace: &mut Namespace, scan: &mut Scan) -> bool {
        if !namespace.host && namespace.pod.is_none() {
            namespace.pod = self.pod(&namespace.pids);
        }
        let mut text = String::new();
        let mut addresses = Vec::new();
        for file in ["fib_trie", "if_inet6"] {
            match self.reader.read(namespace, file, &mut text) {
                Ok(true) if file == "fib_trie" => addresses.extend(parse::ipv4_addresses(&text)),
                Ok(true) => addresses.extend(parse::ipv6_addresses(&text)),
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return true,
                // A kernel without IPv6 has no `if_inet6`, which is as if it were gone.
                Err(error) => {
                    tracing::debug!(netns = namespace.id, file, %error, "cannot be read");
                    scan.errors += 1;
                }
            }
        }
        addresses.retain(|ip| parse::tells(*ip));
        addresses.sort_unstable();
        addresses.dedup();
        if addresses.len() > MAX_ADDRESSES {
            scan.left_out += 1;
            addresses.truncate(MAX_ADDRESSES);
        }
        namespace.addresses = addresses;
        false
    }

    /// The pod of processes that share a namespace. A process that was sent into it from elsewhere,
    /// as by a debugger, is in another pod's cgroup or in none; if two pods remain nothing is said.
    fn pod(&self, pids: &[u32]) -> Option<PodUid> {
        let cgroups = pids.iter().filter_map(|pid| {
            let path = self.proc.join(pid.to_string()).join("cgroup");
            // It may have ended.
            std::fs::read_to_string(path).ok()
        });
        let pods: HashSet<PodUid> = cgroups.filter_map(|text| parse::pod(&text)).collect();
        let mut pods = pods.into_iter();
        pods.next().filter(|_| pods.next().is_none())
    }
}

/// The bind mounts of namespaces, read when they changed.
#[derive(Debug)]
struct Mounts {
    proc: PathBuf,
    file: Option<File>,
    /// What leads to the mounts' paths.
    root: PathBuf,
    found: Vec<(u32, PathBuf)>,
}

impl Mounts {
    fn new(proc: &Path) -> Self {
        Self {
            proc: proc.to_owned(),
            file: None,
            root: PathBuf::new(),
            found: Vec::new(),
        }
    }

    /// As they are now. What cannot be read is as if there were none.
    fn read(&mut self) -> &[(u32, PathBuf)] {
        if self.file.is_none() {
            self.open();
        } else if !self.have_changed() {
            return &self.found;
        }
        let mut text = String::new();
        let read = self.file.as_mut().map(|file| {
            file.rewind()?;
            file.read_to_string(&mut text)
        });
        match read {
            Some(Ok(_)) => {
                let root = &self.root;
                let mounts = parse::mounts(&text);
                self.found = mounts
                    .map(|(id, path)| match root.as_os_str().is_empty() {
                        true => (id, path),
                        false => (id, root.join(path.strip_prefix("/").unwrap_or(&path))),
                    })
                    // One more, so that it is noticed.
                    .take(MAX_NAMESPACES + 1)
                    .collect();
            }
            // The first process may have ended: it is opened anew at the next scan.
            Some(Err(_)) | None => (self.file, self.found) = (None, Vec::new()),
        }
        &self.found
    }

    /// Those of the first process, which are the node's, where the agent has others.
    fn open(&mut self) {
        let of = |process: &str| self.proc.join(process);
        let mounts = |process: &str| std::fs::read_link(of(process).join("ns/mnt"));
        let has_others = mounts("1").is_ok_and(|node| mounts("self").is_ok_and(|own| own != node));
        let root = of("1").join("root");
        let process = match has_others && std::fs::metadata(&root).is_ok() {
            true => {
                self.root = root;
                "1"
            }
            false => {
                self.root = PathBuf::new();
                "self"
            }
        };
        self.file = File::open(of(process).join("mountinfo")).ok();
    }

    /// The kernel marks the open file when mounts come or go (fs/proc_namespace.c, `mounts_poll`).
    fn have_changed(&self) -> bool {
        let Some(file) = &self.file else { return true };
        let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        match poll(&mut polled, PollTimeout::ZERO) {
            Ok(_) => polled[0].any().unwrap_or(true),
            Err(_) => true,
        }
    }
}

#[cfg(test)]
pub(super) mod fake;
#[cfg(test)]
#[path = "namespaces/tests.rs"]
mod tests;
