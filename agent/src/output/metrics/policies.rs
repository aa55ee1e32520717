//! What NetworkPolicies deny, when they changed, and how the node's enforcer of them does.

use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;

use super::{Labels, counters, gauges, one};
use crate::cluster::objects::{Enforcer, Pod};
use crate::state::State;

pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, state: &State) -> fmt::Result {
    counters(
        encoder,
        (
            "whydrop_policy_denials",
            "Packets whose drop NetworkPolicies explain, once for each isolating policy",
        ),
        state.denials.all().into_iter().map(|(denial, packets)| {
            let [source, destination] = denial.namespaces;
            let labels = vec![
                ("source_namespace", source.to_string().into()),
                ("destination_namespace", destination.to_string().into()),
                ("direction", denial.direction.into()),
                ("policy_namespace", denial.policy.0.into()),
                ("policy", denial.policy.1.into()),
                ("finding", denial.finding.into()),
                ("confidence", denial.confidence.into()),
            ];
            (labels, packets)
        }),
    )?;
    counters(
        encoder,
        (
            "whydrop_policy_unexplained",
            "Packets that were not laid against NetworkPolicies, because too many flows had to be",
        ),
        [(Labels::new(), state.denials.unexplained_total())],
    )?;
    let index = state.index();
    gauges(
        encoder,
        ("whydrop_networkpolicies", "NetworkPolicies by namespace"),
        index
            .network_policies()
            .iter()
            .map(|(namespace, n)| (one("namespace", &**namespace), *n as u64)),
    )?;
    gauges(
        encoder,
        (
            "whydrop_networkpolicy_changed_timestamp_seconds",
            "When a NetworkPolicy was last seen to change what it allows; of one from before the agent's \
             start, when it was last written",
        ),
        index.changes().policies().map(|(namespace, name, at)| {
            let labels = vec![
                ("namespace", (&**namespace).into()),
                ("policy", (&**name).into()),
            ];
            (labels, u64::try_from(at.as_second()).unwrap_or(0))
        }),
    )?;
    gauges(
        encoder,
        (
            "whydrop_cni_agent_ready",
            "Whether this node's enforcer of NetworkPolicies is ready, as its pod shows it",
        ),
        index
            .enforcers(&state.node)
            .map(|(pod, enforcer)| (of_enforcer(pod, enforcer), u64::from(enforcer.is_ready))),
    )?;
    counters(
        encoder,
        (
            "whydrop_cni_agent_restarts",
            "Restarts of this node's enforcer of NetworkPolicies, as its pod shows them",
        ),
        index
            .enforcers(&state.node)
            .map(|(pod, enforcer)| (of_enforcer(pod, enforcer), enforcer.restarts)),
    )
}

fn of_enforcer<'a>(pod: &'a Pod, enforcer: &'a Enforcer) -> Labels<'a> {
    vec![
        ("cni", enforcer.cni.into()),
        ("namespace", (&*pod.key.namespace).into()),
        ("pod", (&*pod.key.name).into()),
    ]
}
