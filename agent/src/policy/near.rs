//! Rules that almost matched: one kind of predicate failed, and one change mends it.

use std::collections::HashSet;
use std::sync::Arc;

use super::evaluate::{Flow, Judgement, Match, RuleResult, Who};
use super::failure::Failure;
use super::findings::{Draft, ends, name, port};
use super::fix::{self, Candidate, changed_rule};
use super::model::{Direction, Peer};
use super::selector::{Requirement, Selector, value};
use super::world::{Change, World};
use crate::cluster::objects::{Labels, Namespace};

/// How many rules are named at most: a policy may have hundreds.
const MOST: usize = 5;

/// The findings of the rules that came closest.
pub(super) fn misses(world: &World, flow: &Flow, side: &Judgement) -> Vec<Draft> {
    let mut results: Vec<&RuleResult> = side.rules.iter().collect();
    results.sort_by_key(|result| result.failures.len());
    let mut said = HashSet::new();
    let drafts = results.into_iter().filter_map(|result| {
        let draft = miss(world, flow, side.direction, result)?;
        said.insert(draft.message.clone()).then_some(draft)
    });
    drafts.take(MOST).collect()
}

fn miss(world: &World, flow: &Flow, direction: Direction, result: &RuleResult) -> Option<Draft> {
    let rule = result.rule?;
    let first = result.failures.first()?;
    match first {
        Failure::PeerNamespace(_) => namespace_label(world, flow, direction, result, rule),
        Failure::SameNamespaceOnly if result.failures.len() == 1 => {
            pod_selector_scope(world, flow, direction, result, rule)
        }
        Failure::Port | Failure::Protocol | Failure::NamedPortUnresolved(_) => {
            port_not_allowed(world, flow, direction, result, rule, first)
        }
        _ => None,
    }
}

/// `rule 2 of db/p`.
fn rule_name(result: &RuleResult, direction: Direction, rule: usize) -> String {
    format!(
        "{direction} rule {} of {}",
        rule + 1,
        result.policy.full_name()
    )
}

fn namespace_label(
    world: &World,
    flow: &Flow,
    direction: Direction,
    result: &RuleResult,
    rule: usize,
) -> Option<Draft> {
    let requirements = result.failures.iter().map(|failure| match failure {
        Failure::PeerNamespace(requirement) => Some(*requirement),
        _ => None,
    });
    let unmet: Vec<&Requirement> = requirements.collect::<Option<_>>()?;
    let (_, peer) = ends(flow, direction);
    let Who::Pod(id) = peer.who else {
        return None;
    };
    let namespace = world.namespace_of(id);
    let wanted: Vec<String> = unmet.iter().map(ToString::to_string).collect();
    let mut draft = Draft::new(
        "namespace-label-missing",
        format!(
            "{} asks for namespaces with {}, and namespace {} {}",
            rule_name(result, direction, rule),
            wanted.join(","),
            namespace.key.name,
            has(&namespace.labels, &unmet),
        ),
    );
    let pods = match result
        .policy
        .side(direction)
        .rules
        .get(rule)?
        .peers
        .get(result.peer?)?
    {
        Peer::PodsIn { pods, .. } => Some(pods.clone()),
        _ => None,
    };
    let own_name = fix::named([&*namespace.key.name]);
    draft.candidates.push(Candidate {
        title: format!(
            "admit namespace {} by its own name in {}",
            namespace.key.name,
            rule_name(result, direction, rule)
        ),
        change: changed_rule(result.policy, direction, rule, |rule| {
            let peer = match pods {
                Some(pods) => Peer::PodsIn {
                    namespaces: own_name,
                    pods,
                },
                None => Peer::Namespaces(own_name),
            };
            fix::push(&mut rule.peers, peer);
        }),
    });
    if let Some(labels) = labelled(&namespace.labels, &unmet) {
        draft.candidates.push(Candidate {
            title: format!(
                "give namespace {} the label {}",
                namespace.key.name,
                wanted.join(",")
            ),
            change: Change::Namespace(Arc::new(Namespace {
                key: namespace.key.clone(),
                labels,
            })),
        });
    }
    Some(draft)
}

/// What is there of the labels that are asked for.
fn has(labels: &Labels, unmet: &[&Requirement]) -> String {
    let parts: Vec<String> = unmet
        .iter()
        .map(|r| match value(labels, &r.key) {
            Some(value) => format!("has {}={value}", r.key),
            None => {
                let others: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
                format!("has no label {} (it has {})", r.key, others.join(", "))
            }
        })
        .collect();
    parts.join(" and ")
}

/// The labels with all that is asked for; `None` where something must not be there.
fn labelled(labels: &Labels, unmet: &[&Requirement]) -> Option<Labels> {
    let mut labels = labels.to_vec();
    for requirement in unmet {
        let wanted: Arc<str> = requirement.wanted_value()?.into();
        // A namespace is what it is called: the API server keeps that label as it is.
        if &*requirement.key == super::world::NAME_LABEL {
            return None;
        }
        match labels.binary_search_by(|(key, _)| key.cmp(&requirement.key)) {
            Ok(i) => labels[i].1 = wanted,
            Err(i) => labels.insert(i, (requirement.key.clone(), wanted)),
        }
    }
    Some(labels.into())
}

fn pod_selector_scope(
    world: &World,
    flow: &Flow,
    direction: Direction,
    result: &RuleResult,
    rule: usize,
) -> Option<Draft> {
    let (_, peer) = ends(flow, direction);
    let Who::Pod(id) = peer.who else {
        return None;
    };
    let theirs = world.pod(id).key.namespace.clone();
    let own = result.policy.namespace.clone();
    let at = result.peer?;
    let mut draft = Draft::new(
        "pod-selector-scope",
        format!(
            "{} matches the labels of {}, but a podSelector alone means pods of the policy's own \
             namespace {own}, and the peer is in {theirs}",
            rule_name(result, direction, rule),
            name(world, peer),
        ),
    );
    draft.candidates.push(Candidate {
        title: format!("add a namespaceSelector for {own} and {theirs} to the same item"),
        change: changed_rule(result.policy, direction, rule, |rule| {
            if let Some(item) = rule.peers.get_mut(at)
                && let Peer::Pods(pods) = item
            {
                *item = Peer::PodsIn {
                    namespaces: fix::named([&*own, &*theirs]),
                    pods: pods.clone(),
                };
            }
        }),
    });
    Some(draft)
}

fn port_not_allowed(
    world: &World,
    flow: &Flow,
    direction: Direction,
    result: &RuleResult,
    rule: usize,
    failure: &Failure,
) -> Option<Draft> {
    let items = &result.policy.side(direction).rules.get(rule)?.ports;
    let allowed: Vec<String> = items.iter().map(ToString::to_string).collect();
    let (_, peer) = ends(flow, direction);
    let what = format!(
        "{} matches {}, but not {}: it allows {}",
        rule_name(result, direction, rule),
        name(world, peer),
        port(flow),
        allowed.join(", "),
    );
    let mut draft = match failure {
        Failure::NamedPortUnresolved(wanted) => {
            let known = match flow.destination.who {
                Who::Pod(id) => {
                    let names = world.pod(id).port_names.iter();
                    names
                        .map(|(n, p)| format!("{n:?} = {} {}", p.protocol, p.port))
                        .collect()
                }
                _ => Vec::new(),
            };
            let known = match known.is_empty() {
                true => "no names for ports".to_owned(),
                false => known.join(", "),
            };
            let message = format!(
                "{what}; {} has no {} port called {wanted:?}, but {known}; kube-router allows \
                 every port where such a name is a rule's only port",
                name(world, flow.destination),
                flow.protocol,
            );
            Draft::new("named-port-unresolved", message)
        }
        _ => Draft::new("port-not-allowed", what),
    };
    draft.candidates.push(Candidate {
        title: format!(
            "add {} to {}",
            port(flow),
            rule_name(result, direction, rule)
        ),
        change: changed_rule(result.policy, direction, rule, |rule| {
            fix::push(&mut rule.ports, fix::port(flow));
        }),
    });
    Some(draft)
}

/// Why the rule that comes closest does not match, as the end of a sentence.
pub fn closest(world: &World, flow: &Flow, side: &Judgement) -> String {
    let rules = side.rules.iter().filter(|r| r.matched == Match::No);
    let Some(result) = rules.min_by_key(|r| r.failures.len()) else {
        return String::new();
    };
    let Some(rule) = result.rule else {
        let policy = result.policy.full_name();
        return format!(": {policy} has no {} rules", side.direction);
    };
    let reasons: Vec<String> = result
        .failures
        .iter()
        .map(|failure| sentence(world, flow, side.direction, failure))
        .collect();
    let rule = rule_name(result, side.direction, rule);
    format!("; closest is {rule}: {}", reasons.join(", "))
}

/// Why a predicate failed, with what is there instead.
pub fn sentence(world: &World, flow: &Flow, direction: Direction, failure: &Failure) -> String {
    let (_, peer) = ends(flow, direction);
    let labels = |labels: &Labels| match labels.is_empty() {
        true => "no labels".to_owned(),
        false => Selector::of_labels(labels.iter().map(|(k, v)| (&**k, &**v))).to_string(),
    };
    match (failure, peer.who) {
        (Failure::PeerNamespace(wanted), Who::Pod(id)) => {
            let namespace = world.namespace_of(id);
            let has = has(&namespace.labels, &[*wanted]);
            format!(
                "it asks for namespaces with {wanted}, {} {has}",
                namespace.key.name
            )
        }
        (Failure::PeerPod(wanted), Who::Pod(id)) => {
            let has = labels(&world.pod(id).labels);
            format!(
                "it asks for pods with {wanted}, {} has {has}",
                name(world, peer)
            )
        }
        (Failure::SameNamespaceOnly, _) => "it means pods of its own namespace".to_owned(),
        (Failure::PeerExternal, _) => {
            format!(
                "selectors match pods only, and {} is none",
                name(world, peer)
            )
        }
        (Failure::PeerHostNetwork, _) => {
            format!(
                "selectors match pods of the pod network, and {} is a node to them",
                name(world, peer)
            )
        }
        (Failure::CidrMiss(net), _) => format!("{} is not in {net}", name(world, peer)),
        (Failure::CidrExcept(net), _) => format!("{} is excepted by {net}", name(world, peer)),
        (Failure::Protocol, _) => format!("its ports are not {}", flow.protocol),
        (Failure::Port, _) => format!("its ports do not include {}", port(flow)),
        (Failure::NamedPortUnresolved(name), _) => {
            format!(
                "the destination has no {} port called {name:?}",
                flow.protocol
            )
        }
        (Failure::NotANode, _) => format!("it selects nodes, and {} is none", name(world, peer)),
        (Failure::PeerNode(wanted), _) => {
            format!(
                "it asks for nodes with {wanted}, unlike {}",
                name(world, peer)
            )
        }
        (Failure::NoRules, _) => "it has no rules".to_owned(),
        (Failure::ProtocolUndefined, _) => format!("{} is not defined", flow.protocol),
        (failure, _) => failure.code().to_owned(),
    }
}
