//! The predicates of rules: whether a peer, an address or a port matches.

use std::net::IpAddr;
use std::sync::Arc;

use super::evaluate::{End, Flow, Match, Who};
use super::failure::Failure;
use super::model::{Block, Direction, NetworkPolicy, Peer, PortItem, PortMatch, Rule};
use super::selector::Selector;
use super::tier::{PodSet, TierPeer, TierPort, TierRule};
use super::world::{NodeId, PodId, World};
use crate::cluster::objects::{Pod, Port};

impl World {
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
        let Some(id) = self.peer_pod(end, &mut fail) else {
            return Match::No;
        };
        let pod = self.pod(id);
        let (namespaces, pods) = match peer {
            Peer::Pods(pods) => (None, Some(pods)),
            Peer::Namespaces(namespaces) => (Some(namespaces), None),
            Peer::PodsIn { namespaces, pods } => (Some(namespaces), Some(pods)),
            Peer::Block(_) => (None, None),
        };
        let elsewhere = matches!(peer, Peer::Pods(_)) && pod.key.namespace != policy.namespace;
        if elsewhere {
            fail(Failure::SameNamespaceOnly);
        }
        match self.pod_matches(id, namespaces, pods, fail) && !elsewhere {
            true => Match::Yes,
            false => Match::No,
        }
    }

    /// The pod of the pod network that an end is.
    fn peer_pod<'w>(&self, end: End, mut fail: impl FnMut(Failure<'w>)) -> Option<PodId> {
        match end.who {
            Who::Pod(id) if !self.pod(id).host_network => return Some(id),
            Who::Pod(_) | Who::Node(_) => fail(Failure::PeerHostNetwork),
            Who::Outside => fail(Failure::PeerExternal),
        }
        None
    }

    fn pod_matches<'w>(
        &'w self,
        id: PodId,
        namespaces: Option<&'w Selector>,
        pods: Option<&'w Selector>,
        mut fail: impl FnMut(Failure<'w>),
    ) -> bool {
        let (namespace, pod) = (self.namespace_of(id), self.pod(id));
        let mut matched = true;
        for requirement in namespaces.iter().flat_map(|s| s.unmet(&namespace.labels)) {
            matched = false;
            fail(Failure::PeerNamespace(requirement));
        }
        for requirement in pods.iter().flat_map(|s| s.unmet(&pod.labels)) {
            matched = false;
            fail(Failure::PeerPod(requirement));
        }
        matched
    }

    /// Whether a pod is in a set; those of the host network are in none.
    pub(super) fn is_in(&self, id: PodId, set: &PodSet) -> bool {
        !self.pod(id).host_network
            && self.pod_matches(id, Some(&set.namespaces), Some(&set.pods), |_| {})
    }

    /// One item of `from` or `to` of a tier's rule.
    pub(super) fn tier_peer_matches<'w>(
        &'w self,
        peer: &'w TierPeer,
        flow: &Flow,
        direction: Direction,
        mut fail: impl FnMut(Failure<'w>),
    ) -> Match {
        let (end, subject) = match direction {
            Direction::Ingress => (flow.source, flow.destination),
            Direction::Egress => (flow.destination, flow.source),
        };
        let matched = match peer {
            TierPeer::Pods(set) => match self.peer_pod(end, &mut fail) {
                Some(id) => self.pod_matches(id, Some(&set.namespaces), Some(&set.pods), fail),
                None => false,
            },
            TierPeer::Nodes(nodes) => {
                let Some(node) = self.node_of(end) else {
                    fail(Failure::NotANode);
                    return Match::No;
                };
                let unmet = nodes.unmet(&self.node(node).labels);
                unmet.map(|r| fail(Failure::PeerNode(r))).count() == 0
            }
            TierPeer::Networks(networks) => {
                let inside = |ip: &IpAddr| networks.iter().any(|net| net.contains(ip));
                let matched = self.addresses_match(end, subject, inside);
                if let (Match::No, Some(first)) = (matched, networks.first()) {
                    fail(Failure::CidrMiss(first));
                }
                return matched;
            }
            // Nobody knows here what DNS has answered to the pod.
            TierPeer::Domains(_) => return Match::Maybe,
        };
        match matched {
            true => Match::Yes,
            false => Match::No,
        }
    }

    /// The node that an end is, or whose network it is on.
    fn node_of(&self, end: End) -> Option<NodeId> {
        match end.who {
            Who::Node(id) => Some(id),
            Who::Pod(id) if self.pod(id).host_network => {
                self.node_named(self.pod(id).node.as_ref()?)
            }
            Who::Pod(_) | Who::Outside => None,
        }
    }

    fn block_matches<'w>(
        &'w self,
        block: &'w Block,
        end: End,
        subject: End,
        mut fail: impl FnMut(Failure<'w>),
    ) -> Match {
        let mut except = None;
        let inside = |ip: &IpAddr| {
            let cut = block.except.iter().find(|net| net.contains(ip));
            let inside = block.cidr.contains(ip);
            except = except.or(cut.filter(|_| inside));
            inside && cut.is_none()
        };
        let matched = self.addresses_match(end, subject, inside);
        match (matched, end.who) {
            (Match::No, _) => fail(match except {
                Some(except) => Failure::CidrExcept(except),
                None => Failure::CidrMiss(&block.cidr),
            }),
            (_, Who::Pod(id)) if !self.pod(id).host_network => return Match::Maybe,
            _ => {}
        }
        matched
    }

    /// Whether all or some of the addresses that a flow may have at one end are `inside`: of those
    /// that two ends have, the ones of a family that both have.
    fn addresses_match(
        &self,
        end: End,
        other: End,
        mut inside: impl FnMut(&IpAddr) -> bool,
    ) -> Match {
        let (addresses, others) = (self.known(&end), self.known(&other));
        let usable = |ip: &&IpAddr| {
            others.is_empty() || others.iter().any(|other| other.is_ipv4() == ip.is_ipv4())
        };
        let (mut some, mut all) = (false, true);
        for ip in addresses.iter().filter(usable) {
            let inside = inside(ip);
            some |= inside;
            all &= inside;
        }
        match (some, all) {
            (false, _) => Match::No,
            (true, false) => Match::Maybe,
            (true, true) => Match::Yes,
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
                    Some(node) if pod.ips.is_empty() => &self.node(node).ips,
                    _ => &pod.ips,
                }
            }
            Who::Node(id) => &self.node(id).ips,
            Who::Outside => &[],
        }
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

    /// As [`Self::port_failure`], of a tier's rule.
    pub(super) fn tier_port_failure<'w>(
        &self,
        rule: &'w TierRule,
        flow: &Flow,
    ) -> Option<Failure<'w>> {
        let mut failure = Failure::Protocol;
        for item in &rule.ports {
            match item {
                TierPort::Number(item) if item.protocol != flow.protocol => {}
                TierPort::Number(item) if self.port_matches(item, flow) => return None,
                TierPort::Named(name) if self.has_number(name, flow) => return None,
                TierPort::Named(name) if failure == Failure::Protocol => {
                    failure = match self.resolves(name, flow) {
                        true => Failure::Port,
                        false => Failure::NamedPortUnresolved(name),
                    };
                }
                TierPort::Number(_) | TierPort::Named(_) => failure = Failure::Port,
            }
        }
        (!rule.ports.is_empty()).then_some(failure)
    }

    fn port_matches(&self, item: &PortItem, flow: &Flow) -> bool {
        match (&item.port, flow.port) {
            (PortMatch::Any, _) => true,
            (PortMatch::Range(from, to), Some(port)) => (*from..=*to).contains(&port),
            (PortMatch::Range(from, to), None) => (*from, *to) == (1, u16::MAX),
            (PortMatch::Named(name), _) => self.has_number(name, flow),
        }
    }

    fn has_number(&self, name: &str, flow: &Flow) -> bool {
        self.numbers(name, flow)
            .any(|number| Some(number) == flow.port)
    }

    fn resolves(&self, name: &str, flow: &Flow) -> bool {
        self.numbers(name, flow).next().is_some()
    }

    /// What the destination pod's containers call so, of the flow's protocol.
    pub(super) fn numbers<'a>(
        &'a self,
        name: &'a str,
        flow: &Flow,
    ) -> impl Iterator<Item = u16> + 'a {
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
