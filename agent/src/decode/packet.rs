//! A packet's bytes, from its outermost IP header on, read to the innermost flow.
//!
//! The programs have read the same headers for the counts (`agent-ebpf/src/packet.rs`); here they
//! are read once more, by other code, for what counts do not need and to notice where the two
//! disagree.

use std::net::IpAddr;

use etherparse::{Ipv6ExtensionSlice, LaxIpSlice};

use super::dns;
use crate::event::{DnsQuestion, Protocol};

/// One inside the other: as many tunnels as the programs follow.
const TUNNELS: usize = 2;
const PORT_DNS: u16 = 53;

/// The innermost flow of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Who sent it.
    pub source: IpAddr,
    /// Who should receive it.
    pub destination: IpAddr,
    /// The transport protocol.
    pub protocol: Protocol,
    /// Source and destination port, where the packet has and shows them.
    pub ports: Option<(u16, u16)>,
    /// The TCP header's flags.
    pub tcp_flags: Option<u8>,
    /// Type and code of ICMP and ICMPv6.
    pub icmp: Option<(u8, u8)>,
    /// It was inside VXLAN, Geneve, GRE or IPIP.
    pub encapsulated: bool,
    /// A fragment other than the first.
    pub fragment: bool,
    /// The question of a DNS query over UDP or TCP port 53.
    pub dns: Option<DnsQuestion>,
}

/// Reads a packet that may be cut short anywhere; `None` if not even its IP header is there.
pub fn parse(bytes: &[u8]) -> Option<Packet> {
    let (mut packet, mut payload) = ip(bytes)?;
    for _ in 0..TUNNELS {
        let Some(inside) = inner(&packet, payload) else {
            break;
        };
        let Some((next, rest)) = ip(inside) else {
            break;
        };
        packet = Packet {
            encapsulated: true,
            ..next
        };
        payload = rest;
    }
    packet.dns = match (packet.protocol, packet.ports) {
        (Protocol::UDP, Some(_)) => payload.get(8..).and_then(dns::question),
        // RFC 1035, 4.2.2: over TCP the message follows its length.
        (Protocol::TCP, Some((_, PORT_DNS))) => {
            let header = usize::from(payload.get(12).copied().unwrap_or(0) >> 4) * 4;
            payload.get(header + 2..).and_then(dns::question)
        }
        _ => None,
    };
    Some(packet)
}

/// The packet at `bytes`, and what follows its IP headers.
fn ip(bytes: &[u8]) -> Option<(Packet, &[u8])> {
    let (slice, _) = LaxIpSlice::from_slice(bytes).ok()?;
    let payload = slice.payload().payload;
    let fragment = match &slice {
        LaxIpSlice::Ipv4(v4) => v4.header().fragments_offset().value() != 0,
        LaxIpSlice::Ipv6(v6) => v6.extensions().clone().into_iter().any(|extension| {
            matches!(extension, Ipv6ExtensionSlice::Fragment(f) if f.fragment_offset().value() != 0)
        }),
    };
    let mut packet = Packet {
        source: slice.source_addr(),
        destination: slice.destination_addr(),
        protocol: Protocol(slice.payload_ip_number().0),
        ports: None,
        tcp_flags: None,
        icmp: None,
        encapsulated: false,
        fragment,
        dns: None,
    };
    if !fragment {
        transport(&mut packet, payload);
    }
    Some((packet, payload))
}

fn transport(packet: &mut Packet, payload: &[u8]) {
    let [a, b, c, d, ..] = *payload else { return };
    match packet.protocol {
        // UDP-Lite (136) has UDP's ports.
        Protocol::TCP | Protocol::UDP | Protocol::SCTP | Protocol(136) => {
            packet.ports = Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])));
            if packet.protocol == Protocol::TCP {
                packet.tcp_flags = payload.get(13).copied();
            }
        }
        Protocol::ICMP | Protocol::ICMPV6 => packet.icmp = Some((a, b)),
        _ => {}
    }
}

/// The IP packet inside a tunnel, `None` if this is none.
fn inner<'a>(packet: &Packet, payload: &'a [u8]) -> Option<&'a [u8]> {
    if packet.fragment {
        return None;
    }
    match (packet.protocol.0, packet.ports) {
        (4, _) => of_version(payload, 4),
        (41, _) => of_version(payload, 6),
        (47, _) => {
            // RFC 2784 and 2890: checksum, key and sequence number are four bytes each.
            let flags = be16(payload, 0)?;
            if flags & 7 != 0 {
                return None;
            }
            let optional = [15, 13, 12]
                .iter()
                .filter(|bit| flags >> *bit & 1 == 1)
                .count();
            behind_ethertype(payload.get(4 + 4 * optional..)?, be16(payload, 2)?)
        }
        // RFC 8926, section 3.4.
        (17, Some((_, 6081))) => {
            let options = usize::from(payload.get(8)? & 0x3f) * 4;
            behind_ethertype(payload.get(16 + options..)?, be16(payload, 10)?)
        }
        // RFC 7348, section 5: the I flag must be set. 8472 is what Linux used before IANA's port.
        (17, Some((_, 4789 | 8472))) if payload.get(8)? & 8 != 0 => ethernet(payload.get(16..)?),
        _ => None,
    }
}

/// The IP packet in an Ethernet frame, over up to two VLAN tags.
fn ethernet(frame: &[u8]) -> Option<&[u8]> {
    let mut at = 12;
    for _ in 0..3 {
        match be16(frame, at)? {
            0x8100 | 0x88a8 => at += 4,
            ethertype => return behind_ethertype(frame.get(at + 2..)?, ethertype),
        }
    }
    None
}

fn behind_ethertype(bytes: &[u8], ethertype: u16) -> Option<&[u8]> {
    match ethertype {
        0x0800 => of_version(bytes, 4),
        0x86dd => of_version(bytes, 6),
        0x6558 => ethernet(bytes),
        _ => None,
    }
}

fn of_version(bytes: &[u8], version: u8) -> Option<&[u8]> {
    (bytes.len() >= 20 && bytes[0] >> 4 == version).then_some(bytes)
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

#[cfg(test)]
#[path = "packet_tests.rs"]
mod tests;
