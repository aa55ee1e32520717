//! Was the sender told? An answer leaves just before the drop, on the same CPU.
//!
//! RSTs of a REJECT and the kernel's ICMP and ICMPv6 errors are seen at `net_dev_queue` (`sent.rs`), so after the
//! kernel's rate limits, its routing and its own firewall rules: what does not leave tells nobody. An
//! answer meets the packet that it answers by conntrack entry; where there is none, by the addresses
//! of the packet that it quotes, or its own reversed.
//!
//! Where a neighbour must be resolved first, the answer leaves after its drop. Therefore, while some
//! packet of this node waits for a neighbour, answers are also counted by flow, and the agent finds
//! their drops again by that count.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::maps::PerCpuHashMap;
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use whydrop_ebpf::{
    ANSWER_SLOTS, Control, Cpu, FLAG_ENCAPSULATED, FlowCount, FlowKey, KIND_ANSWER, PerCpu, TOLD,
    TOLD_COUNTED, UNTOLD, Work,
};

use crate::access::field;
use crate::conntrack;
use crate::maps::{CONTROL, CPU, FLOWS_0, FLOWS_1, NEIGHBOUR_WAIT, offset};
use crate::packet::{self, TCP};

/// An answer is older than its drop by microseconds, more only if the sender's task was preempted
/// between the two. What is older belongs to a packet that was not dropped.
const ANSWER_MAX_AGE_NS: u64 = 5_000_000;

/// The same answer passes each device of a stack within microseconds; what comes later and has its
/// address is another in the same place, while the slot holds one whose packet was not dropped.
const SAME_ANSWER_NS: u64 = 1_000_000;

/// How long after a packet began to wait for its neighbour an answer can leave late: a neighbour is
/// asked three times, one second apart, and packets that wait are sent at once when it answers.
const LATE_NS: u64 = 4_000_000_000;

/// `neigh_event_send_done(neigh, rc)`: `rc` is 1 where a packet waits for its neighbour's address.
#[btf_tracepoint(function = "neigh_event_send_done")]
pub fn neigh_wait(ctx: BtfTracePointContext) -> i32 {
    waits(ctx.arg(1))
}

/// The same where the kernel refuses `tp_btf`.
#[raw_tracepoint(tracepoint = "neigh_event_send_done")]
pub fn neigh_wait_raw(ctx: RawTracePointContext) -> i32 {
    waits(ctx.arg(1))
}

#[inline(always)]
fn waits(rc: i32) -> i32 {
    if rc != 0
        && let (Some(own), Some(last)) = (CPU.get_ptr_mut(0), NEIGHBOUR_WAIT.get_ptr_mut(0))
    {
        unsafe {
            (*own).cpu.neighbour_waits += 1;
            *last = bpf_ktime_get_ns();
        }
    }
    0
}

/// Parses a packet that may be an answer, and notes which one it answers.
#[inline(never)]
pub unsafe fn answer<const TYPED: bool>(skb: *const u8) -> u32 {
    let (Some(own), Some(control)) = (CPU.get_ptr_mut(0), CONTROL.get_ptr(0)) else {
        return 0; // These elements always exist.
    };
    let (
        PerCpu {
            cpu, sent: work, ..
        },
        control,
    ) = unsafe { (&mut *own, &*control) };
    work.key = FlowKey::default();
    unsafe { packet::read::<TYPED>(skb, work) };
    if work.packet.is_answer == 0 || work.key.flags & FLAG_ENCAPSULATED != 0 {
        return 0;
    }
    if work.key.protocol == TCP {
        // The packet that it answers went the other way.
        (work.key.source, work.key.destination) = (work.key.destination, work.key.source);
        work.key.destination_port = work.packet.source_port;
    } else if !packet::tells_of_loss(&work.key)
        || !packet::quoted(work)
        || work.packet.is_answer != 0
    {
        return 0; // An answer to an answer tells nobody of a loss, now or late.
    }
    let nfct = unsafe { conntrack::nfct::<TYPED>(skb) };
    let entry = conntrack::entry(nfct);
    let identity = address(work, skb);
    let slot = slot_of(entry, &work.key);
    let waiting = cpu.answers_waiting & (1 << slot) != 0;
    let now = unsafe { bpf_ktime_get_ns() };
    if waiting
        && cpu.answers[slot].skb == identity
        && cpu.answers[slot].nfct == entry
        && now - cpu.answers[slot].mono_ns < SAME_ANSWER_NS
    {
        return 0; // The same answer on the next device of a stack.
    }
    cpu.answers_waiting |= 1 << slot;
    let answer = &mut cpu.answers[slot];
    answer.skb = identity;
    answer.nfct = entry;
    answer.source = work.key.source;
    answer.destination = work.key.destination;
    answer.mono_ns = now;
    answer.counted = 0;
    let waited = NEIGHBOUR_WAIT.get(0).copied().unwrap_or(0);
    if waited != 0 && now.wrapping_sub(waited) < LATE_NS {
        answer.counted = 1;
        unsafe { count_answer::<TYPED>(skb, nfct, cpu, control, work) };
    }
    1
}

/// Counts an answer by the flow of the packet that it answers.
#[inline(always)]
unsafe fn count_answer<const TYPED: bool>(
    skb: *const u8,
    nfct: u64,
    cpu: &mut Cpu,
    control: &Control,
    work: &mut Work,
) {
    let key = &mut work.key;
    key.kind = KIND_ANSWER;
    key.flags = 0;
    // After NAT the answer's own addresses are not those of the packet where it was dropped.
    if conntrack::entry(nfct) != 0 {
        conntrack::answered_flow(nfct, key);
    }
    unsafe {
        let dev = field::<*const u8, TYPED>(skb, offset!(skb_dev));
        if !dev.is_null() {
            let net = field::<*const u8, TYPED>(dev, offset!(dev_net));
            key.netns = field::<u32, TYPED>(net, offset!(net_inum));
        }
    }
    cpu.answers_counted += 1;
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
    let mut found = flows.get_ptr_mut(key);
    if found.is_none() {
        let one = FlowCount {
            answers: 1,
            ..FlowCount::default()
        };
        if flows.insert(key, one, BPF_NOEXIST.into()).is_ok() {
            return true;
        }
        // Another CPU was first, or the map is full.
        found = flows.get_ptr_mut(key);
    }
    let Some(count) = found else { return false };
    unsafe { (*count).answers += 1 };
    true
}

/// Whether the packet that is freed now was answered on this CPU just before.
#[inline(always)]
pub fn was_told(cpu: &mut Cpu, nfct: u64, key: &FlowKey) -> u8 {
    // Nearly always: nothing on this node is refused at this moment.
    if cpu.answers_waiting == 0 {
        return UNTOLD;
    }
    let slot = slot_of(nfct, key);
    let answer = &cpu.answers[slot];
    if cpu.answers_waiting & (1 << slot) == 0 || answer.nfct != nfct {
        return UNTOLD;
    }
    if nfct == 0 && (answer.source != key.source || answer.destination != key.destination) {
        return UNTOLD;
    }
    let age_ns = unsafe { bpf_ktime_get_ns() } - answer.mono_ns;
    let told = if answer.counted != 0 {
        TOLD_COUNTED
    } else {
        TOLD
    };
    cpu.answers_waiting &= !(1 << slot);
    if age_ns < ANSWER_MAX_AGE_NS {
        told
    } else {
        UNTOLD
    }
}

/// A kernel pointer as a number: the verifier lets no one calculate with a typed pointer, and forgets
/// the type of what has been in a map.
#[inline(always)]
fn address(work: &mut Work, pointer: *const u8) -> u64 {
    unsafe {
        (&raw mut work.pointer).write_volatile(pointer as u64);
        (&raw const work.pointer).read_volatile()
    }
}

/// A slot by conntrack entry (they are 256 bytes apart or more), else by addresses.
#[inline(always)]
fn slot_of(nfct: u64, key: &FlowKey) -> usize {
    let fold = if nfct != 0 {
        (nfct >> 8) as u8
    } else {
        key.source[3] ^ key.source[15] ^ key.destination[3] ^ key.destination[15]
    };
    fold as usize & (ANSWER_SLOTS - 1)
}
