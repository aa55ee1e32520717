//! Finding a packet's headers in an `sk_buff` and filling in what it is counted by.
//!
//! The path of an ordinary packet (a valid network header, no options, no extension headers, no
//! tunnel) costs one read of 64 bytes. Everything else is in functions of its own.

use core::mem::offset_of;

use whydrop_ebpf::{
    Buffer, FLAG_ENCAPSULATED, FLAG_FRAGMENT, FlowKey, Header, KIND_DNS, KIND_PACKET, KIND_SYN,
    Packet, Work,
};

use crate::access::{copy, field};
use crate::maps::offset;

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;
/// Ethernet inside GRE or Geneve.
const ETH_P_TEB: u16 = 0x6558;

/// `skb->mac_header` of a packet that has none yet (skb_mac_header_was_set, include/linux/skbuff.h).
pub const MAC_HEADER_UNSET: u32 = 0xffff;

pub const ICMP: u8 = 1;
const IPIP: u8 = 4;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
const IPV6: u8 = 41;
const GRE: u8 = 47;
pub const ICMPV6: u8 = 58;
pub const SCTP: u8 = 132;
const UDPLITE: u8 = 136;

const TCP_SYN: u8 = 0x02;
pub const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;
pub const SYN_ACK: u8 = TCP_SYN | TCP_ACK;

const PORT_DNS: u16 = 53;
const PORT_VXLAN: u16 = 4789;
/// What Linux used before IANA's, and what flannel and Cilium still use.
const PORT_VXLAN_LINUX: u16 = 8472;
const PORT_GENEVE: u16 = 6081;

/// Finds the headers of `skb` and fills in addresses, protocol, port, kind and flags. `work.key` was
/// cleared before.
///
/// # Safety
/// `skb` is the tracepoint's argument.
#[inline(always)]
pub unsafe fn read<const TYPED: bool>(skb: *const u8, work: &mut Work) {
    let ethertype = u16::from_be(unsafe { field::<u16, TYPED>(skb, offset!(skb_protocol)) });
    work.key.kind = KIND_PACKET;
    work.packet = Packet {
        ethertype,
        ..Packet::default()
    };
    work.buffer = unsafe {
        Buffer {
            head: field::<u64, TYPED>(skb, offset!(skb_head)),
            tail: field::<u32, TYPED>(skb, offset!(skb_tail)),
            data: 0,
            mac: 0,
            ethertype: ethertype.into(),
        }
    };
    work.transport = 0;
    let mut at = u32::from(unsafe { field::<u16, TYPED>(skb, offset!(skb_network_header)) });
    let plain = at != 0
        && at + 20 <= work.buffer.tail
        && load(work, at)
        && version_of(ethertype) == work.header[0] >> 4;
    if !plain {
        unsafe {
            let data = field::<u64, TYPED>(skb, offset!(skb_data));
            work.buffer.data = data.wrapping_sub(work.buffer.head) as u32;
            work.buffer.mac = u32::from(field::<u16, TYPED>(skb, offset!(skb_mac_header)));
            // What has never had a device is no packet of the network: a Unix socket's data must
            // not be taken for a frame.
            if work.buffer.mac == MAC_HEADER_UNSET
                && field::<*const u8, TYPED>(skb, offset!(skb_dev)).is_null()
            {
                return;
            }
        }
        at = search(work, at);
        at = forget(work, at);
        if at == 0 || !load(work, at) {
            return;
        }
    }
    work.packet.address = work.buffer.head + u64::from(at);
    work.packet.len = work.buffer.tail.saturating_sub(at);
    let transport = ip::<false>(work, at);
    work.transport = transport;
    if transport == 0 || !is_tunnel(&work.key) {
        return;
    }
    at = inner(work, transport);
    // Two tunnels in one another are seen in the field.
    for _ in 0..2 {
        at = forget(work, at);
        if at == 0 {
            break;
        }
        at = inside(work, at);
    }
}

/// Reads the bytes at offset `at`; also past the packet's end, which whoever looks at them checks.
#[inline(always)]
fn load(work: &mut Work, at: u32) -> bool {
    unsafe { copy(&mut work.header, work.buffer.head + u64::from(at)) }
}

/// Makes the verifier forget what it knows of an offset: with it, each path through the headers is
/// one more state to follow.
#[inline(always)]
fn forget(work: &mut Work, at: u32) -> u32 {
    unsafe {
        (&raw mut work.offset).write_volatile(at);
        (&raw const work.offset).read_volatile()
    }
}

/// The IP version that an EtherType announces; 0xff for none, which no header has.
#[inline(always)]
fn version_of(ethertype: u16) -> u8 {
    match ethertype {
        ETH_P_IP => 4,
        ETH_P_IPV6 => 6,
        _ => 0xff,
    }
}

/// Looks for the IP header where the network header is not set, or is not one: before the IP layer
/// (a driver, XDP), at a VLAN tag, at tc. Returns its offset from `head`, or 0.
#[inline(never)]
fn search(work: &Work, network: u32) -> u32 {
    let buffer = &work.buffer;
    if buffer.mac != MAC_HEADER_UNSET {
        let at = ethernet(work, buffer.mac);
        if at != 0 {
            return at;
        }
    }
    // A VLAN tag in place of the network header: two bytes of tag, then the real EtherType.
    let ethertype = buffer.ethertype as u16;
    if network != 0 && (ethertype == ETH_P_8021Q || ethertype == ETH_P_8021AD) {
        let at = behind_type(work, network + 2);
        if at != 0 {
            return at;
        }
    }
    if is_ip(work, buffer.data, version_of(ethertype)) {
        return buffer.data;
    }
    ethernet(work, buffer.data)
}

/// The IP header behind an Ethernet header at `at`, or 0.
#[inline(always)]
fn ethernet(work: &Work, at: u32) -> u32 {
    behind_type(work, at.wrapping_add(12))
}

/// The IP header behind an EtherType at `at`, over up to two VLAN tags, or 0.
#[inline(never)]
fn behind_type(work: &Work, mut at: u32) -> u32 {
    let buffer = &work.buffer;
    for _ in 0..3 {
        let mut ethertype = 0u16;
        if at.wrapping_add(2) > buffer.tail
            || !unsafe { copy(&mut ethertype, buffer.head + u64::from(at)) }
        {
            return 0;
        }
        match u16::from_be(ethertype) {
            ETH_P_8021Q | ETH_P_8021AD => at += 4,
            ethertype => {
                return if is_ip(work, at + 2, version_of(ethertype)) {
                    at + 2
                } else {
                    0
                };
            }
        }
    }
    0
}

/// Whether an IP header of this version can begin at `at`.
#[inline(always)]
fn is_ip(work: &Work, at: u32, version: u8) -> bool {
    let buffer = &work.buffer;
    let mut first = 0u8;
    at.wrapping_add(20) <= buffer.tail
        && unsafe { copy(&mut first, buffer.head + u64::from(at)) }
        && first >> 4 == version
}

/// Reads the IP header in `work.header`, which begins at offset `at`, and the transport header
/// behind it. Returns the transport header's offset; 0 where there is none to read.
#[inline(always)]
fn ip<const INNER: bool>(work: &mut Work, at: u32) -> u32 {
    let len = work.buffer.tail.saturating_sub(at);
    let Work {
        key,
        packet,
        header,
        ..
    } = work;
    if header[0] >> 4 == 4 {
        let words = header[0] & 0xf;
        if words < 5 {
            return 0;
        }
        if INNER {
            forget_outer(key, packet);
        }
        key.ip_version = 4;
        key.protocol = header[9];
        v4(&mut key.source, header, 12);
        v4(&mut key.destination, header, 16);
        // Fragment offset: only the first has the transport header.
        if be16(header, 6) & 0x1fff != 0 {
            key.flags |= FLAG_FRAGMENT;
            return 0;
        }
        if words == 5 {
            transport::<20>(header, len, key, packet);
            return at + 20;
        }
        far_transport(work, at + u32::from(words) * 4)
    } else {
        if len < 40 {
            return 0;
        }
        if INNER {
            forget_outer(key, packet);
        }
        key.ip_version = 6;
        key.protocol = header[6];
        v6(&mut key.source, header, 8);
        v6(&mut key.destination, header, 24);
        if !is_extension(header[6]) {
            transport::<40>(header, len, key, packet);
            return at + 40;
        }
        // The protocol in the low byte, whether it is a later fragment in the next, the offset
        // above.
        let end = behind_extensions(&work.buffer, at + 40, work.header[6]);
        let key = &mut work.key;
        key.protocol = end as u8;
        if end & 0x100 != 0 {
            key.flags |= FLAG_FRAGMENT;
            return 0;
        }
        far_transport(work, (end >> 16) as u32)
    }
}

/// Clears what the packet around this one left and this one may not have.
#[inline(always)]
fn forget_outer(key: &mut FlowKey, packet: &mut Packet) {
    key.flags = FLAG_ENCAPSULATED;
    key.destination_port = 0;
    key.kind = KIND_PACKET;
    packet.source_port = 0;
    packet.tcp_flags = 0;
    packet.is_answer = 0;
    packet.is_query = 0;
    packet.is_response = 0;
}

/// Reads a transport header that is not at one of the two usual places.
#[inline(always)]
fn far_transport(work: &mut Work, offset: u32) -> u32 {
    let offset = forget(work, offset);
    if offset >= work.buffer.tail || !load(work, offset) {
        return 0;
    }
    let Work {
        key,
        packet,
        header,
        buffer,
        ..
    } = work;
    transport::<0>(header, buffer.tail - offset, key, packet);
    offset
}

/// Whether an IPv6 next header is an extension header (RFC 8200, section 4).
#[inline(always)]
pub fn is_extension(next: u8) -> bool {
    matches!(next, 0 | 43 | 44 | 51 | 60 | 135)
}

/// Walks over IPv6 extension headers: the protocol (low byte), 0x100 if the packet is a fragment
/// other than the first, the transport header's offset from bit 16 on.
#[inline(never)]
fn behind_extensions(buffer: &Buffer, mut at: u32, mut next: u8) -> u64 {
    // RFC 8200 allows each once, destination options twice; eight are more than that.
    for _ in 0..8 {
        if !is_extension(next) {
            break;
        }
        let mut extension = [0u8; 8];
        if at.wrapping_add(8) > buffer.tail
            || !unsafe { copy(&mut extension, buffer.head + u64::from(at)) }
        {
            break;
        }
        let len = match next {
            44 => {
                if u16::from_be_bytes([extension[2], extension[3]]) & 0xfff8 != 0 {
                    return u64::from(extension[0]) | 0x100;
                }
                8
            }
            // AH counts in units of four (RFC 4302, 2.2).
            51 => (u32::from(extension[1]) + 2) * 4,
            _ => (u32::from(extension[1]) + 1) * 8,
        };
        next = extension[0];
        at += len;
    }
    u64::from(next) | u64::from(at) << 16
}

/// Reads ports, TCP flags, ICMP type and the kind, from a transport header at `BASE` of `header`;
/// `len` bytes of `header` (counted from its start) are the packet's.
#[inline(always)]
fn transport<const BASE: usize>(header: &Header, len: u32, key: &mut FlowKey, packet: &mut Packet) {
    let len = len.saturating_sub(BASE as u32);
    if len < 4 {
        return;
    }
    match key.protocol {
        TCP => {
            packet.source_port = be16(header, BASE);
            key.destination_port = be16(header, BASE + 2);
            if len >= 14 {
                packet.tcp_flags = header[BASE + 13];
                if packet.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN {
                    key.kind = KIND_SYN;
                }
                packet.is_answer = u8::from(packet.tcp_flags & TCP_RST != 0);
            }
        }
        UDP => {
            packet.source_port = be16(header, BASE);
            key.destination_port = be16(header, BASE + 2);
            if len >= 8 + 12 {
                packet.dns_id = be16(header, BASE + 8);
                packet.dns_flags = header[BASE + 8 + 2];
                // QR (RFC 1035, 4.1.1).
                packet.is_response = packet.dns_flags >> 7;
                packet.is_query = 1 - packet.is_response;
            }
            if key.destination_port == PORT_DNS && packet.is_query != 0 {
                key.kind = KIND_DNS;
            }
        }
        SCTP | UDPLITE => {
            packet.source_port = be16(header, BASE);
            key.destination_port = be16(header, BASE + 2);
        }
        ICMP => {
            key.destination_port = be16(header, BASE);
            // Unreachable, source quench, redirect, time exceeded, parameter problem (RFC 792).
            packet.is_answer = u8::from(matches!(header[BASE], 3 | 4 | 5 | 11 | 12));
        }
        ICMPV6 => {
            key.destination_port = be16(header, BASE);
            // RFC 4443, section 2.1: errors have a type below 128.
            packet.is_answer = u8::from(header[BASE] < 128);
        }
        _ => {}
    }
}

/// Whether the transport header can be that of a tunnel.
#[inline(always)]
fn is_tunnel(key: &FlowKey) -> bool {
    match key.protocol {
        UDP => matches!(
            key.destination_port,
            PORT_VXLAN | PORT_VXLAN_LINUX | PORT_GENEVE
        ),
        IPIP | IPV6 | GRE => true,
        _ => false,
    }
}

/// Fills in the flow of the packet at `at`, inside a tunnel, instead of the outer one's. Returns the
/// offset of the IP header inside this one, 0 if it is the innermost.
///
/// It returns something that is used, as every function here that is not inlined: the verifier
/// refuses one that leaves a pointer to its stack in the return register.
#[inline(never)]
fn inside(work: &mut Work, at: u32) -> u32 {
    if !load(work, at) {
        return 0;
    }
    let transport = ip::<true>(work, at);
    if transport == 0 || !is_tunnel(&work.key) {
        return 0;
    }
    inner(work, transport)
}

/// The IP header inside the tunnel whose transport header is at `offset`, or 0.
#[inline(never)]
fn inner(work: &Work, offset: u32) -> u32 {
    let buffer = &work.buffer;
    let mut header = [0u8; 12];
    if offset.wrapping_add(12) > buffer.tail
        || !unsafe { copy(&mut header, buffer.head + u64::from(offset)) }
    {
        return 0;
    }
    match work.key.protocol {
        IPIP if is_ip(work, offset, 4) => offset,
        IPV6 if is_ip(work, offset, 6) => offset,
        GRE => {
            // RFC 2784 and 2890: checksum, key and sequence number are four bytes each.
            let flags = u16::from_be_bytes([header[0], header[1]]);
            if flags & 0x7 != 0 {
                return 0;
            }
            let optional = (flags >> 15 & 1) + (flags >> 13 & 1) + (flags >> 12 & 1);
            let at = offset + 4 + u32::from(optional) * 4;
            behind_ethertype(work, at, u16::from_be_bytes([header[2], header[3]]))
        }
        // RFC 8926, section 3.4: the options' length is in units of four bytes.
        UDP if work.key.destination_port == PORT_GENEVE => {
            let at = offset + 16 + u32::from(header[8] & 0x3f) * 4;
            behind_ethertype(work, at, u16::from_be_bytes([header[10], header[11]]))
        }
        // RFC 7348, section 5: the I flag must be set; eight bytes, then Ethernet.
        UDP if header[8] & 0x08 != 0 => ethernet(work, offset + 16),
        _ => 0,
    }
}

/// The IP header at `at`, directly or behind Ethernet, as `ethertype` says; or 0.
#[inline(always)]
fn behind_ethertype(work: &Work, at: u32, ethertype: u16) -> u32 {
    if ethertype == ETH_P_TEB {
        ethernet(work, at)
    } else if is_ip(work, at, version_of(ethertype)) {
        at
    } else {
        0
    }
}

#[inline(always)]
fn be16(header: &Header, at: usize) -> u16 {
    u16::from_be_bytes([header[at], header[at + 1]])
}

/// Copies an IPv4 address from an offset that 4 divides: four bytes, then zeroes, as keys have it.
#[inline(always)]
fn v4(to: &mut [u8; 16], header: &Header, at: usize) {
    let to = to.as_mut_ptr().cast::<u64>();
    // By words, as everything that runs for each packet: arrays of bytes are copied one by one, and
    // zeroed by calling a loop. Both ends are aligned, see below. The address and the zeroes behind
    // it in one store: the map's look-up reads both at once, and would wait for two.
    unsafe {
        let word = u64::from(header.as_ptr().add(at).cast::<u32>().read());
        to.write(if cfg!(target_endian = "little") {
            word
        } else {
            word << 32
        });
        to.add(1).write_volatile(0);
    }
}

/// Copies an IPv6 address from an offset that 8 divides.
#[inline(always)]
fn v6(to: &mut [u8; 16], header: &Header, at: usize) {
    let (to, from) = (to.as_mut_ptr().cast::<u64>(), header.as_ptr().cast::<u64>());
    unsafe {
        to.write(from.add(at / 8).read());
        to.add(1).write(from.add(at / 8 + 1).read());
    }
}

/// Makes a key all zeroes.
#[inline(always)]
pub fn clear(key: &mut FlowKey) {
    let words = (&raw mut *key).cast::<u64>();
    for word in 0..size_of::<FlowKey>() / 8 {
        // Volatile: else it becomes a call of memset.
        unsafe { words.add(word).write_volatile(0) };
    }
}

// What is read and written by words is aligned: a map's value is, and so are these in it.
const _: () = assert!(align_of::<Work>() == 8 && offset_of!(Work, header).is_multiple_of(8));
const _: () = assert!(offset_of!(FlowKey, source).is_multiple_of(8));
const _: () = assert!(offset_of!(FlowKey, destination).is_multiple_of(8));

/// Whether an ICMP message tells its receiver that a packet was lost: unreachable, time exceeded,
/// parameter problem (RFC 792), and ICMPv6's errors (RFC 4443, section 3). A redirect does not.
#[inline(always)]
pub fn tells_of_loss(key: &FlowKey) -> bool {
    let icmp_type = key.destination_port >> 8;
    match key.protocol {
        ICMP => matches!(icmp_type, 3 | 11 | 12),
        ICMPV6 => matches!(icmp_type, 1..=4),
        _ => false,
    }
}

/// Puts the flow of the packet that an ICMP error quotes, and whether that is an answer, in the place
/// of the error's own; false if it quotes none. The error's IP header has no options where this
/// kernel made it; then there are 8 bytes of ICMP (RFC 792; RFC 4443, section 3.1).
#[inline(always)]
pub fn quoted(work: &mut Work) -> bool {
    let offset: u32 = if work.key.ip_version == 4 {
        20 + 8
    } else {
        40 + 8
    };
    if work.packet.len < offset + 20
        || !unsafe { copy(&mut work.header, work.packet.address + u64::from(offset)) }
        || work.header[0] >> 4 != work.key.ip_version
    {
        return false;
    }
    let len = work.packet.len - offset;
    let Work {
        key,
        packet,
        header,
        ..
    } = work;
    key.destination_port = 0;
    packet.is_answer = 0;
    if key.ip_version == 4 {
        key.protocol = header[9];
        v4(&mut key.source, header, 12);
        v4(&mut key.destination, header, 16);
        if header[0] & 0xf == 5 {
            transport::<20>(header, len, key, packet);
        }
    } else {
        key.protocol = header[6];
        v6(&mut key.source, header, 8);
        v6(&mut key.destination, header, 24);
        transport::<40>(header, len, key, packet);
    }
    true
}
