//! Every metric, in one place, as OpenMetrics text.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use whydrop_ebpf::attempt::LATENCY_BUCKETS_NS;

use crate::event::Outcome;
use crate::record::listen::{Listener, Lost};
use crate::record::{End, Pair, Series, Snapshot};
use crate::senders::{ConnectResult, Counts, Sender, rcode_name};
use crate::source::conntrack;
use crate::state::State;
use crate::sync::lock;

mod own;
mod policies;

/// The text of a scrape; empty if it cannot be encoded, which is logged.
pub fn encode(state: &Arc<State>) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Metrics(state.clone())));
    // A line has some 350 bytes; without room from the start the text is moved a dozen times.
    let lines = lock(&state.record).series_count();
    let mut text = String::with_capacity(16 * 1024 + 400 * lines);
    if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &registry) {
        tracing::error!(%error, "cannot encode the metrics");
    }
    text
}

#[derive(Debug)]
struct Metrics(Arc<State>);

type Labels<'a> = Vec<(&'static str, Cow<'a, str>)>;

/// What a metric is called and what it means.
type Named = (&'static str, &'static str);

fn counters<'v>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): Named,
    rows: impl IntoIterator<Item = (Labels<'v>, u64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in rows {
        each(&mut metric, &labels, |m| {
            m.encode_counter::<NoLabelSet, _, u64>(&value, None)
        })?;
    }
    Ok(())
}

fn gauges<'v>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): Named,
    rows: impl IntoIterator<Item = (Labels<'v>, u64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in rows {
        each(&mut metric, &labels, |m| m.encode_gauge(&value))?;
    }
    Ok(())
}

fn each(
    metric: &mut MetricEncoder<'_>,
    labels: &Labels<'_>,
    encode: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    if labels.is_empty() {
        encode(metric)
    } else {
        encode(&mut metric.encode_family(labels)?)
    }
}

fn one<'v>(label: &'static str, value: impl Into<Cow<'v, str>>) -> Labels<'v> {
    vec![(label, value.into())]
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let state = &*self.0;
        let snapshot = lock(&state.record).snapshot();
        let (listeners, listen_overflow) = {
            let listen_drops = lock(&state.listen_drops);
            (listen_drops.snapshot(), listen_drops.overflow())
        };
        let (senders, senders_overflow) = {
            let senders = lock(&state.senders);
            (senders.snapshot(), senders.overflow())
        };
        let other_overflow = listen_overflow + senders_overflow;
        drops(&mut encoder, &snapshot, other_overflow)?;
        listen_drops(&mut encoder, &listeners)?;
        attempts(&mut encoder, &senders)?;
        conntrack_table(&mut encoder)?;
        own::losses(&mut encoder, state)?;
        policies::encode(&mut encoder, state)?;
        own::sources(&mut encoder, &lock(&state.status))?;
        gauges(
            &mut encoder,
            (
                "whydrop_observing_since_timestamp_seconds",
                "Since when this agent sees drops: what was dropped before is in no counter of it",
            ),
            state
                .observing_since
                .get()
                .map(|since| (Vec::new(), since.as_second().unsigned_abs())),
        )?;
        gauges(
            &mut encoder,
            ("whydrop_index_objects", "Kubernetes objects known, by kind"),
            state
                .index()
                .counts()
                .map(|(kind, n)| (one("kind", kind), n as u64)),
        )?;
        let mut info = encoder.encode_descriptor(
            "whydrop_build",
            "Version of whydrop and of the kernel it runs on",
            None,
            MetricType::Info,
        )?;
        info.encode_info(&vec![
            ("version", Cow::from(env!("CARGO_PKG_VERSION"))),
            ("kernel", Cow::from(&*state.kernel)),
        ])
    }
}

/// What was dropped. `other_overflow` is what the other counters had no series for.
fn drops(
    encoder: &mut DescriptorEncoder<'_>,
    record: &Snapshot,
    other_overflow: u64,
) -> fmt::Result {
    for (outcome, named) in [
        (
            Outcome::Dropped,
            (
                "whydrop_silent_drops",
                "Packets dropped on this node without telling the sender",
            ),
        ),
        (
            Outcome::Rejected,
            (
                "whydrop_rejected_packets",
                "Packets dropped on this node whose sender was told by RST, ICMP or its own call",
            ),
        ),
    ] {
        let rows = record
            .series
            .iter()
            .filter(|(series, _)| series.outcome == outcome);
        counters(
            encoder,
            named,
            rows.map(|(series, packets)| (pair_labels(series, "reason"), *packets)),
        )?;
    }
    let rows = record
        .series
        .iter()
        .filter(|(series, _)| series.outcome == Outcome::Unanswered);
    counters(
        encoder,
        (
            "whydrop_unanswered",
            "Connection attempts and DNS queries that got no answer in time",
        ),
        rows.map(|(series, attempts)| (pair_labels(series, "cause"), *attempts)),
    )?;
    counters(
        encoder,
        (
            "whydrop_node_drops",
            "Every packet that the kernel's kfree_skb tracepoint reported on this node",
        ),
        record.node_drops.iter().map(|(reason, fate, packets)| {
            (
                vec![
                    ("reason", (&**reason).into()),
                    ("outcome", fate.as_str().into()),
                ],
                *packets,
            )
        }),
    )?;
    gauges(
        encoder,
        ("whydrop_series", "Series of pairs"),
        [(Vec::new(), record.series.len() as u64)],
    )?;
    counters(
        encoder,
        (
            "whydrop_series_overflow",
            "Packets, attempts and lost connections counted under __other__ because --max-series was \
             reached",
        ),
        [(Vec::new(), record.overflow_packets + other_overflow)],
    )?;
    counters(
        encoder,
        (
            "whydrop_series_expired_packets",
            "Packets of series that went away with their pods: what the sum of the series lacks \
             to whydrop_node_drops_total",
        ),
        [Outcome::Dropped, Outcome::Rejected].map(|outcome| {
            (
                one("outcome", outcome.as_str()),
                record.expired_packets.get(&outcome).copied().unwrap_or(0),
            )
        }),
    )
}

/// What no drop shows: connections lost to full accept queues.
fn listen_drops(
    encoder: &mut DescriptorEncoder<'_>,
    listeners: &[(Listener, Lost)],
) -> fmt::Result {
    let rows = listeners.iter().flat_map(|(listener, lost)| {
        let names = match listener {
            Listener::Known {
                namespace,
                pod,
                workload,
            } => [namespace, pod, workload].map(text),
            Listener::Other => ["__other__"; 3].map(Cow::from),
        };
        lost.stats().map(|(stat, value)| {
            let names = ["namespace", "pod", "workload"]
                .into_iter()
                .zip(names.clone());
            let mut labels: Labels<'_> = names.collect();
            labels.push(("stat", stat.into()));
            (labels, value)
        })
    });
    counters(
        encoder,
        (
            "whydrop_listen_drops",
            "Connections lost to a full accept queue, which no drop shows: the kernel's \
             ListenOverflows and ListenDrops of each pod's network namespace; without names those \
             of the node's own, and of pods that are not known",
        ),
        rows,
    )
}

/// What became of connects and DNS queries, by who made them.
fn attempts(encoder: &mut DescriptorEncoder<'_>, senders: &[(Sender, Counts)]) -> fmt::Result {
    let results = [
        ConnectResult::Established,
        ConnectResult::Refused,
        ConnectResult::Unanswered,
        ConnectResult::Abandoned,
    ];
    let connects = senders.iter().flat_map(|(sender, counts)| {
        results.into_iter().filter_map(move |result| {
            let count = counts.connects[result as usize];
            let labels = || with(sender, "result", result.as_str());
            (count != 0).then(|| (labels(), count))
        })
    });
    counters(
        encoder,
        ("whydrop_connects", "TCP connects by what became of them"),
        connects,
    )?;
    let with_dns = || senders.iter().filter(|(_, counts)| counts.queries != 0);
    counters(
        encoder,
        ("whydrop_dns_queries", "DNS queries sent, resent ones once"),
        with_dns().map(|(sender, counts)| (sender_labels(sender), counts.queries)),
    )?;
    let responses = senders.iter().flat_map(|(sender, counts)| {
        (0u8..)
            .zip(counts.responses)
            .filter(|(_, count)| *count != 0)
            .map(move |(rcode, count)| (with(sender, "rcode", rcode_name(rcode)), count))
    });
    counters(
        encoder,
        (
            "whydrop_dns_responses",
            "DNS queries answered, by response code",
        ),
        responses,
    )?;
    let mut latency = encoder.encode_descriptor(
        "whydrop_dns_latency_seconds",
        "Time from a DNS query to its answer",
        None,
        MetricType::Histogram,
    )?;
    for (sender, counts) in with_dns() {
        let bounds = LATENCY_BUCKETS_NS.map(|ns| Duration::from_nanos(ns).as_secs_f64());
        let bounds = bounds.into_iter().chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds.zip(counts.latency.buckets).collect();
        let sum = Duration::from_nanos(counts.latency.sum_ns).as_secs_f64();
        let count = counts.latency.buckets.iter().sum();
        each(&mut latency, &sender_labels(sender), |m| {
            m.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
        })?;
    }
    Ok(())
}

fn sender_labels(sender: &Sender) -> Labels<'_> {
    let (namespace, workload) = match sender {
        Sender::Other => ("__other__".into(), "__other__".into()),
        Sender::Named {
            namespace,
            workload,
        } => (text(namespace), text(workload)),
    };
    vec![
        ("source_namespace", namespace),
        ("source_workload", workload),
    ]
}

fn with<'s>(sender: &'s Sender, label: &'static str, value: impl Into<Cow<'s, str>>) -> Labels<'s> {
    let mut labels = sender_labels(sender);
    labels.push((label, value.into()));
    labels
}

/// The conntrack table of the node's own namespace. What the kernel does not show is absent.
fn conntrack_table(encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let stats = conntrack::stats(Path::new("/proc"));
    gauges(
        encoder,
        (
            "whydrop_conntrack_entries",
            "Entries in the node's conntrack table",
        ),
        stats.entries.map(|n| (Vec::new(), n)),
    )?;
    gauges(
        encoder,
        (
            "whydrop_conntrack_limit",
            "Entries that the node's conntrack table may have",
        ),
        stats.limit.map(|n| (Vec::new(), n)),
    )?;
    let rows = [
        ("drop", stats.drop),
        ("early_drop", stats.early_drop),
        ("insert_failed", stats.insert_failed),
        ("invalid", stats.invalid),
    ];
    counters(
        encoder,
        (
            "whydrop_conntrack_stat",
            "The kernel's own counters of the node's conntrack table",
        ),
        rows.into_iter()
            .filter_map(|(stat, n)| Some((one("stat", stat), n?))),
    )
}

/// The labels of CONTRACT in its order; empty where not known, `__other__` past the limits.
fn pair_labels<'s>(series: &'s Series, last: &'static str) -> Labels<'s> {
    let mut labels: Labels<'_> = Vec::with_capacity(15);
    match &*series.pair {
        Pair::Other => labels.extend(PAIR_LABELS.map(|name| (name, Cow::from("__other__")))),
        Pair::Ends {
            source,
            destination,
            service,
            port,
            protocol,
        } => {
            let ends = [source, destination].into_iter().flat_map(|end: &End| {
                [
                    Cow::from(end.kind.map_or("", |kind| kind.as_str())),
                    text(&end.namespace),
                    text(&end.pod),
                    text(&end.workload),
                    text(&end.node),
                ]
            });
            let rest = [
                service
                    .as_ref()
                    .map_or(Cow::from(""), |(ns, name)| format!("{ns}/{name}").into()),
                port.map_or(Cow::from(""), |port| port.to_string().into()),
                protocol.map_or(Cow::from(""), |protocol| protocol.to_string().into()),
            ];
            labels.extend(PAIR_LABELS.into_iter().zip(ends.chain(rest)));
        }
    }
    labels.push(("kind", series.kind.as_str().into()));
    labels.push((last, (&*series.reason).into()));
    labels
}

fn text(value: &Option<Arc<str>>) -> Cow<'_, str> {
    Cow::from(value.as_deref().unwrap_or(""))
}

const PAIR_LABELS: [&str; 13] = [
    "source_kind",
    "source_namespace",
    "source_pod",
    "source_workload",
    "source_node",
    "destination_kind",
    "destination_namespace",
    "destination_pod",
    "destination_workload",
    "destination_node",
    "destination_service",
    "destination_port",
    "protocol",
];
