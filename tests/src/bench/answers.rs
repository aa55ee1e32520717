//! `latency` and `scrape`: how soon the agent says what it knows.

use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use whydrop::event::Line;

use super::flows::{self, Amount, FIRST_PORT, Flows};
use super::report::{Must, Report, median, percentile};
use crate::agent::{Agent, POLL, binary};
use crate::lab::{Family, Host, Lab, Place};

/// Drops whose line is waited for, each to a port of its own.
const DROPS: u16 = 400;
/// Between two of them: no multiple of anything that the agent does at intervals.
const PAUSE: Duration = Duration::from_micros(17_300);
/// After which a line is called lost.
const PATIENCE: Duration = Duration::from_secs(5);

/// From the application's send to the line on the pipe.
///
/// # Errors
/// The lab, the agent or `tail` does not start.
pub fn latency(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    flows::drop_at_router(&lab)?;
    let agent = Agent::start_unfollowed(&lab.node(), &flows::objects(&lab), &[])?;
    let mut tail = Command::new(binary()?)
        .args(["tail", "-f", "-o", "json", "--socket"])
        .arg(agent.socket())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start tail")?;
    let stdout = tail.stdout.take().context("tail has no output")?;
    let (sender, lines) = channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines() {
            // The time first: what parsing takes is not the agent's.
            let Ok(line) = line else { return };
            if sender.send((Instant::now(), line)).is_err() {
                return;
            }
        }
    });
    let measured = drops(&lab, &lines);
    let _ = tail.kill();
    let _ = tail.wait();
    let _ = reader.join();
    let (delays, lost) = measured?;
    agent.stop()?;
    report.count("drops", DROPS.into(), Must::Shown);
    report.count("lines that did not come", lost, Must::AtMost(0.0));
    report.figure("p50", percentile(&delays, 50), "ms", Must::Shown);
    report.figure("p99", percentile(&delays, 99), "ms", Must::Below(50.0));
    report.figure("longest", percentile(&delays, 100), "ms", Must::Shown);
    report.round(json!({"ms": delays}));
    Ok(())
}

/// Sends the drops and waits for their lines: milliseconds, and how many never came.
fn drops(lab: &Lab, lines: &Receiver<(Instant, String)>) -> Result<(Vec<f64>, u64)> {
    let server = lab.address(Place::Of(Host::Server), Family::V4);
    let socket = lab
        .within(Host::Client, || {
            UdpSocket::bind((lab.address(Place::Of(Host::Client), Family::V4), 0))
        })
        .context("bind a UDP socket")?;
    // Which drop a line is about: the destination port tells.
    let port = |line: &str| match serde_json::from_str(line) {
        Ok(Line::Event(event)) if event.destination.ip == Some(server) => event.destination.port,
        _ => None,
    };
    // Until the first line of a drop the reader may not be there yet.
    let deadline = Instant::now() + PATIENCE;
    let first = SocketAddr::new(server, FIRST_PORT + flows::PORTS - 1);
    loop {
        socket.send_to(b"are you there?", first)?;
        if lines
            .recv_timeout(POLL * 5)
            .is_ok_and(|(_, line)| port(&line) == Some(first.port()))
        {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "tail shows no drop within {PATIENCE:?}"
        );
    }
    let mut sent = Vec::new();
    for n in 0..DROPS {
        std::thread::sleep(PAUSE);
        sent.push(Instant::now());
        socket.send_to(b"where are you?", SocketAddr::new(server, FIRST_PORT + n))?;
    }
    let mut delays: Vec<Option<f64>> = vec![None; usize::from(DROPS)];
    let deadline = Instant::now() + PATIENCE;
    while delays.iter().any(Option::is_none) {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((at, line)) => {
                let index = port(&line)
                    .and_then(|port| port.checked_sub(FIRST_PORT))
                    .map(usize::from);
                if let Some(index) = index
                    && let (Some(sent), Some(delay @ None)) =
                        (sent.get(index), delays.get_mut(index))
                {
                    *delay = Some(at.saturating_duration_since(*sent).as_secs_f64() * 1000.0);
                }
            }
            Err(RecvTimeoutError::Timeout) => break,
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("tail ended"),
        }
    }
    let lost = delays.iter().filter(|delay| delay.is_none()).count() as u64;
    Ok((delays.into_iter().flatten().collect(), lost))
}

/// Pods on each side: 10,000 pairs, each a series.
const PODS: u16 = 100;
/// Scrapes, with drops and without.
const SCRAPES: usize = 25;
/// Between two of them, and between two bursts of drops.
const SCRAPE_PAUSE: Duration = Duration::from_millis(150);
const BURST_PAUSE: Duration = Duration::from_millis(70);

/// 10,000 series, scraped while drops go on.
///
/// # Errors
/// The lab or the agent does not start.
pub fn scrape(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    flows::drop_at_router(&lab)?;
    // Room for the node's other drops beside them.
    let arguments = ["--max-series", "11000"];
    let agent = Agent::start_unfollowed(&lab.node(), &flows::objects(&lab), &arguments)?;
    let flows = Flows::to_pods(&lab, PODS, PODS)?;
    flows.send(&lab, Amount::Each(1))?;
    let (series, _) = wait_for(&agent, &lab, flows.len())?;
    report.count("series", series, Must::AtLeast(flows.len() as f64));
    let quiet = scrapes(&agent)?;

    let done = AtomicBool::new(false);
    let (busy, dropping) = std::thread::scope(|scope| {
        let dropper = scope.spawn(|| -> Result<f64> {
            let (started, mut packets) = (Instant::now(), 0);
            while !done.load(Ordering::Relaxed) {
                packets += flows.send(&lab, Amount::Each(1))?.packets;
                std::thread::sleep(BURST_PAUSE);
            }
            Ok(packets as f64 / started.elapsed().as_secs_f64())
        });
        let times = scrapes(&agent);
        done.store(true, Ordering::Relaxed);
        match dropper.join() {
            Ok(rate) => Ok::<_, anyhow::Error>((times?, rate?)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })?;

    let nft = flows::dropped(&lab, Family::V6)?;
    let (_, counted) = wait_for(&agent, &lab, nft)?;
    let (_, body) = agent.get("/metrics")?;
    report.figure(
        "answer",
        body.len() as f64 / f64::from(1 << 20),
        "MiB",
        Must::Shown,
    );
    report.figure("median, nothing dropped", median(&quiet), "ms", Must::Shown);
    report.figure(
        "drops a second meanwhile",
        dropping.round(),
        "",
        Must::Shown,
    );
    report.figure(
        "median, while drops go on",
        median(&busy),
        "ms",
        Must::Below(50.0),
    );
    report.figure(
        "longest, while drops go on",
        percentile(&busy, 100),
        "ms",
        Must::Shown,
    );
    report.count(
        "drops counted, of those that nft counts",
        counted,
        Must::Exactly(nft as f64),
    );
    report.round(json!({"quiet_ms": quiet, "busy_ms": busy}));
    agent.stop()?;
    Ok(())
}

/// Milliseconds from connect to the last byte.
fn scrapes(agent: &Agent) -> Result<Vec<f64>> {
    (0..SCRAPES)
        .map(|_| {
            std::thread::sleep(SCRAPE_PAUSE);
            let started = Instant::now();
            let (status, _) = agent.get("/metrics")?;
            let elapsed = started.elapsed();
            ensure!(status == 200, "/metrics answers {status}");
            Ok(elapsed.as_secs_f64() * 1000.0)
        })
        .collect()
}

/// Waits until the pairs of the lab have so many packets: series and packets, of which there may
/// be fewer at the end of all patience, or more.
fn wait_for(agent: &Agent, lab: &Lab, packets: u64) -> Result<(u64, u64)> {
    let deadline = Instant::now() + PATIENCE;
    let namespace = lab.namespace();
    loop {
        let samples = agent.metrics()?;
        let pairs = samples.iter().filter(|sample| {
            sample.name == "whydrop_silent_drops_total"
                && sample.label("source_namespace") == namespace
                && sample.label("reason") == "NETFILTER_DROP"
        });
        let (series, counted) = pairs.fold((0, 0), |(series, sum), sample| {
            (series + 1, sum + sample.value as u64)
        });
        if counted >= packets || Instant::now() > deadline {
            return Ok((series, counted));
        }
        std::thread::sleep(POLL);
    }
}
