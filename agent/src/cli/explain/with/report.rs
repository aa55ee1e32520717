//! What proposed policies would do to the connections that are there, by pair of workloads.

use std::collections::{BTreeMap, BTreeSet};

use super::proposal::Proposed;
use super::seen::SeenBy;
use crate::answer::Ground;
use crate::connections::{Seen, Summary};
use crate::event::Protocol;
use crate::policy::evaluate::{End, Flow, Judgement, Verdict, Who};
use crate::policy::findings::{self, Context, name};
use crate::policy::model::Direction;
use crate::policy::proposal::{Effect, effect};
use crate::policy::world::World;

/// Pairs of pods that are shown of a pair of workloads.
const EXAMPLES: usize = 3;
/// Findings that are shown of one.
const FINDINGS: usize = 3;

/// The report.
pub struct Report<'a> {
    /// What would be denied, or may be; the certain and the largest first.
    pub groups: Vec<Group>,
    /// What is proposed.
    pub proposed: &'a [String],
    /// What the objects are.
    pub ground: &'a Ground,
    /// What each node looked at.
    pub nodes: &'a [Summary],
    /// Flows and connections that were judged.
    pub checked: (u64, u64),
    /// Connections that policies deny already, and that are there all the same.
    pub denied_already: u64,
    /// Connections that could not be judged, and some of their ends.
    pub unknown: (u64, &'a [String]),
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// Connections of one pair of workloads, to one port.
#[derive(Debug)]
pub struct Group {
    /// What would become of them.
    pub effect: Effect,
    /// Who connects.
    pub source: String,
    /// To whom.
    pub destination: String,
    /// How.
    pub protocol: Protocol,
    /// To which port.
    pub port: Option<u16>,
    /// Connections that are there.
    pub connections: u64,
    /// Packets and attempts that failed lately, and that policies allow.
    pub failed: u64,
    /// Pairs of pods.
    pub pairs: u64,
    /// Some of them.
    pub examples: Vec<(String, String)>,
    /// The sides that would deny the first of them.
    pub sides: Vec<Side>,
    /// What is missing there: code and message.
    pub findings: Vec<(String, String)>,
}

/// One side that would deny it.
#[derive(Debug)]
pub struct Side {
    /// Which.
    pub direction: Direction,
    /// The policies.
    pub policies: Vec<String>,
}

/// What connections are listed by.
type Pair = (Effect, String, String, Protocol, Option<u16>);

impl<'a> Report<'a> {
    /// Lays a proposal against what was seen.
    pub fn of(ground: &'a Ground, proposed: &'a Proposed, seen: &'a SeenBy) -> Self {
        let now = &*ground.world;
        let then = proposed.proposal.applied_to(now);
        let mut groups: BTreeMap<Pair, (Group, BTreeSet<(String, String)>)> = BTreeMap::new();
        let (mut checked, mut denied_already) = ((0, 0), 0);
        for (flow, seen, count) in seen.flows() {
            checked.0 += 1;
            if seen == Seen::Answered {
                checked.1 += count;
            }
            let effect = effect(now, &then, flow);
            match effect {
                Effect::None => continue,
                Effect::DeniedAlready => {
                    if seen == Seen::Answered {
                        denied_already += count;
                    }
                    continue;
                }
                Effect::Denied | Effect::Open => {}
            }
            let ends = [flow.source, flow.destination].map(|end| workload(now, end));
            let [source, destination] = ends;
            let pair = (effect, source, destination, flow.protocol, flow.port);
            let (group, pairs) = groups
                .entry(pair)
                .or_insert_with_key(|pair| (group(&then, flow, pair), BTreeSet::new()));
            match seen {
                Seen::Answered => group.connections += count,
                Seen::Dropped | Seen::Rejected | Seen::Unanswered => group.failed += count,
            }
            pairs.insert((name(now, flow.source), name(now, flow.destination)));
        }
        let groups = groups.into_values().map(|(mut group, pairs)| {
            group.pairs = pairs.len() as u64;
            group.examples = pairs.into_iter().take(EXAMPLES).collect();
            group
        });
        let mut groups: Vec<Group> = groups.collect();
        groups.sort_by_key(|g| (g.effect, std::cmp::Reverse(g.connections)));
        let mut notes = Vec::new();
        for namespace in proposed.proposal.unknown_namespaces(now) {
            notes.push(format!(
                "namespace {namespace} is not among the objects: no pod is there that a policy of \
                 it would select"
            ));
        }
        if proposed.others > 0 {
            notes.push(format!(
                "{} objects of --with are no policies and were left out",
                proposed.others
            ));
        }
        Self {
            groups,
            proposed: &proposed.names,
            ground,
            nodes: &seen.nodes,
            checked,
            denied_already,
            unknown: (seen.unknown, &seen.unknown_ends),
            notes,
        }
    }

    /// Nothing was judged, because nobody could look or the objects hold no end of what was seen.
    pub fn is_blind(&self) -> bool {
        let could_not = self.nodes.iter().any(|node| !node.is_read());
        self.checked.0 == 0 && (could_not || self.unknown.0 > 0)
    }
}

/// A group by its first flow.
fn group(then: &World, flow: &Flow, pair: &Pair) -> Group {
    let (effect, source, destination, protocol, port) = pair;
    let egress = then.judge(flow, Direction::Egress);
    let ingress = then.judge(flow, Direction::Ingress);
    let verdict = match effect {
        Effect::Denied => Verdict::Deny,
        _ => Verdict::Undefined,
    };
    let context = Context {
        no_fixes: true,
        ..Context::default()
    };
    let found = findings::findings(then, flow, &egress, &ingress, &context);
    let found = found.into_iter().take(FINDINGS);
    let sides = [&egress, &ingress].into_iter();
    let sides = sides.filter(|side| side.verdict == verdict);
    Group {
        effect: *effect,
        source: source.clone(),
        destination: destination.clone(),
        protocol: *protocol,
        port: *port,
        connections: 0,
        failed: 0,
        pairs: 0,
        examples: Vec::new(),
        sides: sides.map(side).collect(),
        findings: found.map(|f| (f.code.to_owned(), f.message)).collect(),
    }
}

fn side(side: &Judgement) -> Side {
    let tier = side.decided.and_then(|index| side.tiers.get(index));
    Side {
        direction: side.direction,
        policies: match tier {
            Some(result) => vec![result.name(side.direction)],
            None => side.policies.iter().map(|p| p.full_name()).collect(),
        },
    }
}

/// What an end is called where pods of a workload are one.
fn workload(world: &World, end: End) -> String {
    match end.who {
        Who::Pod(id) => {
            let pod = world.pod(id);
            match &pod.workload {
                Some(workload) => format!(
                    "{}/{} ({})",
                    pod.key.namespace, workload.name, workload.kind
                ),
                None => format!("{}/{} (Pod)", pod.key.namespace, pod.key.name),
            }
        }
        Who::Node(id) => format!("node {}", world.node(id).key.name),
        Who::Outside => "outside the cluster".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::show;
    use super::*;
    use crate::answer::{missing::Missing, origin::Origin};
    use crate::policy::testing::{objects, policy, world};

    /// What a proposal does to lines of connections: the report as JSON and as text.
    fn reported(proposal: &str, lines: &[&str]) -> (serde_json::Value, String) {
        let ground = Ground {
            world: Arc::new(world("")),
            origin: Origin::Files,
            missing: Missing::default(),
            skipped: Vec::new(),
        };
        let mut proposed = Proposed::default();
        for object in objects(proposal) {
            proposed.names.push(object.key().name.to_string());
            assert!(proposed.proposal.add(object));
        }
        let mut seen = SeenBy::new(&ground.world);
        seen.take(lines.join("\n").as_bytes()).unwrap();
        let report = Report::of(&ground, &proposed, &seen);
        (show::json(&report), show::text(&report))
    }

    const WEB: &str = r#"{"node":"a","source":{"ip":"10.244.1.7"},"destination":{"ip":"10.244.2.9","port":5432},"connections":12}"#;
    const BACKUP: &str = r#"{"node":"a","source":{"ip":"10.244.2.10"},"destination":{"ip":"10.244.2.9","port":5432}}"#;
    const LOOKED: &str =
        r#"{"node":"a","time":"2026-01-01T00:00:00Z","conntrack":"read","connections":13}"#;

    #[test]
    fn only_what_is_allowed_now_and_denied_then_is_listed() {
        let same_namespace = policy("guard", "  ingress: [{from: [{podSelector: {}}]}]");
        let (json, text) = reported(&same_namespace, &[WEB, BACKUP, LOOKED]);
        let denied = json["denied"].as_array().unwrap();
        assert_eq!(denied.len(), 1, "{json:#}");
        let first = &denied[0];
        assert_eq!(
            (&first["connections"], &first["source"], &first["port"]),
            (&12.into(), &"shop/web (Pod)".into(), &5432.into())
        );
        assert_eq!(first["examples"][0]["destination"], "db/pg");
        assert_eq!(first["sides"][0]["policies"][0], "db/guard");
        assert_eq!(first["findings"][0]["code"], "pod-selector-scope");
        assert_eq!(json["checked"]["connections"], 13);
        for part in [
            "shop/web (Pod) → db/pg (Pod)  TCP 5432: 12 connections",
            "ingress would be denied by db/guard",
            "pod-selector-scope: ",
            "13 connections",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
    }

    #[test]
    fn no_evidence_is_not_safety() {
        let deny = policy("guard", "  policyTypes: [Ingress]");
        let (json, text) = reported(&deny, &[&LOOKED.replace("13", "0")]);
        assert_eq!(json["denied"], serde_json::json!([]));
        assert!(text.contains("No connection was seen"), "{text}");
        let (_, text) = reported(&deny, &[&LOOKED.replace("read", "switched off")]);
        assert!(text.contains("switched off"), "{text}");
        let (json, text) = reported(&deny, &[&WEB.replace("10.244.1.7", "10.244.1.99"), LOOKED]);
        assert_eq!(json["checked"]["not_judged"], 12);
        assert!(text.starts_with("None of 12 connections"), "{text}");
        assert!(text.contains("could be judged"), "{text}");
        // Other connections go on.
        let (json, text) = reported(
            &deny,
            &[&BACKUP.replace("10.244.2.9", "203.0.113.9"), LOOKED],
        );
        assert_eq!(json["denied"], serde_json::json!([]));
        assert!(text.contains("None of 1 connection (1 flow)"), "{text}");
    }

    #[test]
    fn attempts_that_fail_now_are_told_apart() {
        let deny = policy("guard", "  policyTypes: [Ingress]");
        let failed = WEB.replace("\"node\"", "\"seen\":\"unanswered\",\"node\"");
        let (json, _) = reported(&deny, &[&failed]);
        let first = &json["denied"][0];
        assert_eq!(
            (&first["connections"], &first["failed"]),
            (&0.into(), &12.into())
        );
    }
}
