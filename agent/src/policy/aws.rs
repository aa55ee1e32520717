//! What the AWS VPC CNI drops though the policies allow it.

use std::sync::Arc;

use super::cni::{Enforcer, enforcer};
use super::evaluate::{Flow, Judgement};
use super::findings::{Context, Finding};
use super::fix::{self, Candidate};
use super::model::{Direction, NetworkPolicy, PortItem, PortMatch, Rule};
use super::world::World;
use crate::event::Protocol;

/// Past so many port entries for one selector and direction, the AWS VPC CNI drops what the
/// policies allow.
const MOST: usize = 24;

pub(super) fn aws_port_limit(
    world: &World,
    flow: &Flow,
    sides: [&Judgement; 2],
    context: &Context,
) -> Vec<Finding> {
    let site = context.site.as_ref();
    let at_tc = site.is_some_and(|site| {
        let on_eni = site
            .interface
            .as_ref()
            .is_some_and(|i| i.starts_with("eni"));
        on_eni && site.reason.as_ref().is_some_and(|r| r.starts_with("TC_"))
    });
    if !at_tc {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for side in sides {
        let Some(node) = side.subject.and_then(|id| world.pod(id).node.clone()) else {
            continue;
        };
        if enforcer(world, &node) != Enforcer::Found("AWS VPC CNI") {
            continue;
        }
        for policy in &side.policies {
            let rules = policy.side(side.direction).rules.iter();
            let most = rules.map(|rule| rule.ports.len()).max().unwrap_or(0);
            if most <= MOST {
                continue;
            }
            let candidate = joined(policy, side.direction);
            let candidates = candidate.into_iter().filter(|_| !context.no_fixes);
            findings.push(Finding {
                code: "aws-port-limit",
                direction: Some(side.direction),
                message: format!(
                    "{} has {most} port entries for one {} rule, and the AWS VPC CNI keeps {MOST} \
                     for a selector: join neighbouring ports with endPort, or split the rule",
                    policy.full_name(),
                    side.direction,
                ),
                fixes: fix::prove(world, flow, side.direction, candidates.collect()),
            });
        }
    }
    findings
}

/// The policy with neighbouring ports of each rule joined; `None` where that leaves too many. It
/// says the same as before: each port of each protocol is looked at.
fn joined(policy: &Arc<NetworkPolicy>, direction: Direction) -> Option<Candidate> {
    let mut new = NetworkPolicy::clone(policy);
    for rule in &mut new.side_mut(direction).rules {
        if rule.ports.len() > MOST {
            let joined: Box<[PortItem]> = join(&rule.ports).into();
            if joined.len() > MOST || !is_same(&rule.ports, &joined) {
                return None;
            }
            *rule = Rule {
                peers: rule.peers.clone(),
                ports: joined,
            };
        }
    }
    Some(Candidate {
        title: format!(
            "join neighbouring ports of {} with endPort; it allows the same as before",
            policy.full_name()
        ),
        change: super::world::Change::Policy(Arc::new(new)),
    })
}

fn join(ports: &[PortItem]) -> Vec<PortItem> {
    let mut joined: Vec<PortItem> = Vec::new();
    for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
        let own = || ports.iter().filter(|item| item.protocol == protocol);
        if let Some(every) = own().find(|item| item.port == PortMatch::Any) {
            joined.push(every.clone());
            continue;
        }
        let mut ranges: Vec<(u16, u16)> = own()
            .filter_map(|item| match item.port {
                PortMatch::Range(from, to) => Some((from, to)),
                PortMatch::Any | PortMatch::Named(_) => None,
            })
            .collect();
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (from, to) in ranges {
            match merged.last_mut() {
                Some((_, end)) if from <= end.saturating_add(1) => *end = to.max(*end),
                _ => merged.push((from, to)),
            }
        }
        joined.extend(merged.into_iter().map(|(from, to)| PortItem {
            protocol,
            port: PortMatch::Range(from, to),
        }));
        let named = own().filter(|item| matches!(item.port, PortMatch::Named(_)));
        for item in named {
            if !joined.contains(item) {
                joined.push(item.clone());
            }
        }
    }
    joined
}

/// Whether two lists allow the same ports by number, and the same names.
fn is_same(before: &[PortItem], after: &[PortItem]) -> bool {
    let allows = |items: &[PortItem], protocol: Protocol, port: u16| {
        items.iter().any(|item| {
            item.protocol == protocol
                && match item.port {
                    PortMatch::Any => true,
                    PortMatch::Range(from, to) => (from..=to).contains(&port),
                    PortMatch::Named(_) => false,
                }
        })
    };
    [Protocol::TCP, Protocol::UDP, Protocol::SCTP]
        .into_iter()
        .all(|protocol| {
            let every = |items: &[PortItem]| {
                let mut own = items.iter().filter(|item| item.protocol == protocol);
                own.any(|item| item.port == PortMatch::Any)
            };
            let names = before.iter().filter(|item| item.protocol == protocol);
            let mut names = names.filter(|item| matches!(item.port, PortMatch::Named(_)));
            (every(before) || names.all(|item| after.contains(item)))
                && (1..=u16::MAX)
                    .all(|port| allows(before, protocol, port) == allows(after, protocol, port))
        })
}
