//! What the agent must show for a lab: these drops, to the packet, and nothing else.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use whydrop::event::{Event, Kind, Line, Outcome};

use crate::agent::{Agent, POLL, Sample};
use crate::kernel;
use crate::lab::{Family, Host, Lab, Place};
use crate::traffic;

/// Until a drop must be on `/metrics` and in the stream.
const DEADLINE: Duration = Duration::from_secs(60);

/// Drops of one pair with one fate.
#[derive(Clone, Debug)]
pub struct Row {
    from: String,
    to: String,
    outcome: Outcome,
    packets: u64,
    kind: Kind,
    protocol: Option<&'static str>,
    reasons: Vec<&'static str>,
    locations: Vec<&'static str>,
    service: String,
    dns: Option<String>,
}

impl Row {
    fn new(from: &str, to: &str, outcome: Outcome, packets: u64) -> Self {
        Self {
            from: from.to_owned(),
            to: to.to_owned(),
            outcome,
            packets,
            kind: Kind::Packet,
            protocol: None,
            reasons: Vec::new(),
            locations: Vec::new(),
            service: String::new(),
            dns: None,
        }
    }

    /// Packets that were dropped, and nobody was told.
    pub fn dropped(from: &str, to: &str, packets: u64) -> Self {
        Self::new(from, to, Outcome::Dropped, packets)
    }

    /// Packets that were dropped, and the sender was told.
    pub fn rejected(from: &str, to: &str, packets: u64) -> Self {
        Self::new(from, to, Outcome::Rejected, packets)
    }

    /// They are first SYNs.
    #[must_use]
    pub fn syn(mut self) -> Self {
        self.kind = Kind::Syn;
        self.protocol("TCP")
    }

    /// They are DNS queries for this name (with its final dot).
    #[must_use]
    pub fn dns(mut self, name: &str) -> Self {
        self.kind = Kind::Dns;
        self.dns = Some(name.to_owned());
        self.protocol("UDP")
    }

    /// Their protocol as labels write it.
    #[must_use]
    pub fn protocol(mut self, protocol: &'static str) -> Self {
        self.protocol = Some(protocol);
        self
    }

    /// The reason is one of these. Kernels before 5.17 know none: their events have none, and their
    /// counters say the place instead.
    #[must_use]
    pub fn reason(mut self, reasons: &[&'static str]) -> Self {
        self.reasons = reasons.to_vec();
        self
    }

    /// The kernel function is one of these (without the suffix of a compiler's copy).
    #[must_use]
    pub fn at(mut self, locations: &[&'static str]) -> Self {
        self.locations = locations.to_vec();
        self
    }

    /// The sender asked for this Service (`namespace/name`).
    #[must_use]
    pub fn service(mut self, service: &str) -> Self {
        service.clone_into(&mut self.service);
        self
    }

    fn fits_sample(&self, sample: &Sample) -> bool {
        let outcome = match sample.name.as_str() {
            "whydrop_silent_drops_total" => Outcome::Dropped,
            "whydrop_rejected_packets_total" => Outcome::Rejected,
            _ => return false,
        };
        let reason = sample.label("reason");
        outcome == self.outcome
            && sample.label("source_pod") == self.from
            && sample.label("destination_pod") == self.to
            && sample.label("kind") == self.kind.as_str()
            && sample.label("destination_service") == self.service
            && self
                .protocol
                .is_none_or(|protocol| sample.label("protocol") == protocol)
            && if kernel::has_drop_reasons() {
                self.reasons.is_empty() || self.reasons.contains(&reason)
            } else {
                self.fits_location(reason)
            }
    }

    fn fits_location(&self, location: &str) -> bool {
        // Compilers make copies of a function: `name.constprop.0`, `name.part.0`.
        let name = location.split('.').next().unwrap_or_default();
        self.locations.is_empty() || self.locations.contains(&name)
    }

    fn fits_event(&self, event: &Event) -> bool {
        let drop = event.drop.clone().unwrap_or_default();
        let service = event
            .destination
            .service
            .as_ref()
            .map_or_else(String::new, |service| {
                format!("{}/{}", service.namespace, service.name)
            });
        event.outcome == self.outcome
            && event.kind == self.kind
            && event.source.pod.as_deref() == Some(&self.from)
            && event.destination.pod.as_deref() == Some(&self.to)
            && service == self.service
            && self.protocol.is_none_or(|wanted| {
                event
                    .protocol
                    .is_some_and(|protocol| protocol.to_string() == wanted)
            })
            && (self.reasons.is_empty()
                || drop
                    .reason
                    .is_none_or(|reason| self.reasons.contains(&&*reason)))
            && self.fits_location(drop.location.as_deref().unwrap_or_default())
            && self.dns.as_ref().is_none_or(|name| {
                event
                    .dns
                    .as_ref()
                    .is_some_and(|question| question.name == *name)
            })
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {} from {} to {}",
            self.packets,
            self.outcome.as_str(),
            self.kind.as_str(),
            self.from,
            self.to
        )?;
        for (word, list) in [("reason", &self.reasons), ("at", &self.locations)] {
            if !list.is_empty() {
                write!(f, ", {word} {}", list.join(" or "))?;
            }
        }
        match &self.protocol {
            Some(protocol) => write!(f, ", {protocol}"),
            None => Ok(()),
        }
    }
}

/// Checks that the agent counts exactly these rows for the lab's pods and node, that each appears
/// in the stream with its place, and that no other pair of the lab was blamed. Rows of zero packets
/// mean that there is no such series.
///
/// A count that is still short is waited for. That it does not exceed is shown by a marker: a
/// packet of another pair that is dropped afterwards. When that is on `/metrics`, everything before
/// it is.
///
/// # Errors
/// Says which row is short or over, or which series should not be.
pub fn expect(lab: &Lab, agent: &Agent, rows: &[Row]) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let counts = tally(lab, &agent.metrics()?, rows).0;
        if counts
            .iter()
            .zip(rows)
            .all(|(count, row)| *count >= row.packets)
        {
            break;
        }
        if Instant::now() > deadline {
            bail!("{}", report(lab, agent, rows)?);
        }
        std::thread::sleep(POLL);
    }
    barrier(lab, agent)?;
    let samples = agent.metrics()?;
    let (counts, others) = tally(lab, &samples, rows);
    ensure!(
        others.is_empty()
            && counts
                .iter()
                .zip(rows)
                .all(|(count, row)| *count == row.packets),
        "{}",
        report(lab, agent, rows)?
    );
    events(agent, rows)
}

/// Drops one packet of the pair client2 to marker, and waits until it is on `/metrics`.
///
/// # Errors
/// It is not there in time.
pub fn barrier(lab: &Lab, agent: &Agent) -> Result<()> {
    let marked = || -> Result<f64> {
        Ok(agent
            .metrics()?
            .iter()
            .filter(|sample| sample.label("destination_namespace") == lab.namespace())
            .filter(|sample| sample.label("destination_pod") == "marker")
            .filter(|sample| sample.name == "whydrop_silent_drops_total")
            .map(|sample| sample.value)
            .sum())
    };
    let before = marked()?;
    let to = lab.socket(Place::Marker, Family::V4, 9);
    lab.within(Host::Client2, || traffic::udp_burst(to, 1, 1, b"marker"))?;
    let deadline = Instant::now() + DEADLINE;
    while marked()? <= before {
        ensure!(
            Instant::now() < deadline,
            "the marker, a packet that nft dropped, is not on /metrics after {DEADLINE:?}"
        );
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Packets by row, and the lab's series that fit no row.
fn tally<'a>(lab: &Lab, samples: &'a [Sample], rows: &[Row]) -> (Vec<u64>, Vec<&'a Sample>) {
    let mut counts = vec![0; rows.len()];
    let mut others = Vec::new();
    let (namespace, node) = (lab.namespace(), lab.node());
    for sample in samples {
        let ours = ["source", "destination"].iter().any(|side| {
            sample.label(&format!("{side}_namespace")) == namespace
                || sample.label(&format!("{side}_node")) == node
        });
        let drops = matches!(
            sample.name.as_str(),
            "whydrop_silent_drops_total" | "whydrop_rejected_packets_total"
        );
        if !ours || !drops || sample.value == 0.0 || sample.label("destination_pod") == "marker" {
            continue;
        }
        match rows.iter().position(|row| row.fits_sample(sample)) {
            Some(index) => counts[index] += sample.value as u64,
            None => others.push(sample),
        }
    }
    (counts, others)
}

fn report(lab: &Lab, agent: &Agent, rows: &[Row]) -> Result<String> {
    let samples = agent.metrics()?;
    let (counts, others) = tally(lab, &samples, rows);
    let mut text = "the agent's counters are not as they must be:\n".to_owned();
    for (count, row) in counts.iter().zip(rows) {
        let mark = if *count == row.packets {
            "ok  "
        } else {
            "BAD "
        };
        text += &format!("  {mark} {count} of: {row}\n");
    }
    for sample in others {
        let labels: Vec<String> = sample
            .labels
            .iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        text += &format!(
            "  BAD  nobody expected: {} {} {labels:?}\n",
            sample.value, sample.name
        );
    }
    Ok(text)
}

/// Checks that the events of each row, and what the stream says it lost, add up to the row.
fn events(agent: &Agent, rows: &[Row]) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let lines = agent.lines();
        let lost: u64 = lines
            .iter()
            .map(|line| match line {
                Line::Lost(lost) => lost.lost,
                Line::Event(_) => 0,
            })
            .sum();
        let sums: Vec<u64> = rows
            .iter()
            .map(|row| {
                lines
                    .iter()
                    .filter_map(|line| match line {
                        Line::Event(event) if row.fits_event(event) => Some(event.packets),
                        _ => None,
                    })
                    .sum()
            })
            .collect();
        if let Some((row, sum)) = rows
            .iter()
            .zip(&sums)
            .find(|(row, sum)| row.packets < **sum)
        {
            bail!("the stream shows {sum} packets, too many, of: {row}");
        }
        let missing: Vec<String> = rows
            .iter()
            .zip(&sums)
            .filter(|(row, sum)| row.packets > 0 && (**sum == 0 || **sum + lost < row.packets))
            .map(|(row, sum)| format!("{sum} of: {row}"))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let mut seen: BTreeMap<String, u64> = BTreeMap::new();
            for line in &lines {
                let mut value = serde_json::to_value(line)?;
                value["time"] = Default::default();
                *seen.entry(value.to_string()).or_default() += 1;
            }
            let seen: Vec<String> = seen
                .iter()
                .map(|(line, times)| format!("{times} times {line}"))
                .collect();
            bail!(
                "the stream shows only (and {lost} lost)\n  {}\nof these lines:\n  {}",
                missing.join("\n  "),
                seen.join("\n  ")
            );
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(name: &str, labels: &[(&str, &str)], value: f64) -> Sample {
        Sample {
            name: name.to_owned(),
            labels: labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            value,
        }
    }

    #[test]
    fn row_fits_only_its_own_series() {
        let row = Row::dropped("client", "server", 1)
            .syn()
            .reason(&["NETFILTER_DROP"]);
        let labels = [
            ("source_pod", "client"),
            ("destination_pod", "server"),
            ("kind", "syn"),
            ("protocol", "TCP"),
            ("reason", "NETFILTER_DROP"),
        ];
        assert!(row.fits_sample(&sample("whydrop_silent_drops_total", &labels, 1.0)));
        assert!(!row.fits_sample(&sample("whydrop_rejected_packets_total", &labels, 1.0)));
        for index in 0..labels.len() {
            let mut other = labels;
            other[index].1 = "other";
            assert!(
                !row.fits_sample(&sample("whydrop_silent_drops_total", &other, 1.0)),
                "{other:?}"
            );
        }
        let mut service = labels.to_vec();
        service.push(("destination_service", "ns/name"));
        assert!(!row.fits_sample(&sample("whydrop_silent_drops_total", &service, 1.0)));
        assert!(row.service("ns/name").fits_sample(&sample(
            "whydrop_silent_drops_total",
            &service,
            1.0
        )));
    }
}
