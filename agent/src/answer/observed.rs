//! What an agent has seen of a connection: its counters of the pair, the last events that it keeps,
//! and what conntrack has of it now.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::Answer;
use super::origin::clock;
use crate::event::{Endpoint, Event, LastChange, Line, Outcome, Protocol};
use crate::policy::evaluate::{End, Who};
use crate::policy::world::World;
use crate::record::{self, Detail, Pair, Record};

/// Events that are shown.
const LAST: usize = 5;

/// What was seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// By the agent of this node.
    pub node: Arc<str>,
    /// What was counted: the series of the pair of `pod`s, of their `workload`s or `namespace`s, as
    /// the agent keeps them, or the `events` that it still keeps where an end has no series.
    pub counted_by: String,
    /// Packets dropped without telling the sender.
    pub dropped: Seen,
    /// Packets dropped, the sender told.
    pub rejected: Seen,
    /// Attempts that nobody answered, by cause.
    pub unanswered: Seen,
    /// Of these drops the packets that are no first ones: series do not tell their port.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub of_any_port: u64,
    /// The last events of the connection, the newest last.
    pub events: Vec<Event>,
    /// The policy, or the labels, that changed last before its first drop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_change: Option<LastChange>,
    /// Connections that conntrack has now; absent where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections_unknown: Option<String>,
}

/// Packets or attempts of one outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// How many.
    pub count: u64,
    /// Of these by reason or cause.
    pub reasons: BTreeMap<String, u64>,
    /// When the last one was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<Timestamp>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
const fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Seen {
    fn add(&mut self, reason: &str, count: u64, at: Timestamp) {
        self.count += count;
        *self.reasons.entry(reason.to_owned()).or_default() += count;
        self.last_seen = self.last_seen.max(Some(at));
    }
}

/// The ends that count as a connection's own.
#[derive(Debug)]
pub struct Wanted {
    source: Named,
    destinations: Vec<Named>,
    service: Option<(String, String)>,
    protocol: Protocol,
    /// Empty: any.
    ports: Vec<u16>,
}

/// A pod as events and series name it.
#[derive(Debug)]
struct NamedPod {
    namespace: Arc<str>,
    name: Arc<str>,
    workload: Option<Arc<str>>,
}

/// One end, by all that may name it.
#[derive(Debug)]
struct Named {
    pod: Option<NamedPod>,
    node: Option<Arc<str>>,
    ips: Vec<IpAddr>,
}

impl Named {
    fn of(world: &World, end: End) -> Self {
        let mut ips: Vec<IpAddr> = end.ip.into_iter().collect();
        let (pod, node) = match end.who {
            Who::Pod(id) => {
                let pod = world.pod(id);
                ips.extend(pod.ips.iter().filter(|_| !pod.host_network));
                let named = NamedPod {
                    namespace: pod.key.namespace.clone(),
                    name: pod.key.name.clone(),
                    workload: pod.workload.as_ref().map(|w| w.name.clone()),
                };
                (Some(named), None)
            }
            Who::Node(id) => (None, Some(world.node(id).key.name.clone())),
            Who::Outside => (None, None),
        };
        Self { pod, node, ips }
    }

    fn is_at(&self, end: &Endpoint) -> bool {
        match (&self.pod, &end.pod) {
            (Some(pod), Some(name)) => {
                Some(&pod.namespace) == end.namespace.as_ref() && pod.name == *name
            }
            (None, Some(_)) => false,
            (_, None) => end.ip.is_some_and(|ip| self.ips.contains(&ip)),
        }
    }

    fn is_in_series(&self, end: &record::End, detail: Detail) -> bool {
        match &self.pod {
            Some(pod) => {
                end.namespace.as_ref() == Some(&pod.namespace)
                    && match detail {
                        Detail::Pod => end.pod.as_ref() == Some(&pod.name),
                        Detail::Workload => end.workload == pod.workload,
                        Detail::Namespace => true,
                    }
            }
            None => self.node.is_some() && end.node == self.node && end.namespace.is_none(),
        }
    }

    /// Whether series name it: external addresses are in none.
    const fn has_series(&self) -> bool {
        self.pod.is_some() || self.node.is_some()
    }
}

impl Wanted {
    /// The ends of an answer's question.
    pub fn of(answer: &Answer, asked_port: Option<u16>) -> Self {
        let world = &*answer.ground.world;
        let named = |end| Named::of(world, end);
        let (destinations, ports) = match &answer.service {
            // Before DNAT the port is the Service's.
            Some(_) => (
                answer.backends.iter().map(|(b, _)| named(b.end)).collect(),
                answer
                    .backends
                    .iter()
                    .filter_map(|(b, _)| b.port)
                    .chain(asked_port)
                    .collect(),
            ),
            None => (
                vec![named(answer.flow.destination)],
                answer.flow.port.into_iter().collect(),
            ),
        };
        let service = answer.service.as_deref().and_then(|s| s.split_once('/'));
        Self {
            source: named(answer.flow.source),
            destinations,
            service: service.map(|(namespace, name)| (namespace.to_owned(), name.to_owned())),
            protocol: answer.flow.protocol,
            ports,
        }
    }

    fn has_port(&self, port: Option<u16>) -> bool {
        self.ports.is_empty() || port.is_some_and(|port| self.ports.contains(&port))
    }

    /// Whether a connection of these addresses, after DNAT, is one of them.
    pub fn has_addresses(&self, protocol: Protocol, from: IpAddr, to: (IpAddr, u16)) -> bool {
        protocol == self.protocol
            && self.has_port(Some(to.1))
            && self.source.ips.contains(&from)
            && self.destinations.iter().any(|d| d.ips.contains(&to.0))
    }

    fn is_in(&self, event: &Event) -> bool {
        let to = &event.destination;
        let reaches = match (&self.service, &to.service) {
            (Some((namespace, name)), Some(service)) => {
                *namespace == *service.namespace && *name == *service.name
            }
            (Some(_), None) => false,
            (None, _) => self.destinations.iter().any(|d| d.is_at(to)),
        };
        event.protocol == Some(self.protocol)
            && reaches
            && self.has_port(to.port)
            && self.source.is_at(&event.source)
    }

    fn is_in_series(&self, pair: &Pair, detail: Detail) -> bool {
        let Pair::Ends {
            source,
            destination,
            service,
            port,
            protocol,
        } = pair
        else {
            return false;
        };
        let reaches = match (&self.service, service) {
            (Some((namespace, name)), Some((of, called))) => {
                *namespace == **of && *name == **called
            }
            (Some(_), None) => false,
            (None, _) => self
                .destinations
                .iter()
                .any(|d| d.is_in_series(destination, detail)),
        };
        *protocol == Some(self.protocol)
            && reaches
            && (port.is_none() || self.has_port(*port))
            && self.source.is_in_series(source, detail)
    }

    /// What counters and events show of the connection. `lines` are those that the agent keeps.
    pub fn look(&self, node: &Arc<str>, record: &Record, lines: &[Arc<Line>]) -> Observed {
        let events = lines.iter().filter_map(|line| match &**line {
            Line::Event(event) if self.is_in(event) => Some(event),
            _ => None,
        });
        let events: Vec<&Event> = events.collect();
        let mut observed = Observed {
            node: node.clone(),
            counted_by: "events".to_owned(),
            dropped: Seen::default(),
            rejected: Seen::default(),
            unanswered: Seen::default(),
            of_any_port: 0,
            events: Vec::new(),
            last_change: None,
            connections: None,
            connections_unknown: None,
        };
        let has_series = self.service.is_some() || self.destinations.iter().all(Named::has_series);
        if has_series && self.source.has_series() {
            observed.counted_by = record.detail().as_str().to_owned();
            let (now, wall) = (Instant::now(), Timestamp::now());
            for (series, count, last) in record.matching(|p| self.is_in_series(p, record.detail()))
            {
                let ago = SignedDuration::try_from(now.saturating_duration_since(last));
                let at = wall - ago.unwrap_or(SignedDuration::ZERO);
                observed.of(series.outcome).add(&series.reason, count, at);
                if let Pair::Ends { port: None, .. } = &*series.pair
                    && !self.ports.is_empty()
                {
                    observed.of_any_port += count;
                }
            }
        } else {
            for event in &events {
                let reason = match (event.cause, &event.drop) {
                    (Some(cause), _) => cause.as_str(),
                    (None, Some(site)) => site.reason.as_deref().unwrap_or(""),
                    (None, None) => "",
                };
                observed
                    .of(event.outcome)
                    .add(reason, event.packets, event.time);
            }
        }
        let explanations = events.iter().rev().filter_map(|e| e.explanation.as_ref());
        observed.last_change = explanations.into_iter().find_map(|e| e.last_change.clone());
        let first = events.len().saturating_sub(LAST);
        observed.events = events[first..].iter().map(|e| (*e).clone()).collect();
        observed
    }
}

impl Observed {
    const fn of(&mut self, outcome: Outcome) -> &mut Seen {
        match outcome {
            Outcome::Dropped => &mut self.dropped,
            Outcome::Rejected => &mut self.rejected,
            Outcome::Unanswered => &mut self.unanswered,
        }
    }

    /// One sentence for people.
    pub fn sentence(&self) -> String {
        let seen = [
            (&self.dropped, "silent", "packets dropped"),
            (&self.rejected, "refused", "packets rejected"),
            (&self.unanswered, "unanswered", "attempts"),
        ];
        let parts = seen.into_iter().filter(|(seen, ..)| seen.count > 0);
        let parts = parts.map(|(seen, word, what)| {
            let reasons = seen.reasons.iter().filter(|(reason, _)| !reason.is_empty());
            let reasons: Vec<String> = reasons.map(|(r, n)| format!("{r} {n}")).collect();
            let reasons = match reasons.is_empty() {
                true => String::new(),
                false => format!(" ({})", reasons.join(", ")),
            };
            let last = seen.last_seen.map(clock);
            let last = last.map_or_else(String::new, |last| format!(", the last at {last}"));
            format!("{word}: {} {what}{reasons}{last}", seen.count)
        });
        let mut parts: Vec<String> = parts.collect();
        if parts.is_empty() {
            parts.push(format!("neither: {} has seen no drop of it", self.node));
        }
        if self.of_any_port > 0 {
            parts.push(format!(
                "{} of these are no first packets, whose port is not counted",
                self.of_any_port
            ));
        }
        parts.extend(
            self.last_change
                .as_ref()
                .and_then(LastChange::beside_first_drop),
        );
        match self.counted_by.as_str() {
            "workload" | "namespace" => {
                parts.push(format!("counted for the pair of {}s", self.counted_by));
            }
            _ => {}
        }
        match self.connections {
            Some(0) => parts.push("no such connection now".to_owned()),
            Some(1) => parts.push("1 connection now".to_owned()),
            Some(n) => parts.push(format!("{n} connections now")),
            None => {}
        }
        parts.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::answer::{Ground, answer, missing::Missing, origin::Origin, question::Query};
    use crate::event::{DropSite, Kind, What, testing};
    use crate::policy::testing::world;

    /// What is observed of a question, after events of `(outcome, from, to, port, packets)`.
    fn observed(query: &str, events: &[(Outcome, &str, &str, u16, u64)]) -> Observed {
        let end = |name: &str, port| match name.split_once('/') {
            Some((namespace, pod)) => Endpoint {
                namespace: Some(namespace.into()),
                pod: Some(pod.into()),
                port: Some(port),
                ..Endpoint::default()
            },
            None => Endpoint {
                ip: name.parse().ok(),
                port: Some(port),
                ..Endpoint::default()
            },
        };
        let mut record = Record::new(Detail::Pod, 100, Duration::from_secs(60));
        let lines = events.iter().map(|(outcome, from, to, port, packets)| {
            let event = Event {
                kind: Kind::Syn,
                outcome: *outcome,
                packets: *packets,
                source: end(from, 4000),
                destination: end(to, *port),
                drop: Some(DropSite {
                    reason: Some("NETFILTER_DROP".into()),
                    ..DropSite::default()
                }),
                ..testing::event()
            };
            record.add(&event, "NETFILTER_DROP".into(), Instant::now());
            Arc::new(Line::Event(event))
        });
        let lines: Vec<Arc<Line>> = lines.collect();
        look(query, &record, &lines)
    }

    fn look(query: &str, record: &Record, lines: &[Arc<Line>]) -> Observed {
        let ground = Ground {
            world: Arc::new(world("")),
            origin: Origin::Files,
            missing: Missing::default(),
            skipped: Vec::new(),
        };
        let query = Query::parse(query).unwrap();
        let answer = answer(&ground, &query.asked, false).unwrap();
        Wanted::of(&answer, query.asked.port).look(&"node-a".into(), record, lines)
    }

    #[test]
    fn only_the_connection_itself_is_counted() {
        use Outcome::{Dropped, Rejected};
        let seen = observed(
            "src=shop/web&dst=db/pg&port=5432",
            &[
                (Dropped, "shop/web", "db/pg", 5432, 3),
                (Rejected, "shop/web", "db/pg", 5432, 2),
                (Dropped, "shop/web", "db/pg", 9187, 40),
                (Dropped, "db/pg", "shop/web", 5432, 50),
                (Dropped, "shop/job", "db/pg", 5432, 60),
            ],
        );
        assert_eq!((seen.dropped.count, seen.rejected.count), (3, 2));
        assert_eq!(seen.dropped.reasons["NETFILTER_DROP"], 3);
        assert!(seen.dropped.last_seen.is_some());
        assert_eq!((seen.events.len(), &*seen.counted_by), (2, "pod"));
        let sentence = seen.sentence();
        assert!(
            sentence.starts_with("silent: 3 packets dropped (NETFILTER_DROP 3), the last at "),
            "{sentence}"
        );
        assert!(sentence.contains("refused: 2"), "{sentence}");
    }

    #[test]
    fn what_changed_last_before_the_first_drop_is_told() {
        let change = LastChange {
            kind: "NetworkPolicy".into(),
            namespace: "db".into(),
            name: "deny".into(),
            what: What::Created,
            time: Timestamp::UNIX_EPOCH,
            seconds_before_first_drop: Some(4.2),
        };
        let mut event = testing::event();
        event.source.pod = Some("web".into());
        event.destination.pod = Some("pg".into());
        if let Some(explanation) = &mut event.explanation {
            explanation.last_change = Some(change.clone());
        }
        // A later one is without an explanation, as those past the budget are.
        let mut later = event.clone();
        later.explanation = None;
        let lines = [event, later].map(|event| Arc::new(Line::Event(event)));
        let record = Record::new(Detail::Pod, 100, Duration::from_secs(60));
        let seen = look("src=shop/web&dst=db/pg&port=5432", &record, &lines);
        assert_eq!(seen.last_change, Some(change));
        let told = "NetworkPolicy db/deny was created 4 s before the first drop";
        assert!(seen.sentence().contains(told), "{}", seen.sentence());
    }

    #[test]
    fn an_external_address_is_counted_by_its_own_events() {
        let seen = observed(
            "src=shop/web&dst=203.0.113.7&port=443",
            &[
                (Outcome::Dropped, "shop/web", "203.0.113.7", 443, 3),
                (Outcome::Dropped, "shop/web", "203.0.113.8", 443, 4),
            ],
        );
        assert_eq!((seen.dropped.count, &*seen.counted_by), (3, "events"));
    }

    #[test]
    fn nothing_seen_is_said_and_the_last_events_are_kept() {
        let seen = observed("src=shop/web&dst=db/pg&port=1", &[]);
        assert_eq!(seen.sentence(), "neither: node-a has seen no drop of it");
        let many = [(Outcome::Dropped, "shop/web", "db/pg", 1, 1); 9];
        let seen = observed("src=shop/web&dst=db/pg&port=1", &many);
        assert_eq!((seen.dropped.count, seen.events.len()), (9, LAST));
    }
}
