//! Counters by who sends: TCP connects by their result, DNS queries, answers and latencies.
//!
//! They are of workloads, so few; bounded all the same, and gone some time after their last pod.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use whydrop_ebpf::attempt::LATENCY_BUCKETS_NS;

use crate::event::Endpoint;
use crate::record::Detail;

/// What became of a TCP connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ConnectResult {
    /// Answered in time.
    Established,
    /// Refused by RST, by ICMP, or by the error of the call itself.
    Refused,
    /// Still waiting at the timeout, or ended in ETIMEDOUT.
    Unanswered,
    /// Given up before the timeout.
    Abandoned,
}

impl ConnectResult {
    /// The label's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::Refused => "refused",
            Self::Unanswered => "unanswered",
            Self::Abandoned => "abandoned",
        }
    }
}

/// What is counted of a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    /// A TCP connect ended, or was found to hang.
    Connect(ConnectResult),
    /// A DNS query was sent.
    Query,
    /// A DNS answer came: its response code, and the index of its latency's bucket.
    Response {
        /// RFC 1035, 4.1.1.
        rcode: u8,
        /// Index into [`LATENCY_BUCKETS_NS`]; its length for the last bucket.
        bucket: u8,
    },
}

/// Whose counters: the labels `source_namespace` and `source_workload`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sender {
    /// Empty where not known, or coarsened away.
    Named {
        /// Namespace of the pod.
        namespace: Option<Arc<str>>,
        /// What runs it.
        workload: Option<Arc<str>>,
    },
    /// What found no place: both labels are `__other__`.
    Other,
}

/// Latencies of DNS answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// Answers by bucket, the last without upper bound.
    pub buckets: [u64; LATENCY_BUCKETS_NS.len() + 1],
    /// Their sum in nanoseconds.
    pub sum_ns: u64,
}

/// What is counted of one sender.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connects by result.
    pub connects: [u64; 4],
    /// DNS queries.
    pub queries: u64,
    /// DNS answers by response code.
    pub responses: [u64; 16],
    /// Their latencies.
    pub latency: Latency,
}

#[derive(Debug)]
struct Value {
    counts: Counts,
    last: Instant,
    /// The last pod that was counted: while it exists, the series stays.
    pod: Option<(Arc<str>, Arc<str>)>,
}

/// All senders.
#[derive(Debug)]
pub struct Senders {
    detail: Detail,
    max: usize,
    ttl: Duration,
    values: HashMap<Sender, Value>,
    overflow: u64,
}

impl Senders {
    /// No sender yet; at most `max`, beside `__other__`.
    pub fn new(detail: Detail, max: usize, ttl: Duration) -> Self {
        Self {
            detail,
            max,
            ttl,
            values: HashMap::new(),
            overflow: 0,
        }
    }

    /// Adds `count` of what a sender did. It may wrap below zero: what was counted in another
    /// generation is taken back.
    pub fn add(&mut self, sender: &Endpoint, what: What, count: u64, sum_ns: u64, now: Instant) {
        let workload = sender.workload.as_ref().map(|w| w.name.clone());
        let key = Sender::Named {
            namespace: sender.namespace.clone(),
            workload: workload.filter(|_| self.detail != Detail::Namespace),
        };
        let pod = sender.namespace.clone().zip(sender.pod.clone());
        self.add_to(key, pod, what, count, sum_ns, now);
    }

    /// Counts for a sender that the kernel maps had no room for.
    pub fn add_other(&mut self, what: What, count: u64, sum_ns: u64, now: Instant) {
        self.add_to(Sender::Other, None, what, count, sum_ns, now);
    }

    fn add_to(
        &mut self,
        mut key: Sender,
        pod: Option<(Arc<str>, Arc<str>)>,
        what: What,
        count: u64,
        sum_ns: u64,
        now: Instant,
    ) {
        if self.values.len() >= self.max && !self.values.contains_key(&key) {
            self.overflow = self.overflow.wrapping_add(count);
            key = Sender::Other;
        }
        let value = self.values.entry(key).or_insert_with(|| Value {
            counts: Counts::default(),
            last: now,
            pod: None,
        });
        value.last = now;
        value.pod = pod.or(value.pod.take());
        let counts = &mut value.counts;
        let add = |to: &mut u64| *to = to.wrapping_add(count);
        match what {
            What::Connect(result) => add(&mut counts.connects[result as usize]),
            What::Query => add(&mut counts.queries),
            What::Response { rcode, bucket } => {
                add(&mut counts.responses[usize::from(rcode & 0xf)]);
                let buckets = &mut counts.latency.buckets;
                let last = buckets.len() - 1;
                add(&mut buckets[usize::from(bucket).min(last)]);
                counts.latency.sum_ns = counts.latency.sum_ns.wrapping_add(sum_ns);
            }
        }
    }

    /// Removes senders that have been silent for the time to live and whose last pod is gone.
    pub fn expire(&mut self, now: Instant, pod_exists: impl Fn(&Arc<str>, &Arc<str>) -> bool) {
        let ttl = self.ttl;
        self.values.retain(|key, value| {
            let exists = value
                .pod
                .as_ref()
                .is_some_and(|(ns, pod)| pod_exists(ns, pod));
            *key == Sender::Other || exists || now.duration_since(value.last) < ttl
        });
    }

    /// A copy at one moment, in a stable order.
    pub fn snapshot(&self) -> Vec<(Sender, Counts)> {
        let values = self.values.iter();
        let mut all: Vec<_> = values.map(|(k, v)| (k.clone(), v.counts.clone())).collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all
    }

    /// What was counted under `__other__` because there were too many senders.
    pub fn overflow(&self) -> u64 {
        self.overflow
    }
}

/// The name of a DNS response code (IANA, DNS RCODEs); `RCODE12` where it has none.
pub fn rcode_name(rcode: u8) -> std::borrow::Cow<'static, str> {
    const NAMES: [&str; 12] = [
        "NOERROR",
        "FORMERR",
        "SERVFAIL",
        "NXDOMAIN",
        "NOTIMP",
        "REFUSED",
        "YXDOMAIN",
        "YXRRSET",
        "NXRRSET",
        "NOTAUTH",
        "NOTZONE",
        "DSOTYPENI",
    ];
    match NAMES.get(usize::from(rcode)) {
        Some(name) => (*name).into(),
        None => format!("RCODE{rcode}").into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Workload;

    fn pod(workload: &str) -> Endpoint {
        Endpoint {
            namespace: Some("shop".into()),
            pod: Some(format!("{workload}-1").into()),
            workload: Some(Arc::new(Workload {
                kind: "Deployment".into(),
                name: workload.into(),
            })),
            ..Endpoint::default()
        }
    }

    fn senders(max: usize) -> Senders {
        Senders::new(Detail::Pod, max, Duration::from_secs(900))
    }

    const UNANSWERED: What = What::Connect(ConnectResult::Unanswered);

    #[test]
    fn each_result_has_a_counter_of_its_own() {
        let mut senders = senders(10);
        let now = Instant::now();
        senders.add(&pod("web"), UNANSWERED, 2, 0, now);
        senders.add(
            &pod("web"),
            What::Connect(ConnectResult::Established),
            5,
            0,
            now,
        );
        senders.add(&pod("web"), What::Query, 3, 0, now);
        let response = What::Response {
            rcode: 3,
            bucket: 1,
        };
        senders.add(&pod("web"), response, 2, 1_500_000, now);
        let all = senders.snapshot();
        let [(_, counts)] = &all[..] else {
            panic!("{all:?}")
        };
        assert_eq!(counts.connects, [5, 0, 2, 0]);
        assert_eq!((counts.queries, counts.responses[3]), (3, 2));
        assert_eq!(counts.latency.buckets[1], 2);
        assert_eq!(counts.latency.sum_ns, 1_500_000);
    }

    #[test]
    fn what_was_counted_can_be_taken_back() {
        let mut senders = senders(10);
        let now = Instant::now();
        let response = What::Response {
            rcode: 0,
            bucket: 0,
        };
        senders.add(&pod("web"), response, 1, 700, now);
        senders.add(&pod("web"), response, u64::MAX, 0u64.wrapping_sub(700), now);
        let (_, counts) = &senders.snapshot()[0];
        assert_eq!((counts.responses[0], counts.latency.sum_ns), (0, 0));
    }

    #[test]
    fn past_the_limit_senders_are_added_up_as_other() {
        let mut senders = senders(2);
        let now = Instant::now();
        for workload in ["a", "b", "c", "d", "a"] {
            senders.add(&pod(workload), UNANSWERED, 1, 0, now);
        }
        let all = senders.snapshot();
        let sum: u64 = all.iter().map(|(_, c)| c.connects[2]).sum();
        assert_eq!((all.len(), sum, senders.overflow()), (3, 5, 2));
        assert_eq!(all.last().expect("three").0, Sender::Other);
    }

    #[test]
    fn a_sender_goes_when_its_last_pod_is_gone_and_silent_for_the_ttl() {
        let mut senders = senders(10);
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        senders.add(&pod("web"), UNANSWERED, 1, 0, start);
        senders.expire(at(10_000), |_, _| true);
        assert_eq!(senders.snapshot().len(), 1);
        senders.expire(at(899), |_, _| false);
        assert_eq!(senders.snapshot().len(), 1);
        senders.expire(at(900), |_, _| false);
        assert_eq!(senders.snapshot().len(), 0);
    }

    #[test]
    fn response_codes_have_their_registered_names() {
        assert_eq!(rcode_name(0), "NOERROR");
        assert_eq!(rcode_name(3), "NXDOMAIN");
        assert_eq!(rcode_name(11), "DSOTYPENI");
        assert_eq!(rcode_name(12), "RCODE12");
    }
}
