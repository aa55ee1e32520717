//! The answer to one question, and its JSON.

use serde_json::{Value, json};

use super::Asked;
use super::target::{self, Target};
use crate::policy::evaluate::{Because, End, Flow, Judgement, Match, RuleResult, Verdict, Who};
use crate::policy::failure::Failure;
use crate::policy::findings::{self, Context, Finding, name};
use crate::policy::model::Direction;
use crate::policy::near;
use crate::policy::tier::Tier;
use crate::policy::tier::decide::TierResult;
use crate::policy::world::World;

/// What policies say of a connection.
pub struct Answer<'w> {
    /// The connection; of a Service's backends the first that is denied.
    pub flow: Flow,
    /// What the source's policies say.
    pub egress: Judgement<'w>,
    /// What the destination's policies say.
    pub ingress: Judgement<'w>,
    /// What is missing.
    pub findings: Vec<Finding>,
    /// The Service that was asked for.
    pub service: Option<String>,
    /// Its backends, and what policies say of each.
    pub backends: Vec<(Target, Verdict)>,
    /// What is worth knowing about the ends.
    pub notes: Vec<String>,
    /// Objects that could not be used.
    pub skipped: Vec<String>,
}

impl Answer<'_> {
    /// Whether it is allowed: for a Service, to every backend; `None` where that is undefined.
    pub fn allowed(&self) -> Option<bool> {
        match self.egress.verdict.and(self.ingress.verdict) {
            Verdict::Allow | Verdict::NotApplicable => Some(true),
            Verdict::Deny => Some(false),
            Verdict::Undefined => None,
        }
    }
}

/// Answers a question; `fixes` are made where it is one, not many.
pub(super) fn answer<'w>(
    world: &'w World,
    asked: &Asked,
    fixes: bool,
) -> Result<Answer<'w>, String> {
    let mut notes = Vec::new();
    let source = target::source(world, &asked.src, &mut notes)?;
    let targets = target::destination(world, &asked.dst, asked.protocol, asked.port, &mut notes)?;
    let flow = |target: &Target| Flow {
        source,
        destination: target.end,
        protocol: asked.protocol,
        port: target.port,
    };
    let judged = targets.all.into_iter().map(|target| {
        let verdict = world.both(&flow(&target));
        (target, verdict)
    });
    let backends: Vec<(Target, Verdict)> = judged.collect();
    let worst = backends.iter().min_by_key(|(_, verdict)| match verdict {
        Verdict::Deny => 0,
        Verdict::Undefined => 1,
        Verdict::Allow | Verdict::NotApplicable => 2,
    });
    let Some((worst, _)) = worst else {
        return Err(format!("{}: leads nowhere", asked.dst));
    };
    let flow = flow(worst);
    let egress = world.judge(&flow, Direction::Egress);
    let ingress = world.judge(&flow, Direction::Ingress);
    for end in [flow.source, flow.destination] {
        if let Who::Pod(id) = end.who {
            let namespace = &world.pod(id).key.namespace;
            let note = format!(
                "namespace {namespace} is not among the objects: of its labels only its name is \
                 known"
            );
            if world.is_inferred(namespace) && !notes.contains(&note) {
                notes.push(note);
            }
        }
    }
    let context = Context {
        no_fixes: !fixes,
        ..Context::default()
    };
    let findings = findings::findings(world, &flow, &egress, &ingress, &context);
    Ok(Answer {
        flow,
        egress,
        ingress,
        findings,
        backends: match targets.service {
            Some(_) => backends,
            None => Vec::new(),
        },
        service: targets.service,
        notes,
        skipped: Vec::new(),
    })
}

/// The answer as scripts get it.
pub fn json(world: &World, answer: &Answer) -> Value {
    let flow = &answer.flow;
    let mut value = json!({
        "allowed": answer.allowed(),
        "source": end(world, flow.source),
        "destination": end(world, flow.destination),
        "protocol": flow.protocol,
        "port": flow.port,
        "egress": side(world, flow, &answer.egress),
        "ingress": side(world, flow, &answer.ingress),
        "findings": answer.findings.iter().map(finding).collect::<Vec<_>>(),
        "observed": null,
    });
    if let Some(service) = &answer.service {
        value["service"] = json!(service);
        let backends = answer.backends.iter().map(|(target, verdict)| {
            json!({"backend": name(world, target.end), "port": target.port,
                   "verdict": verdict.as_str()})
        });
        value["backends"] = backends.collect();
    }
    for (field, list) in [("notes", &answer.notes), ("skipped", &answer.skipped)] {
        if !list.is_empty() {
            value[field] = json!(list);
        }
    }
    value
}

fn end(world: &World, end: End) -> Value {
    let kind = match end.who {
        Who::Pod(_) => "pod",
        Who::Node(_) => "node",
        Who::Outside => match end.ip {
            Some(ip) if world.pod_ranges().any(|range| range.contains(&ip)) => "unknown",
            _ => "external",
        },
    };
    let mut value = json!({"kind": kind});
    if let Some(ip) = end.ip {
        value["ip"] = json!(ip);
    }
    match end.who {
        Who::Pod(id) => {
            let pod = world.pod(id);
            value["namespace"] = json!(pod.key.namespace);
            value["pod"] = json!(pod.key.name);
            if pod.host_network {
                value["kind"] = json!("node");
                value["host_network"] = json!(true);
            }
        }
        Who::Node(id) => value["node"] = json!(world.node(id).key.name),
        Who::Outside => {}
    }
    value
}

fn side(world: &World, flow: &Flow, judgement: &Judgement) -> Value {
    let policies = judgement.policies.iter().map(|p| p.full_name());
    let rules = judgement.rules.iter();
    let mut value = json!({
        "verdict": judgement.verdict.as_str(),
        "because": because(judgement),
        "policies": policies.collect::<Vec<_>>(),
        "rules": rules.map(|r| rule(world, flow, judgement, r)).collect::<Vec<_>>(),
    });
    if !judgement.tiers.is_empty() {
        let tiers = judgement.tiers.iter().enumerate();
        let tiers = tiers.map(|(i, result)| {
            let mut value = tier_rule(world, flow, judgement, result);
            if judgement.decided == Some(i) {
                value["decides"] = json!(true);
            }
            value
        });
        value["tiers"] = tiers.collect();
    }
    if let Some(port) = judgement.port {
        value["port"] = json!(port);
    }
    value
}

/// One rule of a tier, as it was asked.
fn tier_rule(world: &World, flow: &Flow, judgement: &Judgement, result: &TierResult) -> Value {
    let (policy, direction) = (result.policy, judgement.direction);
    let mut value = json!({
        "kind": policy.kind.as_str(),
        "policy": policy.name,
        "tier": policy.tier.as_str(),
        "rule": format!("spec.{direction}[{}]", result.rule),
        "action": result.action.as_str(policy.kind),
        "matched": matched(result.matched),
    });
    if let Some(priority) = policy.priority {
        value["priority"] = json!(priority);
    }
    let rule = &policy.rules(direction)[result.rule];
    if let Some(name) = &rule.name {
        value["name"] = json!(name);
    }
    failed(&mut value, world, flow, direction, &result.failures);
    value
}

fn matched(matched: Match) -> Value {
    match matched {
        Match::Yes => json!(true),
        Match::Maybe => Value::Null,
        Match::No => json!(false),
    }
}

fn failed(
    value: &mut Value,
    world: &World,
    flow: &Flow,
    direction: Direction,
    failures: &[Failure],
) {
    if let Some((first, others)) = failures.split_first() {
        value["failed"] = json!(first.code());
        value["reason"] = json!(near::sentence(world, flow, direction, first));
        if !others.is_empty() {
            value["also_failed"] = others.iter().map(|f| json!(f.code())).collect();
        }
    }
}

/// Why a side says so, in a few words.
pub fn because(judgement: &Judgement) -> &'static str {
    match judgement.because {
        Because::NotAPod => "this end is no pod",
        Because::HostNetwork => "this end is a host-network pod",
        Because::ToItself => "a pod may always talk to itself",
        Because::OwnNode => "the pod's own node is always allowed in",
        Because::NotIsolated => "no policy isolates the pod",
        Because::Rule => "a rule matches",
        Because::NoRule => "no rule matches",
        Because::BlockOnPod => {
            "only an ipBlock matches, and the peer is a pod: Cilium never matches those, others do"
        }
        Because::Protocol => "NetworkPolicy does not define this protocol",
        Because::Tier(Tier::Admin) => "a rule of the Admin tier decides, before NetworkPolicies",
        Because::Tier(Tier::Baseline) => {
            "no NetworkPolicy isolates the pod, and the Baseline tier decides"
        }
        Because::TierConflict => "policies of one tier and priority disagree, and either may count",
        Because::TierUnknown => {
            "whether a rule of a tier matches depends on the address, or on what DNS answers"
        }
    }
}

fn rule(world: &World, flow: &Flow, judgement: &Judgement, result: &RuleResult) -> Value {
    let direction = judgement.direction;
    let mut value = json!({
        "policy": result.policy.full_name(),
        "matched": matched(result.matched),
    });
    if let Some(rule) = result.rule {
        let mut path = format!("spec.{direction}[{rule}]");
        if let Some(peer) = result.peer {
            let field = match direction {
                Direction::Ingress => "from",
                Direction::Egress => "to",
            };
            path += &format!(".{field}[{peer}]");
        }
        value["rule"] = json!(path);
    }
    failed(&mut value, world, flow, direction, &result.failures);
    value
}

fn finding(finding: &Finding) -> Value {
    let mut value = json!({"code": finding.code, "message": finding.message});
    if let Some(direction) = finding.direction {
        value["direction"] = json!(direction.as_str());
    }
    if let Some(best) = finding.fixes.first() {
        value["fix"] = json!(best.yaml);
    }
    let fixes = finding.fixes.iter().map(|fix| {
        let admits = &fix.admits;
        let mut value = json!({
            "title": fix.title,
            "fix": fix.yaml,
            "also_admits": {
                "summary": admits.sentence(),
                "pods": admits.peers,
                "namespaces": admits.namespaces,
                "examples": admits.examples,
                "other_pods_selected": admits.subjects,
                "outside": admits.outside,
                "pods_newly_isolated": admits.isolates,
                "elsewhere": admits.elsewhere,
            },
        });
        if let Some(command) = &fix.command {
            value["command"] = json!(command);
        }
        value
    });
    let fixes: Vec<Value> = fixes.collect();
    if !fixes.is_empty() {
        value["fixes"] = json!(fixes);
    }
    value
}
