//! `silence` and `hang`: whether each attempt that nobody answers is told, and how soon.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use super::report::{Must, Report, percentile};
use crate::agent::{Agent, POLL};
use crate::connects::{Connects, Options};
use crate::dns_client::Client;
use crate::dns_server::A;
use crate::lab::{Family, Host, Lab, Place};
use crate::queries::{self, DNS, id};
use crate::silence::{self, Traffic};
use crate::tallies::{self, Dns, Results};
use crate::{objects, port, unanswered};

/// Thousands of connects and queries, a tenth unanswered for six reasons each.
///
/// # Errors
/// The lab or the agent does not start.
pub fn silence(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    silence::rules(&lab)?;
    let objects = objects::with_workloads(objects::list(&lab));
    let agent = Agent::start_with(&lab.node(), &objects, &[])?;
    let traffic = Traffic::start(&lab)?;
    let audit = unanswered::audit(&lab, &agent, "", &traffic.unanswered)?;
    // What follows by a counter is there by now: the marker's was.
    let connects = Results::read(&lab, &agent, "client")?;
    let dns = Dns::read(&lab, &agent, "client")?;
    let samples = agent.metrics()?;
    let exactly = |count: u64| Must::Exactly(count as f64);
    let Results {
        established,
        refused,
        unanswered,
        abandoned,
    } = traffic.results;
    for (result, counted, made) in [
        ("established", connects.established, established),
        ("refused", connects.refused, refused),
        ("unanswered", connects.unanswered, unanswered),
        ("abandoned", connects.abandoned, abandoned),
    ] {
        let name = format!("whydrop_connects_total, {result}");
        report.count(name, counted, exactly(made));
    }
    report.count(
        "whydrop_dns_queries_total",
        dns.queries,
        exactly(traffic.dns.queries),
    );
    for (rcode, made) in &traffic.dns.responses {
        let counted = dns.responses.get(rcode).copied().unwrap_or(0);
        let name = format!("whydrop_dns_responses_total, {rcode}");
        report.count(name, counted, exactly(*made));
    }
    let lost_queries = traffic.unanswered.len() as u64 - unanswered;
    for (kind, made) in [("syn", unanswered), ("dns", lost_queries)] {
        let labels = [("kind", kind)];
        let name = "whydrop_unanswered_total";
        let counted = tallies::sum(&lab, &samples, name, "client", &labels);
        report.count(format!("{name}, {kind}"), counted, exactly(made));
    }
    report.count(
        "attempts that nobody answered",
        traffic.unanswered.len() as u64,
        Must::Shown,
    );
    for (what, lines) in [
        ("not told", &audit.missing),
        ("told with a wrong cause, place or name", &audit.wrong),
        ("told twice", &audit.twice),
        ("told though answered", &audit.unexpected),
    ] {
        report.count(format!("of them {what}"), lines.len() as u64, exactly(0));
        for line in lines.iter().take(3) {
            report.round(json!({what: line}));
        }
    }
    drop(traffic);
    agent.stop()?;
    Ok(())
}

/// Connects and queries that hang, each.
const HANGS: u16 = 300;
/// Between two of them: no multiple of anything that the agent does at intervals.
const PAUSE: Duration = Duration::from_micros(17_300);
/// The agent's own timeouts.
const SYN_TIMEOUT: Duration = Duration::from_secs(3);
const DNS_TIMEOUT: Duration = Duration::from_secs(2);
/// Until a line is called lost.
const PATIENCE: Duration = Duration::from_secs(6);

/// How long after its time is over the line of an attempt comes.
///
/// # Errors
/// The lab or the agent does not start.
pub fn hang(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    port::rules(&lab)?;
    queries::rules(&lab, DNS)?;
    let agent = Agent::start(&lab)?;
    let to = |port| lab.socket(Place::Of(Host::Server), Family::V4, port);
    let from = lab.socket(Place::Of(Host::Client), Family::V4, 0);
    let client = lab.within(Host::Client, || Client::connected(from, to(DNS)))?;
    let mut connects = Connects::default();
    // By kind, port and id: when its time is over.
    let mut due: HashMap<(String, u16, u16), Instant> = HashMap::new();
    for n in 0..HANGS {
        std::thread::sleep(PAUSE);
        let connect = lab.within(Host::Client, || {
            Connects::open([to(port::FORWARD)], Options::default())
        })?;
        let attempt = connect.iter().next().context("no connect")?;
        let key = ("syn".to_owned(), attempt.from.port(), 0);
        due.insert(key, attempt.since + SYN_TIMEOUT);
        connects.extend([connect]);
        let id = id::FORWARD + n;
        let since = Instant::now();
        client.ask(None, id, "hang.test", A)?;
        let key = ("dns".to_owned(), client.from.port(), id);
        due.insert(key, since + DNS_TIMEOUT);
    }
    let mut late: HashMap<&str, Vec<f64>> = HashMap::new();
    let mut seen = 0;
    let deadline = Instant::now() + PATIENCE;
    while !due.is_empty() && Instant::now() < deadline {
        for received in agent.received(seen) {
            seen += 1;
            let line = &received.json;
            if line["outcome"] != "unanswered" {
                continue;
            }
            let number = |value: &serde_json::Value| value.as_u64().unwrap_or(0) as u16;
            let kind = line["kind"].as_str().unwrap_or_default().to_owned();
            let name = if kind == "syn" { "connect" } else { "query" };
            let key = (
                kind,
                number(&line["source"]["port"]),
                number(&line["dns"]["id"]),
            );
            if let Some(due) = due.remove(&key) {
                let ms = if received.at >= due {
                    (received.at - due).as_secs_f64() * 1000.0
                } else {
                    (due - received.at).as_secs_f64() * -1000.0
                };
                late.entry(name).or_default().push(ms);
            }
        }
        std::thread::sleep(POLL);
    }
    report.count("attempts", 2 * u64::from(HANGS), Must::Shown);
    report.count(
        "lines that did not come",
        due.len() as u64,
        Must::Exactly(0.0),
    );
    for name in ["connect", "query"] {
        let ms = late.remove(name).unwrap_or_default();
        let early = ms.iter().filter(|ms| **ms < 0.0).count();
        report.count(
            format!("{name}: lines before its time was over"),
            early as u64,
            Must::Exactly(0.0),
        );
        for (which, percent, must) in [
            ("p50", 50, Must::Shown),
            ("p99", 99, Must::Shown),
            ("longest", 100, Must::AtMost(500.0)),
        ] {
            let figure = percentile(&ms, percent);
            report.figure(format!("{name}: {which} after it"), figure, "ms", must);
        }
        report.round(json!({"kind": name, "ms": ms}));
    }
    drop(connects);
    agent.stop()?;
    Ok(())
}
