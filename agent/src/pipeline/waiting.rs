//! What waits for the name of an end before it is told and counted. See [`crate::awaited`].

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Pipeline;
use crate::decode;
use crate::decode::classify::Class;
use crate::decode::late::Settled;
use crate::event::{Endpoint, Event, Outcome};
use crate::held::Held;

impl Pipeline {
    /// Publishes a drop, or lets it wait for a name.
    pub(super) fn publish_or_hold(&mut self, drop: decode::Drop, now: Instant) {
        let event = self.named(drop.clone());
        if self.awaits(&event, now) {
            let Some(_) = self.held_drops.hold(drop, now) else {
                return;
            };
            self.state
                .awaited
                .totals
                .full
                .fetch_add(1, Ordering::Relaxed);
        }
        self.publish(event, now);
    }

    /// Whether an end may get a name in a moment.
    fn awaits(&self, event: &Event, now: Instant) -> bool {
        let knows_ranges = self.state.index().knows_pod_ranges();
        let awaits = |end| self.state.awaited.awaits(end, knows_ranges, now);
        // Both are asked for at once.
        let (source, destination) = (awaits(&event.source), awaits(&event.destination));
        source || destination
    }

    /// Tells what waited for a name and has one now, or waited long enough.
    pub(super) fn release(&mut self, now: Instant) {
        let mut held = std::mem::replace(&mut self.held_drops, Held::new(0));
        let ready = held.ready(now, |drop| !self.awaits(&self.named(drop.clone()), now));
        self.held_drops = held;
        for (drop, _) in ready {
            let event = self.named(drop);
            self.note_wait(&event);
            self.publish(event, now);
        }
        let mut held = std::mem::replace(&mut self.held_counts, Held::new(0));
        let ready = held.ready(now, |settled| !self.counts_await(settled, now));
        self.held_counts = held;
        for (settled, _) in ready {
            self.record(&settled, now);
        }
    }

    /// Counts what waiting for a name came to.
    fn note_wait(&self, event: &Event) {
        let knows_ranges = self.state.index().knows_pod_ranges();
        let awaited = &self.state.awaited;
        // The other end may be one that nobody expects a name of.
        let is_nameless = |end: &Endpoint| awaited.may_be_a_pods(end, knows_ranges);
        let totals = &awaited.totals;
        match is_nameless(&event.source) || is_nameless(&event.destination) {
            true => totals.unnamed.fetch_add(1, Ordering::Relaxed),
            false => totals.named.fetch_add(1, Ordering::Relaxed),
        };
    }

    fn counts_await(&mut self, settled: &Settled, now: Instant) -> bool {
        let drop = self
            .decoder
            .counted(&settled.key, Outcome::Dropped, 1, settled.until);
        self.awaits(&self.named(drop), now)
    }

    /// Counts at once, or once an end has the name that is awaited.
    pub(super) fn record_or_hold(&mut self, settled: Settled, now: Instant) {
        // Naming what has its names twice is not free.
        let may_wait =
            self.state.awaited.follows() && self.decoder.class(&settled.key) != Class::Benign;
        let settled = match may_wait && self.counts_await(&settled, now) {
            true => self.held_counts.hold(settled, now),
            false => Some(settled),
        };
        if let Some(settled) = settled {
            self.record(&settled, now);
        }
    }
}
