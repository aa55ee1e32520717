//! `memory` and `idle`: what the agent takes by being there.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use whydrop::source::budget::Budget;

use super::report::{Must, Report};
use super::{flows, kernel};
use crate::agent::Agent;
use crate::lab::Lab;

const MIB: u64 = 1 << 20;
/// Sizes for `--map-memory`; 32 MiB is the default.
const SIZES_MIB: [u64; 3] = [8, 32, 128];
/// CPUs of a large machine.
const MANY_CPUS: usize = 128;
/// How long the idle agent is looked at.
const IDLE: Duration = Duration::from_secs(20);

/// What all maps take, as the kernel reports it here, and as computed for many CPUs.
///
/// # Errors
/// The agent does not start, or the kernel does not report it.
pub fn memory(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    let cpus = aya::util::nr_cpus()
        .map_err(|(_, error)| error)
        .context("count the CPUs")?;
    let in_mib = |bytes: u64| bytes as f64 / MIB as f64;
    for size_mib in SIZES_MIB {
        let size = format!("{size_mib}MiB");
        let agent =
            Agent::start_unfollowed(&lab.node(), &flows::objects(&lab), &["--map-memory", &size])?;
        let maps = kernel::maps(agent.pid())?;
        agent.stop()?;
        let bytes: u64 = maps.iter().map(|map| map.bytes).sum();
        let budget = Budget::new(size_mib * MIB, cpus)?;
        let limit = Must::AtMost(size_mib as f64);
        report.figure(
            format!("{size}: reported by the kernel, {cpus} CPUs"),
            in_mib(bytes),
            "MiB",
            limit,
        );
        report.figure(
            format!("{size}: computed, {cpus} CPUs"),
            in_mib(budget.total_bytes),
            "MiB",
            Must::AtLeast(in_mib(bytes)),
        );
        report.count(
            format!("{size}: flows that fit, {cpus} CPUs"),
            budget.flows.into(),
            Must::Shown,
        );
        report.round(json!({
            "map_memory_mib": size_mib, "cpus": cpus, "reported_bytes": bytes, "budget": budget,
            "maps": maps.iter().map(|map| json!({
                "map": map.name, "max_entries": map.max_entries, "bytes": map.bytes,
            })).collect::<Vec<_>>(),
        }));
    }
    for size_mib in SIZES_MIB {
        match Budget::new(size_mib * MIB, MANY_CPUS) {
            Ok(budget) => {
                report.figure(
                    format!("{size_mib}MiB: computed, {MANY_CPUS} CPUs"),
                    in_mib(budget.total_bytes),
                    "MiB",
                    Must::AtMost(size_mib as f64),
                );
                report.count(
                    format!("{size_mib}MiB: flows that fit, {MANY_CPUS} CPUs"),
                    budget.flows.into(),
                    Must::Shown,
                );
            }
            Err(error) => {
                report.skipped(
                    format!("{size_mib}MiB: computed, {MANY_CPUS} CPUs"),
                    error.to_string(),
                );
            }
        }
    }
    Ok(())
}

/// CPU and memory of an agent with nothing to see.
///
/// # Errors
/// The agent does not start.
pub fn idle(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    let agent = Agent::start_unfollowed(&lab.node(), &flows::objects(&lab), &[])?;
    // What starting takes is over.
    std::thread::sleep(Duration::from_secs(2));
    let (cpu, started) = (kernel::cpu_time(agent.pid())?, Instant::now());
    std::thread::sleep(IDLE);
    let used = kernel::cpu_time(agent.pid())? - cpu;
    let percent = used.as_secs_f64() / started.elapsed().as_secs_f64() * 100.0;
    let mib = |field| {
        Ok::<_, anyhow::Error>(kernel::status_bytes(agent.pid(), field)? as f64 / MIB as f64)
    };
    report.figure("CPU, of one core", percent, "%", Must::Below(0.2));
    report.figure("RSS", mib("VmRSS")?, "MiB", Must::Below(25.0));
    report.figure(
        "RSS, of it not backed by the binary",
        mib("RssAnon")?,
        "MiB",
        Must::Shown,
    );
    report.figure("RSS while it started", mib("VmHWM")?, "MiB", Must::Shown);
    agent.stop()?;
    Ok(())
}
