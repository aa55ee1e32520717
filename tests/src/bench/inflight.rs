//! `inflight`: very many connects that hang at once.

use std::fs;
use std::net::IpAddr;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;
use whydrop::source::budget::Budget;

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
const ARGUMENTS: [&str; 3] = ["--syn-timeout", "30s", "--map-memory"];
const MIB: u64 = 1 << 20;
/// The agent's own `--map-memory`.
const DEFAULT_MIB: u64 = 32;
/// How long CPU and memory are looked at while all of them hang.
const WATCHED: Duration = Duration::from_secs(5);
/// Until all must be told after the timeout.
const PATIENCE: Duration = Duration::from_secs(15);

/// 100,000 connects in flight: what the agent takes meanwhile, and that each is told or counted as
/// lost; with the maps as they are, and with maps that hold all of them.
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
    let cpus = aya::util::nr_cpus()
        .map_err(|(_, error)| error)
        .context("count the CPUs")?;
    let holds_all = |mib: &u64| {
        Budget::new(mib * MIB, cpus).is_ok_and(|budget| u64::from(budget.connects) >= CONNECTS)
    };
    let enough_mib = (5..20).map(|power| 1 << power).find(holds_all);
    let enough_mib = enough_mib.context("no size of the maps holds so many connects")?;
    for mib in [DEFAULT_MIB, enough_mib] {
        with_maps(report, &lab, &sources, mib)?;
    }
    Ok(())
}

/// The same with maps of one size.
fn with_maps(report: &mut Report, lab: &Lab, sources: &[IpAddr], mib: u64) -> Result<()> {
    let objects = objects::with_workloads(flows::objects(lab));
    let size = format!("{mib}MiB");
    let arguments = [&ARGUMENTS[..], &[&size]].concat();
    let agent = Agent::start_unfollowed(&lab.node(), &objects, &arguments)?;
    let rss = |report: &mut Report, when: &str, field| -> Result<()> {
        let bytes = kernel::status_bytes(agent.pid(), field)?;
        let name = format!("{size}: RSS {when}");
        report.figure(name, bytes as f64 / MIB as f64, "MiB", Must::Shown);
        Ok(())
    };
    rss(report, "before", "VmRSS")?;
    let (ready, done) = (
        Barrier::new(sources.len() + 1),
        Barrier::new(sources.len() + 1),
    );
    let netns = lab.netns(Host::Client);
    let others = own_connects()?;
    let started = Instant::now();
    thread::scope(|scope| -> Result<()> {
        let holders: Vec<_> = sources
            .iter()
            .map(|source| {
                let (netns, ready, done) = (&netns, &ready, &done);
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
        let result = watch(report, lab, &agent, &size, (started, others));
        done.wait();
        let mut held = 0;
        for holder in holders {
            match holder.join() {
                Ok(count) => held += count?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        report.count(
            format!("{size}: connects that were held"),
            held as u64,
            Must::Exactly(CONNECTS as f64),
        );
        result
    })?;
    rss(report, "after", "VmRSS")?;
    rss(report, "at most", "VmHWM")?;
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
fn watch(
    report: &mut Report,
    lab: &Lab,
    agent: &Agent,
    size: &str,
    (started, others): (Instant, u64),
) -> Result<()> {
    let mut figure = |what: &str, measured, unit, must| {
        report.figure(format!("{size}: {what}"), measured, unit, must);
    };
    let opened = started.elapsed();
    figure("time to open all", opened.as_secs_f64(), "s", Must::Shown);
    ensure!(
        opened + WATCHED < TIMEOUT,
        "it takes {opened:?} to open all: the first are told before"
    );
    let (cpu, watched) = (kernel::cpu_time(agent.pid())?, Instant::now());
    thread::sleep(WATCHED);
    let used = kernel::cpu_time(agent.pid())? - cpu;
    let percent = used.as_secs_f64() / watched.elapsed().as_secs_f64() * 100.0;
    let what = "CPU while all hang, of one core";
    figure(what, percent, "%", Must::Shown);
    let cpu = kernel::cpu_time(agent.pid())?;
    let deadline = started + opened + TIMEOUT + PATIENCE;
    loop {
        let told = Told::read(lab, agent)?;
        if told.unanswered + told.lost >= CONNECTS || Instant::now() > deadline {
            break;
        }
        thread::sleep(POLL * 10);
    }
    let used = kernel::cpu_time(agent.pid())? - cpu;
    let what = "CPU time until all are told, with what it takes to ask";
    figure(what, used.as_secs_f64(), "s", Must::Shown);
    // One too many would come after the last.
    thread::sleep(Duration::from_secs(2));
    let told = Told::read(lab, agent)?;
    let both = told.unanswered + told.lost;
    // Those that asked the agent meanwhile, and whoever else connects on this machine, also found no
    // room; what is lost is counted for the whole node.
    let others = own_connects()? - others;
    let mut count = |what: &str, measured: u64, must| {
        figure(what, measured as f64, "", must);
    };
    count("told unanswered", told.unanswered, Must::Shown);
    count("not followed, and counted so", told.lost, Must::Shown);
    count(
        "neither told nor counted",
        CONNECTS.saturating_sub(both),
        Must::Exactly(0.0),
    );
    count(
        "told and counted beyond them, as others connected",
        both.saturating_sub(CONNECTS),
        Must::CountAtMost(others as f64),
    );
    count(
        "whydrop_connects_total, unanswered",
        told.results.unanswered,
        Must::Exactly(told.unanswered as f64),
    );
    count(
        "whydrop_connects_total, any other",
        told.results.sum() - told.results.unanswered,
        Must::Exactly(0.0),
    );
    report.round(json!({"map_memory": size, "lost_by_stage": told.stages}));
    Ok(())
}

/// Connects of this namespace so far, also those that ask the agent.
fn own_connects() -> Result<u64> {
    let text = fs::read_to_string("/proc/net/snmp").context("read /proc/net/snmp")?;
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next(), lines.next());
    let index = names.and_then(|names| names.split(' ').position(|name| name == "ActiveOpens"));
    values
        .zip(index)
        .and_then(|(values, index)| values.split(' ').nth(index)?.parse().ok())
        .context("/proc/net/snmp has no ActiveOpens")
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
