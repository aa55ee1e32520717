//! `whydrop_policy_denials_total`: packets whose drop the policies explain, once for each isolating policy.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::event::{Confidence, Event};
use crate::sync::lock;

/// Series; past it, packets are added to one whose labels are all `__other__`. As many as pairs by default.
const MAX: usize = 10_000;
/// The label of what has no room.
const OTHER: &str = "__other__";

/// The labels of one series.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Denial {
    /// `ingress` or `egress`; empty where both sides deny.
    pub direction: String,
    /// The policy's namespace and name.
    pub policy: (String, String),
    /// The first finding's code.
    pub finding: String,
    /// How sure it is.
    pub confidence: &'static str,
    /// The namespaces of source and destination; empty for what is no pod.
    pub namespaces: [Arc<str>; 2],
}

/// The counters.
#[derive(Debug, Default)]
pub struct Denials {
    series: Mutex<BTreeMap<Denial, u64>>,
    unexplained: AtomicU64,
}

impl Denials {
    /// Adds the packets of an event that its explanation lays to policies.
    pub fn add(&self, event: &Event) {
        let Some(explanation) = event.explanation.as_ref().filter(|e| super::is_denial(e)) else {
            return;
        };
        let namespace = |end: &crate::event::Endpoint| end.namespace.clone().unwrap_or_default();
        let namespaces = [namespace(&event.source), namespace(&event.destination)];
        let finding = explanation.findings.first();
        let mut series = lock(&self.series);
        for policy in &explanation.policies {
            let (of, name) = policy.split_once('/').unwrap_or(("", policy));
            let denial = Denial {
                direction: explanation.direction.clone().unwrap_or_default(),
                policy: (of.to_owned(), name.to_owned()),
                finding: finding.map_or_else(String::new, |finding| finding.code.clone()),
                confidence: as_str(explanation.confidence),
                namespaces: namespaces.clone(),
            };
            let denial = match series.len() < MAX || series.contains_key(&denial) {
                true => denial,
                false => other(),
            };
            *series.entry(denial).or_default() += event.packets;
        }
    }

    /// Packets that were not laid against policies, because too many flows had to be.
    pub fn unexplained(&self, packets: u64) {
        self.unexplained.fetch_add(packets, Ordering::Relaxed);
    }

    /// How many those are.
    pub fn unexplained_total(&self) -> u64 {
        self.unexplained.load(Ordering::Relaxed)
    }

    /// All series.
    pub fn all(&self) -> Vec<(Denial, u64)> {
        let series = lock(&self.series);
        series
            .iter()
            .map(|(denial, n)| (denial.clone(), *n))
            .collect()
    }
}

fn other() -> Denial {
    Denial {
        direction: OTHER.to_owned(),
        policy: (OTHER.to_owned(), OTHER.to_owned()),
        finding: OTHER.to_owned(),
        confidence: OTHER,
        namespaces: [OTHER.into(), OTHER.into()],
    }
}

fn as_str(confidence: Confidence) -> &'static str {
    match confidence {
        Confidence::Confirmed => "confirmed",
        Confidence::Consistent => "consistent",
        Confidence::Contradicted => "contradicted",
        Confidence::None => "none",
    }
}
