//! Enrich: from addresses to names.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;

use crate::cluster::index::Holder;
use crate::cluster::{Index, PodUid};
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
        // A SYN that still waits for its neighbour's address was not sent, but it is one.
        packets: attempt.sent.max(1),
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
        cause: match attempt.drop {
            Some(_) => Some(Cause::DroppedHere),
            // It never left, so it was not lost elsewhere; this node may drop it yet.
            None if attempt.sent == 0 => None,
            None => Some(Cause::Elsewhere),
        },
        dns: attempt.dns,
        drop: attempt.drop,
        explanation: None,
    }
}

fn name(flow: &Flow, index: &Index, time: Timestamp) -> (Endpoint, Endpoint) {
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

/// Names the host-network pod at an end that is a node's address, where the cgroup of the socket
/// tells the pod's UID. The end stays a node; a pod that its port named gives way, because a port
/// is only declared and the cgroup is real.
///
/// Returns whether it did. A UID that is not known, a pod with a network of its own (whose packet
/// was masqueraded) and a pod of another node leave the end as it is.
pub fn name_host_network_pod(end: &mut Endpoint, uid: &PodUid, index: &Index) -> bool {
    if end.kind != Some(EndpointKind::Node) {
        return false;
    }
    let pod = index.pod_by_uid(uid);
    let Some(pod) = pod.filter(|pod| pod.host_network && pod.node == end.node) else {
        return false;
    };
    end.host_network = true;
    index.name_pod(end, pod);
    true
}

/// The pod that a network namespace belongs to: the one with the UID of its processes' cgroup,
/// else the one that holds the addresses on its devices at this time. `None` if no pod is known,
/// if the addresses are several pods', or those of a pod with another UID, whose end was not seen yet.
pub fn pod_of_namespace(
    uid: Option<&PodUid>,
    addresses: &[IpAddr],
    index: &Index,
    at: Timestamp,
) -> Option<Endpoint> {
    let pod = uid.and_then(|uid| index.pod_by_uid(uid)).or_else(|| {
        let holders = addresses.iter().filter_map(|ip| index.holder(*ip, at));
        let mut pods = holders.filter_map(|holder| match holder {
            Holder::Pod(pod) => Some(pod),
            Holder::Node(_) | Holder::Service(_) => None,
        });
        let first = pods.next()?;
        pods.all(|pod| pod.key == first.key).then_some(first)
    })?;
    // A pod of a file may have no UID.
    let mut uids = pod.uids().peekable();
    if let Some(uid) = uid
        && uids.peek().is_some()
        && uids.all(|known| known != uid.hash())
    {
        return None;
    }
    let mut end = Endpoint {
        kind: Some(EndpointKind::Pod),
        node: pod.node.clone(),
        ..Endpoint::default()
    };
    index.name_pod(&mut end, pod);
    Some(end)
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

    const WEB: &str = "9f0c5a1e-2b7d-4f60-8a43-1d2e3f405162";
    const EXPORTER: &str = "dd0c5a1e-2b7d-4f60-8a43-1d2e3f405166";

    /// The fixtures with a host-network pod of a known UID on node-a.
    fn index_with_exporter() -> Index {
        let mut index = fixture::index();
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: agent-a, namespace: cni, uid: {EXPORTER}, \
             ownerReferences: [{{kind: DaemonSet, name: agent, controller: true}}]}}\n\
             spec: {{nodeName: node-a, hostNetwork: true}}\nstatus: {{podIP: 192.168.1.10}}\n"
        );
        let parsed = crate::cluster::document::read(&text, false).unwrap().parsed;
        let mut strings = crate::cluster::objects::Interner::default();
        let objects = parsed.into_iter().map(|p| p.strip(&mut strings));
        index.load(objects.collect::<Vec<_>>(), fixture::NOW);
        index
    }

    #[test]
    fn a_host_network_pod_is_named_by_its_cgroup() {
        let index = index_with_exporter();
        let end_at = |ip, port| {
            let mut end = fixture::end(ip, Some(port));
            index.name(&mut end, Some(Protocol::TCP), fixture::NOW);
            end
        };
        // A client's port, which nobody declares, and one that another pod declares.
        for port in [41612, 9100] {
            let mut end = end_at("192.168.1.10", port);
            let uid = PodUid::new(&EXPORTER.replace('-', "_"));
            assert!(name_host_network_pod(&mut end, &uid, &index));
            assert_eq!(
                fixture::text(&end),
                (
                    "node-a".into(),
                    "cni/agent-a".into(),
                    "DaemonSet/agent".into()
                )
            );
            assert!(end.host_network && end.kind == Some(EndpointKind::Node));
        }
        let stranger = "ee0c5a1e-2b7d-4f60-8a43-1d2e3f405166";
        for (ip, uid) in [
            ("192.168.1.10", stranger),
            // A pod with a network of its own, and a pod of another node.
            ("192.168.1.10", WEB),
            ("192.168.1.11", EXPORTER),
            // Ends that are no node.
            ("10.244.1.7", EXPORTER),
            ("203.0.113.9", EXPORTER),
        ] {
            let mut end = end_at(ip, 41612);
            let before = end.clone();
            assert!(!name_host_network_pod(&mut end, &PodUid::new(uid), &index));
            assert_eq!(end, before, "{ip} {uid}");
        }
    }

    #[test]
    fn a_namespace_is_a_pods_by_uid_else_by_address() {
        let index = fixture::index();
        let pod = |uid: Option<&str>, addresses: &[&str]| {
            let uid = uid.map(PodUid::new);
            let addresses: Vec<IpAddr> = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
            let end = pod_of_namespace(uid.as_ref(), &addresses, &index, fixture::NOW)?;
            Some(fixture::text(&end).1)
        };
        let (web, pg) = (
            Some("shop/web-7d9f8c6b5-x2x4k".to_owned()),
            Some("db/pg-0".to_owned()),
        );
        // The cgroup is believed more than an address.
        assert_eq!(pod(Some(WEB), &["10.244.2.9"]), web);
        // One that is not known is not the pod whose address it has.
        assert_eq!(pod(Some(EXPORTER), &["10.244.2.9"]), None);
        assert_eq!(pod(None, &["10.244.2.9"]), pg);
        assert_eq!(
            pod(None, &["192.0.2.1", "10.244.1.7", "fd00:10:244:1::7"]),
            web
        );
        assert_eq!(pod(None, &["10.244.1.7", "10.244.2.9"]), None, "two pods");
        // Of a node, of a Service, of nobody.
        assert_eq!(
            pod(None, &["192.168.1.10", "10.96.0.12", "192.0.2.1"]),
            None
        );
        assert_eq!(pod(None, &[]), None);
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
