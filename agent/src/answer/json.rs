//! The answer as scripts get it.

use serde_json::{Value, json};

use super::Answer;
use super::because::because;
use crate::policy::evaluate::{End, Flow, Judgement, Match, RuleResult, Who};
use crate::policy::failure::Failure;
use crate::policy::findings::{Finding, name};
use crate::policy::model::Direction;
use crate::policy::near;
use crate::policy::tier::decide::TierResult;
use crate::policy::world::World;

/// The answer as scripts get it.
pub fn of(answer: &Answer) -> Value {
    let (flow, world) = (&answer.flow, &*answer.ground.world);
    let mut value = json!({
        "allowed": answer.allowed(),
        "source": end(world, flow.source),
        "destination": end(world, flow.destination),
        "protocol": flow.protocol,
        "port": flow.port,
        "egress": side(world, flow, &answer.egress),
        "ingress": side(world, flow, &answer.ingress),
        "findings": answer.findings.iter().map(finding).collect::<Vec<_>>(),
        "observed": answer.observed,
        "objects": answer.ground.origin,
    });
    if let Some(service) = &answer.service {
        value["service"] = json!(service);
        let backends = answer.backends.iter().map(|(target, verdict)| {
            json!({"backend": name(world, target.end), "port": target.port,
                   "verdict": verdict.as_str()})
        });
        value["backends"] = backends.collect();
    }
    let ground = answer.ground;
    let missing = ground.missing.sentences().map(str::to_owned).collect();
    for (field, list) in [
        ("notes", &answer.notes),
        ("skipped", &ground.skipped),
        ("missing", &missing),
    ] {
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
