//! Which drops are told of, and when: one Event for each pod that suffers and what it cannot reach, a
//! series instead of repetition, and no more than the API server of a cluster full of agents can bear.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::event::{Cause, Endpoint, Event, Kind, Outcome, Protocol};

/// Series that are followed. 1,024 are some 0.5 MB; past it drops are counted as limited.
const MAX: usize = 1_024;
/// How long a drop waits before it is told of: the first ones of many may not be explained yet.
const GATHER: Duration = Duration::from_secs(1);
/// After which a series is over, and another begins with an Event of its own.
const OVER: Duration = Duration::from_secs(360);
/// Requests at once, and what each takes to come again: 5,000 nodes that all lose packets ask 500 times
/// a second.
const BURST: u32 = 10;
const REFILL: Duration = Duration::from_secs(10);
/// `note` may have 1 kB (KEP-383).
const NOTE_BYTES: usize = 1_024;

/// Times that tests make shorter.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// From the Event to its first update.
    pub first_update: Duration,
    /// From each update to the next. A series that is silent for six minutes is over (KEP-383).
    pub next_update: Duration,
    /// Before what failed is tried again.
    pub again: Duration,
    /// Between two attempts to get a client.
    pub client: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            first_update: Duration::from_secs(60),
            next_update: Duration::from_secs(300),
            again: Duration::from_secs(30),
            client: Duration::from_secs(30),
        }
    }
}

/// A pod, and what it cannot reach or who cannot reach it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// The pod.
    pub pod: Arc<str>,
    /// The other end: `namespace/pod`, or an address.
    other: String,
    protocol: Option<Protocol>,
    port: Option<u16>,
}

/// A pod's namespace and name.
pub type PodName = (Arc<str>, Arc<str>);

/// One request that is due.
#[derive(Clone, Debug, PartialEq)]
pub enum Post {
    /// A new Event.
    Create {
        /// On which pod.
        subject: Subject,
        /// The other end's namespace and name, if it is a pod.
        related: Option<PodName>,
        /// The sentence.
        note: String,
        /// The first drop.
        first: Timestamp,
    },
    /// Its series goes on.
    Update {
        /// On which pod.
        subject: Subject,
        /// The Event's name.
        name: String,
        /// Drops so far.
        count: u64,
        /// The last one.
        last: Timestamp,
    },
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The Event has this name.
    Created(String),
    /// It was updated.
    Updated,
    /// The pod or its namespace is gone: nobody to tell it of.
    Gone,
    /// The Event is gone; another is made.
    Expired,
    /// It is to be tried again.
    Failed,
}

struct Series {
    related: Option<PodName>,
    note: String,
    is_explained: bool,
    first: Timestamp,
    last: Timestamp,
    last_at: Instant,
    count: u64,
    /// Events of whydrop that it is made of.
    noted: u64,
    /// As the Event says.
    told: u64,
    name: Option<String>,
    due: Instant,
}

/// All series of a node.
pub struct AllSeries {
    node: Arc<str>,
    times: Times,
    series: HashMap<Subject, Series>,
    tokens: u32,
    refilled: Instant,
    /// Events of series that were over before their turn came.
    untold: u64,
}

impl AllSeries {
    /// Without any.
    pub fn new(node: Arc<str>, times: Times, now: Instant) -> Self {
        Self {
            node,
            times,
            series: HashMap::new(),
            tokens: BURST,
            refilled: now,
            untold: 0,
        }
    }

    /// Notes an event. Whether there was room for it.
    pub fn note(&mut self, event: &Event, now: Instant) -> bool {
        let Some((subject, related)) = subject(event) else {
            return true;
        };
        let count = match (event.outcome, event.cause) {
            (Outcome::Rejected, _) => return true,
            (Outcome::Dropped, _) => event.packets,
            // Its drops are counted.
            (Outcome::Unanswered, Some(Cause::DroppedHere)) => 0,
            (Outcome::Unanswered, _) => 1,
        };
        if self.series.len() >= MAX && !self.series.contains_key(&subject) {
            self.forget(now);
            if self.series.len() >= MAX {
                return false;
            }
        }
        let is_explained = event.explanation.is_some();
        let note = sentence(event, &subject, &self.node);
        let series = self.series.entry(subject).or_insert_with(|| Series {
            related,
            note: note.clone(),
            is_explained,
            first: event.time,
            last: event.time,
            last_at: now,
            count: 0,
            noted: 0,
            told: 0,
            name: None,
            due: now + GATHER,
        });
        if is_explained && !series.is_explained {
            (series.note, series.is_explained) = (note, true);
        }
        series.count += count;
        series.noted += 1;
        series.last = series.last.max(event.time);
        series.last_at = now;
        true
    }

    /// The next request that is due and may be made now.
    pub fn next(&mut self, now: Instant) -> Option<Post> {
        self.forget(now);
        let refills = now.duration_since(self.refilled).as_secs() / REFILL.as_secs();
        let refills = u32::try_from(refills).unwrap_or(u32::MAX);
        self.refilled += REFILL.saturating_mul(refills);
        self.tokens = self.tokens.saturating_add(refills).min(BURST);
        if self.tokens == 0 {
            return None;
        }
        let is_due = |series: &Series| {
            let has_news = series.name.is_none() || series.count > series.told;
            has_news && series.due <= now
        };
        let due = self.series.iter_mut().filter(|(_, series)| is_due(series));
        // Who waits longest.
        let (subject, series) = due.min_by_key(|(_, series)| series.due)?;
        self.tokens -= 1;
        let subject = subject.clone();
        Some(match &series.name {
            None => Post::Create {
                subject,
                related: series.related.clone(),
                note: series.note.clone(),
                first: series.first,
            },
            Some(name) => Post::Update {
                subject,
                name: name.clone(),
                // A series has two at least.
                count: series.count.max(2),
                last: series.last,
            },
        })
    }

    /// Takes in what came of a request.
    pub fn answered(&mut self, subject: &Subject, answer: Answer, now: Instant) {
        let Some(series) = self.series.get_mut(subject) else {
            return;
        };
        match answer {
            Answer::Created(name) => {
                series.name = Some(name);
                series.told = 1;
                series.due = now + self.times.first_update;
            }
            Answer::Updated => {
                series.told = series.count;
                series.due = now + self.times.next_update;
            }
            Answer::Gone => _ = self.series.remove(subject),
            Answer::Expired => (series.name, series.due) = (None, now),
            Answer::Failed => series.due = now + self.times.again,
        }
    }

    fn forget(&mut self, now: Instant) {
        let over = self
            .series
            .extract_if(|_, series| now.duration_since(series.last_at) >= OVER);
        let untold = over.filter(|(_, series)| series.told == 0);
        self.untold += untold.map(|(_, series)| series.noted).sum::<u64>();
    }

    /// How many events were told nowhere because their series were over before their turn came, since this
    /// was asked last.
    pub fn take_untold(&mut self) -> u64 {
        std::mem::take(&mut self.untold)
    }
}

/// The pod that suffers: who sends, else who is sent to. And the other end, if it is a pod.
fn subject(event: &Event) -> Option<(Subject, Option<PodName>)> {
    let pod = |end: &Endpoint| end.namespace.clone().zip(end.pod.clone());
    let (mine, theirs) = match pod(&event.source) {
        Some(pod) => (pod, &event.destination),
        None => (pod(&event.destination)?, &event.source),
    };
    let related = pod(theirs);
    let subject = Subject {
        namespace: mine.0,
        pod: mine.1,
        other: named(theirs),
        protocol: event.protocol,
        port: event.destination.port.filter(|_| {
            // Of a packet on its way back it is the client's, another one each time.
            event.kind != Kind::Packet || event.destination.declared_port
        }),
    };
    Some((subject, related))
}

fn named(end: &Endpoint) -> String {
    match (&end.namespace, &end.pod, end.ip) {
        (Some(namespace), Some(pod), _) => format!("{namespace}/{pod}"),
        (.., Some(ip)) => ip.to_string(),
        _ => "an unknown address".to_owned(),
    }
}

/// What happens to the pod, and why as far as policies tell.
fn sentence(event: &Event, subject: &Subject, node: &str) -> String {
    let is_sender = event.source.pod.as_ref() == Some(&subject.pod)
        && event.source.namespace.as_ref() == Some(&subject.namespace);
    let what = match event.kind {
        Kind::Syn => "connections",
        Kind::Dns => "DNS queries",
        Kind::Packet => "packets",
    };
    let preposition = match is_sender {
        true => "to",
        false => "from",
    };
    let port = subject.port.map(|port| match is_sender {
        true => format!(" port {port}"),
        false => format!(" to port {port}"),
    });
    let protocol = event.protocol.map(|p| format!(" ({p})"));
    let fate = match (event.outcome, event.cause, &event.drop) {
        (Outcome::Unanswered, Some(Cause::Elsewhere), _) => {
            format!("get no answer, and node {node} does not drop them")
        }
        (_, _, Some(site)) => {
            let reason = site.reason.as_ref().or(site.location.as_ref());
            let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
            format!("are dropped on node {node} and nobody is told{reason}")
        }
        (Outcome::Unanswered, Some(Cause::DroppedHere), None) => {
            format!("get no answer: probably a full accept queue on node {node}")
        }
        (Outcome::Unanswered, ..) => "get no answer".to_owned(),
        _ => format!("are dropped on node {node} and nobody is told"),
    };
    let mut text = format!(
        "{what} {preposition} {}{}{} {fate}",
        subject.other,
        port.unwrap_or_default(),
        protocol.unwrap_or_default(),
    );
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    let summary = event.explanation.as_ref().map(|e| e.summary.as_str());
    if let Some(summary) = summary.filter(|summary| !summary.is_empty()) {
        text += "; ";
        text += summary;
    }
    let mut end = text.len().min(NOTE_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

#[cfg(test)]
#[path = "series_tests.rs"]
mod tests;
