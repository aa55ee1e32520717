//! How a report looks.

use serde_json::{Value, json};

use super::report::{Group, Report};
use crate::answer::origin::clock;
use crate::policy::proposal::Effect;

/// As people read it. Its names are as the objects say them: to be cleaned before a terminal.
pub fn text(report: &Report) -> String {
    let of = |effect| report.groups.iter().filter(move |g| g.effect == effect);
    let (flows, connections) = report.checked;
    let seen = format!(
        "{} ({})",
        counted(connections, "connection", "connections"),
        counted(flows, "flow", "flows")
    );
    let mut text = match (flows, report.groups.is_empty()) {
        (0, _) if report.unknown.0 > 0 => format!(
            "None of {} that were seen could be judged: whether these policies would break one is \
             not known.\n",
            counted(report.unknown.0, "connection", "connections")
        ),
        (0, _) => "No connection was seen: whether these policies would break one is not known. \
                   They are not safe for that.\n"
            .to_owned(),
        (_, true) => format!("None of {seen} that were seen would be denied.\n"),
        (_, false) => {
            let pairs = |n| counted(n, "pair of workloads", "pairs of workloads");
            let denied = pairs(of(Effect::Denied).count() as u64);
            let open = match of(Effect::Open).count() as u64 {
                0 => String::new(),
                n => format!(", and those of {} may be, depending on the CNI", pairs(n)),
            };
            format!("Connections of {denied} would be denied that policies allow now{open}.\n")
        }
    };
    for group in &report.groups {
        text += &one(group);
    }
    text += "\n";
    if !report.nodes.is_empty() {
        let nodes = report.nodes.iter().map(|node| match node.is_read() {
            true => format!("{} at {}", node.node, clock(node.time)),
            false => format!("{} (conntrack: {})", node.node, node.conntrack),
        });
        let nodes: Vec<String> = nodes.collect();
        text += &format!("checked: {seen} of {}\n", nodes.join(", "));
    }
    text += &format!("pods and policies {}\n", report.ground.origin);
    for note in notes(report) {
        text += &format!("note: {note}\n");
    }
    text
}

fn counted(n: u64, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

fn one(group: &Group) -> String {
    let port = group
        .port
        .map_or_else(String::new, |port| format!(" {port}"));
    let mut counts = Vec::new();
    if group.connections > 0 || group.failed == 0 {
        counts.push(counted(group.connections, "connection", "connections"));
    }
    if group.failed > 0 {
        counts.push(counted(
            group.failed,
            "packet or attempt that failed",
            "packets or attempts that failed",
        ));
    }
    let mut text = format!(
        "\n{} → {}  {}{port}: {} of {}\n",
        group.source,
        group.destination,
        group.protocol,
        counts.join(", "),
        counted(group.pairs, "pair of pods", "pairs of pods"),
    );
    let examples = group.examples.iter();
    let examples: Vec<String> = examples.map(|(a, b)| format!("{a} → {b}")).collect();
    text += &format!("  as {}\n", examples.join(", "));
    let would = match group.effect {
        Effect::Denied => "would be denied by",
        _ => "would depend on the CNI, by",
    };
    for side in &group.sides {
        let policies = side.policies.join(", ");
        text += &format!("  {} {would} {policies}\n", side.direction);
    }
    for (code, message) in &group.findings {
        text += &format!("  {code}: {message}\n");
    }
    text
}

fn notes(report: &Report) -> Vec<String> {
    let mut notes = report.notes.clone();
    let (unknown, ends) = report.unknown;
    if unknown > 0 {
        notes.push(format!(
            "not judged, because the objects do not hold an end of it: {}, as of {}",
            counted(unknown, "connection", "connections"),
            ends.join(", ")
        ));
    }
    if report.denied_already > 0 {
        notes.push(format!(
            "policies deny now already {} that are there all the same: older than their policy, of \
             objects that are not up to date, or enforced by nobody",
            counted(report.denied_already, "connection", "connections")
        ));
    }
    let left_out: u64 = report.nodes.iter().map(|node| node.left_out).sum();
    if left_out > 0 {
        let left_out = counted(left_out, "connection", "connections");
        notes.push(format!("no room in the agents' answers for {left_out}"));
    }
    for why in report.ground.missing.sentences() {
        notes.push(why.to_owned());
    }
    notes.extend(report.ground.skipped.iter().cloned());
    notes
}

/// As scripts get it.
pub fn json(report: &Report) -> Value {
    let of = |effect| {
        let groups = report.groups.iter().filter(move |g| g.effect == effect);
        groups.map(group_json).collect::<Vec<Value>>()
    };
    json!({
        "denied": of(Effect::Denied),
        "undefined": of(Effect::Open),
        "proposed": report.proposed,
        "checked": {
            "flows": report.checked.0,
            "connections": report.checked.1,
            "denied_already": report.denied_already,
            "not_judged": report.unknown.0,
            "nodes": report.nodes,
        },
        "objects": report.ground.origin,
        "notes": notes(report),
    })
}

fn group_json(group: &Group) -> Value {
    let examples = group.examples.iter();
    let examples = examples.map(|(source, to)| json!({"source": source, "destination": to}));
    let sides = group
        .sides
        .iter()
        .map(|side| json!({"direction": side.direction.as_str(), "policies": side.policies}));
    let findings = group.findings.iter();
    let findings = findings.map(|(code, message)| json!({"code": code, "message": message}));
    json!({
        "source": group.source,
        "destination": group.destination,
        "protocol": group.protocol,
        "port": group.port,
        "connections": group.connections,
        "failed": group.failed,
        "pairs": group.pairs,
        "examples": examples.collect::<Vec<_>>(),
        "sides": sides.collect::<Vec<_>>(),
        "findings": findings.collect::<Vec<_>>(),
    })
}
