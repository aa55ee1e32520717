//! Every `kfree_skb`: count it by flow, and send detail while there is room for it.

use aya_ebpf::bindings::{BPF_NOEXIST, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::bpf_probe_read_kernel_buf;
use aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::maps::PerCpuHashMap;
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use aya_log_ebpf::debug;
use whydrop_ebpf::{
    Control, Cpu, DropEvent, EVENTS_PER_DNS_FLOW, EVENTS_PER_FLOW, FLAG_LOCAL_DATAGRAM, FlowCount,
    FlowKey, KIND_DNS, KIND_PACKET, MISSING, OverflowCount, OverflowKey, REASONS, SNAP_LEN,
    TOLD_NAMED, TOLD_SEEN, UNTOLD,
};

use crate::access::{copy, field};
use crate::conntrack;
use crate::maps::{
    BENIGN, BENIGN_COUNT, CONTROL, CPU, EVENTS, FLOWS_0, FLOWS_1, OVERFLOW, WORK, WORK_DROP, offset,
};
use crate::packet::{self, Packet, TCP, UDP, Work};
use crate::told;

/// Events of a CPU in one generation that each wake the agent. A wake-up interrupts this CPU, which
/// is more than all else that a drop costs.
const EVENTS_THAT_WAKE: u64 = 64;
/// Of the later ones every so many wakes it, and the end of the generation does: whoever is past 64
/// in 100 ms sends 32 in 50 ms.
const EVENTS_A_WAKE: u64 = 32;

/// `tp_btf`: `skb`, `location`, and since 5.17 `reason`.
#[btf_tracepoint(function = "kfree_skb")]
pub fn kfree_skb(ctx: BtfTracePointContext) -> i32 {
    let reason = if offset!(has_reason) != 0 {
        ctx.arg::<u32>(2)
    } else {
        0
    };
    unsafe { count::<_, true>(&ctx, ctx.arg(0), ctx.arg(1), reason) };
    0
}

/// The same where the kernel refuses `tp_btf`.
#[raw_tracepoint(tracepoint = "kfree_skb")]
pub fn kfree_skb_raw(ctx: RawTracePointContext) -> i32 {
    let reason = if offset!(has_reason) != 0 {
        ctx.arg::<u32>(2)
    } else {
        0
    };
    unsafe { count::<_, false>(&ctx, ctx.arg(0), ctx.arg(1), reason) };
    0
}

#[inline(always)]
unsafe fn count<C, const TYPED: bool>(ctx: &C, skb: *const u8, location: u64, reason: u32) {
    let (Some(cpu), Some(control), Some(work)) = (
        CPU.get_ptr_mut(0),
        CONTROL.get_ptr(0),
        WORK.get_ptr_mut(WORK_DROP),
    ) else {
        return; // These elements always exist.
    };
    let (cpu, control, work) = unsafe { (&mut *cpu, &*control, &mut *work) };
    cpu.drops += 1;
    if is_benign(reason) {
        if let Some(packets) = BENIGN_COUNT.get_ptr_mut(reason) {
            unsafe { *packets += 1 };
        }
        return;
    }
    if work.busy != 0 {
        cpu.missed += 1;
        return;
    }
    work.busy = 1;
    unsafe { count_flow::<_, TYPED>(ctx, skb, location, reason, cpu, control, work) };
    work.busy = 0;
}

#[inline(always)]
unsafe fn count_flow<C, const TYPED: bool>(
    ctx: &C,
    skb: *const u8,
    location: u64,
    reason: u32,
    cpu: &mut Cpu,
    control: &Control,
    work: &mut Work,
) {
    packet::clear(&mut work.key);
    work.key.location = location;
    work.key.reason = reason;
    unsafe { packet::read::<TYPED>(skb, work) };
    let nfct = unsafe { conntrack::nfct::<TYPED>(skb) };
    let Work { key, packet, .. } = work;
    unsafe { place::<TYPED>(skb, key) };
    conntrack::original_destination(nfct, key);
    if key.original_destination_port == 53 && key.protocol == UDP && key.kind == KIND_PACKET {
        key.kind = KIND_DNS; // A query that DNAT sent to another port.
    }
    if key.ip_version == 0 {
        debug!(
            ctx,
            "no IP header: ethertype {:x} reason {}", packet.ethertype, reason
        );
    }
    // Nobody is told of the loss of an answer (RFC 1122, 3.2.2; RFC 9293, 3.10.7.1).
    let told = if packet.is_answer != 0 {
        UNTOLD
    } else {
        told::was_told(cpu, skb, conntrack::entry(nfct), key)
    };

    cpu.counted += 1;
    // One map each generation; both branches end in the same lines.
    let before = if control.generation & 1 == 0 {
        add(&FLOWS_0, key, told)
    } else {
        add(&FLOWS_1, key, told)
    };
    let Some(before) = before else {
        cpu.overflow += 1;
        if !overflow(key, told) {
            cpu.unplaced += 1;
            cpu.unplaced_told += u64::from(told != UNTOLD);
        }
        return;
    };
    let limit = if key.kind == KIND_DNS {
        EVENTS_PER_DNS_FLOW
    } else {
        EVENTS_PER_FLOW
    };
    if before >= limit {
        cpu.limited_flow += 1;
        return;
    }
    if cpu.events_generation != control.generation {
        cpu.events_generation = control.generation;
        cpu.events = 0;
    }
    if cpu.events >= control.events_per_cpu {
        cpu.limited_cpu += 1;
        return;
    }
    cpu.events += 1;
    if !unsafe { send::<TYPED>(skb, key, packet, told, cpu) } {
        cpu.ring_full += 1;
    }
}

#[inline(always)]
fn is_benign(reason: u32) -> bool {
    let reason = reason as usize;
    // Volatile: the compiler sees zeroes, the loader replaces them.
    reason < REASONS && unsafe { core::ptr::read_volatile(&raw const BENIGN[reason]) } != 0
}

/// Fills in device and namespace, and whether the sender's own call fails.
#[inline(always)]
unsafe fn place<const TYPED: bool>(skb: *const u8, key: &mut FlowKey) {
    unsafe {
        let sk = field::<*const u8, TYPED>(skb, offset!(skb_sk));
        let dev = field::<*const u8, TYPED>(skb, offset!(skb_dev));
        let net = if !dev.is_null() {
            key.ifindex = field::<u32, TYPED>(dev, offset!(dev_ifindex));
            field::<*const u8, TYPED>(dev, offset!(dev_net))
        } else if !sk.is_null() {
            // Some drops at OUTPUT have no device yet.
            field::<*const u8, TYPED>(sk, offset!(sock_net))
        } else {
            core::ptr::null()
        };
        if !net.is_null() {
            key.netns = field::<u32, TYPED>(net, offset!(net_inum));
        }
        // A socket's packet that no device has received is on its way out. TCP and SCTP retry and
        // do not tell their callers.
        if !sk.is_null()
            && key.protocol != TCP
            && key.protocol != 132
            && field::<u32, TYPED>(skb, offset!(skb_iif)) == 0
        {
            key.flags |= FLAG_LOCAL_DATAGRAM;
        }
    }
}

/// Adds one packet; returns how many this CPU had counted before, or `None` if there is no room.
#[inline(always)]
fn add(flows: &PerCpuHashMap<FlowKey, FlowCount>, key: &FlowKey, told: u8) -> Option<u64> {
    let mut found = flows.get_ptr_mut(key);
    if found.is_none() {
        if flows.insert(key, one(told), BPF_NOEXIST.into()).is_ok() {
            return Some(0);
        }
        // Another CPU was first, or the map is full.
        found = flows.get_ptr_mut(key);
    }
    let count = unsafe { &mut *found? };
    let before = count.packets;
    count.packets = before + 1;
    count.told_named += u32::from(told == TOLD_NAMED);
    count.told_seen += u32::from(told == TOLD_SEEN);
    Some(before)
}

/// The counts of a flow's first packet.
#[inline(always)]
fn one(told: u8) -> FlowCount {
    FlowCount {
        packets: 1,
        told_named: u32::from(told == TOLD_NAMED),
        told_seen: u32::from(told == TOLD_SEEN),
    }
}

/// Counts a packet without its flow; false if there is no room for that either.
#[inline(never)]
fn overflow(key: &FlowKey, told: u8) -> bool {
    let coarse = OverflowKey {
        location: key.location,
        reason: key.reason,
        protocol: key.protocol,
        kind: key.kind,
        flags: key.flags,
        ip_version: key.ip_version,
    };
    let told = u64::from(told != UNTOLD);
    let mut found = OVERFLOW.get_ptr_mut(coarse);
    if found.is_none() {
        let count = OverflowCount { packets: 1, told };
        if OVERFLOW.insert(coarse, count, BPF_NOEXIST.into()).is_ok() {
            return true;
        }
        found = OVERFLOW.get_ptr_mut(coarse);
    }
    let Some(count) = found else { return false };
    unsafe {
        (*count).packets += 1;
        (*count).told += told;
    }
    true
}

/// Sends one event; false if the ring buffer is full.
#[inline(never)]
unsafe fn send<const TYPED: bool>(
    skb: *const u8,
    key: &FlowKey,
    packet: &Packet,
    told: u8,
    cpu: &Cpu,
) -> bool {
    let Some(mut entry) = EVENTS.reserve::<DropEvent>(0) else {
        return false;
    };
    unsafe {
        let event = entry.as_mut_ptr();
        (&raw mut (*event).key).write(*key);
        (&raw mut (*event).boot_ns).write(bpf_ktime_get_boot_ns());
        (&raw mut (*event).generation).write(cpu.events_generation);
        (&raw mut (*event).source_port).write(packet.source_port);
        (&raw mut (*event).tcp_flags).write(packet.tcp_flags);
        (&raw mut (*event).told).write(told);
        (&raw mut (*event).ethertype).write(packet.ethertype);
        let device = &mut *(&raw mut (*event).device);
        let dev = field::<*const u8, TYPED>(skb, offset!(skb_dev));
        if dev.is_null()
            || offset!(dev_name) == MISSING
            || !copy(device, dev as u64 + u64::from(offset!(dev_name)))
        {
            *device = [0; 16];
        }
        // A fixed part in one read, the rest of a long packet in a second: the verifier wants
        // constant or well-bounded lengths.
        let snap = &mut *(&raw mut (*event).snap);
        let mut len = packet.len;
        if len > SNAP_LEN as u32 {
            len = SNAP_LEN as u32;
        }
        if packet.address == 0
            || len == 0
            || bpf_probe_read_kernel_buf(packet.address as *const u8, &mut snap[..len as usize])
                .is_err()
        {
            len = 0;
        }
        (&raw mut (*event).snap_len).write(len as u16);
    }
    // Without a flag the kernel wakes only a reader that has read everything before.
    let wake = cpu.events <= EVENTS_THAT_WAKE || cpu.events.is_multiple_of(EVENTS_A_WAKE);
    entry.submit(
        if wake {
            BPF_RB_FORCE_WAKEUP
        } else {
            BPF_RB_NO_WAKEUP
        }
        .into(),
    );
    true
}
