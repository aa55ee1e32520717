//! Lays a drop against the NetworkPolicies as they stand: the `explanation` of an event, and
//! `whydrop_policy_denials_total`.
//!
//! What policies say is worked out once for each flow and state of the objects, and that state is
//! taken anew at most once a second, and for at most a twentieth of the time: an explanation may be
//! that much behind. Without any NetworkPolicy nothing is explained.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::cpu_time::cpu_time;
use crate::event::{
    Confidence, DropSite, Endpoint, EndpointKind, Event, Explanation, Finding, Kind, LastChange,
    Outcome, Protocol,
};
use crate::policy::evaluate::{End, Flow, Judgement, Verdict, Who};
use crate::policy::findings::{self, Context};
use crate::policy::model::Direction;
use crate::policy::near;
use crate::policy::world::World;
use crate::state::State;

use self::episode::Episodes;

pub mod denials;
mod episode;
pub mod worlds;

/// Flows whose explanation is remembered; past it all are forgotten. Some 2 kB each.
const KNOWN: usize = 4_096;
/// How long one is remembered: whether something is transient depends on when.
const KNOWN_FOR: Duration = Duration::from_secs(10);
/// CPU time for working out explanations, in each second: past it events go without.
const BUDGET: Duration = Duration::from_millis(50);

/// Reasons of drops that an enforcer of policies makes: a netfilter rule, a program at tc, XDP or a
/// cgroup (include/net/dropreason-core.h, 7.2).
const ENFORCERS: [&str; 7] = [
    "NETFILTER_DROP",
    "TC_INGRESS",
    "TC_EGRESS",
    "TC_CLASSIFY_FAIL",
    "TC_COOKIE_ERROR",
    "XDP",
    "BPF_CGROUP_EGRESS",
];
/// The same by the function in its place, on kernels without reasons.
const ENFORCERS_AT: [&str; 6] = [
    "nft_do_chain",
    "nf_hook_slow",
    "sch_handle_ingress",
    "sch_handle_egress",
    "__netif_receive_skb_core",
    "__dev_queue_xmit",
];

/// What asks for the same explanation.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Question {
    source: Name,
    destination: Name,
    protocol: Protocol,
    port: Option<u16>,
    outcome: Outcome,
    reason: Option<Arc<str>>,
    location: Option<Arc<str>>,
    netns: Option<u32>,
}

/// A pod, or else an address.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Name {
    Pod(Arc<str>, Arc<str>),
    Address(Option<IpAddr>),
}

/// Explains the drops of one node.
pub struct Explainer {
    state: Arc<State>,
    /// The objects of which `known` is.
    seen: Weak<World>,
    known: HashMap<Question, (Instant, Option<Arc<Explanation>>)>,
    episodes: Episodes,
    /// Since when the budget is spent, and how much of it.
    spent: (Instant, Duration),
    /// Explanations that were worked out; not those that were remembered.
    computed: u64,
}

impl Explainer {
    /// Explains by this state's index.
    pub fn new(state: Arc<State>) -> Self {
        Self {
            state,
            seen: Weak::new(),
            known: HashMap::new(),
            episodes: Episodes::default(),
            spent: (Instant::now(), Duration::ZERO),
            computed: 0,
        }
    }

    /// How many explanations were worked out.
    pub fn computed(&self) -> u64 {
        self.computed
    }

    /// What policies say of an event; nothing where none of them can have a part in it.
    pub fn explain(&mut self, event: &Event, now: Instant) -> Option<Explanation> {
        let question = question(event)?;
        let pair = (
            question.source.clone(),
            question.destination.clone(),
            question.protocol,
            question.port,
        );
        let first = self.episodes.note(pair, event);
        let world = self.world(now)?;
        if let Some((since, known)) = self.known.get(&question)
            && now.duration_since(*since) < KNOWN_FOR
        {
            return known.as_deref().cloned();
        }
        if now.duration_since(self.spent.0) >= Duration::from_secs(1) {
            self.spent = (now, Duration::ZERO);
        }
        if self.spent.1 >= BUDGET {
            self.state.denials.unexplained(event.packets);
            return None;
        }
        let started = cpu_time();
        // Enforcers are outside of pods: a rule that drops inside one is its own.
        let is_inside_pod = |netns: u32| {
            let namespace = self.state.accept_queues.namespaces().get(netns);
            let ends = [event.source.ip, event.destination.ip];
            namespace.is_some_and(|namespace| {
                let mut addresses = namespace.addresses.iter();
                namespace.pod.is_some() || addresses.any(|ip| ends.contains(&Some(*ip)))
            })
        };
        let mut explanation = explain(&world, event, &self.state.node, is_inside_pod);
        if let (Some(explanation), Some(first)) = (&mut explanation, first)
            && is_denial(explanation)
        {
            let change = episode::last_change(&self.state.index(), event, first);
            if let Some(part) = change.as_ref().and_then(LastChange::beside_first_drop) {
                explanation.summary += "; ";
                explanation.summary += &part;
            }
            explanation.last_change = change;
        }
        self.spent.1 += cpu_time().saturating_sub(started);
        self.computed += 1;
        if self.known.len() >= KNOWN {
            self.known.clear();
        }
        let remembered = explanation.clone().map(Arc::new);
        self.known.insert(question, (now, remembered));
        explanation
    }

    /// The objects that decide, as new as they may be; none where no policy is.
    fn world(&mut self, now: Instant) -> Option<Arc<World>> {
        let index = self.state.index();
        if !index.has_policies() {
            (self.seen, self.known) = (Weak::new(), HashMap::new());
            self.state.worlds.forget_unused(now);
            return None;
        }
        let (world, _) = self.state.worlds.latest(&index, now);
        if !std::ptr::eq(self.seen.as_ptr(), Arc::as_ptr(&world)) {
            self.known.clear();
            self.seen = Arc::downgrade(&world);
        }
        Some(world)
    }
}

/// Policies speak of connections: of what is none's first packet the direction is not known.
fn question(event: &Event) -> Option<Question> {
    let protocol = event.protocol?;
    let is_first = match event.kind {
        Kind::Syn | Kind::Dns => true,
        Kind::Packet => {
            let is_datagram = protocol == Protocol::UDP || protocol == Protocol::SCTP;
            is_datagram && event.destination.declared_port
        }
    };
    let has_pod = event.source.pod.is_some() || event.destination.pod.is_some();
    if !is_first || !has_pod {
        return None;
    }
    let site = event.drop.as_ref();
    Some(Question {
        source: name(&event.source),
        destination: name(&event.destination),
        protocol,
        port: event.destination.port,
        outcome: event.outcome,
        reason: site.and_then(|site| site.reason.clone()),
        location: site.and_then(|site| site.location.clone()),
        netns: site.and_then(|site| site.netns),
    })
}

fn name(end: &Endpoint) -> Name {
    match (&end.namespace, &end.pod) {
        (Some(namespace), Some(pod)) => Name::Pod(namespace.clone(), pod.clone()),
        _ => Name::Address(end.ip),
    }
}

/// The end as policies see it.
fn end(world: &World, end: &Endpoint) -> End {
    let pod = end.namespace.as_deref().zip(end.pod.as_deref());
    let pod = pod.and_then(|(namespace, pod)| world.pod_named(namespace, pod));
    let node = || end.ip.and_then(|ip| world.node_at(ip));
    let who = match pod {
        Some(id) => Who::Pod(id),
        None if end.kind == Some(EndpointKind::Node) => node().map_or(Who::Outside, Who::Node),
        None => Who::Outside,
    };
    End { who, ip: end.ip }
}

/// Works an explanation out. `is_inside_pod`: the network namespace is a pod's own.
fn explain(
    world: &World,
    event: &Event,
    node: &Arc<str>,
    is_inside_pod: impl Fn(u32) -> bool,
) -> Option<Explanation> {
    let flow = Flow {
        source: end(world, &event.source),
        destination: end(world, &event.destination),
        protocol: event.protocol?,
        port: event.destination.port,
    };
    // A pod that came after the objects were taken: what they say is of another one.
    let is_known =
        |of: End, as_told: &Endpoint| as_told.pod.is_none() || matches!(of.who, Who::Pod(_));
    if !is_known(flow.source, &event.source) || !is_known(flow.destination, &event.destination) {
        return None;
    }
    let egress = world.judge(&flow, Direction::Egress);
    let ingress = world.judge(&flow, Direction::Ingress);
    let denying: Vec<&Judgement> = [&egress, &ingress]
        .into_iter()
        .filter(|side| side.verdict == Verdict::Deny)
        .collect();
    let is_undefined = [&egress, &ingress]
        .iter()
        .any(|side| side.verdict == Verdict::Undefined);
    let local = |side: &Judgement| {
        let end = match side.direction {
            Direction::Egress => &event.source,
            Direction::Ingress => &event.destination,
        };
        end.node.as_ref() == Some(node)
    };
    let (confidence, side) = match (denying.as_slice(), &event.drop) {
        ([], _) if is_undefined => (Confidence::None, None),
        ([], _) => (Confidence::Contradicted, None),
        // No policy makes a drop of this kind.
        (_, Some(site)) if !is_enforcers(site) => return None,
        ([side], None) => (Confidence::Consistent, Some(*side)),
        ([side], Some(site)) => {
            let is_outside = site.netns.is_none_or(|netns| !is_inside_pod(netns));
            let in_place = is_outside && local(side);
            let confidence = match in_place {
                true => Confidence::Confirmed,
                false => Confidence::Consistent,
            };
            (confidence, Some(*side))
        }
        // Both sides deny it: which of them did is not seen.
        (_, _) => (Confidence::Consistent, None),
    };
    let context = Context {
        at: Some(event.time),
        site: event.drop.clone(),
        no_fixes: false,
    };
    let found = findings::findings(world, &flow, &egress, &ingress, &context);
    let summary = match denying.first() {
        // A rule of a tier denies it whatever isolates the pod.
        Some(first) if side.unwrap_or(first).decided.is_none() => {
            denial(world, &flow, side.unwrap_or(first))
        }
        _ => found.first().map(|f| f.message.clone()).unwrap_or_default(),
    };
    let named = match side {
        Some(side) => vec![side],
        None => denying,
    };
    let policies = named.into_iter().flat_map(|side| {
        let tier = side.decided.and_then(|index| side.tiers.get(index));
        match tier {
            Some(result) => vec![result.policy.full_name()],
            None => side.policies.iter().map(|p| p.full_name()).collect(),
        }
    });
    Some(Explanation {
        confidence,
        direction: side.map(|side| side.direction.as_str().to_owned()),
        policies: policies.collect(),
        findings: found
            .into_iter()
            .map(|finding| Finding {
                code: finding.code.to_owned(),
                message: finding.message,
                fix: finding.fixes.into_iter().next().map(|fix| fix.yaml),
            })
            .collect(),
        summary,
        last_change: None,
    })
}

/// One sentence: who is isolated, by what, and why the closest rule does not match.
fn denial(world: &World, flow: &Flow, side: &Judgement) -> String {
    let (preposition, end) = match side.direction {
        Direction::Egress => ("from", flow.source),
        Direction::Ingress => ("to", flow.destination),
    };
    let policies: Vec<_> = side.policies.iter().collect();
    format!(
        "{} {preposition} {} is isolated by {}{}",
        side.direction,
        findings::name(world, end),
        policies
            .iter()
            .map(|policy| policy.full_name())
            .collect::<Vec<_>>()
            .join(", "),
        near::closest(world, flow, side),
    )
}

fn is_enforcers(site: &DropSite) -> bool {
    match (&site.reason, &site.location) {
        (Some(reason), _) => ENFORCERS.contains(&&**reason),
        (None, Some(location)) => {
            let function = location.split('.').next().unwrap_or_default();
            ENFORCERS_AT.contains(&function)
        }
        (None, None) => true,
    }
}

/// Whether an explanation lays the drop to policies.
pub fn is_denial(explanation: &Explanation) -> bool {
    matches!(
        explanation.confidence,
        Confidence::Confirmed | Confidence::Consistent
    )
}

#[cfg(test)]
#[path = "explain/tests.rs"]
mod tests;
