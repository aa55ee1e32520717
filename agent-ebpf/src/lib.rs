//! What the kernel programs and the agent share: map keys and values, the event, the offsets.
//!
//! Everything is `repr(C)` without padding, so that a key hashes by its bytes and the agent can
//! read a value field by field; the sizes are asserted below. With the feature `programs` this
//! package also holds the programs themselves (`main.rs`) and what the benchmarks hold them
//! against (`peers.rs`).
#![no_std]

pub mod attempt;

/// An offset that the running kernel's BTF does not have. What needs it is turned off.
pub const MISSING: u32 = u32::MAX;

/// Bytes of a packet that an event carries, from its outermost IP header on.
///
/// The longest that is of use is a DNS name of 255 bytes (RFC 1035, 2.3.4) with its type and class
/// behind IPv6, UDP, VXLAN, Ethernet, IPv6, UDP and the DNS header: 40+8+8+14+40+8+12+255+4 = 389.
pub const SNAP_LEN: usize = 392;

/// Events of one flow in one window of 100 ms and on one CPU; what exceeds it is only counted, and
/// said in one line a second. So a flow of under 40 packets a second shows each one.
pub const EVENTS_PER_FLOW: u32 = 4;

/// The same for DNS queries, because each asks for a name of its own.
pub const EVENTS_PER_DNS_FLOW: u32 = 64;

/// Drop reasons of the kernel's own subsystem that have a number below this have a class and a
/// counter. Linux 7.2 has about 130.
pub const REASONS: usize = 512;

/// Slots for an answer that waits for its drop, on each CPU. More than one, because an interrupt
/// can answer another packet between an answer and its drop.
pub const ANSWER_SLOTS: usize = 8;

/// [`FlowKey::kind`]: a TCP SYN without ACK.
pub const KIND_SYN: u8 = 1;
/// [`FlowKey::kind`]: a DNS query over UDP.
pub const KIND_DNS: u8 = 2;
/// [`FlowKey::kind`]: any other packet.
pub const KIND_PACKET: u8 = 3;
/// [`FlowKey::kind`]: not a drop but a RST or ICMPv6 error that was sent; the key's addresses are
/// those of the packet that it answers, `reason`, `location` and device are 0.
pub const KIND_ANSWER: u8 = 4;

/// [`FlowKey::flags`]: the packet left a datagram socket of this kernel and has not been received
/// by any device: a netfilter drop is the error of the sender's own call (EPERM).
pub const FLAG_LOCAL_DATAGRAM: u8 = 1;
/// [`FlowKey::flags`]: the packet was found inside VXLAN, Geneve, GRE or IPIP.
pub const FLAG_ENCAPSULATED: u8 = 2;
/// [`FlowKey::flags`]: a fragment other than the first, so without ports.
pub const FLAG_FRAGMENT: u8 = 4;

/// The sender was not told before the drop.
pub const UNTOLD: u8 = 0;
/// An answer was seen leaving before the drop.
pub const TOLD: u8 = 1;
/// The same, and the answer is counted under [`KIND_ANSWER`].
pub const TOLD_COUNTED: u8 = 2;

/// What packets are counted by: a flow without its source port, and how it was dropped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// IPv4 in the first four bytes, or IPv6, in network order. Zero if there is no IP header.
    pub source: [u8; 16],
    /// After DNAT.
    pub destination: [u8; 16],
    /// Before DNAT, from the packet's conntrack entry; zero if there was none.
    pub original_destination: [u8; 16],
    /// The low half of the address that `kfree_skb` was called from: kernel and modules lie within
    /// 2 GiB of one another. With 72 bytes a key and what the kernel keeps beside it are two cache
    /// lines.
    pub location: u32,
    /// `enum skb_drop_reason` as this kernel numbers it; 0 before 5.17.
    pub reason: u32,
    /// The device's index in its namespace; 0 if there is none.
    pub ifindex: u32,
    /// Inode number of the network namespace; 0 if not known.
    pub netns: u32,
    /// Host order. For ICMP and ICMPv6 the type (high byte) and code.
    pub destination_port: u16,
    /// Host order; 0 if there was no DNAT.
    pub original_destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// 4, 6, or 0 if there is no IP header that could be read.
    pub ip_version: u8,
    /// One of `KIND_*`.
    pub kind: u8,
    /// `FLAG_*`.
    pub flags: u8,
}

/// What is counted for a [`FlowKey`] on one CPU in one generation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCount {
    /// Packets.
    pub packets: u64,
    /// Those of them whose sender was told before the drop. 32 bits, because a generation lasts a
    /// second.
    pub told: u32,
    /// Those of `told` whose answer is counted as well; under [`KIND_ANSWER`] the answers.
    pub answers: u32,
    /// The window that `events` belongs to.
    pub window: u32,
    /// Events sent in that window.
    pub events: u32,
}

/// Where packets are counted when the flow map is full.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct OverflowKey {
    /// As in [`FlowKey`].
    pub location: u32,
    /// As in [`FlowKey`].
    pub reason: u32,
    /// As in [`FlowKey`]; 0 for those that no classification asks for, so that nobody on the network
    /// can fill the map.
    pub protocol: u8,
    /// As in [`FlowKey`].
    pub kind: u8,
    /// As in [`FlowKey`].
    pub flags: u8,
    /// As in [`FlowKey`].
    pub ip_version: u8,
}

/// What is counted for an [`OverflowKey`] on one CPU; only ever grows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OverflowCount {
    /// Packets whose sender was not told before the drop. Apart from `told`, because the agent reads
    /// both while they are written, and neither may be subtracted from the other.
    pub untold: u64,
    /// Packets whose sender was told before the drop.
    pub told: u64,
}

/// One drop in detail.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DropEvent {
    /// What it is counted by.
    pub key: FlowKey,
    /// `CLOCK_BOOTTIME` in nanoseconds.
    pub boot_ns: u64,
    /// The generation that counted it.
    pub generation: u64,
    /// Host order; 0 if there are no ports.
    pub source_port: u16,
    /// As in the TCP header's 14th byte; 0 for other protocols.
    pub tcp_flags: u8,
    /// Whether the sender was told: [`UNTOLD`], [`TOLD`] or [`TOLD_COUNTED`].
    pub told: u8,
    /// How many bytes of `snap` are the packet's.
    pub snap_len: u16,
    /// `skb->protocol`, host order.
    pub ethertype: u16,
    /// The device's name, NUL-terminated.
    pub device: [u8; 16],
    /// The packet from its outermost IP header on.
    pub snap: [u8; SNAP_LEN],
}

/// What the agent tells the programs; one element.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// Counts up at each flip; its lowest bit says which flow map is written.
    pub generation: u64,
    /// Counts up every 100 ms while something is dropped: the limits on events begin anew.
    pub window: u32,
    /// Events that one CPU may send in one window.
    pub events_per_cpu: u32,
}

/// An answer that waits for the drop of the packet it answers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub mono_ns: u64,
    /// Address of the answer's own `sk_buff`: it passes `net_dev_queue` again on a bridge, a VLAN or
    /// a bond.
    pub skb: u64,
    /// Address of the connection's `nf_conn`, else 0.
    pub nfct: u64,
    /// Of the packet that is answered, compared where there is no conntrack entry.
    pub source: [u8; 16],
    /// As `source`.
    pub destination: [u8; 16],
    /// 1 if it is counted under [`KIND_ANSWER`].
    pub counted: u64,
}

/// Enough for IPv6 (40) with TCP's flags (14), or IPv4 with 20 bytes of DNS over UDP.
pub type Header = [u8; 64];

/// What is being found out about one packet.
///
/// It lives in a per-CPU map, not on the stack: the verifier follows every constant on the stack
/// along every path through the headers and gives up, but forgets what is written to a map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// What the packet is counted by.
    pub key: FlowKey,
    /// What is known beside it.
    pub packet: Packet,
    /// Where its bytes are.
    pub buffer: Buffer,
    /// The header at hand.
    pub header: Header,
    /// A pointer on its way to being a number.
    pub pointer: u64,
    /// An offset on its way to being forgotten by the verifier.
    pub offset: u32,
    /// Offset of the transport header from `head`; 0 if there is none.
    pub transport: u32,
    /// Zero.
    pub pad: u32,
    /// The program runs on this CPU. From 6.1 on the kernel itself keeps a program from
    /// interrupting itself.
    pub busy: u32,
}

/// What is known of a packet beside its key.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Address of the outermost IP header; 0 if there is none.
    pub address: u64,
    /// Linear bytes from there.
    pub len: u32,
    /// Host order.
    pub source_port: u16,
    /// `skb->protocol`, host order.
    pub ethertype: u16,
    /// The TCP header's 14th byte.
    pub tcp_flags: u8,
    /// 1 for a RST or an ICMP error: nobody is told of its loss.
    pub is_answer: u8,
    /// 1 if the UDP payload can begin with the header of a DNS query.
    pub is_query: u8,
    /// As in [`DropEvent`].
    pub told: u8,
    /// The id of what may be a DNS message over UDP, host order.
    pub dns_id: u16,
    /// 1 if the UDP payload can begin with the header of a DNS answer.
    pub is_response: u8,
    /// The third byte of a DNS header (RFC 1035, 4.1.1).
    pub dns_flags: u8,
}

/// Where an `sk_buff` keeps its linear bytes; offsets count from `head`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffer {
    /// Where its memory begins.
    pub head: u64,
    /// Where its bytes end.
    pub tail: u32,
    /// Where they begin, for the layer that is at work.
    pub data: u32,
    /// The MAC header, 0xffff if it is not set.
    pub mac: u32,
    /// `skb->protocol`, host order.
    pub ethertype: u32,
}

/// What each CPU keeps for itself; counts only ever grow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Drops that were counted by flow or as overflow (the others were benign by their reason).
    pub counted: u64,
    /// Flows that were new in their generation: how full the map is.
    pub inserted: u64,
    /// Packets of flows that found no room in the flow map.
    pub overflow: u64,
    /// Packets that found no room in the overflow map either, and whose sender was not told.
    pub unplaced: u64,
    /// The same, and the sender was told.
    pub unplaced_told: u64,
    /// Events that the ring buffer had no room for.
    pub ring_full: u64,
    /// Events not sent because of [`EVENTS_PER_FLOW`].
    pub limited_flow: u64,
    /// Events not sent because of [`Control::events_per_cpu`].
    pub limited_cpu: u64,
    /// Packets that had to wait for a neighbour's address: an answer may leave late.
    pub neighbour_waits: u64,
    /// Answers counted.
    pub answers_counted: u64,
    /// Answers that found no room in the flow map, so that a late one is not recognised.
    pub answers_lost: u64,
    /// The window that `events` belongs to.
    pub window: u32,
    /// Events sent in that window.
    pub events: u32,
    /// Runs that found the program already running on this CPU (before 6.1).
    pub missed: u64,
    /// What is counted about attempts.
    pub attempts: attempt::AttemptCpu,
    /// One bit for each of `answers` that is set.
    pub answers_waiting: u64,
    /// Answers that wait for their drop.
    pub answers: [Answer; ANSWER_SLOTS],
}

/// All that a CPU has: one value, because each look-up costs a nanosecond or two.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerCpu {
    /// Its counts, and the answers that wait.
    pub cpu: Cpu,
    /// The packet that is being dropped.
    pub drop: Work,
    /// The packet that is being sent; its program can interrupt the other.
    pub sent: Work,
    /// The packet that is being received.
    pub received: Work,
}

/// Offsets of kernel fields in bytes, from the running kernel's BTF; [`MISSING`] if it has none.
///
/// Rust emits no CO-RE relocations: the loader sets this read-only global before load, and the
/// verifier then sees constants.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offsets {
    /// `sk_buff.head`
    pub skb_head: u32,
    /// `sk_buff.data`
    pub skb_data: u32,
    /// `sk_buff.tail`
    pub skb_tail: u32,
    /// `sk_buff.network_header`
    pub skb_network_header: u32,
    /// `sk_buff.mac_header`
    pub skb_mac_header: u32,
    /// `sk_buff.protocol`
    pub skb_protocol: u32,
    /// `sk_buff.skb_iif`
    pub skb_iif: u32,
    /// `sk_buff.dev`
    pub skb_dev: u32,
    /// `sk_buff.sk`
    pub skb_sk: u32,
    /// `sk_buff._nfct`
    pub skb_nfct: u32,
    /// `net_device.ifindex`
    pub dev_ifindex: u32,
    /// `net_device.name`
    pub dev_name: u32,
    /// `net_device.nd_net.net`
    pub dev_net: u32,
    /// `net.ns.inum`
    pub net_inum: u32,
    /// `sock.__sk_common.skc_net.net`
    pub sock_net: u32,
    /// `sock.sk_type`
    pub sock_type: u32,
    /// `sock.sk_protocol`
    pub sock_protocol: u32,
    /// `sock.__sk_common.skc_state`
    pub sock_state: u32,
    /// `sock.__sk_common.skc_family`
    pub sock_family: u32,
    /// `sock.__sk_common.skc_num`
    pub sock_num: u32,
    /// `inet_sock.inet_sport`
    pub inet_sport: u32,
    /// `sock.__sk_common.skc_dport`
    pub sock_dport: u32,
    /// `sock.__sk_common.skc_rcv_saddr`
    pub sock_rcv_saddr: u32,
    /// `sock.__sk_common.skc_daddr`
    pub sock_daddr: u32,
    /// `sock.__sk_common.skc_v6_rcv_saddr`
    pub sock_v6_rcv_saddr: u32,
    /// `sock.__sk_common.skc_v6_daddr`
    pub sock_v6_daddr: u32,
    /// `sock.sk_err`
    pub sock_err: u32,
    /// `sock.sk_err_soft`
    pub sock_err_soft: u32,
    /// `sock.sk_cgrp_data.cgroup`, in older kernels `val` at the same place
    pub sock_cgroup: u32,
    /// `cgroup.kn`
    pub cgroup_kn: u32,
    /// `kernfs_node.id`
    pub kn_id: u32,
    /// `sk_buff.transport_header`
    pub skb_transport_header: u32,
    /// `nf_conn.status`
    pub ct_status: u32,
    /// `nf_conn.tuplehash`
    pub ct_tuplehash: u32,
    /// `nf_conn.ct_net.net`
    pub ct_net: u32,
    /// `nf_conn.proto.tcp.state`
    pub ct_tcp_state: u32,
    /// 1 if the tracepoint has the drop reason (its typedef in BTF says so; distributions
    /// backport it).
    pub has_reason: u32,
    /// The number of the reason `NO_SOCKET`; [`MISSING`] if there is none.
    pub reason_no_socket: u32,
}

impl Offsets {
    /// Nothing is known.
    pub const NONE: Self = Self {
        skb_head: MISSING,
        skb_data: MISSING,
        skb_tail: MISSING,
        skb_network_header: MISSING,
        skb_mac_header: MISSING,
        skb_protocol: MISSING,
        skb_iif: MISSING,
        skb_dev: MISSING,
        skb_sk: MISSING,
        skb_nfct: MISSING,
        dev_ifindex: MISSING,
        dev_name: MISSING,
        dev_net: MISSING,
        net_inum: MISSING,
        sock_net: MISSING,
        sock_type: MISSING,
        sock_protocol: MISSING,
        sock_state: MISSING,
        sock_family: MISSING,
        sock_num: MISSING,
        inet_sport: MISSING,
        sock_dport: MISSING,
        sock_rcv_saddr: MISSING,
        sock_daddr: MISSING,
        sock_v6_rcv_saddr: MISSING,
        sock_v6_daddr: MISSING,
        sock_err: MISSING,
        sock_err_soft: MISSING,
        sock_cgroup: MISSING,
        cgroup_kn: MISSING,
        kn_id: MISSING,
        skb_transport_header: MISSING,
        ct_status: MISSING,
        ct_tuplehash: MISSING,
        ct_net: MISSING,
        ct_tcp_state: MISSING,
        has_reason: 0,
        reason_no_socket: MISSING,
    };
}

/// One end of `struct nf_conntrack_tuple` (include/net/netfilter/nf_conntrack_tuple.h): the
/// address, the port in network order, and two bytes that differ between the ends.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TupleEnd {
    /// As in [`FlowKey`].
    pub address: [u8; 16],
    /// Network order; for ICMP the id (source) or type and code (destination).
    pub port_be: u16,
    /// Source: the family. Destination: protocol and direction.
    pub rest: [u8; 2],
}

/// `struct nf_conntrack_tuple_hash`, 5.10 to 7.2. The loader compares it with the running kernel's
/// BTF and turns conntrack off where it differs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TupleHash {
    /// `hlist_nulls_node`
    pub node: [u64; 2],
    /// Where packets of this direction come from.
    pub source: TupleEnd,
    /// Where they go to.
    pub destination: TupleEnd,
}

const _: () = assert!(size_of::<FlowKey>() == 72);
const _: () = assert!(size_of::<FlowCount>() == 24);
const _: () = assert!(size_of::<OverflowKey>() == 12);
const _: () = assert!(size_of::<OverflowCount>() == 16);
const _: () = assert!(size_of::<DropEvent>() == 72 + 8 + 8 + 8 + 16 + SNAP_LEN);
const _: () = assert!(size_of::<Control>() == 16);
const _: () = assert!(size_of::<Answer>() == 64);
const _: () =
    assert!(size_of::<Cpu>() == 14 * 8 + size_of::<attempt::AttemptCpu>() + ANSWER_SLOTS * 64);
const _: () = assert!(size_of::<Work>() == 72 + 24 + 24 + 64 + 24);
const _: () = assert!(size_of::<PerCpu>() == size_of::<Cpu>() + 3 * size_of::<Work>());
const _: () = assert!(size_of::<TupleHash>() == 56);
