//! `hooks`: what each hook at which DNS or answers could be seen costs traffic that is fine.
//!
//! Each candidate is attached alone, for one turn; before or after it is a turn with nothing attached.
//! A turn's value is the middle of many batches, and what is shown is the middle of the differences of
//! many rounds, with the two quartiles in brackets. `docs/hooks.md` reads the table.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aya::sys::{Stats, enable_stats};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde_json::json;

use super::candidates::{CANDIDATES, Link, Programs, Who};
use super::ends::{Ends, Traffic};
use super::kernel;
use super::report::{Must, Report, cpus, median, percentile};
use super::watch::{Watcher, Watching};
use crate::lab::{Family, Host, Lab};

/// Rounds in which every candidate has a turn, unless `WHYDROP_BENCH_ROUNDS` says otherwise.
const ROUNDS: usize = 21;
/// CPU time of a turn.
const TURN: Duration = Duration::from_millis(20);
/// Turns with the kernel's own statistics, which cost some 50 ns for each run.
const COUNTED: usize = 5;

/// Values by kind of traffic, one a round: without and with.
type Rounds = BTreeMap<&'static str, [Vec<f64>; 2]>;

/// Nanoseconds that each candidate adds to each kind of traffic.
///
/// # Errors
/// The lab or the agent does not start.
pub fn hooks(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    let mut bench = Bench::new(&lab)?;
    let mut taken = Vec::new();
    for (name, who) in CANDIDATES {
        match bench.attach(*who) {
            Ok(_) => taken.push((*name, *who)),
            Err(why) => report.skipped(*name, format!("{why:#}")),
        }
    }
    let rounds = std::env::var("WHYDROP_BENCH_ROUNDS")
        .map_or(Ok(ROUNDS), |text| text.parse())
        .context("WHYDROP_BENCH_ROUNDS is no number")?;
    let mut values: Vec<Rounds> = vec![Rounds::new(); taken.len()];
    for round in 0..rounds {
        for turn in 0..taken.len() {
            let at = (round + turn) % taken.len();
            // Which comes first alternates.
            for with in [round % 2 == 0, round % 2 == 1] {
                let attached = if with {
                    Some(bench.attach(taken[at].1)?)
                } else {
                    None
                };
                for traffic in Traffic::ALL {
                    let ns = bench.turn(traffic)?;
                    values[at].entry(traffic.name()).or_default()[usize::from(with)].push(ns);
                }
                drop(attached);
            }
        }
    }
    shown(report, &taken, &values);
    if bench.clock == ClockId::CLOCK_MONOTONIC {
        report.skipped(
            "CPU time",
            "this kernel charges softirqs to nobody: time on the wall",
        );
    }
    let mut counted = Vec::new();
    for (name, who) in &taken {
        counted.push(bench.counted(*who).with_context(|| (*name).to_owned())?);
    }
    report.grid(
        "runs for each, nanoseconds in one with its measurement, and how many pass the gate",
        &head(),
        taken
            .iter()
            .zip(counted)
            .map(|((name, _), cells)| [vec![(*name).to_owned()], cells].concat())
            .collect(),
    );
    Ok(())
}

/// The table of what is added.
fn shown(report: &mut Report, taken: &[(&'static str, Who)], values: &[Rounds]) {
    for traffic in Traffic::ALL {
        let all: Vec<f64> = values
            .iter()
            .filter_map(|rounds| rounds.get(traffic.name()))
            .flat_map(|[without, _]| without.iter().copied())
            .collect();
        let name = format!("{}: nothing attached", traffic.name());
        report.figure(name, median(&all).round(), "ns", Must::Shown);
    }
    let mut rows = Vec::new();
    for ((name, _), rounds) in taken.iter().zip(values) {
        let mut row = vec![(*name).to_owned()];
        for traffic in Traffic::ALL {
            let [without, with] = rounds.get(traffic.name()).cloned().unwrap_or_default();
            let added: Vec<f64> = with.iter().zip(&without).map(|(a, b)| a - b).collect();
            row.push(quartiles(&added));
            report.round(json!({
                "candidate": name, "traffic": traffic.name(), "without_ns": without, "with_ns": with,
                "added_ns": median(&added),
            }));
        }
        rows.push(row);
    }
    report.grid(
        "nanoseconds that are added to each: median (quartiles)",
        &head(),
        rows,
    );
}

fn quartiles(values: &[f64]) -> String {
    format!(
        "{:.0} ({:.0} to {:.0})",
        median(values),
        percentile(values, 25),
        percentile(values, 75)
    )
}

/// A column for each kind of traffic.
fn head() -> Vec<String> {
    let mut head = vec![String::new()];
    head.extend(Traffic::ALL.map(|traffic| traffic.name().to_owned()));
    head
}

/// What is measured with.
struct Bench<'a> {
    lab: &'a Lab,
    ends: Ends,
    programs: Programs,
    clock: ClockId,
}

impl<'a> Bench<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let mut bench = Self {
            lab,
            ends: Ends::new(lab)?,
            programs: Programs::open()?,
            clock: ClockId::CLOCK_MONOTONIC,
        };
        // Some kernels charge what runs in a softirq to nobody; then only a clock on the wall tells.
        let wall = bench.turn(Traffic::UdpConnected)?;
        bench.clock = ClockId::CLOCK_THREAD_CPUTIME_ID;
        if bench.turn(Traffic::UdpConnected)? < 0.8 * wall {
            bench.clock = ClockId::CLOCK_MONOTONIC;
        }
        Ok(bench)
    }

    /// Nanoseconds of one unit of traffic.
    fn turn(&mut self, traffic: Traffic) -> Result<f64> {
        let (ends, clock) = (&mut self.ends, self.clock);
        self.lab.within(Host::Client, || {
            pin();
            ends.work(traffic, traffic.batch())?;
            let (mut batches, mut spent) = (Vec::new(), Duration::ZERO);
            let mut due = Instant::now();
            while batches.len() < traffic.batches() || spent < TURN && traffic.pace().is_zero() {
                due += traffic.pace();
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                let before = Duration::from(clock_gettime(clock)?);
                ends.work(traffic, traffic.batch())?;
                let batch = Duration::from(clock_gettime(clock)?) - before;
                spent += batch;
                batches.push(batch.as_nanos() as f64 / traffic.batch() as f64);
            }
            Ok(median(&batches))
        })
    }

    /// Of one unit of each kind: how often the programs run, for how long, and what passes their gates.
    fn counted(&mut self, who: Who) -> Result<Vec<String>> {
        let attached = self.attach(who)?;
        let pid = attached.pid();
        let mut cells = Vec::new();
        for traffic in Traffic::ALL {
            let units = traffic.batch() * traffic.batches();
            let (mut runs, mut each, mut passed) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..COUNTED {
                let stats = enable_stats(Stats::RunTime).context("switch statistics on")?;
                let (spent_before, passed_before) = (spent(pid)?, self.programs.passed()?);
                let ends = &mut self.ends;
                self.lab.within(Host::Client, || {
                    pin();
                    ends.work(traffic, units)
                })?;
                let (spent, through) = (spent(pid)?, self.programs.passed()?);
                drop(stats);
                let (count, ns) = (spent.0 - spent_before.0, spent.1 - spent_before.1);
                runs.push(count as f64 / units as f64);
                each.push(ns as f64 / count.max(1) as f64);
                passed.push((through - passed_before) as f64 / units as f64);
            }
            cells.push(format!(
                "{:.2} x {:.0}, {:.2}",
                median(&runs),
                median(&each),
                median(&passed)
            ));
        }
        Ok(cells)
    }

    /// Attaches a candidate for as long as the result lives.
    fn attach(&mut self, who: Who) -> Result<Attached> {
        match who {
            Who::Nobody => Ok(Attached::Links(Vec::new())),
            Who::Agent => Ok(Attached::Agent(
                Watcher::Whydrop.start(self.lab, Family::V4)?,
            )),
            Who::Hooks(hooks, waits) => Ok(Attached::Links(self.programs.attach(hooks, waits)?)),
        }
    }
}

/// A candidate that is attached; dropping it detaches.
enum Attached {
    Links(#[expect(dead_code, reason = "held to be dropped")] Vec<Link>),
    Agent(Watching),
}

impl Attached {
    /// Whose programs they are.
    fn pid(&self) -> u32 {
        match self {
            Self::Agent(Watching::Whydrop(agent)) => agent.pid(),
            _ => std::process::id(),
        }
    }
}

/// Runs of a process' programs, and nanoseconds in them.
fn spent(pid: u32) -> Result<(u64, u64)> {
    let programs = kernel::programs(pid)?;
    Ok(programs.iter().fold((0, 0), |(runs, ns), program| {
        (runs + program.runs, ns + program.run_ns)
    }))
}

/// Keeps the thread on one CPU; where they are not numbered from 0 the scheduler places it.
fn pin() {
    let mut set = CpuSet::new();
    if set.set(cpus() - 1).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}
