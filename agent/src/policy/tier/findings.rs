//! What is said of flows that a tier denies, and what mends it.

use std::sync::Arc;

use super::decide::{TierResult, conflict};
use super::{Action, PodSet, Tier, TierPeer, TierPolicy, TierPort, TierRule};
use crate::cluster::objects::Labels;
use crate::policy::evaluate::{Because, End, Flow, Judgement, Match, Who};
use crate::policy::findings::{Draft, Finding, dns_ports, ends, name, plain, port};
use crate::policy::fix::{self, Candidate};
use crate::policy::model::{Direction, NetworkPolicy, Peer, PortItem, PortMatch, Rule, Side};
use crate::policy::world::{Change, World};
use crate::policy::{dns, fix::push};

/// The findings of a side that a tier's rule denies.
pub(in crate::policy) fn denied(
    world: &World,
    flow: &Flow,
    side: &Judgement,
    tier: Tier,
) -> Vec<Draft> {
    let Some(result) = side.decided.and_then(|i| side.tiers.get(i)) else {
        return Vec::new();
    };
    let direction = side.direction;
    let (subject, _) = ends(flow, direction);
    // Of every port the one that fares worst.
    let at = port(&Flow {
        port: side.port.or(flow.port),
        ..*flow
    });
    let (source, destination) = (name(world, flow.source), name(world, flow.destination));
    let kind = result.policy.kind.as_str();
    let rule = result.name(direction);
    let denies = format!("{rule} denies {source} to {destination} on {at}");
    let enforced = format!("where the CNI enforces {kind}");
    let mut drafts = Vec::new();
    if direction == Direction::Egress && dns::is_query(world, flow) {
        let mut draft = Draft::new(
            "missing-dns-egress",
            format!(
                "{denies}, which is the cluster's DNS: every name look-up fails, {enforced}, \
                 whatever else is allowed"
            ),
        );
        let items = dns_ports(flow);
        draft.candidates = rules(world, flow, direction, result, "the cluster's DNS", &items);
        drafts.push(draft);
    }
    let (code, message) = match tier {
        Tier::Admin => (
            "admin-tier-denied",
            format!("{denies}, before any NetworkPolicy is asked: none can allow it, {enforced}"),
        ),
        Tier::Baseline => (
            "baseline-tier-denied",
            format!(
                "no NetworkPolicy isolates {} for {direction}, so the Baseline tier counts: \
                 {denies}, {enforced}",
                name(world, subject),
            ),
        ),
    };
    let mut draft = Draft::new(code, message);
    if flow.protocol.has_ports() {
        let item = PortItem {
            protocol: flow.protocol,
            port: match flow.port {
                Some(port) => PortMatch::Range(port, port),
                None => PortMatch::Range(1, u16::MAX),
            },
        };
        draft.candidates = rules(world, flow, direction, result, &port(flow), &[item]);
        if tier == Tier::Baseline {
            draft.candidates.extend(override_it(world, flow, direction));
        }
    }
    drafts.push(draft);
    drafts
}

/// One more rule before the one that denies. To pass it on is preferred where namespaces may then
/// decide: it takes less out of their hands than to accept.
fn rules(
    world: &World,
    flow: &Flow,
    direction: Direction,
    denies: &TierResult,
    what: &str,
    ports: &[PortItem],
) -> Vec<Candidate> {
    let (policy, at) = (denies.policy, denies.rule);
    let (_, peer) = ends(flow, direction);
    let peers = peers(world, peer, direction);
    if peers.is_empty() || policy.rules(direction).len() >= policy.most_rules() {
        return Vec::new();
    }
    let actions: &[Action] = match policy.tier {
        Tier::Admin => &[Action::Pass, Action::Accept],
        Tier::Baseline => &[Action::Accept],
    };
    let candidates = actions.iter().map(|action| {
        let mut new = TierPolicy::clone(policy);
        let mut rules = std::mem::take(new.rules_mut(direction)).into_vec();
        let rule = TierRule {
            name: None,
            action: *action,
            peers: peers.clone().into(),
            ports: ports.iter().cloned().map(TierPort::Number).collect(),
        };
        rules.insert(at, rule);
        *new.rules_mut(direction) = rules.into();
        let does = match action {
            Action::Pass => "leave it to the NetworkPolicies:",
            Action::Accept | Action::Deny => "accept it:",
        };
        Candidate {
            title: format!(
                "{does} a rule for {} on {what} before {}",
                name(world, peer),
                denies.name(direction)
            ),
            change: Change::Tier(Arc::new(new)),
        }
    });
    candidates.collect()
}

/// The smallest items that match an end. Ingress knows pods only.
fn peers(world: &World, end: End, direction: Direction) -> Vec<TierPeer> {
    let (mut peers, mut networks) = (Vec::new(), Vec::new());
    // No namespace is its own here.
    for peer in fix::peers(world, end, "") {
        match peer {
            Peer::PodsIn { namespaces, pods } => {
                peers.push(TierPeer::Pods(PodSet { namespaces, pods }));
            }
            Peer::Block(block) => networks.push(block.cidr),
            Peer::Pods(_) | Peer::Namespaces(_) => {}
        }
    }
    if !networks.is_empty() && direction == Direction::Egress {
        peers.push(TierPeer::Networks(networks.into()));
    }
    peers
}

/// A NetworkPolicy of the subject's namespace, which the Baseline tier gives way to.
fn override_it(world: &World, flow: &Flow, direction: Direction) -> Option<Candidate> {
    let (subject, peer) = ends(flow, direction);
    let Who::Pod(id) = subject.who else {
        return None;
    };
    let pod = world.pod(id);
    let namespace = pod.key.namespace.clone();
    let taken = world.policies_of(&namespace);
    let free = |name: &String| taken.iter().all(|p| *p.name != **name);
    let names = (2..).map(|n| format!("allow-{direction}-{n}"));
    let name = std::iter::once(format!("allow-{direction}")).chain(names);
    let name = name.into_iter().find(free)?;
    let peers = fix::peers(world, peer, &namespace);
    if peers.is_empty() {
        return None;
    }
    let mut side = Side {
        isolates: true,
        ..Side::default()
    };
    let rule = Rule {
        peers: peers.into(),
        ports: [fix::port(flow)].into(),
    };
    push(&mut side.rules, rule);
    let mut policy = NetworkPolicy {
        namespace: namespace.clone(),
        name: name.into(),
        labels: Labels::default(),
        created: None,
        pod_selector: fix::identity(world, pod),
        ingress: Side::default(),
        egress: Side::default(),
        written: None,
        types_omitted: false,
    };
    *policy.side_mut(direction) = side;
    Some(Candidate {
        title: format!("a NetworkPolicy in {namespace}, which overrides the Baseline tier"),
        change: Change::Policy(Arc::new(policy)),
    })
}

/// Why a tier leaves it open whether a side allows the flow.
pub(in crate::policy) fn undefined(side: &Judgement) -> Option<Finding> {
    let direction = side.direction;
    let (code, message) = match side.because {
        Because::TierConflict => {
            let (a, b) = conflict(&side.tiers)?;
            let message = format!(
                "{} says {}, and {} says {}: which of the two counts is not defined; give the \
                 policies different priorities",
                a.name(direction),
                a.action.as_str(a.policy.kind),
                b.name(direction),
                b.action.as_str(b.policy.kind),
            );
            ("tier-conflict", message)
        }
        Because::TierUnknown => {
            let maybe = side.tiers.iter().find(|r| r.matched == Match::Maybe)?;
            let rule = &maybe.policy.rules(direction)[maybe.rule];
            let why = match rule.peers.iter().any(|p| matches!(p, TierPeer::Domains(_))) {
                true => "whether its domainNames match depends on what DNS has answered to the pod",
                false => "it matches one of the ends' addresses and not the other",
            };
            ("tier-unknown", format!("{}: {why}", maybe.name(direction)))
        }
        _ => return None,
    };
    Some(plain(code, Some(direction), message))
}

#[cfg(test)]
#[path = "findings_tests.rs"]
mod tests;
