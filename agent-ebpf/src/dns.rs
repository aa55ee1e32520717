//! DNS over UDP: a query is noted when its socket hands it to a device, and taken out when its answer
//! comes to the same namespace. What waits too long is found by the agent, which looks through the map.
//!
//! An answer is looked for by client address, client port and id alone: behind a Service it comes from
//! another address and port than was asked.

use core::ptr::copy_nonoverlapping;

use aya_ebpf::bindings::{BPF_ANY, BPF_EXIST, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_probe_read_kernel_buf;
use aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::{btf_tracepoint, fentry, kprobe, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, FEntryContext, ProbeContext, RawTracePointContext};
use whydrop_ebpf::attempt::{
    Answered, ClientKey, LATENCY_BUCKETS_NS, LastDrop, MESSAGE_LEN, Query, QueryKey, QueryWork,
    TALLY_QUERY, TALLY_RESPONSE, TallyKey, Tuple,
};
use whydrop_ebpf::{
    FLAG_ENCAPSULATED, FLAG_LOCAL_DATAGRAM, FlowKey, KIND_DNS, MISSING, PerCpu, Work,
};

use crate::access::{atomic_add, copy, field};
use crate::connect::{ends, note_drop, own_ends};
use crate::conntrack;
use crate::maps::{
    ANSWERED, CLIENTS_TOLD, CPU, QUERIES, QUERIES_FORGOTTEN, QUERIES_WAITING, QUERY_WORK, SWEPT,
    offset, setting,
};
use crate::packet::{self, UDP};
use crate::tally;

const PORT_DNS: u16 = 53;
/// QR and opcode of a standard query are zero (RFC 1035, 4.1.1).
const NOT_A_QUERY: u8 = 0xf8;
/// The same packet passes each device of a stack within microseconds.
const SAME_PACKET_NS: u64 = 1_000_000;
/// Between the first and the last packet of one that asks several servers at once.
const ASKED_AT_ONCE_NS: u64 = 500_000_000;
const UDP_HEADER_BYTES: u32 = 8;

/// `netif_receive_skb(skb)`: every packet that a device receives, so it looks at none while no query
/// waits.
#[btf_tracepoint(function = "netif_receive_skb")]
pub fn netif_receive_skb(ctx: BtfTracePointContext) -> i32 {
    unsafe { received::<true>(ctx.arg(0)) };
    0
}

/// The same where the kernel refuses `tp_btf`.
#[raw_tracepoint(tracepoint = "netif_receive_skb")]
pub fn netif_receive_skb_raw(ctx: RawTracePointContext) -> i32 {
    unsafe { received::<false>(ctx.arg(0)) };
    0
}

/// `__udp_enqueue_schedule_skb(sk, skb)` (net/ipv4/udp.c): a datagram for a socket of this kernel, and
/// nothing else; where fentry works it is the cheapest place.
#[fentry(function = "__udp_enqueue_schedule_skb")]
pub fn udp_enqueue(ctx: FEntryContext) -> i32 {
    unsafe { enqueued::<true>(ctx.arg(0), ctx.arg(1)) };
    0
}

/// The same where only kprobes work.
#[kprobe(function = "__udp_enqueue_schedule_skb")]
pub fn udp_enqueue_kprobe(ctx: ProbeContext) -> u32 {
    if let (Some(sk), Some(skb)) = (ctx.arg(0), ctx.arg(1)) {
        unsafe { enqueued::<false>(sk, skb) };
    }
    0
}

#[inline(always)]
fn someone_waits() -> bool {
    match (QUERIES_WAITING.get_ptr(0), QUERIES_FORGOTTEN.get_ptr(0)) {
        (Some(waiting), Some(forgotten)) => unsafe {
            waiting.read_volatile() != forgotten.read_volatile()
        },
        _ => false,
    }
}

#[inline(always)]
fn waiting(change: u64) {
    if let Some(waiting) = QUERIES_WAITING.get_ptr_mut(0) {
        unsafe { atomic_add(waiting, change) };
    }
}

/// A datagram that a UDP socket of this kernel hands to a device: a DNS query, if it goes to port 53.
#[inline(always)]
pub unsafe fn sent<const TYPED: bool>(skb: *const u8, sk: *const u8) {
    let port = u16::from_be(unsafe { field::<u16, TYPED>(sk, offset!(sock_dport)) });
    if port == PORT_DNS || port == 0 && unsafe { goes_to_dns::<TYPED>(skb) } {
        unsafe { query::<TYPED>(skb, sk) };
    }
}

/// Whether a datagram of a socket that is not connected goes to port 53, or did before DNAT.
#[inline(always)]
unsafe fn goes_to_dns<const TYPED: bool>(skb: *const u8) -> bool {
    let mut port = 0u16;
    unsafe {
        let head = field::<u64, TYPED>(skb, offset!(skb_head));
        let transport = field::<u16, TYPED>(skb, offset!(skb_transport_header));
        if !copy(&mut port, head + u64::from(transport) + 2) {
            return false;
        }
    }
    if u16::from_be(port) == PORT_DNS {
        return true;
    }
    let mut original = Tuple::default();
    let nfct = unsafe { conntrack::nfct::<TYPED>(skb) };
    conntrack::original(nfct, &mut original) && original.destination_port == PORT_DNS
}

#[inline(never)]
unsafe fn query<const TYPED: bool>(skb: *const u8, sk: *const u8) -> u32 {
    let Some(own) = CPU.get_ptr_mut(0) else {
        return 0;
    };
    let PerCpu { sent: work, .. } = unsafe { &mut *own };
    work.key = FlowKey::default();
    unsafe { packet::read::<TYPED>(skb, work) };
    unsafe { note::<TYPED>(skb, sk, work) }
}

/// Notes the query in `work`, or that it was sent once more.
#[inline(always)]
unsafe fn note<const TYPED: bool>(skb: *const u8, sk: *const u8, work: &mut Work) -> u32 {
    let key = &work.key;
    if key.protocol != UDP
        || work.packet.is_query == 0
        || work.packet.dns_flags & NOT_A_QUERY != 0
        || key.flags & FLAG_ENCAPSULATED != 0
    {
        return 0;
    }
    let nfct = unsafe { conntrack::nfct::<TYPED>(skb) };
    let mut tuple = Tuple::default();
    if !conntrack::original(nfct, &mut tuple) {
        own_ends(key, work.packet.source_port, false, &mut tuple);
    }
    let now = unsafe { bpf_ktime_get_boot_ns() };
    let query_key = QueryKey {
        client: tuple.source,
        port: tuple.source_port,
        id: work.packet.dns_id,
    };
    let (Some(own), Some(at_hand), Some(swept)) = (
        CPU.get_ptr_mut(0),
        QUERY_WORK.get_ptr_mut(0),
        SWEPT.get_ptr(0),
    ) else {
        return 0;
    };
    if unsafe { (*swept).is_dns_watched } == 0 {
        return 0; // Its answer would not be seen.
    }
    let counts = unsafe { &mut (*own).cpu.attempts };
    let address = pointer(work, skb);
    let query = unsafe { &mut (*at_hand).query };
    unsafe { copy_message(work, query) };
    let mut known_here = false;
    if let Some(known) = QUERIES.get_ptr_mut(&query_key) {
        let known = unsafe { &mut *known };
        if same_message(known, query) {
            if known.skb != address
                || known.server != tuple.destination
                || now - known.sent_ns > SAME_PACKET_NS
            {
                known.sent += 1;
                known.skb = address;
            }
            known.sent_ns = now;
            known.server = tuple.destination;
            known.server_port = tuple.destination_port;
            real_server(nfct, known);
            return 1;
        }
        // The id is used again for another question. What was asked before is over.
        known_here = true;
    } else if is_answered(&query_key, query, &tuple, now) {
        return 1;
    }
    query.start_ns = now;
    query.sent_ns = now;
    query.answered_ns = 0;
    query.skb = address;
    query.cgroup = unsafe { cgroup::<TYPED>(sk) };
    query.server = tuple.destination;
    query.server_port = tuple.destination_port;
    query.sent = 1;
    query.ip_version = work.key.ip_version;
    query.protocol = UDP;
    query.pad = 0;
    query.pad2 = [0; 6];
    real_server(nfct, query);
    query.drop = LastDrop::default();
    query.netns = unsafe {
        let net = field::<*const u8, TYPED>(sk, offset!(sock_net));
        field::<u32, TYPED>(net, offset!(net_inum))
    };
    let tally_key = TallyKey {
        source: tuple.source,
        cgroup: query.cgroup,
        netns: query.netns,
        what: TALLY_QUERY,
        detail: 0,
        bucket: 0,
        ip_version: query.ip_version,
    };
    // Another CPU or the agent may take the old one out at this moment, so each insert says what it
    // expects: only what was not there is one more that waits.
    let is_replaced = known_here
        && QUERIES
            .insert(&query_key, &*query, BPF_EXIST.into())
            .is_ok();
    if is_replaced {
        counts.queries += 1;
    } else if QUERIES
        .insert(&query_key, &*query, BPF_NOEXIST.into())
        .is_ok()
    {
        counts.queries += 1;
        waiting(1);
    } else {
        counts.queries_lost += 1;
    }
    tally::add(&tally_key, 1, 0)
}

/// Keeps where a query really goes, if its own namespace translates it.
#[inline(always)]
fn real_server(nfct: u64, query: &mut Query) {
    let mut wire = Tuple::default();
    // Zeroes where it does not.
    conntrack::translated_ends(nfct, &mut wire);
    query.real_server = wire.destination;
    query.real_server_port = wire.destination_port;
}

/// Notes that a socket connected to port 53 was told of an error: by ICMP, whose quoted query is gone by
/// now, so it stands for what the socket asked before.
#[inline(always)]
pub unsafe fn told<const TYPED: bool>(sk: *const u8) {
    let mut tuple = Tuple::default();
    unsafe { ends::<TYPED>(sk, &mut tuple) };
    if tuple.destination_port != PORT_DNS || !someone_waits() {
        return;
    }
    let key = ClientKey {
        client: tuple.source,
        port: unsafe { field::<u16, TYPED>(sk, offset!(sock_num)) },
        pad: 0,
    };
    let now = unsafe { bpf_ktime_get_boot_ns() };
    let _ = CLIENTS_TOLD.insert(&key, now, BPF_ANY.into());
}

/// Whether this is the same query to another server that one has answered already: whoever asks
/// several at once may be answered before it has asked the last.
#[inline(always)]
fn is_answered(key: &QueryKey, query: &Query, tuple: &Tuple, now: u64) -> bool {
    ANSWERED.get_ptr(key).is_some_and(|answered| {
        let answered = unsafe { &*answered };
        // Another CPU may have seen the answer after `now` was read.
        now < answered.answered_ns + ASKED_AT_ONCE_NS
            && answered.server != tuple.destination
            && answered.hash == hash(query)
    })
}

/// A number that differs for different messages, as good as always.
#[inline(always)]
fn hash(query: &Query) -> u64 {
    // FNV-1a by words.
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for i in 0..MESSAGE_LEN / 8 {
        hash ^= unsafe { words(query).add(i).read_volatile() };
        hash = u64::wrapping_mul(hash, 0x0100_0000_01b3);
    }
    hash
}

/// Whether two queries are the same to the byte.
#[inline(always)]
fn same_message(one: &Query, other: &Query) -> bool {
    let (a, b) = (words(one), words(other));
    for i in 0..MESSAGE_LEN / 8 {
        if unsafe { a.add(i).read_volatile() != b.add(i).read_volatile() } {
            return false;
        }
    }
    one.message_len == other.message_len
}

/// By words, which the verifier follows eight times faster than bytes.
#[inline(always)]
fn words(query: &Query) -> *mut u64 {
    (&raw const query.message).cast_mut().cast()
}

/// Copies the DNS message, as far as it is linear, and zeroes behind it.
#[inline(always)]
unsafe fn copy_message(work: &Work, query: &mut Query) {
    for i in 0..MESSAGE_LEN / 8 {
        // Volatile: else it becomes a call of memset.
        unsafe { words(query).add(i).write_volatile(0) };
    }
    let begin = work.transport + UDP_HEADER_BYTES;
    let mut len = work.buffer.tail.saturating_sub(begin);
    if len > MESSAGE_LEN as u32 {
        len = MESSAGE_LEN as u32;
    }
    if len == 0
        || unsafe {
            bpf_probe_read_kernel_buf(
                (work.buffer.head + u64::from(begin)) as *const u8,
                &mut query.message[..len as usize],
            )
        }
        .is_err()
    {
        len = 0;
    }
    query.message_len = len as u16;
}

/// The id of the cgroup in which the socket was made; 0 where the kernel has none.
#[inline(always)]
unsafe fn cgroup<const TYPED: bool>(sk: *const u8) -> u64 {
    if offset!(sock_cgroup) == MISSING || offset!(kn_id) == MISSING {
        return 0;
    }
    // By copies: older kernels have the pointer as a number.
    let (mut cgroup, mut kn, mut id) = (0u64, 0u64, 0u64);
    unsafe {
        let found = copy(&mut cgroup, sk as u64 + u64::from(offset!(sock_cgroup)))
            && copy(&mut kn, cgroup + u64::from(offset!(cgroup_kn)))
            && copy(&mut id, kn + u64::from(offset!(kn_id)));
        if found { id } else { 0 }
    }
}

#[inline(always)]
unsafe fn received<const TYPED: bool>(skb: *const u8) {
    if !someone_waits() {
        return;
    }
    let dev = unsafe { field::<*const u8, TYPED>(skb, offset!(skb_dev)) };
    if dev.is_null() {
        return;
    }
    // What is no UDP is turned away by one read: at this point `data` is the IP header.
    let mut header = [0u8; 10];
    unsafe {
        let data = field::<u64, TYPED>(skb, offset!(skb_data));
        if !copy(&mut header, data) {
            return;
        }
    }
    let may_be_udp = if header[0] >> 4 == 4 {
        header[9] == UDP
    } else {
        // A long answer comes in fragments, of which the first has the DNS header.
        header[6] == UDP || packet::is_extension(header[6])
    };
    if !may_be_udp {
        return;
    }
    unsafe {
        let net = field::<*const u8, TYPED>(dev, offset!(dev_net));
        answer::<TYPED>(skb, field::<u32, TYPED>(net, offset!(net_inum)));
    }
}

#[inline(always)]
unsafe fn enqueued<const TYPED: bool>(sk: *const u8, skb: *const u8) {
    if !someone_waits() {
        return;
    }
    unsafe {
        let net = field::<*const u8, TYPED>(sk, offset!(sock_net));
        answer::<TYPED>(skb, field::<u32, TYPED>(net, offset!(net_inum)));
    }
}

/// Takes out the query that this packet answers, if it is an answer to this namespace.
#[inline(never)]
unsafe fn answer<const TYPED: bool>(skb: *const u8, netns: u32) -> u32 {
    let Some(own) = CPU.get_ptr_mut(0) else {
        return 0;
    };
    let PerCpu { received: work, .. } = unsafe { &mut *own };
    work.key = FlowKey::default();
    unsafe { packet::read::<TYPED>(skb, work) };
    if work.packet.is_response == 0 || work.key.flags & FLAG_ENCAPSULATED != 0 {
        return 0;
    }
    answered(pointer(work, skb), netns, work)
}

/// Apart from [`answer`], because all that call one another have 512 bytes of stack together.
#[inline(never)]
fn answered(skb: u64, netns: u32, work: &Work) -> u32 {
    let (Some(at_hand), Some(swept)) = (QUERY_WORK.get_ptr_mut(0), SWEPT.get_ptr(0)) else {
        return 0;
    };
    let at_hand = unsafe { &mut *at_hand };
    let key = QueryKey {
        client: work.key.destination,
        port: work.key.destination_port,
        id: work.packet.dns_id,
    };
    let Some(query) = QUERIES.get_ptr_mut(&key) else {
        return 0;
    };
    let query = unsafe { &mut *query };
    // From the port that was asked, as a resolver checks it; from which address is not known, because
    // only the last of several servers is kept.
    let port = work.packet.source_port;
    if query.netns != netns
        || query.answered_ns != 0
        || port != query.server_port && port != query.real_server_port
    {
        return 0;
    }
    let now = unsafe { bpf_ktime_get_boot_ns() };
    let latency_ns = now - query.start_ns;
    at_hand.answered_tally = TallyKey {
        source: key.client,
        cgroup: query.cgroup,
        netns,
        what: TALLY_RESPONSE,
        detail: response_code(work),
        bucket: bucket(latency_ns),
        ip_version: query.ip_version,
    };
    at_hand.answered_skb = skb;
    at_hand.answered_key = key;
    at_hand.answered_latency_ns = latency_ns;
    unsafe { copy_nonoverlapping(&raw const *query, &raw mut at_hand.answered, 1) };
    let answered = Answered {
        answered_ns: now,
        hash: hash(query),
        server: query.server,
    };
    let _ = ANSWERED.insert(&key, answered, BPF_ANY.into());
    let due_ns = query.start_ns + setting!(dns_timeout_ns);
    if now >= due_ns && due_ns > unsafe { (*swept).queries_ns } {
        // Too late, and the agent has not seen that it waited.
        query.answered_ns = now;
    } else if QUERIES.remove(&key).is_ok() {
        waiting(u64::MAX);
    } else {
        // Another server's answer took it out at this moment on another CPU, or the agent did.
        at_hand.answered_skb = 0;
        return 0;
    }
    tally::add(&at_hand.answered_tally, 1, latency_ns)
}

/// The low four bits of the DNS header's fourth byte; `work` is of an answer over UDP.
#[inline(always)]
fn response_code(work: &Work) -> u8 {
    let mut byte = 0u8;
    let at = work.buffer.head + u64::from(work.transport + UDP_HEADER_BYTES + 3);
    unsafe { copy(&mut byte, at) };
    byte & 0xf
}

#[inline(always)]
fn bucket(latency_ns: u64) -> u8 {
    let mut bucket = 0;
    for bound in LATENCY_BUCKETS_NS {
        bucket += u8::from(latency_ns > bound);
    }
    bucket
}

/// Lays a dropped query or answer to its attempt.
#[inline(never)]
pub unsafe fn dropped<const TYPED: bool>(
    skb: *const u8,
    sk: *const u8,
    nfct: u64,
    work: &mut Work,
) -> u32 {
    let is_answer = work.packet.is_response != 0;
    // Behind a Service a query goes to another port: then only its id tells that it is one.
    let is_of_interest = someone_waits()
        || if is_answer {
            was_answered()
        } else {
            work.key.kind == KIND_DNS
        };
    if !is_of_interest {
        return 0;
    }
    let mut tuple = Tuple::default();
    if work.key.flags & FLAG_ENCAPSULATED != 0 || !conntrack::original(nfct, &mut tuple) {
        own_ends(&work.key, work.packet.source_port, is_answer, &mut tuple);
    }
    let key = QueryKey {
        client: tuple.source,
        port: tuple.source_port,
        id: work.packet.dns_id,
    };
    let mut found = QUERIES.get_ptr_mut(&key);
    if found.is_none() {
        if is_answer {
            unsafe { take_back(skb, &key, work) };
        } else if !sk.is_null()
            && work.key.kind == KIND_DNS
            && work.key.flags & FLAG_LOCAL_DATAGRAM == 0
            && unsafe { field::<u32, TYPED>(skb, offset!(skb_iif)) } == 0
        {
            // Dropped by its own namespace before a device had it, and the sender does not know.
            unsafe { note::<TYPED>(skb, sk, work) };
        }
        found = QUERIES.get_ptr_mut(&key);
    }
    let Some(query) = found else { return 0 };
    let drop = unsafe { &mut (*query).drop };
    note_drop(drop, &work.key, &work.packet, is_answer);
    1
}

#[inline(always)]
fn was_answered() -> bool {
    QUERY_WORK
        .get_ptr(0)
        .is_some_and(|at_hand| unsafe { (*at_hand).answered_skb } != 0)
}

/// The answer that was just counted is dropped before its socket has it: the query waits on. Not if
/// there is no socket any more: then nobody waits.
#[inline(always)]
unsafe fn take_back(skb: *const u8, key: &QueryKey, work: &mut Work) -> u32 {
    let Some(at_hand) = QUERY_WORK.get_ptr_mut(0) else {
        return 0;
    };
    let at_hand: &mut QueryWork = unsafe { &mut *at_hand };
    if at_hand.answered_skb == 0
        || at_hand.answered_skb != pointer(work, skb)
        || at_hand.answered_key != *key
    {
        return 0;
    }
    at_hand.answered_skb = 0;
    if work.key.reason == offset!(reason_no_socket)
        || QUERIES
            .insert(&at_hand.answered_key, &at_hand.answered, BPF_NOEXIST.into())
            .is_err()
    {
        return 0;
    }
    waiting(1);
    tally::add(
        &at_hand.answered_tally,
        u64::MAX,
        0u64.wrapping_sub(at_hand.answered_latency_ns),
    )
}

/// A kernel pointer as a number, see `told::address`.
#[inline(always)]
fn pointer(work: &mut Work, pointer: *const u8) -> u64 {
    unsafe {
        (&raw mut work.pointer).write_volatile(pointer as u64);
        (&raw const work.pointer).read_volatile()
    }
}

// The message is read and written by words: a map's value is aligned, and so is this in it.
const _: () = assert!(core::mem::offset_of!(Query, message).is_multiple_of(8));
