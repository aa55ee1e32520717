//! Past the limits: more pairs than series, more flows than the maps hold, a reader that stalls.
//! Sums must stay exact. On node-wide sums, so alone, as `exact.rs`.

use std::collections::BTreeSet;
use std::io::{BufRead as _, ErrorKind};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use whydrop::event::Line;
use whydrop_tests::agent::{self, Agent, POLL, Sample};
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::packet::{self, flags, protocol};
use whydrop_tests::{counters, expect, objects, scene, traffic};

/// Until what was dropped must be on `/metrics` and in the stream.
const DEADLINE: Duration = Duration::from_secs(60);
/// Many more lines than the agent keeps (8192) and the buffers of a socket hold.
const LINES: usize = 20_000;

/// Sends `rounds` packets of each of many flows: ports from 10,000 on.
fn send(lab: &Lab, number: u8, flows: u16, rounds: usize) -> Result<u64> {
    let client = lab.address(Place::Of(Host::Client), Family::V4);
    let server = lab.address(Place::Of(Host::Server), Family::V4);
    let packets: Vec<Vec<u8>> = (10_000..10_000 + flows)
        .map(|port| {
            let (from, to) = ((client, 40_000), (server, port));
            let payload = match number {
                protocol::TCP => packet::tcp(from, to, flags::SYN),
                _ => packet::udp(from, to, b"datagram"),
            };
            packet::ip(client, server, number, &payload)
        })
        .collect();
    lab.within(Host::Client, || {
        traffic::raw_ip(server, (0..rounds).flat_map(|_| &packets))
    })
}

fn sum(samples: &[Sample], fits: impl Fn(&Sample) -> bool) -> u64 {
    let fitting = samples.iter().filter(|sample| fits(sample));
    fitting.map(|sample| sample.value as u64).sum()
}

fn silent(sample: &Sample) -> bool {
    sample.name == "whydrop_silent_drops_total"
}

fn is_other(sample: &Sample) -> bool {
    sample.label("source_pod") == "__other__"
}

/// Packets of the lab's pair, with or without their names.
fn named(lab: &Lab, sample: &Sample) -> bool {
    silent(sample)
        && sample.label("source_namespace") == lab.namespace()
        && sample.label("destination_pod") == "server"
}

/// Waits until the node's silent drops are `packets` more than `before`; the metrics then. Once it
/// is quiet they stay so.
fn until(agent: &Agent, what: &str, fits: impl Fn(&[Sample]) -> bool) -> Result<Vec<Sample>> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let samples = agent.metrics()?;
        if fits(&samples) {
            return Ok(samples);
        }
        ensure!(
            Instant::now() < deadline,
            "{what}: the agent shows {:?}",
            samples
                .iter()
                .filter(|s| s.value > 0.0 && s.name.ends_with("_total"))
                .map(|s| (
                    &s.name,
                    s.label("reason"),
                    s.label("destination_port"),
                    s.value
                ))
                .collect::<Vec<_>>()
        );
        std::thread::sleep(POLL);
    }
}

fn node(samples: &[Sample], outcome: &str) -> u64 {
    sum(samples, |sample| {
        sample.name == "whydrop_node_drops_total" && sample.label("outcome") == outcome
    })
}

/// Three series, then `__other__`.
#[test]
fn more_pairs_than_series() -> Result<()> {
    let lab = scene::alone_dropping_for_server()?;
    let arguments = ["--max-series", "3"];
    let agent = Agent::start_with(&lab.node(), &objects::list(&lab), &arguments)?;
    // A SYN's port is a label, so each port is a series.
    let sent = send(&lab, protocol::TCP, 20, 7)?;
    ensure!(counters::nft(&lab, Host::Router, "hits")? == sent);
    let samples = until(&agent, "20 ports in 3 series", |samples| {
        sum(samples, |s| named(&lab, s) || silent(s) && is_other(s)) >= sent
    })?;
    let series: BTreeSet<String> = samples
        .iter()
        .filter(|sample| silent(sample) && !is_other(sample))
        .map(|sample| format!("{:?}", sample.labels))
        .collect();
    ensure!((1..=3).contains(&series.len()), "{series:?}");
    for sample in samples.iter().filter(|s| named(&lab, s)) {
        ensure!(sample.value == 7.0, "{sample:?}");
    }
    let other = sum(&samples, |s| silent(s) && is_other(s));
    let overflow = sum(&samples, |s| s.name == "whydrop_series_overflow_total");
    ensure!(
        other == overflow,
        "{other} under __other__, {overflow} past the limit"
    );
    let all = sum(&samples, silent);
    ensure!(
        all == node(&samples, "dropped") && all >= sent,
        "the series have {all}, the node {}, {sent} were sent",
        node(&samples, "dropped")
    );
    let labels = samples.iter().find(|s| silent(s) && is_other(s));
    let labels = labels.context("no series __other__")?;
    for label in [
        "destination_namespace",
        "destination_port",
        "protocol",
        "source_workload",
    ] {
        ensure!(labels.label(label) == "__other__", "{labels:?}");
    }
    ensure!(labels.label("reason") == "NETFILTER_DROP", "{labels:?}");
    ensure!(labels.label("kind") == "syn", "{labels:?}");
    Ok(())
}

/// The smallest maps that the agent takes, and many times more flows than they hold.
#[test]
fn more_flows_than_the_maps_hold() -> Result<()> {
    let lab = scene::alone_dropping_for_server()?;
    let said = Command::new(agent::binary()?)
        .args([
            "agent",
            "--cluster",
            "none",
            "--listen",
            "127.0.0.1:0",
            "--socket",
        ])
        .arg(tempfile::tempdir()?.path().join("s"))
        .args(["--map-memory", "1"])
        .output()?;
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    let least = said
        .split_ascii_whitespace()
        .rev()
        .find_map(|word| word.parse::<u64>().ok());
    let least = least
        .with_context(|| format!("it names no size: {said}"))?
        .to_string();
    let arguments = ["--map-memory", &least];
    let agent = Agent::start_with(&lab.node(), &objects::list(&lab), &arguments)?;
    let before = agent.metrics()?;
    let sent = send(&lab, protocol::UDP, 5_000, 4)?;
    let hits = counters::nft(&lab, Host::Router, "hits")?;
    ensure!(hits == sent, "nft counted {hits} of {sent}");
    let of_lab = |samples: &[Sample]| {
        sum(samples, |s| silent(s) && (named(&lab, s) || is_other(s)))
            - sum(&before, |s| silent(s) && is_other(s))
    };
    let samples = until(&agent, "20,000 drops", |samples| of_lab(samples) >= hits)?;
    let pair = sum(&samples, |s| named(&lab, s));
    let other = sum(&samples, |s| silent(s) && is_other(s));
    let lost = sum(&samples, |s| {
        s.name == "whydrop_events_lost_total" && s.label("stage") == "map"
    });
    ensure!(of_lab(&samples) == hits, "{} of {hits}", of_lab(&samples));
    ensure!(
        pair > 0 && pair < hits && other > 0,
        "{pair} named, {other} not: the maps did not overflow"
    );
    // What is no loss can have found no room either.
    ensure!(
        lost >= other,
        "{lost} past the maps' room, {other} under __other__"
    );
    let reason = |samples: &[Sample]| {
        sum(samples, |s| {
            s.name == "whydrop_node_drops_total"
                && s.label("reason") == "NETFILTER_DROP"
                && s.label("outcome") == "dropped"
        })
    };
    let counted = reason(&samples) - reason(&before);
    ensure!(counted == hits, "the node shows {counted} of {hits}");
    ensure!(sum(&samples, silent) == node(&samples, "dropped"));
    ensure!(agent.stop()?.success());
    Ok(())
}

/// A reader that does not read for a while is told what it missed, to the packet, and holds up
/// neither the agent nor other readers.
#[test]
fn a_reader_that_stalls() -> Result<()> {
    let lab = scene::alone_dropping_for_server()?;
    let agent = Agent::start(&lab)?;
    expect::barrier(&lab, &agent)?;
    let mut reader = agent.reader()?;
    let lost_packets = |samples: &[Sample]| node(samples, "dropped") + node(samples, "rejected");
    let before = lost_packets(&agent.metrics()?);
    let deadline = Instant::now() + DEADLINE;
    let mut sent = 0;
    while agent.lines().len() < LINES {
        ensure!(
            Instant::now() < deadline,
            "{} lines only",
            agent.lines().len()
        );
        sent += send(&lab, protocol::UDP, 2_000, 2)?;
    }
    ensure!(counters::nft(&lab, Host::Router, "hits")? == sent);
    let counted = || -> Result<u64> { Ok(lost_packets(&agent.metrics()?) - before) };
    until(&agent, "the flood", |samples| {
        lost_packets(samples) - before >= sent
    })?;

    // Now it reads again. What else the node drops meanwhile is in lines and counters alike.
    reader.get_ref().set_read_timeout(Some(POLL))?;
    let (mut shown, mut lost) = (0, 0);
    let mut text = String::new();
    let deadline = Instant::now() + DEADLINE;
    loop {
        match reader.read_line(&mut text) {
            Ok(0) => bail!("the agent ended the stream"),
            Ok(_) => {}
            // What was read of a line stays in `text`.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let all = counted()?;
                if shown + lost == all {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "{shown} shown and {lost} lost, {all} counted"
                );
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        match serde_json::from_str(&text).with_context(|| format!("a line: {text:?}"))? {
            Line::Event(event) => shown += event.packets,
            Line::Lost(line) => lost += line.lost,
        }
        text.clear();
    }
    ensure!(
        shown + lost >= sent,
        "{shown} shown and {lost} lost of {sent}"
    );
    ensure!(lost > 0, "the reader lost nothing");
    let samples = agent.metrics()?;
    let counted = sum(&samples, |s| {
        s.name == "whydrop_events_lost_total" && s.label("stage") == "reader"
    });
    ensure!(counted >= lost, "{counted} counted, {lost} told");
    Ok(())
}
