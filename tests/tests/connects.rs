//! TCP connects: each ends as established, refused, unanswered or abandoned, and the agent says of
//! those that nobody answered so when their time is over, once, and where they were lost.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use whydrop_tests::connects::{Attempt, Blocked, Connects, Fate, Hanging, Options};
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::listeners::{Acceptor, FullListener};
use whydrop_tests::on_both_families;
use whydrop_tests::port::{self, rules};
use whydrop_tests::scene::Scene;
use whydrop_tests::tallies::{self, Results};
use whydrop_tests::unanswered::{self, Unanswered, timeouts};

on_both_families!(
    lost,
    told,
    ends,
    behind_a_service,
    service_of_its_own,
    elsewhere_behind_a_service,
    dropped_behind_a_service,
);

const REASON: &[&str] = &["NETFILTER_DROP"];
/// The agent's timeout, between the first resend of a SYN (1 s) and the second (2 s).
const TIMEOUT: Duration = Duration::from_millis(1_500);
const TIMEOUT_ARGUMENT: &str = "1500ms";
/// SYNs of a connect that hangs for [`TIMEOUT`].
const SYNS: std::ops::RangeInclusive<u64> = 2..=2;
/// Connects of each sort.
const EACH: usize = 3;
/// Until an answer that comes must be there: ICMPv6 errors that meet a busy socket come again with
/// the SYNs that are resent.
const PATIENCE: Duration = Duration::from_secs(4);

/// Some connects to each of these ports of the server.
fn open(scene: &Scene, ports: &[u16], options: Options) -> Result<Connects> {
    let to = |port: &u16| {
        scene
            .lab
            .socket(Place::Of(Host::Server), scene.family, *port)
    };
    let to = ports.iter().flat_map(|port| [to(port); EACH]);
    scene
        .lab
        .within(Host::Client, || Connects::open(to, options))
}

/// Connects that the client's kernel has begun.
fn begun(scene: &Scene) -> Result<u64> {
    scene.grown(Host::Client, "TcpActiveOpens", "TcpActiveOpens")
}

/// Checks that the client's connects ended so, as many as its kernel began.
fn results(scene: &Scene, wanted: Results) -> Result<()> {
    let begun = begun(scene)?;
    ensure!(
        begun == wanted.sum(),
        "the kernel began {begun} connects, the test {wanted:?}"
    );
    tallies::connects(&scene.lab, scene.agent(), "client", wanted)?;
    // The other pair is always answered.
    let others = Results::read(&scene.lab, scene.agent(), "client2")?;
    let markers = Results {
        unanswered: 1,
        ..Results::default()
    };
    ensure!(
        others.established > 0
            && (others.refused, others.abandoned) == (0, 0)
            && others.unanswered <= markers.unanswered,
        "of client2: {others:?}"
    );
    Ok(())
}

/// What hangs is reported while it hangs, with where it was lost; and not again when it ends.
fn lost(family: Family) -> Result<()> {
    let scene = Scene::with_arguments(family, &timeouts(TIMEOUT_ARGUMENT), rules)?;
    let at = |port| scene.lab.socket(Place::Of(Host::Server), family, port);
    let _full = FullListener::start(&scene.lab, Host::Server, at(port::FULL))?;
    let listening = [at(port::OPEN), at(port::BACK_FORWARD), at(port::BACK_INPUT)];
    let _acceptor = Acceptor::start(&scene.lab, Host::Server, listening)?;
    let answered = open(&scene, &[port::OPEN, port::CLOSED], Options::default())?;
    let ports = [
        port::OUTPUT,
        port::FORWARD,
        port::INPUT,
        port::BACK_FORWARD,
        port::BACK_INPUT,
        port::FULL,
        port::GONE,
    ];
    let mut hanging = open(&scene, &ports, Options::default())?;
    let wanted: Vec<Unanswered> = hanging
        .iter()
        .map(|attempt| {
            let port = attempt.to.port();
            let one = Unanswered::connect(attempt.from, port)
                .hangs(attempt.since, TIMEOUT)
                .packets(SYNS);
            match port {
                port::GONE => one,
                // No drop shows it, but it is lost here.
                port::FULL => one.dropped_here(),
                _ => one.reason(REASON),
            }
        })
        .collect();
    unanswered::wait(&scene.lab, scene.agent(), &wanted)?;
    hanging.wait(Instant::now())?;
    hanging.all(Fate::Waiting)?;
    let overflows = scene.grown(
        Host::Server,
        "TcpExtListenOverflows",
        "TcpExtListenOverflows",
    )?;
    ensure!(
        overflows >= EACH as u64,
        "{overflows} SYNs found the accept queue full"
    );
    drop(hanging);
    drop(answered);
    unanswered::expect(&scene.lab, scene.agent(), &wanted)?;
    results(
        &scene,
        Results {
            established: EACH as u64,
            refused: EACH as u64,
            unanswered: wanted.len() as u64,
            abandoned: 0,
        },
    )?;
    scene.finish()
}

/// Whoever is told in whatever way was answered, even where the application learns of it later than
/// the agent's timeout.
fn told(family: Family) -> Result<()> {
    let scene = Scene::with_arguments(family, &timeouts("500ms"), rules)?;
    let ports = [
        port::CLOSED,
        port::FORWARD_RESET,
        port::INPUT_RESET,
        port::OUTPUT_RESET,
        port::FORWARD_REJECT,
        port::INPUT_REJECT,
        port::OUTPUT_REJECT,
    ];
    // The router has no route to it, and says so; first and once, because it limits how often it says
    // anything to one host, and a missing route counts twice (net/ipv4/route.c, ip_error).
    let nowhere = scene.lab.socket(Place::InnerServer, family, port::OPEN);
    let mut connects = scene.lab.within(Host::Client, || {
        Connects::open([nowhere], Options::default())
    })?;
    connects.extend([open(&scene, &ports, Options::default())?]);
    connects.wait(Instant::now() + PATIENCE)?;
    for attempt in connects.iter() {
        let (fate, port) = (attempt.fate(), attempt.to.port());
        ensure!(matches!(fate, Fate::Refused(_)), "port {port}: {fate:?}");
    }
    let refused = Results {
        refused: connects.iter().count() as u64,
        ..Results::default()
    };
    unanswered::expect(&scene.lab, scene.agent(), &[])?;
    results(&scene, refused)?;
    scene.finish()
}

/// In whatever way a connect ends: an application that gives up, a process that is killed, a kernel
/// that gives up, an answer that comes at last.
fn ends(family: Family) -> Result<()> {
    const SECOND: u16 = 1030;
    const LATE: u16 = 1031;
    let scene = Scene::with_arguments(family, &timeouts(TIMEOUT_ARGUMENT), |lab| {
        rules(lab)?;
        lab.nft(
            Host::Router,
            &format!(
                "table inet late {{ chain f {{ type filter hook forward priority 0;
                   tcp dport {LATE} drop
                   tcp dport {SECOND} tcp flags & (syn | ack) == syn numgen inc mod 2 0 drop
                 }}
                 }}"
            ),
        )
    })?;
    let (lab, agent) = (&scene.lab, scene.agent());
    let at = |port| lab.socket(Place::Of(Host::Server), family, port);
    let _acceptor = Acceptor::start(lab, Host::Server, [at(SECOND), at(LATE)])?;
    let client = Host::Client;
    let lost = at(port::FORWARD);

    // Given up before the timeout: closed, shut down by another thread, its process killed.
    drop(open(&scene, &[port::FORWARD], Options::default())?);
    let stays = lab.within(client, || Blocked::open(lost))?.give_up()?;
    Hanging::start(lab, client, lost)?.kill()?;
    let abandoned = EACH as u64 + if stays.is_some() { 1 } else { 2 };
    let results_so_far = Results {
        abandoned,
        ..Results::default()
    };
    if stays.is_none() {
        results(&scene, results_so_far)?;
    }

    // One that hangs until it is reported; its process is then killed.
    let killed = Hanging::start(lab, client, lost)?;
    let mut wanted: Vec<_> = [killed.from]
        .into_iter()
        .chain(stays.iter().map(|blocked| blocked.from))
        .map(|from| Unanswered::connect(from, port::FORWARD).reason(REASON))
        .collect();
    // The kernel gives up before the agent's timeout.
    let impatient = Options {
        user_timeout: Some(Duration::from_millis(500)),
        ..Options::default()
    };
    let mut timed_out = open(&scene, &[port::FORWARD, port::GONE], impatient)?;
    wanted.extend(timed_out.iter().map(|attempt| {
        let one = Unanswered::connect(attempt.from, attempt.to.port()).packets(SYNS);
        if attempt.to.port() == port::GONE {
            one
        } else {
            one.reason(REASON)
        }
    }));
    // Answered at the second SYN, before the timeout; and at the third, after it.
    let mut second = lab.within(client, || Connects::open([at(SECOND)], Options::default()))?;
    let mut late = open(&scene, &[LATE], Options::default())?;
    wanted.extend(late.iter().map(|attempt| {
        Unanswered::connect(attempt.from, LATE)
            .hangs(attempt.since, TIMEOUT)
            .packets(SYNS)
            .reason(REASON)
    }));
    // A socket that is refused, and tries again.
    let mut again = open(&scene, &[port::CLOSED], Options::default())?;
    again.wait(Instant::now() + PATIENCE)?;
    again.all(Fate::Refused(Errno::ECONNREFUSED))?;
    again.iter_mut().try_for_each(Attempt::again)?;
    again.wait(Instant::now() + PATIENCE)?;
    again.all(Fate::Refused(Errno::ECONNREFUSED))?;

    unanswered::wait(lab, agent, &wanted)?;
    timed_out.wait(Instant::now())?;
    timed_out.all(Fate::TimedOut)?;
    second.wait(Instant::now())?;
    second.all(Fate::Established)?;
    killed.kill()?;
    lab.run(Host::Router, "nft delete table inet late")?;
    late.wait(Instant::now() + PATIENCE)?;
    late.all(Fate::Established)?;
    unanswered::expect(lab, agent, &wanted)?;
    results(
        &scene,
        Results {
            established: 1,
            refused: 2 * EACH as u64,
            unanswered: wanted.len() as u64,
            abandoned,
        },
    )?;
    scene.finish()
}

/// The Service's ports and where each leads: the same as [`port`], at the Service's own.
const SERVICE: [(u16, &str, u16); 6] = [
    (80, "TCP", port::OPEN),
    (81, "TCP", port::FORWARD),
    (82, "TCP", port::CLOSED),
    (83, "TCP", port::FORWARD_REJECT),
    (84, "TCP", port::GONE),
    (85, "TCP", port::INPUT),
];

/// DNAT of the Service's ports to the server's, at a host's hook.
fn dnat(lab: &Lab, host: Host, family: Family, hook: &str) -> Result<()> {
    let (ip, service) = (family.nft(), lab.address(Place::Service, family));
    let rules: String = SERVICE
        .iter()
        .map(|(port, _, target)| {
            let to = lab.socket(Place::Of(Host::Server), family, *target);
            format!("{ip} daddr {service} tcp dport {port} dnat {ip} to {to}\n")
        })
        .collect();
    lab.nft(
        host,
        &format!(
            "table inet service {{ chain c {{ type nat hook {hook} priority -100;
               {rules}
             }}
             }}"
        ),
    )
}

/// Connects of the client to these ports of the Service.
fn ask(scene: &Scene, ports: &[u16]) -> Result<Connects> {
    let to = |port: &u16| scene.lab.socket(Place::Service, scene.family, *port);
    let to = ports.iter().flat_map(|port| [to(port); EACH]);
    scene
        .lab
        .within(Host::Client, || Connects::open(to, Options::default()))
}

/// Connects to a Service, whose real end is chosen at a host's hook.
fn service(family: Family, host: Host, hook: &str) -> Result<()> {
    let scene = Scene::with_service(family, &timeouts(TIMEOUT_ARGUMENT), &SERVICE, |lab| {
        rules(lab)?;
        dnat(lab, host, family, hook)
    })?;
    let at = scene
        .lab
        .socket(Place::Of(Host::Server), family, port::OPEN);
    let _acceptor = Acceptor::start(&scene.lab, Host::Server, [at])?;
    let mut answered = ask(&scene, &[80, 82, 83])?;
    let mut hanging = ask(&scene, &[81])?;
    let wanted: Vec<Unanswered> = hanging
        .iter()
        .map(|attempt| {
            Unanswered::connect(attempt.from, port::FORWARD)
                .service("server")
                .reason(REASON)
                .packets(SYNS)
                .hangs(attempt.since, TIMEOUT)
        })
        .collect();
    unanswered::wait(&scene.lab, scene.agent(), &wanted)?;
    hanging.wait(Instant::now())?;
    hanging.all(Fate::Waiting)?;
    answered.wait(Instant::now() + PATIENCE)?;
    for attempt in answered.iter() {
        let fate = attempt.fate();
        ensure!(
            match attempt.to.port() {
                80 => fate == Fate::Established,
                _ => matches!(fate, Fate::Refused(_)),
            },
            "port {}: {fate:?}",
            attempt.to.port()
        );
    }
    unanswered::expect(&scene.lab, scene.agent(), &wanted)?;
    results(
        &scene,
        Results {
            established: EACH as u64,
            refused: 2 * EACH as u64,
            unanswered: EACH as u64,
            abandoned: 0,
        },
    )?;
    scene.finish()
}

/// The router chooses the pod, as a node does for its pods.
fn behind_a_service(family: Family) -> Result<()> {
    service(family, Host::Router, "prerouting")
}

/// The client's own namespace chooses it, as a node does for its own processes.
fn service_of_its_own(family: Family) -> Result<()> {
    service(family, Host::Client, "output")
}

/// Where no drop tells the real end, conntrack does.
fn elsewhere_behind_a_service(family: Family) -> Result<()> {
    let scene = Scene::on_the_node(family, &timeouts(TIMEOUT_ARGUMENT), &SERVICE, |lab| {
        rules(lab)?;
        dnat(lab, Host::Router, family, "prerouting")
    })?;
    let hanging = ask(&scene, &[84])?;
    let wanted: Vec<Unanswered> = hanging
        .iter()
        .map(|attempt| {
            Unanswered::connect(attempt.from, port::GONE)
                .service("server")
                .packets(SYNS)
                .hangs(attempt.since, TIMEOUT)
        })
        .collect();
    unanswered::expect(&scene.lab, scene.agent(), &wanted)?;
    scene.finish()
}

/// The node chooses the pod, whose own namespace then drops the SYN: nothing there knows the Service.
fn dropped_behind_a_service(family: Family) -> Result<()> {
    let scene = Scene::on_the_node(family, &timeouts(TIMEOUT_ARGUMENT), &SERVICE, |lab| {
        rules(lab)?;
        dnat(lab, Host::Router, family, "prerouting")
    })?;
    let hanging = ask(&scene, &[85])?;
    let wanted: Vec<Unanswered> = hanging
        .iter()
        .map(|attempt| {
            Unanswered::connect(attempt.from, port::INPUT)
                .service("server")
                .reason(REASON)
                .packets(SYNS)
                .hangs(attempt.since, TIMEOUT)
        })
        .collect();
    unanswered::expect(&scene.lab, scene.agent(), &wanted)?;
    scene.finish()
}

/// An application that gives up just after the timeout, when nothing else happens: its attempt is told all
/// the same, and soon.
#[test]
fn given_up_just_after_the_timeout() -> Result<()> {
    let scene = Scene::with_arguments(Family::V4, &timeouts(TIMEOUT_ARGUMENT), rules)?;
    let (mut wanted, mut held) = (Vec::new(), Vec::new());
    // In steps of less than the pause between two looks, so that one of them meets every phase of it.
    for late in (0..6).map(|step| Duration::from_millis(60 + 40 * step)) {
        let hanging = open(&scene, &[port::FORWARD], Options::default())?;
        wanted.extend(
            hanging
                .iter()
                .map(|attempt| Unanswered::connect(attempt.from, port::FORWARD).reason(REASON)),
        );
        let since = hanging.iter().map(|attempt| attempt.since).max();
        let until = since.context("no connect")? + TIMEOUT + late;
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        // An attempt is known by its tuple, and the kernel may give a port that is free to the next one.
        let closed = scene
            .lab
            .within(Host::Client, || hanging.close_and_hold())?;
        held.extend(closed);
        unanswered::wait(&scene.lab, scene.agent(), &wanted)?;
    }
    unanswered::expect(&scene.lab, scene.agent(), &wanted)?;
    scene.finish()
}

/// An agent without arguments waits for three seconds.
#[test]
fn by_default() -> Result<()> {
    let scene = Scene::with_arguments(Family::V4, &[], rules)?;
    let hanging = open(&scene, &[port::FORWARD], Options::default())?;
    let wanted: Vec<Unanswered> = hanging
        .iter()
        .map(|attempt| {
            Unanswered::connect(attempt.from, port::FORWARD)
                .reason(REASON)
                .hangs(attempt.since, Duration::from_secs(3))
        })
        .collect();
    unanswered::wait(&scene.lab, scene.agent(), &wanted)?;
    scene.finish()
}

/// Thousands of connects in a row: each is counted once, by how it ended.
#[test]
fn thousands() -> Result<()> {
    const ROUNDS: u64 = 20;
    const ESTABLISHED: u64 = 150;
    const REFUSED: u64 = 50;
    const ABANDONED: u64 = 25;
    let scene = Scene::with_arguments(Family::V4, &[], rules)?;
    let at = |port| scene.lab.socket(Place::Of(Host::Server), Family::V4, port);
    let _acceptor = Acceptor::start(&scene.lab, Host::Server, [at(port::OPEN)])?;
    let many = |port, count: u64| -> Result<Connects> {
        let to = std::iter::repeat_n::<SocketAddr>(at(port), count.try_into()?);
        scene
            .lab
            .within(Host::Client, || Connects::open(to, Options::default()))
    };
    for _ in 0..ROUNDS {
        let mut established = many(port::OPEN, ESTABLISHED)?;
        let mut refused = many(port::CLOSED, REFUSED)?;
        drop(many(port::FORWARD, ABANDONED)?);
        let until = Instant::now() + PATIENCE;
        established.wait(until)?;
        established
            .all(Fate::Established)
            .context("the open port")?;
        refused.wait(until)?;
        refused.all(Fate::Refused(Errno::ECONNREFUSED))?;
    }
    results(
        &scene,
        Results {
            established: ROUNDS * ESTABLISHED,
            refused: ROUNDS * REFUSED,
            unanswered: 0,
            abandoned: ROUNDS * ABANDONED,
        },
    )?;
    scene.finish()
}
