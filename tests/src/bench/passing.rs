//! `passing`: what is left of the rate of traffic that is not dropped.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aya::sys::{Stats, enable_stats};
use serde_json::json;

use super::flows::{Amount, Flows};
use super::report::{Must, Report, median};
use super::watch::Watcher;
use crate::lab::{Family, Host, Lab, Place, TC_STOLEN};

/// Rounds, each with and without the agent; which comes first alternates.
const ROUNDS: usize = 11;
/// How long each kind of traffic is measured.
const TIME: Duration = Duration::from_millis(700);
/// Of the TCP server at the second pair.
const PORT: u16 = 80;
/// Bytes in one write.
const CHUNK: usize = 256 * 1024;

/// UDP packets and TCP bytes a second through the router, with and without the agent.
///
/// # Errors
/// The lab or the agent does not start.
pub fn passing(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    // Datagrams end where they arrive without being called a drop, so no reader is too slow.
    lab.tc(Host::Server, "eth0", "ingress", TC_STOLEN)?;
    let at = lab.socket(Place::Of(Host::Server2), Family::V4, PORT);
    let listener = lab
        .within(Host::Server2, || TcpListener::bind(at))
        .with_context(|| format!("listen at {at}"))?;
    let kinds = ["UDP IPv4", "UDP IPv6", "TCP bulk"];
    let units = ["packets/s", "packets/s", "MiB/s"];
    let mut flows = Vec::new();
    for family in Family::BOTH {
        flows.push(Flows::to_ports(&lab, family, 16, 16)?);
    }
    // By kind: without and with.
    let mut rates: [[Vec<f64>; 2]; 3] = Default::default();
    for round in 0..ROUNDS {
        for turn in 0..2 {
            let with = (round + turn) % 2;
            let watcher = [Watcher::Nothing, Watcher::Whydrop][with];
            let watching = watcher.start(&lab, Family::V4)?;
            for (flows, rates) in flows.iter().zip(&mut rates) {
                flows.send(&lab, Amount::Each(20))?;
                rates[with].push(flows.send(&lab, Amount::For(TIME))?.rate());
            }
            rates[2][with].push(bulk(&lab, &listener)?);
            watching.stop()?;
        }
    }
    let each = per_packet(&lab, &flows[0])?;
    for ((kind, unit), [without, with]) in kinds.iter().zip(units).zip(&rates) {
        report.figure(
            format!("{kind}: without"),
            median(without).round(),
            unit,
            Must::Shown,
        );
        report.figure(
            format!("{kind}: with whydrop"),
            median(with).round(),
            unit,
            Must::Shown,
        );
        let ratios: Vec<f64> = with
            .iter()
            .zip(without)
            .map(|(with, without)| with / without)
            .collect();
        report.figure(
            format!("{kind}: with / without"),
            median(&ratios),
            "",
            Must::AtLeast(0.99),
        );
        report.round(json!({"kind": kind, "unit": unit, "without": without, "with": with}));
    }
    report.figure(
        "time in net_dev_queue's program, with its measurement",
        each,
        "ns",
        Must::Shown,
    );
    Ok(())
}

/// Nanoseconds that each packet sent spends in the agent's program at `net_dev_queue`.
fn per_packet(lab: &Lab, flows: &Flows) -> Result<f64> {
    let watching = Watcher::Whydrop.start(lab, Family::V4)?;
    let stats = enable_stats(Stats::RunTime).context("switch statistics on")?;
    flows.send(lab, Amount::Each(400))?;
    drop(stats);
    let (runs, ns) = watching.spent_in("net_dev_queue")?;
    watching.stop()?;
    Ok(ns as f64 / runs.max(1) as f64)
}

/// MiB a second of one TCP connection of the second pair.
fn bulk(lab: &Lab, listener: &TcpListener) -> Result<f64> {
    let at = listener.local_addr()?;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<u64> {
            let (mut stream, _) = listener.accept().context("accept")?;
            let mut buffer = vec![0; CHUNK];
            let mut total = 0;
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(total),
                    bytes => total += bytes as u64,
                }
            }
        });
        let elapsed = lab.within(Host::Client2, || -> Result<Duration> {
            let mut stream = TcpStream::connect(at).with_context(|| format!("connect to {at}"))?;
            let buffer = vec![0; CHUNK];
            let started = Instant::now();
            while started.elapsed() < TIME {
                stream.write_all(&buffer)?;
            }
            Ok(started.elapsed())
        })?;
        match reader.join() {
            Ok(bytes) => Ok(bytes? as f64 / f64::from(1 << 20) / elapsed.as_secs_f64()),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
