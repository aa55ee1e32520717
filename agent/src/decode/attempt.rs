//! An attempt that got no answer, before names.

use std::time::Duration;

use jiff::Timestamp;
use whydrop_ebpf::attempt::{Connect, LastDrop, Query, QueryKey};

use super::{Decoder, Flow, address, dns};
use crate::event::{DnsQuestion, DropSite, Kind, Protocol};

/// A connection attempt or a DNS query that nobody answered in time.
///
/// One attempt is one socket, one DNS id, or one conntrack entry, however often it was resent.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    /// [`Kind::Syn`] or [`Kind::Dns`].
    pub kind: Kind,
    /// When its first packet was sent.
    pub since: Timestamp,
    /// How long it had waited when it was found.
    pub waited: Duration,
    /// Packets sent for it so far.
    pub sent: u64,
    /// The two ends; `destination` is the real one after DNAT where that is known, and
    /// `original_destination` then what the sender asked for.
    pub flow: Flow,
    /// The cgroup of the sender's socket (its directory's inode number).
    pub cgroup: Option<u64>,
    /// Inode number of the sender's network namespace.
    pub netns: Option<u32>,
    /// The question of a DNS query.
    pub dns: Option<DnsQuestion>,
    /// Where this node dropped the last packet of it, either way; `None` if it dropped none.
    pub drop: Option<DropSite>,
}

impl Decoder {
    /// A connect that waited until `boot_ns`; `wall` turns boot time into the time of day.
    pub fn connect(
        &mut self,
        connect: &Connect,
        boot_ns: u64,
        wall: impl Fn(u64) -> Timestamp,
    ) -> Attempt {
        let port = |port: u16| (port != 0).then_some(port);
        let version = connect.ip_version;
        let flow = Flow {
            source: address(&connect.tuple.source, version),
            source_port: port(connect.tuple.source_port),
            destination: address(&connect.tuple.destination, version),
            destination_port: port(connect.tuple.destination_port),
            protocol: Protocol::TCP,
            original_destination: None,
            icmp: None,
        };
        Attempt {
            kind: Kind::Syn,
            since: wall(connect.start_ns),
            waited: Duration::from_nanos(boot_ns.saturating_sub(connect.start_ns)),
            // A SYN that was dropped before a device had it was sent as well.
            sent: u64::from(connect.sent.max(sent_at_least(&connect.drop))),
            flow: after_dnat(
                flow,
                (&connect.wire.destination, connect.wire.destination_port),
                &connect.drop,
                version,
            ),
            cgroup: (connect.cgroup != 0).then_some(connect.cgroup),
            netns: (connect.netns != 0).then_some(connect.netns),
            dns: None,
            drop: self.last_drop(&connect.drop),
        }
    }

    /// A DNS query that waited until `boot_ns`; `wall` as above.
    pub fn query(
        &mut self,
        key: &QueryKey,
        query: &Query,
        boot_ns: u64,
        wall: impl Fn(u64) -> Timestamp,
    ) -> Attempt {
        let version = query.ip_version;
        let flow = Flow {
            source: address(&key.client, version),
            source_port: Some(key.port),
            destination: address(&query.server, version),
            destination_port: Some(query.server_port),
            protocol: Protocol(query.protocol),
            original_destination: None,
            icmp: None,
        };
        let len = usize::from(query.message_len).min(query.message.len());
        Attempt {
            kind: Kind::Dns,
            since: wall(query.start_ns),
            waited: Duration::from_nanos(boot_ns.saturating_sub(query.start_ns)),
            sent: u64::from(query.sent),
            flow: after_dnat(
                flow,
                (&query.real_server, query.real_server_port),
                &query.drop,
                version,
            ),
            cgroup: (query.cgroup != 0).then_some(query.cgroup),
            netns: (query.netns != 0).then_some(query.netns),
            dns: dns::question(&query.message[..len]),
            drop: self.last_drop(&query.drop),
        }
    }

    fn last_drop(&mut self, drop: &LastDrop) -> Option<DropSite> {
        (drop.packets != 0).then(|| self.site(drop.reason, drop.location, drop.netns, drop.ifindex))
    }
}

/// SYNs that were dropped, of which each was sent.
fn sent_at_least(drop: &LastDrop) -> u32 {
    if drop.is_answer == 0 { drop.packets } else { 0 }
}

/// Where the packets really went, as far as is known: by the conntrack of the sender's own namespace
/// (`wire`), and where one of them was dropped after its DNAT.
fn after_dnat(flow: Flow, wire: (&[u8; 16], u16), drop: &LastDrop, version: u8) -> Flow {
    let dropped = (&drop.destination, drop.destination_port);
    let known = [dropped, wire].into_iter();
    let mut known = known.filter(|(ip, _)| **ip != [0; 16]);
    known.next().map_or(flow, |(ip, port)| {
        flow.translated_to((address(ip, version), port))
    })
}

impl Flow {
    /// The same flow after a DNAT to this address and port; itself, if that changes nothing.
    pub fn translated_to(self, (ip, port): (std::net::IpAddr, u16)) -> Self {
        if (ip, Some(port)) == (self.destination, self.destination_port) {
            return self;
        }
        Self {
            original_destination: self.destination_port.map(|port| (self.destination, port)),
            destination: ip,
            destination_port: Some(port),
            ..self
        }
    }
}
