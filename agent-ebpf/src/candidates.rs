//! What `cargo xtask bench hooks` holds against one another: at each hook where DNS or answers could be
//! seen an empty program, and the least that turns away what is of no interest.
//!
//! A gate counts what it lets through, so that the benchmark can tell whether it looked at all.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(
    internal_features,
    reason = "the eBPF target needs an unstable compiler anyway"
)]
#![allow(
    missing_docs,
    reason = "the program macros make public functions without their comments"
)]
#![allow(unused_unsafe, reason = "`offset!` reads a static wherever it stands")]

use aya_ebpf::macros::{btf_tracepoint, cgroup_skb, fentry, kprobe, lsm, map, raw_tracepoint};
use aya_ebpf::maps::{Array, PerCpuArray};
use aya_ebpf::programs::{
    BtfTracePointContext, FEntryContext, LsmContext, ProbeContext, RawTracePointContext,
    SkBuffContext,
};
use whydrop_ebpf::Offsets;

#[allow(dead_code, reason = "the real programs use all of it")]
mod access;

use access::{copy, field};

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// `enum tcp_state` (include/net/tcp_states.h).
const SYN_SENT: u8 = 2;
const PORT_DNS: u16 = 53;
/// Of an IPv4 header without options, and of IPv6's.
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
/// Where a UDP header has its ports.
const SOURCE: usize = 0;
const DESTINATION: usize = 2;
/// Namespaces are told apart by this many low bits of their inode numbers, which count up.
const NAMESPACES: u32 = 1024;

/// Set by the loader, as for the real programs.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::NONE;

macro_rules! offset {
    ($field:ident) => {
        unsafe { core::ptr::read_volatile(&raw const OFFSETS.$field) }
    };
}

/// What the gates let through.
#[map]
static PASSED: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// As the real programs have it: how many queries were noted, and how many the agent took out. The
/// benchmark sets it.
#[map]
static WAITING: Array<u64> = Array::with_max_entries(1, 0);
/// See [`WAITING`].
#[map]
static FORGOTTEN: Array<u64> = Array::with_max_entries(1, 0);

/// How many queries wait, by the namespace that asked.
#[map]
static WAITING_IN: Array<u64> = Array::with_max_entries(NAMESPACES, 0);

/// Two programs of one function that takes a tracepoint's first argument: typed, and by copies.
macro_rules! tracepoint {
    ($name:literal, $typed:ident, $raw:ident, $function:ident) => {
        #[btf_tracepoint(function = $name)]
        pub fn $typed(ctx: BtfTracePointContext) -> i32 {
            unsafe { $function::<true>(ctx.arg(0)) };
            0
        }

        #[raw_tracepoint(tracepoint = $name)]
        pub fn $raw(ctx: RawTracePointContext) -> i32 {
            unsafe { $function::<false>(ctx.arg(0)) };
            0
        }
    };
}

/// Nothing, at any tracepoint.
#[raw_tracepoint(tracepoint = "net_dev_queue")]
pub fn empty_raw(_ctx: RawTracePointContext) -> i32 {
    0
}

/// Nothing.
#[btf_tracepoint(function = "net_dev_queue")]
pub fn sent_empty(_ctx: BtfTracePointContext) -> i32 {
    0
}

/// Nothing.
#[btf_tracepoint(function = "netif_receive_skb")]
pub fn received_empty(_ctx: BtfTracePointContext) -> i32 {
    0
}

tracepoint!("net_dev_queue", sent_gate, sent_gate_raw, sent);
tracepoint!(
    "netif_receive_skb",
    received_gate,
    received_gate_raw,
    received
);
tracepoint!(
    "netif_receive_skb",
    received_by_netns,
    received_by_netns_raw,
    received_in
);

/// `ip_send_skb(net, skb)`: datagrams of local sockets before netfilter.
#[fentry(function = "ip_send_skb")]
pub fn ip_send_fentry(ctx: FEntryContext) -> i32 {
    unsafe { datagram::<true>(ctx.arg(1)) };
    0
}

/// The same.
#[kprobe(function = "ip_send_skb")]
pub fn ip_send_kprobe(ctx: ProbeContext) -> u32 {
    if let Some(skb) = ctx.arg(1) {
        unsafe { datagram::<false>(skb) };
    }
    0
}

/// `__udp_enqueue_schedule_skb(sk, skb)`.
#[fentry(function = "__udp_enqueue_schedule_skb")]
pub fn enqueued_fentry(ctx: FEntryContext) -> i32 {
    unsafe { enqueued::<true>(ctx.arg(0), ctx.arg(1)) };
    0
}

/// The same.
#[kprobe(function = "__udp_enqueue_schedule_skb")]
pub fn enqueued_kprobe(ctx: ProbeContext) -> u32 {
    if let (Some(sk), Some(skb)) = (ctx.arg(0), ctx.arg(1)) {
        unsafe { enqueued::<false>(sk, skb) };
    }
    0
}

/// `security_sock_rcv_skb(sk, skb)`: every packet for a socket. Allows all.
#[lsm(hook = "socket_sock_rcv_skb")]
pub fn lsm_received(_ctx: LsmContext) -> i32 {
    0
}

/// What sockets of a cgroup send. Allows all.
#[cgroup_skb(egress)]
pub fn cgroup_sent(ctx: SkBuffContext) -> i32 {
    unsafe { in_cgroup(&ctx, DESTINATION) };
    1
}

/// What sockets of a cgroup receive. Allows all.
#[cgroup_skb(ingress)]
pub fn cgroup_received(ctx: SkBuffContext) -> i32 {
    if someone_waits() {
        unsafe { in_cgroup(&ctx, SOURCE) };
    }
    1
}

#[inline(always)]
fn pass() {
    if let Some(passed) = PASSED.get_ptr_mut(0) {
        unsafe { *passed += 1 };
    }
}

#[inline(always)]
fn someone_waits() -> bool {
    match (WAITING.get_ptr(0), FORGOTTEN.get_ptr(0)) {
        (Some(waiting), Some(forgotten)) => unsafe {
            waiting.read_volatile() != forgotten.read_volatile()
        },
        _ => false,
    }
}

/// As `sent.rs`, with DNS and connects on.
#[inline(always)]
unsafe fn sent<const TYPED: bool>(skb: *const u8) {
    let sk = unsafe { field::<*const u8, TYPED>(skb, offset!(skb_sk)) };
    if sk.is_null() {
        if unsafe { field::<u32, TYPED>(skb, offset!(skb_iif)) } == 0 {
            pass();
        }
        return;
    }
    let protocol = unsafe { field::<u16, TYPED>(sk, offset!(sock_protocol)) };
    if protocol == TCP.into() {
        if unsafe { field::<u8, TYPED>(sk, offset!(sock_state)) } == SYN_SENT {
            pass();
        }
    } else if protocol == UDP.into() {
        if unsafe { goes_to_dns::<TYPED>(skb, sk) } {
            pass();
        }
    } else if protocol == ICMP.into() || protocol == ICMPV6.into() {
        pass();
    }
}

/// A packet of any socket, if it is a datagram.
#[inline(always)]
unsafe fn datagram<const TYPED: bool>(skb: *const u8) {
    let sk = unsafe { field::<*const u8, TYPED>(skb, offset!(skb_sk)) };
    if !sk.is_null()
        && unsafe { field::<u16, TYPED>(sk, offset!(sock_protocol)) } == UDP.into()
        && unsafe { goes_to_dns::<TYPED>(skb, sk) }
    {
        pass();
    }
}

#[inline(always)]
unsafe fn goes_to_dns<const TYPED: bool>(skb: *const u8, sk: *const u8) -> bool {
    let mut port = unsafe { field::<u16, TYPED>(sk, offset!(sock_dport)) };
    if port == 0 {
        unsafe {
            let head = field::<u64, TYPED>(skb, offset!(skb_head));
            let transport = field::<u16, TYPED>(skb, offset!(skb_transport_header));
            if !copy(&mut port, head + u64::from(transport) + 2) {
                return false;
            }
        }
    }
    u16::from_be(port) == PORT_DNS
}

/// As `dns.rs`: nothing while no query waits, else the packet's protocol.
#[inline(always)]
unsafe fn received<const TYPED: bool>(skb: *const u8) {
    if !someone_waits() {
        return;
    }
    let dev = unsafe { field::<*const u8, TYPED>(skb, offset!(skb_dev)) };
    if !dev.is_null() && unsafe { is_udp::<TYPED>(skb) } {
        pass();
    }
}

/// The same, but only where a query of the device's own namespace waits.
#[inline(always)]
unsafe fn received_in<const TYPED: bool>(skb: *const u8) {
    if !someone_waits() {
        return;
    }
    let inum = unsafe {
        let dev = field::<*const u8, TYPED>(skb, offset!(skb_dev));
        if dev.is_null() {
            return;
        }
        let net = field::<*const u8, TYPED>(dev, offset!(dev_net));
        field::<u32, TYPED>(net, offset!(net_inum))
    };
    let waits = WAITING_IN
        .get_ptr(inum % NAMESPACES)
        .is_some_and(|waiting| unsafe { waiting.read_volatile() } != 0);
    if waits && unsafe { is_udp::<TYPED>(skb) } {
        pass();
    }
}

#[inline(always)]
unsafe fn is_udp<const TYPED: bool>(skb: *const u8) -> bool {
    let mut header = [0u8; 10];
    unsafe {
        let data = field::<u64, TYPED>(skb, offset!(skb_data));
        if !copy(&mut header, data) {
            return false;
        }
    }
    let protocol = if header[0] >> 4 == 4 {
        header[9]
    } else {
        header[6]
    };
    protocol == UDP
}

/// A datagram for a socket; the real program then reads its headers.
#[inline(always)]
unsafe fn enqueued<const TYPED: bool>(sk: *const u8, _skb: *const u8) {
    if !someone_waits() {
        return;
    }
    let net = unsafe { field::<*const u8, TYPED>(sk, offset!(sock_net)) };
    if unsafe { field::<u32, TYPED>(net, offset!(net_inum)) } != 0 {
        pass();
    }
}

/// The port of a UDP datagram, read from the packet itself; the options of IPv4 are not looked for.
#[inline(always)]
unsafe fn in_cgroup(ctx: &SkBuffContext, port: usize) {
    let (data, end) = unsafe {
        (
            (*ctx.skb.skb).data as usize,
            (*ctx.skb.skb).data_end as usize,
        )
    };
    if data + IPV4_LEN + 4 > end {
        return;
    }
    let byte = |at: usize| unsafe { core::ptr::read_volatile((data + at) as *const u8) };
    let is_ipv4 = byte(0) >> 4 == 4;
    let (protocol, len) = if is_ipv4 {
        (byte(9), IPV4_LEN)
    } else {
        (byte(6), IPV6_LEN)
    };
    if protocol != UDP || data + len + 4 > end {
        return;
    }
    let port = unsafe { core::ptr::read_volatile((data + len + port) as *const u16) };
    if u16::from_be(port) == PORT_DNS {
        pass();
    }
}

/// As the real programs have it.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
