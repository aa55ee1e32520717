//! `quiet`: what traffic costs of which nothing is dropped or unanswered, with all sources on.
//!
//! Two namespaces with one veth pair between them: the lab's client and its router. Each kind of
//! traffic is one thread that plays both ends, so that no receiver is too slow, and its rate is what
//! it costs. CPU time is that of this thread, with the kernel's work on its behalf, of the agent, and
//! of ksoftirqd, which takes over what the thread leaves. (Kernels with IRQ_TIME_ACCOUNTING leave the
//! work of soft interrupts out of it; the rates are right there too.)

use std::collections::BTreeMap;
use std::fs;
use std::io::{IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::sys::{Stats, enable_stats};
use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg,
};
use nix::time::{ClockId, clock_gettime};
use serde_json::json;

use super::kernel;
use super::report::{Must, Report, median};
use crate::agent::{Agent, POLL};
use crate::dns_server::A;
use crate::lab::{Family, Host, Lab, Place};
use crate::objects;
use crate::packet::dns_query;
use crate::queries::DNS;
use crate::tallies::{Dns, Results};

/// Rounds, each with and without the agent; which comes first alternates.
const ROUNDS: usize = 11;
/// How long each kind of traffic is measured.
const TIME: Duration = Duration::from_millis(700);
/// Ports of the servers at the router.
const TCP_PORT: u16 = 8080;
const UDP_PORT: u16 = 8081;
/// Bytes in one write.
const CHUNK: usize = 64 * 1024;
/// Bytes of a datagram, and how many go at once: fewer than a receive buffer holds.
const DATAGRAM: usize = 64;
const BURST: usize = 64;
/// DNS queries a second, and how many go at once.
const QUERIES_PER_SECOND: u32 = 5_000;
const QUERIES: u32 = 5;
/// Until the agent must have counted what was sent.
const PATIENCE: Duration = Duration::from_secs(5);

/// One kind of traffic.
struct Load {
    name: &'static str,
    unit: &'static str,
    /// Makes a little of it, in the client's namespace; returns how much.
    step: Box<dyn FnMut() -> Result<u64> + Send>,
    /// It is paced: its rate says nothing.
    is_paced: bool,
    /// What must be left of it; nothing is asked where an attempt for each few packets is the point.
    must: Must,
}

/// What one run of a load took.
struct Run {
    amount: u64,
    elapsed: Duration,
    cpu: Duration,
}

/// All kinds with and without the agent.
///
/// # Errors
/// The lab or the agent does not start, or a packet is lost.
pub fn quiet(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    let mut loads = vec![
        bulk(&lab)?,
        datagrams(&lab)?,
        connects(&lab)?,
        queries(&lab)?,
    ];
    let helpers = ksoftirqd()?;
    // By load; of each without and with the agent.
    let mut runs: Vec<[Vec<Run>; 2]> = loads.iter().map(|_| Default::default()).collect();
    let mut share = Vec::new();
    for round in 0..ROUNDS {
        for turn in 0..2 {
            let with = (round + turn) % 2;
            let agent = if with == 1 { Some(start(&lab)?) } else { None };
            for (load, runs) in loads.iter_mut().zip(&mut runs) {
                let before = agent.as_ref().map(|agent| kernel::cpu_time(agent.pid()));
                let run = lab.within(Host::Client, || run(load, agent.as_ref(), &helpers))?;
                if let (true, Some(agent), Some(before)) = (load.is_paced, &agent, before) {
                    let used = kernel::cpu_time(agent.pid())? - before?;
                    share.push(used.as_secs_f64() / run.elapsed.as_secs_f64() * 100.0);
                }
                runs[with].push(run);
            }
            if let Some(agent) = agent {
                agent.stop()?;
            }
        }
    }
    for (load, runs) in loads.iter().zip(&runs) {
        compare(report, load, runs);
    }
    report.figure(
        format!("agent's CPU at {QUERIES_PER_SECOND} queries a second, of one core"),
        median(&share),
        "%",
        Must::Shown,
    );
    counted(report, &lab, &mut loads)
}

fn start(lab: &Lab) -> Result<Agent> {
    let objects = objects::with_workloads(objects::list(lab));
    Agent::start_unfollowed(&lab.node(), &objects, &[])
}

fn compare(report: &mut Report, load: &Load, runs: &[Vec<Run>; 2]) {
    let rate = |run: &Run| run.amount as f64 / run.elapsed.as_secs_f64();
    let work = |run: &Run| run.amount as f64 / run.cpu.as_secs_f64();
    let added: Vec<f64> = runs[1]
        .iter()
        .zip(&runs[0])
        .map(|(with, without)| (1.0 / work(with) - 1.0 / work(without)) * 1e9)
        .collect();
    report.figure(
        format!("{}: CPU time added for one of {}", load.name, load.unit),
        median(&added),
        "ns",
        Must::Shown,
    );
    let measures = [
        ("a second", rate as fn(&Run) -> f64),
        ("a CPU second", work),
    ];
    for (per, measure) in measures {
        // The rate of what is paced is its pace.
        if load.is_paced && per == "a second" {
            continue;
        }
        let [without, with] = [0, 1].map(|i| runs[i].iter().map(measure).collect::<Vec<f64>>());
        let ratios: Vec<f64> = with.iter().zip(&without).map(|(a, b)| a / b).collect();
        let name = format!("{}, {} {per}", load.name, load.unit);
        report.figure(
            format!("{name}: without"),
            median(&without).round(),
            "",
            Must::Shown,
        );
        report.figure(
            format!("{name}: with whydrop"),
            median(&with).round(),
            "",
            Must::Shown,
        );
        report.figure(
            format!("{name}: with / without"),
            median(&ratios),
            "",
            load.must.clone(),
        );
        report.round(json!({"load": load.name, "unit": load.unit, "per": per,
            "without": without, "with": with}));
    }
}

/// Runs a load for a while.
fn run(load: &mut Load, agent: Option<&Agent>, helpers: &[u32]) -> Result<Run> {
    let cpu = || -> Result<Duration> {
        let mut sum = Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?);
        for pid in helpers.iter().copied().chain(agent.map(Agent::pid)) {
            sum += kernel::cpu_time(pid)?;
        }
        Ok(sum)
    };
    // Warm: caches, maps, the congestion window.
    let warm = Instant::now();
    while warm.elapsed() < TIME / 10 {
        (load.step)()?;
    }
    let (before, started) = (cpu()?, Instant::now());
    let mut amount = 0;
    while started.elapsed() < TIME {
        amount += (load.step)()?;
    }
    let elapsed = started.elapsed();
    Ok(Run {
        amount,
        elapsed,
        cpu: cpu()? - before,
    })
}

/// Time in the agent's programs for each unit of work, and whether it counted all of it.
fn counted(report: &mut Report, lab: &Lab, loads: &mut [Load]) -> Result<()> {
    let agent = start(lab)?;
    let spent = || -> Result<BTreeMap<String, u64>> {
        let programs = kernel::programs(agent.pid())?.into_iter();
        Ok(programs
            .map(|program| (program.name, program.run_ns))
            .collect())
    };
    let mut amounts = Vec::new();
    for load in &mut *loads {
        let stats = enable_stats(Stats::RunTime).context("switch statistics on")?;
        let (before, started) = (spent()?, Instant::now());
        let amount = lab.within(Host::Client, || -> Result<u64> {
            let mut amount = 0;
            while started.elapsed() < TIME {
                amount += (load.step)()?;
            }
            Ok(amount)
        })?;
        let after = spent()?;
        drop(stats);
        let by_program: BTreeMap<&str, f64> = after
            .iter()
            .map(|(name, ns)| {
                let ns = ns - before.get(name).copied().unwrap_or(0);
                (name.as_str(), ns as f64 / amount as f64)
            })
            .filter(|(_, ns)| *ns > 0.0)
            .collect();
        let ns = by_program.values().sum();
        report.round(json!({"load": load.name, "unit": load.unit, "ns_by_program": by_program}));
        report.figure(
            format!(
                "{}: in all programs for one of {}, with their measurement",
                load.name, load.unit
            ),
            ns,
            "ns",
            Must::Shown,
        );
        amounts.push(amount);
    }
    let [_, _, connects, queries] = amounts[..] else {
        anyhow::bail!("not four loads");
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let results = Results::read(lab, &agent, "client")?;
        let dns = Dns::read(lab, &agent, "client")?;
        let answered = dns.responses.get("NOERROR").copied().unwrap_or(0);
        let all = [results.sum(), results.established, dns.queries, answered];
        if all == [connects, connects, queries, queries] || Instant::now() > deadline {
            for (name, counted, made) in [
                ("connects counted", results.sum(), connects),
                ("of them established", results.established, connects),
                ("queries counted", dns.queries, queries),
                ("of them answered", answered, queries),
            ] {
                report.count(name, counted, Must::Exactly(made as f64));
            }
            break;
        }
        thread::sleep(POLL);
    }
    agent.stop()?;
    Ok(())
}

/// The kernel's threads for soft interrupts that nobody else has time for.
fn ksoftirqd() -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("read /proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        // Not in a container, whose /proc has none of the kernel's.
        if comm.starts_with("ksoftirqd/") && kernel::cpu_time(pid).is_ok() {
            found.push(pid);
        }
    }
    Ok(found)
}

fn router(lab: &Lab, port: u16) -> SocketAddr {
    lab.socket(Place::RouterTowards(Host::Client), Family::V4, port)
}

/// One TCP connection, in bytes.
fn bulk(lab: &Lab) -> Result<Load> {
    let at = router(lab, TCP_PORT);
    let listener = lab.within(Host::Router, || TcpListener::bind(at))?;
    let mut client = lab.within(Host::Client, || TcpStream::connect(at))?;
    let (mut server, _) = listener.accept()?;
    client.set_nonblocking(true)?;
    let (mut sent, mut buffer) = (0_u64, vec![0; CHUNK]);
    let mut received = 0_u64;
    let chunk = vec![0; CHUNK];
    let step = move || -> Result<u64> {
        let begun = received;
        match client.write(&chunk) {
            Ok(bytes) => sent += bytes as u64,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("write"),
        }
        // What was just sent has arrived, or does so while this waits.
        while received < sent {
            let bytes = server.read(&mut buffer).context("read")?;
            ensure!(bytes > 0, "the connection ended");
            received += bytes as u64;
        }
        Ok((received - begun) >> 10)
    };
    Ok(Load {
        name: "TCP bulk",
        unit: "KiB",
        step: Box::new(step),
        is_paced: false,
        must: Must::AtLeast(0.97),
    })
}

/// Small datagrams to a socket that reads them.
fn datagrams(lab: &Lab) -> Result<Load> {
    let at = router(lab, UDP_PORT);
    let server = lab.within(Host::Router, || UdpSocket::bind(at))?;
    server.set_read_timeout(Some(PATIENCE))?;
    let client = lab.within(Host::Client, || -> Result<_> {
        let socket = UdpSocket::bind(lab.socket(Place::Of(Host::Client), Family::V4, 0))?;
        socket.connect(at)?;
        Ok(socket)
    })?;
    let payload = [0; DATAGRAM];
    let mut buffers = vec![[0; DATAGRAM]; BURST];
    let step = move || -> Result<u64> {
        let no_control: [ControlMessage<'_>; 0] = [];
        let to: [Option<SockaddrStorage>; BURST] = [None; BURST];
        let mut headers = MultiHeaders::preallocate(BURST, None);
        let slices = [[IoSlice::new(&payload)]; BURST];
        let flags = MsgFlags::empty();
        let sent = sendmmsg(
            client.as_raw_fd(),
            &mut headers,
            &slices,
            to,
            no_control,
            flags,
        )
        .context("send datagrams")?
        .count();
        let mut received = 0;
        while received < sent {
            let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BURST, None);
            let mut slices: Vec<_> = buffers.iter_mut().map(|b| [IoSliceMut::new(b)]).collect();
            let flags = MsgFlags::MSG_WAITFORONE;
            received += recvmmsg(
                server.as_raw_fd(),
                &mut headers,
                slices.iter_mut(),
                flags,
                None,
            )
            .context("a datagram is lost")?
            .count();
        }
        Ok(sent as u64)
    };
    Ok(Load {
        name: "UDP, 64 bytes",
        unit: "packets",
        step: Box::new(step),
        is_paced: false,
        must: Must::AtLeast(0.97),
    })
}

/// Connects that are accepted, and closed by the server first, so that the client's ports are free.
fn connects(lab: &Lab) -> Result<Load> {
    let at = router(lab, TCP_PORT + 2);
    let listener = lab.within(Host::Router, || TcpListener::bind(at))?;
    let step = move || -> Result<u64> {
        let mut client = TcpStream::connect(at).context("connect")?;
        let (server, _) = listener.accept().context("accept")?;
        drop(server);
        ensure!(client.read(&mut [0; 1])? == 0, "the server said something");
        Ok(1)
    };
    Ok(Load {
        name: "TCP connects",
        unit: "connects",
        step: Box::new(step),
        is_paced: false,
        must: Must::Shown,
    })
}

/// Queries at a steady pace, each answered.
fn queries(lab: &Lab) -> Result<Load> {
    let at = router(lab, DNS);
    let server = lab.within(Host::Router, || UdpSocket::bind(at))?;
    let client = lab.within(Host::Client, || -> Result<_> {
        let socket = UdpSocket::bind(lab.socket(Place::Of(Host::Client), Family::V4, 0))?;
        socket.connect(at)?;
        Ok(socket)
    })?;
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(PATIENCE))?;
    }
    let (mut id, mut due) = (0_u16, Instant::now());
    let mut buffer = [0; 512];
    let step = move || -> Result<u64> {
        let now = Instant::now();
        if let Some(early) = due.checked_duration_since(now) {
            thread::sleep(early);
        } else if now - due > TIME / 10 {
            // Another load ran meanwhile, or the machine was busy: nothing is caught up on.
            due = now;
        }
        due += Duration::from_secs(1) * QUERIES / QUERIES_PER_SECOND;
        for _ in 0..QUERIES {
            client.send(&dns_query(id, "db.shop.svc.cluster.local", A))?;
            let (length, from) = server.recv_from(&mut buffer).context("a query is lost")?;
            // QR: enough of an answer for a client that only looks at its id.
            buffer[2] |= 0x80;
            server.send_to(&buffer[..length], from)?;
            client.recv(&mut buffer).context("an answer is lost")?;
            id = id.wrapping_add(1);
        }
        Ok(QUERIES.into())
    };
    Ok(Load {
        name: "DNS, paced",
        unit: "queries",
        step: Box::new(step),
        is_paced: true,
        must: Must::Shown,
    })
}
