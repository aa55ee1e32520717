//! Loading and attaching the programs, each on its own: what one kernel refuses, another part of
//! whydrop does without, and says so.

use std::collections;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuHashMap, RingBuf};
use aya::{Btf, Ebpf, EbpfLoader, VerifierLogLevel};
use whydrop_ebpf::attempt::{ClientKey, Settings, Swept, Tally};
use whydrop_ebpf::{Control, OverflowCount, OverflowKey, PerCpu, REASONS};

use super::btf::{self, KernelTypes};
use super::budget::Budget;
use super::hooks::{self, DROPS};
pub use super::hooks::{Attach, SourceStatus};
use super::lockdown;
use super::sys::Plain;
use crate::decode::classify;

/// The programs, as `build.rs` left them.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/whydrop-programs"));

/// The source that names the Service of a packet that DNAT changed.
pub const SERVICES: &str = "conntrack_destination";
/// The kernel's own names of why it dropped.
pub const REASONS_SOURCE: &str = "reasons";

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
    /// What became of attempts, in two generations as `flows`.
    pub tallies: [std::os::fd::OwnedFd; 2],
    /// The same for whose sender there was no room.
    pub tallies_other: PerCpuArray<MapData, Plain<Tally>>,
}

/// The maps of what waits.
pub struct AttemptMaps {
    /// See `agent-ebpf/src/maps.rs`, which says what each is for.
    pub connects: std::os::fd::OwnedFd,
    /// Connects that ended between two looks.
    pub ended: std::os::fd::OwnedFd,
    /// DNS queries.
    pub queries: std::os::fd::OwnedFd,
    /// How many of them the agent took out.
    pub forgotten: Array<MapData, u64>,
    /// When sockets that ask for names were told of an error.
    pub clients_told: HashMap<MapData, Plain<ClientKey>, u64>,
    /// How far the agent has looked.
    pub swept: Array<MapData, Plain<Swept>>,
    /// Each CPU's own counts, once more: another thread reads them.
    pub counts: PerCpuArray<MapData, Plain<PerCpu>>,
}

/// What stays open as long as the agent observes; dropping it detaches everything.
pub struct Loaded {
    /// Programs and links.
    pub ebpf: Ebpf,
    /// The counts.
    pub maps: Maps,
    /// What waits.
    pub attempts: AttemptMaps,
    /// Detail.
    pub events: RingBuf<MapData>,
    /// Conntrack entries that died unreplied, where kprobes are allowed.
    pub died: RingBuf<MapData>,
    /// What works.
    pub sources: Vec<SourceStatus>,
    /// The kernel's names of drop reasons.
    pub reasons: collections::HashMap<u32, Arc<str>>,
    /// Whether the tracepoint passes a reason.
    pub has_reasons: bool,
    /// Sizes of the maps.
    pub budget: Budget,
    /// File descriptors of the attached programs, by name.
    pub programs: Vec<(String, std::os::fd::OwnedFd)>,
    /// Sources whose hook this kernel did not take, and may take later.
    pub missing: Vec<&'static str>,
}

/// What the programs are loaded with.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What all kernel maps together may take.
    pub map_memory_bytes: u64,
    /// How programs are attached.
    pub attach: Attach,
    /// Whether the programs' own messages are switched on; without it they are not even in the
    /// loaded code.
    pub log: bool,
    /// When a connect counts as unanswered.
    pub syn_timeout: Duration,
    /// When a DNS query counts as unanswered.
    pub dns_timeout: Duration,
    /// Whether DNS is watched.
    pub dns: bool,
    /// Whether conntrack is watched.
    pub conntrack: bool,
}

/// Loads the programs and attaches them.
///
/// Errors: no BTF, no rights, or no way to see drops; each with what to do. Under
/// `lockdown=confidentiality` nothing is attached, and what needs no program can go on.
pub fn load(options: Options) -> Result<Loaded> {
    let types = btf::read()?;
    let budget = Budget::new(
        options.map_memory_bytes,
        aya::util::nr_cpus().map_err(|(_, e)| e).context(
            "cannot read the number of possible CPUs from /sys/devices/system/cpu/possible",
        )?,
    )?;
    raise_memlock();
    // aya reads BTF once more for attaching: it keeps function signatures, btf-rs struct members.
    let btf = Btf::from_sys_fs().context("cannot read /sys/kernel/btf/vmlinux")?;

    let settings = Settings {
        syn_timeout_ns: nanoseconds(options.syn_timeout),
        dns_timeout_ns: nanoseconds(options.dns_timeout),
        dns: u32::from(options.dns && btf::knows_dns(&types.offsets)),
        connects: u32::from(btf::knows_connects(&types.offsets)),
    };
    let mut ebpf = open(&types, &budget, &settings, &btf, options.log)?;

    let mut sources = Vec::new();
    let mut programs = Vec::new();
    let mut missing = Vec::new();
    let is_locked = lockdown::is_confidentiality();
    for hook in &hooks::HOOKS {
        let off = match hook.source {
            // None of them is tried: one that loaded would say of what another cannot see here that
            // it happened elsewhere.
            _ if is_locked => Some(lockdown::CONFIDENTIALITY.to_owned()),
            hooks::CONNTRACK_DEATHS if !options.conntrack => {
                Some("switched off by --conntrack off".to_owned())
            }
            hooks::CONNECTS | hooks::CONNECT_ERRORS if settings.connects == 0 => Some(format!(
                "missing in the kernel's BTF: {}",
                types.missing.join(", ")
            )),
            hooks::DNS if !options.dns => Some("switched off by --dns off".to_owned()),
            hooks::DNS if settings.dns == 0 => Some(format!(
                "missing in the kernel's BTF: {}",
                types.missing.join(", ")
            )),
            _ => None,
        };
        let is_off = off.is_some();
        let result = off.map_or_else(
            || hooks::attach(&mut ebpf, hook, options.attach, Some(&btf)),
            Err,
        );
        if hook.source == DROPS && !is_locked {
            result
                .as_ref()
                .map_err(|e| anyhow::anyhow!("{e}"))
                .with_context(refused)?;
        }
        if let Ok(attached) = &result
            && let Some(fd) = hooks::program_fd(&ebpf, attached.program)
        {
            programs.push((attached.program.to_owned(), fd));
        }
        if result.is_err() && !is_off {
            missing.push(hook.source);
        }
        sources.push(hook.status(result.map(|attached| attached.hook)));
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
    let tallies = [take(&mut ebpf, "TALLIES_0")?, take(&mut ebpf, "TALLIES_1")?];
    let counts = ebpf.map("CPU").map(map_fd).transpose()?;
    let counts = counts.context("the eBPF object has no map CPU")?;
    let maps = Maps {
        control: Array::try_from(take(&mut ebpf, "CONTROL")?)?,
        flows: [map_fd(&flows[0])?, map_fd(&flows[1])?],
        overflow: PerCpuHashMap::try_from(take(&mut ebpf, "OVERFLOW")?)?,
        benign: PerCpuArray::try_from(take(&mut ebpf, "BENIGN_COUNT")?)?,
        cpu: PerCpuArray::try_from(take(&mut ebpf, "CPU")?)?,
        tallies: [map_fd(&tallies[0])?, map_fd(&tallies[1])?],
        tallies_other: PerCpuArray::try_from(take(&mut ebpf, "TALLIES_OTHER")?)?,
    };
    let attempts = AttemptMaps {
        connects: map_fd(&take(&mut ebpf, "CONNECTS")?)?,
        ended: map_fd(&take(&mut ebpf, "ENDED")?)?,
        queries: map_fd(&take(&mut ebpf, "QUERIES")?)?,
        clients_told: HashMap::try_from(take(&mut ebpf, "CLIENTS_TOLD")?)?,
        forgotten: Array::try_from(take(&mut ebpf, "QUERIES_FORGOTTEN")?)?,
        swept: Array::try_from(take(&mut ebpf, "SWEPT")?)?,
        counts: PerCpuArray::try_from(Map::PerCpuArray(MapData::from_fd(counts)?))?,
    };
    let events = RingBuf::try_from(take(&mut ebpf, "EVENTS")?)?;
    let died = RingBuf::try_from(take(&mut ebpf, "DIED")?)?;
    Ok(Loaded {
        ebpf,
        maps,
        attempts,
        events,
        died,
        sources,
        reasons: types.reasons,
        has_reasons,
        budget,
        programs,
        missing,
    })
}

/// The object with globals and map sizes set; its programs are not loaded yet.
fn open(
    types: &KernelTypes,
    budget: &Budget,
    settings: &Settings,
    btf: &Btf,
    log: bool,
) -> Result<Ebpf> {
    let settings = Plain(*settings);
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
        .override_global("SETTINGS", &settings, true)
        .override_global("BENIGN", &benign, true)
        .override_global("AYA_LOG_LEVEL", &level, true)
        .map_max_entries("FLOWS_0", budget.flows)
        .map_max_entries("FLOWS_1", budget.flows)
        .map_max_entries("OVERFLOW", budget.overflow)
        .map_max_entries("EVENTS", budget.ring_bytes)
        .map_max_entries("CONNECTS", budget.connects)
        .map_max_entries("SYNS", budget.connects)
        .map_max_entries("ENDED", budget.ended)
        .map_max_entries("QUERIES", budget.queries)
        .map_max_entries("TALLIES_0", budget.tallies)
        .map_max_entries("TALLIES_1", budget.tallies)
        .map_max_entries("AYA_LOGS", if log { 32 * 1024 } else { 4096 })
        .load(OBJECT)
        .with_context(refused)
}

/// What a refusal usually means.
fn refused() -> String {
    if nix::unistd::geteuid().is_root() {
        "the kernel does not let whydrop observe drops; `whydrop check` tells what it allows \
         (needed: CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN before Linux 5.8)"
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

/// A file descriptor of a map for batch calls, which aya has not.
fn map_fd(map: &Map) -> Result<std::os::fd::OwnedFd> {
    let (Map::PerCpuHashMap(data) | Map::HashMap(data) | Map::PerCpuArray(data)) = map else {
        anyhow::bail!("a map is of an unexpected type");
    };
    data.fd()
        .as_fd()
        .try_clone_to_owned()
        .context("cannot duplicate a map's file descriptor")
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
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
