//! TCP sockets in SYN_SENT: noted when they enter it, counted when they leave it, and what this kernel
//! drops of them meanwhile.
//!
//! What hangs is found by the agent, which looks through the map: a hang has no event of its own.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::generated::{bpf_get_current_cgroup_id, bpf_ktime_get_boot_ns};
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use whydrop_ebpf::attempt::{
    AttemptCpu, Connect, END_ABANDONED, END_LATE, END_TIMED_OUT, EndedKey, LastDrop,
    RESULT_ABANDONED, RESULT_ESTABLISHED, RESULT_REFUSED, TALLY_CONNECT, TallyKey, Tuple,
};
use whydrop_ebpf::{FLAG_ENCAPSULATED, FlowKey, KIND_SYN, Packet, UNTOLD, Work};

use crate::access::{copy, field};
use crate::conntrack;
use crate::maps::{CONNECTS, CPU, ENDED, SWEPT, SYNS, offset, setting};
use crate::packet::{TCP, UDP};
use crate::{dns, tally};

/// `enum tcp_state` (include/net/tcp_states.h).
pub const SYN_SENT: u8 = 2;
const CLOSE: i32 = 7;
/// include/uapi/asm-generic/errno.h
const ETIMEDOUT: i32 = 110;
/// include/linux/socket.h
const AF_INET6: u16 = 10;
/// A SYN is resent after 200 ms at the earliest (TCP_RTO_MIN); the same one passes each device of a
/// stack within microseconds.
const SAME_SYN_NS: u64 = 1_000_000;

/// `inet_sock_set_state(sk, oldstate, newstate)`.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn inet_sock_set_state(ctx: BtfTracePointContext) -> i32 {
    unsafe { state::<true>(ctx.arg(0), ctx.arg(1), ctx.arg(2)) };
    0
}

/// The same where the kernel refuses `tp_btf`.
#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
pub fn inet_sock_set_state_raw(ctx: RawTracePointContext) -> i32 {
    unsafe { state::<false>(ctx.arg(0), ctx.arg(1), ctx.arg(2)) };
    0
}

/// `inet_sk_error_report(sk)`, since 5.14. Where it is missing `sk_err` at the end must do, which the
/// application can have read and cleared before.
#[btf_tracepoint(function = "inet_sk_error_report")]
pub fn inet_sk_error_report(ctx: BtfTracePointContext) -> i32 {
    unsafe { error::<true>(ctx.arg(0)) };
    0
}

/// The same where the kernel refuses `tp_btf`.
#[raw_tracepoint(tracepoint = "inet_sk_error_report")]
pub fn inet_sk_error_report_raw(ctx: RawTracePointContext) -> i32 {
    unsafe { error::<false>(ctx.arg(0)) };
    0
}

#[inline(always)]
unsafe fn state<const TYPED: bool>(sk: *const u8, old: i32, new: i32) {
    if new == SYN_SENT.into() {
        unsafe { begin::<TYPED>(sk) };
    } else if old == SYN_SENT.into() {
        unsafe { end::<TYPED>(sk, new) };
    }
}

#[inline(always)]
fn counts<'a>() -> Option<&'a mut AttemptCpu> {
    CPU.get_ptr_mut(0)
        .map(|own| unsafe { &mut (*own).cpu.attempts })
}

#[inline(always)]
unsafe fn begin<const TYPED: bool>(sk: *const u8) {
    if unsafe { field::<u16, TYPED>(sk, offset!(sock_protocol)) } != TCP.into() {
        return; // SCTP has this tracepoint as well, and MPTCP has TCP sockets below its own.
    }
    let Some(counts) = counts() else { return };
    let mut connect = Connect {
        start_ns: unsafe { bpf_ktime_get_boot_ns() },
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        ip_version: 4,
        ..Connect::default()
    };
    unsafe {
        let net = field::<*const u8, TYPED>(sk, offset!(sock_net));
        connect.netns = field::<u32, TYPED>(net, offset!(net_inum));
        connect.ip_version = ends::<TYPED>(sk, &mut connect.tuple);
    }
    if CONNECTS.insert(sk as u64, connect, BPF_ANY.into()).is_ok() {
        counts.connects += 1;
    } else {
        counts.connects_lost += 1;
    }
}

/// Fills in the two ends but for the source port, which is not chosen yet; returns the IP version of
/// the packets.
#[inline(always)]
pub unsafe fn ends<const TYPED: bool>(sk: *const u8, tuple: &mut Tuple) -> u8 {
    unsafe {
        tuple.destination_port = u16::from_be(field::<u16, TYPED>(sk, offset!(sock_dport)));
        if field::<u16, TYPED>(sk, offset!(sock_family)) == AF_INET6 {
            let destination = field::<[u64; 2], TYPED>(sk, offset!(sock_v6_daddr));
            // ::ffff:0:0/96, RFC 4291, 2.5.5.2: an IPv6 socket that speaks IPv4.
            if destination[0] != 0 || destination[1] as u32 != u32::from_be(0xffff) {
                let source = field::<[u64; 2], TYPED>(sk, offset!(sock_v6_rcv_saddr));
                tuple.source = core::mem::transmute::<[u64; 2], [u8; 16]>(source);
                tuple.destination = core::mem::transmute::<[u64; 2], [u8; 16]>(destination);
                return 6;
            }
        }
        let source = field::<[u8; 4], TYPED>(sk, offset!(sock_rcv_saddr));
        let destination = field::<[u8; 4], TYPED>(sk, offset!(sock_daddr));
        tuple.source[..4].copy_from_slice(&source);
        tuple.destination[..4].copy_from_slice(&destination);
    }
    4
}

#[inline(always)]
unsafe fn end<const TYPED: bool>(sk: *const u8, new: i32) {
    let socket = sk as u64;
    let (Some(connect), Some(counts), Some(swept)) =
        (CONNECTS.get_ptr_mut(socket), counts(), SWEPT.get_ptr(0))
    else {
        return; // Not noted: it began before this program, or found no room.
    };
    let (connect, swept) = unsafe { (&mut *connect, &*swept) };
    counts.connects_ended += 1;
    let due_ns = connect.start_ns + setting!(syn_timeout_ns);
    let is_late = unsafe { bpf_ktime_get_boot_ns() } >= due_ns;
    let is_told = connect.told_ns != 0 && connect.told_ns < due_ns;
    let (result, end) = if is_late && !is_told {
        // Unanswered, however it ends. The agent knows it if it has looked since.
        let is_known = due_ns <= unsafe { (&raw const swept.connects_ns).read_volatile() };
        (None, if is_known { 0 } else { END_LATE })
    } else if new != CLOSE {
        (Some(RESULT_ESTABLISHED), 0)
    } else {
        let error = unsafe { field::<i32, TYPED>(sk, offset!(sock_err)) };
        let soft = unsafe { field::<i32, TYPED>(sk, offset!(sock_err_soft)) };
        if is_told || error != 0 && error != ETIMEDOUT || soft != 0 || unsafe { failed_at_once(sk) }
        {
            (Some(RESULT_REFUSED), 0)
        } else if error == ETIMEDOUT {
            (None, END_TIMED_OUT)
        } else {
            (Some(RESULT_ABANDONED), END_ABANDONED)
        }
    };
    if let Some(result) = result {
        let key = TallyKey {
            source: connect.tuple.source,
            cgroup: connect.cgroup,
            netns: connect.netns,
            what: TALLY_CONNECT,
            detail: result,
            bucket: 0,
            ip_version: connect.ip_version,
        };
        tally::add(&key, 1, 0);
    }
    // Not there if no SYN was sent, or the map was full.
    if connect.tuple.source_port != 0 {
        let _ = SYNS.remove(&connect.tuple);
    }
    if connect.wire.source_port != 0 {
        let _ = SYNS.remove(&connect.wire);
    }
    if end != 0 {
        // Before it leaves the other map: the agent reads that one first, so it misses none.
        connect.end = end;
        let key = EndedKey {
            socket,
            start_ns: connect.start_ns,
        };
        if ENDED.insert(&key, &*connect, BPF_ANY.into()).is_ok() {
            counts.ended += 1;
        } else {
            counts.ended_lost += 1;
        }
    }
    let _ = CONNECTS.remove(socket);
}

/// Whether the call failed before it had a port: then `inet_sport` was never set. (`skc_num` is
/// cleared before the tracepoint.)
#[inline(always)]
unsafe fn failed_at_once(sk: *const u8) -> bool {
    let mut port = 0u16;
    // By a copy: the field is not in `struct sock`, which is all that the verifier lets us see.
    unsafe { copy(&mut port, sk as u64 + u64::from(offset!(inet_sport))) && port == 0 }
}

#[inline(always)]
unsafe fn error<const TYPED: bool>(sk: *const u8) {
    let state = unsafe { field::<u8, TYPED>(sk, offset!(sock_state)) };
    if state == SYN_SENT {
        if unsafe { field::<i32, TYPED>(sk, offset!(sock_err)) } != ETIMEDOUT
            && let Some(connect) = CONNECTS.get_ptr_mut(sk as u64)
        {
            told(unsafe { &mut *connect });
        }
    } else if setting!(dns) != 0
        && unsafe { field::<u16, TYPED>(sk, offset!(sock_protocol)) } == UDP.into()
    {
        unsafe { dns::told::<TYPED>(sk) };
    }
}

#[inline(always)]
fn told(connect: &mut Connect) {
    if connect.told_ns == 0 {
        connect.told_ns = unsafe { bpf_ktime_get_boot_ns() };
    }
}

/// Notes a SYN that its socket hands to a device.
#[inline(never)]
pub unsafe fn syn_sent<const TYPED: bool>(skb: *const u8, sk: *const u8) -> u32 {
    let socket = sk as u64;
    let Some(connect) = CONNECTS.get_ptr_mut(socket) else {
        return 0;
    };
    let connect = unsafe { &mut *connect };
    let now = unsafe { bpf_ktime_get_boot_ns() };
    if connect.sent != 0 && now - connect.sent_ns < SAME_SYN_NS {
        return 0;
    }
    connect.sent += 1;
    connect.sent_ns = now;
    if connect.sent == 1 {
        connect.tuple.source_port = unsafe { field::<u16, TYPED>(sk, offset!(sock_num)) };
        // It is twice as large as the other map, so there is room. What another socket left there, whose
        // end was not seen, is not its attempt any more.
        let _ = SYNS.insert(&connect.tuple, socket, BPF_ANY.into());
        let nfct = unsafe { conntrack::nfct::<TYPED>(skb) };
        if conntrack::translated_ends(nfct, &mut connect.wire) {
            let _ = SYNS.insert(&connect.wire, socket, BPF_ANY.into());
        }
    }
    1
}

/// Lays a dropped SYN or SYN-ACK to its connect.
#[inline(never)]
pub unsafe fn dropped<const TYPED: bool>(sk: *const u8, nfct: u64, work: &mut Work) -> u32 {
    let key = &work.key;
    let is_answer = key.kind != KIND_SYN;
    let own = !is_answer
        && !sk.is_null()
        && unsafe { field::<u8, TYPED>(sk, offset!(sock_state)) } == SYN_SENT;
    let mut socket = sk as u64;
    if !own {
        let mut tuple = Tuple::default();
        if key.flags & FLAG_ENCAPSULATED != 0 || !conntrack::original(nfct, &mut tuple) {
            own_ends(key, work.packet.source_port, is_answer, &mut tuple);
        }
        let Some(found) = SYNS.get_ptr(&tuple) else {
            return 0;
        };
        socket = unsafe { *found };
    }
    let Some(connect) = CONNECTS.get_ptr_mut(socket) else {
        return 0;
    };
    let connect = unsafe { &mut *connect };
    if own && connect.tuple.source_port == 0 {
        connect.tuple.source_port = work.packet.source_port;
    }
    note_drop(&mut connect.drop, key, &work.packet, is_answer);
    if work.packet.told != UNTOLD {
        told(connect);
    }
    1
}

/// The two ends of a packet's attempt by its own headers.
#[inline(always)]
pub fn own_ends(key: &FlowKey, source_port: u16, is_answer: bool, tuple: &mut Tuple) {
    if is_answer {
        tuple.source = key.destination;
        tuple.destination = key.source;
        tuple.source_port = key.destination_port;
        tuple.destination_port = source_port;
    } else {
        tuple.source = key.source;
        tuple.destination = key.destination;
        tuple.source_port = source_port;
        tuple.destination_port = key.destination_port;
    }
}

/// Keeps where a packet of an attempt was dropped last, and who its other end is there.
#[inline(always)]
pub fn note_drop(drop: &mut LastDrop, key: &FlowKey, packet: &Packet, is_answer: bool) {
    drop.location = key.location;
    drop.reason = key.reason;
    drop.ifindex = key.ifindex;
    drop.netns = key.netns;
    drop.packets += 1;
    if packet.told != UNTOLD {
        drop.told = drop.told.saturating_add(1);
    }
    drop.is_answer = u8::from(is_answer);
    if is_answer {
        drop.destination = key.source;
        drop.destination_port = packet.source_port;
    } else {
        drop.destination = key.destination;
        drop.destination_port = key.destination_port;
    }
}
