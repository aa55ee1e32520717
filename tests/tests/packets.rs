//! Packets that are hard to read, and ends that are hard to name: tunnels, VLANs, fragments,
//! options, cut headers, DNS queries, Services. All are dropped by nft, which counts them.

use anyhow::{Result, ensure};
use whydrop_tests::counters;
use whydrop_tests::expect::Row;
use whydrop_tests::lab::{Family, Host, Lab, Place, TC_SHOT, mac_bytes};
use whydrop_tests::packet::{self, IpOptions, ether_type, flags, protocol};
use whydrop_tests::scene::{Scene, UDP_PORT};
use whydrop_tests::traffic::{self, Connect};
use whydrop_tests::{on_both_families, scene};

on_both_families!(
    plain_protocols,
    fragments_and_options,
    cut_headers,
    tunnels,
    vlan_tags,
    dns_queries,
    service_address,
);

/// The router drops everything for the server.
fn all_for_server(family: Family) -> Result<Scene> {
    Scene::new(family, |lab| drop_for_server(lab, family))
}

fn drop_for_server(lab: &Lab, family: Family) -> Result<()> {
    let (ip, server) = (family.nft(), lab.address(Place::Of(Host::Server), family));
    lab.nft(
        Host::Router,
        &format!(
            "table inet lab {{
               counter hits {{ }}
               chain c {{ type filter hook forward priority 0;
                 {ip} daddr {server} counter name hits drop
               }}
             }}"
        ),
    )
}

/// Sends packets and checks that nft dropped every one.
fn send(scene: &Scene, packets: &[Vec<u8>]) -> Result<()> {
    scene.raw(packets)?;
    let hits = counters::nft(&scene.lab, Host::Router, "hits")?;
    ensure!(
        hits == packets.len() as u64,
        "nft counted {hits} of {}",
        packets.len()
    );
    Ok(())
}

const REASON: [&str; 1] = ["NETFILTER_DROP"];

fn plain_protocols(family: Family) -> Result<()> {
    let scene = all_for_server(family)?;
    let client = scene.address(Place::Of(Host::Client));
    let server = scene.address(Place::Of(Host::Server));
    let (from, to) = ((client, 40_000), (server, 80));
    let icmp = family.pick(protocol::ICMP, protocol::ICMPV6);
    let mut packets = Vec::new();
    for sequence in 0..5 {
        for (number, payload) in [
            (protocol::UDP, packet::udp(from, to, b"datagram")),
            (protocol::TCP, packet::tcp(from, to, flags::SYN)),
            (protocol::TCP, packet::tcp(from, to, flags::ACK)),
            (protocol::SCTP, packet::sctp(40_000, 80)),
            (icmp, packet::echo_request(client, server, sequence)),
            (253, b"an experiment (RFC 3692)".to_vec()),
        ] {
            packets.push(packet::ip(client, server, number, &payload));
        }
    }
    send(&scene, &packets)?;
    let row = |protocol| {
        Row::dropped("client", "server", 5)
            .protocol(protocol)
            .reason(&REASON)
    };
    scene.expect(&[
        row("UDP"),
        row("TCP").syn(),
        row("TCP"),
        row("SCTP"),
        row(family.pick("ICMP", "ICMPv6")),
        row("253"),
    ])
}

fn fragments_and_options(family: Family) -> Result<()> {
    let scene = all_for_server(family)?;
    let client = scene.address(Place::Of(Host::Client));
    let server = scene.address(Place::Of(Host::Server));
    let datagram = packet::udp((client, 40_000), (server, UDP_PORT), &[7; 64]);
    let (first, second) = datagram.split_at(40);
    let ip = |number, payload: &[u8]| packet::ip(client, server, number, payload);
    let with = |options: &IpOptions, payload: &[u8]| {
        packet::ip_with(client, server, protocol::UDP, options, payload)
    };
    let packets = family.pick(
        vec![
            with(
                &IpOptions {
                    fragment: (0, true),
                    ..IpOptions::default()
                },
                first,
            ),
            with(
                &IpOptions {
                    fragment: (40, false),
                    ..IpOptions::default()
                },
                second,
            ),
            // Router alert (RFC 2113), then padding.
            with(
                &IpOptions {
                    options: vec![148, 4, 0, 0],
                    ..IpOptions::default()
                },
                &datagram,
            ),
            with(
                &IpOptions {
                    options: vec![1; 40],
                    ..IpOptions::default()
                },
                &datagram,
            ),
        ],
        vec![
            ip(
                protocol::FRAGMENT,
                &packet::fragment(protocol::UDP, 0, true, first),
            ),
            ip(
                protocol::FRAGMENT,
                &packet::fragment(protocol::UDP, 40, false, second),
            ),
            ip(
                protocol::HOP_BY_HOP,
                &packet::extension(protocol::UDP, &datagram),
            ),
            ip(
                protocol::HOP_BY_HOP,
                &packet::extension(
                    protocol::DESTINATION_OPTIONS,
                    &packet::extension(
                        protocol::FRAGMENT,
                        &packet::fragment(protocol::UDP, 0, true, first),
                    ),
                ),
            ),
        ],
    );
    send(&scene, &packets)?;
    scene.expect(&[Row::dropped("client", "server", 4)
        .protocol("UDP")
        .reason(&REASON)])
}

/// Headers that end too early still have addresses.
fn cut_headers(family: Family) -> Result<()> {
    let scene = all_for_server(family)?;
    let client = scene.address(Place::Of(Host::Client));
    let server = scene.address(Place::Of(Host::Server));
    let segment = packet::tcp((client, 40_000), (server, 80), flags::ACK);
    let query = packet::dns_query(7, "pg.db.svc.cluster.local", 1);
    let datagram = packet::udp((client, 40_000), (server, 80), &query);
    let mut packets = Vec::new();
    for length in [0, 1, 3, 7, 12] {
        packets.push(packet::ip(
            client,
            server,
            protocol::TCP,
            &segment[..length],
        ));
    }
    for length in [0, 1, 3, 5, 7] {
        packets.push(packet::ip(
            client,
            server,
            protocol::UDP,
            &datagram[..length],
        ));
    }
    send(&scene, &packets)?;
    let row = |protocol| {
        Row::dropped("client", "server", 5)
            .protocol(protocol)
            .reason(&REASON)
    };
    scene.expect(&[row("TCP"), row("UDP")])
}

/// GRE, IP in IP, VXLAN and Geneve between client and server, with pods of both families inside.
fn tunnels(family: Family) -> Result<()> {
    let scene = all_for_server(family)?;
    let client = scene.address(Place::Of(Host::Client));
    let server = scene.address(Place::Of(Host::Server));
    let mut packets = Vec::new();
    for inner in Family::BOTH {
        let from = scene.lab.address(Place::InnerClient, inner);
        let to = scene.lab.address(Place::InnerServer, inner);
        let packet = packet::segment((from, 40_000), (to, 80), flags::SYN);
        let kind = ether_type(from);
        let frame = packet::ethernet([2; 6], [4; 6], &[], kind, &packet);
        let udp = |port, payload: &[u8]| packet::udp((client, 50_000), (server, port), payload);
        for (number, payload) in [
            (protocol::GRE, packet::gre(kind, &packet)),
            // Transparent Ethernet bridging (RFC 7637).
            (protocol::GRE, packet::gre(0x6558, &frame)),
            (inner.pick(protocol::IPIP, protocol::IPV6), packet.clone()),
            (protocol::UDP, udp(4789, &packet::vxlan(42, &frame))),
            (protocol::UDP, udp(6081, &packet::geneve(42, &frame))),
        ] {
            packets.push(packet::ip(client, server, number, &payload));
        }
    }
    send(&scene, &packets)?;
    scene.expect(&[Row::dropped("inner-client", "inner-server", 10)
        .syn()
        .reason(&REASON)])
}

/// Tagged frames, dropped by tc before any IP layer saw them.
fn vlan_tags(family: Family) -> Result<()> {
    let device = Host::Client.device();
    let scene = Scene::new(family, |lab| {
        lab.tc(Host::Router, &device, "ingress", TC_SHOT)
    })?;
    let client = scene.address(Place::Of(Host::Client));
    let server = scene.address(Place::Of(Host::Server));
    let packet = packet::segment((client, 40_000), (server, 80), flags::SYN);
    let frame = |vlans: &[u16]| {
        packet::ethernet(
            mac_bytes(Host::Client, false),
            mac_bytes(Host::Client, true),
            vlans,
            ether_type(client),
            &packet,
        )
    };
    let frames = [frame(&[]), frame(&[5]), frame(&[5]), frame(&[5, 6])];
    scene
        .lab
        .within(Host::Client, || traffic::raw_frames("eth0", &frames))?;
    let all = counters::tc_drops(&scene.lab, Host::Router, &device)?;
    ensure!(all == 4, "clsact counted {all}");
    scene.expect(&[Row::dropped("client", "server", all)
        .syn()
        .reason(&["TC_INGRESS"])])
}

fn dns_queries(family: Family) -> Result<()> {
    let scene = all_for_server(family)?;
    let query = packet::dns_query(4711, "pg.db.svc.cluster.local", family.pick(1, 28));
    scene.udp_to(Place::Of(Host::Server), 53, 12, &query)?;
    let all = counters::nft(&scene.lab, Host::Router, "hits")?;
    ensure!(all == 12, "nft counted {all}");
    scene.expect(&[Row::dropped("client", "server", all)
        .dns("pg.db.svc.cluster.local.")
        .reason(&REASON)])
}

/// A Service's address, translated by the router as kube-proxy does it, then dropped: the pod is
/// the real end, and the Service is what was asked for.
fn service_address(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        let (ip, server) = (family.nft(), lab.address(Place::Of(Host::Server), family));
        let service = lab.address(Place::Service, family);
        lab.nft(
            Host::Router,
            &format!(
                "table {ip} nat {{
                   chain c {{ type nat hook prerouting priority -100;
                     {ip} daddr {service} dnat to {server}
                   }}
                 }}"
            ),
        )?;
        drop_for_server(lab, family)
    })?;
    scene.udp_to(Place::Service, scene::UDP_PORT, 30, b"datagram")?;
    ensure!(scene.connect_to(Place::Service) == Connect::Silent);
    // The pod's own address: no Service was asked for.
    scene.udp(6)?;
    let all = counters::nft(&scene.lab, Host::Router, "hits")?;
    ensure!(all >= 37, "nft counted {all}");
    let service = format!("{}/server", scene.lab.namespace());
    scene.expect(&[
        Row::dropped("client", "server", 30)
            .protocol("UDP")
            .reason(&REASON)
            .service(&service),
        Row::dropped("client", "server", all - 36)
            .syn()
            .reason(&REASON)
            .service(&service),
        Row::dropped("client", "server", 6)
            .protocol("UDP")
            .reason(&REASON),
    ])
}
