//! The path of what got no answer: which drop was its own, who made it, and what became of all attempts.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use whydrop_ebpf::attempt::{
    RESULT_ABANDONED, RESULT_ESTABLISHED, RESULT_REFUSED, TALLY_CONNECT, TALLY_QUERY,
    TALLY_RESPONSE,
};

use super::Pipeline;
use crate::decode::attempt::Attempt;
use crate::decode::{self, Flow};
use crate::enrich::{enrich_attempt, name_host_network_pod, pod_of_namespace};
use crate::event::{Cause, Endpoint, EndpointKind, Kind};
use crate::recent::Known;
use crate::senders::{ConnectResult, What};
use crate::source::attempts::{Found, Unanswered};
use crate::source::conntrack::Tuple;
use crate::source::drain::{Drained, Totals};
use crate::sync::lock;

/// How long before the computed start of an attempt a drop may be its own: that start is a difference of
/// times that were read one after another.
const CLOCK_SLACK: Duration = Duration::from_millis(100);

impl Pipeline {
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
    pub(super) fn record_tallies(&mut self, drained: &Drained, now: Instant) {
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

    /// What became of attempts for whose sender the kernel map had no room.
    pub(super) fn record_other_senders(&self, totals: &Totals, before: &Totals, now: Instant) {
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
