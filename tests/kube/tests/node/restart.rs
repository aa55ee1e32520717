//! A rolling restart while packets are dropped, and how fast the new agent sees one.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, UdpSocket};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp;
use serde_json::Value;
use whydrop::event::Line;
use whydrop_kube_tests::cluster::{Cluster, until};
use whydrop_tests::counters;
use whydrop_tests::lab::{Host, Lab};
use whydrop_tests::patience::within;

use crate::manifests::{agent_pid, is_rolled_out, on_node};
use crate::workloads::{OUTSIDE_PORTS, Pods};

/// Between two datagrams.
const PAUSE: Duration = Duration::from_millis(40);
/// How long an agent is watched before and after.
const ENOUGH: usize = 50;
/// From the process's start to the first drop that has a line, where nothing else keeps the machine busy.
const START: Duration = Duration::from_secs(2);

/// Datagrams that the node drops, each to the next port, so that each is told apart and is a flow of its own,
/// which has a line. How many.
fn send(lab: &Lab, to: &str, stop: &AtomicBool) -> Result<usize> {
    lab.within(Host::Client, || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        for (sent, port) in OUTSIDE_PORTS.enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Ok(sent);
            }
            socket.send_to(b"datagram", (to, port))?;
            thread::sleep(PAUSE);
        }
        bail!("there are no more ports")
    })
}

/// What lines say of the datagrams: for each that has one when it was dropped, if an event tells. A line that the
/// agent says because there was no event tells when that was found.
type Seen = BTreeMap<usize, Option<Timestamp>>;

/// What lines say of all datagrams that were sent, through a restart.
#[derive(Debug)]
struct Heard {
    /// Those without a line, one after the other.
    missing: usize,
    /// How many behind them have one.
    by_new: usize,
    /// When the first of these was dropped that has an event.
    first_drop: Timestamp,
}

/// # Errors
/// Those without a line are not one gap with lines enough before and behind it.
fn heard(seen: &Seen, sent: usize) -> Result<Heard> {
    let missing: Vec<_> = (0..sent).filter(|n| !seen.contains_key(n)).collect();
    let (first, last) = (missing.first(), missing.last());
    let (first, last) = first.zip(last).context("the restart took no time at all")?;
    ensure!(
        last - first + 1 == missing.len(),
        "lost while an agent stood: {missing:?} of {sent}"
    );
    ensure!(
        *first >= ENOUGH && last + ENOUGH < sent,
        "{missing:?} of {sent}"
    );
    let by_new = seen.range(last + 1..);
    let first_drop = by_new.clone().find_map(|(_, time)| *time);
    Ok(Heard {
        missing: missing.len(),
        by_new: by_new.count(),
        first_drop: first_drop.context("a drop that the new agent saw")?,
    })
}

/// `whydrop tail` on the node, through one agent to the next.
struct Tail {
    child: Child,
    seen: Arc<Mutex<Seen>>,
}

impl Tail {
    fn start(cluster: &Cluster) -> Result<Self> {
        let binary = whydrop_tests::agent::binary()?.canonicalize()?;
        let mut command = cluster.node.command(binary.to_str().context("a path")?);
        let mut child = command
            .args(["tail", "--follow", "--last=8192"])
            .args(["--output=json", "--protocol=UDP"])
            .stdout(Stdio::piped())
            .spawn()
            .context("start whydrop tail on the node")?;
        let stdout = child.stdout.take().context("its output")?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let seen_there = seen.clone();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let Ok(Line::Event(event)) = serde_json::from_str(&line) else {
                    eprintln!("no drop's line: {line}");
                    continue;
                };
                let mut seen = seen_there.lock().unwrap_or_else(PoisonError::into_inner);
                let port = event.destination.port.unwrap_or(0);
                let number = OUTSIDE_PORTS.clone().position(|other| other == port);
                let Some(number) = number.filter(|_| event.packets == 1) else {
                    eprintln!("no datagram's line: {line}");
                    continue;
                };
                // Only an event has the port that a packet came from.
                let time = event.source.port.map(|_| event.time);
                seen.insert(number, time);
            }
        });
        Ok(Self { child, seen })
    }

    fn seen(&self) -> Seen {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.clone()
    }

    /// Waits for so many more.
    fn until_more(&self, what: &str) -> Result<()> {
        let before = self.seen().len();
        until(what, || {
            let now = self.seen().len();
            ensure!(now >= before + ENOUGH, "{before} and then {now}");
            Ok(())
        })
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All that was dropped while an agent stood has its line, from one agent to the next, and the new one's
/// counters are those of its lines.
///
/// # Errors
/// Something is missing, or the new agent is slow.
pub fn loses_nothing_that_it_saw(pods: &Pods<'_>) -> Result<()> {
    let cluster = pods.cluster;
    let tail = Tail::start(cluster)?;
    let old = agent_pid(cluster)?;
    let stop = AtomicBool::new(false);
    let sent = thread::scope(|scope| {
        let sender = scope.spawn(|| send(&cluster.lab, &pods.db, &stop));
        let restarted = restart(cluster, &tail);
        stop.store(true, Ordering::Relaxed);
        let sent = sender
            .join()
            .map_err(|_| anyhow::anyhow!("the sender panicked"))?;
        restarted.and(sent)
    })?;
    until("the last datagram has its line", || {
        let seen = tail.seen();
        let last = seen.last_key_value();
        ensure!(last.is_some_and(|(n, _)| *n == sent - 1), "{last:?}");
        Ok(())
    })?;
    let counted = counters::nft(&cluster.lab, Host::Router, "outside")?;
    ensure!(
        counted == sent as u64,
        "the rule counted {counted} of {sent}"
    );
    let new = agent_pid(cluster)?;
    ensure!(new != old, "the agent was not restarted");
    let mut result = None;
    // A line without an event is said a second after it, and may wait for names as long again.
    until("each drop that the new agent counted has its line", || {
        let heard = heard(&tail.seen(), sent)?;
        has_counted(cluster, heard.by_new)?;
        result = Some(heard);
        Ok(())
    })?;
    let heard = result.context("set above")?;
    println!(
        "         of {sent} datagrams {} were dropped while no agent stood",
        heard.missing
    );

    let started = started_at(cluster, new)?;
    let first_drop = heard.first_drop;
    let took = Duration::try_from(first_drop.duration_since(started))?;
    println!(
        "         {} ms from the agent's start to its first drop",
        took.as_millis()
    );
    ensure!(
        took < within(START),
        "the first drop was seen {took:?} after the start"
    );
    // It says what it could not see.
    let status = cluster.exec(
        "whydrop",
        "daemonset/whydrop",
        &["whydrop", "status", "--output=json"],
    )?;
    let status: Value = serde_json::from_str(&status)?;
    let since: Timestamp = serde_json::from_value(status["observing_since"].clone())?;
    let apart = Duration::try_from(since.duration_since(first_drop).abs())?;
    ensure!(
        apart < Duration::from_secs(3),
        "observes since {since}, and saw a drop at {first_drop}"
    );
    let metrics = cluster.metrics()?;
    let gauge = metrics
        .iter()
        .find(|s| s.name == "whydrop_observing_since_timestamp_seconds");
    ensure!(
        gauge.is_some_and(|s| s.value == since.as_second() as f64),
        "{gauge:?} is not {since}"
    );
    // It did not wait for the API server, which it asks within its first seconds.
    let mut first_request = None;
    until("the new agent asks the API server", || {
        let mut requests = Vec::new();
        for entry in cluster.server.audit()? {
            let received = entry["requestReceivedTimestamp"]
                .as_str()
                .unwrap_or_default();
            requests.push(received.parse::<Timestamp>()?);
        }
        first_request = requests.into_iter().filter(|at| *at > started).min();
        ensure!(first_request.is_some(), "it asked nothing");
        Ok(())
    })?;
    let first_request = first_request.context("it asked nothing")?;
    ensure!(
        since < first_request,
        "it asked at {first_request}, and observes since {since}"
    );
    Ok(())
}

/// Whether the agent's counters are the sum of its lines. Until the API server had told it whose the addresses
/// are, they are without the pod's name and the kind of its peer, where those of other labs are too.
fn has_counted(cluster: &Cluster, lines: usize) -> Result<()> {
    let metrics = cluster.metrics()?;
    let counted = |pod: &str| -> f64 {
        let samples = metrics.iter().filter(|sample| {
            sample.name == "whydrop_silent_drops_total"
                && matches!(sample.label("source_kind"), "external" | "")
                && sample.label("destination_pod") == pod
                && sample.label("protocol") == "UDP"
        });
        samples.map(|sample| sample.value).sum()
    };
    let (lines, named, nameless) = (lines as f64, counted("db-0"), counted(""));
    ensure!(
        named <= lines && named + nameless >= lines,
        "{named} and {nameless} counted, {lines} of lines"
    );
    Ok(())
}

fn restart(cluster: &Cluster, tail: &Tail) -> Result<()> {
    tail.until_more("the old agent sees drops")?;
    cluster.kubectl(&[
        "--namespace=whydrop",
        "rollout",
        "restart",
        "daemonset/whydrop",
    ])?;
    is_rolled_out(cluster)?;
    tail.until_more("the new agent sees drops")
}

/// When a process of the node began, to 20 ms.
fn started_at(cluster: &Cluster, pid: u32) -> Result<Timestamp> {
    let text = on_node(cluster, &format!("cat /proc/{pid}/stat"))?;
    // Of the 22nd field (proc(5)): the name in the 2nd may have blanks.
    let (_, fields) = text.split_once(") ").context("a line of /proc/PID/stat")?;
    let ticks: f64 = fields
        .split_whitespace()
        .nth(19)
        .context("a start time")?
        .parse()?;
    // One behind the other: a process between them would have its time.
    let (now, uptime) = (Timestamp::now(), fs::read_to_string("/proc/uptime")?);
    let uptime = uptime.split(' ').next();
    let uptime: f64 = uptime.context("an uptime")?.parse()?;
    // USER_HZ is 100 on every architecture that whydrop runs on.
    let age = Duration::try_from_secs_f64(uptime - ticks / 100.0)?;
    Ok(now - age)
}
