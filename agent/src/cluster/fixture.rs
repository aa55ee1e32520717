//! The cluster of `fixtures/`, for tests.

use std::net::IpAddr;

use jiff::Timestamp;

use super::objects::Interner;
use super::{Index, document};
use crate::event::{Endpoint, Protocol};

/// A time at which everything in the fixtures is there: 2026-11-22T12:00:00Z.
pub const NOW: Timestamp = Timestamp::constant(1_795_348_800, 0);

/// All fixtures in an index.
pub fn index() -> Index {
    let mut index = Index::default();
    let mut strings = Interner::default();
    for (text, is_json) in [
        (include_str!("fixtures/cluster.yaml"), false),
        (include_str!("fixtures/batch.yaml"), false),
        (include_str!("fixtures/pods.json"), true),
    ] {
        let objects = document::read(text, is_json).unwrap();
        assert_eq!(objects.malformed, []);
        let objects = objects.parsed.into_iter().map(|p| p.strip(&mut strings));
        index.load(objects.collect::<Vec<_>>(), NOW);
    }
    index
}

/// An end with nothing but an address and a port.
pub fn end(ip: &str, port: Option<u16>) -> Endpoint {
    Endpoint {
        ip: Some(ip.parse::<IpAddr>().unwrap()),
        port,
        ..Endpoint::default()
    }
}

/// An end as the fixtures name it.
pub fn named(ip: &str, port: Option<(Protocol, u16)>, at: Timestamp) -> Endpoint {
    let mut end = end(ip, port.map(|(_, port)| port));
    index().name(&mut end, port.map(|(protocol, _)| protocol), at);
    end
}

/// Node, pod and workload of an end; `-` for none.
pub fn text(end: &Endpoint) -> (String, String, String) {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let pod = end.namespace.as_ref().zip(end.pod.as_ref());
    (
        or_dash(end.node.as_ref().map(ToString::to_string)),
        or_dash(pod.map(|(namespace, pod)| format!("{namespace}/{pod}"))),
        or_dash(
            end.workload
                .as_ref()
                .map(|w| format!("{}/{}", w.kind, w.name)),
        ),
    )
}
