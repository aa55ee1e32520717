//! Finding a packet's headers in an `sk_buff` and filling in what it is counted by.
//!
//! The path of an ordinary packet (a valid network header, no options, no extension headers, no
//! tunnel) costs one read of 64 bytes. Everything else is in functions of its own.

use whydrop_ebpf::{
    FLAG_ENCAPSULATED, FLAG_FRAGMENT, FlowKey, KIND_DNS, KIND_PACKET, KIND_SYN,
};

use crate::access::{copy, field};
use crate::maps::offset;

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;
/// Ethernet inside GRE or Geneve.
const ETH_P_TEB: u16 = 0x6558;

const ICMP: u8 = 1;
const IPIP: u8 = 4;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
const IPV6: u8 = 41;
const GRE: u8 = 47;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
const UDPLITE: u8 = 136;

const TCP_SYN: u8 = 0x02;
pub const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;

const PORT_DNS: u16 = 53;
const PORT_VXLAN: u16 = 4789;
/// What Linux used before IANA's, and what flannel and Cilium still use.
const PORT_VXLAN_LINUX: u16 = 8472;
const PORT_GENEVE: u16 = 6081;

/// Enough for IPv6 (40) with TCP's flags (14), or IPv4 with 20 bytes of DNS over UDP.
pub type Header = [u8; 64];

/// Where an `sk_buff` keeps its linear bytes; offsets count from `head`.
pub struct Buffer {
    head: u64,
    tail: u32,
    data: u32,
    mac: u32,
    pub ethertype: u16,
}

/// What is known of a packet beside its key.
#[derive(Clone, Copy)]
pub struct Packet {
    /// Address of the outermost IP header; 0 if there is none.
    pub address: u64,
    /// Linear bytes from there.
    pub len: u32,
    pub source_port: u16,
    pub ethertype: u16,
    pub tcp_flags: u8,
    /// A RST or an ICMP error: nobody is told of its loss.
    pub is_answer: bool,
}

/// Where a parsed IP header ends.
struct Transport {
    /// Offset from `head`.
    offset: u32,
    protocol: u8,
}

/// Finds the headers of `skb` and fills in addresses, protocol, port, kind and flags.
///
/// # Safety
/// `skb` is the tracepoint's argument.
#[inline(always)]
pub unsafe fn read<const TYPED: bool>(skb: *const u8, key: &mut FlowKey) -> Packet {
    let mut packet = Packet {
        address: 0,
        len: 0,
        source_port: 0,
        ethertype: 0,
        tcp_flags: 0,
        is_answer: false,
    };
    key.kind = KIND_PACKET;
    let mut buffer = unsafe {
        Buffer {
            head: field::<u64, TYPED>(skb, offset!(skb_head)),
            tail: field::<u32, TYPED>(skb, offset!(skb_tail)),
            data: 0,
            mac: 0,
            ethertype: u16::from_be(field::<u16, TYPED>(skb, offset!(skb_protocol))),
        }
    };
    packet.ethertype = buffer.ethertype;
    let mut header: Header = [0; 64];
    let mut at = u32::from(unsafe { field::<u16, TYPED>(skb, offset!(skb_network_header)) });
    let plain = at != 0
        && at + 20 <= buffer.tail
        && unsafe { copy(&mut header, buffer.head + u64::from(at)) }
        && version_of(buffer.ethertype) == header[0] >> 4;
    if !plain {
        unsafe {
            buffer.data = field::<u64, TYPED>(skb, offset!(skb_data)).wrapping_sub(buffer.head) as u32;
            buffer.mac = u32::from(field::<u16, TYPED>(skb, offset!(skb_mac_header)));
        }
        at = search(&buffer, at);
        if at == 0 || !unsafe { copy(&mut header, buffer.head + u64::from(at)) } {
            return packet;
        }
    }
    packet.address = buffer.head + u64::from(at);
    packet.len = buffer.tail.saturating_sub(at);
    let Some(transport) = ip(&buffer, at, &mut header, key, &mut packet) else {
        return packet;
    };
    if is_tunnel(transport.protocol, key) {
        innermost(&buffer, transport.offset, key, &mut packet);
    }
    packet
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
fn search(buffer: &Buffer, network: u32) -> u32 {
    // 0xffff: the MAC header is not set (include/linux/skbuff.h, skb_mac_header_was_set).
    if buffer.mac != 0xffff {
        let at = ethernet(buffer, buffer.mac);
        if at != 0 {
            return at;
        }
    }
    // A VLAN tag in place of the network header: two bytes of tag, then the real EtherType.
    if network != 0 && (buffer.ethertype == ETH_P_8021Q || buffer.ethertype == ETH_P_8021AD) {
        let at = behind_type(buffer, network + 2);
        if at != 0 {
            return at;
        }
    }
    if is_ip(buffer, buffer.data, version_of(buffer.ethertype)) {
        return buffer.data;
    }
    ethernet(buffer, buffer.data)
}

/// The IP header behind an Ethernet header at `at`, or 0.
#[inline(always)]
fn ethernet(buffer: &Buffer, at: u32) -> u32 {
    behind_type(buffer, at.wrapping_add(12))
}

/// The IP header behind an EtherType at `at`, over up to two VLAN tags, or 0.
#[inline(never)]
fn behind_type(buffer: &Buffer, mut at: u32) -> u32 {
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
                return if is_ip(buffer, at + 2, version_of(ethertype)) { at + 2 } else { 0 };
            }
        }
    }
    0
}

/// Whether an IP header of this version can begin at `at`.
#[inline(always)]
fn is_ip(buffer: &Buffer, at: u32, version: u8) -> bool {
    let mut first = 0u8;
    at != 0
        && at.wrapping_add(20) <= buffer.tail
        && unsafe { copy(&mut first, buffer.head + u64::from(at)) }
        && first >> 4 == version
}

/// Reads the IP header in `header`, which begins at offset `at`, and the transport header behind
/// it. `None` where there is no transport header to read.
#[inline(always)]
fn ip(
    buffer: &Buffer,
    at: u32,
    header: &mut Header,
    key: &mut FlowKey,
    packet: &mut Packet,
) -> Option<Transport> {
    let len = buffer.tail.saturating_sub(at);
    key.source = [0; 16];
    key.destination = [0; 16];
    key.destination_port = 0;
    key.kind = KIND_PACKET;
    packet.source_port = 0;
    packet.tcp_flags = 0;
    packet.is_answer = false;
    if header[0] >> 4 == 4 {
        let words = header[0] & 0xf;
        if words < 5 {
            return None;
        }
        key.ip_version = 4;
        key.protocol = header[9];
        key.source[..4].copy_from_slice(&header[12..16]);
        key.destination[..4].copy_from_slice(&header[16..20]);
        // Fragment offset: only the first has the transport header.
        if be16(header, 6) & 0x1fff != 0 {
            key.flags |= FLAG_FRAGMENT;
            return None;
        }
        if words == 5 {
            transport::<20>(header, len, key, packet);
            return Some(Transport { offset: at + 20, protocol: key.protocol });
        }
        let offset = at + u32::from(words) * 4;
        let protocol = key.protocol;
        far_transport(buffer, offset, protocol, header, key, packet)
    } else {
        if len < 40 {
            return None;
        }
        key.ip_version = 6;
        key.protocol = header[6];
        key.source.copy_from_slice(&header[8..24]);
        key.destination.copy_from_slice(&header[24..40]);
        if !is_extension(header[6]) {
            transport::<40>(header, len, key, packet);
            return Some(Transport { offset: at + 40, protocol: key.protocol });
        }
        let end = behind_extensions(buffer, at + 40, header[6]);
        // The protocol in the low byte, whether it is a later fragment in the next, the offset above.
        let protocol = end as u8;
        key.protocol = protocol;
        if end & 0x100 != 0 {
            key.flags |= FLAG_FRAGMENT;
            return None;
        }
        far_transport(buffer, (end >> 16) as u32, protocol, header, key, packet)
    }
}

/// Reads a transport header that is not at one of the two usual places.
#[inline(always)]
fn far_transport(
    buffer: &Buffer,
    offset: u32,
    protocol: u8,
    header: &mut Header,
    key: &mut FlowKey,
    packet: &mut Packet,
) -> Option<Transport> {
    if offset >= buffer.tail || !unsafe { copy(header, buffer.head + u64::from(offset)) } {
        return None;
    }
    transport::<0>(header, buffer.tail - offset, key, packet);
    Some(Transport { offset, protocol })
}

/// Whether an IPv6 next header is an extension header (RFC 8200, section 4).
#[inline(always)]
fn is_extension(next: u8) -> bool {
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
                packet.is_answer = packet.tcp_flags & TCP_RST != 0;
            }
        }
        UDP => {
            packet.source_port = be16(header, BASE);
            key.destination_port = be16(header, BASE + 2);
            if key.destination_port == PORT_DNS && is_query::<BASE>(header, len) {
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
            packet.is_answer = matches!(header[BASE], 3 | 4 | 5 | 11 | 12);
        }
        ICMPV6 => {
            key.destination_port = be16(header, BASE);
            // RFC 4443, section 2.1: errors have a type below 128.
            packet.is_answer = header[BASE] < 128;
        }
        _ => {}
    }
}

/// Whether the UDP payload begins with the header of a DNS query: QR clear (RFC 1035, 4.1.1).
#[inline(always)]
fn is_query<const BASE: usize>(header: &Header, len: u32) -> bool {
    len >= 8 + 12 && header[BASE + 8 + 2] & 0x80 == 0
}

/// Whether the transport header can be that of a tunnel.
#[inline(always)]
fn is_tunnel(protocol: u8, key: &FlowKey) -> bool {
    match protocol {
        UDP => matches!(key.destination_port, PORT_VXLAN | PORT_VXLAN_LINUX | PORT_GENEVE),
        IPIP | IPV6 | GRE => true,
        _ => false,
    }
}

/// Follows tunnels to the innermost IP header, and fills in its flow instead of the outer one's.
#[inline(never)]
fn innermost(buffer: &Buffer, mut offset: u32, key: &mut FlowKey, packet: &mut Packet) {
    // Two tunnels in one another are seen in the field (IPsec in VXLAN is not readable anyway).
    for _ in 0..2 {
        let at = inner(buffer, offset, key.protocol, key.destination_port);
        let mut header: Header = [0; 64];
        if at == 0 || !unsafe { copy(&mut header, buffer.head + u64::from(at)) } {
            return;
        }
        key.flags = (key.flags | FLAG_ENCAPSULATED) & !FLAG_FRAGMENT;
        let Some(transport) = ip(buffer, at, &mut header, key, packet) else {
            return;
        };
        if !is_tunnel(transport.protocol, key) {
            return;
        }
        offset = transport.offset;
    }
}

/// The IP header inside the tunnel whose transport header is at `offset`, or 0.
#[inline(never)]
fn inner(buffer: &Buffer, offset: u32, protocol: u8, port: u16) -> u32 {
    let mut header = [0u8; 12];
    if offset.wrapping_add(12) > buffer.tail
        || !unsafe { copy(&mut header, buffer.head + u64::from(offset)) }
    {
        return 0;
    }
    match protocol {
        IPIP if is_ip(buffer, offset, 4) => offset,
        IPV6 if is_ip(buffer, offset, 6) => offset,
        GRE => {
            // RFC 2784 and 2890: checksum, key and sequence number are four bytes each.
            let flags = u16::from_be_bytes([header[0], header[1]]);
            if flags & 0x7 != 0 {
                return 0;
            }
            let optional = (flags >> 15 & 1) + (flags >> 13 & 1) + (flags >> 12 & 1);
            let at = offset + 4 + u32::from(optional) * 4;
            behind_ethertype(buffer, at, u16::from_be_bytes([header[2], header[3]]))
        }
        // RFC 8926, section 3.4: the options' length is in units of four bytes.
        UDP if port == PORT_GENEVE => {
            let at = offset + 16 + u32::from(header[8] & 0x3f) * 4;
            behind_ethertype(buffer, at, u16::from_be_bytes([header[10], header[11]]))
        }
        // RFC 7348, section 5: the I flag must be set; eight bytes, then Ethernet.
        UDP if header[8] & 0x08 != 0 => ethernet(buffer, offset + 16),
        _ => 0,
    }
}

/// The IP header at `at`, directly or behind Ethernet, as `ethertype` says; or 0.
#[inline(always)]
fn behind_ethertype(buffer: &Buffer, at: u32, ethertype: u16) -> u32 {
    if ethertype == ETH_P_TEB {
        ethernet(buffer, at)
    } else if is_ip(buffer, at, version_of(ethertype)) {
        at
    } else {
        0
    }
}

#[inline(always)]
fn be16(header: &Header, at: usize) -> u16 {
    u16::from_be_bytes([header[at], header[at + 1]])
}

/// Fills in the flow of the packet that an ICMP error quotes `offset` bytes into `packet`; false if
/// it quotes none. Its transport header is right behind, except after options, where ports are left.
#[inline(always)]
pub fn quoted(packet: &Packet, offset: u32, key: &mut FlowKey) -> bool {
    let mut header: Header = [0; 64];
    if packet.len < offset + 20
        || !unsafe { copy(&mut header, packet.address + u64::from(offset)) }
        || header[0] >> 4 != key.ip_version
    {
        return false;
    }
    let mut inner = *packet;
    let len = packet.len - offset;
    if key.ip_version == 4 {
        key.protocol = header[9];
        key.source[..4].copy_from_slice(&header[12..16]);
        key.destination[..4].copy_from_slice(&header[16..20]);
        if header[0] & 0xf == 5 {
            transport::<20>(&header, len, key, &mut inner);
        }
    } else {
        key.protocol = header[6];
        key.source.copy_from_slice(&header[8..24]);
        key.destination.copy_from_slice(&header[24..40]);
        transport::<40>(&header, len, key, &mut inner);
    }
    true
}
