//! Drops on the way that no netfilter rule makes: tc, XDP, routes, TTL, MTU, neighbours, tunnels.

use anyhow::{Result, ensure};
use whydrop_tests::counters;
use whydrop_tests::expect::Row;
use whydrop_tests::lab::{Family, Host, Lab, Place, TC_SHOT};
use whydrop_tests::packet::{self, IpOptions, protocol};
use whydrop_tests::scene::{Scene, TCP_PORT, UDP_PORT};
use whydrop_tests::traffic::{self, Connect};
use whydrop_tests::{kernel, on_both_families, xdp};

on_both_families!(
    tc_ingress,
    tc_egress,
    nft_netdev_ingress,
    nft_netdev_egress,
    xdp_generic,
    xdp_native,
    reverse_path_by_nft,
    route_blackhole,
    route_unreachable,
    route_prohibit,
    no_route,
    ttl_exceeded,
    too_big,
    neighbour_silent,
    vxlan_underlay,
);

/// tc drops on the router's device towards the client or the server; clsact counts.
fn tc(family: Family, towards: Host, direction: &str, reason: &'static str) -> Result<()> {
    let device = towards.device();
    let scene = Scene::new(family, |lab| {
        lab.tc(Host::Router, &device, direction, TC_SHOT)
    })?;
    scene.udp(30)?;
    ensure!(scene.connect() == Connect::Silent);
    let all = counters::tc_drops(&scene.lab, Host::Router, &device)?;
    ensure!(all >= 31, "clsact counted {all}");
    let places = [
        "__netif_receive_skb_core",
        "sch_handle_ingress",
        "__dev_queue_xmit",
        "sch_handle_egress",
    ];
    scene.expect(&[
        Row::dropped("client", "server", 30)
            .protocol("UDP")
            .reason(&[reason])
            .at(&places),
        Row::dropped("client", "server", all - 30)
            .syn()
            .reason(&[reason])
            .at(&places),
    ])
}

fn tc_ingress(family: Family) -> Result<()> {
    tc(family, Host::Client, "ingress", "TC_INGRESS")
}

fn tc_egress(family: Family) -> Result<()> {
    tc(family, Host::Server, "egress", "TC_EGRESS")
}

/// nft at a device's own hook, before or after the IP layer.
fn nft_netdev(family: Family, hook: &str, towards: Host) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        let (ip, server) = (family.nft(), lab.address(Place::Of(Host::Server), family));
        let device = towards.device();
        lab.nft(
            Host::Router,
            &format!(
                "table netdev lab {{
                   counter hits {{ }}
                   chain c {{ type filter hook {hook} device {device} priority 0;
                     {ip} daddr {server} counter name hits drop
                   }}
                 }}"
            ),
        )
    })?;
    scene.udp(30)?;
    ensure!(scene.connect() == Connect::Silent);
    let all = counters::nft(&scene.lab, Host::Router, "hits")?;
    ensure!(all >= 31, "nft counted {all}");
    scene.expect(&[
        Row::dropped("client", "server", 30)
            .protocol("UDP")
            .reason(&["NETFILTER_DROP"]),
        Row::dropped("client", "server", all - 30)
            .syn()
            .reason(&["NETFILTER_DROP"]),
    ])
}

fn nft_netdev_ingress(family: Family) -> Result<()> {
    nft_netdev(family, "ingress", Host::Client)
}

fn nft_netdev_egress(family: Family) -> Result<()> {
    if !kernel::has_nft_egress()? {
        return kernel::left_out(kernel::NO_NFT_EGRESS);
    }
    nft_netdev(family, "egress", Host::Server)
}

/// An XDP program that drops UDP on the router's device; TCP passes.
fn xdp(family: Family, mode: &str, places: &[&'static str]) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let object = directory.path().join("drop_udp.o");
    std::fs::write(&object, xdp::object()?)?;
    let scene = Scene::new(family, |lab| {
        let device = Host::Client.device();
        lab.run(
            Host::Router,
            &format!(
                "ip link set dev {device} {mode} object {} section xdp",
                object.display()
            ),
        )
        .map(drop)
    })?;
    scene.udp(30)?;
    ensure!(
        scene.connect() == Connect::Refused,
        "XDP must let TCP pass to the closed port"
    );
    let all = scene.lost_udp()?;
    ensure!(all == 30, "{all} of 30 datagrams did not arrive");
    scene.expect(&[
        Row::dropped("client", "server", all)
            .protocol("UDP")
            .reason(&["NOT_SPECIFIED", "XDP"])
            .at(places),
        Row::rejected("client", "server", 1)
            .syn()
            .reason(&["NO_SOCKET"]),
    ])
}

fn xdp_generic(family: Family) -> Result<()> {
    xdp(family, "xdpgeneric", &["do_xdp_generic"])
}

fn xdp_native(family: Family) -> Result<()> {
    xdp(family, "xdpdrv", &["veth_xdp_rcv_skb"])
}

/// Datagrams from a pod whose address has no route back by the device they come in on.
fn spoofed(scene: &Scene) -> Result<u64> {
    let source = scene.address(Place::InnerClient);
    let server = scene.address(Place::Of(Host::Server));
    scene.raw(
        (0..30)
            .map(|port| packet::datagram((source, 40_000 + port), (server, UDP_PORT), b"spoofed")),
    )
}

/// The kernel's own reverse path filter, which IPv6 does not have.
#[test]
fn rp_filter() -> Result<()> {
    let scene = Scene::new(Family::V4, |lab| {
        let device = Host::Client.device();
        lab.sysctl(
            Host::Router,
            &format!("net/ipv4/conf/{device}/rp_filter"),
            "1",
        )
    })?;
    spoofed(&scene)?;
    let name = "TcpExtIPReversePathFilter";
    let all = scene.grown(Host::Router, name, name)?;
    ensure!(all == 30, "the kernel counted {all}");
    scene.expect(&[Row::dropped("inner-client", "server", all)
        .protocol("UDP")
        .reason(&["IP_RPFILTER"])
        .at(&["ip_rcv_finish_core"])])
}

/// The same by a rule, as distributions do it for IPv6.
fn reverse_path_by_nft(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        lab.nft(
            Host::Router,
            "table inet lab {
               counter hits { }
               chain c { type filter hook prerouting priority -300;
                 fib saddr . iif oif missing counter name hits drop
               }
             }",
        )
    })?;
    spoofed(&scene)?;
    let all = counters::nft(&scene.lab, Host::Router, "hits")?;
    ensure!(all == 30, "nft counted {all}");
    scene.expect(&[Row::dropped("inner-client", "server", all)
        .protocol("UDP")
        .reason(&["NETFILTER_DROP"])])
}

/// A route of the router that says no; `told` is whether it says so to the sender.
fn route(family: Family, kind: &str, told: bool, reasons: &[&'static str]) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        let (option, server) = (
            family.pick("-4", "-6"),
            lab.address(Place::Of(Host::Server), family),
        );
        lab.run(
            Host::Router,
            &format!("ip {option} route add {kind} {server}"),
        )
        .map(drop)
    })?;
    scene.udp(30)?;
    let all = scene.lost_udp()?;
    let told_to = scene.unreachables(Host::Router)?;
    ensure!(
        all == 30 && (told_to > 0) == told,
        "{all} of 30 lost, {told_to} were told"
    );
    let places = [
        "ip_error",
        "ip6_pkt_discard",
        "ip6_pkt_prohibit",
        "ip6_pkt_drop",
        "dst_discard_out",
    ];
    scene.expect(&[
        Row::rejected("client", "server", told_to)
            .protocol("UDP")
            .reason(reasons)
            .at(&places),
        Row::dropped("client", "server", all - told_to)
            .protocol("UDP")
            .reason(reasons)
            .at(&places),
    ])
}

fn route_blackhole(family: Family) -> Result<()> {
    route(
        family,
        "blackhole",
        false,
        &["NOT_SPECIFIED", "IP_INNOROUTES"],
    )
}

fn route_unreachable(family: Family) -> Result<()> {
    route(
        family,
        "unreachable",
        true,
        &["NOT_SPECIFIED", "IP_INNOROUTES"],
    )
}

fn route_prohibit(family: Family) -> Result<()> {
    route(
        family,
        "prohibit",
        true,
        &["NOT_SPECIFIED", "IP_INNOROUTES"],
    )
}

/// The router has no route at all to a pod's address.
fn no_route(family: Family) -> Result<()> {
    let scene = Scene::new(family, |_| Ok(()))?;
    scene.udp_to(Place::InnerServer, UDP_PORT, 30, b"datagram")?;
    let all = scene.lost_udp()?;
    let told = scene.unreachables(Host::Router)?;
    ensure!(all == 30 && told > 0, "{all} of 30 lost, {told} were told");
    let row = |row: Row| row.protocol("UDP").reason(&["IP_INNOROUTES"]);
    scene.expect(&[
        row(Row::rejected("client", "inner-server", told)),
        row(Row::dropped("client", "inner-server", all - told)),
    ])
}

fn ttl_exceeded(family: Family) -> Result<()> {
    let scene = Scene::new(family, |_| Ok(()))?;
    let client = scene.address(Place::Of(Host::Client));
    let server = scene.address(Place::Of(Host::Server));
    let last_hop = IpOptions {
        ttl: 1,
        ..IpOptions::default()
    };
    scene.raw((0..30).map(|port| {
        let datagram = packet::udp((client, 40_000 + port), (server, UDP_PORT), b"far");
        packet::ip_with(client, server, protocol::UDP, &last_hop, &datagram)
    }))?;
    let told = scene.grown(Host::Router, "IcmpOutTimeExcds", "Icmp6OutTimeExcds")?;
    let all = scene.grown(Host::Router, "IpInHdrErrors", "Ip6InHdrErrors")?;
    ensure!(
        all == 30 && told > 0,
        "{all} of 30 counted as header errors, {told} were told"
    );
    let row = |row: Row| {
        row.protocol("UDP")
            .reason(&["IP_INHDR"])
            .at(&["ip_forward", "ip6_forward"])
    };
    scene.expect(&[
        row(Row::rejected("client", "server", told)),
        row(Row::dropped("client", "server", all - told)),
    ])
}

/// The router's link to the server carries less than the client's: a packet that may not be
/// fragmented ends there, and its sender is always told.
fn too_big(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        let device = Host::Server.device();
        lab.run(Host::Router, &format!("ip link set dev {device} mtu 1280"))
            .map(drop)
    })?;
    let client = scene.address(Place::Of(Host::Client));
    let server = scene.address(Place::Of(Host::Server));
    let whole = IpOptions {
        dont_fragment: true,
        ..IpOptions::default()
    };
    scene.raw((0..30).map(|port| {
        let datagram = packet::udp((client, 40_000 + port), (server, UDP_PORT), &[0; 1400]);
        packet::ip_with(client, server, protocol::UDP, &whole, &datagram)
    }))?;
    let told = scene.grown(Host::Router, "IcmpOutDestUnreachs", "Icmp6OutPktTooBigs")?;
    ensure!(told == 30, "{told} of 30 were told");
    scene.expect(&[Row::rejected("client", "server", told)
        .protocol("UDP")
        .reason(&["PKT_TOO_BIG"])])
}

/// Nobody answers neighbour discovery: the router gives up after three seconds, and says so.
fn neighbour_silent(family: Family) -> Result<()> {
    let scene = Scene::new(family, |_| Ok(()))?;
    scene.udp_to(Place::Absent, UDP_PORT, 3, b"datagram")?;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(8);
    while scene.unreachables(Host::Router)? < 3 && std::time::Instant::now() < deadline {
        std::thread::sleep(whydrop_tests::agent::POLL);
    }
    let told = scene.unreachables(Host::Router)?;
    ensure!(told == 3, "{told} of 3 were told");
    scene.expect(&[Row::rejected("client", "absent", told)
        .protocol("UDP")
        .reason(&["NEIGH_FAILED", "NOT_SPECIFIED"])])
}

/// A VXLAN tunnel of the kernel between client and server, dropped on the underlay by the router:
/// the pods inside are named. The underlay is of the test's family, the pods of both.
fn vxlan_underlay(family: Family) -> Result<()> {
    let mac = |end: u8| format!("02:00:00:00:10:0{end}");
    let scene = Scene::new(family, |lab| {
        for (host, peer, mine, theirs, end) in [
            (
                Host::Client,
                Host::Server,
                Place::InnerClient,
                Place::InnerServer,
                1,
            ),
            (
                Host::Server,
                Host::Client,
                Place::InnerServer,
                Place::InnerClient,
                2,
            ),
        ] {
            let (local, remote) = (
                lab.address(Place::Of(host), family),
                lab.address(Place::Of(peer), family),
            );
            vxlan(
                lab,
                host,
                &local.to_string(),
                &remote.to_string(),
                &mac(end),
                &mac(3 - end),
            )?;
            for inner in Family::BOTH {
                let (mine, theirs) = (lab.address(mine, inner), lab.address(theirs, inner));
                let (length, option) = inner.pick(("32", ""), ("128", "nodad"));
                for line in [
                    format!("ip addr add {mine}/{length} dev vx {option}"),
                    format!(
                        "ip neigh add {theirs} lladdr {} dev vx nud permanent",
                        mac(3 - end)
                    ),
                    format!("ip route add {theirs} dev vx src {mine}"),
                ] {
                    lab.run(host, &line)?;
                }
            }
        }
        lab.nft(
            Host::Router,
            "table inet lab {
               counter hits { }
               chain c { type filter hook forward priority 0; udp dport 4789 counter name hits drop
               }
             }",
        )
    })?;
    for inner in Family::BOTH {
        let udp = scene.lab.socket(Place::InnerServer, inner, UDP_PORT);
        let tcp = scene.lab.socket(Place::InnerServer, inner, TCP_PORT);
        let connected = scene.lab.within(Host::Client, || -> Result<Connect> {
            traffic::udp_burst(udp, 15, 3, b"datagram")?;
            Ok(traffic::connect(tcp))
        })?;
        ensure!(connected == Connect::Silent, "{connected:?}");
    }
    let all = counters::nft(&scene.lab, Host::Router, "hits")?;
    ensure!(all >= 32, "nft counted {all}");
    let row = |row: Row| row.reason(&["NETFILTER_DROP"]);
    scene.expect(&[
        row(Row::dropped("inner-client", "inner-server", 30).protocol("UDP")),
        row(Row::dropped("inner-client", "inner-server", all - 30).syn()),
    ])
}

/// A VXLAN device that knows one address behind it and floods nothing, so that no multicast of its
/// own travels in the tunnel.
fn vxlan(
    lab: &Lab,
    host: Host,
    local: &str,
    remote: &str,
    address: &str,
    peer: &str,
) -> Result<()> {
    for line in [
        format!(
            "ip link add vx address {address} type vxlan id 42 dstport 4789 local {local} nolearning"
        ),
        "ip link set vx up".to_owned(),
        format!("bridge fdb add {peer} dev vx dst {remote} self permanent"),
    ] {
        lab.run(host, &line)?;
    }
    Ok(())
}
