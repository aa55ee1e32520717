//! DNS: each query is answered or not, and the agent says of those that nobody answered so when
//! their time is over, once, by the client's port and the query's id.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use whydrop_tests::agent::{POLL, Received};
use whydrop_tests::connects::{Connects, Options};
use whydrop_tests::dns_client::{Heard, TcpClient};
use whydrop_tests::dns_server::{A, NOERROR, Server};
use whydrop_tests::kernel;
use whydrop_tests::lab::{Family, Host, Place, TC_SHOT};
use whydrop_tests::on_both_families;
use whydrop_tests::patience::is_strict;
use whydrop_tests::queries::{
    DNS, EACH, PATIENCE, Sockets, all_answered, id, rules, timeout, timeout_argument,
};
use whydrop_tests::scene::Scene;
use whydrop_tests::tallies::{self, Dns, Results};
use whydrop_tests::unanswered::{self, Unanswered, timeouts};

on_both_families!(
    lost,
    answered,
    told,
    late,
    several_servers,
    receive_buffer,
    tc_egress,
    cut,
);

const REASON: &[&str] = &["NETFILTER_DROP"];

/// A scene with a DNS server at the server.
fn scene(family: Family) -> Result<(Scene, Server)> {
    let scene =
        Scene::with_arguments(family, &timeouts(timeout_argument()), |lab| rules(lab, DNS))?;
    let at = scene.lab.socket(Place::Of(Host::Server), family, DNS);
    let server = Server::start(&scene.lab, Host::Server, at)?;
    Ok((scene, server))
}

fn to_server(scene: &Scene) -> Result<Sockets> {
    let from = scene.lab.socket(Place::Of(Host::Client), scene.family, 0);
    let to = scene.lab.socket(Place::Of(Host::Server), scene.family, DNS);
    Sockets::open(&scene.lab, from, to)
}

/// What hangs is reported while it hangs, with where it was lost, beside what is answered on the
/// same sockets.
fn lost(family: Family) -> Result<()> {
    let (scene, server) = scene(family)?;
    let sockets = to_server(&scene)?;
    let mut wanted = Vec::new();
    for (first, habit) in [
        (id::FORWARD, "a"),
        (id::INPUT, "b"),
        (id::EGRESS, "c"),
        (id::BACK_FORWARD, "d"),
        (id::BACK_INPUT, "e"),
        (id::FREE, "ignore"),
    ] {
        if first == id::EGRESS && !kernel::has_nft_egress()? {
            continue;
        }
        for one in sockets.ask(first, habit)? {
            let unanswered = one
                .unanswered(DNS)
                .packets(1..=1)
                .hangs(one.since, timeout());
            wanted.push(match first {
                id::FREE => unanswered,
                _ => unanswered.reason(REASON),
            });
        }
    }
    // The same query twice is one attempt.
    let resent = sockets.ask(id::FREE + 100, "ignore")?;
    sockets.ask(id::FREE + 100, "ignore")?;
    wanted.extend(resent.iter().map(|one| {
        one.unanswered(DNS)
            .packets(2..=2)
            .hangs(one.since, timeout())
    }));
    let good = sockets.ask(id::FREE + 200, "good")?;
    all_answered(&sockets.hear(good.len())?, &good, NOERROR)?;
    // An application that does not wait got no answer either.
    let impatient = to_server(&scene)?.ask(id::FREE + 300, "ignore")?;
    wanted.extend(impatient.iter().map(|one| one.unanswered(DNS)));
    let each = u64::from(EACH);
    unanswered::expect(&scene.lab, scene.agent(), &wanted)?;
    ensure!(
        server.heard() == 7 * each,
        "the server heard {}",
        server.heard()
    );
    let counted = Dns::of(wanted.len() as u64 + each, &[("NOERROR", each)]);
    tallies::dns(&scene.lab, scene.agent(), "client", &counted)?;
    scene.finish()
}

/// Whatever comes back before the time is over is an answer.
fn answered(family: Family) -> Result<()> {
    const RCODES: [&str; 11] = [
        "NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED", "YXDOMAIN", "YXRRSET",
        "NXRRSET", "NOTAUTH", "NOTZONE",
    ];
    let (scene, _server) = scene(family)?;
    let sockets = to_server(&scene)?;
    let mut counts = [0; RCODES.len()];
    for (code, count) in (0_u8..).zip(&mut counts) {
        let asked = sockets.ask(20 * u16::from(code), &format!("rcode{code}"))?;
        all_answered(&sockets.hear(asked.len())?, &asked, code)?;
        *count += u64::from(EACH);
    }
    // Truncated, in fragments, and late but in time.
    for (first, habit) in [(8000, "cut"), (8100, "long"), (8200, "delay400")] {
        let asked = sockets.ask(first, habit)?;
        all_answered(&sockets.hear(asked.len())?, &asked, NOERROR)?;
        counts[0] += u64::from(EACH);
    }
    // A socket that uses its ids again asks anew.
    let again = sockets.ask(0, "again")?;
    all_answered(&sockets.hear(again.len())?, &again, NOERROR)?;
    counts[0] += u64::from(EACH);
    // One that is resent is one still; its server answers both.
    let resent = sockets.ask(8300, "delay400")?;
    sockets.ask(8300, "delay400")?;
    let heard = sockets.hear(2 * resent.len())?;
    ensure!(heard.len() == 2 * resent.len(), "{heard:?}");
    counts[0] += u64::from(EACH);
    unanswered::expect(&scene.lab, scene.agent(), &[])?;
    let responses: Vec<(&str, u64)> = RCODES.into_iter().zip(counts).collect();
    let counted = Dns::of(counts.iter().sum(), &responses);
    tallies::dns(&scene.lab, scene.agent(), "client", &counted)?;
    scene.finish()
}

/// Whoever is told has an answer: by the error of its own call, by an ICMP error, which a connected
/// socket hears of and any other does not.
fn told(family: Family) -> Result<()> {
    let (scene, server) = scene(family)?;
    let (lab, agent) = (&scene.lab, scene.agent());
    let sockets = to_server(&scene)?;
    ensure!(
        sockets.ask(id::OUTPUT, "a").is_err(),
        "the rule at OUTPUT tells nobody"
    );
    for id in id::OUTPUT + 1..id::OUTPUT + EACH {
        let error = sockets.sockets[1].ask(Some(sockets.to), id, "b.lab.test", A);
        let error = error.err().context("the rule at OUTPUT tells nobody")?;
        ensure!(
            error.kind() == std::io::ErrorKind::PermissionDenied,
            "{error}"
        );
    }
    // Each on a socket of its own, as an error is an answer to all that waits on one.
    for first in 0..EACH {
        let sockets = to_server(&scene)?;
        sockets.sockets[0].ask(None, id::REJECT + first, "c.lab.test", A)?;
        let heard = sockets.hear(1)?;
        ensure!(matches!(heard[..], [Heard::Error(_)]), "{heard:?}");
        sockets.sockets[1].ask(Some(sockets.to), id::REJECT + first, "c.lab.test", A)?;
    }
    // Nobody listens any more.
    drop(server);
    lab.unlimited_icmp(Host::Server)?;
    let closed = to_server(&scene)?;
    closed.sockets[0].ask(None, 1, "d.lab.test", A)?;
    closed.sockets[1].ask(Some(closed.to), 2, "d.lab.test", A)?;
    unanswered::expect(lab, agent, &[])?;
    // At OUTPUT, by the router, at the closed port.
    let wanted = u64::from(EACH) + 2 * u64::from(EACH) + 2;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let samples = agent.metrics()?;
        let of = |name| tallies::sum(lab, &samples, name, "client", &[("kind", "dns")]);
        let rejected = of("whydrop_rejected_packets_total");
        let silent = of("whydrop_silent_drops_total");
        ensure!(
            rejected <= wanted && silent == 0 && Instant::now() < deadline,
            "{rejected} rejected, {silent} silent"
        );
        if rejected == wanted {
            break;
        }
        std::thread::sleep(POLL);
    }
    scene.finish()
}

/// What is answered after its time is unanswered, and stays so.
fn late(family: Family) -> Result<()> {
    let (scene, _server) = scene(family)?;
    let sockets = to_server(&scene)?;
    let habit = format!("delay{}", 2 * timeout().as_millis());
    let asked = sockets.ask(id::FREE, &habit)?;
    let wanted: Vec<Unanswered> = asked
        .iter()
        .map(|one| {
            one.unanswered(DNS)
                .packets(1..=1)
                .hangs(one.since, timeout())
        })
        .collect();
    unanswered::wait(&scene.lab, scene.agent(), &wanted)?;
    all_answered(&sockets.hear(asked.len())?, &asked, NOERROR)?;
    unanswered::expect(&scene.lab, scene.agent(), &wanted)?;
    let counted = Dns::read(&scene.lab, scene.agent(), "client")?;
    ensure!(counted.queries == asked.len() as u64, "{counted:?}");
    scene.finish()
}

/// A socket that asks several servers the same, as musl's resolver does: one answer is enough, and
/// none at all is one attempt.
fn several_servers(family: Family) -> Result<()> {
    let (scene, _server) = scene(family)?;
    let (lab, agent) = (&scene.lab, scene.agent());
    let second = lab.socket(Place::Of(Host::Server2), family, DNS);
    let _second = Server::start(lab, Host::Server2, second)?;
    let sockets = to_server(&scene)?;
    let [_, client] = &sockets.sockets;
    let ask = |id, name: &str| -> Result<Instant> {
        let since = Instant::now();
        client.ask(Some(sockets.to), id, name, A)?;
        client.ask(Some(second), id, name, A)?;
        Ok(since)
    };
    // The first server never sees these, the second answers them.
    for id in id::INPUT..id::INPUT + EACH {
        ask(id, "one.lab.test")?;
    }
    let heard = sockets.hear(usize::from(EACH))?;
    ensure!(heard.len() == usize::from(EACH), "{heard:?}");
    // Both answer.
    for id in 100..100 + EACH {
        ask(id, "both.lab.test")?;
    }
    let heard = sockets.hear(2 * usize::from(EACH))?;
    ensure!(heard.len() == 2 * usize::from(EACH), "{heard:?}");
    // Nobody does.
    let mut wanted = Vec::new();
    for id in 200..200 + EACH {
        let since = ask(id, "ignore.lab.test")?;
        let one = Unanswered::query(client.from, id, "ignore.lab.test", DNS);
        wanted.push(one.to_any().packets(2..=2).hangs(since, timeout()));
    }
    unanswered::expect(lab, agent, &wanted)?;
    let each = u64::from(EACH);
    let counted = Dns::of(3 * each, &[("NOERROR", 2 * each)]);
    tallies::dns(lab, agent, "client", &counted)?;
    scene.finish()
}

/// Answers of two servers that arrive together, on two CPUs: each query has one.
#[test]
fn two_answers_at_once() -> Result<()> {
    const AT_ONCE: u16 = 10;
    // In a virtual machine there is one CPU.
    let queries = if is_strict() { 50 } else { 8_000 };
    let (scene, _server) = scene(Family::V4)?;
    let (lab, agent) = (&scene.lab, scene.agent());
    let second = lab.socket(Place::Of(Host::Server2), Family::V4, DNS);
    let _second = Server::start(lab, Host::Server2, second)?;
    let sockets = to_server(&scene)?;
    let [_, client] = &sockets.sockets;
    for first in (0..queries).step_by(usize::from(AT_ONCE)) {
        // Ids that no rule knows.
        for id in (10_000 + first..).take(usize::from(AT_ONCE)) {
            client.ask(Some(sockets.to), id, "both.lab.test", A)?;
            client.ask(Some(second), id, "both.lab.test", A)?;
        }
        let heard = sockets.hear(2 * usize::from(AT_ONCE))?;
        ensure!(heard.len() == 2 * usize::from(AT_ONCE), "{heard:?}");
    }
    unanswered::expect(lab, agent, &[])?;
    let queries = u64::from(queries);
    tallies::dns(
        lab,
        agent,
        "client",
        &Dns::of(queries, &[("NOERROR", queries)]),
    )?;
    scene.finish()
}

/// Answers that find the client's receive buffer full have arrived, and are lost all the same.
fn receive_buffer(family: Family) -> Result<()> {
    const QUERIES: u16 = 20;
    let (scene, _server) = scene(family)?;
    let sockets = to_server(&scene)?;
    let [client, _] = &sockets.sockets;
    setsockopt(client.socket(), sockopt::RcvBuf, &1).context("set SO_RCVBUF")?;
    let mut since = Vec::new();
    for id in 0..QUERIES {
        since.push(Instant::now());
        client.ask(None, id, "full.lab.test", A)?;
    }
    let errors = || scene.grown(Host::Client, "UdpRcvbufErrors", "Udp6RcvbufErrors");
    let arrived = || scene.grown(Host::Client, "UdpInDatagrams", "Udp6InDatagrams");
    let deadline = Instant::now() + PATIENCE;
    // A datagram that nobody has read yet is in neither counter; there are a few of these.
    while errors()? < u64::from(QUERIES) / 2 && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
    let mut heard = Vec::new();
    let (errors, arrived) = loop {
        std::thread::sleep(POLL);
        heard.extend(client.hear(usize::from(QUERIES), Instant::now())?);
        let (errors, arrived) = (errors()?, arrived()?);
        if errors + heard.len() as u64 >= u64::from(QUERIES) || Instant::now() > deadline {
            break (errors, arrived);
        }
    };
    ensure!(
        errors + heard.len() as u64 == u64::from(QUERIES) && arrived == heard.len() as u64,
        "{errors} errors, {arrived} arrived, {heard:?}"
    );
    let wanted: Vec<Unanswered> = (0..QUERIES)
        .zip(since)
        .filter(|(id, _)| !heard.iter().any(|heard| heard.id() == Some(*id)))
        .map(|(id, since)| {
            Unanswered::query(client.from, id, "full.lab.test", DNS)
                .reason(&["SOCKET_RCVBUFF"])
                .hangs(since, timeout())
        })
        .collect();
    unanswered::expect(&scene.lab, scene.agent(), &wanted)?;
    scene.finish()
}

/// A tc program that drops all that leaves the client's own namespace.
fn tc_egress(family: Family) -> Result<()> {
    let scene = Scene::with_arguments(family, &timeouts(timeout_argument()), |lab| {
        lab.tc(Host::Client, "eth0", "egress", TC_SHOT)
    })?;
    let asked = to_server(&scene)?.ask(0, "a")?;
    let wanted: Vec<Unanswered> = asked
        .iter()
        .map(|one| {
            one.unanswered(DNS)
                .reason(&["TC_EGRESS"])
                .packets(1..=1)
                .hangs(one.since, timeout())
        })
        .collect();
    unanswered::expect(&scene.lab, scene.agent(), &wanted)?;
    let counted = Dns::of(wanted.len() as u64, &[]);
    tallies::dns(&scene.lab, scene.agent(), "client", &counted)?;
    scene.finish()
}

/// A truncated answer is one, and so is what the same question gets over TCP.
fn cut(family: Family) -> Result<()> {
    let (scene, _server) = scene(family)?;
    let (lab, agent) = (&scene.lab, scene.agent());
    let sockets = to_server(&scene)?;
    let asked = sockets.ask(id::FREE, "cut")?;
    all_answered(&sockets.hear(asked.len())?, &asked, NOERROR)?;
    let to = lab.socket(Place::Of(Host::Server), family, DNS);
    for one in &asked {
        let mut client = lab.within(Host::Client, || TcpClient::connect(to))?;
        client.ask(one.id, &one.name, A)?;
        let heard = client.hear(1, Instant::now() + PATIENCE)?;
        ensure!(
            matches!(heard[..], [Heard::Answer { cut: false, .. }]),
            "{heard:?}"
        );
    }
    unanswered::expect(lab, agent, &[])?;
    let established = Results {
        established: asked.len() as u64,
        ..Results::default()
    };
    tallies::connects(lab, agent, "client", established)?;
    scene.finish()
}

/// An agent without arguments waits for two seconds.
#[test]
fn by_default() -> Result<()> {
    let scene = Scene::with_arguments(Family::V4, &[], |lab| rules(lab, DNS))?;
    let asked = to_server(&scene)?.ask(id::FORWARD, "a")?;
    let wanted: Vec<Unanswered> = asked
        .iter()
        .map(|one| {
            let unanswered = one.unanswered(DNS).reason(REASON);
            unanswered.hangs(one.since, Duration::from_secs(2))
        })
        .collect();
    unanswered::expect(&scene.lab, scene.agent(), &wanted)?;
    scene.finish()
}

/// With `--dns off` nothing is said of DNS, and all the same of connects and drops.
#[test]
fn off() -> Result<()> {
    let arguments = [&timeouts(timeout_argument())[..], &["--dns", "off"]].concat();
    let scene = Scene::with_arguments(Family::V4, &arguments, |lab| rules(lab, DNS))?;
    let (lab, agent) = (&scene.lab, scene.agent());
    let at = lab.socket(Place::Of(Host::Server), Family::V4, DNS);
    let _server = Server::start(lab, Host::Server, at)?;
    let sockets = to_server(&scene)?;
    let good = sockets.ask(0, "a")?;
    all_answered(&sockets.hear(good.len())?, &good, NOERROR)?;
    sockets.ask(100, "ignore")?;
    sockets.ask(id::FORWARD, "b")?;
    // No connect before, so this one is the first; it hangs at the marker, which the router drops.
    let marker = lab.socket(Place::Marker, Family::V4, 9);
    let connects = lab.within(Host::Client2, || {
        Connects::open([marker], Options::default())
    })?;
    let deadline = Instant::now() + timeout() + PATIENCE;
    loop {
        let samples = agent.metrics()?;
        let of =
            |workload, name, kind| tallies::sum(lab, &samples, name, workload, &[("kind", kind)]);
        if of("client2", "whydrop_unanswered_total", "syn") == 1 {
            ensure!(of("client", "whydrop_unanswered_total", "dns") == 0);
            // Before the connect was.
            let dropped = of("client", "whydrop_silent_drops_total", "dns");
            ensure!(dropped <= u64::from(EACH), "{dropped} dropped");
            if dropped == u64::from(EACH) {
                break;
            }
        }
        ensure!(Instant::now() < deadline, "the connect is not unanswered");
        std::thread::sleep(POLL);
    }
    drop(connects);
    ensure!(Dns::read(lab, agent, "client")? == Dns::default());
    let unanswered = |received: &Received| {
        received.json["outcome"] == "unanswered" && received.json["kind"] == "dns"
    };
    ensure!(!agent.received(0).iter().any(unanswered));
    scene.finish()
}
