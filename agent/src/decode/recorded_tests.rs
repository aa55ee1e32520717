//! Packets that a real kernel dropped: what the programs made of them, what the parser makes of
//! them, and what had been sent. See `fixtures/README.md`.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Deserialize;
use whydrop_ebpf::{DropEvent, FLAG_ENCAPSULATED, FLAG_FRAGMENT, SNAP_LEN};

use super::packet::{self, Packet};
use super::{Decoder, Flow, Names, flow, kind};
use crate::event::{DnsQuestion, Kind, Outcome, Protocol};
use crate::source::sys;

#[derive(Deserialize)]
struct Index {
    packets: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    name: String,
    expected: Expected,
}

/// What was sent.
#[derive(Deserialize)]
struct Expected {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    ports: Option<(u16, u16)>,
    tcp_flags: Option<u8>,
    icmp: Option<(u8, u8)>,
    encapsulated: bool,
    fragment: bool,
    kind: Kind,
    dns: Option<DnsQuestion>,
}

/// A recorded packet.
pub(super) struct Recorded {
    pub name: String,
    pub event: DropEvent,
    expected: Expected,
}

impl Recorded {
    /// The packet from its outermost IP header on.
    pub fn bytes(&self) -> &[u8] {
        &self.event.snap[..usize::from(self.event.snap_len)]
    }

    /// What the parser must say.
    pub fn packet(&self) -> Packet {
        let e = &self.expected;
        Packet {
            source: e.source,
            destination: e.destination,
            protocol: Protocol(e.protocol),
            ports: e.ports,
            tcp_flags: e.tcp_flags,
            icmp: e.icmp,
            encapsulated: e.encapsulated,
            fragment: e.fragment,
            dns: e.dns.clone(),
        }
    }
}

/// All of them.
pub(super) fn all() -> Vec<Recorded> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/decode/fixtures");
    let index = std::fs::read(folder.join("index.json")).expect("the index");
    let index: Index = serde_json::from_slice(&index).expect("the index is JSON");
    assert!(index.packets.len() > 100, "{} packets", index.packets.len());
    let read = |Entry { name, expected }| {
        let bytes =
            std::fs::read(folder.join(format!("events/{name}.bin"))).expect("a recorded packet");
        let event = event(&bytes);
        assert_eq!(
            bytes.len(),
            size_of::<DropEvent>() - SNAP_LEN + usize::from(event.snap_len),
            "{name} was recorded with another layout of DropEvent"
        );
        Recorded {
            name,
            event,
            expected,
        }
    };
    index.packets.into_iter().map(read).collect()
}

/// An event whose packet's end may be missing.
fn event(bytes: &[u8]) -> DropEvent {
    let mut whole = bytes.to_vec();
    whole.resize(size_of::<DropEvent>(), 0);
    sys::read(&whole).expect("enough bytes")
}

fn decoder() -> Decoder {
    // As Linux 6.18 numbers them.
    let reasons = [(12, "NETFILTER_DROP"), (73, "TC_INGRESS")];
    let reasons: HashMap<_, _> = reasons
        .into_iter()
        .map(|(n, s)| (n, Arc::from(s)))
        .collect();
    Decoder::new(
        Names {
            reasons,
            has_reasons: true,
        },
        Box::new(|address| (address != 0).then(|| Arc::from("somewhere"))),
    )
}

#[test]
fn the_parser_reads_what_was_sent() {
    for recorded in all() {
        assert_eq!(
            packet::parse(recorded.bytes()),
            Some(recorded.packet()),
            "{}",
            recorded.name
        );
    }
}

#[test]
fn the_programs_read_what_was_sent() {
    for Recorded {
        name,
        event,
        expected,
    } in all()
    {
        let key = event.key;
        let flow = flow(&key).unwrap_or_else(|| panic!("{name} has no flow"));
        assert_eq!(
            (flow.source, flow.destination),
            (expected.source, expected.destination),
            "{name}"
        );
        assert_eq!(flow.protocol.0, expected.protocol, "{name}");
        let (source_port, port) = expected.ports.unwrap_or_default();
        assert_eq!(event.source_port, source_port, "{name}");
        let [icmp_type, code] = key.destination_port.to_be_bytes();
        match expected.icmp {
            Some(icmp) => assert_eq!((icmp_type, code), icmp, "{name}"),
            None => assert_eq!(key.destination_port, port, "{name}"),
        }
        assert_eq!(event.tcp_flags, expected.tcp_flags.unwrap_or(0), "{name}");
        assert_eq!(
            key.flags & FLAG_ENCAPSULATED != 0,
            expected.encapsulated,
            "{name}"
        );
        assert_eq!(key.flags & FLAG_FRAGMENT != 0, expected.fragment, "{name}");
        assert_eq!(kind(key.kind), expected.kind, "{name}");
    }
}

#[test]
fn the_decoder_shows_what_was_sent() {
    let mut decoder = decoder();
    for Recorded {
        name,
        event,
        expected,
    } in all()
    {
        let drop = decoder
            .event(&event, |_| Timestamp::UNIX_EPOCH)
            .unwrap_or_else(|| panic!("{name} is no loss"));
        assert_eq!(drop.outcome, Outcome::Dropped, "{name}");
        assert_eq!((drop.packets, drop.kind), (1, expected.kind), "{name}");
        let protocol = Protocol(expected.protocol);
        let ports = expected.ports.filter(|_| protocol.has_ports());
        let flow = Flow {
            source: expected.source,
            source_port: ports.map(|p| p.0),
            destination: expected.destination,
            destination_port: ports.map(|p| p.1),
            protocol,
            original_destination: None,
            icmp: expected.icmp,
        };
        assert_eq!(drop.flow, Some(flow), "{name}");
        assert_eq!(drop.tcp_flags, expected.tcp_flags, "{name}");
        assert_eq!(drop.dns, expected.dns, "{name}");
        let reason = if name.contains("frame") {
            "TC_INGRESS"
        } else {
            "NETFILTER_DROP"
        };
        assert_eq!(drop.site.reason.as_deref(), Some(reason), "{name}");
        assert_eq!(drop.site.location.as_deref(), Some("somewhere"), "{name}");
        assert!(drop.site.netns.is_some(), "{name}");
        assert_eq!(drop.site.interface.as_deref(), Some("to-client"), "{name}");
    }
}

/// What a prefix shows is what the whole packet shows, or is absent.
#[test]
fn every_prefix_agrees_with_the_whole() {
    for recorded in all() {
        super::packet::tests::assert_prefixes_agree(recorded.bytes(), &recorded.name);
    }
}

/// An event whose packet was cut anywhere still has the flow of its key.
#[test]
fn a_cut_event_keeps_its_flow() {
    let mut decoder = decoder();
    for recorded in all() {
        let whole = decoder
            .event(&recorded.event, |_| Timestamp::UNIX_EPOCH)
            .expect("a loss");
        for len in 0..recorded.event.snap_len {
            let mut event = DropEvent {
                snap_len: len,
                ..recorded.event
            };
            event.snap[usize::from(len)..].fill(0xa5);
            let cut = decoder
                .event(&event, |_| Timestamp::UNIX_EPOCH)
                .expect("a loss");
            assert_eq!(cut.flow, whole.flow, "{} {len}", recorded.name);
            assert!(
                cut.dns.is_none() || cut.dns == whole.dns,
                "{} {len}",
                recorded.name
            );
        }
    }
}
