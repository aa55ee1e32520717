//! What policies say of a flow, and how far each rule was from matching it.
//!
//! [`World::verdict`] and [`World::judge`] ask the same predicates; the first stops as soon as it
//! knows and allocates nothing.

use std::net::IpAddr;
use std::sync::Arc;

use super::failure::Failure;
use super::model::{Direction, NetworkPolicy, Rule};
use super::tier::decide::{TierResult, conflict};
use super::tier::{Action, Tier, TierPolicy};
use super::world::{NodeId, PodId, World};
use crate::event::Protocol;

/// One end of a flow, after DNAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct End {
    /// Whose address it is.
    pub who: Who,
    /// The address, where the flow names one: a pod may have several.
    pub ip: Option<IpAddr>,
}

/// Whose address it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    /// A pod's, or its node's if it is a host-network pod.
    Pod(PodId),
    /// A node's.
    Node(NodeId),
    /// Nobody's that is known.
    Outside,
}

impl End {
    /// A pod, by whichever of its addresses.
    pub const fn pod(id: PodId) -> Self {
        Self {
            who: Who::Pod(id),
            ip: None,
        }
    }
}

/// A connection, or a datagram, in its original direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Who opens it.
    pub source: End,
    /// Where it goes.
    pub destination: End,
    /// Its protocol.
    pub protocol: Protocol,
    /// The destination's port; `None` asks whether every port is allowed.
    pub port: Option<u16>,
}

/// What the policies of one side say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// They allow it.
    Allow,
    /// They deny it.
    Deny,
    /// The specification does not say; CNIs differ.
    Undefined,
    /// Policies do not apply to this end.
    NotApplicable,
}

impl Verdict {
    /// The name in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Undefined => "undefined",
            Self::NotApplicable => "not-applicable",
        }
    }

    /// Both sides together: both must allow.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Deny, _) | (_, Self::Deny) => Self::Deny,
            (Self::Undefined, _) | (_, Self::Undefined) => Self::Undefined,
            (Self::NotApplicable, Self::NotApplicable) => Self::NotApplicable,
            _ => Self::Allow,
        }
    }
}

/// Why a side says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Because {
    /// The subject is no pod.
    NotAPod,
    /// The subject is a host-network pod.
    HostNetwork,
    /// A pod to itself.
    ToItself,
    /// From the node that the pod runs on.
    OwnNode,
    /// No policy isolates the subject.
    NotIsolated,
    /// A rule matches.
    Rule,
    /// None does.
    NoRule,
    /// Only ipBlocks match, and the peer is a pod: Cilium never matches those, others do.
    BlockOnPod,
    /// The protocol is none that NetworkPolicy defines.
    Protocol,
    /// A rule of this tier accepts or denies it.
    Tier(Tier),
    /// Policies of one tier and priority match, and do not do the same.
    TierConflict,
    /// Whether a tier's rule matches depends on what DNS answers, or on which address is used.
    TierUnknown,
    /// Objects that may decide could not be read: set by who reads them.
    Missing,
}

/// Whether something matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Match {
    /// It does not.
    No,
    /// It depends on the CNI.
    Maybe,
    /// It does.
    Yes,
}

/// What one side says, with its reasons.
#[derive(Clone, Debug)]
pub struct Judgement<'w> {
    /// Which side.
    pub direction: Direction,
    /// What it says.
    pub verdict: Verdict,
    /// Why.
    pub because: Because,
    /// The pod whose policies count.
    pub subject: Option<PodId>,
    /// The rules of the tiers that were asked, in order.
    pub tiers: Vec<TierResult<'w>>,
    /// Of these the one that accepts or denies it.
    pub decided: Option<usize>,
    /// Where every port was asked for: one that fares worst.
    pub port: Option<u16>,
    /// The NetworkPolicies that isolate the subject.
    pub policies: Vec<&'w Arc<NetworkPolicy>>,
    /// Each peer item of each rule of each of them.
    pub rules: Vec<RuleResult<'w>>,
}

/// How one peer item of a rule fared.
#[derive(Clone, Debug)]
pub struct RuleResult<'w> {
    /// The policy.
    pub policy: &'w Arc<NetworkPolicy>,
    /// The rule's index; `None` for a policy without rules.
    pub rule: Option<usize>,
    /// The item's index in `from` or `to`; `None` for a rule that has none.
    pub peer: Option<usize>,
    /// Whether it matches.
    pub matched: Match,
    /// The predicates that failed, the first one first.
    pub failures: Vec<Failure<'w>>,
}

impl World {
    /// What the policies of both sides say.
    pub fn both(&self, flow: &Flow) -> Verdict {
        match self.verdict(flow, Direction::Egress) {
            Verdict::Deny => Verdict::Deny,
            egress => egress.and(self.verdict(flow, Direction::Ingress)),
        }
    }

    /// What the policies of one side say.
    pub fn verdict(&self, flow: &Flow, direction: Direction) -> Verdict {
        let subject = match self.subject(flow, direction) {
            Ok(subject) => subject,
            Err((verdict, _)) => return verdict,
        };
        match self.ports_to_ask(subject, flow, direction) {
            None => self.decide(subject, flow, direction),
            Some(ports) => self.worst(subject, flow, direction, &ports).1,
        }
    }

    /// The flow to the port that fares worst, and how it does.
    fn worst(
        &self,
        subject: PodId,
        flow: &Flow,
        direction: Direction,
        ports: &[u16],
    ) -> (Flow, Verdict) {
        let all = ports.iter().map(|port| {
            let flow = Flow {
                port: Some(*port),
                ..*flow
            };
            (flow, self.decide(subject, &flow, direction))
        });
        let worst = all.min_by_key(|(_, verdict)| match verdict {
            Verdict::Deny => 0,
            Verdict::Undefined => 1,
            Verdict::Allow | Verdict::NotApplicable => 2,
        });
        worst.unwrap_or((*flow, Verdict::Allow))
    }

    /// Tier after tier.
    fn decide(&self, subject: PodId, flow: &Flow, direction: Direction) -> Verdict {
        let tier = |tier| self.tier(tier, subject, flow, direction, |_, _, _| {});
        tier(Tier::Admin).then(|| {
            let policies = self.by_network_policies(subject, flow, direction);
            policies.unwrap_or_else(|| tier(Tier::Baseline).then(|| Verdict::Allow))
        })
    }

    /// What the NetworkPolicies of one side say; `None` if none isolates the subject.
    fn by_network_policies(
        &self,
        subject: PodId,
        flow: &Flow,
        direction: Direction,
    ) -> Option<Verdict> {
        let mut isolating = self.isolating(subject, direction).peekable();
        isolating.peek()?;
        if !flow.protocol.has_ports() {
            return Some(Verdict::Undefined);
        }
        let mut best = Match::No;
        if let Some(compiled) = self.isolating_compiled(subject, direction) {
            let namespace = self.namespace_id(subject);
            for (policy, compiled) in compiled {
                let matched = self.compiled_matches(policy, compiled, namespace, flow, direction);
                match matched {
                    Match::Yes => return Some(Verdict::Allow),
                    other => best = best.max(other),
                }
            }
            return Some(verdict_of(best));
        }
        for policy in isolating {
            for rule in &policy.side(direction).rules {
                match self.rule_matches(policy, rule, flow, direction) {
                    Match::Yes => return Some(Verdict::Allow),
                    other => best = best.max(other),
                }
            }
        }
        Some(verdict_of(best))
    }

    /// What the policies of one side say, and how every rule of theirs fared.
    pub fn judge(&self, flow: &Flow, direction: Direction) -> Judgement<'_> {
        let mut judgement = Judgement {
            direction,
            verdict: Verdict::Allow,
            because: Because::NotIsolated,
            subject: None,
            tiers: Vec::new(),
            decided: None,
            port: None,
            policies: Vec::new(),
            rules: Vec::new(),
        };
        let subject = match self.subject(flow, direction) {
            Ok(subject) => subject,
            Err((verdict, because)) => {
                judgement.verdict = verdict;
                judgement.because = because;
                return judgement;
            }
        };
        judgement.subject = Some(subject);
        let mut flow = *flow;
        if let Some(ports) = self.ports_to_ask(subject, &flow, direction) {
            flow = self.worst(subject, &flow, direction, &ports).0;
            judgement.port = flow.port;
        }
        let flow = &flow;
        judgement.policies = self.isolating(subject, direction).collect();
        for policy in &judgement.policies {
            self.judge_policy(policy, flow, direction, &mut judgement.rules);
        }
        let mut told = Vec::new();
        let mut tier = |tier| {
            self.tier(tier, subject, flow, direction, |policy, rule, matched| {
                told.push((policy, rule, matched));
            })
        };
        let admin = tier(Tier::Admin);
        // What says so if the Admin tier leaves it to the next ones.
        let (below, because) = match self.by_network_policies(subject, flow, direction) {
            _ if !admin.goes_on() => (Verdict::Undefined, Some(Because::Tier(Tier::Admin))),
            Some(verdict) => {
                let best = judgement.rules.iter().map(|r| r.matched).max();
                let because = match best {
                    _ if !flow.protocol.has_ports() => Because::Protocol,
                    Some(Match::Yes) => Because::Rule,
                    Some(Match::Maybe) => Because::BlockOnPod,
                    Some(Match::No) | None => Because::NoRule,
                };
                (verdict, Some(because))
            }
            None => {
                let baseline = tier(Tier::Baseline);
                let verdict = baseline.then(|| Verdict::Allow);
                let because = match verdict {
                    Verdict::Undefined => None,
                    _ if baseline.goes_on() => Some(Because::NotIsolated),
                    _ => Some(Because::Tier(Tier::Baseline)),
                };
                (verdict, because)
            }
        };
        judgement.verdict = admin.then(|| below);
        judgement.tiers = self.tier_results(told, flow, direction);
        let certain = judgement.verdict != Verdict::Undefined || admin.only_goes_on();
        judgement.because = match because.filter(|_| certain) {
            Some(because) => because,
            None if conflict(&judgement.tiers).is_some() => Because::TierConflict,
            None => Because::TierUnknown,
        };
        if let Because::Tier(tier) = judgement.because {
            judgement.decided = judgement.tiers.iter().position(|r| {
                r.policy.tier == tier && r.matched != Match::No && r.action != Action::Pass
            });
        }
        judgement
    }

    fn tier_results<'w>(
        &'w self,
        told: Vec<(&'w Arc<TierPolicy>, usize, Match)>,
        flow: &Flow,
        direction: Direction,
    ) -> Vec<TierResult<'w>> {
        let results = told.into_iter().map(|(policy, index, matched)| {
            let rule = &policy.rules(direction)[index];
            TierResult {
                policy,
                rule: index,
                action: rule.action,
                matched,
                failures: match matched {
                    Match::No => self.tier_failures(rule, flow, direction),
                    Match::Maybe | Match::Yes => Vec::new(),
                },
            }
        });
        results.collect()
    }

    fn judge_policy<'w>(
        &'w self,
        policy: &'w Arc<NetworkPolicy>,
        flow: &Flow,
        direction: Direction,
        results: &mut Vec<RuleResult<'w>>,
    ) {
        let mut add = |rule, peer, matched, failures| {
            results.push(RuleResult {
                policy,
                rule,
                peer,
                matched,
                failures,
            });
        };
        let rules = &policy.side(direction).rules;
        if rules.is_empty() {
            add(None, None, Match::No, vec![Failure::NoRules]);
        }
        for (i, rule) in rules.iter().enumerate() {
            let port = match flow.protocol.has_ports() {
                true => self.port_failure(rule, flow),
                false => Some(Failure::ProtocolUndefined),
            };
            let fits = |matched: Match| match port {
                None => matched,
                Some(_) => Match::No,
            };
            if rule.peers.is_empty() {
                add(
                    Some(i),
                    None,
                    fits(Match::Yes),
                    port.iter().copied().collect(),
                );
            }
            for (j, peer) in rule.peers.iter().enumerate() {
                let mut failures = Vec::new();
                let matched =
                    self.peer_matches(policy, peer, flow, direction, |f| failures.push(f));
                failures.extend(port);
                add(Some(i), Some(j), fits(matched), failures);
            }
        }
    }

    /// The pod whose policies count, or what is so without any policy.
    fn subject(&self, flow: &Flow, direction: Direction) -> Result<PodId, (Verdict, Because)> {
        let (subject, peer) = match direction {
            Direction::Ingress => (flow.destination, flow.source),
            Direction::Egress => (flow.source, flow.destination),
        };
        let Who::Pod(id) = subject.who else {
            return Err((Verdict::NotApplicable, Because::NotAPod));
        };
        if self.is_on_host_network(id) {
            return Err((Verdict::NotApplicable, Because::HostNetwork));
        }
        if subject.who == peer.who {
            return Err((Verdict::Allow, Because::ToItself));
        }
        let peer_node = match peer.who {
            Who::Pod(peer) if self.is_on_host_network(peer) => self.pod(peer).node.as_ref(),
            Who::Pod(_) | Who::Outside => None,
            Who::Node(node) => Some(&self.node(node).key.name),
        };
        if direction == Direction::Ingress
            && peer_node.is_some()
            && peer_node == self.pod(id).node.as_ref()
        {
            return Err((Verdict::Allow, Because::OwnNode));
        }
        Ok(id)
    }

    fn rule_matches(
        &self,
        policy: &NetworkPolicy,
        rule: &Rule,
        flow: &Flow,
        direction: Direction,
    ) -> Match {
        if self.port_failure(rule, flow).is_some() {
            return Match::No;
        }
        if rule.peers.is_empty() {
            return Match::Yes;
        }
        let mut best = Match::No;
        for peer in &rule.peers {
            best = best.max(self.peer_matches(policy, peer, flow, direction, |_| {}));
            if best == Match::Yes {
                break;
            }
        }
        best
    }
}

/// Where no rule surely matches.
const fn verdict_of(best: Match) -> Verdict {
    match best {
        Match::No => Verdict::Deny,
        Match::Maybe | Match::Yes => Verdict::Undefined,
    }
}

#[cfg(test)]
#[path = "evaluate_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "naive_tests.rs"]
mod naive_tests;
