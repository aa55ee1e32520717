//! NetworkPolicies laid out for many evaluations: what a rule asks for lies side by side in memory, and
//! whether a selector matches a set of labels is worked out once. The verdicts are those of
//! [`super::matching`], which also says why.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use super::evaluate::{Flow, Match, Who};
use super::model::{Direction, NetworkPolicy, Peer, PortMatch, Rule};
use super::selector::Selector;
use super::world::{NamespaceId, PodId, World};
use crate::cluster::objects::Labels;
use crate::event::Protocol;

/// A set of labels in a [`Memo`]; all pods of a workload have the same.
pub(super) type LabelsId = u32;
/// Labels that the memo does not know: of a namespace that a fix changes.
pub(super) const UNKNOWN: LabelsId = LabelsId::MAX;
/// A selector in a [`Memo`].
type SelectorId = u32;

/// Whether selectors match sets of labels, as far as it was asked.
#[derive(Debug, Default)]
pub(super) struct Memo {
    selectors: Vec<Selector>,
    sets: usize,
    /// By selector, then by set: not known, no, yes. Made when the selector is first asked for.
    answers: Vec<OnceLock<Box<[AtomicU8]>>>,
}

const NO: u8 = 1;
const YES: u8 = 2;

impl Memo {
    fn matches<'l>(
        &self,
        selector: SelectorId,
        set: LabelsId,
        labels: impl FnOnce() -> &'l Labels,
    ) -> bool {
        let compare = || self.selectors[selector as usize].matches(labels());
        if set == UNKNOWN {
            return compare();
        }
        let answers = self.answers[selector as usize]
            .get_or_init(|| (0..self.sets).map(|_| AtomicU8::new(0)).collect());
        let answer = &answers[set as usize];
        match answer.load(Ordering::Relaxed) {
            YES => true,
            NO => false,
            _ => {
                let matches = compare();
                let known = if matches { YES } else { NO };
                answer.store(known, Ordering::Relaxed);
                matches
            }
        }
    }
}

/// Gives each different set of labels a number. Those that share their memory are known to be equal.
#[derive(Debug, Default)]
pub(super) struct Sets(HashMap<*const (Arc<str>, Arc<str>), LabelsId>);

impl Sets {
    /// The number of a set.
    pub(super) fn id(&mut self, labels: &Labels) -> LabelsId {
        let next = LabelsId::try_from(self.0.len()).unwrap_or(UNKNOWN);
        // Empty ones may share one address with others that are empty, and are equal.
        *self.0.entry(labels.as_ptr()).or_insert(next)
    }
}

/// A policy, by direction: ingress, egress.
#[derive(Debug)]
pub(super) struct Compiled([Side; 2]);

#[derive(Debug, Default)]
struct Side {
    ports: Box<[Ports]>,
    peers: Box<[Selected]>,
    /// Of each rule the first of its peers and the one after its last; none matches everyone.
    rules: Box<[(u32, u32)]>,
}

/// One item of a rule's `ports`, and the rule's index.
#[derive(Clone, Copy, Debug)]
struct Ports {
    rule: u32,
    what: What,
}

#[derive(Clone, Copy, Debug)]
enum What {
    /// The rule has no `ports`.
    All,
    Range(Protocol, u16, u16),
    Any(Protocol),
    /// What it is depends on the destination.
    Named,
}

/// One item of a rule's `from` or `to`.
#[derive(Clone, Copy, Debug)]
enum Selected {
    /// In the policy's own namespace.
    Own(SelectorId),
    /// In namespaces.
    In(SelectorId),
    /// Both.
    Both(SelectorId, SelectorId),
    /// Addresses; its index among the rule's peers.
    Block(u32),
}

/// Compiles the policies of each namespace.
pub(super) fn compile(
    policies: &[Arc<[Arc<NetworkPolicy>]>],
    sets: &Sets,
) -> (Memo, Vec<Option<Arc<[Compiled]>>>) {
    let mut ids: HashMap<Selector, SelectorId> = HashMap::new();
    let mut selectors = Vec::new();
    let mut id = |selector: &Selector| {
        if let Some(id) = ids.get(selector) {
            return *id;
        }
        let id = selectors.len() as SelectorId;
        selectors.push(selector.clone());
        ids.insert(selector.clone(), id);
        id
    };
    let compiled = policies.iter().map(|policies| {
        let policies = policies.iter();
        let compiled = policies.map(|policy| {
            let side = |direction, id: &mut _| Side::of(&policy.side(direction).rules, id);
            Compiled([
                side(Direction::Ingress, &mut id),
                side(Direction::Egress, &mut id),
            ])
        });
        Some(compiled.collect())
    });
    let compiled = compiled.collect();
    let memo = Memo {
        answers: selectors.iter().map(|_| OnceLock::new()).collect(),
        selectors,
        sets: sets.0.len(),
    };
    (memo, compiled)
}

impl Side {
    fn of(rules: &[Rule], id: &mut impl FnMut(&Selector) -> SelectorId) -> Self {
        let (mut ports, mut peers, mut bounds) = (Vec::new(), Vec::new(), Vec::new());
        for (i, rule) in (0..).zip(rules) {
            if rule.ports.is_empty() {
                ports.push(Ports {
                    rule: i,
                    what: What::All,
                });
            }
            ports.extend(rule.ports.iter().map(|item| Ports {
                rule: i,
                what: match item.port {
                    PortMatch::Any => What::Any(item.protocol),
                    PortMatch::Range(from, to) => What::Range(item.protocol, from, to),
                    PortMatch::Named(_) => What::Named,
                },
            }));
            let first = peers.len() as u32;
            peers.extend((0..).zip(&rule.peers).map(|(j, peer)| match peer {
                Peer::Pods(pods) => Selected::Own(id(pods)),
                Peer::Namespaces(namespaces) => Selected::In(id(namespaces)),
                Peer::PodsIn { namespaces, pods } => Selected::Both(id(namespaces), id(pods)),
                Peer::Block(_) => Selected::Block(j),
            }));
            bounds.push((first, peers.len() as u32));
        }
        Self {
            ports: ports.into(),
            peers: peers.into(),
            rules: bounds.into(),
        }
    }
}

impl World {
    /// How the best of a policy's rules fares.
    pub(super) fn compiled_matches(
        &self,
        policy: &NetworkPolicy,
        compiled: &Compiled,
        namespace: NamespaceId,
        flow: &Flow,
        direction: Direction,
    ) -> Match {
        let (side, peer) = match direction {
            Direction::Ingress => (&compiled.0[0], flow.source),
            Direction::Egress => (&compiled.0[1], flow.destination),
        };
        let peer = match peer.who {
            Who::Pod(id) if !self.is_on_host_network(id) => Some(id),
            _ => None,
        };
        let rules = &policy.side(direction).rules;
        let mut best = Match::No;
        for ports in &side.ports {
            let rule = ports.rule as usize;
            let fits = match ports.what {
                What::All => true,
                What::Any(protocol) => protocol == flow.protocol,
                What::Range(protocol, from, to) => {
                    protocol == flow.protocol
                        && match flow.port {
                            Some(port) => (from..=to).contains(&port),
                            None => (from, to) == (1, u16::MAX),
                        }
                }
                What::Named => self.port_failure(&rules[rule], flow).is_none(),
            };
            if !fits {
                continue;
            }
            let (first, end) = side.rules[rule];
            if first == end {
                return Match::Yes;
            }
            for selected in &side.peers[first as usize..end as usize] {
                let matched = match (*selected, peer) {
                    (Selected::Block(j), _) => {
                        let peer = &rules[rule].peers[j as usize];
                        self.peer_matches(policy, peer, flow, direction, |_| {})
                    }
                    (_, None) => Match::No,
                    (selected, Some(peer)) => match self.is_selected(selected, peer, namespace) {
                        true => Match::Yes,
                        false => Match::No,
                    },
                };
                best = best.max(matched);
                if best == Match::Yes {
                    return best;
                }
            }
        }
        best
    }

    fn is_selected(&self, selected: Selected, peer: PodId, own: NamespaceId) -> bool {
        let namespace = self.namespace_id(peer);
        let memo = &*self.memo;
        let pods = |selector| {
            let set = self.inventory.pod_labels[peer as usize];
            memo.matches(selector, set, || &self.pod(peer).labels)
        };
        let namespaces = |selector| {
            let set = self.namespace_labels[namespace as usize];
            memo.matches(selector, set, || &self.namespace_of(peer).labels)
        };
        match selected {
            Selected::Own(selector) => namespace == own && pods(selector),
            Selected::In(selector) => namespaces(selector),
            Selected::Both(of, selector) => namespaces(of) && pods(selector),
            Selected::Block(_) => false,
        }
    }
}
