//! Was the sender told? An answer leaves just before the drop, on the same CPU.
//!
//! | answer | seen at | names the dropped packet by |
//! |---|---|---|
//! | ICMP error | `icmp_send` (5.13 on), after the kernel's rate limits | its `sk_buff` |
//! | ICMP error before 5.13, ICMPv6 error | `net_dev_queue` | conntrack entry, else the packet quoted in it |
//! | RST of a REJECT | `net_dev_queue` | conntrack entry, else its own addresses reversed |
//!
//! An answer seen at `net_dev_queue` is also counted by flow: where a neighbour must be resolved it
//! leaves after its drop, and the agent finds the drop again by that count.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::maps::PerCpuHashMap;
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use whydrop_ebpf::{
    ANSWER_SLOTS, Answer, Cpu, FLAG_ENCAPSULATED, FlowCount, FlowKey, KIND_ANSWER, TOLD_NAMED,
    TOLD_SEEN, UNTOLD,
};

use crate::access::field;
use crate::conntrack;
use crate::maps::{CONTROL, CPU, FLOWS_0, FLOWS_1, WORK, WORK_SENT, offset};
use crate::packet;

/// An answer is older than its drop by microseconds, more only if the sender's task was preempted
/// between the two. What is older belongs to a packet that was not dropped.
const ANSWER_MAX_AGE_NS: u64 = 20_000_000;

/// `icmp_send(skb, type, code)`, called after both rate limits.
#[btf_tracepoint(function = "icmp_send")]
pub fn icmp_send(ctx: BtfTracePointContext) -> i32 {
    named(ctx.arg(0), ctx.arg(1));
    0
}

/// The same where the kernel refuses `tp_btf`.
#[raw_tracepoint(tracepoint = "icmp_send")]
pub fn icmp_send_raw(ctx: RawTracePointContext) -> i32 {
    named(ctx.arg(0), ctx.arg(1));
    0
}

/// `net_dev_queue(skb)`: every packet that is sent, so two loads turn the others away.
#[btf_tracepoint(function = "net_dev_queue")]
pub fn net_dev_queue(ctx: BtfTracePointContext) -> i32 {
    unsafe { sent::<true>(ctx.arg(0)) };
    0
}

/// The same where the kernel refuses `tp_btf`.
#[raw_tracepoint(tracepoint = "net_dev_queue")]
pub fn net_dev_queue_raw(ctx: RawTracePointContext) -> i32 {
    unsafe { sent::<false>(ctx.arg(0)) };
    0
}

/// `neigh_event_send_done(neigh, rc)`: a packet waits for its neighbour's address.
#[btf_tracepoint(function = "neigh_event_send_done")]
pub fn neigh_wait(_ctx: BtfTracePointContext) -> i32 {
    neighbour_waits()
}

/// The same where the kernel refuses `tp_btf`.
#[raw_tracepoint(tracepoint = "neigh_event_send_done")]
pub fn neigh_wait_raw(_ctx: RawTracePointContext) -> i32 {
    neighbour_waits()
}

#[inline(always)]
fn neighbour_waits() -> i32 {
    if let Some(cpu) = CPU.get_ptr_mut(0) {
        unsafe { (*cpu).neighbour_waits += 1 };
    }
    0
}

/// Notes that the packet in `skb` is answered. Redirects and echo replies tell of no loss.
#[inline(always)]
fn named(skb: *const u8, icmp_type: i32) {
    if matches!(icmp_type, 3 | 11 | 12)
        && let Some(cpu) = CPU.get_ptr_mut(0)
    {
        let cpu = unsafe { &mut *cpu };
        let skb = address(cpu, skb);
        let slot = &mut cpu.answers[slot_of(skb)];
        slot.skb = skb;
        slot.nfct = 0;
        slot.mono_ns = unsafe { bpf_ktime_get_ns() };
    }
}

#[inline(always)]
unsafe fn sent<const TYPED: bool>(skb: *const u8) {
    let sk = unsafe { field::<*const u8, TYPED>(skb, offset!(skb_sk)) };
    if sk.is_null() {
        // A forwarded packet was received; a RST of REJECT was not, and has no socket.
        if unsafe { field::<u32, TYPED>(skb, offset!(skb_iif)) } != 0 {
            return;
        }
    } else {
        // Not a full socket for a SYN-ACK: then this is some other byte of a slab, and the
        // packet's own header decides.
        match unsafe { field::<u16, TYPED>(sk, offset!(sock_protocol)) } {
            58 => {}
            1 if offset!(has_icmp_send) == 0 => {}
            _ => return,
        }
    }
    unsafe { answer::<TYPED>(skb) };
}

/// Parses a packet that may be an answer, and notes which one it answers.
#[inline(always)]
unsafe fn answer<const TYPED: bool>(skb: *const u8) {
    let (Some(cpu), Some(control), Some(work)) = (
        CPU.get_ptr_mut(0),
        CONTROL.get_ptr(0),
        WORK.get_ptr_mut(WORK_SENT),
    ) else {
        return; // These elements always exist.
    };
    let (cpu, control, work) = unsafe { (&mut *cpu, &*control, &mut *work) };
    work.key = FlowKey::default();
    unsafe { packet::read::<TYPED>(skb, work) };
    if work.packet.is_answer == 0 || work.key.flags & FLAG_ENCAPSULATED != 0 {
        return;
    }
    if work.key.protocol == packet::TCP {
        // The packet that it answers went the other way.
        (work.key.source, work.key.destination) = (work.key.destination, work.key.source);
        work.key.destination_port = work.packet.source_port;
    } else if !packet::quoted(work) {
        return;
    }
    let key = &mut work.key;
    key.kind = KIND_ANSWER;
    key.flags = 0;
    let nfct = conntrack::entry(unsafe { conntrack::nfct::<TYPED>(skb) });
    let slot = &mut cpu.answers[slot_of(if nfct != 0 { nfct } else { fold(key) })];
    slot.skb = 0;
    slot.nfct = nfct;
    slot.source = key.source;
    slot.destination = key.destination;
    slot.mono_ns = unsafe { bpf_ktime_get_ns() };

    cpu.answers_seen += 1;
    // After NAT the answer's own addresses are not those of the packet where it was dropped.
    if nfct != 0 {
        conntrack::filtered_flow(nfct, key);
    }
    let counted = if control.generation & 1 == 0 {
        add(&FLOWS_0, key)
    } else {
        add(&FLOWS_1, key)
    };
    if !counted {
        cpu.answers_lost += 1;
    }
}

#[inline(always)]
fn add(flows: &PerCpuHashMap<FlowKey, FlowCount>, key: &FlowKey) -> bool {
    if let Some(count) = flows.get_ptr_mut(key) {
        unsafe { (*count).told_seen += 1 };
        return true;
    }
    if flows
        .insert(
            key,
            FlowCount {
                told_seen: 1,
                ..FlowCount::default()
            },
            BPF_NOEXIST.into(),
        )
        .is_ok()
    {
        return true;
    }
    // Another CPU was first, or the map is full.
    match flows.get_ptr_mut(key) {
        Some(count) => {
            unsafe { (*count).told_seen += 1 };
            true
        }
        None => false,
    }
}

/// Whether the packet that is freed now was answered on this CPU just before.
#[inline(always)]
pub fn was_told(cpu: &mut Cpu, skb: *const u8, nfct: u64, key: &FlowKey) -> u8 {
    let skb = address(cpu, skb);
    let slot = &mut cpu.answers[slot_of(skb)];
    if slot.mono_ns != 0 && slot.skb == skb {
        return if take(slot) { TOLD_NAMED } else { UNTOLD };
    }
    let slot = &mut cpu.answers[slot_of(if nfct != 0 { nfct } else { fold(key) })];
    if slot.mono_ns == 0 || slot.skb != 0 || slot.nfct != nfct {
        return UNTOLD;
    }
    if nfct == 0 && (slot.source != key.source || slot.destination != key.destination) {
        return UNTOLD;
    }
    if take(slot) { TOLD_SEEN } else { UNTOLD }
}

#[inline(never)]
fn take(slot: &mut Answer) -> bool {
    let age_ns = unsafe { bpf_ktime_get_ns() } - slot.mono_ns;
    slot.mono_ns = 0;
    age_ns < ANSWER_MAX_AGE_NS
}

/// A kernel pointer as a number: the verifier lets no one calculate with a typed pointer, and forgets
/// the type of what has been in a map.
#[inline(always)]
fn address(cpu: &mut Cpu, pointer: *const u8) -> u64 {
    unsafe {
        (&raw mut cpu.scratch).write_volatile(pointer as u64);
        (&raw const cpu.scratch).read_volatile()
    }
}

/// A slot for an address of a kernel object, which are at least 128 bytes apart, or for a fold.
#[inline(always)]
fn slot_of(identity: u64) -> usize {
    (identity >> 8) as usize & (ANSWER_SLOTS - 1)
}

/// A number for a flow without conntrack entry.
#[inline(always)]
fn fold(key: &FlowKey) -> u64 {
    u64::from(key.source[3] ^ key.source[15] ^ key.destination[3] ^ key.destination[15]) << 8
}
