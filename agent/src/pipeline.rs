//! The path of a drop: decode, enrich, record, publish.
//!
//! Two streams come from the kernel. *Counts* are exact and carry no detail; they alone make the
//! counters. *Events* carry detail and are limited; they alone make lines at once. What a
//! generation counted beyond its events is said in one line a second for each flow, so that the
//! packets of the lines add up to the counters.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use whydrop_ebpf::{DropEvent, FlowCount, FlowKey, KIND_ANSWER, OverflowKey};

use crate::cluster::PodUid;
use crate::decode::classify::Class;
use crate::decode::late::{Late, Settled};
use crate::decode::{self, Decoder, Flow};
use crate::enrich::enrich;
use crate::event::{Event, Kind, Line, Lost, LostStage, Outcome};
use crate::explain::Explainer;
use crate::held::Held;
use crate::recent::RecentDrops;
use crate::source::conntrack::LocalTuples;
use crate::source::drain::{Drained, Totals};
use crate::state::State;
use crate::sync::lock;

/// How often what events left out is said.
const SAY_EVERY: Duration = Duration::from_secs(1);
/// How often series are looked at for their end.
const EXPIRE_EVERY: Duration = Duration::from_secs(10);
/// Flows whose rest waits to be said; as many as two generations of the default map hold. Past it
/// the rest is said as lost at once.
const MAX_UNSAID: usize = 100_000;

/// Drops, and as many counts, that wait for the name of an end: some 5 MB each.
const MAX_HELD: usize = 10_000;

mod attempts;
mod waiting;

/// Reasons of packets that lost theirs: the program was already running, or no map had room.
const MISSED: &str = "__missed__";

/// Packets of a flow by what became of them.
#[derive(Clone, Copy, Debug, Default)]
struct Fates {
    dropped: u64,
    rejected: u64,
}

/// From a cgroup's id to the pod that it belongs to.
pub type PodOfCgroup = Box<dyn FnMut(u64) -> Option<PodUid> + Send>;

/// From a flow as its socket sees it to where its packets really go.
pub type RealDestination = Box<dyn FnMut(&Flow) -> Option<(IpAddr, u16)> + Send>;

/// What the pipeline has to do with conntrack.
pub struct Conntrack {
    /// Attempts of this kernel's sockets, which conntrack must not count as well.
    pub local: Arc<Mutex<LocalTuples>>,
    /// Where DNAT sends a connection.
    pub destination: RealDestination,
}

/// The stages with what they remember.
pub struct Pipeline {
    state: Arc<State>,
    decoder: Decoder,
    pod_of_cgroup: PodOfCgroup,
    conntrack: Conntrack,
    late: Late,
    recent: RecentDrops,
    /// Drops and counts with an end whose name is awaited.
    held_drops: Held<decode::Drop>,
    held_counts: Held<Settled>,
    explainer: Explainer,
    /// Packets that had an event of their own, by the generation that counts them; two or three.
    said: BTreeMap<u64, HashMap<FlowKey, Fates>>,
    unsaid: HashMap<FlowKey, (Fates, Timestamp)>,
    totals: Totals,
    last_said: Instant,
    last_expired: Instant,
}

impl Pipeline {
    /// `knows_neighbours`: see [`Late::new`].
    pub fn new(
        state: Arc<State>,
        decoder: Decoder,
        pod_of_cgroup: PodOfCgroup,
        conntrack: Conntrack,
        knows_neighbours: bool,
    ) -> Self {
        Self {
            explainer: Explainer::new(state.clone()),
            state,
            decoder,
            pod_of_cgroup,
            conntrack,
            late: Late::new(knows_neighbours),
            recent: RecentDrops::default(),
            held_drops: Held::new(MAX_HELD),
            held_counts: Held::new(MAX_HELD),
            said: BTreeMap::new(),
            unsaid: HashMap::new(),
            totals: Totals::default(),
            last_said: Instant::now(),
            last_expired: Instant::now(),
        }
    }

    /// An event: decode, enrich, publish. `wall` turns boot time into the time of day.
    pub fn event(&mut self, event: &DropEvent, wall: impl Fn(u64) -> Timestamp) {
        let Some(drop) = self.decoder.event(event, wall) else {
            return;
        };
        self.recent.note(&drop, Instant::now());
        let said = self.said.entry(event.generation).or_default();
        let said = said.entry(event.key).or_default();
        match drop.outcome {
            Outcome::Rejected => said.rejected += 1,
            Outcome::Dropped | Outcome::Unanswered => said.dropped += 1,
        }
        self.publish_or_hold(drop, Instant::now());
    }

    /// Explains an event and publishes it.
    fn publish(&mut self, mut event: Event, now: Instant) {
        event.explanation = self.explainer.explain(&event, now);
        self.state.stream.publish(Arc::new(Line::Event(event)));
    }

    /// A generation's counts: settle, decode, enrich, record. All its events must have been handed
    /// to [`Self::event`] before.
    pub fn counts(&mut self, drained: &Drained, now: Instant) {
        if let Some(error) = &drained.error {
            self.state.errors.drain.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%error, "counts may be late or incomplete");
        }
        self.say_rest_of(drained);
        let settled = self.late.settle(
            &drained.flows,
            drained.totals.cpu.neighbour_waits,
            drained.until,
            now,
        );
        for settled in settled {
            self.record_or_hold(settled, now);
        }
        self.record_tallies(drained, now);
        self.record_totals(&drained.totals, now);
    }

    /// What is due at this moment, whether or not something was dropped.
    pub fn tick(&mut self, now: Instant) {
        if self.late.is_waiting() {
            let waits = self.totals.cpu.neighbour_waits;
            for settled in self.late.settle(&[], waits, Timestamp::now(), now) {
                self.record_or_hold(settled, now);
            }
        }
        self.release(now);
        if now.duration_since(self.last_said) >= SAY_EVERY {
            self.last_said = now;
            self.say_unsaid(now);
        }
        if now.duration_since(self.last_expired) >= EXPIRE_EVERY {
            self.last_expired = now;
            self.decoder.forget_locations();
            let purged_at = Timestamp::now();
            {
                let mut index = self
                    .state
                    .index
                    .write()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                index.purge(purged_at);
            }
            let index = self.state.index();
            let pod_exists = |namespace: &_, pod: &_| index.pod_exists(namespace, pod);
            lock(&self.state.record).expire(now, pod_exists);
            lock(&self.state.senders).expire(now, pod_exists);
            lock(&self.state.listen_drops).expire(now, pod_exists);
        }
    }

    /// Answers that could not be kept until their drops are published.
    pub fn answers_ignored(&self) -> u64 {
        self.late.ignored()
    }

    /// The end: everything that waits is recorded and said.
    pub fn finish(&mut self) {
        for settled in self.late.finish() {
            self.record(&settled, Instant::now());
        }
        for drop in self.held_drops.finish() {
            let event = self.named(drop);
            self.publish(event, Instant::now());
        }
        for settled in self.held_counts.finish() {
            self.record(&settled, Instant::now());
        }
        // Nothing waits any more: this is the end.
        self.state.awaited.follow(false, false);
        self.say_unsaid(Instant::now());
    }

    fn named(&self, drop: decode::Drop) -> Event {
        enrich(drop, &self.state.index(), &self.state.node)
    }

    /// Counts to the pair, and to the node.
    fn record(&mut self, settled: &Settled, now: Instant) {
        let Settled {
            key,
            untold,
            told,
            until,
        } = *settled;
        let (dropped, rejected) = match self.decoder.class(&key) {
            Class::Benign => {
                let reason = self.label(key.reason, key.location);
                lock(&self.state.record).add_benign(reason, untold + told);
                return;
            }
            Class::Rejected => (0, untold + told),
            Class::Silent => (untold, told),
        };
        for (outcome, packets) in [(Outcome::Dropped, dropped), (Outcome::Rejected, rejected)] {
            if packets > 0 {
                let drop = self.decoder.counted(&key, outcome, packets, until);
                let mut event = self.named(drop);
                event.explanation = self.explainer.explain(&event, now);
                self.state.denials.add(&event);
                let reason = self.label(key.reason, key.location);
                lock(&self.state.record).add(&event, reason, now);
            }
        }
    }

    /// Counts that have no flow: benign by reason, past the map's room, or missed.
    fn record_totals(&mut self, totals: &Totals, now: Instant) {
        let before = std::mem::replace(&mut self.totals, totals.clone());
        let mut record = lock(&self.state.record);
        for (reason, packets) in &totals.benign {
            let old = before
                .benign
                .iter()
                .find(|(r, _)| r == reason)
                .map_or(0, |(_, p)| *p);
            if *packets > old
                && let Some(name) = self.decoder.reason(*reason)
            {
                record.add_benign(name, packets - old);
            }
        }
        drop(record);
        for (key, count) in &totals.overflow {
            let old = before
                .overflow
                .iter()
                .find(|(k, _)| k == key)
                .map(|(_, c)| *c);
            let old = old.unwrap_or_default();
            let untold = count.untold.saturating_sub(old.untold);
            let told = count.told.saturating_sub(old.told);
            self.record_overflow(key, untold, told, now);
        }
        self.record_other_senders(totals, &before, now);
        let missed = missed_drops(totals).saturating_sub(missed_drops(&before));
        let untold = totals.cpu.unplaced.saturating_sub(before.cpu.unplaced);
        let told = totals
            .cpu
            .unplaced_told
            .saturating_sub(before.cpu.unplaced_told);
        let mut record = lock(&self.state.record);
        for (outcome, packets) in [
            (Outcome::Dropped, untold + missed),
            (Outcome::Rejected, told),
        ] {
            if packets > 0 {
                record.add_other(outcome, Kind::Packet, Arc::from(MISSED), packets, now);
            }
        }
        drop(record);
        let lost = totals.cpu.overflow.saturating_sub(before.cpu.overflow) + missed;
        self.say_lost(lost, LostStage::Ring);
    }

    fn record_overflow(&mut self, key: &OverflowKey, untold: u64, told: u64, now: Instant) {
        if untold + told == 0 {
            return;
        }
        // Enough of a flow to classify it.
        let like = FlowKey {
            location: key.location,
            reason: key.reason,
            protocol: key.protocol,
            kind: key.kind,
            flags: key.flags,
            ip_version: key.ip_version,
            ..FlowKey::default()
        };
        let reason = self.label(key.reason, key.location);
        let class = self.decoder.class(&like);
        let mut record = lock(&self.state.record);
        let (dropped, rejected) = match class {
            Class::Benign => return record.add_benign(reason, untold + told),
            Class::Rejected => (0, untold + told),
            Class::Silent => (untold, told),
        };
        for (outcome, packets) in [(Outcome::Dropped, dropped), (Outcome::Rejected, rejected)] {
            if packets > 0 {
                record.add_other(
                    outcome,
                    decode::kind(key.kind),
                    reason.clone(),
                    packets,
                    now,
                );
            }
        }
    }

    /// The label `reason`: the kernel's name, before 5.17 the function in its place.
    fn label(&mut self, reason: u32, location: u32) -> Arc<str> {
        self.decoder
            .reason(reason)
            .or_else(|| self.decoder.location(location))
            .unwrap_or_else(|| Arc::from(""))
    }

    /// Lays a generation's counts beside its events, and keeps what no event told of.
    fn say_rest_of(&mut self, drained: &Drained) {
        let mut said = self.said.remove(&drained.generation).unwrap_or_default();
        let mut lost = 0;
        for (key, count) in &drained.flows {
            if key.kind == KIND_ANSWER {
                continue;
            }
            let Some(fates) = self.fates(key, count) else {
                continue;
            };
            let said = said.remove(key).unwrap_or_default();
            let rest = Fates {
                dropped: fates.dropped.saturating_sub(said.dropped),
                rejected: fates.rejected.saturating_sub(said.rejected),
            };
            let packets = rest.dropped + rest.rejected;
            if packets == 0 {
                continue;
            }
            if self.unsaid.len() >= MAX_UNSAID && !self.unsaid.contains_key(key) {
                lost += packets;
                continue;
            }
            let (unsaid, time) = self
                .unsaid
                .entry(*key)
                .or_insert((Fates::default(), drained.until));
            unsaid.dropped += rest.dropped;
            unsaid.rejected += rest.rejected;
            *time = drained.until;
        }
        self.say_lost(lost, LostStage::Queue);
    }

    /// What became of a count; `None` if it was no loss.
    fn fates(&mut self, key: &FlowKey, count: &FlowCount) -> Option<Fates> {
        let told = u64::from(count.told).min(count.packets);
        match self.decoder.class(key) {
            Class::Benign => None,
            Class::Rejected => Some(Fates {
                dropped: 0,
                rejected: count.packets,
            }),
            Class::Silent => Some(Fates {
                dropped: count.packets - told,
                rejected: told,
            }),
        }
    }

    fn say_unsaid(&mut self, now: Instant) {
        for (key, (fates, time)) in std::mem::take(&mut self.unsaid) {
            for (outcome, packets) in [
                (Outcome::Dropped, fates.dropped),
                (Outcome::Rejected, fates.rejected),
            ] {
                if packets > 0 {
                    let drop = self.decoder.counted(&key, outcome, packets, time);
                    self.publish_or_hold(drop, now);
                }
            }
        }
    }

    fn say_lost(&self, lost: u64, stage: LostStage) {
        if lost > 0 {
            let node = self.state.node.clone();
            self.state
                .stream
                .publish(Arc::new(Line::Lost(Lost { lost, stage, node })));
        }
    }
}

/// Runs of the drop program that the kernel skipped.
pub fn missed_drops(totals: &Totals) -> u64 {
    let drop_programs = totals
        .programs
        .iter()
        .filter(|p| p.name.starts_with("kfree_skb"));
    totals.cpu.missed + drop_programs.map(|p| p.missed).sum::<u64>()
}
