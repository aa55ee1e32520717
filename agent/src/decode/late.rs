//! Answers that leave after their drop.
//!
//! A RST or ICMPv6 error whose neighbour has to be resolved first is sent after the packet it
//! answers was dropped: the programs counted that drop as untold, and the answer by its flow. Here
//! the two are brought together before a silent count is published, so that nothing has to be taken
//! back from a counter. Only what was dropped while some packet of this node waited for a neighbour
//! can have such an answer; everything else is published at once.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use whydrop_ebpf::{FlowCount, FlowKey, KIND_ANSWER};

/// A neighbour is asked three times, one second apart, then given up
/// (`mcast_solicit`, `retrans_time_ms`; include/net/neighbour.h).
pub const HOLD: Duration = Duration::from_millis(3_200);

/// Counts that wait at one time; past it they are published as silent at once. 100,000 of them are
/// 16 MiB, and more flows than two generations of the default map hold.
const MAX_HELD: usize = 100_000;

/// A flow as an answer names it: without reason, place and device.
type AnsweredFlow = ([u8; 16], [u8; 16], u8, u16);

fn answered_flow(key: &FlowKey) -> AnsweredFlow {
    (
        key.source,
        key.destination,
        key.protocol,
        key.destination_port,
    )
}

/// Packets of one flow that are ready to be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    /// Their flow.
    pub key: FlowKey,
    /// Nobody was told of these.
    pub untold: u64,
    /// The sender was told of these.
    pub told: u64,
    /// When the generation that counted them ended.
    pub until: Timestamp,
}

#[derive(Debug)]
struct Held {
    key: FlowKey,
    untold: u64,
    counted: Instant,
    until: Timestamp,
}

/// Answers that have not met their drop.
#[derive(Debug, Default)]
struct Balance {
    /// Answers seen, less drops that were told by one.
    now: i64,
    /// The same at the generation before: an answer and its drop can fall on two sides of a flip.
    before: i64,
    used: Option<Instant>,
}

/// What waits.
#[derive(Debug, Default)]
pub struct Late {
    held: Vec<Held>,
    answers: HashMap<AnsweredFlow, Balance>,
    neighbour_waits: u64,
    resolving_until: Option<Instant>,
    /// Without the neighbour tracepoint it is never known whether one is awaited.
    always: bool,
}

impl Late {
    /// `knows_neighbours`: waiting for a neighbour is observed.
    pub fn new(knows_neighbours: bool) -> Self {
        Self {
            always: !knows_neighbours,
            ..Self::default()
        }
    }

    /// Whether anything waits, so that [`Self::settle`] has to be called again soon.
    pub fn is_waiting(&self) -> bool {
        !self.held.is_empty()
    }

    /// Takes a generation's counts and returns all that can be published now.
    ///
    /// `neighbour_waits` is the programs' running count of packets that wait for a neighbour.
    pub fn settle(
        &mut self,
        flows: &[(FlowKey, FlowCount)],
        neighbour_waits: u64,
        until: Timestamp,
        now: Instant,
    ) -> Vec<Settled> {
        if neighbour_waits != self.neighbour_waits {
            self.neighbour_waits = neighbour_waits;
            self.resolving_until = Some(now + HOLD);
        }
        let resolving = self.always || self.resolving_until.is_some_and(|t| now < t);
        for balance in self.answers.values_mut() {
            balance.before = balance.now;
        }
        let mut settled = Vec::with_capacity(flows.len());
        for (key, count) in flows {
            let seen = i64::from(count.told_seen);
            if seen > 0 {
                let balance = self.answers.entry(answered_flow(key)).or_default();
                balance.now += if key.kind == KIND_ANSWER { seen } else { -seen };
                balance.used = Some(now);
            }
            if key.kind == KIND_ANSWER {
                continue;
            }
            let told =
                (u64::from(count.told_named) + u64::from(count.told_seen)).min(count.packets);
            let mut ready = Settled {
                key: *key,
                untold: count.packets - told,
                told,
                until,
            };
            if ready.untold > 0
                && resolving
                && may_be_answered_late(key)
                && self.held.len() < MAX_HELD
            {
                self.held.push(Held {
                    key: *key,
                    untold: ready.untold,
                    counted: now,
                    until,
                });
                ready.untold = 0;
            }
            if ready.untold + ready.told > 0 {
                settled.push(ready);
            }
        }
        self.release(now, &mut settled);
        self.answers.retain(|_, b| {
            b.now != 0
                && b.used
                    .is_some_and(|used| now.duration_since(used) < 2 * HOLD)
                || b.before != b.now
        });
        settled
    }

    /// Everything that still waits, as it stands: at the end.
    pub fn finish(&mut self) -> Vec<Settled> {
        let mut settled = Vec::new();
        for balance in self.answers.values_mut() {
            balance.before = balance.now;
        }
        for held in std::mem::take(&mut self.held) {
            self.publish(held, &mut settled);
        }
        settled
    }

    fn release(&mut self, now: Instant, settled: &mut Vec<Settled>) {
        let (ready, waiting) = std::mem::take(&mut self.held)
            .into_iter()
            .partition::<Vec<_>, _>(|held| now.duration_since(held.counted) >= HOLD);
        self.held = waiting;
        for held in ready {
            self.publish(held, settled);
        }
    }

    fn publish(&mut self, held: Held, settled: &mut Vec<Settled>) {
        let mut told = 0;
        if let Some(balance) = self.answers.get_mut(&answered_flow(&held.key)) {
            told = u64::try_from(balance.now.min(balance.before))
                .unwrap_or(0)
                .min(held.untold);
            let taken = i64::try_from(told).unwrap_or(0);
            balance.now -= taken;
            balance.before -= taken;
        }
        settled.push(Settled {
            key: held.key,
            untold: held.untold - told,
            told,
            until: held.until,
        });
    }
}

/// `icmp_send` names its packet at once; RSTs and ICMPv6 errors can leave late.
fn may_be_answered_late(key: &FlowKey) -> bool {
    key.ip_version != 0 && (key.protocol == 6 || key.ip_version == 6)
}

#[cfg(test)]
mod tests {
    use whydrop_ebpf::{KIND_PACKET, KIND_SYN};

    use super::*;

    fn flow(last: u8) -> FlowKey {
        let mut key = FlowKey {
            ip_version: 4,
            protocol: 6,
            kind: KIND_SYN,
            destination_port: 80,
            reason: 12,
            ..FlowKey::default()
        };
        key.source[3] = last;
        key
    }

    fn answer(last: u8) -> FlowKey {
        FlowKey {
            kind: KIND_ANSWER,
            reason: 0,
            ..flow(last)
        }
    }

    fn count(packets: u64, told_seen: u32) -> FlowCount {
        FlowCount {
            packets,
            told_seen,
            ..FlowCount::default()
        }
    }

    fn sum(settled: &[Settled]) -> (u64, u64) {
        settled
            .iter()
            .fold((0, 0), |(u, t), s| (u + s.untold, t + s.told))
    }

    #[test]
    fn without_a_neighbour_to_wait_for_all_is_published_at_once() {
        let mut late = Late::new(true);
        let settled = late.settle(
            &[(flow(1), count(10, 3)), (answer(1), count(0, 3))],
            0,
            Timestamp::now(),
            Instant::now(),
        );
        assert_eq!(sum(&settled), (7, 3));
        assert!(!late.is_waiting());
    }

    #[test]
    fn a_late_answer_finds_its_drop() {
        let mut late = Late::new(true);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let now = Timestamp::now();
        assert_eq!(
            sum(&late.settle(
                &[(flow(1), count(200, 0)), (flow(2), count(5, 0))],
                1,
                now,
                at(0)
            )),
            (0, 0)
        );
        assert!(late.is_waiting());
        assert_eq!(
            sum(&late.settle(&[(answer(1), count(0, 198))], 1, now, at(1_200))),
            (0, 0)
        );
        let settled = late.settle(&[], 1, now, at(3_300));
        // 198 of the first flow were told; its other two and the second flow were not.
        assert_eq!(sum(&settled), (7, 198));
        assert!(!late.is_waiting());
    }

    #[test]
    fn an_answer_before_its_drop_is_not_spent_twice() {
        let mut late = Late::new(true);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let now = Timestamp::now();
        // Ten silent ones wait; meanwhile answers and their drops are split by a flip.
        late.settle(&[(flow(1), count(10, 0))], 1, now, at(0));
        late.settle(&[(answer(1), count(0, 4))], 1, now, at(3_100));
        let settled = late.settle(&[(flow(1), count(4, 4))], 1, now, at(3_300));
        assert_eq!(sum(&settled), (10, 4));
    }

    #[test]
    fn udp_over_ipv4_never_waits_and_the_end_publishes_everything() {
        let mut late = Late::new(false);
        let udp = FlowKey {
            protocol: 17,
            kind: KIND_PACKET,
            ..flow(1)
        };
        let now = Timestamp::now();
        assert_eq!(
            sum(&late.settle(
                &[(udp, count(3, 0)), (flow(1), count(5, 0))],
                0,
                now,
                Instant::now()
            )),
            (3, 0)
        );
        late.settle(&[(answer(1), count(0, 2))], 0, now, Instant::now());
        assert_eq!(sum(&late.finish()), (3, 2));
        assert!(!late.is_waiting());
    }
}
