//! `cost` and `sender`: what a drop costs, beside peers.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::sys::{Stats, enable_stats};
use serde_json::json;

use super::flows::{self, Amount, Flows};
use super::report::{Must, Report, median};
use super::watch::{Bpftrace, Watcher};
use crate::lab::{Family, Lab};

/// Addresses that send and ports: 5,000 flows.
const SOURCES: u16 = 50;
const PORTS: u16 = 100;
/// Rounds in which everyone has a turn.
const ROUNDS: usize = 7;
/// Packets in each flow before anything is measured: programs, maps and neighbours are warm.
const WARM: u64 = 2;
/// Packets in each flow while `cost` measures: 100,000.
const EACH: u64 = 20;
/// How long `sender` measures.
const TIME: Duration = Duration::from_secs(1);

/// Values by watcher, one a round.
type Rounds = BTreeMap<&'static str, Vec<f64>>;

/// The ratio in each round, and of these the one in the middle.
fn ratio(rounds: &Rounds, above: Watcher, below: Watcher, off: Watcher) -> Option<f64> {
    let of = |watcher: Watcher| {
        rounds
            .get(watcher.name())
            .filter(|values| !values.is_empty())
    };
    let (above, below) = (of(above)?, of(below)?);
    let zero = vec![0.0; above.len()];
    let off = of(off).unwrap_or(&zero);
    let ratios: Vec<f64> = above
        .iter()
        .zip(below)
        .zip(off)
        .map(|((a, b), off)| (a - off) / (b - off))
        .collect();
    Some(median(&ratios))
}

/// Everyone who can take part; says who cannot.
fn watchers(report: &mut Report, wanted: &[Watcher]) -> Vec<Watcher> {
    let bpftrace = Bpftrace::is_installed();
    if !bpftrace {
        report.skipped(Watcher::Bpftrace.name(), "it is not installed");
    }
    wanted
        .iter()
        .copied()
        .filter(|w| bpftrace || *w != Watcher::Bpftrace)
        .collect()
}

/// Nanoseconds in the program on kfree_skb for each drop.
///
/// # Errors
/// The lab, a program or the agent does not start.
pub fn cost(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    flows::drop_at_router(&lab)?;
    let wanted = [
        Watcher::Empty,
        Watcher::Minimal,
        Watcher::Whydrop,
        Watcher::Bpftrace,
    ];
    let watchers = watchers(report, &wanted);
    for family in Family::BOTH {
        let flows = Flows::to_ports(&lab, family, SOURCES, PORTS)?;
        let mut rounds = Rounds::new();
        for round in 0..ROUNDS {
            for turn in 0..watchers.len() {
                let watcher = watchers[(round + turn) % watchers.len()];
                let ns = cost_of(watcher, &lab, family, &flows)
                    .with_context(|| format!("measure {}", watcher.name()))?;
                rounds.entry(watcher.name()).or_default().push(ns);
            }
        }
        for watcher in &watchers {
            let ns = median(rounds.get(watcher.name()).map_or(&[][..], Vec::as_slice));
            report.figure(
                format!("{family}: {}", watcher.name()),
                ns,
                "ns",
                Must::Shown,
            );
        }
        for (peer, limit) in [(Watcher::Minimal, 1.5), (Watcher::Bpftrace, 0.7)] {
            if let Some(ratio) = ratio(&rounds, Watcher::Whydrop, peer, Watcher::Empty) {
                report.figure(
                    format!("{family}: whydrop / {}", peer.name()),
                    ratio,
                    "",
                    Must::AtMost(limit),
                );
            }
        }
        report.round(json!({"family": family.to_string(), "ns": rounds}));
    }
    Ok(())
}

fn cost_of(watcher: Watcher, lab: &Lab, family: Family, flows: &Flows) -> Result<f64> {
    let watching = watcher.start(lab, family)?;
    flows.send(lab, Amount::Each(WARM))?;
    let stats = enable_stats(Stats::RunTime).context("switch statistics on")?;
    let before = watching.spent()?;
    flows.send(lab, Amount::Each(EACH))?;
    let after = watching.spent()?;
    drop(stats);
    let (runs, ns) = (after.0 - before.0, after.1 - before.1);
    ensure!(
        runs >= flows.len() * EACH,
        "the program ran {runs} times for {} drops",
        flows.len() * EACH
    );
    watching.stop()?;
    Ok(ns as f64 / runs as f64)
}

/// Packets that the sender gets rid of in a second when all are dropped.
///
/// # Errors
/// As [`cost`].
pub fn sender(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    flows::drop_at_router(&lab)?;
    let wanted = [
        Watcher::Nothing,
        Watcher::Minimal,
        Watcher::Whydrop,
        Watcher::Bpftrace,
    ];
    let watchers = watchers(report, &wanted);
    for family in Family::BOTH {
        let flows = Flows::to_ports(&lab, family, SOURCES, PORTS)?;
        let mut rounds = Rounds::new();
        let mut cpu = Rounds::new();
        for round in 0..ROUNDS {
            for turn in 0..watchers.len() {
                let watcher = watchers[(round + turn) % watchers.len()];
                let watching = watcher
                    .start(&lab, family)
                    .with_context(|| format!("start {}", watcher.name()))?;
                flows.send(&lab, Amount::Each(WARM))?;
                let before = watching.cpu_time()?;
                let sent = flows.send(&lab, Amount::For(TIME))?;
                let used = watching.cpu_time()? - before;
                watching.stop()?;
                let used = used.as_secs_f64() / sent.elapsed.as_secs_f64() * 100.0;
                cpu.entry(watcher.name()).or_default().push(used);
                rounds.entry(watcher.name()).or_default().push(sent.rate());
            }
        }
        for watcher in &watchers {
            let rate = median(rounds.get(watcher.name()).map_or(&[][..], Vec::as_slice));
            report.figure(
                format!("{family}: {}", watcher.name()),
                rate.round(),
                "packets/s",
                Must::Shown,
            );
        }
        let of = |above, below| ratio(&rounds, above, below, Watcher::Empty);
        for watcher in &watchers[1..] {
            if let Some(ratio) = of(*watcher, Watcher::Nothing) {
                report.figure(
                    format!("{family}: {} / nothing", watcher.name()),
                    ratio,
                    "",
                    Must::Shown,
                );
            }
        }
        if let Some(ratio) = of(Watcher::Whydrop, Watcher::Minimal) {
            let name = format!("{family}: whydrop / minimal program");
            report.figure(name, ratio, "", Must::AtLeast(0.98));
        }
        if let Some(ratio) = of(Watcher::Whydrop, Watcher::Bpftrace) {
            report.figure(
                format!("{family}: whydrop / bpftrace"),
                ratio,
                "",
                Must::Above(1.0),
            );
        }
        if let Some(used) = cpu.get(Watcher::Whydrop.name()) {
            report.figure(
                format!("{family}: the agent's CPU, of one core"),
                median(used),
                "%",
                Must::Shown,
            );
        }
        report.round(json!({
            "family": family.to_string(), "packets_per_second": rounds, "cpu_percent": cpu,
        }));
    }
    Ok(())
}
