//! The connections of a node, named: what `/v1/connections` tells and `whydrop explain --with` reads.
//!
//! Two things tell of connections: conntrack has those that were answered and are there now, or were until
//! a moment ago (a TCP connection stays for two minutes after its end, UDP for half a minute to two
//! minutes); the counters have the pairs whose first packets were dropped or not answered. Sender's ports
//! are left out: no policy asks for them.

use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::cluster::Index;
use crate::event::{Endpoint, EndpointKind, Outcome, Protocol};
use crate::record::{self, Pair, Series};
use crate::source::conntrack::Connected;

/// One line of `/v1/connections`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
#[allow(
    clippy::large_enum_variant,
    reason = "there is one summary, and all others are connections"
)]
pub enum Line {
    /// What was looked at: the last line of a node. First, because a connection has no `conntrack`.
    Summary(Summary),
    /// Connections of one flow.
    Connection(Connection),
}

/// Connections between two ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    /// The node that tells of them.
    #[serde(default)]
    pub node: Arc<str>,
    /// What became of them.
    #[serde(default)]
    pub seen: Seen,
    /// Transport protocol.
    #[serde(default = "tcp")]
    pub protocol: Protocol,
    /// Who connects, without its port.
    pub source: Endpoint,
    /// To whom, after DNAT.
    pub destination: Endpoint,
    /// How many connections, packets or attempts.
    #[serde(default = "one")]
    pub connections: u64,
}

const fn tcp() -> Protocol {
    Protocol::TCP
}

const fn one() -> u64 {
    1
}

/// What became of a connection.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Seen {
    /// It was answered, and is there now.
    #[default]
    Answered,
    /// Its first packets were dropped here.
    Dropped,
    /// Its first packets were rejected here.
    Rejected,
    /// Nobody answered.
    Unanswered,
}

/// What a node looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// The node.
    pub node: Arc<str>,
    /// When.
    pub time: Timestamp,
    /// `read`, or why it was not.
    pub conntrack: String,
    /// Connections in conntrack.
    pub connections: u64,
    /// Of these those that found no room, or could not be read.
    #[serde(default)]
    pub left_out: u64,
}

impl Summary {
    /// What `conntrack` says where it was read.
    pub const READ: &str = "read";

    /// Whether the node could look at its connections.
    pub fn is_read(&self) -> bool {
        self.conntrack == Self::READ
    }
}

/// Connections that conntrack has, with the names that their ends have now.
pub fn named(
    flow: &Connected,
    connections: u64,
    index: &Index,
    node: &Arc<str>,
    now: Timestamp,
) -> Connection {
    let protocol = Some(flow.protocol);
    let end = |ip, port| {
        let mut end = Endpoint {
            ip: Some(ip),
            port,
            ..Endpoint::default()
        };
        index.name(&mut end, protocol, now);
        end
    };
    let (ip, port) = flow.destination;
    let mut destination = end(ip, Some(port));
    let (asked, asked_port) = flow.asked;
    if flow.asked != flow.destination || destination.kind == Some(EndpointKind::Node) {
        destination.service = index.service(asked, Some(asked_port), protocol, now);
    }
    Connection {
        node: node.clone(),
        seen: Seen::Answered,
        protocol: flow.protocol,
        source: end(flow.source, None),
        destination,
        connections,
    }
}

/// A pair of the counters, where they name both ends and the port.
pub fn of_series(series: &Series, count: u64, node: &Arc<str>) -> Option<Connection> {
    let Pair::Ends {
        source,
        destination,
        port: Some(port),
        protocol: Some(protocol),
        ..
    } = &*series.pair
    else {
        return None;
    };
    // A workload's name does not tell which of its pods it was.
    let end = |end: &record::End| {
        end.pod.is_some().then(|| Endpoint {
            kind: end.kind,
            namespace: end.namespace.clone(),
            pod: end.pod.clone(),
            node: end.node.clone(),
            host_network: end.kind == Some(EndpointKind::Node),
            ..Endpoint::default()
        })
    };
    let mut destination = end(destination)?;
    destination.port = Some(*port);
    Some(Connection {
        node: node.clone(),
        seen: match series.outcome {
            Outcome::Dropped => Seen::Dropped,
            Outcome::Rejected => Seen::Rejected,
            Outcome::Unanswered => Seen::Unanswered,
        },
        protocol: *protocol,
        source: end(source)?,
        destination,
        connections: count,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture;
    use crate::event::testing;
    use crate::record::{Detail, Record};

    fn connected(source: &str, asked: &str, destination: &str) -> Connected {
        let end = |text: &str| {
            let address: std::net::SocketAddr = text.parse().unwrap();
            (address.ip(), address.port())
        };
        Connected {
            protocol: Protocol::TCP,
            source: source.parse().unwrap(),
            asked: end(asked),
            destination: end(destination),
        }
    }

    #[test]
    fn ends_have_their_names_and_the_service_that_was_asked_for() {
        let named = |asked| {
            let flow = connected("10.244.1.7", asked, "10.244.2.9:5432");
            named(&flow, 3, &fixture::index(), &"node-a".into(), fixture::NOW)
        };
        let by_service = named("10.96.0.12:5432");
        assert_eq!(
            by_service.source.pod.as_deref(),
            Some("web-7d9f8c6b5-x2x4k")
        );
        assert_eq!(by_service.source.port, None);
        assert_eq!(by_service.destination.pod.as_deref(), Some("pg-0"));
        let service = by_service.destination.service.unwrap();
        assert_eq!((&*service.name, service.port), ("pg", Some(5432)));
        assert_eq!(named("10.244.2.9:5432").destination.service, None);
    }

    #[test]
    fn a_line_is_read_back_and_needs_little() {
        let summary = Line::Summary(Summary {
            node: "node-a".into(),
            time: fixture::NOW,
            conntrack: Summary::READ.to_owned(),
            connections: 3,
            left_out: 0,
        });
        let flow = connected("10.244.1.7", "10.96.0.12:5432", "10.244.2.9:5432");
        let index = fixture::index();
        let connection = Line::Connection(named(&flow, 3, &index, &"n".into(), fixture::NOW));
        for line in [summary, connection] {
            let text = serde_json::to_string(&line).unwrap();
            let mut read: Line = serde_json::from_str(&text).unwrap();
            if let (Line::Connection(read), Line::Connection(line)) = (&mut read, &line) {
                read.destination.declared_port = line.destination.declared_port;
            }
            assert_eq!(read, line);
        }
        let short = r#"{"source":{"ip":"10.0.0.1"},"destination":{"ip":"10.0.0.2","port":80}}"#;
        let Line::Connection(short) = serde_json::from_str(short).unwrap() else {
            panic!("a summary");
        };
        assert_eq!((short.protocol, short.connections), (Protocol::TCP, 1));
        assert_eq!(short.seen, Seen::Answered);
    }

    #[test]
    fn a_pair_of_the_counters_needs_both_pods_and_a_port() {
        let mut record = Record::new(Detail::Pod, 100, std::time::Duration::from_secs(60));
        let event = testing::event();
        let mut external = event.clone();
        external.destination.pod = None;
        let mut later = event.clone();
        later.kind = crate::event::Kind::Packet;
        for event in [&event, &external, &later] {
            record.add(event, "R".into(), std::time::Instant::now());
        }
        let series = record.snapshot().series;
        let told = series
            .iter()
            .filter_map(|(series, count)| of_series(series, *count, &"n".into()));
        let told: Vec<Connection> = told.collect();
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(
            (told[0].seen, told[0].connections),
            (Seen::Dropped, event.packets)
        );
        assert_eq!(told[0].destination.port, event.destination.port);
    }
}
