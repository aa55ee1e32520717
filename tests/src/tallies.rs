//! What the agent counts of a workload's connects and of its DNS.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::agent::{Agent, POLL, Sample};
use crate::lab::Lab;

/// Until a count must be on `/metrics`.
const DEADLINE: Duration = Duration::from_secs(60);

/// How the connects of a workload of the lab ended, by `whydrop_connects_total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Results {
    /// Established.
    pub established: u64,
    /// Refused: the sender was told.
    pub refused: u64,
    /// Unanswered.
    pub unanswered: u64,
    /// Given up before that.
    pub abandoned: u64,
}

impl Results {
    /// All of them.
    pub fn sum(&self) -> u64 {
        self.established + self.refused + self.unanswered + self.abandoned
    }

    /// What the agent counts now.
    ///
    /// # Errors
    /// It does not answer.
    pub fn read(lab: &Lab, agent: &Agent, workload: &str) -> Result<Self> {
        let samples = agent.metrics()?;
        let of = |result| {
            let labels = [("result", result)];
            sum(lab, &samples, "whydrop_connects_total", workload, &labels)
        };
        Ok(Self {
            established: of("established"),
            refused: of("refused"),
            unanswered: of("unanswered"),
            abandoned: of("abandoned"),
        })
    }
}

/// A counter of a workload of the lab, over all series that have these labels.
pub fn sum(
    lab: &Lab,
    samples: &[Sample],
    name: &str,
    workload: &str,
    labels: &[(&str, &str)],
) -> u64 {
    samples
        .iter()
        .filter(|sample| sample.name == name)
        .filter(|sample| sample.label("source_namespace") == lab.namespace())
        .filter(|sample| sample.label("source_workload") == workload)
        .filter(|sample| {
            labels
                .iter()
                .all(|(name, value)| sample.label(name) == *value)
        })
        .map(|sample| sample.value as u64)
        .sum()
}

/// Waits until the agent counts exactly this of a workload's connects.
///
/// # Errors
/// It does not; says what it counts.
pub fn connects(lab: &Lab, agent: &Agent, workload: &str, wanted: Results) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let found = Results::read(lab, agent, workload)?;
        if found == wanted {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "whydrop_connects_total of {workload} is\n  {found:?}, not\n  {wanted:?}"
        );
        std::thread::sleep(POLL);
    }
}

/// What DNS is to a workload, by the agent's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// `whydrop_dns_queries_total`.
    pub queries: u64,
    /// `whydrop_dns_responses_total` by response code.
    pub responses: BTreeMap<String, u64>,
    /// How many latencies the histogram holds.
    pub latencies: u64,
}

impl Dns {
    /// So many queries, of which so many got an answer with each of these codes.
    pub fn of(queries: u64, responses: &[(&str, u64)]) -> Self {
        Self {
            queries,
            responses: responses
                .iter()
                .filter(|(_, count)| *count > 0)
                .map(|(rcode, count)| ((*rcode).to_owned(), *count))
                .collect(),
            latencies: responses.iter().map(|(_, count)| count).sum(),
        }
    }

    /// What the agent counts now.
    ///
    /// # Errors
    /// It does not answer.
    pub fn read(lab: &Lab, agent: &Agent, workload: &str) -> Result<Self> {
        let samples = agent.metrics()?;
        let mut responses = BTreeMap::new();
        for sample in &samples {
            if sample.name == "whydrop_dns_responses_total"
                && sample.label("source_namespace") == lab.namespace()
                && sample.label("source_workload") == workload
                && sample.value > 0.0
            {
                *responses
                    .entry(sample.label("rcode").to_owned())
                    .or_default() += sample.value as u64;
            }
        }
        let of = |name| sum(lab, &samples, name, workload, &[]);
        Ok(Self {
            queries: of("whydrop_dns_queries_total"),
            responses,
            latencies: of("whydrop_dns_latency_seconds_count"),
        })
    }
}

/// Waits until the agent counts exactly this of a workload's DNS.
///
/// # Errors
/// It does not; says what it counts.
pub fn dns(lab: &Lab, agent: &Agent, workload: &str, wanted: &Dns) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let found = Dns::read(lab, agent, workload)?;
        if found == *wanted {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "the DNS counters of {workload} are\n  {found:?}, not\n  {wanted:?}"
        );
        std::thread::sleep(POLL);
    }
}
