//! What whydrop tells of itself: what it lost, what failed, what works and what that costs.

use std::fmt;
use std::sync::atomic::Ordering;

use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::{counters, each, gauges, one};
use crate::cluster::watch;
use crate::event::LostStage;
use crate::state::{State, Status};
use crate::sync::lock;

/// What is missing from detail, and what went wrong.
pub(super) fn losses(encoder: &mut DescriptorEncoder<'_>, state: &State) -> fmt::Result {
    let status = lock(&state.status);
    let lost = [
        ("map", status.overflow_packets),
        ("recursion", status.missed),
        ("ring", status.ring_full),
        ("answer", status.answers_lost),
        ("connects", status.lost_connects()),
        ("dns", status.attempts.queries_lost),
        ("conntrack", status.lost_forwarded()),
        ("queue", state.stream.lost(LostStage::Queue)),
        ("reader", state.stream.lost(LostStage::Reader)),
    ];
    counters(
        encoder,
        (
            "whydrop_events_lost",
            "What was not kept in detail: map (packets counted without their pair), recursion \
             (packets counted without their reason), ring and queue (events whose packets are \
             counted), answer (answers that could not be laid to a late drop), connects, dns and conntrack (attempts \
             that were not followed because too many waited), reader (packets \
             in lines that a slow reader of the stream did not get)",
        ),
        lost.into_iter().map(|(stage, n)| (one("stage", stage), n)),
    )?;
    counters(
        encoder,
        (
            "whydrop_events_limited",
            "Packets without an event of their own because of the limit of their flow or CPU; they \
             are counted, and the stream adds them up in a line a second",
        ),
        [("flow", status.limited_flow), ("cpu", status.limited_cpu)]
            .map(|(limit, n)| (one("limit", limit), n)),
    )?;
    counters(
        encoder,
        (
            "whydrop_watch_errors",
            "Lists and watches of the API server that failed, by kind of object; each is tried again",
        ),
        watch::KINDS.map(|kind| {
            let failed = state.errors.watch[kind as usize].load(Ordering::Relaxed);
            (one("kind", kind.plural()), failed)
        }),
    )?;
    counters(
        encoder,
        (
            "whydrop_lookups",
            "Pods of other nodes that were asked for by their address, by result",
        ),
        state
            .lookups
            .counts(state.awaited.totals.unasked.load(Ordering::Relaxed))
            .map(|(result, n)| (one("result", result), n)),
    )?;
    counters(
        encoder,
        (
            "whydrop_name_waits",
            "Events and counts that waited for the name of an address, by result; full: without room to wait",
        ),
        state
            .awaited
            .totals
            .counts()
            .map(|(result, n)| (one("result", result), n)),
    )?;
    counters(
        encoder,
        (
            "whydrop_kube_events",
            "Kubernetes Events about silent drops, by result; limited: lines of the stream of which none tells",
        ),
        state
            .kube_events
            .counts()
            .map(|(result, n)| (one("result", result), n)),
    )?;
    counters(
        encoder,
        ("whydrop_errors", "What could not be read or done, by stage"),
        state
            .errors
            .counts()
            .into_iter()
            .chain([("conntrack", status.conntrack.errors)])
            .map(|(stage, n)| (one("stage", stage), n)),
    )
}

/// What works, and what it costs.
pub(super) fn sources(encoder: &mut DescriptorEncoder<'_>, status: &Status) -> fmt::Result {
    gauges(
        encoder,
        (
            "whydrop_source_up",
            "1 if this source of observations works",
        ),
        status
            .sources
            .iter()
            .map(|s| (one("source", s.source), u64::from(s.up))),
    )?;
    counters(
        encoder,
        (
            "whydrop_bpf_runs",
            "Runs of each eBPF program (0 unless kernel.bpf_stats_enabled is 1)",
        ),
        status
            .programs
            .iter()
            .map(|p| (one("program", &*p.name), p.runs)),
    )?;
    let mut seconds = encoder.encode_descriptor(
        "whydrop_bpf_run_seconds",
        "Time spent in each eBPF program (0 unless kernel.bpf_stats_enabled is 1)",
        None,
        MetricType::Counter,
    )?;
    for program in &status.programs {
        each(&mut seconds, &one("program", &*program.name), |m| {
            m.encode_counter::<NoLabelSet, _, u64>(&program.seconds, None)
        })?;
    }
    gauges(
        encoder,
        (
            "whydrop_map_entries",
            "Keys in a kernel map when it was last fetched",
        ),
        status.maps.iter().map(|m| (one("map", m.map), m.entries)),
    )?;
    gauges(
        encoder,
        (
            "whydrop_map_capacity",
            "Keys that a kernel map has room for",
        ),
        status.maps.iter().map(|m| (one("map", m.map), m.capacity)),
    )
}
