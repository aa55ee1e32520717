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
use whydrop_ebpf::attempt::{
    RESULT_ABANDONED, RESULT_ESTABLISHED, RESULT_REFUSED, TALLY_CONNECT, TALLY_QUERY,
    TALLY_RESPONSE,
};
use whydrop_ebpf::{DropEvent, FlowCount, FlowKey, KIND_ANSWER, OverflowKey};

use crate::cluster::PodUid;
use crate::decode::attempt::Attempt;
use crate::decode::classify::Class;
use crate::decode::late::{Late, Settled};
use crate::decode::{self, Decoder, Flow};
use crate::enrich::{enrich, enrich_attempt, name_host_network_pod, pod_of_namespace};
use crate::event::{Cause, Endpoint, EndpointKind, Event, Kind, Line, Lost, LostStage, Outcome};
use crate::explain::Explainer;
use crate::held::Held;
use crate::recent::{Known, RecentDrops};
use crate::senders::{ConnectResult, What};
use crate::source::attempts::{Found, Unanswered};
use crate::source::conntrack::{LocalTuples, Tuple};
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

/// How long before the computed start of an attempt a drop may be its own: that start is a difference of
/// times that were read one after another.
const CLOCK_SLACK: Duration = Duration::from_millis(100);

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

    /// What nobody answered in time: decode, enrich, record, publish.
    pub fn unanswered(&mut self, found: &Found, wall: impl Fn(u64) -> Timestamp, now: Instant) {
        if let Some(error) = &found.error {
            self.state.errors.attempts.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%error, "unanswered attempts may be told late");
        }
        {
            let mut status = lock(&self.state.status);
            status.attempts = found.counts;
            status.doubtful_connects += found.doubtful;
        }
        for connect in &found.abandoned {
            let flow = self.decoder.connect(connect, found.boot_ns, &wall).flow;
            self.note_local(&flow, now);
        }
        for unanswered in &found.unanswered {
            let mut attempt = match unanswered {
                Unanswered::Connect(c) => self.decoder.connect(c, found.boot_ns, &wall),
                Unanswered::Query(key, query) => {
                    self.decoder.query(key, query, found.boot_ns, &wall)
                }
            };
            self.note_local(&attempt.flow, now);
            // A packet that was dropped here has told where it went.
            if attempt.drop.is_none()
                && let Some(real) = (self.conntrack.destination)(&attempt.flow)
            {
                attempt.flow = attempt.flow.translated_to(real);
            }
            self.attempt(attempt, wall(found.boot_ns), true, now);
        }
    }

    /// What conntrack found: attempts whose sender is no socket of this kernel.
    pub fn forwarded(&mut self, attempts: Vec<Attempt>, at: Timestamp, now: Instant) {
        for attempt in attempts {
            self.attempt(attempt, at, false, now);
        }
    }

    /// An attempt of a socket of this kernel: conntrack may have it as well.
    fn note_local(&self, flow: &Flow, now: Instant) {
        if let Some(tuple) = Tuple::asked(flow) {
            lock(&self.conntrack.local).insert(tuple, now);
        }
    }

    /// One attempt that nobody answered; `is_own` if it is one of a socket of this kernel, whose
    /// connects are counted by their result.
    fn attempt(&mut self, mut attempt: Attempt, at: Timestamp, is_own: bool, now: Instant) {
        let (cgroup, netns) = (attempt.cgroup.unwrap_or(0), attempt.netns.unwrap_or(0));
        let began = now.checked_sub(attempt.waited).unwrap_or(now);
        let mut is_forgotten = false;
        // One socket asks many queries: their drops the programs lay to each by its id.
        if attempt.drop.is_none() && !(is_own && attempt.kind == Kind::Dns) {
            // The clocks of both ends of this subtraction are read at different moments.
            let began = began.checked_sub(CLOCK_SLACK).unwrap_or(began);
            match self.recent.of(&attempt.flow, began) {
                Known::Dropped(site) => attempt.drop = Some(site),
                Known::Forgotten => is_forgotten = true,
                Known::Nothing => {}
            }
        }
        let mut event = enrich_attempt(attempt, at, &self.state.index(), &self.state.node);
        self.name_by_socket(&mut event.source, netns, cgroup, at);
        let does_not_know = is_forgotten || self.state.ready().is_err();
        if does_not_know && event.cause == Some(Cause::Elsewhere) {
            event.cause = None;
        }
        // Only a loopback is the sender's own; the cgroup is not its listener's.
        self.name_by_socket(&mut event.destination, netns, 0, at);
        // A full accept queue drops without a trace but its namespace's counter.
        if event.cause != Some(Cause::DroppedHere)
            && event.kind == Kind::Syn
            && let (Some(ip), Some(port)) = (event.destination.ip, event.destination.port)
            && self.state.accept_queues.overflowed_since(ip, netns, began)
            && self.state.accept_queues.has_backlog(ip, netns, port)
        {
            event.cause = Some(Cause::DroppedHere);
        }
        lock(&self.state.record).add_unanswered(&event, now);
        if is_own && event.kind == Kind::Syn {
            let what = What::Connect(ConnectResult::Unanswered);
            lock(&self.state.senders).add(&event.source, what, 1, 0, now);
        }
        self.publish(event, now);
    }

    /// Names what an address does not tell: a pod of the node's own network by the sender's cgroup, and
    /// whoever speaks over a loopback by its namespace.
    fn name_by_socket(&mut self, end: &mut Endpoint, netns: u32, cgroup: u64, at: Timestamp) {
        if end.ip.is_some_and(|ip| ip.is_loopback())
            && let Some(namespace) = self.state.accept_queues.namespaces().get(netns)
        {
            if namespace.host {
                end.kind = Some(EndpointKind::Node);
                end.node = Some(self.state.node.clone());
            } else {
                let index = self.state.index();
                let (uid, addresses) = (namespace.pod.as_ref(), &namespace.addresses);
                if let Some(pod) = pod_of_namespace(uid, addresses, &index, at) {
                    let (ip, port) = (end.ip, end.port);
                    *end = Endpoint { ip, port, ..pod };
                }
            }
        }
        if end.kind == Some(EndpointKind::Node)
            && cgroup != 0
            && let Some(uid) = (self.pod_of_cgroup)(cgroup)
        {
            name_host_network_pod(end, &uid, &self.state.index());
        }
    }

    /// What became of attempts in a generation, by who made them.
    fn record_tallies(&mut self, drained: &Drained, now: Instant) {
        for (key, tally) in &drained.tallies {
            let Some(what) = tallied(key.what, key.detail, key.bucket) else {
                continue;
            };
            let mut sender = Endpoint {
                ip: Some(decode::address(&key.source, key.ip_version)),
                ..Endpoint::default()
            };
            self.state.index().name(&mut sender, None, drained.until);
            self.name_by_socket(&mut sender, key.netns, key.cgroup, drained.until);
            let mut senders = lock(&self.state.senders);
            senders.add(&sender, what, tally.count, tally.sum_ns, now);
        }
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
            self.state.stream.publish(Arc::new(Line::Event(event)));
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

    /// What became of attempts for whose sender the kernel map had no room.
    fn record_other_senders(&self, totals: &Totals, before: &Totals, now: Instant) {
        let mut senders = lock(&self.state.senders);
        for (what, detail, tally) in &totals.tallies {
            let is_same = |(w, d, _): &&(u8, u8, _)| (w, d) == (what, detail);
            let old = before.tallies.iter().find(is_same);
            let old = old.map(|(_, _, tally)| *tally).unwrap_or_default();
            let count = tally.count.wrapping_sub(old.count);
            // Its bucket is not known: it counts in the last, which has no upper bound.
            if count != 0
                && let Some(what) = tallied(*what, *detail, u8::MAX)
            {
                senders.add_other(what, count, tally.sum_ns.wrapping_sub(old.sum_ns), now);
            }
        }
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

/// What a tally of the programs counts; `None` for what this agent does not know.
fn tallied(what: u8, detail: u8, bucket: u8) -> Option<What> {
    Some(match (what, detail) {
        (TALLY_CONNECT, RESULT_ESTABLISHED) => What::Connect(ConnectResult::Established),
        (TALLY_CONNECT, RESULT_REFUSED) => What::Connect(ConnectResult::Refused),
        (TALLY_CONNECT, RESULT_ABANDONED) => What::Connect(ConnectResult::Abandoned),
        (TALLY_QUERY, _) => What::Query,
        (TALLY_RESPONSE, rcode) => What::Response { rcode, bucket },
        _ => return None,
    })
}
