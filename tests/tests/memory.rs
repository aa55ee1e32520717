//! Memory under the worst that a node can do: the agent stays below the limit of its manifest, and so does a
//! tail whose reader is slow. On node-wide sums, so alone, as `exact.rs`.

use std::io::{BufRead as _, BufReader};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use whydrop::event::Line;
use whydrop_tests::agent::{self, Agent, POLL, Sample};
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::memory::{self, Limited};
use whydrop_tests::{counters, objects, packet, scene, traffic};

/// Until what was dropped must be on `/metrics` and in the stream.
const DEADLINE: Duration = Duration::from_secs(40);
/// A debug build takes seconds for 10,000 series, in which nothing else is counted.
const RARELY: Duration = Duration::from_secs(1);
/// What `whydrop tail` may take: its buffers are some hundred kB, the rest is the program itself.
const TAIL_BYTES: u64 = 64 << 20;

/// Packets, each of a flow of its own and so a line, of a second, and for how many seconds.
const A_SECOND: u16 = 10_000;
const SECONDS: u16 = 4;
/// Steps of a second in which they are sent.
const STEPS: u16 = 20;

/// Packets that the node's counters have with a line each: what was dropped or rejected.
fn told(samples: &[Sample]) -> u64 {
    let told = samples.iter().filter(|sample| {
        sample.name == "whydrop_node_drops_total" && sample.label("outcome") != "benign"
    });
    told.map(|sample| sample.value as u64).sum()
}

/// Packets dropped by a rule.
fn by_rules(samples: &[Sample]) -> u64 {
    let dropped = samples.iter().filter(|sample| {
        sample.name == "whydrop_node_drops_total"
            && sample.label("outcome") == "dropped"
            && sample.label("reason") == "NETFILTER_DROP"
    });
    dropped.map(|sample| sample.value as u64).sum()
}

/// Asks for the metrics until they fit, with this pause.
fn until(
    agent: &Agent,
    pause: Duration,
    what: &str,
    mut fits: impl FnMut(&[Sample]) -> bool,
) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    while !fits(&agent.metrics()?) {
        ensure!(Instant::now() < deadline, "{what}: {DEADLINE:?} are over");
        std::thread::sleep(pause);
    }
    Ok(())
}

/// What came through the pipe.
#[derive(Default)]
struct Read {
    lines: AtomicU64,
    /// Of lines that were shown.
    packets: AtomicU64,
    /// Of lines about losses.
    lost: AtomicU64,
    /// The flood is over: from now on it is read as fast as it comes.
    is_fast: AtomicBool,
}

impl Read {
    /// Reads nothing for a moment, then a thousand lines a second, then all.
    fn slowly(&self, output: ChildStdout) -> Result<()> {
        std::thread::sleep(Duration::from_secs(2));
        for line in BufReader::new(output).lines() {
            match serde_json::from_str(&line?).context("a line")? {
                Line::Event(event) => self.packets.fetch_add(event.packets, Ordering::Relaxed),
                Line::Lost(lost) => self.lost.fetch_add(lost.lost, Ordering::Relaxed),
            };
            self.lines.fetch_add(1, Ordering::Relaxed);
            if !self.is_fast.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }
}

/// 10,000 lines a second for four seconds, each of another flow, into a pipe that is read at a tenth of
/// that.
#[test]
fn a_slow_pipe_behind_tail() -> Result<()> {
    let lab = scene::alone_dropping_for_server()?;
    let agent = Agent::start_unfollowed(&lab.node(), &objects::list(&lab), &["--dns", "off"])?;
    let mut tail = Command::new(agent::binary()?)
        .args(["tail", "-f", "-o", "json", "--last", "8192", "--socket"])
        .arg(agent.socket())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start whydrop tail")?;
    let output = tail.stdout.take().context("no pipe")?;
    let read = Read::default();
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| read.slowly(output));
        let result = flood_and_look(&lab, &agent, tail.id(), &read);
        tail.kill()?;
        tail.wait()?;
        // Its pipe is closed.
        reader.join().expect("no panic")?;
        result
    })
}

fn flood_and_look(lab: &Lab, agent: &Agent, tail: u32, read: &Read) -> Result<()> {
    let (client, server) = (
        lab.address(Place::Of(Host::Client), Family::V4),
        lab.address(Place::Of(Host::Server), Family::V4),
    );
    let begin = Instant::now();
    let mut sent = 0;
    for step in 0..SECONDS * STEPS {
        let each = A_SECOND / STEPS;
        let ports = (0..each).map(|i| 10_000 + step * each + i);
        let packets = ports.map(|port| packet::datagram((client, 40_000), (server, port), b"x"));
        sent += lab.within(Host::Client, || traffic::raw_ip(server, packets))?;
        let due = begin + Duration::from_secs(1) * u32::from(step + 1) / u32::from(STEPS);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let took = begin.elapsed();
    let while_slow = read.lines.load(Ordering::Relaxed);
    read.is_fast.store(true, Ordering::Relaxed);
    let hits = counters::nft(lab, Host::Router, "hits")?;
    ensure!(hits == sent, "nft counted {hits} of {sent}");
    // Each packet has its line, or is in one about a loss.
    let sums = || {
        let (packets, lost) = (&read.packets, &read.lost);
        (
            packets.load(Ordering::Relaxed),
            lost.load(Ordering::Relaxed),
        )
    };
    let end = until(
        agent,
        POLL,
        "the lines and the losses to add up",
        |samples| {
            let (packets, lost) = sums();
            told(samples) >= sent && packets + lost == told(samples)
        },
    );
    let (packets, lost) = sums();
    end.with_context(|| format!("{packets} shown, {lost} lost, {sent} sent"))?;
    let (of_tail, of_agent) = (memory::peak_bytes(tail)?, memory::peak_bytes(agent.pid())?);
    println!(
        "{sent} in {took:?}, {while_slow} lines read meanwhile, {packets} shown, {lost} lost; tail \
         {} KiB, agent {} KiB",
        of_tail >> 10,
        of_agent >> 10
    );
    ensure!(lost > 0, "the reader was not slow");
    ensure!(of_tail < TAIL_BYTES, "tail took {of_tail} bytes");
    let limit = memory::manifest_limit_bytes()?;
    ensure!(
        of_agent < limit,
        "the agent took {of_agent} bytes of {limit}"
    );
    let samples = agent.metrics()?;
    let counted = by_rules(&samples);
    ensure!(counted >= sent, "{counted} counted of {sent}");
    Ok(())
}

/// In a cgroup with the manifest's limit: tens of thousands of flows, of which more ask for a series of their
/// own than there may be; thousands of DNS names; and more readers than there may be, who read nothing.
#[test]
fn below_the_limit_of_the_manifest() -> Result<()> {
    const ROUNDS: u16 = 2;
    const PORTS: u16 = 30_000;
    /// More than there may be.
    const READERS: usize = 100;
    let lab = scene::alone_dropping_for_server()?;
    let limit = memory::manifest_limit_bytes()?;
    let limited = Limited::new(&format!("wdlab{}-memory", lab.id()), limit)?;
    let enter = limited.as_ref().map(Limited::enter).unwrap_or_default();
    let wrapper = ["sh", "-c", &enter, "sh"];
    let wrapper = if enter.is_empty() { &[] } else { &wrapper[..] };
    let agent = Agent::start_by(wrapper, &lab.node(), &objects::list(&lab), &[])?;
    if let Some(limited) = &limited {
        limited.ensure_has(agent.pid())?;
    }
    let before = by_rules(&agent.metrics()?);
    let mut readers = Vec::new();
    let mut refused = 0;
    for _ in 0..READERS {
        match agent.reader() {
            Ok(reader) => readers.push(reader),
            Err(_) => refused += 1,
        }
    }
    ensure!(
        refused > 0 && !readers.is_empty(),
        "{refused} of {READERS} readers were refused"
    );
    let (client, server) = (
        lab.address(Place::Of(Host::Client), Family::V4),
        lab.address(Place::Of(Host::Server), Family::V4),
    );
    let begin = Instant::now();
    let mut sent = 0;
    for round in 0..ROUNDS {
        let packets = (10_000..10_000 + PORTS).map(|port| match port % 4 {
            0 => {
                let name = format!("name-{round}-{port}.shop.svc.cluster.local");
                let query = packet::dns_query(port, &name, 1);
                packet::datagram((client, port), (server, 53), &query)
            }
            1 => packet::datagram((client, 40_000), (server, port), b"x"),
            _ => packet::segment((client, 40_000), (server, port), packet::flags::SYN),
        });
        sent += lab.within(Host::Client, || traffic::raw_ip(server, packets))?;
    }
    let hits = counters::nft(&lab, Host::Router, "hits")?;
    ensure!(hits == sent, "nft counted {hits} of {sent}");
    until(&agent, RARELY, "the flood to be counted", |samples| {
        by_rules(samples) - before >= hits
    })?;
    let samples = agent.metrics()?;
    let counted = by_rules(&samples) - before;
    ensure!(counted == hits, "{counted} counted of {hits}");
    let silent = samples
        .iter()
        .filter(|s| s.name == "whydrop_silent_drops_total");
    let silent: u64 = silent.map(|sample| sample.value as u64).sum();
    ensure!(silent >= counted, "{silent} in pairs of {counted}");
    let own = memory::peak_bytes(agent.pid())?;
    println!(
        "{sent} in {:?}; the agent {} KiB",
        begin.elapsed(),
        own >> 10
    );
    ensure!(own < limit, "it took {own} bytes of {limit}");
    match &limited {
        Some(limited) => {
            let (peak, kills) = limited.peak_bytes_and_kills()?;
            println!("with its maps {} KiB of {}", peak >> 10, limit >> 10);
            ensure!(kills == 0, "{kills} processes were killed");
        }
        None => eprintln!("no cgroup may be made here: only the process' own memory was looked at"),
    }
    drop(readers);
    ensure!(agent.stop()?.success());
    drop(limited);
    Ok(())
}
