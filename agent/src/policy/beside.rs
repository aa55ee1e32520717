//! Findings beside the rules of NetworkPolicies: what is no denial, or no policy's, or passes.

use jiff::{SignedDuration, Timestamp};

use super::cni::{Enforcer, enforcer};
use super::evaluate::{Because, Flow, Judgement, Verdict, Who};
use super::findings::{Context, Finding, ends, inert, inert_message, name, names, plain};
use super::model::Direction;
use super::tier;
use super::world::World;

/// How long the rules of a new pod or policy may take to reach every node.
const PROPAGATION: SignedDuration = SignedDuration::from_secs(10);

/// What is worth knowing though it does not explain a denial.
pub(super) fn beside(world: &World, flow: &Flow, side: &Judgement) -> Vec<Finding> {
    let (subject, _) = ends(flow, side.direction);
    let mut findings = Vec::new();
    findings.extend(tier::findings::undefined(side));
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

pub(super) fn host_network(world: &World, flow: &Flow) -> Vec<Finding> {
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

pub(super) fn not_enforcing(world: &World, sides: [&Judgement; 2]) -> Option<Finding> {
    let side = sides.into_iter().find(|s| s.verdict == Verdict::Deny)?;
    let node = world.pod(side.subject?).node.clone()?;
    let tier = side.decided.and_then(|i| side.tiers.get(i));
    let policies = match tier {
        Some(result) => result.policy.full_name(),
        None => names(&side.policies),
    };
    (enforcer(world, &node) == Enforcer::NoneFound).then(|| {
        plain(
            "cni-not-enforcing",
            Some(side.direction),
            format!(
                "among the agents of node {node} is none that enforces NetworkPolicies: if that is \
                 all of them, {policies} has no effect there and did not cause a drop",
            ),
        )
    })
}

pub(super) fn transient(
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
    let tiers = sides.into_iter().flat_map(|side| &side.tiers);
    let tiers = tiers.map(|r| r.policy);
    let tiers = tiers.filter_map(|p| Some((p.full_name(), young(p.created)?)));
    let (what, age) = pods
        .chain(policies)
        .chain(tiers)
        .min_by_key(|(_, age)| *age)?;
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

pub(super) fn not_policy(egress: &Judgement, ingress: &Judgement, context: &Context) -> Finding {
    let isolated = !egress.policies.is_empty() || !ingress.policies.is_empty();
    let accepts = [egress, ingress].into_iter().find_map(|side| {
        let result = side.tiers.get(side.decided?)?;
        Some(format!("{} accepts it", result.name(side.direction)))
    });
    let why = accepts.unwrap_or_else(|| match isolated {
        false => "no NetworkPolicy isolates either end".to_owned(),
        true => "the NetworkPolicies allow it".to_owned(),
    });
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
