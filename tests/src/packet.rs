//! Packets as bytes, also those that no socket would send.
//!
//! Lengths and checksums are right unless the caller cuts the result, so that nothing but the
//! dropper under test has a reason to drop them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IP protocol numbers (IANA).
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// IPv4 in IP.
    pub const IPIP: u8 = 4;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 in IP.
    pub const IPV6: u8 = 41;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// GRE.
    pub const GRE: u8 = 47;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// TCP flags (RFC 9293, section 3.1).
pub mod flags {
    /// SYN.
    pub const SYN: u8 = 0x02;
    /// RST.
    pub const RST: u8 = 0x04;
    /// ACK.
    pub const ACK: u8 = 0x10;
}

/// EtherType of an IP family.
pub fn ether_type(address: IpAddr) -> u16 {
    if address.is_ipv4() { 0x0800 } else { 0x86dd }
}

/// What an IP header may say besides addresses and protocol.
#[derive(Clone, Debug)]
pub struct IpOptions {
    /// Time to live or hop limit.
    pub ttl: u8,
    /// IPv4: do not fragment.
    pub dont_fragment: bool,
    /// IPv4: offset in bytes (a multiple of 8) and "more fragments".
    pub fragment: (u16, bool),
    /// IPv4: bytes of options, a multiple of 4.
    pub options: Vec<u8>,
}

impl Default for IpOptions {
    fn default() -> Self {
        Self {
            ttl: 64,
            dont_fragment: false,
            fragment: (0, false),
            options: Vec::new(),
        }
    }
}

/// An IP packet of the addresses' family. `protocol` is the first next-header value for IPv6.
///
/// # Panics
/// If the families differ or the packet is longer than 65,535 bytes.
pub fn ip(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    ip_with(
        source,
        destination,
        protocol,
        &IpOptions::default(),
        payload,
    )
}

/// As [`ip`], with options of the header.
///
/// # Panics
/// As [`ip`].
pub fn ip_with(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    options: &IpOptions,
    payload: &[u8],
) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ipv4(source, destination, protocol, options, payload)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ipv6(source, destination, protocol, options.ttl, payload)
        }
        _ => panic!("{source} and {destination} are of different families"),
    }
}

/// RFC 791, section 3.1.
fn ipv4(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    options: &IpOptions,
    payload: &[u8],
) -> Vec<u8> {
    let header = 20 + options.options.len();
    let (offset, more) = options.fragment;
    let fragment = (offset / 8)
        | if more { 0x2000 } else { 0 }
        | if options.dont_fragment { 0x4000 } else { 0 };
    let mut bytes = vec![0x40 | (header / 4) as u8, 0];
    bytes.extend(length(header + payload.len()));
    bytes.extend(0x1234_u16.to_be_bytes());
    bytes.extend(fragment.to_be_bytes());
    bytes.extend([options.ttl, protocol, 0, 0]);
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    bytes.extend(&options.options);
    let sum = checksum(&bytes);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// RFC 8200, section 3.
fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, next: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x60, 0, 0, 0];
    bytes.extend(length(payload.len()));
    bytes.extend([next, hops]);
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    bytes.extend(payload);
    bytes
}

/// An IPv6 extension header of 8 bytes of padding options (hop-by-hop or destination options,
/// RFC 8200, section 4.2), then what follows.
pub fn extension(next: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![next, 0, 1, 4, 0, 0, 0, 0];
    bytes.extend(rest);
    bytes
}

/// An IPv6 fragment header (RFC 8200, section 4.5), then what follows.
pub fn fragment(next: u8, offset: u16, more: bool, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![next, 0];
    bytes.extend((offset & !7 | u16::from(more)).to_be_bytes());
    bytes.extend([0, 0, 0x12, 0x34]);
    bytes.extend(rest);
    bytes
}

/// A UDP datagram; the addresses are for its checksum.
pub fn udp(source: (IpAddr, u16), destination: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    let mut bytes = ports(source.1, destination.1);
    bytes.extend(length(8 + payload.len()));
    bytes.extend([0, 0]);
    bytes.extend(payload);
    let sum = transport_checksum(source.0, destination.0, protocol::UDP, &bytes);
    bytes[6..8].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// A TCP segment without data.
pub fn tcp(source: (IpAddr, u16), destination: (IpAddr, u16), flags: u8) -> Vec<u8> {
    let mut bytes = ports(source.1, destination.1);
    bytes.extend(1_u32.to_be_bytes());
    bytes.extend(u32::from(flags & flags::ACK != 0).to_be_bytes());
    bytes.extend([5 << 4, flags, 0x20, 0, 0, 0, 0, 0]);
    let sum = transport_checksum(source.0, destination.0, protocol::TCP, &bytes);
    bytes[16..18].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// A TCP segment without data in its IP packet.
pub fn segment(source: (IpAddr, u16), destination: (IpAddr, u16), flags: u8) -> Vec<u8> {
    let tcp = tcp(source, destination, flags);
    ip(source.0, destination.0, protocol::TCP, &tcp)
}

/// A UDP datagram in its IP packet.
pub fn datagram(source: (IpAddr, u16), destination: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    let udp = udp(source, destination, payload);
    ip(source.0, destination.0, protocol::UDP, &udp)
}

/// An SCTP common header (RFC 9260, section 3.1) with an INIT chunk; its CRC is left zero, which
/// nothing on the way looks at.
pub fn sctp(source_port: u16, destination_port: u16) -> Vec<u8> {
    let mut bytes = ports(source_port, destination_port);
    bytes.extend([0; 8]);
    bytes.extend([
        1, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1,
    ]);
    bytes
}

/// An echo request of the addresses' family.
pub fn echo_request(source: IpAddr, destination: IpAddr, sequence: u16) -> Vec<u8> {
    let mut body = vec![0x77, 0x64];
    body.extend(sequence.to_be_bytes());
    body.extend(*b"whydrop!");
    icmp(
        source,
        destination,
        if source.is_ipv4() { 8 } else { 128 },
        &body,
    )
}

/// An ICMP or ICMPv6 message of a type with code 0; `body` begins behind the checksum.
pub fn icmp(source: IpAddr, destination: IpAddr, icmp_type: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![icmp_type, 0, 0, 0];
    bytes.extend(body);
    let sum = if source.is_ipv4() {
        checksum(&bytes)
    } else {
        transport_checksum(source, destination, protocol::ICMPV6, &bytes)
    };
    bytes[2..4].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// GRE without options (RFC 2784) around a packet of an EtherType.
pub fn gre(ether_type: u16, inner: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0];
    bytes.extend(ether_type.to_be_bytes());
    bytes.extend(inner);
    bytes
}

/// VXLAN (RFC 7348) around a frame.
pub fn vxlan(vni: u32, frame: &[u8]) -> Vec<u8> {
    let mut bytes = vec![8, 0, 0, 0];
    bytes.extend((vni << 8).to_be_bytes());
    bytes.extend(frame);
    bytes
}

/// Geneve (RFC 8926) with one option of 4 bytes around a frame.
pub fn geneve(vni: u32, frame: &[u8]) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0x65, 0x58];
    bytes.extend((vni << 8).to_be_bytes());
    bytes.extend([0, 1, 1, 1, 0, 0, 0, 0]);
    bytes.extend(frame);
    bytes
}

/// An Ethernet frame, with an 802.1Q tag for each VLAN.
pub fn ethernet(
    source: [u8; 6],
    destination: [u8; 6],
    vlans: &[u16],
    ether_type: u16,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = destination.to_vec();
    bytes.extend(source);
    for vlan in vlans {
        bytes.extend([0x81, 0]);
        bytes.extend(vlan.to_be_bytes());
    }
    bytes.extend(ether_type.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A DNS query with recursion desired (RFC 1035, section 4.1) for a name without its final dot;
/// `qtype` 1 is A, 28 is AAAA.
///
/// # Panics
/// If a label is longer than 63 bytes.
pub fn dns_query(id: u16, name: &str, qtype: u16) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        assert!(label.len() < 64, "label {label:?} is longer than 63 bytes");
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend(qtype.to_be_bytes());
    bytes.extend([0, 1]);
    bytes
}

fn ports(source: u16, destination: u16) -> Vec<u8> {
    let mut bytes = source.to_be_bytes().to_vec();
    bytes.extend(destination.to_be_bytes());
    bytes
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes)
        .expect("a packet of at most 65,535 bytes")
        .to_be_bytes()
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The same with a pseudo header (RFC 768; RFC 8200, section 8.1); zero is sent as all ones.
fn transport_checksum(source: IpAddr, destination: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    let mut bytes = Vec::new();
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => bytes.extend(address.octets()),
            IpAddr::V6(address) => bytes.extend(address.octets()),
        }
    }
    bytes.extend([0, protocol]);
    bytes.extend(length(segment.len()));
    bytes.extend(segment);
    match checksum(&bytes) {
        0 => 0xffff,
        sum => sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_verify() {
        let (a, b): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let packet = ip(a, b, protocol::UDP, &udp((a, 1), (b, 2), b"odd"));
        assert_eq!(checksum(&packet[..20]), 0);
        let mut pseudo = packet[12..20].to_vec();
        pseudo.extend([0, protocol::UDP, 0, 11]);
        pseudo.extend(&packet[20..]);
        assert_eq!(checksum(&pseudo), 0);
    }

    /// The example of RFC 1071, section 3.
    #[test]
    fn checksum_is_that_of_the_rfc() {
        assert_eq!(checksum(&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    #[test]
    fn dns_query_is_as_on_the_wire() {
        assert_eq!(
            dns_query(0x1267, "pg.db", 28),
            b"\x12\x67\x01\0\0\x01\0\0\0\0\0\0\x02pg\x02db\0\0\x1c\0\x01"
        );
    }
}
