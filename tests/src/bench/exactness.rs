//! `flood` and `overflow`: every drop is counted, however fast they come.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use whydrop::source::budget::Budget;

use super::flows::{self, Amount, Flows};
use super::report::{Must, Report};
use super::watch::Peer;
use crate::agent::{Agent, POLL, Sample};
use crate::lab::{Family, Host, Lab};

/// Drops in each family.
const PACKETS: u64 = 1_000_000;
/// Addresses that send, each a pod.
const SOURCES: u16 = 50;
/// Ports in a flood: 5,000 flows.
const PORTS: u16 = 100;
/// Within which the agent must have published what was dropped.
const SETTLED: Duration = Duration::from_secs(10);
/// The reason of a drop by nft.
const REASON: &str = "NETFILTER_DROP";

/// Counters equal nft's to the packet.
///
/// # Errors
/// The lab or the agent does not start.
pub fn flood(report: &mut Report) -> Result<()> {
    measure(report, &[], PORTS)
}

/// Where the maps have no room, totals stay exact and pairs a lower bound.
///
/// # Errors
/// As [`flood`].
pub fn overflow(report: &mut Report) -> Result<()> {
    let cpus = aya::util::nr_cpus()
        .map_err(|(_, error)| error)
        .context("count the CPUs")?;
    let (bytes, budget) = (20..40)
        .find_map(|power| Some((1u64 << power, Budget::new(1 << power, cpus).ok()?)))
        .context("no size of the maps fits this machine")?;
    report.count("flows that the maps hold", budget.flows.into(), Must::Shown);
    measure(report, &["--map-memory", &bytes.to_string()], flows::PORTS)
}

fn measure(report: &mut Report, arguments: &[&str], ports: u16) -> Result<()> {
    let lab = Lab::alone()?;
    flows::drop_at_router(&lab)?;
    let agent = Agent::start_unfollowed(&lab.node(), &flows::objects(&lab), arguments)?;
    let count = Peer::attach("count")?;
    for family in Family::BOTH {
        let flows = Flows::to_ports(&lab, family, SOURCES, ports)?;
        report.count(format!("{family}: flows"), flows.len(), Must::Shown);
        let before = Moment::take(&agent, &count)?;
        let nft_before = flows::dropped(&lab, family)?;
        let sent = flows.send(&lab, Amount::Each(PACKETS / flows.len()))?;
        let nft = flows::dropped(&lab, family)? - nft_before;
        report.figure(
            format!("{family}: drops a second"),
            sent.rate().round(),
            "",
            Must::Shown,
        );
        report.count(
            format!("{family}: dropped, as nft counts"),
            nft,
            Must::Exactly(PACKETS as f64),
        );
        let after = settled(&agent, &count, &before, nft)?;
        let found = Found::between(&lab, &before, &after);
        compare(report, family, &found, nft, !arguments.is_empty());
        report.round(json!({
            "family": family.to_string(), "sent": sent.packets, "nft": nft,
            "seconds": sent.elapsed.as_secs_f64(), "by_reason": found.reasons,
            "lost": found.lost, "pairs": found.pairs,
        }));
    }
    agent.stop()?;
    Ok(())
}

fn compare(report: &mut Report, family: Family, found: &Found, nft: u64, overflows: bool) {
    let exactly = |count: u64| Must::Exactly(count as f64);
    report.count(
        format!("{family}: whydrop_node_drops_total, {REASON}"),
        found.reasons.get(REASON).copied().unwrap_or(0),
        exactly(nft),
    );
    report.count(
        format!("{family}: whydrop_node_drops_total, from the tracepoint's own count"),
        found.off,
        exactly(0),
    );
    let named: u64 = found.pairs.values().sum();
    report.count(
        format!("{family}: pairs and __other__ together"),
        named + found.other,
        exactly(nft),
    );
    let each = PACKETS / u64::from(SOURCES);
    if overflows {
        let map = found.lost.get("map").copied().unwrap_or(0);
        report.count(
            format!("{family}: whydrop_events_lost_total, map"),
            map,
            Must::Above(0.0),
        );
        // Which is of all reasons: the node's few other frees find no room either.
        report.count(
            format!("{family}: __other__"),
            found.other,
            Must::CountAtMost(map as f64),
        );
        report.count(format!("{family}: named"), named, Must::AtMost(nft as f64));
        let beyond = found
            .pairs
            .values()
            .filter(|packets| **packets > each)
            .count();
        report.count(
            format!("{family}: pairs above what was sent"),
            beyond as u64,
            exactly(0),
        );
    } else {
        let wrong = found
            .pairs
            .values()
            .filter(|packets| **packets != each)
            .count();
        let missing = usize::from(SOURCES).abs_diff(found.pairs.len());
        report.count(
            format!("{family}: pairs other than {each} each"),
            (wrong + missing) as u64,
            exactly(0),
        );
    }
    for (stage, packets) in &found.lost {
        if *packets > 0 && stage != "map" {
            report.count(
                format!("{family}: detail not kept, {stage}"),
                *packets,
                Must::Shown,
            );
        }
    }
}

/// The agent's counters, and the tracepoint's just before and just after.
struct Moment {
    samples: Vec<Sample>,
    counted: [u64; 2],
}

impl Moment {
    fn take(agent: &Agent, count: &Peer) -> Result<Self> {
        let before = count.counted()?;
        let samples = agent.metrics()?;
        Ok(Self {
            samples,
            counted: [before, count.counted()?],
        })
    }

    fn sum(&self, name: &str, fits: impl Fn(&Sample) -> bool) -> u64 {
        let samples = self.samples.iter().filter(|sample| sample.name == name);
        samples
            .filter(|sample| fits(sample))
            .map(|sample| sample.value as u64)
            .sum()
    }

    /// By how much the agent's growth since then lies outside what the tracepoint's can have been.
    fn off(&self, before: &Self) -> u64 {
        let all = |moment: &Self| moment.sum("whydrop_node_drops_total", |_| true);
        let grown = all(self) - all(before);
        let least = self.counted[0] - before.counted[1];
        let most = self.counted[1] - before.counted[0];
        least.saturating_sub(grown) + grown.saturating_sub(most)
    }
}

/// Counts of silent drops are published a period late, so asks until all is there, then once more.
fn settled(agent: &Agent, count: &Peer, before: &Moment, nft: u64) -> Result<Moment> {
    let deadline = Instant::now() + SETTLED;
    let drops = |moment: &Moment| {
        moment.sum("whydrop_node_drops_total", |sample| {
            sample.label("reason") == REASON
        })
    };
    loop {
        let now = Moment::take(agent, count)?;
        let all = drops(&now) - drops(before) >= nft && now.off(before) == 0;
        if all || Instant::now() > deadline {
            // What comes after the last packet would be one too many.
            std::thread::sleep(whydrop::source::drain::GENERATION * 2);
            return Moment::take(agent, count);
        }
        std::thread::sleep(POLL);
    }
}

/// What grew between two moments.
struct Found {
    /// `whydrop_node_drops_total` by reason.
    reasons: BTreeMap<String, u64>,
    /// Silent drops by nft of the lab's pods that send.
    pairs: BTreeMap<String, u64>,
    other: u64,
    /// What was not kept in detail, by stage or limit.
    lost: BTreeMap<String, u64>,
    off: u64,
}

impl Found {
    fn between(lab: &Lab, before: &Moment, after: &Moment) -> Self {
        let namespace = lab.namespace();
        let pairs = |sample: &Sample| {
            let ours = sample.label("source_namespace") == namespace
                && sample.label("destination_pod") == Host::Server.name()
                && sample.label("reason") == REASON;
            ours.then(|| sample.label("source_pod").to_owned())
        };
        let other = |sample: &Sample| {
            let other =
                sample.label("source_pod") == "__other__" && sample.label("reason") == REASON;
            other.then(String::new)
        };
        let silent = "whydrop_silent_drops_total";
        let label = |name: &'static str| move |sample: &Sample| Some(sample.label(name).to_owned());
        let mut lost = grown(before, after, "whydrop_events_lost_total", label("stage"));
        for (limit, packets) in grown(
            before,
            after,
            "whydrop_events_limited_total",
            label("limit"),
        ) {
            lost.insert(format!("limit of each {limit}"), packets);
        }
        Self {
            reasons: grown(before, after, "whydrop_node_drops_total", label("reason")),
            pairs: grown(before, after, silent, pairs),
            other: grown(before, after, silent, other).values().sum(),
            lost,
            off: after.off(before),
        }
    }
}

/// By how much the samples of a metric grew, summed by a key; those without one or growth are left
/// out.
fn grown(
    before: &Moment,
    after: &Moment,
    name: &str,
    key: impl Fn(&Sample) -> Option<String>,
) -> BTreeMap<String, u64> {
    let sums = |moment: &Moment| {
        let mut sums: BTreeMap<String, u64> = BTreeMap::new();
        for sample in moment.samples.iter().filter(|sample| sample.name == name) {
            if let Some(key) = key(sample) {
                *sums.entry(key).or_default() += sample.value as u64;
            }
        }
        sums
    };
    let old = sums(before);
    let mut new = sums(after);
    for (key, value) in &mut new {
        *value -= old.get(key).copied().unwrap_or(0);
    }
    new.retain(|_, value| *value > 0);
    new
}
