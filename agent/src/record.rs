//! Counters of pairs: bounded, and gone when their pods are.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::event::{Cause, EndpointKind, Event, Kind, Outcome, Protocol};

pub mod listen;

/// How finely series name the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Each pod.
    Pod,
    /// What runs the pods.
    Workload,
    /// Their namespaces.
    Namespace,
}

impl Detail {
    /// As `--labels` names it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Workload => "workload",
            Self::Namespace => "namespace",
        }
    }
}

/// One end of a pair, as labels name it. What is coarsened away or not known is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, serde::Serialize)]
pub struct End {
    /// What the address belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<EndpointKind>,
    /// Namespace of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Arc<str>>,
    /// The pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<Arc<str>>,
    /// What runs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<Arc<str>>,
    /// The node, where the end is a node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<Arc<str>>,
}

/// The pair labels of a series.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Pair {
    /// Two ends. Where the headers could not be read nothing of it is known.
    Ends {
        /// Who sent.
        source: End,
        /// Who should have received.
        destination: End,
        /// Namespace and name of the Service that was asked for.
        service: Option<(Arc<str>, Arc<str>)>,
        /// Only of first packets, and where pod or Service declare it.
        port: Option<u16>,
        /// The transport protocol.
        protocol: Option<Protocol>,
    },
    /// What found no place: every label is `__other__`.
    Other,
}

/// A series of one of the two per-pair drop counters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Series {
    /// `rejected` or `dropped` (silent).
    pub outcome: Outcome,
    /// Between whom.
    pub pair: Arc<Pair>,
    /// What kind of packet.
    pub kind: Kind,
    /// The kernel's reason, on kernels without reasons the function; of an unanswered attempt its
    /// cause.
    pub reason: Arc<str>,
}

#[derive(Debug)]
struct Value {
    packets: u64,
    last: Instant,
    /// Since when one of its pods is gone.
    gone: Option<Instant>,
}

/// What became of packets, for `whydrop_node_drops_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// Silent.
    Dropped,
    /// The sender was told.
    Rejected,
    /// No loss to anyone.
    Benign,
}

impl Fate {
    /// The label's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dropped => "dropped",
            Self::Rejected => "rejected",
            Self::Benign => "benign",
        }
    }
}

/// All counters. The sum over `node_drops` is every packet that the tracepoint reported; its
/// `dropped` and `rejected` are the sums of the series and of what expired with series.
#[derive(Debug)]
pub struct Record {
    detail: Detail,
    max_series: usize,
    ttl: Duration,
    series: HashMap<Series, Value>,
    /// One for each outcome, so that a limit holds for each metric.
    series_by_outcome: BTreeMap<Outcome, usize>,
    node_drops: BTreeMap<(Arc<str>, Fate), u64>,
    overflow_packets: u64,
    expired_packets: BTreeMap<Outcome, u64>,
}

impl Record {
    /// Empty counters with at most `max_series` series in each metric, beside `__other__`.
    pub fn new(detail: Detail, max_series: usize, ttl: Duration) -> Self {
        Self {
            detail,
            max_series,
            ttl,
            series: HashMap::new(),
            series_by_outcome: BTreeMap::new(),
            node_drops: BTreeMap::new(),
            overflow_packets: 0,
            expired_packets: BTreeMap::new(),
        }
    }

    /// Counts the packets of an event to its pair and to the node.
    pub fn add(&mut self, event: &Event, reason: Arc<str>, now: Instant) {
        let pair = pair(event, self.detail);
        self.add_to(event.outcome, pair, event.kind, reason, event.packets, now);
    }

    /// Counts packets whose flow the kernel maps had no room for.
    pub fn add_other(
        &mut self,
        outcome: Outcome,
        kind: Kind,
        reason: Arc<str>,
        packets: u64,
        now: Instant,
    ) {
        self.add_to(outcome, Pair::Other, kind, reason, packets, now);
    }

    /// Counts an attempt that nobody answered; without a cause if drops are not seen.
    pub fn add_unanswered(&mut self, event: &Event, now: Instant) {
        let series = Series {
            outcome: Outcome::Unanswered,
            pair: Arc::new(pair(event, self.detail)),
            kind: event.kind,
            reason: event.cause.map_or("", Cause::as_str).into(),
        };
        self.add_series(series, 1, now);
    }

    /// Counts packets that were no loss.
    pub fn add_benign(&mut self, reason: Arc<str>, packets: u64) {
        *self.node_drops.entry((reason, Fate::Benign)).or_default() += packets;
    }

    fn add_to(
        &mut self,
        outcome: Outcome,
        pair: Pair,
        kind: Kind,
        reason: Arc<str>,
        packets: u64,
        now: Instant,
    ) {
        let fate = match outcome {
            Outcome::Rejected => Fate::Rejected,
            Outcome::Dropped | Outcome::Unanswered => Fate::Dropped,
        };
        *self.node_drops.entry((reason.clone(), fate)).or_default() += packets;
        let series = Series {
            outcome,
            pair: Arc::new(pair),
            kind,
            reason,
        };
        self.add_series(series, packets, now);
    }

    fn add_series(&mut self, mut series: Series, packets: u64, now: Instant) {
        if let Some(value) = self.series.get_mut(&series) {
            value.packets += packets;
            value.last = now;
            return;
        }
        let count = self.series_by_outcome.entry(series.outcome).or_default();
        if *series.pair != Pair::Other {
            if *count < self.max_series {
                *count += 1;
            } else {
                self.overflow_packets += packets;
                series.pair = Arc::new(Pair::Other);
            }
        }
        let value = self.series.entry(series).or_insert(Value {
            packets: 0,
            last: now,
            gone: None,
        });
        value.packets += packets;
        value.last = now;
    }

    /// Removes series whose time is over. `pod_exists` is asked for each named pod.
    pub fn expire(&mut self, now: Instant, pod_exists: impl Fn(&Arc<str>, &Arc<str>) -> bool) {
        let ttl = self.ttl;
        let gone = |end: &End| match (&end.namespace, &end.pod) {
            (Some(namespace), Some(pod)) => Some(!pod_exists(namespace, pod)),
            _ => None,
        };
        self.series.retain(|series, value| {
            let Pair::Ends {
                source,
                destination,
                ..
            } = &*series.pair
            else {
                return true;
            };
            let since = match (gone(source), gone(destination)) {
                (None, None) => Some(value.last),
                (Some(true), _) | (_, Some(true)) => {
                    // A late packet of a pod that is gone starts its time anew.
                    let since = value.gone.unwrap_or(now).max(value.last);
                    value.gone = Some(since);
                    Some(since)
                }
                _ => {
                    value.gone = None;
                    None
                }
            };
            let keep = since.is_none_or(|since| now.duration_since(since) < ttl);
            if !keep {
                *self.expired_packets.entry(series.outcome).or_default() += value.packets;
                if let Some(count) = self.series_by_outcome.get_mut(&series.outcome) {
                    *count = count.saturating_sub(1);
                }
            }
            keep
        });
    }

    /// How many series there are.
    pub fn series_count(&self) -> usize {
        self.series.len()
    }

    /// How finely series name their ends.
    pub const fn detail(&self) -> Detail {
        self.detail
    }

    /// The series of some pairs, with their packets and when the last one came.
    pub fn matching(&self, wants: impl Fn(&Pair) -> bool) -> Vec<(Series, u64, Instant)> {
        let series = self.series.iter().filter(|(series, _)| wants(&series.pair));
        series
            .map(|(series, value)| (series.clone(), value.packets, value.last))
            .collect()
    }

    /// A copy of all counters at one moment, so that whoever encodes them need not hold up the
    /// pipeline.
    pub fn snapshot(&self) -> Snapshot {
        let series = self.series.iter();
        let node_drops = self.node_drops.iter();
        Snapshot {
            series: series
                .map(|(series, value)| (series.clone(), value.packets))
                .collect(),
            node_drops: node_drops
                .map(|((reason, fate), packets)| (reason.clone(), *fate, *packets))
                .collect(),
            overflow_packets: self.overflow_packets,
            expired_packets: self.expired_packets.clone(),
        }
    }
}

/// All counters at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Every series with its packets.
    pub series: Vec<(Series, u64)>,
    /// Every packet that the tracepoint reported, by reason and fate.
    pub node_drops: Vec<(Arc<str>, Fate, u64)>,
    /// Packets that were counted under `__other__` because there were too many series.
    pub overflow_packets: u64,
    /// Packets of series that expired.
    pub expired_packets: BTreeMap<Outcome, u64>,
}

/// The pair of an event, with external addresses never part of it.
fn pair(event: &Event, detail: Detail) -> Pair {
    let end = |e: &crate::event::Endpoint| End {
        kind: e.kind,
        namespace: e.namespace.clone(),
        pod: (detail == Detail::Pod).then(|| e.pod.clone()).flatten(),
        workload: (detail != Detail::Namespace)
            .then(|| e.workload.as_ref().map(|w| w.name.clone()))
            .flatten(),
        node: (e.kind == Some(EndpointKind::Node))
            .then(|| e.node.clone())
            .flatten(),
    };
    let first = matches!(event.kind, Kind::Syn | Kind::Dns);
    let declared = event.destination.declared_port
        && matches!(event.protocol, Some(Protocol::UDP | Protocol::SCTP));
    Pair::Ends {
        source: end(&event.source),
        destination: end(&event.destination),
        service: event
            .destination
            .service
            .as_ref()
            .map(|s| (s.namespace.clone(), s.name.clone())),
        port: (first || declared)
            .then_some(event.destination.port)
            .flatten(),
        protocol: event.protocol,
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::event::Endpoint;

    fn event(pod: &str, packets: u64) -> Event {
        let end = |name: &str| Endpoint {
            kind: Some(EndpointKind::Pod),
            namespace: Some("shop".into()),
            pod: Some(name.into()),
            port: Some(5432),
            ..Endpoint::default()
        };
        Event {
            time: Timestamp::UNIX_EPOCH,
            node: "n".into(),
            kind: Kind::Syn,
            outcome: Outcome::Dropped,
            packets,
            protocol: Some(Protocol::TCP),
            ip_version: Some(4),
            tcp_flags: None,
            source: end(pod),
            destination: end("db"),
            waited_seconds: None,
            cause: None,
            dns: None,
            drop: None,
            explanation: None,
        }
    }

    fn record(max: usize, detail: Detail) -> Record {
        Record::new(detail, max, Duration::from_secs(900))
    }

    fn sum(record: &Record) -> u64 {
        record
            .snapshot()
            .series
            .iter()
            .map(|(_, packets)| packets)
            .sum()
    }

    fn node(record: &Record) -> u64 {
        record
            .snapshot()
            .node_drops
            .iter()
            .map(|(_, _, packets)| packets)
            .sum()
    }

    #[test]
    fn past_the_limit_pairs_are_added_up_as_other_and_sums_stay() {
        let mut record = record(2, Detail::Pod);
        let now = Instant::now();
        for pod in ["a", "b", "c", "d"] {
            record.add(&event(pod, 10), "R".into(), now);
        }
        record.add(&event("a", 1), "R".into(), now);
        assert_eq!(record.series.len(), 3);
        assert_eq!(
            (sum(&record), node(&record), record.overflow_packets),
            (41, 41, 20)
        );
        record.add_benign("Q".into(), 5);
        assert_eq!((sum(&record), node(&record)), (41, 46));
    }

    #[test]
    fn a_series_goes_when_its_pod_has_been_gone_for_the_ttl() {
        let mut record = record(1, Detail::Pod);
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        record.add(&event("a", 3), "R".into(), start);
        record.expire(at(10_000), |_, _| true);
        assert_eq!(
            record.series.len(),
            1,
            "a pod that is there keeps its series"
        );
        record.expire(at(10_001), |_, pod| &**pod != "a");
        record.expire(at(10_900), |_, pod| &**pod != "a");
        assert_eq!(record.series.len(), 1);
        record.expire(at(10_902), |_, pod| &**pod != "a");
        assert_eq!(record.series.len(), 0);
        assert_eq!(
            (record.expired_packets[&Outcome::Dropped], node(&record)),
            (3, 3)
        );
        // Its place is free again.
        record.add(&event("b", 1), "R".into(), at(10_903));
        assert_eq!((record.series.len(), record.overflow_packets), (1, 0));
    }

    #[test]
    fn a_pair_without_pods_goes_after_its_last_packet() {
        let mut record = record(10, Detail::Namespace);
        let start = Instant::now();
        record.add(&event("a", 3), "R".into(), start);
        record.add(&event("b", 4), "R".into(), start);
        assert_eq!(record.series.len(), 1, "pods are coarsened away");
        record.expire(start + Duration::from_secs(899), |_, _| true);
        assert_eq!(record.series.len(), 1);
        record.expire(start + Duration::from_secs(900), |_, _| true);
        assert_eq!(record.series.len(), 0);
    }

    #[test]
    fn ports_are_of_first_packets_or_declared() {
        let port = |event: &Event| match pair(event, Detail::Pod) {
            Pair::Ends { port, .. } => port,
            Pair::Other => None,
        };
        let mut e = event("a", 1);
        assert_eq!(port(&e), Some(5432));
        e.kind = Kind::Packet;
        e.destination.declared_port = true;
        assert_eq!(port(&e), None, "a later TCP segment");
        e.protocol = Some(Protocol::UDP);
        assert_eq!(port(&e), Some(5432));
        e.destination.declared_port = false;
        assert_eq!(port(&e), None);
    }
}
