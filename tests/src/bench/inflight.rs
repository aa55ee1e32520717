//! `inflight`: very many connects that hang at once.

use std::net::IpAddr;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use super::report::{Must, Report};
use super::{flows, kernel};
use crate::agent::{Agent, POLL, Sample};
use crate::connects::{Connects, Options};
use crate::lab::{Family, Host, Lab, Place, command, enter};
use crate::objects;
use crate::tallies::{self, Results};

/// Connects that hang at once.
const CONNECTS: u64 = 100_000;
/// Threads that hold them: a thread with a table of files of its own may have as many open as a
/// process, and a process often no more than 20,000.
const THREADS: u64 = 10;
/// Addresses of the client, one for each thread, and destination ports.
const PORTS: u16 = 5;
/// The agent's timeout: longer than it takes to make all of them, so that all wait at once.
const TIMEOUT: Duration = Duration::from_secs(30);
const ARGUMENTS: [&str; 2] = ["--syn-timeout", "30s"];
/// How long CPU and memory are looked at while all of them hang.
const WATCHED: Duration = Duration::from_secs(5);
/// Until all must be told after the timeout.
const PATIENCE: Duration = Duration::from_secs(15);

/// 100,000 connects in flight: what the agent takes meanwhile, and that each is told or counted as
/// lost.
///
/// # Errors
/// The lab or the agent does not start, or this machine cannot hold so many sockets.
pub fn inflight(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    lab.nft(
        Host::Router,
        &format!(
            "table inet inflight {{ chain c {{ type filter hook prerouting priority -300;
               tcp dport {}-{} drop
             }}
             }}",
            flows::FIRST_PORT,
            flows::FIRST_PORT + PORTS - 1
        ),
    )?;
    let sources = addresses(&lab)?;
    let objects = objects::with_workloads(flows::objects(&lab));
    let agent = Agent::start_unfollowed(&lab.node(), &objects, &ARGUMENTS)?;
    let mib = |field| {
        Ok::<_, anyhow::Error>(
            kernel::status_bytes(agent.pid(), field)? as f64 / f64::from(1 << 20),
        )
    };
    report.figure("RSS before", mib("VmRSS")?, "MiB", Must::Shown);

    let (ready, done) = (
        Barrier::new(sources.len() + 1),
        Barrier::new(sources.len() + 1),
    );
    let netns = lab.netns(Host::Client);
    let started = Instant::now();
    thread::scope(|scope| -> Result<()> {
        let holders: Vec<_> = sources
            .iter()
            .map(|source| {
                let (lab, netns, ready, done) = (&lab, &netns, &ready, &done);
                scope.spawn(move || -> Result<usize> {
                    let held = hold(lab, netns, *source);
                    ready.wait();
                    // Checked after the barriers, at which the others wait as well.
                    done.wait();
                    Ok(held?.iter().count())
                })
            })
            .collect();
        ready.wait();
        let result = watch(report, &lab, &agent, started);
        done.wait();
        let mut held = 0;
        for holder in holders {
            match holder.join() {
                Ok(count) => held += count?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        report.count("connects", held as u64, Must::Exactly(CONNECTS as f64));
        result
    })?;
    report.figure("RSS after", mib("VmRSS")?, "MiB", Must::Shown);
    report.figure("RSS at most", mib("VmHWM")?, "MiB", Must::Shown);
    agent.stop()?;
    Ok(())
}

/// Gives the client an address for each thread.
fn addresses(lab: &Lab) -> Result<Vec<IpAddr>> {
    let sources: Vec<IpAddr> = (0..THREADS)
        .map(|n| flows::source(lab, Family::V4, n as u16))
        .collect();
    let script: String = sources
        .iter()
        .map(|address| format!("addr replace {address}/32 dev eth0\n"))
        .collect();
    command(
        &["ip", "-n", &lab.netns(Host::Client), "-batch", "-"],
        Some(&script),
    )?;
    Ok(sources)
}

/// One thread's part, in a table of files of its own.
fn hold(lab: &Lab, netns: &str, source: IpAddr) -> Result<Connects> {
    enter(netns)?;
    unshare(CloneFlags::CLONE_FILES).context("get a table of files for a thread")?;
    let to = (0..CONNECTS / THREADS).map(|n| {
        let port = flows::FIRST_PORT + (n % u64::from(PORTS)) as u16;
        lab.socket(Place::Of(Host::Server), Family::V4, port)
    });
    let options = Options {
        from: Some(source),
        ..Options::default()
    };
    Connects::open(to, options)
}

/// What the agent takes while all of them hang, and what it says when their time is over.
fn watch(report: &mut Report, lab: &Lab, agent: &Agent, started: Instant) -> Result<()> {
    let opened = started.elapsed();
    report.figure("time to open all", opened.as_secs_f64(), "s", Must::Shown);
    ensure!(
        opened + WATCHED < TIMEOUT,
        "it takes {opened:?} to open all: the first are told before"
    );
    let (cpu, watched) = (kernel::cpu_time(agent.pid())?, Instant::now());
    thread::sleep(WATCHED);
    let used = kernel::cpu_time(agent.pid())? - cpu;
    let percent = used.as_secs_f64() / watched.elapsed().as_secs_f64() * 100.0;
    report.figure("CPU while all hang, of one core", percent, "%", Must::Shown);
    let (cpu, deadline) = (
        kernel::cpu_time(agent.pid())?,
        started + opened + TIMEOUT + PATIENCE,
    );
    let mut told;
    loop {
        told = Told::read(lab, agent)?;
        if told.unanswered + told.lost >= CONNECTS || Instant::now() > deadline {
            break;
        }
        thread::sleep(POLL * 10);
    }
    // One too many would come after the last.
    thread::sleep(Duration::from_secs(2));
    told = Told::read(lab, agent)?;
    let used = kernel::cpu_time(agent.pid())? - cpu;
    report.figure(
        "CPU time until all are told",
        used.as_secs_f64(),
        "s",
        Must::Shown,
    );
    report.count("told unanswered", told.unanswered, Must::Shown);
    report.count("not followed, and counted so", told.lost, Must::Shown);
    report.count(
        "both together",
        told.unanswered + told.lost,
        Must::Exactly(CONNECTS as f64),
    );
    report.count(
        "whydrop_connects_total, unanswered",
        told.results.unanswered,
        Must::Exactly(told.unanswered as f64),
    );
    report.count(
        "whydrop_connects_total, any other",
        told.results.sum() - told.results.unanswered,
        Must::Exactly(0.0),
    );
    report.round(json!({"lost_by_stage": told.stages}));
    Ok(())
}

/// What the agent counts.
struct Told {
    unanswered: u64,
    lost: u64,
    results: Results,
    stages: Vec<(String, f64)>,
}

impl Told {
    fn read(lab: &Lab, agent: &Agent) -> Result<Self> {
        let samples = agent.metrics()?;
        let named = |name: &'static str| samples.iter().filter(move |sample| sample.name == name);
        let stage = |sample: &&Sample| sample.label("stage") == "connects";
        let lost: f64 = named("whydrop_events_lost_total")
            .filter(stage)
            .map(|sample| sample.value)
            .sum();
        let mut results = Results::default();
        let mut unanswered = 0;
        for n in 0..THREADS {
            let workload = format!("source-{n}");
            let of = Results::read(lab, agent, &workload)?;
            results.established += of.established;
            results.refused += of.refused;
            results.unanswered += of.unanswered;
            results.abandoned += of.abandoned;
            let labels = [("kind", "syn")];
            unanswered += tallies::sum(
                lab,
                &samples,
                "whydrop_unanswered_total",
                &workload,
                &labels,
            );
        }
        Ok(Self {
            unanswered,
            lost: lost as u64,
            results,
            stages: named("whydrop_events_lost_total")
                .map(|sample| (sample.label("stage").to_owned(), sample.value))
                .collect(),
        })
    }
}
