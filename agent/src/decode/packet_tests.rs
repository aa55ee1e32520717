//! Packets made by hand; those of a real kernel are in `recorded_tests.rs`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const A4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const B4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const A6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const B6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

/// An IP packet of either family around a payload.
fn ip_packet(version: u8, number: u8, payload: &[u8]) -> Vec<u8> {
    match version {
        4 => ipv4(number, 0, &[], payload),
        _ => {
            let mut bytes = vec![0x60, 0, 0, 0];
            bytes.extend((payload.len() as u16).to_be_bytes());
            bytes.extend([number, 64]);
            bytes.extend(A6.octets());
            bytes.extend(B6.octets());
            bytes.extend(payload);
            bytes
        }
    }
}

/// `fragment` is the whole field: flags and offset.
fn ipv4(number: u8, fragment: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x40 | (5 + options.len() / 4) as u8, 0];
    bytes.extend(((20 + options.len() + payload.len()) as u16).to_be_bytes());
    bytes.extend([0, 7]);
    bytes.extend(fragment.to_be_bytes());
    bytes.extend([64, number, 0, 0]);
    bytes.extend(A4.octets());
    bytes.extend(B4.octets());
    bytes.extend(options);
    bytes.extend(payload);
    bytes
}

fn ends(version: u8) -> (IpAddr, IpAddr) {
    if version == 4 {
        (A4.into(), B4.into())
    } else {
        (A6.into(), B6.into())
    }
}

fn udp(port: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 40_000u16.to_be_bytes().to_vec();
    bytes.extend(port.to_be_bytes());
    bytes.extend((8 + payload.len() as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    bytes
}

fn tcp(port: u16, flags: u8, option_words: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 40_000u16.to_be_bytes().to_vec();
    bytes.extend(port.to_be_bytes());
    bytes.extend([
        0,
        0,
        0,
        1,
        0,
        0,
        0,
        0,
        (5 + option_words) << 4,
        flags,
        0,
        0,
        0,
        0,
        0,
        0,
    ]);
    bytes.extend(vec![1; usize::from(option_words) * 4]);
    bytes.extend(payload);
    bytes
}

fn query() -> Vec<u8> {
    b"\x12\x67\x01\0\0\x01\0\0\0\0\0\0\x02db\x04shop\0\0\x1c\0\x01".to_vec()
}

fn question() -> DnsQuestion {
    DnsQuestion {
        name: "db.shop.".into(),
        qtype: "AAAA".into(),
        id: 0x1267,
    }
}

fn ethernet_frame(vlans: &[u16], version: u8, packet: &[u8]) -> Vec<u8> {
    let mut bytes = vec![2; 12];
    for tag in vlans {
        bytes.extend(tag.to_be_bytes());
        bytes.extend([0, 5]);
    }
    bytes.extend(if version == 4 {
        [0x08, 0x00]
    } else {
        [0x86, 0xdd]
    });
    bytes.extend(packet);
    bytes
}

fn expect(version: u8, number: u8) -> Packet {
    let (source, destination) = ends(version);
    Packet {
        source,
        destination,
        protocol: Protocol(number),
        ports: None,
        tcp_flags: None,
        icmp: None,
        encapsulated: false,
        fragment: false,
        dns: None,
    }
}

/// What a prefix shows is what a longer one shows, or is absent. The flow changes only where a
/// tunnel's inner packet comes into sight, which happens at most [`TUNNELS`] times.
pub fn assert_prefixes_agree(bytes: &[u8], name: &str) {
    let mut tunnels = 0;
    let mut before: Option<Packet> = None;
    for len in 0..=bytes.len() {
        let now = parse(&bytes[..len]);
        let (Some(old), Some(new)) = (&before, &now) else {
            assert!(
                before.is_none(),
                "{name}: at {len} bytes nothing is left of {before:?}"
            );
            before = now;
            continue;
        };
        // Whatever is known stays as it was.
        let grew = |old: Option<_>, new| old.is_none() || old == new;
        let same = (old.source, old.destination) == (new.source, new.destination)
            && (old.protocol == new.protocol || is_walked(old.protocol))
            && old.encapsulated == new.encapsulated
            && (!old.fragment || new.fragment)
            && grew(old.ports, new.ports)
            && (old.tcp_flags.is_none() || old.tcp_flags == new.tcp_flags)
            && (old.icmp.is_none() || old.icmp == new.icmp)
            && (old.dns.is_none() || old.dns == new.dns);
        if !same {
            assert!(
                new.encapsulated,
                "{name}: at {len} bytes {old:?} becomes {new:?}"
            );
            tunnels += 1;
            assert!(
                tunnels <= TUNNELS,
                "{name}: at {len} bytes one tunnel too many"
            );
        }
        before = now;
    }
}

/// A next header behind which the protocol is (RFC 8200, section 4).
fn is_walked(protocol: Protocol) -> bool {
    matches!(protocol.0, 0 | 43 | 44 | 51 | 60 | 135)
}

#[test]
fn transports_of_both_families() {
    for version in [4, 6] {
        let p = |number, payload: &[u8]| parse(&ip_packet(version, number, payload)).expect("IP");
        let ports = Some((40_000, 80));
        assert_eq!(
            p(6, &tcp(80, 0x12, 3, b"")),
            Packet {
                ports,
                tcp_flags: Some(0x12),
                ..expect(version, 6)
            }
        );
        assert_eq!(
            p(17, &udp(80, b"x")),
            Packet {
                ports,
                ..expect(version, 17)
            }
        );
        assert_eq!(
            p(132, &udp(80, b"sctp")),
            Packet {
                ports,
                ..expect(version, 132)
            }
        );
        assert_eq!(
            p(136, &udp(80, b"")),
            Packet {
                ports,
                ..expect(version, 136)
            }
        );
        for number in [1, 58] {
            let icmp = Some((3, 1));
            assert_eq!(
                p(number, &[3, 1, 0, 0, 0, 0, 0, 0]),
                Packet {
                    icmp,
                    ..expect(version, number)
                }
            );
        }
        assert_eq!(p(253, &[1, 2, 3, 4]), expect(version, 253));
        assert_eq!(p(59, &[]), expect(version, 59), "no next header");
    }
}

#[test]
fn ipv4_options_and_fragments() {
    let datagram = udp(80, b"datagram");
    let whole = Packet {
        ports: Some((40_000, 80)),
        ..expect(4, 17)
    };
    for words in 0..=10 {
        assert_eq!(
            parse(&ipv4(17, 0, &vec![1; words * 4], &datagram)),
            Some(whole.clone()),
            "{words}"
        );
    }
    // More fragments; do not fragment; the reserved bit: all are first ones.
    for flags in [0x2000, 0x4000, 0x8000] {
        assert_eq!(parse(&ipv4(17, flags, &[], &datagram)), Some(whole.clone()));
    }
    for offset in [1, 0x2001, 0x1fff] {
        let later = Packet {
            fragment: true,
            ..expect(4, 17)
        };
        assert_eq!(parse(&ipv4(17, offset, &[1; 8], &datagram)), Some(later));
    }
    // A later fragment of a tunnel is no tunnel.
    let later = parse(&ipv4(4, 1, &[], &ipv4(17, 0, &[], &datagram))).expect("IP");
    assert_eq!(
        later,
        Packet {
            fragment: true,
            ..expect(4, 4)
        }
    );
}

/// An IPv6 extension header that says it is followed by `next`.
fn extension(number: u8, next: u8, words: u8) -> Vec<u8> {
    match number {
        44 => vec![next, 0, 0, 1, 0, 0, 0, 9],
        51 => {
            let mut bytes = vec![next, 4 + words * 2];
            bytes.extend(vec![0; 22 + usize::from(words) * 8]);
            bytes
        }
        // No segments left, and an experiment's type (RFC 4727), where it is a routing header.
        _ => {
            let mut bytes = vec![next, words, 253, 0, 0, 0, 0, 0];
            bytes.extend(vec![0; usize::from(words) * 8]);
            bytes
        }
    }
}

fn with_extensions(numbers: &[(u8, u8)], last: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (at, (number, words)) in numbers.iter().enumerate() {
        let next = numbers.get(at + 1).map_or(last, |(number, _)| *number);
        bytes.extend(extension(*number, next, *words));
    }
    bytes.extend(payload);
    ip_packet(
        6,
        numbers.first().map_or(last, |(number, _)| *number),
        &bytes,
    )
}

/// Every order of every choice of extension headers, also those that RFC 8200 does not recommend:
/// the programs walk over them all.
#[test]
fn ipv6_extension_headers_in_any_order() {
    let all = [0, 43, 44, 51, 60];
    let mut orders: Vec<Vec<u8>> = vec![Vec::new()];
    let mut from = 0;
    for _ in 0..all.len() {
        let upto = orders.len();
        for at in from..upto {
            for number in all {
                if !orders[at].contains(&number) {
                    orders.push([&orders[at][..], &[number]].concat());
                }
            }
        }
        from = upto;
    }
    assert_eq!(orders.len(), 326);
    let whole = Packet {
        ports: Some((40_000, 80)),
        ..expect(6, 17)
    };
    for order in orders {
        let numbers: Vec<_> = order.iter().map(|number| (*number, 0)).collect();
        let bytes = with_extensions(&numbers, 17, &udp(80, b"datagram"));
        assert_eq!(parse(&bytes), Some(whole.clone()), "{order:?}");
        assert_prefixes_agree(&bytes, &format!("{order:?}"));
    }
}

#[test]
fn ipv6_fragments() {
    let mut bytes = with_extensions(&[(0, 0), (44, 0), (60, 1)], 6, &tcp(80, 2, 0, b""));
    let first = Packet {
        ports: Some((40_000, 80)),
        tcp_flags: Some(2),
        ..expect(6, 6)
    };
    assert_eq!(parse(&bytes), Some(first));
    bytes[40 + 8 + 2..][..2].copy_from_slice(&(8u16 << 3).to_be_bytes());
    // What follows a later fragment's header is data; its next header is all that is known.
    let later = Packet {
        fragment: true,
        ..expect(6, 60)
    };
    assert_eq!(parse(&bytes), Some(later));
}

/// The bytes of a tunnel's own headers and of what is in it, with the outer protocol's number.
fn in_tunnel(tunnel: usize, version: u8, packet: &[u8]) -> (u8, Vec<u8>) {
    let ethertype = if version == 4 {
        [0x08, 0x00]
    } else {
        [0x86, 0xdd]
    };
    let frame = |vlans| ethernet_frame(vlans, version, packet);
    let vxlan = |frame: Vec<u8>| [&[8, 0, 0, 0, 0, 0, 42, 0][..], &frame].concat();
    let gre = |flags: u8, optional: usize| {
        [&[flags, 0][..], &ethertype, &vec![0; optional * 4], packet].concat()
    };
    let geneve = |words: u8, kind: [u8; 2], inner: &[u8]| {
        let head = [words, 0, kind[0], kind[1], 0, 0, 42, 0];
        udp(
            6081,
            &[&head[..], &vec![0; usize::from(words) * 4], inner].concat(),
        )
    };
    match tunnel {
        0 => (if version == 4 { 4 } else { 41 }, packet.to_vec()),
        1 => (47, gre(0, 0)),
        2 => (47, gre(0x80, 1)),
        3 => (47, gre(0x20, 1)),
        4 => (47, gre(0x10, 1)),
        5 => (47, gre(0xb0, 3)),
        6 => (47, [&[0, 0, 0x65, 0x58][..], &frame(&[])].concat()),
        7 => (17, udp(4789, &vxlan(frame(&[])))),
        8 => (17, udp(8472, &vxlan(frame(&[])))),
        9 => (17, udp(4789, &vxlan(frame(&[0x8100])))),
        10 => (17, udp(4789, &vxlan(frame(&[0x88a8, 0x8100])))),
        11 => (17, geneve(0, [0x65, 0x58], &frame(&[]))),
        12 => (17, geneve(63, [0x65, 0x58], &frame(&[0x8100]))),
        _ => (17, geneve(2, ethertype, packet)),
    }
}

const TUNNEL_KINDS: usize = 14;

#[test]
fn one_tunnel_and_two() {
    for outer in [4, 6] {
        for inner in [4, 6] {
            for tunnel in 0..TUNNEL_KINDS {
                let query = ip_packet(inner, 17, &udp(53, &query()));
                let name = format!("tunnel {tunnel}, {inner} in {outer}");
                let (number, payload) = in_tunnel(tunnel, inner, &query);
                let bytes = ip_packet(outer, number, &payload);
                let inside = Packet {
                    ports: Some((40_000, 53)),
                    encapsulated: true,
                    dns: Some(question()),
                    ..expect(inner, 17)
                };
                assert_eq!(parse(&bytes), Some(inside.clone()), "{name}");
                assert_prefixes_agree(&bytes, &name);
                for second in 0..TUNNEL_KINDS {
                    let (number, payload) = in_tunnel(second, outer, &bytes);
                    let bytes = ip_packet(inner, number, &payload);
                    assert_eq!(parse(&bytes), Some(inside.clone()), "{name}, in {second}");
                }
            }
        }
    }
}

#[test]
fn the_third_tunnel_is_not_entered() {
    let mut bytes = ip_packet(4, 6, &tcp(80, 2, 0, b""));
    for _ in 0..3 {
        bytes = ip_packet(4, 4, &bytes);
    }
    assert_eq!(
        parse(&bytes),
        Some(Packet {
            encapsulated: true,
            ..expect(4, 4)
        })
    );
}

/// What looks like a tunnel and is none keeps its own flow.
#[test]
fn no_tunnel() {
    let inner = ip_packet(4, 17, &udp(80, b""));
    let frame = ethernet_frame(&[], 4, &inner);
    let vxlan = |flags: u8| [&[flags, 0, 0, 0, 0, 0, 42, 0][..], &frame].concat();
    for (number, payload) in [
        // Without the I flag; another port; three tags; not Ethernet's type of IP.
        (17, udp(4789, &vxlan(0))),
        (17, udp(4790, &vxlan(8))),
        (
            17,
            udp(
                4789,
                &[&vxlan(8)[..20], &[0x81, 0, 0, 5].repeat(3), &frame[12..]].concat(),
            ),
        ),
        (
            17,
            udp(4789, &[&vxlan(8)[..20], &[0x08, 0x06], &inner].concat()),
        ),
        // GRE version 1 is PPTP's (RFC 2637).
        (47, [&[0, 1, 8, 0][..], &inner].concat()),
        (47, [&[0, 0, 8, 6][..], &inner].concat()),
        // The header's version is not the protocol's.
        (4, ip_packet(6, 17, &udp(80, b""))),
        (41, inner.clone()),
        // Too little for a header.
        (4, inner[..19].to_vec()),
    ] {
        let packet = parse(&ip_packet(4, number, &payload)).expect("IP");
        assert!(
            !packet.encapsulated && packet.dns.is_none(),
            "{number} {payload:x?}: {packet:?}"
        );
        assert_eq!((packet.source, packet.protocol.0), (A4.into(), number));
    }
}

#[test]
fn dns_over_udp_and_tcp() {
    for version in [4, 6] {
        let message = query();
        let over_tcp = [&(message.len() as u16).to_be_bytes()[..], &message].concat();
        for words in [0, 3, 10] {
            let segment = ip_packet(version, 6, &tcp(53, 0x18, words, &over_tcp));
            assert_eq!(
                parse(&segment).expect("IP").dns,
                Some(question()),
                "{words} words of options"
            );
        }
        let datagram = ip_packet(version, 17, &udp(53, &message));
        assert_eq!(parse(&datagram).expect("IP").dns, Some(question()));
        // After DNAT a query can have any port; which datagrams are queries the programs decide.
        let translated = ip_packet(version, 17, &udp(5353, &message));
        assert_eq!(parse(&translated).expect("IP").dns, Some(question()));
        let other = ip_packet(version, 6, &tcp(5353, 0x18, 0, &over_tcp));
        assert_eq!(parse(&other).expect("IP").dns, None);
        let mut answer = message.clone();
        answer[2] |= 0x80;
        assert_eq!(
            parse(&ip_packet(version, 17, &udp(53, &answer)))
                .expect("IP")
                .dns,
            None
        );
    }
}

/// Lengths that disagree with one another or with the bytes.
#[test]
fn crossed_lengths() {
    let whole = ipv4(17, 0, &[], &udp(53, &query()));
    let set = |at: usize, value: u16| {
        let mut bytes = whole.clone();
        bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
        parse(&bytes)
    };
    let full = Packet {
        ports: Some((40_000, 53)),
        dns: Some(question()),
        ..expect(4, 17)
    };
    // Longer than the bytes, as a packet that was cut; shorter than its own header, or zero as with
    // segmentation offload.
    for length in [1_500, u16::MAX, 0, 19] {
        assert_eq!(set(2, length), Some(full.clone()), "total length {length}");
    }
    // What follows the packet's end is not the packet's: padding of a short frame.
    assert_eq!(set(2, 20), Some(expect(4, 17)));
    assert_eq!(
        set(2, 28),
        Some(Packet {
            dns: None,
            ..full.clone()
        })
    );
    // The UDP length is nobody's but UDP's.
    for length in [0, 7, 8, 9, u16::MAX] {
        assert_eq!(set(24, length), Some(full.clone()), "UDP length {length}");
    }
    // A header longer than all the bytes, and one shorter than a header is.
    let mut bytes = whole[..28].to_vec();
    bytes[0] = 0x4f;
    assert!(parse(&bytes).is_none_or(|packet| packet == expect(4, 17)));
    for words in 0..5 {
        bytes[0] = 0x40 | words;
        assert_eq!(parse(&bytes), None, "{words} words");
    }
    let whole = ip_packet(6, 17, &udp(53, &query()));
    let full = Packet {
        ports: Some((40_000, 53)),
        dns: Some(question()),
        ..expect(6, 17)
    };
    for length in [1_500, u16::MAX, 0] {
        let mut bytes = whole.clone();
        bytes[4..6].copy_from_slice(&u16::to_be_bytes(length));
        assert_eq!(parse(&bytes), Some(full.clone()), "payload length {length}");
    }
    // An extension header, a TCP header and Geneve options that reach past the end.
    let long = with_extensions(&[(60, 0)], 17, &udp(53, &query()));
    let mut bytes = long.clone();
    bytes[41] = 200;
    let packet = parse(&bytes).expect("IP");
    assert!(packet.ports.is_none() && packet.dns.is_none(), "{packet:?}");
    let mut segment = tcp(53, 0x18, 0, &query());
    segment[12] = 0xf0;
    let packet = parse(&ipv4(6, 0, &[], &segment)).expect("IP");
    assert_eq!((packet.ports, packet.dns), (Some((40_000, 53)), None));
    let mut datagram = udp(6081, &[0; 16]);
    datagram[8] = 0x3f;
    assert!(
        !parse(&ipv4(17, 0, &[], &datagram))
            .expect("IP")
            .encapsulated
    );
}

#[test]
fn what_is_no_ip_is_nothing() {
    for bytes in [
        &[][..],
        &[0x45],
        &[0x45; 19],
        &[0x60; 39],
        &[0; 64],
        &[0x50; 64],
        &[0xff; 64],
    ] {
        assert_eq!(parse(bytes), None, "{bytes:x?}");
    }
}

/// Any packet that this file can make.
fn any_packet() -> impl Strategy<Value = Vec<u8>> {
    let transport = prop_oneof![
        (any::<u16>(), any::<u8>(), 0u8..=10, vec(any::<u8>(), 0..40))
            .prop_map(|(port, flags, words, payload)| (6, tcp(port, flags, words, &payload))),
        (any::<u16>(), vec(any::<u8>(), 0..60)).prop_map(|(port, p)| (17, udp(port, &p))),
        Just((17, udp(53, &query()))),
        // Not empty: an IPv6 payload length of 0 means that it is not told.
        (any::<u8>(), vec(any::<u8>(), 1..60)),
    ];
    let extensions = vec(
        (
            prop::sample::select(&[0u8, 43, 44, 51, 60, 135][..]),
            0u8..3,
        ),
        0..5,
    );
    let inner = (transport, extensions, any::<bool>(), 0usize..=10).prop_map(
        |((number, payload), extensions, v4, words)| {
            if v4 {
                ipv4(number, 0, &vec![1; words * 4], &payload)
            } else {
                with_extensions(&extensions, number, &payload)
            }
        },
    );
    (inner, vec((0..TUNNEL_KINDS, any::<bool>()), 0..4)).prop_map(|(mut bytes, tunnels)| {
        for (tunnel, v4) in tunnels {
            let (number, payload) = in_tunnel(tunnel, bytes[0] >> 4, &bytes);
            bytes = ip_packet(if v4 { 4 } else { 6 }, number, &payload);
        }
        bytes
    })
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..600)) {
        let _ = parse(&bytes);
    }

    /// Bytes that at least begin like a packet get further than random ones.
    #[test]
    fn damaged_packets_never_panic(
        mut bytes in any_packet(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        keep in any::<prop::sample::Index>(),
    ) {
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = parse(&bytes[..keep.index(bytes.len() + 1)]);
        let _ = parse(&bytes);
    }

    #[test]
    fn prefixes_of_any_packet_agree(bytes in any_packet()) {
        assert_prefixes_agree(&bytes, &format!("{bytes:x?}"));
    }

    /// What is sent behind a packet's end changes nothing.
    #[test]
    fn padding_is_not_read(bytes in any_packet(), padding in vec(any::<u8>(), 0..40)) {
        let padded = [&bytes[..], &padding].concat();
        prop_assert_eq!(parse(&padded), parse(&bytes));
    }

    #[test]
    fn ports_and_flags_are_those_sent(
        source in any::<u16>(), port in any::<u16>(), flags in any::<u8>(), v4 in any::<bool>(),
    ) {
        let mut segment = tcp(port, flags, 0, b"");
        segment[..2].copy_from_slice(&source.to_be_bytes());
        let packet = parse(&ip_packet(if v4 { 4 } else { 6 }, 6, &segment)).expect("IP");
        prop_assert_eq!((packet.ports, packet.tcp_flags), (Some((source, port)), Some(flags)));
    }
}
