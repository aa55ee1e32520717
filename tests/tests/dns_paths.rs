//! DNS by ways that are not plain: resolvers on the client's own host or node, and Services, whose
//! server has another address and port than the one that is asked.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Result, ensure};
use whydrop_tests::agent::POLL;
use whydrop_tests::dns_client::Heard;
use whydrop_tests::dns_server::{A, NOERROR, Server};
use whydrop_tests::lab::{Family, Host, Place};
use whydrop_tests::on_both_families;
use whydrop_tests::queries::{
    DNS, EACH, PATIENCE, Sockets, all_answered, id, rules, timeout, timeout_argument,
};
use whydrop_tests::scene::Scene;
use whydrop_tests::tallies::{self, Dns};
use whydrop_tests::unanswered::{self, Unanswered, timeouts};

on_both_families!(
    own_loopback,
    node_local,
    behind_a_service,
    service_of_its_own,
    elsewhere_behind_a_service,
);

const REASON: &[&str] = &["NETFILTER_DROP"];
/// Where the server of a Service listens.
const REAL: u16 = 5353;

/// A resolver at any address of a host, asked from an address of the client.
fn near(family: Family, host: Host, at: &str, from: Option<&str>) -> Result<()> {
    let scene = Scene::with_arguments(family, &timeouts(timeout_argument()), |lab| {
        rules(lab, DNS)?;
        let (length, option) = family.pick((32, ""), (128, "nodad"));
        let line = format!("ip addr replace {at}/{length} dev lo {option}");
        lab.run(host, &line).map(drop)
    })?;
    let (lab, agent) = (&scene.lab, scene.agent());
    let at = SocketAddr::new(at.parse()?, DNS);
    let from = match from {
        Some(address) => SocketAddr::new(address.parse()?, 0),
        None => lab.socket(Place::Of(Host::Client), family, 0),
    };
    let _server = Server::start(lab, host, at)?;
    let sockets = Sockets::open(lab, from, at)?;
    let good = sockets.ask(id::FREE, "a")?;
    all_answered(&sockets.hear(good.len())?, &good, NOERROR)?;
    let mut wanted = Vec::new();
    for (first, habit) in [(id::FREE + 100, "ignore"), (id::BACK_INPUT, "b")] {
        for one in sockets.ask(first, habit)? {
            let unanswered = one.unanswered(DNS).to_any().hangs(one.since, timeout());
            wanted.push(match first {
                id::BACK_INPUT => unanswered.reason(REASON),
                _ => unanswered,
            });
        }
    }
    unanswered::expect(lab, agent, &wanted)?;
    let each = u64::from(EACH);
    let counted = Dns::of(each + wanted.len() as u64, &[("NOERROR", each)]);
    tallies::dns(lab, agent, "client", &counted)?;
    scene.finish()
}

/// A resolver on the client's own loopback.
fn own_loopback(family: Family) -> Result<()> {
    let loopback = family.pick("127.0.0.1", "::1");
    near(family, Host::Client, loopback, Some(loopback))
}

/// A resolver of the node for all its pods, at an address that is no pod's.
fn node_local(family: Family) -> Result<()> {
    let at = family.pick("169.254.20.10", "fd99::10");
    near(family, Host::Router, at, None)
}

/// A scene whose Service leads to a server at another port, chosen at a host's hook.
fn service_scene(
    family: Family,
    host: Host,
    hook: &str,
    is_on_node: bool,
) -> Result<(Scene, Server)> {
    let ports = [(DNS, "UDP", REAL)];
    let build = if is_on_node {
        Scene::on_the_node
    } else {
        Scene::with_service
    };
    let scene = build(
        family,
        &timeouts(timeout_argument()),
        &ports,
        |lab: &whydrop_tests::lab::Lab| {
            rules(lab, REAL)?;
            let (ip, service) = (family.nft(), lab.address(Place::Service, family));
            let to = lab.socket(Place::Of(Host::Server), family, REAL);
            lab.nft(
                host,
                &format!(
                    "table inet service {{ chain c {{ type nat hook {hook} priority -100;
                   {ip} daddr {service} udp dport {DNS} dnat {ip} to {to}
                 }}
                 }}"
                ),
            )
        },
    )?;
    let at = scene.lab.socket(Place::Of(Host::Server), family, REAL);
    let server = Server::start(&scene.lab, Host::Server, at)?;
    Ok((scene, server))
}

fn to_service(scene: &Scene) -> Result<Sockets> {
    let from = scene.lab.socket(Place::Of(Host::Client), scene.family, 0);
    let to = scene.lab.socket(Place::Service, scene.family, DNS);
    Sockets::open(&scene.lab, from, to)
}

/// Queries to a Service: answered, dropped on either way, rejected; `more` of them are not answered
/// for other reasons.
fn service(
    scene: Scene,
    more: impl FnOnce(&Scene, &Sockets) -> Result<Vec<Unanswered>>,
) -> Result<()> {
    let (lab, agent) = (&scene.lab, scene.agent());
    let sockets = to_service(&scene)?;
    let good = sockets.ask(id::FREE, "good")?;
    all_answered(&sockets.hear(good.len())?, &good, NOERROR)?;
    let bad = sockets.ask(id::FREE + 100, "rcode3")?;
    all_answered(&sockets.hear(bad.len())?, &bad, 3)?;
    let mut wanted = more(&scene, &sockets)?;
    for (first, habit) in [
        (id::FORWARD, "a"),
        (id::INPUT, "b"),
        (id::BACK_FORWARD, "c"),
    ] {
        for one in sockets.ask(first, habit)? {
            let unanswered = one.unanswered(REAL).service("server").reason(REASON);
            wanted.push(unanswered.packets(1..=1).hangs(one.since, timeout()));
        }
    }
    // On a socket of its own, as an error is an answer to all that waits on one.
    let rejected = to_service(&scene)?;
    rejected.sockets[0].ask(None, id::REJECT, "d.lab.test", A)?;
    let heard = rejected.hear(1)?;
    ensure!(matches!(heard[..], [Heard::Error(_)]), "{heard:?}");
    unanswered::expect(lab, agent, &wanted)?;
    let each = u64::from(EACH);
    let counted = Dns::of(
        2 * each + wanted.len() as u64 + 1,
        &[("NOERROR", each), ("NXDOMAIN", each)],
    );
    tallies::dns(lab, agent, "client", &counted)?;
    scene.finish()
}

/// The router chooses the pod, as a node does for its pods.
fn behind_a_service(family: Family) -> Result<()> {
    let (scene, _server) = service_scene(family, Host::Router, "prerouting", false)?;
    service(scene, |_, _| Ok(Vec::new()))
}

/// The client's own namespace chooses it, as a node does for its own processes: on the wire there is
/// no port 53 any more. What asks for that port itself is no DNS.
fn service_of_its_own(family: Family) -> Result<()> {
    let (scene, server) = service_scene(family, Host::Client, "output", false)?;
    service(scene, |scene, sockets| {
        let asked = sockets.ask(id::FREE + 200, "ignore")?;
        let from = scene.lab.socket(Place::Of(Host::Client), family, 0);
        let to = scene.lab.socket(Place::Of(Host::Server), family, REAL);
        let before = server.heard();
        let direct = Sockets::open(&scene.lab, from, to)?;
        direct.ask(id::FREE + 300, "ignore")?;
        let deadline = Instant::now() + PATIENCE;
        while server.heard() < before + u64::from(EACH) && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        Ok(asked
            .iter()
            .map(|one| {
                let unanswered = one.unanswered(REAL).service("server");
                unanswered.packets(1..=1).hangs(one.since, timeout())
            })
            .collect())
    })
}

/// Where no drop tells the real end, conntrack does.
fn elsewhere_behind_a_service(family: Family) -> Result<()> {
    let (scene, _server) = service_scene(family, Host::Router, "prerouting", true)?;
    let sockets = to_service(&scene)?;
    let asked = sockets.ask(id::FREE, "ignore")?;
    let wanted: Vec<Unanswered> = asked
        .iter()
        .map(|one| {
            let unanswered = one.unanswered(REAL).service("server");
            unanswered.packets(1..=1).hangs(one.since, timeout())
        })
        .collect();
    unanswered::expect(&scene.lab, scene.agent(), &wanted)?;
    scene.finish()
}
