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
    FlowKey, KIND_DNS, KIND_PACKET, KIND_SYN, MISSING, OverflowCount, OverflowKey, Packet, PerCpu,
    REASONS, SNAP_LEN, TOLD_COUNTED, UNTOLD, Work,
};

use crate::access::{copy, field};
use crate::conntrack;
use crate::maps::{
    BENIGN, BENIGN_COUNT, CONTROL, CPU, EVENTS, FLOWS_0, FLOWS_1, OVERFLOW, offset, setting,
};
use crate::packet::{self, ICMP, ICMPV6, MAC_HEADER_UNSET, SCTP, SYN_ACK, TCP, UDP};
use crate::{connect, dns, told};

/// Events of a CPU in one window of 100 ms that each wake the agent. A wake-up interrupts this CPU,
/// which is more than all else that a drop costs.
const EVENTS_THAT_WAKE: u32 = 64;
/// Of the later ones every so many wakes it; so do the next window's first and the generation's end.
const EVENTS_A_WAKE: u32 = 32;

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
    let (Some(own), Some(control)) = (CPU.get_ptr_mut(0), CONTROL.get_ptr(0)) else {
        return; // These elements always exist.
    };
    let (
        PerCpu {
            cpu, drop: work, ..
        },
        control,
    ) = unsafe { (&mut *own, &*control) };
    if work.busy != 0 {
        cpu.missed += 1;
        return;
    }
    work.busy = 1;
    if is_benign(reason) {
        if let Some(packets) = BENIGN_COUNT.get_ptr_mut(reason) {
            unsafe { *packets += 1 };
        }
    } else {
        unsafe { count_flow::<_, TYPED>(ctx, skb, location, reason, cpu, control, work) };
    }
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
    work.key.location = location as u32;
    work.key.reason = reason;
    unsafe { packet::read::<TYPED>(skb, work) };
    let nfct = unsafe { conntrack::nfct::<TYPED>(skb) };
    let Work { key, packet, .. } = work;
    unsafe { place::<TYPED>(skb, key) };
    conntrack::original_destination(nfct, key);
    if key.original_destination_port == 53 && packet.is_query != 0 && key.kind == KIND_PACKET {
        key.kind = KIND_DNS; // A query that DNAT sent to another port.
    }
    if key.ip_version == 0 {
        debug!(
            ctx,
            "no IP header: ethertype {:x} reason {}", packet.ethertype, reason
        );
    }
    // Asked also for answers, so that what was an answer to them waits for nobody else; but nobody
    // is told of the loss of an answer (RFC 1122, 3.2.2; RFC 9293, 3.10.7.1).
    let mut told = told::was_told(cpu, conntrack::entry(nfct), key);
    if packet.is_answer != 0 {
        told = UNTOLD;
    }

    packet.told = told;
    unsafe { attempt::<TYPED>(skb, nfct, work) };
    let Work { key, packet, .. } = work;

    cpu.counted += 1;
    // Read once: it can change at any time.
    let generation = unsafe { (&raw const control.generation).read_volatile() };
    // One map each generation; both branches end in the same lines.
    let count = if generation & 1 == 0 {
        add(&FLOWS_0, cpu, key, told)
    } else {
        add(&FLOWS_1, cpu, key, told)
    };
    let Some(count) = count else {
        cpu.overflow += 1;
        if !overflow(key, told) {
            if told == UNTOLD {
                cpu.unplaced += 1;
            } else {
                cpu.unplaced_told += 1;
            }
        }
        return;
    };
    if !may_send(cpu, control, count, key.kind) {
        return;
    }
    let wake = cpu.events <= EVENTS_THAT_WAKE || cpu.events.is_multiple_of(EVENTS_A_WAKE);
    if !unsafe { send::<TYPED>(skb, key, packet, generation, wake) } {
        cpu.ring_full += 1;
    }
}

/// Lays a first packet or its answer to the attempt that it belongs to.
#[inline(always)]
unsafe fn attempt<const TYPED: bool>(skb: *const u8, nfct: u64, work: &mut Work) {
    let is_handshake = work.key.kind == KIND_SYN || work.packet.tcp_flags & SYN_ACK == SYN_ACK;
    if setting!(connects) != 0 && is_handshake {
        unsafe {
            let sk = field::<*const u8, TYPED>(skb, offset!(skb_sk));
            connect::dropped::<TYPED>(sk, nfct, work);
        }
    } else if setting!(dns) != 0
        && work.key.protocol == UDP
        && (work.packet.is_query != 0 || work.packet.is_response != 0)
    {
        unsafe {
            let sk = field::<*const u8, TYPED>(skb, offset!(skb_sk));
            dns::dropped::<TYPED>(skb, sk, nfct, work);
        }
    }
}

/// Takes one event from the limits of the flow and of the CPU.
#[inline(always)]
fn may_send(cpu: &mut Cpu, control: &Control, count: &mut FlowCount, kind: u8) -> bool {
    let window = control.window;
    if count.window != window {
        count.window = window;
        count.events = 0;
    }
    let limit = if kind == KIND_DNS {
        EVENTS_PER_DNS_FLOW
    } else {
        EVENTS_PER_FLOW
    };
    if count.events >= limit {
        cpu.limited_flow += 1;
        return false;
    }
    if cpu.window != window {
        cpu.window = window;
        cpu.events = 0;
    }
    if cpu.events >= control.events_per_cpu {
        cpu.limited_cpu += 1;
        return false;
    }
    count.events += 1;
    cpu.events += 1;
    true
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
        if !dev.is_null() {
            let net = field::<*const u8, TYPED>(dev, offset!(dev_net));
            let netns = field::<u32, TYPED>(net, offset!(net_inum));
            // In a socket's queue `dev` is a union with other things.
            if netns >= NETNS_MIN {
                key.netns = netns;
                key.ifindex = field::<u32, TYPED>(dev, offset!(dev_ifindex));
            }
        }
        if sk.is_null() {
            return;
        }
        // Some drops at OUTPUT have no device yet.
        if key.netns == 0 {
            let net = field::<*const u8, TYPED>(sk, offset!(sock_net));
            key.netns = field::<u32, TYPED>(net, offset!(net_inum));
        }
        if fails_its_call::<TYPED>(skb, sk, key) {
            key.flags |= FLAG_LOCAL_DATAGRAM;
        }
    }
}

/// Inode numbers of namespaces come from the kernel's dynamic range (PROC_DYNAMIC_FIRST, and the
/// initial ones just below it: include/uapi/linux/nsfs.h, 6.18).
const NETNS_MIN: u32 = 0xe000_0000;
/// `sk_type` of a raw socket (include/linux/net.h).
const SOCK_RAW: u16 = 3;
/// `sk_protocol` of a raw socket that writes its own IP header.
const IPPROTO_RAW: u16 = 255;

/// Whether a netfilter drop of this packet is an error of the call that sent it: it left a datagram
/// socket, has not been received by any device nor come as far as one. TCP and SCTP retry and do not
/// tell their callers. Of ICMP only echo requests are somebody's: the rest is the kernel's own.
#[inline(always)]
unsafe fn fails_its_call<const TYPED: bool>(skb: *const u8, sk: *const u8, key: &FlowKey) -> bool {
    let icmp_type = key.destination_port >> 8;
    match key.protocol {
        TCP | SCTP => return false,
        ICMP if icmp_type != 8 => return false,
        ICMPV6 if icmp_type != 128 => return false,
        // A ping socket of IPv6 forgets the error (ping_v6_sendmsg, 6.18), that of IPv4 not.
        ICMPV6 if unsafe { field::<u16, TYPED>(sk, offset!(sock_type)) } != SOCK_RAW => {
            return false;
        }
        _ => {}
    }
    unsafe {
        let protocol = field::<u16, TYPED>(sk, offset!(sock_protocol));
        (protocol == key.protocol.into() || protocol == IPPROTO_RAW)
            && field::<u32, TYPED>(skb, offset!(skb_iif)) == 0
            && u32::from(field::<u16, TYPED>(skb, offset!(skb_mac_header))) == MAC_HEADER_UNSET
    }
}

/// Adds one packet; returns the flow's counts, or `None` if there is no room.
#[inline(always)]
#[expect(
    clippy::mut_from_ref,
    reason = "a map hands out this CPU's own value, which nobody else has"
)]
fn add<'a>(
    flows: &'a PerCpuHashMap<FlowKey, FlowCount>,
    cpu: &mut Cpu,
    key: &FlowKey,
    told: u8,
) -> Option<&'a mut FlowCount> {
    let mut found = flows.get_ptr_mut(key);
    if found.is_none() {
        if flows
            .insert(key, FlowCount::default(), BPF_NOEXIST.into())
            .is_ok()
        {
            cpu.inserted += 1;
        }
        // There now, by this CPU or another, unless the map is full.
        found = flows.get_ptr_mut(key);
    }
    let count = unsafe { &mut *found? };
    count.packets += 1;
    count.told += u32::from(told != UNTOLD);
    count.answers += u32::from(told == TOLD_COUNTED);
    Some(count)
}

/// Counts a packet without its flow; false if there is no room for that either.
#[inline(never)]
fn overflow(key: &FlowKey, told: u8) -> bool {
    let coarse = OverflowKey {
        location: key.location,
        reason: key.reason,
        protocol: match key.protocol {
            ICMP | TCP | UDP | ICMPV6 | SCTP => key.protocol,
            _ => 0,
        },
        kind: key.kind,
        flags: key.flags,
        ip_version: key.ip_version,
    };
    let mut found = OVERFLOW.get_ptr_mut(coarse);
    if found.is_none() {
        // Another CPU may be first, or the map be full.
        let _ = OVERFLOW.insert(coarse, OverflowCount::default(), BPF_NOEXIST.into());
        found = OVERFLOW.get_ptr_mut(coarse);
    }
    let Some(count) = found else { return false };
    let count = unsafe { &mut *count };
    if told == UNTOLD {
        count.untold += 1;
    } else {
        count.told += 1;
    }
    true
}

/// Sends one event, and wakes the agent if `wake`; false if the ring buffer is full.
#[inline(never)]
unsafe fn send<const TYPED: bool>(
    skb: *const u8,
    key: &FlowKey,
    packet: &Packet,
    generation: u64,
    wake: bool,
) -> bool {
    let Some(mut entry) = EVENTS.reserve::<DropEvent>(0) else {
        return false;
    };
    unsafe {
        let event = entry.as_mut_ptr();
        (&raw mut (*event).key).write(*key);
        (&raw mut (*event).boot_ns).write(bpf_ktime_get_boot_ns());
        (&raw mut (*event).generation).write(generation);
        (&raw mut (*event).source_port).write(packet.source_port);
        (&raw mut (*event).tcp_flags).write(packet.tcp_flags);
        (&raw mut (*event).told).write(packet.told);
        (&raw mut (*event).ethertype).write(packet.ethertype);
        let device = &mut (*event).device;
        let dev = field::<*const u8, TYPED>(skb, offset!(skb_dev));
        if key.ifindex == 0
            || offset!(dev_name) == MISSING
            || !copy(device, dev as u64 + u64::from(offset!(dev_name)))
        {
            *device = [0; 16];
        }
        // A fixed part in one read, the rest of a long packet in a second: the verifier wants
        // constant or well-bounded lengths.
        let snap = &mut (*event).snap;
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
