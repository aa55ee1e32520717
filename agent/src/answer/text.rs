//! The answer for people: the seven questions of a diagnosis, each with its evidence.

use super::Answer;
use super::because::because;
use crate::policy::cni::{Enforcer, enforcer};
use crate::policy::dns;
use crate::policy::evaluate::{Because, Judgement, Match, Verdict, Who};
use crate::policy::findings::{name, names, port};
use crate::policy::model::Direction;
use crate::policy::near;
use crate::policy::world::World;

/// The whole answer. Its names are as the objects say them: to be cleaned before a terminal.
pub fn of(answer: &Answer) -> String {
    let (flow, ground) = (&answer.flow, answer.ground);
    let world = &*ground.world;
    let (source, destination) = (name(world, flow.source), name(world, flow.destination));
    let verdict = match answer.allowed() {
        Some(true) => "ALLOWED",
        Some(false) => "DENIED",
        None if ground.missing.is_open(world, flow) => "UNDEFINED: objects are missing",
        None => "UNDEFINED: CNIs differ",
    };
    let mut text = format!("{source} → {destination}  {}", port(flow));
    if let Some(service) = &answer.service {
        text += &format!(" (svc {service})");
    }
    text += &format!(": {verdict}\n\n");
    for missing in ground.missing.sentences() {
        text += &format!("missing: {missing}\n");
    }
    let isolated = match &answer.ingress.policies[..] {
        [] if answer.ingress.because == Because::Missing => {
            format!("not known: {}", because(&answer.ingress))
        }
        [] => format!("no: {}", because(&answer.ingress)),
        policies => format!("yes, by {}", names(policies)),
    };
    let silent = match (&answer.observed, answer.allowed()) {
        (Some(observed), _) => observed.sentence(),
        (None, Some(true)) => {
            "not observed: no agent was asked; policies do not drop it".to_owned()
        }
        (None, _) => "not observed: no agent was asked; most CNIs drop silently, kube-router \
                      answers with an ICMP error"
            .to_owned(),
    };
    let questions = [
        ("silent or refused?", silent),
        ("is the destination isolated?", isolated),
        (
            "does ingress admit the source?",
            side(world, answer, &answer.ingress),
        ),
        (
            "does egress admit the destination?",
            side(world, answer, &answer.egress),
        ),
        ("is it DNS?", is_dns(world, answer)),
        ("which labels have the namespaces?", labels(world, answer)),
        ("policyTypes and CNI?", types(world, answer)),
    ];
    for (i, (question, answer)) in (1..).zip(&questions) {
        text += &format!("{i}. {question:<35} {answer}\n");
    }
    text += &format!("\npods and policies {}\n", ground.origin);
    backends(world, answer, &mut text);
    for note in answer.notes.iter().chain(&ground.skipped) {
        text += &format!("\nnote: {note}\n");
    }
    for finding in &answer.findings {
        text += &format!("\n{}: {}\n", finding.code, finding.message);
        for fix in &finding.fixes {
            text += &format!("\n  fix: {}\n", fix.title);
            text += &format!("  admits beside this: {}\n", fix.admits.sentence());
            if let Some(command) = &fix.command {
                text += &format!("  {command}\n");
            }
            for line in fix.yaml.lines() {
                text += &format!("    {line}\n");
            }
        }
    }
    text
}

fn side(world: &World, answer: &Answer, judgement: &Judgement) -> String {
    let mut text = match judgement.verdict {
        Verdict::Allow => "yes: ",
        Verdict::Deny => "no: ",
        Verdict::Undefined => "undefined: ",
        Verdict::NotApplicable => "not applicable: ",
    }
    .to_owned();
    let matched = judgement.rules.iter().find(|r| r.matched == Match::Yes);
    text += &match (judgement.verdict, matched) {
        _ if matches!(judgement.because, Because::Tier(_)) => {
            let decided = judgement.decided.and_then(|i| judgement.tiers.get(i));
            let Some(result) = decided else {
                return text + because(judgement);
            };
            let action = result.action.as_str(result.policy.kind);
            format!("{} says {action}", result.name(judgement.direction))
        }
        (Verdict::Allow, Some(result)) => {
            let rule = result.rule.map_or(0, |rule| rule + 1);
            format!("rule {rule} of {} matches", result.policy.full_name())
        }
        (Verdict::Deny, _) => {
            let why = near::closest(world, &answer.flow, judgement);
            let why = why.trim_start_matches([':', ';', ' ']);
            format!("{} isolates, {why}", names(&judgement.policies))
        }
        _ => because(judgement).to_owned(),
    };
    text
}

fn is_dns(world: &World, answer: &Answer) -> String {
    match (dns::is_query(world, &answer.flow), answer.flow.port) {
        (true, _) => "yes: the cluster's DNS".to_owned(),
        (false, Some(dns::PORT)) => "port 53, but no DNS pod of the cluster".to_owned(),
        (false, _) => "no".to_owned(),
    }
}

fn labels(world: &World, answer: &Answer) -> String {
    let mut parts: Vec<String> = Vec::new();
    for end in [answer.flow.source, answer.flow.destination] {
        let Who::Pod(id) = end.who else {
            continue;
        };
        let namespace = world.namespace_of(id);
        let pairs = namespace.labels.iter().map(|(k, v)| format!("{k}={v}"));
        let pairs: Vec<String> = pairs.collect();
        let part = format!("{}: {}", namespace.key.name, pairs.join(", "));
        if !parts.contains(&part) {
            parts.push(part);
        }
    }
    match parts.is_empty() {
        true => "neither end is a pod".to_owned(),
        false => parts.join("; "),
    }
}

fn types(world: &World, answer: &Answer) -> String {
    let mut parts: Vec<String> = Vec::new();
    for policy in answer
        .ingress
        .policies
        .iter()
        .chain(&answer.egress.policies)
    {
        let types = Direction::ALL
            .into_iter()
            .filter(|d| policy.side(*d).isolates);
        let types: Vec<&str> = types.map(Direction::type_name).collect();
        let derived = if policy.types_omitted {
            " (derived)"
        } else {
            ""
        };
        let part = format!("{} {}{derived}", policy.full_name(), types.join("+"));
        if !parts.contains(&part) {
            parts.push(part);
        }
    }
    if parts.is_empty() {
        parts.push("no policy".to_owned());
    }
    let subjects = [&answer.ingress, &answer.egress];
    let node = subjects
        .into_iter()
        .filter_map(|side| world.pod(side.subject?).node.as_deref())
        .next();
    let cni = match node.map(|node| enforcer(world, node)) {
        Some(Enforcer::Found(name)) => format!("{name} enforces"),
        Some(Enforcer::NoneFound) => "no enforcer among the node's agents".to_owned(),
        Some(Enforcer::Unknown) | None => "who enforces is not among the objects".to_owned(),
    };
    parts.push(cni);
    parts.join("; ")
}

fn backends(world: &World, answer: &Answer, text: &mut String) {
    let Some(service) = &answer.service else {
        return;
    };
    *text += &format!("\nbackends of svc {service}:\n");
    for (target, verdict) in &answer.backends {
        let port = target
            .port
            .map_or_else(String::new, |port| format!(":{port}"));
        *text += &format!(
            "  {:<15} {}{port}\n",
            verdict.as_str(),
            name(world, target.end)
        );
    }
}
