//! Where DNS and answers could be seen: the hooks, the programs for them, and how each is attached.

use std::any::Any;
use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result};
use aya::maps::{Array, PerCpuArray};
use aya::programs::{
    BtfTracePoint, CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, FEntry, KProbe, Lsm,
    ProgramError, RawTracePoint,
};
use aya::{Btf, Ebpf, EbpfLoader};
use whydrop::source::btf;
use whydrop::source::sys::Plain;
use whydrop_ebpf::Offsets;

/// The candidates' programs, built beside the agent's own.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("WHYDROP_CANDIDATES"));

/// Elements of the map by namespace.
const NAMESPACES: u32 = 1024;

const SEND: &str = "net_dev_queue";
const RECEIVE: &str = "netif_receive_skb";
const UDP_SEND: &str = "ip_send_skb";
const UDP_ENQUEUE: &str = "__udp_enqueue_schedule_skb";

/// A way to attach a program: what it is attached to, and the program.
#[derive(Clone, Copy)]
pub enum Hook {
    /// A tracepoint by `tp_btf`.
    Typed(&'static str, &'static str),
    /// A tracepoint by `raw_tp`, the empty program.
    Raw(&'static str),
    /// A tracepoint by `raw_tp`.
    RawGate(&'static str, &'static str),
    /// A function of the kernel.
    Fentry(&'static str, &'static str),
    /// A function of the kernel.
    Kprobe(&'static str, &'static str),
    /// A hook of the security modules.
    Lsm(&'static str, &'static str),
    /// The root of all cgroups.
    Cgroup(CgroupSkbAttachType, &'static str),
}

/// Whether DNS queries wait for answers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Waits {
    /// None does.
    None,
    /// In another namespace.
    Elsewhere,
    /// In every namespace.
    Here,
}

/// Who is attached.
#[derive(Clone, Copy)]
pub enum Who {
    /// Nobody, to show what differs by itself.
    Nobody,
    /// The benchmark's own programs.
    Hooks(&'static [Hook], Waits),
    /// The agent, with all that it attaches.
    Agent,
}

use CgroupSkbAttachType::{Egress, Ingress};
use Hook::{Cgroup, Fentry, Kprobe, Raw, RawGate, Typed};
use Waits::{Elsewhere, Here, None as Nobody};
use Who::Hooks;

/// In the order of the table.
pub const CANDIDATES: &[(&str, Who)] = &[
    ("nothing, once more", Who::Nobody),
    (
        "net_dev_queue: empty, tp_btf",
        Hooks(&[Typed(SEND, "sent_empty")], Nobody),
    ),
    ("net_dev_queue: empty, raw_tp", Hooks(&[Raw(SEND)], Nobody)),
    (
        "net_dev_queue: gate, tp_btf",
        Hooks(&[Typed(SEND, "sent_gate")], Nobody),
    ),
    (
        "net_dev_queue: gate, raw_tp",
        Hooks(&[RawGate(SEND, "sent_gate_raw")], Nobody),
    ),
    (
        "netif_receive_skb: empty, tp_btf",
        Hooks(&[Typed(RECEIVE, "received_empty")], Nobody),
    ),
    (
        "netif_receive_skb: empty, raw_tp",
        Hooks(&[Raw(RECEIVE)], Nobody),
    ),
    (
        "netif_receive_skb: nobody waits, tp_btf",
        Hooks(&[Typed(RECEIVE, "received_gate")], Nobody),
    ),
    (
        "netif_receive_skb: nobody waits, raw_tp",
        Hooks(&[RawGate(RECEIVE, "received_gate_raw")], Nobody),
    ),
    (
        "netif_receive_skb: a query waits, tp_btf",
        Hooks(&[Typed(RECEIVE, "received_gate")], Here),
    ),
    (
        "netif_receive_skb: a query waits, raw_tp",
        Hooks(&[RawGate(RECEIVE, "received_gate_raw")], Here),
    ),
    (
        "netif_receive_skb: by namespace, waits elsewhere, tp_btf",
        Hooks(&[Typed(RECEIVE, "received_by_netns")], Elsewhere),
    ),
    (
        "netif_receive_skb: by namespace, waits elsewhere, raw_tp",
        Hooks(&[RawGate(RECEIVE, "received_by_netns_raw")], Elsewhere),
    ),
    (
        "netif_receive_skb: by namespace, waits here, tp_btf",
        Hooks(&[Typed(RECEIVE, "received_by_netns")], Here),
    ),
    (
        "ip_send_skb: fentry",
        Hooks(&[Fentry(UDP_SEND, "ip_send_fentry")], Nobody),
    ),
    (
        "ip_send_skb: kprobe",
        Hooks(&[Kprobe(UDP_SEND, "ip_send_kprobe")], Nobody),
    ),
    (
        "udp_enqueue: nobody waits, fentry",
        Hooks(&[Fentry(UDP_ENQUEUE, "enqueued_fentry")], Nobody),
    ),
    (
        "udp_enqueue: nobody waits, kprobe",
        Hooks(&[Kprobe(UDP_ENQUEUE, "enqueued_kprobe")], Nobody),
    ),
    (
        "udp_enqueue: a query waits, fentry",
        Hooks(&[Fentry(UDP_ENQUEUE, "enqueued_fentry")], Here),
    ),
    (
        "udp_enqueue: a query waits, kprobe",
        Hooks(&[Kprobe(UDP_ENQUEUE, "enqueued_kprobe")], Here),
    ),
    (
        "cgroup_skb egress",
        Hooks(&[Cgroup(Egress, "cgroup_sent")], Nobody),
    ),
    (
        "cgroup_skb ingress: nobody waits",
        Hooks(&[Cgroup(Ingress, "cgroup_received")], Nobody),
    ),
    (
        "cgroup_skb ingress: a query waits",
        Hooks(&[Cgroup(Ingress, "cgroup_received")], Here),
    ),
    (
        "lsm socket_sock_rcv_skb: empty",
        Hooks(&[Hook::Lsm("socket_sock_rcv_skb", "lsm_received")], Nobody),
    ),
    (
        "sk_data_ready: empty",
        Hooks(&[Raw("sk_data_ready")], Nobody),
    ),
    (
        "sock_send_length: empty",
        Hooks(&[Raw("sock_send_length")], Nobody),
    ),
    (
        "sock_recv_length: empty",
        Hooks(&[Raw("sock_recv_length")], Nobody),
    ),
    ("consume_skb: empty", Hooks(&[Raw("consume_skb")], Nobody)),
    (
        "skb_copy_datagram_iovec: empty",
        Hooks(&[Raw("skb_copy_datagram_iovec")], Nobody),
    ),
    (
        "set: net_dev_queue, netif_receive_skb, nobody waits, tp_btf",
        Hooks(
            &[Typed(SEND, "sent_gate"), Typed(RECEIVE, "received_gate")],
            Nobody,
        ),
    ),
    (
        "set: net_dev_queue, netif_receive_skb, a query waits, tp_btf",
        Hooks(
            &[Typed(SEND, "sent_gate"), Typed(RECEIVE, "received_gate")],
            Here,
        ),
    ),
    (
        "set: net_dev_queue, netif_receive_skb, a query waits, raw_tp",
        Hooks(
            &[
                RawGate(SEND, "sent_gate_raw"),
                RawGate(RECEIVE, "received_gate_raw"),
            ],
            Here,
        ),
    ),
    (
        "set: net_dev_queue, cgroup_skb ingress, a query waits",
        Hooks(
            &[Typed(SEND, "sent_gate"), Cgroup(Ingress, "cgroup_received")],
            Here,
        ),
    ),
    (
        "set: net_dev_queue, udp_enqueue by fentry, a query waits",
        Hooks(
            &[
                Typed(SEND, "sent_gate"),
                Fentry(UDP_ENQUEUE, "enqueued_fentry"),
            ],
            Here,
        ),
    ),
    (
        "set: net_dev_queue, udp_enqueue by kprobe, a query waits",
        Hooks(
            &[
                Typed(SEND, "sent_gate"),
                Kprobe(UDP_ENQUEUE, "enqueued_kprobe"),
            ],
            Here,
        ),
    ),
    (
        "set: ip_send_skb, udp_enqueue by fentry, a query waits",
        Hooks(
            &[
                Fentry(UDP_SEND, "ip_send_fentry"),
                Fentry(UDP_ENQUEUE, "enqueued_fentry"),
            ],
            Here,
        ),
    ),
    ("whydrop", Who::Agent),
];

/// A link of whatever kind; dropping it detaches.
pub type Link = Box<dyn Any>;

/// The programs, of which none is attached yet.
pub struct Programs {
    ebpf: Ebpf,
    btf: Btf,
}

impl Programs {
    /// Loads the object; a program is loaded when it is first attached.
    ///
    /// # Errors
    /// The kernel has no BTF or takes no maps.
    pub fn open() -> Result<Self> {
        let offsets: Plain<Offsets> = Plain(btf::read()?.offsets);
        let btf = Btf::from_sys_fs().context("read the kernel's BTF")?;
        let ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("OFFSETS", &offsets, true)
            .load(OBJECT)
            .context("load the candidates")?;
        Ok(Self { ebpf, btf })
    }

    /// Attaches hooks for as long as the result lives.
    ///
    /// # Errors
    /// The kernel refuses one.
    pub fn attach(&mut self, hooks: &[Hook], waits: Waits) -> Result<Vec<Link>> {
        self.set_waits(waits)?;
        hooks.iter().map(|hook| self.attach_hook(*hook)).collect()
    }

    /// What the gates have let through so far.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn passed(&self) -> Result<u64> {
        let map = self.ebpf.map("PASSED");
        let map = map.context("the candidates have no map PASSED")?;
        let passed: PerCpuArray<_, u64> = PerCpuArray::try_from(map)?;
        Ok(passed.get(&0, 0).context("read the count")?.iter().sum())
    }

    fn set_waits(&mut self, waits: Waits) -> Result<()> {
        let mut set = |name: &str, elements: u32, value: u64| -> Result<()> {
            let map = self.ebpf.map_mut(name);
            let map = map.with_context(|| format!("the candidates have no map {name}"))?;
            let mut map: Array<_, u64> = Array::try_from(map)?;
            (0..elements).try_for_each(|at| map.set(at, value, 0).context("set"))
        };
        set("WAITING", 1, u64::from(waits != Nobody))?;
        set("WAITING_IN", NAMESPACES, u64::from(waits == Here))
    }

    fn attach_hook(&mut self, hook: Hook) -> Result<Link> {
        let btf = &self.btf;
        let name = match hook {
            Raw(_) => "empty_raw",
            Typed(_, name)
            | RawGate(_, name)
            | Fentry(_, name)
            | Kprobe(_, name)
            | Hook::Lsm(_, name)
            | Cgroup(_, name) => name,
        };
        let program = self.ebpf.program_mut(name);
        let program = program.with_context(|| format!("the candidates have no program {name}"))?;
        Ok(match hook {
            Typed(tracepoint, _) => {
                let program: &mut BtfTracePoint = program.try_into()?;
                loaded(program.load(tracepoint, btf))?;
                let link = program.attach()?;
                Box::new(program.take_link(link)?)
            }
            Raw(tracepoint) | RawGate(tracepoint, _) => {
                let program: &mut RawTracePoint = program.try_into()?;
                loaded(program.load())?;
                let link = program.attach(tracepoint)?;
                Box::new(program.take_link(link)?)
            }
            Fentry(function, _) => {
                let program: &mut FEntry = program.try_into()?;
                loaded(program.load(function, btf))?;
                let link = program.attach()?;
                Box::new(program.take_link(link)?)
            }
            Kprobe(function, _) => {
                let program: &mut KProbe = program.try_into()?;
                loaded(program.load())?;
                let link = program.attach(function, 0)?;
                Box::new(program.take_link(link)?)
            }
            Hook::Lsm(hook, _) => {
                let program: &mut Lsm = program.try_into()?;
                loaded(program.load(hook, btf))?;
                let link = program.attach()?;
                Box::new(program.take_link(link)?)
            }
            Cgroup(direction, _) => {
                let program: &mut CgroupSkb = program.try_into()?;
                loaded(program.load())?;
                // A link's own mode is that others may attach as well; it takes no other.
                let link = program.attach(root_cgroup()?, direction, CgroupAttachMode::Single)?;
                Box::new(program.take_link(link)?)
            }
        })
    }
}

/// A program is loaded by its first turn.
fn loaded(result: Result<(), ProgramError>) -> Result<(), ProgramError> {
    match result {
        Err(ProgramError::AlreadyLoaded) => Ok(()),
        result => result,
    }
}

/// The cgroup that all others are in.
fn root_cgroup() -> Result<File> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let path = mounts
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|words| words.get(2) == Some(&"cgroup2"))
        .and_then(|words| words.get(1).map(PathBuf::from))
        .context("no cgroup2 is mounted")?;
    File::open(&path).with_context(|| format!("open {}", path.display()))
}
