//! When the drops of a pair began, and what changed last before: the rollout beside the first timeout.

use std::collections::HashMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::cluster::Index;
use crate::cluster::changes::Concerned;
use crate::event::{Endpoint, Event, LastChange, Protocol};

use super::Name;

/// Drops of a pair that are further apart than this are of two episodes.
const APART: SignedDuration = SignedDuration::from_mins(10);
/// Pairs that are remembered; past it, of new ones no beginning is known. Some 150 bytes each.
const MAX: usize = 16_384;
/// A CNI may act on a change before this agent is told of it.
const SLACK: SignedDuration = SignedDuration::from_secs(2);

/// A pair, with the port that its connections ask for.
type Pair = (Name, Name, Protocol, Option<u16>);

/// The pairs that lose packets.
#[derive(Default)]
pub struct Episodes(HashMap<Pair, Episode>);

#[derive(Clone, Copy)]
struct Episode {
    first: Timestamp,
    last: Timestamp,
}

impl Episodes {
    /// Notes a drop. Answers when the first of its episode was; nothing where there is no room.
    pub fn note(&mut self, pair: Pair, event: &Event) -> Option<Timestamp> {
        let waited = event.waited_seconds.unwrap_or(0.0);
        let waited = Duration::try_from_secs_f64(waited).unwrap_or_default();
        let began = event.time.checked_sub(waited).unwrap_or(event.time);
        if self.0.len() >= MAX && !self.0.contains_key(&pair) {
            let is_over = |episode: &Episode| event.time.duration_since(episode.last) > APART;
            self.0.retain(|_, episode| !is_over(episode));
            if self.0.len() >= MAX {
                return None;
            }
        }
        let new = Episode {
            first: began,
            last: event.time,
        };
        let known = self.0.entry(pair).or_insert(new);
        if began.duration_since(known.last) > APART {
            *known = new;
        }
        known.first = known.first.min(began);
        known.last = known.last.max(event.time);
        Some(known.first)
    }
}

/// What changed last for the ends of an event before a moment.
pub fn last_change(index: &Index, event: &Event, first: Timestamp) -> Option<LastChange> {
    let pod = |end: &Endpoint| {
        let (namespace, name) = end.namespace.as_ref().zip(end.pod.as_ref())?;
        let pod = index.pod_named(namespace, name)?;
        Some((pod.clone(), index.namespace_labels(namespace)))
    };
    let ends = [pod(&event.source), pod(&event.destination)];
    let concerned: Vec<_> = ends
        .iter()
        .flatten()
        .map(|(pod, namespace_labels)| Concerned {
            pod,
            namespace_labels,
        })
        .collect();
    let until = first.checked_add(SLACK).unwrap_or(first);
    let mut change = index.changes().last_before(&concerned, until)?;
    let before = first.duration_since(change.time).as_secs_f64().max(0.0);
    change.seconds_before_first_drop = Some((before * 10.0).round() / 10.0);
    Some(change)
}
