//! What is missing, in the real names, with fixes that are proven.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::cni::{Enforcer, enforcer};
use super::evaluate::{Because, End, Flow, Judgement, Verdict, Who};
use super::fix::{self, Candidate, Fix};
use super::model::{Direction, NetworkPolicy};
use super::world::World;
use super::{dns, near};
use crate::event::DropSite;

/// How long the rules of a new pod or policy may take to reach every node.
const PROPAGATION: SignedDuration = SignedDuration::from_secs(10);

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
        findings.extend(aws_port_limit(world, [egress, ingress], context));
        if egress.verdict != Verdict::Undefined && ingress.verdict != Verdict::Undefined {
            findings.push(not_policy(egress, ingress, context));
        }
    }
    findings
}

fn plain(code: &'static str, direction: Option<Direction>, message: String) -> Finding {
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
    let mut drafts = Vec::new();
    drafts.extend(missing_dns(world, flow, side));
    drafts.extend(near::misses(world, flow, side));
    drafts.extend(types_implied(side));
    drafts.extend(types_inert(world, flow, side));
    if drafts.is_empty() {
        drafts.push(no_rule(world, flow, side));
    }
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
    if !context.no_fixes
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
    let mut numbers = vec![dns::PORT];
    numbers.extend(flow.port.filter(|port| *port != dns::PORT));
    let ports = numbers.iter().flat_map(|number| {
        use crate::event::Protocol;
        [Protocol::UDP, Protocol::TCP].map(|protocol| {
            fix::port(&Flow {
                protocol,
                port: Some(*number),
                ..*flow
            })
        })
    });
    let ports: Box<[_]> = ports.collect();
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

fn inert(
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

fn inert_message(policy: &NetworkPolicy, direction: Direction) -> String {
    format!(
        "{} has {direction} rules, but its policyTypes leave out {}: these rules have no effect",
        policy.full_name(),
        direction.type_name(),
    )
}

/// What is worth knowing though it does not explain a denial.
fn beside(world: &World, flow: &Flow, side: &Judgement) -> Vec<Finding> {
    let (subject, _) = ends(flow, side.direction);
    let mut findings = Vec::new();
    if side.because == Because::Protocol {
        findings.push(plain(
            "icmp-undefined",
            Some(side.direction),
            format!(
                "{} of {} is isolated by {}, and NetworkPolicy does not define {}: kube-router \
                 passes echo and refuses timestamp, Cilium blocks it unless `icmps` allows it; \
                 where messages about a path's MTU die, large transfers hang",
                side.direction,
                name(world, subject),
                names(&side.policies),
                flow.protocol,
            ),
        ));
    }
    if side.verdict != Verdict::Deny {
        for policy in inert(world, subject, side.direction) {
            let message = inert_message(policy, side.direction);
            findings.push(plain("policy-types-inert", Some(side.direction), message));
        }
    }
    findings
}

fn host_network(world: &World, flow: &Flow) -> Vec<Finding> {
    let mut findings = Vec::new();
    for direction in Direction::ALL {
        let (subject, _) = ends(flow, direction);
        let Who::Pod(id) = subject.who else {
            continue;
        };
        let pod = world.pod(id);
        if !pod.host_network {
            continue;
        }
        let policies = world.policies_of(&pod.key.namespace).iter();
        let selecting: Vec<_> = policies
            .filter(|p| p.pod_selector.matches(&pod.labels))
            .collect();
        let inert = match selecting.is_empty() {
            true => String::new(),
            false => format!(
                ", so {} does not restrict it on most CNIs",
                names(&selecting)
            ),
        };
        findings.push(plain(
            "host-network",
            Some(direction),
            format!(
                "{} is on its node's network{inert}; to others it is its node, which selectors do \
                 not match: use an ipBlock of the node's address, or a rule on the node",
                name(world, subject),
            ),
        ));
    }
    findings
}

fn not_enforcing(world: &World, sides: [&Judgement; 2]) -> Option<Finding> {
    let side = sides.into_iter().find(|s| s.verdict == Verdict::Deny)?;
    let node = world.pod(side.subject?).node.clone()?;
    (enforcer(world, &node) == Enforcer::NoneFound).then(|| {
        plain(
            "cni-not-enforcing",
            Some(side.direction),
            format!(
                "among the agents of node {node} is none that enforces NetworkPolicies: if that is \
                 all of them, {} has no effect there and did not cause a drop",
                names(&side.policies),
            ),
        )
    })
}

/// Past so many port entries for one selector and direction, the AWS VPC CNI drops what the
/// policies allow.
const AWS_PORTS: usize = 24;

fn aws_port_limit(world: &World, sides: [&Judgement; 2], context: &Context) -> Vec<Finding> {
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
            let entries = policy.side(side.direction).rules.iter();
            let most = entries.map(|rule| rule.ports.len()).max().unwrap_or(0);
            if most > AWS_PORTS {
                findings.push(plain(
                    "aws-port-limit",
                    Some(side.direction),
                    format!(
                        "{} has {most} port entries for one {} rule, and the AWS VPC CNI keeps \
                         {AWS_PORTS} for a selector: join neighbouring ports with endPort",
                        policy.full_name(),
                        side.direction,
                    ),
                ));
            }
        }
    }
    findings
}

fn transient(
    world: &World,
    flow: &Flow,
    sides: [&Judgement; 2],
    context: &Context,
) -> Option<String> {
    let at = context.at?;
    let young = |since: Option<Timestamp>| {
        let age = at.duration_since(since?);
        (age >= SignedDuration::ZERO && age < PROPAGATION).then_some(age)
    };
    let pods = [flow.source, flow.destination]
        .into_iter()
        .filter_map(|end| match end.who {
            Who::Pod(id) => Some((name(world, end), young(world.pod(id).started)?)),
            _ => None,
        });
    let policies = sides.into_iter().flat_map(|side| &side.policies);
    let policies = policies.filter_map(|p| Some((p.full_name(), young(p.created)?)));
    let (what, age) = pods.chain(policies).min_by_key(|(_, age)| *age)?;
    Some(format!(
        "{what} was {:.1} s old when the packet was dropped: rules may not have reached every node \
         by then; wait, and see whether it goes on",
        age.as_secs_f64(),
    ))
}

/// Where else to look, by the kernel's reason.
const HINTS: [(&str, &str); 9] = [
    (
        "NEIGH_",
        "the next hop's MAC address could not be resolved: is it up?",
    ),
    (
        "IP_RPFILTER",
        "the reverse-path filter: the answer would leave by another device",
    ),
    ("IP_OUTNOROUTES", "there is no route"),
    ("IP_INNOROUTES", "there is no route"),
    ("PKT_TOO_BIG", "the packet is larger than the path's MTU"),
    ("NO_SOCKET", "nobody listens on this port"),
    ("TCP_LISTEN_OVERFLOW", "the listener's accept queue is full"),
    ("SOCKET_RCVBUFF", "the receiver's buffer is full"),
    (
        "NETFILTER_DROP",
        "a host firewall, a full conntrack table, or a Service without endpoints",
    ),
];

fn not_policy(egress: &Judgement, ingress: &Judgement, context: &Context) -> Finding {
    let isolated = !egress.policies.is_empty() || !ingress.policies.is_empty();
    let why = match isolated {
        false => "no NetworkPolicy isolates either end",
        true => "the NetworkPolicies allow it",
    };
    let reason = context
        .site
        .as_ref()
        .and_then(|site| site.reason.as_deref());
    let known = reason.and_then(|r| HINTS.iter().find(|(prefix, _)| r.starts_with(prefix)));
    let hint = match known {
        Some((_, hint)) => *hint,
        None => {
            "look at routes, neighbours, the MTU, reverse-path filters, conntrack, the listener's \
             queue and the Service's endpoints"
        }
    };
    plain("not-policy", None, format!("{why}: {hint}"))
}

#[cfg(test)]
#[path = "findings_tests.rs"]
mod tests;
