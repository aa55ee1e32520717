//! Fixes: changes of one object, made here, and shown only if evaluating the changed world proves
//! that they work. What else they let through is found in the same way.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::evaluate::{End, Flow, Verdict, Who};
use super::manifest;
use super::model::{Block, Direction, NetworkPolicy, Peer, PortItem, PortMatch, Rule};
use super::selector::Selector;
use super::tier::TierPeer;
use super::world::{Change, NAME_LABEL, PodId, World};
use crate::cluster::objects::{Labels, Pod};

/// How many of the newly admitted pods are listed by name.
const EXAMPLES: usize = 20;

/// A proven fix.
#[derive(Clone, Debug)]
pub struct Fix {
    /// What it does, in one sentence.
    pub title: String,
    /// For `kubectl apply -f -`.
    pub yaml: String,
    /// A command that does the same, where there is one.
    pub command: Option<String>,
    /// What it does, for evaluating it.
    pub change: Change,
    /// What it admits beside the flow.
    pub admits: Admits,
}

/// What a fix admits beside the flow that it is for, at the same port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admits {
    /// Other pods at the other end.
    pub peers: usize,
    /// The namespaces of these pods.
    pub namespaces: BTreeSet<Arc<str>>,
    /// The first of these pods, as `namespace/name`.
    pub examples: Vec<String>,
    /// Other pods at the subject's end, for the same peer.
    pub subjects: usize,
    /// Everybody outside of the cluster.
    pub outside: bool,
    /// Pods that no policy isolated before: what no rule allows them is denied from then on.
    pub isolates: usize,
    /// Rules of other policies that begin or cease to match.
    pub elsewhere: Vec<String>,
}

impl Admits {
    /// The smaller the better.
    fn size(&self) -> (bool, usize) {
        let rules = self.elsewhere.len();
        (
            self.outside,
            self.peers + self.subjects + self.isolates + rules,
        )
    }

    /// For people.
    pub fn sentence(&self) -> String {
        let mut parts = Vec::new();
        if self.outside {
            parts.push("everybody outside of the cluster".to_owned());
        }
        if self.peers > 0 {
            let names = self.examples.join(", ");
            let more = self.peers.saturating_sub(self.examples.len());
            let more = match more {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            let (pods, namespaces) = (self.peers, self.namespaces.len());
            parts.push(format!(
                "{} in {} ({names}{more})",
                plural(pods, "other pod"),
                plural(namespaces, "namespace")
            ));
        }
        if self.subjects > 0 {
            let pods = plural(self.subjects, "more pod");
            parts.push(format!("the same for {pods} that the policy selects"));
        }
        if self.isolates > 0 {
            let pods = plural(self.isolates, "pod");
            parts.push(format!(
                "and isolates {pods} that no policy isolated: what no rule allows is denied from \
                 then on"
            ));
        }
        parts.extend(self.elsewhere.iter().cloned());
        match parts.is_empty() {
            true => "nothing else".to_owned(),
            false => parts.join("; "),
        }
    }
}

fn plural(n: usize, what: &str) -> String {
    match n {
        1 => format!("1 {what}"),
        n => format!("{n} {what}s"),
    }
}

/// A change that might help.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) title: String,
    pub(super) change: Change,
}

/// The candidates that make `direction` allow the flow and no side worse, smallest first.
pub(super) fn prove(
    world: &World,
    flow: &Flow,
    direction: Direction,
    candidates: Vec<Candidate>,
) -> Vec<Fix> {
    let other = match direction {
        Direction::Ingress => Direction::Egress,
        Direction::Egress => Direction::Ingress,
    };
    let before = world.verdict(flow, other);
    let proven = candidates.into_iter().filter_map(|candidate| {
        let changed = world.with(&candidate.change);
        let works = changed.verdict(flow, direction) == Verdict::Allow
            && changed.verdict(flow, other) == before;
        if !works {
            return None;
        }
        let (value, command) = match &candidate.change {
            Change::Policy(policy) => (manifest::policy(policy), None),
            // None takes a policy away.
            Change::NoPolicy(..) => return None,
            Change::Tier(policy) => (super::tier::manifest::policy(policy), None),
            Change::Namespace(namespace) => {
                let old = world.pods().find_map(|(id, _)| {
                    let old = world.namespace_of(id);
                    (old.key == namespace.key).then_some(&old.labels)
                });
                let command = label_command(&namespace.key.name, old, &namespace.labels);
                (manifest::namespace(namespace), Some(command))
            }
        };
        Some(Fix {
            title: candidate.title,
            yaml: manifest::yaml(&value).ok()?,
            command,
            admits: admits(world, &changed, flow, direction, &candidate.change),
            change: candidate.change,
        })
    });
    let mut proven: Vec<Fix> = proven.collect();
    // Stable: of two that admit the same, the one that was preferred stays first.
    proven.sort_by_key(|fix| fix.admits.size());
    proven
}

fn label_command(name: &str, old: Option<&Labels>, new: &Labels) -> String {
    let changed = new
        .iter()
        .filter(|pair| old.is_none_or(|old| !old.contains(pair)) && &*pair.0 != NAME_LABEL);
    let pairs: Vec<String> = changed.map(|(k, v)| format!("{k}={v}")).collect();
    format!(
        "kubectl label namespace {name} {} --overwrite",
        pairs.join(" ")
    )
}

fn admits(
    before: &World,
    after: &World,
    flow: &Flow,
    direction: Direction,
    change: &Change,
) -> Admits {
    let mut admits = Admits::default();
    let newly = |flow: &Flow| {
        after.verdict(flow, direction) == Verdict::Allow
            && before.verdict(flow, direction) != Verdict::Allow
    };
    let (peer, subject) = match direction {
        Direction::Ingress => (flow.source, flow.destination),
        Direction::Egress => (flow.destination, flow.source),
    };
    let with = |new_peer: End, new_subject: End| match direction {
        Direction::Ingress => Flow {
            source: new_peer,
            destination: new_subject,
            ..*flow
        },
        Direction::Egress => Flow {
            source: new_subject,
            destination: new_peer,
            ..*flow
        },
    };
    for (id, pod) in before.pods().filter(|(_, pod)| !pod.ended) {
        let end = End::pod(id);
        if end.who != peer.who && newly(&with(end, subject)) {
            admits.peers += 1;
            admits.namespaces.insert(pod.key.namespace.clone());
            if admits.examples.len() < EXAMPLES {
                let name = format!("{}/{}", pod.key.namespace, pod.key.name);
                admits.examples.push(name);
            }
        }
        if end.who != subject.who && newly(&with(peer, end)) {
            admits.subjects += 1;
        }
        if matches!(change, Change::Policy(_)) && !pod.host_network {
            let newly_isolated = |direction| {
                before.isolating(id, direction).next().is_none()
                    && after.isolating(id, direction).next().is_some()
            };
            admits.isolates += usize::from(Direction::ALL.into_iter().any(newly_isolated));
        }
    }
    let nobody = End {
        who: Who::Outside,
        ip: None,
    };
    admits.outside = newly(&with(nobody, subject));
    if let Change::Namespace(namespace) = change {
        elsewhere(before, &namespace.key.name, &namespace.labels, &mut admits);
    }
    admits
}

/// The rules that new labels of a namespace make match, or match no more. One is what the label
/// is for.
fn elsewhere(before: &World, name: &str, new: &Labels, admits: &mut Admits) {
    let old = before
        .pods()
        .map(|(id, _)| before.namespace_of(id))
        .find(|namespace| *namespace.key.name == *name);
    let Some(old) = old else {
        return;
    };
    let mut gained = Vec::new();
    for policy in before.policies() {
        for direction in Direction::ALL {
            let side = policy.side(direction);
            for peer in side.rules.iter().flat_map(|rule| &rule.peers) {
                let (Peer::Namespaces(selector)
                | Peer::PodsIn {
                    namespaces: selector,
                    ..
                }) = peer
                else {
                    continue;
                };
                let name = policy.full_name();
                match (selector.matches(&old.labels), selector.matches(new)) {
                    (false, true) => gained.push(format!("{direction} rule of {name} matches too")),
                    (true, false) => admits
                        .elsewhere
                        .push(format!("{direction} rule of {name} matches no more")),
                    _ => {}
                }
            }
        }
    }
    admits.elsewhere.extend(gained.into_iter().skip(1));
    for policy in before.tiers() {
        let moves = |s: &Selector| s.matches(&old.labels) != s.matches(new);
        let rules = policy.ingress.iter().chain(&policy.egress);
        let in_rule = rules.flat_map(|rule| &rule.peers).any(|peer| match peer {
            TierPeer::Pods(set) => moves(&set.namespaces),
            TierPeer::Nodes(_) | TierPeer::Networks(_) | TierPeer::Domains(_) => false,
        });
        if in_rule || moves(&policy.subject.namespaces) {
            let name = policy.full_name();
            admits
                .elsewhere
                .push(format!("{name} looks at this label too"));
        }
    }
}

/// A policy with one thing changed.
pub(super) fn changed(
    policy: &Arc<NetworkPolicy>,
    change: impl FnOnce(&mut NetworkPolicy),
) -> Change {
    let mut new = NetworkPolicy::clone(policy);
    change(&mut new);
    Change::Policy(Arc::new(new))
}

/// A policy with one rule changed.
pub(super) fn changed_rule(
    policy: &Arc<NetworkPolicy>,
    direction: Direction,
    index: usize,
    change: impl FnOnce(&mut Rule),
) -> Change {
    changed(policy, |policy| {
        if let Some(rule) = policy.side_mut(direction).rules.get_mut(index) {
            change(rule);
        }
    })
}

/// A policy with one more rule.
pub(super) fn with_rule(policy: &Arc<NetworkPolicy>, direction: Direction, rule: Rule) -> Change {
    changed(policy, |policy| {
        let side = policy.side_mut(direction);
        push(&mut side.rules, rule);
    })
}

/// Appends to a boxed list.
pub(super) fn push<T>(list: &mut Box<[T]>, item: T) {
    let mut items = std::mem::take(list).into_vec();
    items.push(item);
    *list = items.into();
}

/// The smallest items that match an end, in a policy of `namespace`.
pub(super) fn peers(world: &World, end: End, namespace: &str) -> Vec<Peer> {
    match end.who {
        Who::Pod(id) if !world.pod(id).host_network => {
            let pod = world.pod(id);
            let pods = identity(world, pod);
            vec![match *pod.key.namespace == *namespace {
                true => Peer::Pods(pods),
                false => Peer::PodsIn {
                    namespaces: named([&*pod.key.namespace]),
                    pods,
                },
            }]
        }
        Who::Pod(id) => blocks(end.ip.as_slice(), &world.pod(id).ips),
        Who::Node(id) => blocks(end.ip.as_slice(), &world.node(id).ips),
        Who::Outside => blocks(end.ip.as_slice(), &[]),
    }
}

fn blocks(given: &[IpAddr], others: &[IpAddr]) -> Vec<Peer> {
    let ips = if given.is_empty() { others } else { given };
    let block = |ip: &IpAddr| {
        Peer::Block(Block {
            cidr: IpNet::from(*ip),
            except: Box::default(),
        })
    };
    ips.iter().map(block).collect()
}

/// Namespaces by the label that each has by itself.
pub(super) fn named<'a>(names: impl IntoIterator<Item = &'a str>) -> Selector {
    Selector::new([super::selector::Requirement {
        key: NAME_LABEL.into(),
        operator: super::selector::Operator::In,
        values: names.into_iter().map(Arc::from).collect(),
    }])
}

/// Labels that change with each rollout, or belong to one pod only.
const VOLATILE: [&str; 7] = [
    "pod-template-hash",
    "controller-revision-hash",
    "pod-template-generation",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    "controller-uid",
    "batch.kubernetes.io/controller-uid",
];

/// Labels that name an application, the most telling first.
const TELLING: [&str; 5] = [
    "app.kubernetes.io/name",
    "app",
    "k8s-app",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/component",
];

/// As few labels of a pod as select no more pods of its namespace than all of them do.
pub(super) fn identity(world: &World, pod: &Pod) -> Selector {
    let stable = pod
        .labels
        .iter()
        .filter(|(key, _)| !VOLATILE.contains(&&**key))
        .map(|(key, value)| (&**key, &**value));
    let mut stable: Vec<(&str, &str)> = stable.collect();
    stable.sort_by_key(|(key, _)| {
        TELLING
            .iter()
            .position(|t| t == key)
            .unwrap_or(TELLING.len())
    });
    let select = |labels: &[(&str, &str)]| {
        let selector = Selector::of_labels(labels.iter().copied());
        let selected = world.pods().filter(|(_, other)| {
            other.key.namespace == pod.key.namespace && selector.matches(&other.labels)
        });
        (selected.map(|(id, _)| id).collect::<Vec<PodId>>(), selector)
    };
    let (all, whole) = select(&stable);
    let fewer = (1..stable.len()).map(|n| select(&stable[..n]));
    fewer
        .into_iter()
        .find(|(selected, _)| *selected == all)
        .map_or(whole, |(_, selector)| selector)
}

/// The item that a flow's port needs.
pub(super) fn port(flow: &Flow) -> PortItem {
    PortItem {
        protocol: flow.protocol,
        port: flow
            .port
            .map_or(PortMatch::Any, |port| PortMatch::Range(port, port)),
    }
}
