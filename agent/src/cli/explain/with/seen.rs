//! The connections that agents see: of files that `whydrop connections` printed, or of the local agent. Each
//! line becomes a flow between ends of the world at once, so that many nodes' lines take little room.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use hyper::body::Bytes;

use super::agents;
use crate::cli::cluster::Agents;
use crate::cli::cluster::kubeconfig::{Target, target};
use crate::cli::config::ExplainArgs;
use crate::cli::connections::each_chunk;
use crate::connections::{Connection, Line, Seen, Summary};
use crate::event::{Endpoint, EndpointKind};
use crate::policy::evaluate::{End, Flow, Who};
use crate::policy::world::World;
use crate::selection::Selection;

/// No line is longer; what has one is no list of connections.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// Different flows: 1,000,000 are some 200 MB.
const MAX_FLOWS: usize = 1_000_000;
/// Ends that no object holds, of which so many are named.
const EXAMPLES: usize = 3;

/// What was seen.
#[derive(Debug)]
pub struct SeenBy<'w> {
    world: &'w World,
    /// Connections of each flow, by the nodes that tell of it: two do where both ends are pods.
    flows: HashMap<(Flow, Seen), Vec<(u32, u64)>>,
    node_ids: HashMap<Arc<str>, u32>,
    /// What each node looked at.
    pub nodes: Vec<Summary>,
    /// Connections with an end that the world does not have.
    pub unknown: u64,
    /// Some of those ends.
    pub unknown_ends: Vec<String>,
}

/// What `--connections` names, else what all agents of the cluster see, or the one of `--socket`.
///
/// # Errors
/// A file cannot be read or holds something else, or no agent answers.
pub fn collect<'w>(args: &ExplainArgs, world: &'w World) -> Result<SeenBy<'w>> {
    let mut seen = SeenBy::new(world);
    for path in &args.connections {
        if path == Path::new("-") {
            let stdin = std::io::stdin().lock();
            seen.take(stdin).context("standard input")?;
        } else {
            let file =
                File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
            let read = seen.take(BufReader::new(file));
            read.with_context(|| path.display().to_string())?;
        }
    }
    if !args.connections.is_empty() {
        return Ok(seen);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match target(&args.agents).await? {
            Target::Local(socket) => seen.ask(&socket).await,
            Target::Cluster(account) => {
                let agents = Agents::new(*account, &args.agents, Selection::default())?;
                agents::collect(&agents, &mut seen).await
            }
        }
    })?;
    Ok(seen)
}

impl<'w> SeenBy<'w> {
    /// Nothing yet, of this world.
    pub fn new(world: &'w World) -> Self {
        Self {
            world,
            flows: HashMap::new(),
            node_ids: HashMap::new(),
            nodes: Vec::new(),
            unknown: 0,
            unknown_ends: Vec::new(),
        }
    }

    /// Each flow, what became of it, and how many connections it had.
    pub fn flows(&self) -> impl Iterator<Item = (&Flow, Seen, u64)> {
        self.flows.iter().map(|((flow, seen), by_node)| {
            let counts = by_node.iter().map(|(_, count)| *count);
            let count = match seen {
                // Both nodes have the same connections.
                Seen::Answered => counts.max().unwrap_or(0),
                Seen::Dropped | Seen::Rejected | Seen::Unanswered => counts.sum(),
            };
            (flow, *seen, count)
        })
    }

    /// What one agent answers.
    async fn ask(&mut self, socket: &Path) -> Result<()> {
        let mut pending: Vec<u8> = Vec::new();
        let take = async |bytes: Bytes| {
            pending.extend_from_slice(&bytes);
            if let Some(end) = pending.iter().rposition(|b| *b == b'\n') {
                let rest = pending.split_off(end + 1);
                let lines = std::mem::replace(&mut pending, rest);
                self.take(&lines[..])?;
            }
            Ok(true)
        };
        each_chunk(socket, take).await.context(
            "connections come from the agent of a node; with --connections from what `whydrop \
             connections` printed on any number of them",
        )
    }

    /// Adds lines.
    ///
    /// # Errors
    /// One is no connection, or they are too many.
    pub fn take(&mut self, mut lines: impl BufRead) -> Result<()> {
        let (mut line, mut number) = (Vec::new(), 0_u64);
        loop {
            line.clear();
            let mut limited = std::io::Read::take(&mut lines, MAX_LINE_BYTES);
            if limited.read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            number += 1;
            if line.trim_ascii().is_empty() {
                continue;
            }
            let read = serde_json::from_slice::<Line>(&line);
            match read.with_context(|| format!("line {number} is no connection"))? {
                Line::Summary(summary) => self.nodes.push(summary),
                Line::Connection(connection) => self.add(&connection),
            }
            if self.flows.len() > MAX_FLOWS {
                bail!("more than {MAX_FLOWS} different flows: give fewer nodes at once");
            }
        }
    }

    fn add(&mut self, connection: &Connection) {
        let ends = [&connection.source, &connection.destination].map(|e| (e, end(self.world, e)));
        let (source, destination) = match ends {
            [(_, Some(source)), (_, Some(destination))] => (source, destination),
            _ => {
                self.unknown += connection.connections;
                let unknown = ends.iter().filter(|(_, end)| end.is_none());
                for name in unknown.map(|(end, _)| shown(end)) {
                    if self.unknown_ends.len() < EXAMPLES && !self.unknown_ends.contains(&name) {
                        self.unknown_ends.push(name);
                    }
                }
                return;
            }
        };
        let next = self.node_ids.len() as u32;
        let node = *self.node_ids.entry(connection.node.clone()).or_insert(next);
        let flow = Flow {
            source,
            destination,
            protocol: connection.protocol,
            port: connection.destination.port,
        };
        let by_node = self.flows.entry((flow, connection.seen)).or_default();
        match by_node.iter_mut().find(|(known, _)| *known == node) {
            Some((_, count)) => *count += connection.connections,
            None => by_node.push((node, connection.connections)),
        }
    }
}

/// An end among the objects: the pod that the agent named, else whoever has the address. `None` where the
/// objects do not have the pod, or an address is a pod's or a Service's of which no more is known.
fn end(world: &World, end: &Endpoint) -> Option<End> {
    if let (Some(namespace), Some(pod)) = (&end.namespace, &end.pod) {
        let who = Who::Pod(world.pod_named(namespace, pod)?);
        let ip = end.ip.map(|ip| ip.to_canonical());
        return Some(End { who, ip });
    }
    let ip = end.ip?.to_canonical();
    let who = match (world.pods_at(ip).first(), world.node_at(ip)) {
        (Some(pod), _) => Who::Pod(*pod),
        (None, Some(node)) => Who::Node(node),
        (None, None) if world.service_at(ip).is_some() => return None,
        (None, None) if world.pod_ranges().any(|range| range.contains(&ip)) => return None,
        (None, None) => match end.kind {
            Some(EndpointKind::Service | EndpointKind::Unknown) => return None,
            _ => Who::Outside,
        },
    };
    Some(End { who, ip: Some(ip) })
}

fn shown(end: &Endpoint) -> String {
    match (&end.namespace, &end.pod, end.ip) {
        (Some(namespace), Some(pod), _) => format!("{namespace}/{pod}"),
        (_, _, Some(ip)) => ip.to_string(),
        _ => "an end without name and address".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::sentence;
    use crate::policy::testing::world;

    fn line(node: &str, source: &str, destination: &str, more: &str) -> String {
        let end = |name: &str| match name.split_once('/') {
            Some((namespace, pod)) => format!(r#""namespace":"{namespace}","pod":"{pod}""#),
            None => format!(r#""ip":"{name}""#),
        };
        let (source, destination) = (end(source), end(destination));
        format!(
            "{{\"node\":\"{node}\",\"source\":{{{source}}},\
             \"destination\":{{{destination},\"port\":80}}{more}}}\n"
        )
    }

    #[test]
    fn what_two_nodes_see_of_one_flow_is_not_added_up() {
        let world = world("");
        let mut seen = SeenBy::new(&world);
        let text = [
            line("a", "shop/web", "db/pg", ",\"connections\":3"),
            line("b", "shop/web", "db/pg", ",\"connections\":2"),
            line("b", "shop/web", "db/pg", ""),
            line(
                "a",
                "shop/web",
                "db/pg",
                ",\"seen\":\"dropped\",\"connections\":5",
            ),
            line(
                "b",
                "shop/web",
                "db/pg",
                ",\"seen\":\"dropped\",\"connections\":7",
            ),
            "\n{\"node\":\"a\",\"time\":\"2026-01-01T00:00:00Z\",\"conntrack\":\"read\",\
             \"connections\":3}"
                .to_owned(),
        ];
        seen.take(text.concat().as_bytes()).unwrap();
        let mut flows: Vec<_> = seen.flows().map(|(_, seen, n)| (seen, n)).collect();
        flows.sort();
        assert_eq!(flows, [(Seen::Answered, 3), (Seen::Dropped, 12)]);
        assert_eq!((seen.nodes.len(), seen.unknown), (1, 0));
        assert!(seen.nodes[0].is_read());
    }

    #[test]
    fn ends_that_the_objects_do_not_have_are_not_guessed() {
        let world = world("");
        let mut seen = SeenBy::new(&world);
        let text = [
            line("a", "shop/gone", "db/pg", ""),
            // Inside a node's pod range, and nobody's.
            line("a", "10.244.1.99", "db/pg", ""),
            line("a", "203.0.113.7", "db/pg", ""),
            line("a", "192.168.0.1", "db/pg", ""),
        ];
        seen.take(text.concat().as_bytes()).unwrap();
        assert_eq!(seen.unknown, 2);
        assert_eq!(seen.unknown_ends, ["shop/gone", "10.244.1.99"]);
        let who: Vec<Who> = seen.flows().map(|(flow, ..)| flow.source.who).collect();
        assert!(
            who.contains(&Who::Outside) && who.contains(&Who::Node(0)),
            "{who:?}"
        );
    }

    #[test]
    fn a_broken_line_is_named() {
        let world = world("");
        let good = line("a", "shop/web", "db/pg", "");
        for broken in ["{", "[]", r#"{"source":{}}"#, "\u{fffd}"] {
            let text = format!("{good}{broken}\n");
            let error = SeenBy::new(&world).take(text.as_bytes()).unwrap_err();
            let error = sentence(&error);
            assert!(error.starts_with("line 2 is no connection"), "{error}");
        }
    }
}
