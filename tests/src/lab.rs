//! Three hosts and a second pair, as network namespaces.
//!
//! ```text
//! client  ─┐          ┌─ server
//!          ├─ router ─┤
//! client2 ─┘          └─ server2      (the pair that must never be blamed)
//! ```
//!
//! Every lab has an IPv4 /24 and an IPv6 /48 of its own, so labs run at the same time without being
//! taken for one another by an agent, which sees the whole node. Its number is held by a file lock:
//! the kernel releases it when the process ends in whatever way, so whoever starts next can tell
//! left-over namespaces from those in use, and removes them.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CloneFlags, setns};

pub use crate::place::{Family, Host, Place};

/// Where the locks of the labs live.
const LOCKS: &str = "/run/lock/whydrop-lab";
/// Every namespace of every lab is called so, then its number, a hyphen and the host.
const PREFIX: &str = "wdlab";
/// How many labs the addresses allow for: 10.64.0.0/24 to 10.191.255.0/24.
const LABS: u16 = 128 * 256;

/// TC_ACT_SHOT: dropped.
pub const TC_SHOT: u8 = 2;
/// TC_ACT_STOLEN: freed, and not called a drop.
pub const TC_STOLEN: u8 = 4;

/// The lab. Dropping it removes its namespaces and all that is in them.
pub struct Lab {
    id: u16,
    /// Held for as long as the lab lives; last, so that it is released after the clean-up.
    _shared: Flock<File>,
    _lock: Flock<File>,
}

impl Lab {
    /// Builds a lab with both families, forwarding on, and fixed neighbours.
    ///
    /// # Errors
    /// Not root, a command that is missing (named), or a kernel without namespaces or veth.
    pub fn new() -> Result<Self> {
        Self::with_lock(FlockArg::LockShared)
    }

    /// Builds a lab while no lab of any other process runs, and keeps them out until it is dropped:
    /// for tests on node-wide sums. Waits for those that run.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn alone() -> Result<Self> {
        Self::with_lock(FlockArg::LockExclusive)
    }

    fn with_lock(kind: FlockArg) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the lab makes network namespaces: run it as root"
        );
        fs::create_dir_all(LOCKS).with_context(|| format!("create {LOCKS}"))?;
        let shared = lock(&Path::new(LOCKS).join("all"), kind)?
            .context("the lab's common lock file was removed by somebody else: try again")?;
        sweep()?;
        // Starts at a place that differs by process, so that few locks are tried.
        let start = (std::process::id().wrapping_mul(37) % u32::from(LABS)) as u16;
        for step in 0..LABS {
            let id = (start + step) % LABS;
            if let Some(lock) = lock(&lock_path(id), FlockArg::LockExclusiveNonblock)? {
                let lab = Self {
                    id,
                    _shared: shared,
                    _lock: lock,
                };
                lab.build()
                    .context("build the lab (it needs ip, nft and veth)")?;
                return Ok(lab);
            }
        }
        bail!("every one of {LABS} lab numbers is in use: see {LOCKS}");
    }

    fn build(&self) -> Result<()> {
        let mut root = String::new();
        for host in Host::ALL {
            root += &format!("netns add {}\n", self.netns(host));
        }
        batch(&[], &root)?;
        for host in Host::ALL {
            // Before any device exists, so that each is born silent: no neighbour discovery, router
            // solicitation or listener report that could be dropped and counted.
            for (key, value) in [
                ("accept_dad", "0"),
                ("dad_transmits", "0"),
                ("accept_ra", "0"),
                ("router_solicitations", "0"),
                ("addr_gen_mode", "1"),
            ] {
                self.sysctl(host, &format!("net/ipv6/conf/default/{key}"), value)?;
            }
            self.sysctl(host, "net/ipv4/conf/all/rp_filter", "0")?;
            self.sysctl(host, "net/ipv4/conf/default/rp_filter", "0")?;
        }
        let router = self.netns(Host::Router);
        let links: String = Host::PODS
            .iter()
            .map(|pod| {
                format!(
                    "link add {} netns {router} address {} type veth peer name eth0 netns {} address {}\n",
                    pod.device(),
                    mac(*pod, true),
                    self.netns(*pod),
                    mac(*pod, false),
                )
            })
            .collect();
        batch(&[], &links)?;
        let mut at_router = "link set lo up\n".to_owned();
        for pod in Host::PODS {
            let device = pod.device();
            let mut at_pod = "link set lo up\n".to_owned();
            at_pod += "link set eth0 up\n";
            at_router += &format!("link set {device} up\n");
            for family in Family::BOTH {
                let (mine, theirs) = (
                    self.address(Place::Of(pod), family),
                    self.address(Place::RouterTowards(pod), family),
                );
                let (length, option) = family.pick((28, ""), (64, " nodad"));
                let (to_router, to_pod) = (mac(pod, true), mac(pod, false));
                at_pod += &format!("addr add {mine}/{length} dev eth0{option}\n");
                at_pod +=
                    &format!("neigh add {theirs} lladdr {to_router} dev eth0 nud permanent\n");
                at_pod += &format!("route add default via {theirs} dev eth0\n");
                at_router += &format!("addr add {theirs}/{length} dev {device}{option}\n");
                at_router +=
                    &format!("neigh add {mine} lladdr {to_pod} dev {device} nud permanent\n");
            }
            batch(&["-n", &self.netns(pod)], &at_pod)?;
        }
        batch(&["-n", &router], &at_router)?;
        self.sysctl(Host::Router, "net/ipv4/ip_forward", "1")?;
        self.sysctl(Host::Router, "net/ipv6/conf/all/forwarding", "1")?;
        // The marker, ahead of every rule of a test and of connection tracking.
        self.nft(
            Host::Router,
            &format!(
                "table inet whydrop_marker {{ chain c {{ type filter hook prerouting priority -310;
                   ip daddr {} counter drop
                   ip6 daddr {} counter drop
                 }}\n}}",
                self.address(Place::Marker, Family::V4),
                self.address(Place::Marker, Family::V6),
            ),
        )
    }

    /// The lab's number, unique on this machine while the lab lives.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The Kubernetes namespace of the lab's pods.
    pub fn namespace(&self) -> String {
        format!("lab-{}", self.id)
    }

    /// The Kubernetes node that the router stands for.
    pub fn node(&self) -> String {
        format!("node-{}", self.id)
    }

    /// Name of a host's network namespace under `/run/netns`.
    pub fn netns(&self, host: Host) -> String {
        format!("{PREFIX}{}-{}", self.id, host.name())
    }

    /// An address of the lab.
    pub fn address(&self, place: Place, family: Family) -> IpAddr {
        let subnet = |host| match host {
            Host::Client | Host::Router => 0,
            Host::Server => 1,
            Host::Client2 => 2,
            Host::Server2 => 3,
        };
        let (subnet, host) = match place {
            Place::Of(Host::Router) => (0, 1),
            Place::Of(host) => (subnet(host), 2),
            Place::RouterTowards(host) => (subnet(host), 1),
            Place::Absent => (1, 12),
            Place::Marker => (4, 2),
            Place::InnerClient => (5, 2),
            Place::InnerServer => (6, 2),
            Place::Service => (7, 2),
        };
        let [high, low] = self.id.to_be_bytes();
        match family {
            Family::V4 => Ipv4Addr::new(10, 64 + high, low, (subnet << 4 | host) as u8).into(),
            Family::V6 => Ipv6Addr::new(0xfd77, 0x0d0b, self.id, subnet, 0, 0, 0, host).into(),
        }
    }

    /// An address of the lab with a port.
    pub fn socket(&self, place: Place, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(place, family), port)
    }

    /// The lab's own range, in which the pods' addresses lie.
    pub fn range(&self, family: Family) -> String {
        let [high, low] = self.id.to_be_bytes();
        match family {
            Family::V4 => format!("10.{}.{low}.0/24", 64 + high),
            Family::V6 => format!("fd77:d0b:{:x}::/48", self.id),
        }
    }

    /// Runs a closure on a thread of its own inside a host's network namespace. Sockets that it
    /// makes stay there, and so do processes that it starts.
    ///
    /// # Panics
    /// With the closure's own panic, or if the namespace cannot be entered.
    pub fn within<T: Send>(&self, host: Host, run: impl FnOnce() -> T + Send) -> T {
        let name = self.netns(host);
        thread::scope(|scope| {
            let handle = scope.spawn(move || {
                enter(&name).unwrap_or_else(|error| panic!("{error:#}"));
                run()
            });
            match handle.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Runs a command line (words between blanks, no shell) in a host's namespace.
    ///
    /// # Errors
    /// The command is missing or fails; says which and what it wrote.
    pub fn run(&self, host: Host, line: &str) -> Result<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        self.within(host, || command(&words, None))
    }

    /// Loads an nft script in a host's namespace, as a whole or not at all.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn nft(&self, host: Host, script: &str) -> Result<()> {
        self.within(host, || command(&["nft", "-f", "-"], Some(script)))
            .map(drop)
    }

    /// Gives every unicast packet of a device in one direction (`ingress`, `egress`) a verdict by
    /// a tc BPF filter; multicast, as of neighbour discovery and listener reports, passes. The
    /// verdicts are those of linux/pkt_cls.h: [`TC_SHOT`] drops, [`TC_STOLEN`] frees without calling
    /// it a drop.
    ///
    /// # Errors
    /// The kernel has no cls_bpf.
    pub fn tc(&self, host: Host, device: &str, direction: &str, verdict: u8) -> Result<()> {
        // Load the first byte of the destination MAC; if it is a group address return 0 (pass),
        // else the verdict.
        let code = format!("4,48 0 0 0,69 0 1 1,6 0 0 0,6 0 0 {verdict}");
        self.tc_filter(host, device, direction, &code)
    }

    /// Gives the packets to one TCP or UDP port a verdict, as [`Lab::tc`] gives it to all.
    ///
    /// # Errors
    /// As [`Lab::tc`].
    pub fn tc_port(
        &self,
        host: Host,
        device: &str,
        direction: &str,
        port: u16,
        verdict: u8,
    ) -> Result<()> {
        // Load the EtherType; by it load the destination port behind an IPv4 header without options
        // (36) or an IPv6 header without extensions (56); compare.
        let code = format!(
            "9,40 0 0 12,21 0 2 2048,40 0 0 36,5 0 0 2,21 0 3 34525,40 0 0 56,\
             21 0 1 {port},6 0 0 {verdict},6 0 0 0"
        );
        self.tc_filter(host, device, direction, &code)
    }

    fn tc_filter(&self, host: Host, device: &str, direction: &str, code: &str) -> Result<()> {
        self.within(host, || {
            command(&["tc", "qdisc", "replace", "dev", device, "clsact"], None)?;
            let filter = ["tc", "filter", "add", "dev", device, direction];
            command(
                &[&filter[..], &["bpf", "da", "bytecode", code]].concat(),
                None,
            )
        })
        .map(drop)
    }

    /// Sets a sysctl (path below /proc/sys) in a host's namespace.
    ///
    /// # Errors
    /// The kernel has no such sysctl or refuses the value.
    pub fn sysctl(&self, host: Host, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.within(host, || {
            fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))
        })
    }

    /// Lifts a host's limit on how many ICMP errors it sends to one receiver; bursts must still be
    /// shorter than the 50 of its limit for all receivers (`icmp_msgs_burst`).
    ///
    /// # Errors
    /// As [`Lab::sysctl`].
    pub fn unlimited_icmp(&self, host: Host) -> Result<()> {
        self.sysctl(host, "net/ipv4/icmp_ratelimit", "0")?;
        self.sysctl(host, "net/ipv6/icmp/ratelimit", "0")
    }

    /// Reads a file that shows the namespace of who reads it, as `/proc/thread-self/net/snmp`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self, host: Host, path: &str) -> Result<String> {
        self.within(host, || {
            fs::read_to_string(path).with_context(|| format!("read {path}"))
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        remove(self.id);
    }
}

/// Moves the calling thread into a named network namespace, for good.
///
/// # Errors
/// There is no such namespace, or no right to enter it.
pub fn enter(netns: &str) -> Result<()> {
    let path = PathBuf::from("/run/netns").join(netns);
    let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    setns(&file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", path.display()))
}

/// Runs a command, with text on its standard input if there is any.
///
/// # Errors
/// The command is missing or fails; says which and what it wrote.
pub fn command(words: &[&str], input: Option<&str>) -> Result<String> {
    let (program, arguments) = words.split_first().context("an empty command")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}: is it installed?"))?;
    if let (Some(mut stdin), Some(text)) = (child.stdin.take(), input) {
        // One that ends early says why on its standard error, which is what is shown.
        let _ = stdin.write_all(text.as_bytes());
    }
    let output = child
        .wait_with_output()
        .with_context(|| format!("wait for {program}"))?;
    ensure!(
        output.status.success(),
        "`{}` failed: {}\n{}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr).trim(),
        input.unwrap_or_default(),
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn batch(options: &[&str], script: &str) -> Result<()> {
    command(&[&["ip"], options, &["-batch", "-"]].concat(), Some(script)).map(drop)
}

/// The address of one end of the link between the router and a pod.
fn mac(pod: Host, at_router: bool) -> String {
    format!(
        "02:00:00:00:0{}:0{}",
        pod as u8,
        if at_router { 1 } else { 2 }
    )
}

/// The bytes of the same, for frames made by hand.
pub fn mac_bytes(pod: Host, at_router: bool) -> [u8; 6] {
    [2, 0, 0, 0, pod as u8, if at_router { 1 } else { 2 }]
}

/// Takes what one test of a machine may have at a time, and waits for it. It is given back when the lock is
/// dropped, or with the process.
///
/// # Errors
/// The lock's file cannot be made.
pub fn only_one(name: &str) -> Result<Flock<File>> {
    fs::create_dir_all(LOCKS).with_context(|| format!("create {LOCKS}"))?;
    loop {
        if let Some(lock) = lock(&Path::new(LOCKS).join(name), FlockArg::LockExclusive)? {
            return Ok(lock);
        }
    }
}

fn lock_path(id: u16) -> PathBuf {
    Path::new(LOCKS).join(id.to_string())
}

/// Takes a file lock; `None` if another holds it and the kind says not to wait.
fn lock(path: &Path, kind: FlockArg) -> Result<Option<Flock<File>>> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    match Flock::lock(file, kind) {
        // The file may have been removed by its last holder between open and lock: then somebody
        // else may already hold a new one of the same name.
        Ok(lock) => Ok(fs::metadata(path)
            .is_ok_and(|now| lock.metadata().is_ok_and(|held| held.ino() == now.ino()))
            .then_some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

/// Removes the namespaces of labs whose process is gone.
fn sweep() -> Result<()> {
    let Ok(entries) = fs::read_dir("/run/netns") else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| {
            name.strip_prefix(PREFIX)?
                .split_once('-')?
                .0
                .parse::<u16>()
                .ok()
        });
        if let Some(id) = id
            && let Some(_held) = lock(&lock_path(id), FlockArg::LockExclusiveNonblock)?
        {
            remove(id);
        }
    }
    Ok(())
}

/// Removes what a lab leaves; whoever calls it holds the lab's lock.
fn remove(id: u16) {
    let script: String = Host::ALL
        .iter()
        .map(|host| format!("{PREFIX}{id}-{}", host.name()))
        .filter(|name| Path::new("/run/netns").join(name).exists())
        .map(|name| format!("netns del {name}\n"))
        .collect();
    if let Err(error) = batch(&["-force"], &script) {
        eprintln!("remove lab {id}: {error:#}");
    }
    let _ = fs::remove_file(lock_path(id));
}
