//! What policies say of a flow, and how far each rule was from matching it.
//!
//! [`World::verdict`] and [`World::judge`] ask the same predicates; the first stops as soon as it
//! knows and allocates nothing.

use std::net::IpAddr;
use std::sync::Arc;

use super::failure::Failure;
use super::model::{Block, Direction, NetworkPolicy, Peer, PortItem, PortMatch, Rule};
use super::world::{NodeId, PodId, World};
use crate::cluster::objects::{Pod, Port};
use crate::event::Protocol;

/// One end of a flow, after DNAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Whose address it is.
    pub who: Who,
    /// The address, where the flow names one: a pod may have several.
    pub ip: Option<IpAddr>,
}

/// Whose address it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// The policies that isolate the subject.
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
        let mut isolating = self.isolating(subject, direction).peekable();
        if isolating.peek().is_none() {
            return Verdict::Allow;
        }
        if !flow.protocol.has_ports() {
            return Verdict::Undefined;
        }
        let mut best = Match::No;
        for policy in isolating {
            for rule in &policy.side(direction).rules {
                match self.rule_matches(policy, rule, flow, direction) {
                    Match::Yes => return Verdict::Allow,
                    other => best = best.max(other),
                }
            }
        }
        match best {
            Match::No => Verdict::Deny,
            _ => Verdict::Undefined,
        }
    }

    /// What the policies of one side say, and how every rule of theirs fared.
    pub fn judge(&self, flow: &Flow, direction: Direction) -> Judgement<'_> {
        let mut judgement = Judgement {
            direction,
            verdict: Verdict::Allow,
            because: Because::NotIsolated,
            subject: None,
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
        judgement.policies = self.isolating(subject, direction).collect();
        if judgement.policies.is_empty() {
            return judgement;
        }
        for policy in &judgement.policies {
            self.judge_policy(policy, flow, direction, &mut judgement.rules);
        }
        let best = judgement.rules.iter().map(|r| r.matched).max();
        (judgement.verdict, judgement.because) = match best {
            _ if !flow.protocol.has_ports() => (Verdict::Undefined, Because::Protocol),
            Some(Match::Yes) => (Verdict::Allow, Because::Rule),
            Some(Match::Maybe) => (Verdict::Undefined, Because::BlockOnPod),
            Some(Match::No) | None => (Verdict::Deny, Because::NoRule),
        };
        judgement
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
        let pod = self.pod(id);
        if pod.host_network {
            return Err((Verdict::NotApplicable, Because::HostNetwork));
        }
        if subject.who == peer.who {
            return Err((Verdict::Allow, Because::ToItself));
        }
        let peer_node = match peer.who {
            Who::Pod(peer) => Some(self.pod(peer))
                .filter(|pod| pod.host_network)
                .and_then(|pod| pod.node.as_ref()),
            Who::Node(node) => Some(&self.node(node).key.name),
            Who::Outside => None,
        };
        if direction == Direction::Ingress && peer_node.is_some() && peer_node == pod.node.as_ref()
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

    /// The one item of `from` or `to`. Tells every predicate that fails, in their order.
    pub(super) fn peer_matches<'w>(
        &'w self,
        policy: &NetworkPolicy,
        peer: &'w Peer,
        flow: &Flow,
        direction: Direction,
        mut fail: impl FnMut(Failure<'w>),
    ) -> Match {
        let (end, subject) = match direction {
            Direction::Ingress => (flow.source, flow.destination),
            Direction::Egress => (flow.destination, flow.source),
        };
        if let Peer::Block(block) = peer {
            return self.block_matches(block, end, subject, fail);
        }
        let id = match end.who {
            Who::Pod(id) if !self.pod(id).host_network => id,
            Who::Pod(_) | Who::Node(_) => {
                fail(Failure::PeerHostNetwork);
                return Match::No;
            }
            Who::Outside => {
                fail(Failure::PeerExternal);
                return Match::No;
            }
        };
        let pod = self.pod(id);
        let namespace = self.namespace_of(id);
        let mut matched = Match::Yes;
        let mut failed = |failure| {
            matched = Match::No;
            fail(failure);
        };
        let (namespaces, pods) = match peer {
            Peer::Pods(pods) => {
                if pod.key.namespace != policy.namespace {
                    failed(Failure::SameNamespaceOnly);
                }
                (None, Some(pods))
            }
            Peer::Namespaces(namespaces) => (Some(namespaces), None),
            Peer::PodsIn { namespaces, pods } => (Some(namespaces), Some(pods)),
            Peer::Block(_) => (None, None),
        };
        for requirement in namespaces.iter().flat_map(|s| s.unmet(&namespace.labels)) {
            failed(Failure::PeerNamespace(requirement));
        }
        for requirement in pods.iter().flat_map(|s| s.unmet(&pod.labels)) {
            failed(Failure::PeerPod(requirement));
        }
        matched
    }

    fn block_matches<'w>(
        &'w self,
        block: &'w Block,
        end: End,
        subject: End,
        mut fail: impl FnMut(Failure<'w>),
    ) -> Match {
        // Of the addresses that two ends have, those of a family that both have.
        let (addresses, others) = (self.known(&end), self.known(&subject));
        let usable = |ip: &&IpAddr| {
            others.is_empty() || others.iter().any(|other| other.is_ipv4() == ip.is_ipv4())
        };
        let (mut some, mut all, mut except) = (false, true, None);
        for ip in addresses.iter().filter(usable) {
            let cut = block.except.iter().find(|net| net.contains(ip));
            let inside = block.cidr.contains(ip);
            except = except.or(cut.filter(|_| inside));
            some |= inside && cut.is_none();
            all &= inside && cut.is_none();
        }
        match (some, all) {
            (false, _) => {
                fail(match except {
                    Some(except) => Failure::CidrExcept(except),
                    None => Failure::CidrMiss(&block.cidr),
                });
                Match::No
            }
            (true, false) => Match::Maybe,
            (true, true) => match end.who {
                Who::Pod(id) if !self.pod(id).host_network => Match::Maybe,
                _ => Match::Yes,
            },
        }
    }

    /// The address that a flow names, else all that the end has.
    fn known<'a>(&'a self, end: &'a End) -> &'a [IpAddr] {
        match end.ip.as_slice() {
            [] => self.addresses(*end),
            given => given,
        }
    }

    fn addresses(&self, end: End) -> &[IpAddr] {
        match end.who {
            Who::Pod(id) => {
                let pod = self.pod(id);
                let node = pod.node.as_ref().filter(|_| pod.host_network);
                match node.and_then(|name| self.node_named(name)) {
                    Some(node) if pod.ips.is_empty() => &node.ips,
                    _ => &pod.ips,
                }
            }
            Who::Node(id) => &self.node(id).ips,
            Who::Outside => &[],
        }
    }

    fn node_named(&self, name: &str) -> Option<&Arc<crate::cluster::objects::Node>> {
        let nodes = &self.inventory.nodes;
        nodes.iter().find(|node| *node.key.name == *name)
    }

    /// Why no item of a rule's `ports` matches; `None` if one does, or there is none.
    pub(super) fn port_failure<'w>(&self, rule: &'w Rule, flow: &Flow) -> Option<Failure<'w>> {
        let mut failure = Failure::Protocol;
        for item in &rule.ports {
            if item.protocol != flow.protocol {
                continue;
            }
            if self.port_matches(item, flow) {
                return None;
            }
            failure = match &item.port {
                PortMatch::Named(name) if !self.resolves(name, flow) => match failure {
                    Failure::Port => Failure::Port,
                    _ => Failure::NamedPortUnresolved(name),
                },
                _ => Failure::Port,
            };
        }
        (!rule.ports.is_empty()).then_some(failure)
    }

    fn port_matches(&self, item: &PortItem, flow: &Flow) -> bool {
        match (&item.port, flow.port) {
            (PortMatch::Any, _) => true,
            (PortMatch::Range(from, to), Some(port)) => (*from..=*to).contains(&port),
            (PortMatch::Range(from, to), None) => (*from, *to) == (1, u16::MAX),
            (PortMatch::Named(name), Some(port)) => {
                self.numbers(name, flow).any(|number| number == port)
            }
            (PortMatch::Named(_), None) => false,
        }
    }

    fn resolves(&self, name: &str, flow: &Flow) -> bool {
        self.numbers(name, flow).next().is_some()
    }

    /// What the destination pod's containers call so, of the flow's protocol.
    fn numbers<'a>(&'a self, name: &'a str, flow: &Flow) -> impl Iterator<Item = u16> + 'a {
        let protocol = flow.protocol;
        let pod = match flow.destination.who {
            Who::Pod(id) => Some(self.pod(id)),
            _ => None,
        };
        let names = pod
            .into_iter()
            .flat_map(|pod: &Arc<Pod>| pod.port_names.iter());
        names
            .filter(move |(n, port): &&(Arc<str>, Port)| **n == *name && port.protocol == protocol)
            .map(|(_, port)| port.port)
    }
}

#[cfg(test)]
#[path = "evaluate_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "naive_tests.rs"]
mod naive_tests;
