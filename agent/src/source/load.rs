//! Loading and attaching the programs, each on its own: what one kernel refuses, another part of
//! whydrop does without, and says so.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData, PerCpuArray, PerCpuHashMap, RingBuf};
use aya::programs::{BtfTracePoint, Program, RawTracePoint};
use aya::{Btf, Ebpf, EbpfLoader, VerifierLogLevel};
use whydrop_ebpf::{Control, OverflowCount, OverflowKey, PerCpu, REASONS};

use super::btf::{self, KernelTypes};
use super::budget::Budget;
use super::sys::Plain;
use crate::decode::classify;

/// The programs, as `build.rs` left them.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/whydrop-programs"));

/// A hook, the program for it, and what is lost without it.
struct Hook {
    /// Its name in `/v1/status` and `whydrop_source_up`.
    source: &'static str,
    tracepoint: &'static str,
    /// The `tp_btf` program, and the `raw_tp` one.
    programs: [&'static str; 2],
    lost_without: &'static str,
}

/// In the order of attaching: what tells of answers before what counts drops, so that no drop is
/// counted as silent because its answer was not watched yet.
const HOOKS: [Hook; 3] = [
    Hook {
        source: "told",
        tracepoint: "net_dev_queue",
        programs: ["net_dev_queue", "net_dev_queue_raw"],
        lost_without: "packets refused by a RST or an ICMP error are counted as silent drops",
    },
    Hook {
        source: "neighbour",
        tracepoint: "neigh_event_send_done",
        programs: ["neigh_wait", "neigh_wait_raw"],
        lost_without: "counts of silent drops are published 3 s late, to wait for answers that leave late",
    },
    Hook {
        source: DROPS,
        tracepoint: "kfree_skb",
        programs: ["kfree_skb", "kfree_skb_raw"],
        lost_without: "no drop is observed",
    },
];

/// The source without which nothing is observed.
pub const DROPS: &str = "drops";
/// The source that names the Service of a packet that DNAT changed.
pub const SERVICES: &str = "conntrack_destination";
/// The kernel's own names of why it dropped.
pub const REASONS_SOURCE: &str = "reasons";

/// Whether a source works, and what is lost if not.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SourceStatus {
    /// As in `whydrop_source_up{source}`.
    pub source: &'static str,
    /// Whether it works.
    pub up: bool,
    /// The hook that it uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hook: Option<String>,
    /// Why it does not work, or what it leaves out where it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What is lost without it; absent while it works.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<&'static str>,
}

/// The maps, taken out of the loaded object.
pub struct Maps {
    /// See `agent-ebpf/src/maps.rs`, which says what each is for.
    pub control: Array<MapData, Plain<Control>>,
    /// The two generations, for batch calls.
    pub flows: [std::os::fd::OwnedFd; 2],
    /// Packets that found no room there.
    pub overflow: PerCpuHashMap<MapData, Plain<OverflowKey>, Plain<OverflowCount>>,
    /// Packets by benign reason.
    pub benign: PerCpuArray<MapData, u64>,
    /// Each CPU's own counts.
    pub cpu: PerCpuArray<MapData, Plain<PerCpu>>,
}

/// What stays open as long as the agent observes; dropping it detaches everything.
pub struct Loaded {
    /// Programs and links.
    pub ebpf: Ebpf,
    /// The counts.
    pub maps: Maps,
    /// Detail.
    pub events: RingBuf<MapData>,
    /// What works.
    pub sources: Vec<SourceStatus>,
    /// The kernel's names of drop reasons.
    pub reasons: HashMap<u32, Arc<str>>,
    /// Whether the tracepoint passes a reason.
    pub has_reasons: bool,
    /// Sizes of the maps.
    pub budget: Budget,
    /// File descriptors of the attached programs, by name.
    pub programs: Vec<(String, std::os::fd::OwnedFd)>,
}

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Attach {
    /// `tp_btf` where the kernel takes it, else `raw_tp`.
    Auto,
    /// `raw_tp` only: slower, and without the trampolines that some kernels build wrongly.
    #[value(name = "raw_tp")]
    RawTp,
}

/// Loads the programs and attaches them.
///
/// `log` switches the programs' own messages on; without it they are not even in the loaded code.
///
/// Errors: no BTF, no rights, or no way to see drops; each with what to do.
pub fn load(map_memory_bytes: u64, how: Attach, log: bool) -> Result<Loaded> {
    let types = btf::read()?;
    let budget = Budget::new(
        map_memory_bytes,
        aya::util::nr_cpus().map_err(|(_, e)| e).context(
            "cannot read the number of possible CPUs from /sys/devices/system/cpu/possible",
        )?,
    )?;
    raise_memlock();
    // aya reads BTF once more for attaching: it keeps function signatures, btf-rs struct members.
    let btf = Btf::from_sys_fs().context("cannot read /sys/kernel/btf/vmlinux")?;

    let mut ebpf = open(&types, &budget, &btf, log)?;

    let mut sources = Vec::new();
    let mut programs = Vec::new();
    for hook in &HOOKS {
        let result = attach(&mut ebpf, hook, how, &btf);
        if hook.source == DROPS {
            result
                .as_ref()
                .map_err(|e| anyhow::anyhow!("{e}"))
                .with_context(refused)?;
        }
        let (hook_name, why) = match result {
            Ok((name, program)) => {
                if let Some(fd) = program_fd(&ebpf, program) {
                    programs.push((program.to_owned(), fd));
                }
                (Some(name), None)
            }
            Err(why) => (None, Some(why)),
        };
        sources.push(SourceStatus {
            source: hook.source,
            up: why.is_none(),
            lost: why.is_some().then_some(hook.lost_without),
            hook: hook_name,
            why,
        });
    }
    let has_conntrack = types.offsets.ct_tuplehash != whydrop_ebpf::MISSING
        && types.offsets.skb_nfct != whydrop_ebpf::MISSING;
    sources.push(SourceStatus {
        source: SERVICES,
        up: has_conntrack,
        hook: has_conntrack.then(|| "skb->_nfct".to_owned()),
        why: (!has_conntrack)
            .then(|| format!("missing in the kernel's BTF: {}", types.missing.join(", "))),
        lost: (!has_conntrack).then_some("the Service that a packet was sent to is not named"),
    });

    let has_reasons = types.offsets.has_reason == 1;
    sources.push(SourceStatus {
        source: REASONS_SOURCE,
        up: has_reasons,
        hook: has_reasons.then(|| format!("{} names from BTF", types.reasons.len())),
        why: (!has_reasons)
            .then(|| "this kernel's kfree_skb passes no reason (Linux before 5.17)".to_owned()),
        lost: (!has_reasons).then_some("drops are told apart by the function that dropped them"),
    });

    let take = |ebpf: &mut Ebpf, name: &str| {
        ebpf.take_map(name)
            .with_context(|| format!("the eBPF object has no map {name}"))
    };
    let flows = [take(&mut ebpf, "FLOWS_0")?, take(&mut ebpf, "FLOWS_1")?];
    let maps = Maps {
        control: Array::try_from(take(&mut ebpf, "CONTROL")?)?,
        flows: [map_fd(&flows[0])?, map_fd(&flows[1])?],
        overflow: PerCpuHashMap::try_from(take(&mut ebpf, "OVERFLOW")?)?,
        benign: PerCpuArray::try_from(take(&mut ebpf, "BENIGN_COUNT")?)?,
        cpu: PerCpuArray::try_from(take(&mut ebpf, "CPU")?)?,
    };
    let events = RingBuf::try_from(take(&mut ebpf, "EVENTS")?)?;
    Ok(Loaded {
        ebpf,
        maps,
        events,
        sources,
        reasons: types.reasons,
        has_reasons,
        budget,
        programs,
    })
}

/// The object with globals and map sizes set; its programs are not loaded yet.
fn open(types: &KernelTypes, budget: &Budget, btf: &Btf, log: bool) -> Result<Ebpf> {
    let offsets = Plain(types.offsets);
    let mut benign = Plain([0u8; REASONS]);
    for (number, name) in &types.reasons {
        if let Some(flag) = benign.0.get_mut(*number as usize) {
            *flag = u8::from(classify::is_always_benign(name));
        }
    }
    // aya-log: 0 is off, and the verifier then removes the messages' code. Debug is 4.
    let level: u8 = if log { 4 } else { 0 };
    EbpfLoader::new()
        .btf(Some(btf))
        .verifier_log_level(VerifierLogLevel::STATS)
        .override_global("OFFSETS", &offsets, true)
        .override_global("BENIGN", &benign, true)
        .override_global("AYA_LOG_LEVEL", &level, true)
        .map_max_entries("FLOWS_0", budget.flows)
        .map_max_entries("FLOWS_1", budget.flows)
        .map_max_entries("OVERFLOW", budget.overflow)
        .map_max_entries("EVENTS", budget.ring_bytes)
        .map_max_entries("AYA_LOGS", if log { 32 * 1024 } else { 4096 })
        .load(OBJECT)
        .with_context(refused)
}

/// Attaches the first program of a hook that the kernel takes: its description and its name.
fn attach(
    ebpf: &mut Ebpf,
    hook: &Hook,
    how: Attach,
    btf: &Btf,
) -> Result<(String, &'static str), String> {
    let [typed, raw] = hook.programs;
    let first = match how {
        Attach::RawTp => "not tried, because of --attach raw_tp".to_owned(),
        Attach::Auto => match attach_typed(ebpf, typed, hook.tracepoint, btf) {
            Ok(()) => return Ok((format!("tp_btf/{}", hook.tracepoint), typed)),
            Err(e) => e,
        },
    };
    match attach_raw(ebpf, raw, hook.tracepoint) {
        Ok(()) => Ok((format!("raw_tp/{}", hook.tracepoint), raw)),
        Err(second) => Err(format!("tp_btf: {first}; raw_tp: {second}")),
    }
}

fn attach_typed(ebpf: &mut Ebpf, name: &str, tracepoint: &str, btf: &Btf) -> Result<(), String> {
    let program: &mut BtfTracePoint = program(ebpf, name)?;
    program.load(tracepoint, btf).map_err(|e| brief(&e))?;
    program.attach().map(|_| ()).map_err(|e| brief(&e))
}

fn attach_raw(ebpf: &mut Ebpf, name: &str, tracepoint: &str) -> Result<(), String> {
    let program: &mut RawTracePoint = program(ebpf, name)?;
    program.load().map_err(|e| brief(&e))?;
    program
        .attach(tracepoint)
        .map(|_| ())
        .map_err(|e| brief(&e))
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, String>
where
    &'a mut P: TryFrom<&'a mut Program>,
{
    ebpf.program_mut(name)
        .and_then(|p| p.try_into().ok())
        .ok_or_else(|| format!("the eBPF object has no program {name} of this type"))
}

/// An error with its causes, without the verifier's log (which goes to debug).
fn brief(error: &aya::programs::ProgramError) -> String {
    tracing::debug!(?error, "the kernel refused a program");
    if let aya::programs::ProgramError::LoadError { io_error, .. } = error {
        return format!("the kernel refused the program: {io_error}");
    }
    format!("{:#}", anyhow::anyhow!(error.to_string()))
}

/// What a refusal usually means.
fn refused() -> String {
    if nix::unistd::geteuid().is_root() {
        "the kernel does not let whydrop observe drops; `whydrop check` tells what it allows \
         (needed: CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN before Linux 5.8; \
         lockdown=confidentiality forbids it)"
            .to_owned()
    } else {
        "whydrop needs root, or CAP_BPF and CAP_PERFMON, to observe drops: run it with sudo"
            .to_owned()
    }
}

/// Before 5.11 maps counted against RLIMIT_MEMLOCK; later a refusal means nothing.
fn raise_memlock() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        tracing::debug!(%error, "RLIMIT_MEMLOCK stays as it is");
    }
}

fn map_fd(map: &Map) -> Result<std::os::fd::OwnedFd> {
    let Map::PerCpuHashMap(data) = map else {
        anyhow::bail!("a flow map is no per-CPU hash");
    };
    data.fd()
        .as_fd()
        .try_clone_to_owned()
        .context("cannot duplicate a map's file descriptor")
}

fn program_fd(ebpf: &Ebpf, name: &str) -> Option<std::os::fd::OwnedFd> {
    let fd = match ebpf.program(name)? {
        Program::BtfTracePoint(p) => p.fd().ok()?.as_fd().try_clone_to_owned(),
        Program::RawTracePoint(p) => p.fd().ok()?.as_fd().try_clone_to_owned(),
        _ => return None,
    };
    fd.ok()
}

/// A number of `/proc/self/fdinfo` of a map or program, such as `memlock` or `recursion_misses`;
/// `None` where this kernel does not show it.
pub fn fd_info(fd: impl std::os::fd::AsFd, field: &str) -> Option<u64> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name == field).then(|| value.trim().parse().ok())?
    })
}
