//! Enrich: from addresses to names.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;

use crate::cluster::Index;
use crate::decode::attempt::Attempt;
use crate::decode::{Drop, Flow};
use crate::event::{Cause, Endpoint, EndpointKind, Event, Kind, Outcome, Protocol};

/// The flag of a TCP header (RFC 9293, section 3.1).
const SYN: u8 = 0x02;

/// Names a drop's two ends as they were when it happened.
///
/// The destination is the real one, after DNAT; its `service` is what the sender asked for: the
/// Service of [`Flow::original_destination`], or, of a packet that was dropped before DNAT, the
/// one at its own address. A source has no `service` but where its address is the Service's own.
pub fn enrich(drop: Drop, index: &Index, node: &Arc<str>) -> Event {
    let protocol = drop.flow.map(|flow| flow.protocol);
    let (source, destination) = match &drop.flow {
        Some(flow) => name(flow, index, drop.time),
        None => Default::default(),
    };
    Event {
        time: drop.time,
        node: node.clone(),
        kind: drop.kind,
        outcome: drop.outcome,
        packets: drop.packets,
        protocol,
        ip_version: drop.flow.map(|flow| match flow.source.to_canonical() {
            IpAddr::V4(_) => 4,
            IpAddr::V6(_) => 6,
        }),
        tcp_flags: drop
            .tcp_flags
            .filter(|_| protocol == Some(Protocol::TCP))
            .map(tcp_flags),
        source,
        destination,
        waited_seconds: None,
        cause: None,
        dns: drop.dns,
        drop: Some(drop.site),
        explanation: None,
    }
}

/// Names an attempt's two ends as they were when it began, which is when the sender chose them;
/// `found_at` is when it was found to be unanswered.
pub fn enrich_attempt(
    attempt: Attempt,
    found_at: Timestamp,
    index: &Index,
    node: &Arc<str>,
) -> Event {
    let (source, destination) = name(&attempt.flow, index, attempt.since);
    Event {
        time: found_at,
        node: node.clone(),
        kind: attempt.kind,
        outcome: Outcome::Unanswered,
        packets: attempt.sent,
        protocol: Some(attempt.flow.protocol),
        ip_version: Some(match attempt.flow.source.to_canonical() {
            IpAddr::V4(_) => 4,
            IpAddr::V6(_) => 6,
        }),
        tcp_flags: (attempt.kind == Kind::Syn).then(|| tcp_flags(SYN)),
        source,
        destination,
        // To the millisecond: the thread that finds it looks ten times a second.
        waited_seconds: Some((attempt.waited.as_secs_f64() * 1000.0).round() / 1000.0),
        cause: Some(if attempt.drop.is_some() {
            Cause::DroppedHere
        } else {
            Cause::Elsewhere
        }),
        dns: attempt.dns,
        drop: attempt.drop,
        explanation: None,
    }
}

fn name(flow: &Flow, index: &Index, time: jiff::Timestamp) -> (Endpoint, Endpoint) {
    let protocol = Some(flow.protocol);
    let end = |ip: IpAddr, port: Option<u16>| {
        let mut end = Endpoint {
            ip: Some(ip.to_canonical()),
            port,
            ..Endpoint::default()
        };
        index.name(&mut end, protocol, time);
        end
    };
    let source = end(flow.source, flow.source_port);
    let mut destination = end(flow.destination, flow.destination_port);
    match flow.original_destination {
        Some((ip, port)) => destination.service = index.service(ip, Some(port), protocol, time),
        // A node port, or a load balancer's address on a node. A pod's own address is nobody's
        // Service, and a Service's own has named it already.
        None if destination.kind == Some(EndpointKind::Node) => {
            destination.service =
                index.service(flow.destination, flow.destination_port, protocol, time);
        }
        None => {}
    }
    (source, destination)
}

/// The flags of a TCP header (RFC 9293, section 3.1) as `SYN`, `SYN|ACK`, `PSH|ACK`: from the
/// lowest bit up, which is the order in which they are commonly said; `NONE` for none.
pub fn tcp_flags(flags: u8) -> String {
    const NAMES: [&str; 8] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
    if flags == 0 {
        return "NONE".into();
    }
    let set = NAMES.iter().enumerate();
    let set = set.filter(|(bit, _)| flags & (1 << bit) != 0);
    set.map(|(_, name)| *name).collect::<Vec<_>>().join("|")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture;
    use crate::event::DropSite;

    fn drop_of(source: (&str, u16), destination: (&str, u16), original: Option<&str>) -> Drop {
        Drop {
            time: fixture::NOW,
            kind: Kind::Syn,
            outcome: Outcome::Dropped,
            packets: 3,
            flow: Some(Flow {
                source: source.0.parse().unwrap(),
                source_port: Some(source.1),
                destination: destination.0.parse().unwrap(),
                destination_port: Some(destination.1),
                protocol: Protocol::TCP,
                original_destination: original.map(|o| {
                    let original: std::net::SocketAddr = o.parse().unwrap();
                    (original.ip(), original.port())
                }),
                icmp: None,
            }),
            tcp_flags: Some(0x02),
            dns: None,
            site: DropSite::default(),
        }
    }

    /// An event as scripts see it.
    fn event(drop: Drop) -> serde_json::Value {
        let event = enrich(drop, &fixture::index(), &"node-a".into());
        serde_json::to_value(event).unwrap()
    }

    #[test]
    fn a_packet_after_dnat_has_the_pod_and_the_service() {
        let e = event(drop_of(
            ("10.244.1.7", 41612),
            ("10.244.2.9", 5432),
            Some("10.96.0.12:5432"),
        ));
        assert_eq!(
            e,
            serde_json::json!({
                "time": fixture::NOW, "node": "node-a", "kind": "syn", "outcome": "dropped",
                "packets": 3, "protocol": "TCP", "ip_version": 4, "tcp_flags": "SYN",
                "source": {
                    "kind": "pod", "ip": "10.244.1.7", "port": 41612, "namespace": "shop",
                    "pod": "web-7d9f8c6b5-x2x4k", "node": "node-a",
                    "workload": {"kind": "Deployment", "name": "web"},
                },
                "destination": {
                    "kind": "pod", "ip": "10.244.2.9", "port": 5432, "namespace": "db",
                    "pod": "pg-0", "node": "node-b",
                    "workload": {"kind": "StatefulSet", "name": "pg"},
                    "service": {"namespace": "db", "name": "pg", "ip": "10.96.0.12", "port": 5432},
                },
                "dns": null, "drop": {}, "explanation": null,
            })
        );
    }

    #[test]
    fn a_pods_own_address_is_no_service() {
        let e = event(drop_of(("10.244.1.7", 41612), ("10.244.2.9", 5432), None));
        assert_eq!(e["destination"].get("service"), None);
    }

    #[test]
    fn a_reply_names_the_backend_without_service() {
        let e = event(drop_of(("10.244.2.9", 5432), ("10.244.1.7", 41612), None));
        assert_eq!(e["source"]["pod"], "pg-0");
        assert_eq!(e["source"].get("service"), None);
        assert_eq!(e["destination"].get("service"), None);
    }

    #[test]
    fn before_dnat_the_service_is_the_end() {
        let e = event(drop_of(("10.244.1.7", 41612), ("10.96.0.12", 5432), None));
        assert_eq!(e["destination"]["kind"], "service");
        assert_eq!(e["destination"]["service"]["name"], "pg");
        let e = event(drop_of(
            ("203.0.113.9", 50000),
            ("192.168.1.11", 30080),
            None,
        ));
        assert_eq!(e["destination"]["kind"], "node");
        assert_eq!(e["destination"]["service"]["name"], "web");
        assert_eq!(e["source"]["kind"], "external");
    }

    #[test]
    fn ipv6_and_ipv4_mapped_addresses() {
        let e = event(drop_of(
            ("fd00:10:244:1::7", 41612),
            ("fd00:10:244:2::9", 5432),
            None,
        ));
        assert_eq!(
            (&e["ip_version"], &e["source"]["namespace"]),
            (&6.into(), &"shop".into())
        );
        let e = event(drop_of(
            ("::ffff:10.244.1.7", 41612),
            ("::ffff:10.244.2.9", 5432),
            None,
        ));
        assert_eq!(e["ip_version"], 4);
        assert_eq!(e["source"]["ip"], "10.244.1.7");
    }

    #[test]
    fn a_packet_without_headers_has_no_ends() {
        let e = event(Drop {
            flow: None,
            ..drop_of(("10.244.1.7", 1), ("10.244.2.9", 2), None)
        });
        assert_eq!(
            (&e["source"], &e["destination"]),
            (&serde_json::json!({}), &serde_json::json!({}))
        );
        assert_eq!((e.get("protocol"), e.get("tcp_flags")), (None, None));
    }

    #[test]
    fn flags_are_named_from_the_lowest_bit() {
        let names = [0x02, 0x12, 0x18, 0x11, 0x14, 0xc2, 0].map(tcp_flags);
        let expected = [
            "SYN",
            "SYN|ACK",
            "PSH|ACK",
            "FIN|ACK",
            "RST|ACK",
            "SYN|ECE|CWR",
            "NONE",
        ];
        assert_eq!(names, expected);
    }
}
