//! The index against the rules in their plainest form, over random histories.

use std::collections::HashMap;

use proptest::prelude::*;

use super::tests::{at, pod, pod_at, upsert};
use super::*;

/// One step of a random cluster of four pods on three addresses.
#[derive(Clone, Debug)]
enum Step {
    Upsert {
        pod: usize,
        ips: Vec<usize>,
        started_ago: Option<i64>,
        ended: bool,
    },
    Delete {
        pod: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let upsert = (
        0..4_usize,
        prop::collection::btree_set(0..3_usize, 0..3),
        prop::option::of(-5..40_i64),
        prop::bool::weighted(0.15),
    );
    prop_oneof![
        3 => upsert.prop_map(|(pod, ips, started_ago, ended)| Step::Upsert {
            pod, ips: ips.into_iter().collect(), started_ago, ended,
        }),
        1 => (0..4_usize).prop_map(|pod| Step::Delete { pod }),
    ]
}

/// The rules in the plainest form: for each pod and address the times at which it began and
/// ended, in a list that is searched from end to end.
#[derive(Default)]
struct Oracle {
    claims: Vec<(usize, usize, i64, Option<i64>)>,
    /// Start, addresses, and whether it ended.
    alive: HashMap<usize, (Option<i64>, Vec<usize>, bool)>,
}

impl Oracle {
    fn step(&mut self, step: &Step, now: i64) {
        let (pod, new) = match step {
            Step::Upsert {
                pod,
                ips,
                started_ago,
                ended,
            } => {
                let started = started_ago.map(|ago| now - ago);
                (*pod, Some((started, ips.clone(), *ended)))
            }
            Step::Delete { pod } => (*pod, None),
        };
        let old = self.alive.remove(&pod);
        let same = matches!((&old, &new), (Some(old), Some(new)) if old.0 == new.0);
        let has = |state: &Option<(Option<i64>, Vec<usize>, bool)>, ip| {
            state
                .as_ref()
                .is_some_and(|(_, ips, ended)| !ended && ips.contains(&ip))
        };
        if let (Some((_, before, false)), Some((started, ips, true))) = (&old, &new)
            && same
            && before.is_empty()
        {
            let from = started.unwrap_or(now).min(now);
            let held = ips.iter().map(|ip| (pod, *ip, from, Some(now)));
            self.claims.extend(held);
        }
        for ip in 0..3 {
            let keeps = same && has(&old, ip) && has(&new, ip);
            if has(&old, ip) && !keeps {
                let claim = self.claims.iter_mut();
                let mut claim = claim.filter(|c| (c.0, c.1, c.3) == (pod, ip, None));
                claim.next().unwrap().3 = Some(now);
            }
            if has(&new, ip) && !keeps {
                let started = new.as_ref().and_then(|(started, ..)| *started);
                self.claims
                    .push((pod, ip, started.unwrap_or(now).min(now), None));
            }
        }
        if let Some(new) = new {
            self.alive.insert(pod, new);
        }
    }

    fn holder(&self, ip: usize, t: i64) -> Option<usize> {
        let holds = |c: &&(usize, usize, i64, Option<i64>)| {
            c.1 == ip && c.2 <= t && c.3.is_none_or(|to| t < to)
        };
        // `max_by_key` gives the last of equals: the one that came last.
        self.claims
            .iter()
            .filter(holds)
            .max_by_key(|c| c.2)
            .map(|c| c.0)
    }
}

proptest! {
    #[test]
    fn any_history_agrees_with_the_plain_rules(
        steps in prop::collection::vec((0..8_i64, step()), 1..40),
        purge in any::<bool>(),
    ) {
        let (mut index, mut oracle, mut now) = (Index::default(), Oracle::default(), 0);
        for (pause, step) in &steps {
            now += pause;
            oracle.step(step, now);
            let change = match step {
                Step::Upsert { pod: n, ips, started_ago, ended } => {
                    let ips: Vec<_> = ips.iter().map(|ip| format!("10.0.0.{ip}")).collect();
                    let ips: Vec<&str> = ips.iter().map(String::as_str).collect();
                    let mut pod = pod(&n.to_string(), &ips, started_ago.map(|ago| at(now - ago)));
                    pod.ended = *ended;
                    upsert(pod)
                }
                Step::Delete { pod: n } => Change::Delete(pod(&n.to_string(), &[], None).key),
            };
            index.apply(change, at(now));
        }
        if purge {
            // No step is as old as a tombstone may get: purging must not change any answer.
            index.purge(at(now));
        }
        for t in -45..=now + 1 {
            for ip in 0..3 {
                let found = pod_at(&index, &format!("10.0.0.{ip}"), at(t));
                let expected = oracle.holder(ip, t).map(|pod| pod.to_string());
                prop_assert_eq!(found, expected, "10.0.0.{} at {}", ip, t);
            }
        }
        // Long after, what is left are the living.
        index.purge(at(now + 601));
        prop_assert_eq!(index.tombstones().kept, 0);
        for ip in 0..3 {
            let found = pod_at(&index, &format!("10.0.0.{ip}"), at(now + 601));
            prop_assert_eq!(found, oracle.holder(ip, now + 601).map(|pod| pod.to_string()));
        }
    }
}
