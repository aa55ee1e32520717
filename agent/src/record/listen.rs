//! Connections lost to full accept queues, by pod: bounded, and gone when their pods are.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Detail, Record};
use crate::event::Endpoint;

/// Who lost connections, as labels name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Listener {
    /// A pod. What is coarsened away or not known is absent; all is absent of the node's own
    /// namespace, and of a pod's that nobody knows.
    Known {
        /// Namespace of the pod.
        namespace: Option<Arc<str>>,
        /// The pod.
        pod: Option<Arc<str>>,
        /// What runs it.
        workload: Option<Arc<str>>,
    },
    /// What found no place: every label is `__other__`.
    Other,
}

/// What a listener lost, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// The kernel's `ListenOverflows`.
    pub overflows: u64,
    /// The kernel's `ListenDrops`.
    pub drops: u64,
}

impl Lost {
    /// The series of one listener.
    pub const STATS: usize = 2;

    /// Its series: the label `stat`, and the value.
    pub fn stats(self) -> [(&'static str, u64); Self::STATS] {
        [("overflows", self.overflows), ("drops", self.drops)]
    }

    fn add(&mut self, more: Self) {
        self.overflows += more.overflows;
        self.drops += more.drops;
    }
}

#[derive(Debug)]
struct Value {
    lost: Lost,
    last: Instant,
    /// Since when its pod is gone.
    gone: Option<Instant>,
}

/// The counters.
#[derive(Debug)]
pub struct ListenDrops {
    detail: Detail,
    max_listeners: usize,
    ttl: Duration,
    listeners: HashMap<Listener, Value>,
    overflow: u64,
}

impl ListenDrops {
    /// Empty counters with the limits of the pairs' counters: as many series beside `__other__`,
    /// named as finely, and kept as long.
    pub fn beside(pairs: &Record) -> Self {
        Self {
            detail: pairs.detail,
            max_listeners: pairs.max_series / Lost::STATS,
            ttl: pairs.ttl,
            listeners: HashMap::new(),
            overflow: 0,
        }
    }

    /// Counts what a pod lost; without one what the node's own namespace did, or a pod's that is
    /// not known.
    pub fn add(&mut self, pod: Option<&Endpoint>, lost: Lost, now: Instant) {
        let mut listener = match pod {
            None => Listener::Known {
                namespace: None,
                pod: None,
                workload: None,
            },
            Some(end) => Listener::Known {
                namespace: end.namespace.clone(),
                pod: end.pod.clone().filter(|_| self.detail == Detail::Pod),
                workload: end
                    .workload
                    .as_ref()
                    .filter(|_| self.detail != Detail::Namespace)
                    .map(|workload| workload.name.clone()),
            },
        };
        let named =
            self.listeners.len() - usize::from(self.listeners.contains_key(&Listener::Other));
        if !self.listeners.contains_key(&listener) && named >= self.max_listeners {
            self.overflow += lost.overflows + lost.drops;
            listener = Listener::Other;
        }
        let value = self.listeners.entry(listener).or_insert(Value {
            lost: Lost::default(),
            last: now,
            gone: None,
        });
        value.lost.add(lost);
        value.last = now;
    }

    /// Removes series whose time is over: of a pod that is gone, and, where pods are not named,
    /// after the last loss. `pod_exists` is asked for each named pod.
    pub fn expire(&mut self, now: Instant, pod_exists: impl Fn(&Arc<str>, &Arc<str>) -> bool) {
        let ttl = self.ttl;
        self.listeners.retain(|listener, value| {
            let Listener::Known { namespace, pod, .. } = listener else {
                return true;
            };
            let since = match (namespace, pod) {
                (Some(namespace), Some(pod)) if pod_exists(namespace, pod) => {
                    value.gone = None;
                    return true;
                }
                // A late loss of a pod that is gone starts its time anew.
                (Some(_), Some(_)) => *value.gone.insert(value.gone.unwrap_or(now).max(value.last)),
                _ => value.last,
            };
            now.duration_since(since) < ttl
        });
    }

    /// A copy of all counters, sorted by name.
    pub fn snapshot(&self) -> Vec<(Listener, Lost)> {
        let all = self.listeners.iter();
        let mut all: Vec<_> = all.map(|(l, value)| (l.clone(), value.lost)).collect();
        all.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        all
    }

    /// What was counted under `__other__` because there were too many series, both stats together.
    pub fn overflow(&self) -> u64 {
        self.overflow
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Workload;

    fn end(namespace: &str, pod: &str) -> Endpoint {
        Endpoint {
            namespace: Some(namespace.into()),
            pod: Some(pod.into()),
            workload: Some(Arc::new(Workload {
                kind: "Deployment".into(),
                name: "web".into(),
            })),
            ..Endpoint::default()
        }
    }

    fn counters(detail: Detail, max_series: usize) -> ListenDrops {
        ListenDrops::beside(&Record::new(detail, max_series, Duration::from_secs(900)))
    }

    fn lost(overflows: u64, drops: u64) -> Lost {
        Lost { overflows, drops }
    }

    /// `namespace/pod/workload` with what they lost.
    fn rows(counters: &ListenDrops) -> Vec<(String, u64, u64)> {
        let text = |part: &Option<Arc<str>>| part.as_deref().unwrap_or("").to_owned();
        let rows = counters.snapshot().into_iter();
        rows.map(|(listener, lost)| {
            let name = match &listener {
                Listener::Known {
                    namespace,
                    pod,
                    workload,
                } => [namespace, pod, workload].map(text).join("/"),
                Listener::Other => "other".to_owned(),
            };
            (name, lost.overflows, lost.drops)
        })
        .collect()
    }

    #[test]
    fn losses_add_up_by_pod_and_the_nodes_own_have_no_name() {
        let mut counters = counters(Detail::Pod, 100);
        let now = Instant::now();
        counters.add(Some(&end("shop", "a")), lost(2, 3), now);
        counters.add(Some(&end("shop", "b")), lost(1, 1), now);
        counters.add(Some(&end("shop", "a")), lost(0, 4), now);
        counters.add(None, lost(7, 8), now);
        assert_eq!(
            rows(&counters),
            [
                ("//".into(), 7, 8),
                ("shop/a/web".into(), 2, 7),
                ("shop/b/web".into(), 1, 1)
            ]
        );
        assert_eq!(lost(2, 7).stats(), [("overflows", 2), ("drops", 7)]);
    }

    #[test]
    fn names_are_as_coarse_as_asked_for() {
        for (detail, expected) in [
            (Detail::Workload, "shop//web"),
            (Detail::Namespace, "shop//"),
        ] {
            let mut counters = counters(detail, 100);
            counters.add(Some(&end("shop", "a")), lost(1, 1), Instant::now());
            counters.add(Some(&end("shop", "b")), lost(1, 2), Instant::now());
            assert_eq!(rows(&counters), [(expected.into(), 2, 3)]);
        }
    }

    #[test]
    fn past_the_limit_losses_are_others_and_the_sum_stays() {
        // Two series for each of two pods.
        let mut counters = counters(Detail::Pod, 4);
        let now = Instant::now();
        for pod in ["a", "b", "c", "d", "a"] {
            counters.add(Some(&end("shop", pod)), lost(1, 2), now);
        }
        assert_eq!(
            rows(&counters),
            [
                ("shop/a/web".into(), 2, 4),
                ("shop/b/web".into(), 1, 2),
                ("other".into(), 2, 4)
            ]
        );
        assert_eq!(counters.overflow(), 6);
    }

    #[test]
    fn a_series_goes_when_its_pod_has_been_gone_for_the_ttl() {
        let mut counters = counters(Detail::Pod, 2);
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        counters.add(Some(&end("shop", "a")), lost(1, 1), start);
        counters.expire(at(10_000), |_, _| true);
        assert_eq!(
            rows(&counters).len(),
            1,
            "a pod that is there keeps its series"
        );
        counters.expire(at(10_001), |_, _| false);
        // The last reading of its namespace, settled late.
        counters.add(Some(&end("shop", "a")), lost(1, 1), at(10_005));
        counters.expire(at(10_904), |_, _| false);
        assert_eq!(rows(&counters), [("shop/a/web".into(), 2, 2)]);
        counters.expire(at(10_905), |_, _| false);
        assert_eq!(rows(&counters), []);
        // Its place is free again.
        counters.add(Some(&end("shop", "b")), lost(1, 1), at(10_906));
        assert_eq!((rows(&counters).len(), counters.overflow()), (1, 0));
    }

    #[test]
    fn without_pods_a_series_goes_after_its_last_loss() {
        let mut counters = counters(Detail::Namespace, 10);
        let start = Instant::now();
        counters.add(Some(&end("shop", "a")), lost(1, 1), start);
        counters.add(None, lost(1, 1), start);
        counters.expire(start + Duration::from_secs(899), |_, _| false);
        assert_eq!(rows(&counters).len(), 2);
        counters.expire(start + Duration::from_secs(900), |_, _| false);
        assert_eq!(rows(&counters), []);
    }
}
