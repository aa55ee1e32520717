//! What is missing, in the real names, with fixes that are proven.

use std::sync::Arc;

use jiff::Timestamp;

use super::aws::aws_port_limit;
use super::beside::{beside, host_network, not_enforcing, not_policy, transient};
use super::evaluate::{Because, End, Flow, Judgement, Verdict, Who};
use super::fix::{self, Candidate, Fix};
use super::model::{Direction, NetworkPolicy, PortItem};
use super::world::World;
use super::{dns, near, tier};
use crate::event::{DropSite, Protocol};

/// What is known of a flow beside the objects.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// When a packet of it was dropped.
    pub at: Option<Timestamp>,
    /// Where.
    pub site: Option<DropSite>,
    /// Do without fixes: to judge many flows.
    pub no_fixes: bool,
}

/// One thing that is missing or in the way.
#[derive(Clone, Debug)]
pub struct Finding {
    /// A stable code.
    pub code: &'static str,
    /// The side that it is about.
    pub direction: Option<Direction>,
    /// The sentence with the real names.
    pub message: String,
    /// What mends it, the smallest first; none that is not proven.
    pub fixes: Vec<Fix>,
}

/// A finding whose fixes are not proven yet.
pub(super) struct Draft {
    pub(super) code: &'static str,
    pub(super) message: String,
    pub(super) candidates: Vec<Candidate>,
}

impl Draft {
    pub(super) fn new(code: &'static str, message: String) -> Self {
        Self {
            code,
            message,
            candidates: Vec::new(),
        }
    }
}

/// All findings of a flow, those that explain a denial first.
pub fn findings(
    world: &World,
    flow: &Flow,
    egress: &Judgement,
    ingress: &Judgement,
    context: &Context,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(message) = transient(world, flow, [egress, ingress], context) {
        findings.push(plain("transient", None, message));
    }
    // Where both sides deny, a fix of one is only good with one of the other: those of the second
    // are proven in the world that the first made.
    let mut base = world.clone();
    let mut denied = Vec::new();
    for side in [egress, ingress] {
        if side.verdict != Verdict::Deny {
            continue;
        }
        let of_side = of_denial(world, &base, flow, side, context);
        let best = of_side.iter().flat_map(|f| &f.fixes).next();
        if let Some(best) = best {
            base = base.with(&best.change);
        }
        denied.extend(of_side);
    }
    if !context.no_fixes && base.both(flow) != Verdict::Allow {
        // What remains is denied or undefined all the same.
        for finding in &mut denied {
            finding.fixes.clear();
        }
    }
    findings.extend(denied);
    for side in [egress, ingress] {
        findings.extend(beside(world, flow, side));
    }
    findings.extend(host_network(world, flow));
    findings.extend(not_enforcing(world, [egress, ingress]));
    if egress.verdict.and(ingress.verdict) != Verdict::Deny {
        findings.extend(aws_port_limit(world, flow, [egress, ingress], context));
        if egress.verdict != Verdict::Undefined && ingress.verdict != Verdict::Undefined {
            findings.push(not_policy(egress, ingress, context));
        }
    }
    findings
}

pub(super) fn plain(code: &'static str, direction: Option<Direction>, message: String) -> Finding {
    Finding {
        code,
        direction,
        message,
        fixes: Vec::new(),
    }
}

/// Why one side denies.
fn of_denial(
    world: &World,
    base: &World,
    flow: &Flow,
    side: &Judgement,
    context: &Context,
) -> Vec<Finding> {
    let by_tier = match side.because {
        Because::Tier(tier) => Some(tier::findings::denied(world, flow, side, tier)),
        _ => None,
    };
    let may_add = by_tier.is_none();
    let drafts = by_tier.unwrap_or_else(|| {
        let mut drafts = Vec::new();
        drafts.extend(missing_dns(world, flow, side));
        drafts.extend(near::misses(world, flow, side));
        drafts.extend(types_implied(side));
        drafts.extend(types_inert(world, flow, side));
        if drafts.is_empty() {
            drafts.push(no_rule(world, flow, side));
        }
        drafts
    });
    let finish = |draft: Draft| Finding {
        code: draft.code,
        direction: Some(side.direction),
        message: draft.message,
        fixes: match context.no_fixes {
            true => Vec::new(),
            false => fix::prove(base, flow, side.direction, draft.candidates),
        },
    };
    let mut findings: Vec<Finding> = drafts.into_iter().map(finish).collect();
    let is_general = |f: &Finding| f.code == "no-ingress-rule" || f.code == "no-egress-rule";
    if may_add
        && !context.no_fixes
        && findings.iter().all(|f| f.fixes.is_empty())
        && !findings.iter().any(is_general)
    {
        findings.push(finish(no_rule(world, flow, side)));
    }
    // The first one's code is what metrics carry: those with a fix come first, the smallest of it
    // before others.
    findings.sort_by_key(|f| f.fixes.is_empty());
    findings
}

/// `shop/web`, `node node-a`, an address.
pub fn name(world: &World, end: End) -> String {
    match end.who {
        Who::Pod(id) => {
            let key = &world.pod(id).key;
            format!("{}/{}", key.namespace, key.name)
        }
        Who::Node(id) => format!("node {}", world.node(id).key.name),
        Who::Outside => end.ip.map_or_else(|| "?".to_owned(), |ip| ip.to_string()),
    }
}

/// `db/a and db/b`.
pub fn names(policies: &[&Arc<NetworkPolicy>]) -> String {
    let names: Vec<String> = policies.iter().map(|p| p.full_name()).collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => String::new(),
    }
}

/// `TCP 5432`.
pub fn port(flow: &Flow) -> String {
    match flow.port {
        Some(port) => format!("{} {port}", flow.protocol),
        None if flow.protocol.has_ports() => format!("every {} port", flow.protocol),
        None => flow.protocol.to_string(),
    }
}

/// The two ends as a side sees them: subject, peer.
pub(super) fn ends(flow: &Flow, direction: Direction) -> (End, End) {
    match direction {
        Direction::Ingress => (flow.destination, flow.source),
        Direction::Egress => (flow.source, flow.destination),
    }
}

fn missing_dns(world: &World, flow: &Flow, side: &Judgement) -> Option<Draft> {
    if side.direction != Direction::Egress || !dns::is_query(world, flow) {
        return None;
    }
    let (subject, server) = ends(flow, Direction::Egress);
    let ports: Box<[_]> = dns_ports(flow).into();
    let mut draft = Draft::new(
        "missing-dns-egress",
        format!(
            "egress of {} is isolated by {}, and no rule lets it ask the cluster's DNS ({}, {}): \
             every name look-up fails, whatever else is allowed",
            name(world, subject),
            names(&side.policies),
            name(world, server),
            port(flow),
        ),
    );
    for policy in &side.policies {
        let rule = super::model::Rule {
            peers: fix::peers(world, server, &policy.namespace).into(),
            ports: ports.clone(),
        };
        if !rule.peers.is_empty() {
            draft.candidates.push(Candidate {
                title: format!(
                    "let what {} selects ask the cluster's DNS",
                    policy.full_name()
                ),
                change: fix::with_rule(policy, Direction::Egress, rule),
            });
        }
    }
    Some(draft)
}

/// What a client of DNS needs: port 53, and the one that it leads to.
pub(super) fn dns_ports(flow: &Flow) -> Vec<PortItem> {
    let mut numbers = vec![dns::PORT];
    numbers.extend(flow.port.filter(|port| *port != dns::PORT));
    let ports = numbers.iter().flat_map(|number| {
        [Protocol::UDP, Protocol::TCP].map(|protocol| {
            fix::port(&Flow {
                protocol,
                port: Some(*number),
                ..*flow
            })
        })
    });
    ports.collect()
}

/// Nothing comes close: the smallest rule that admits this flow.
fn no_rule(world: &World, flow: &Flow, side: &Judgement) -> Draft {
    let (subject, peer) = ends(flow, side.direction);
    let (code, admits) = match side.direction {
        Direction::Ingress => ("no-ingress-rule", "admits"),
        Direction::Egress => ("no-egress-rule", "lets it reach"),
    };
    let why = near::closest(world, flow, side);
    let mut draft = Draft::new(
        code,
        format!(
            "{} of {} is isolated by {}, and no rule {admits} {} on {}{why}",
            side.direction,
            name(world, subject),
            names(&side.policies),
            name(world, peer),
            port(flow),
        ),
    );
    for policy in &side.policies {
        let peers = fix::peers(world, peer, &policy.namespace);
        if !peers.is_empty() {
            let rule = super::model::Rule {
                peers: peers.into(),
                ports: [fix::port(flow)].into(),
            };
            draft.candidates.push(Candidate {
                title: format!("add a rule to {}", policy.full_name()),
                change: fix::with_rule(policy, side.direction, rule),
            });
        }
    }
    draft
}

fn types_implied(side: &Judgement) -> Option<Draft> {
    if side.direction != Direction::Ingress {
        return None;
    }
    let implied = side.policies.iter().find(|policy| {
        policy.types_omitted && !policy.egress.rules.is_empty() && policy.ingress.rules.is_empty()
    })?;
    let policy = implied.full_name();
    let mut draft = Draft::new(
        "policy-types-implied",
        format!(
            "{policy} names no policyTypes and has egress rules only, so it isolates ingress as \
             well and admits nobody"
        ),
    );
    draft.candidates.push(Candidate {
        title: format!("say in {policy} that it is for egress only"),
        change: fix::changed(implied, |policy| policy.ingress.isolates = false),
    });
    Some(draft)
}

/// A policy's rules for a direction that its types leave out.
fn types_inert(world: &World, flow: &Flow, side: &Judgement) -> Vec<Draft> {
    let (subject, _) = ends(flow, side.direction);
    let drafts = inert(world, subject, side.direction).map(|policy| {
        let mut draft = Draft::new("policy-types-inert", inert_message(policy, side.direction));
        draft.candidates.push(Candidate {
            title: format!("add the type to {}", policy.full_name()),
            change: fix::changed(policy, |policy| {
                policy.side_mut(side.direction).isolates = true;
            }),
        });
        draft
    });
    drafts.collect()
}

pub(super) fn inert(
    world: &World,
    subject: End,
    direction: Direction,
) -> impl Iterator<Item = &Arc<NetworkPolicy>> {
    let pod = match subject.who {
        Who::Pod(id) => Some(world.pod(id)),
        _ => None,
    };
    let policies = pod.into_iter().flat_map(move |pod| {
        let of_namespace = world.policies_of(&pod.key.namespace).iter();
        of_namespace.filter(|policy| policy.pod_selector.matches(&pod.labels))
    });
    policies.filter(move |policy| {
        let side = policy.side(direction);
        !side.isolates && !side.rules.is_empty()
    })
}

pub(super) fn inert_message(policy: &NetworkPolicy, direction: Direction) -> String {
    format!(
        "{} has {direction} rules, but its policyTypes leave out {}: these rules have no effect",
        policy.full_name(),
        direction.type_name(),
    )
}

#[cfg(test)]
#[path = "findings_tests.rs"]
mod tests;
