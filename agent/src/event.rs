//! The event: what a person reads in `whydrop tail`, and what scripts parse from `-o json`.
//!
//! The schema is a contract with scripts outside this repository: a field is never renamed, and a
//! field that is not known is absent (or `null` where a script may index into it), never guessed.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// One event: one or more packets of one flow that met the same fate.
///
/// The `packets` of all events of a stream, together with its [`Lost`] lines, add up to what the
/// counters say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When the (last) packet was dropped, by the node's clock.
    pub time: Timestamp,
    /// The node that saw it.
    pub node: Arc<str>,
    /// What kind of packet it was.
    pub kind: Kind,
    /// What became of it.
    pub outcome: Outcome,
    /// How many packets this event stands for.
    pub packets: u64,
    /// Transport protocol; absent where the packet's headers could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// 4 or 6; absent where the packet is no IP packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip_version: Option<u8>,
    /// TCP flags as `SYN`, `SYN|ACK`; absent for other protocols and where they are not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_flags: Option<String>,
    /// Who sent the packet.
    pub source: Endpoint,
    /// Who should have received it: the real one, after DNAT.
    pub destination: Endpoint,
    /// How long an unanswered attempt had waited; absent for drops.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waited_seconds: Option<f64>,
    /// Whose fault an unanswered attempt is; absent for drops, and where this node does not see them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// The question of a DNS query.
    #[serde(default)]
    pub dns: Option<DnsQuestion>,
    /// Where and why this node dropped it; `null` where it did not.
    #[serde(default)]
    pub drop: Option<DropSite>,
    /// What the policies say about it; `null` where nothing is known.
    #[serde(default)]
    pub explanation: Option<Explanation>,
}

/// What kind of packet an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A first SYN, or a resent one.
    Syn,
    /// A DNS query.
    Dns,
    /// Any other packet.
    Packet,
}

impl Kind {
    /// The name in events and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Syn => "syn",
            Self::Dns => "dns",
            Self::Packet => "packet",
        }
    }
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Dropped here, and nobody was told.
    Dropped,
    /// Dropped here, and the sender was told: by RST, by ICMP, or by its own call's error.
    Rejected,
    /// Sent, and no answer came in time.
    Unanswered,
}

impl Outcome {
    /// The name in events and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dropped => "dropped",
            Self::Rejected => "rejected",
            Self::Unanswered => "unanswered",
        }
    }
}

/// Where an unanswered attempt was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// This node dropped a packet of it, either way; or, where the event has no drop, its listener's
    /// namespace lost connections to a full accept queue meanwhile.
    DroppedHere,
    /// This node dropped nothing of it.
    Elsewhere,
}

impl Cause {
    /// The name in events and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DroppedHere => "dropped_here",
            Self::Elsewhere => "elsewhere",
        }
    }
}

/// An IP protocol number, written as its name where it has one here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Protocol(pub u8);

impl Protocol {
    /// TCP, RFC 9293.
    pub const TCP: Self = Self(6);
    /// UDP, RFC 768.
    pub const UDP: Self = Self(17);
    /// SCTP, RFC 9260.
    pub const SCTP: Self = Self(132);
    /// ICMP, RFC 792.
    pub const ICMP: Self = Self(1);
    /// ICMPv6, RFC 4443.
    pub const ICMPV6: Self = Self(58);

    const NAMES: [(Self, &'static str); 5] = [
        (Self::TCP, "TCP"),
        (Self::UDP, "UDP"),
        (Self::SCTP, "SCTP"),
        (Self::ICMP, "ICMP"),
        (Self::ICMPV6, "ICMPv6"),
    ];

    /// Whether packets of this protocol carry ports.
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::TCP | Self::UDP | Self::SCTP)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMES.iter().find(|(p, _)| p == self) {
            Some((_, name)) => f.pad(name),
            None => write!(f, "{}", self.0),
        }
    }
}

impl std::str::FromStr for Protocol {
    type Err = String;

    /// A name without regard to case, or a number.
    fn from_str(s: &str) -> Result<Self, String> {
        Self::NAMES
            .iter()
            .find(|(_, name)| name.eq_ignore_ascii_case(s))
            .map(|(p, _)| *p)
            .or_else(|| s.parse().ok().map(Self))
            .ok_or_else(|| {
                format!("unknown protocol {s:?}: TCP, UDP, SCTP, ICMP, ICMPv6 or a number")
            })
    }
}

impl Serialize for Protocol {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Protocol {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// One end of a flow. What is not known is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    /// What the address belongs to; absent where there is no address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<EndpointKind>,
    /// The address in the packet (after DNAT).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// The port, where the protocol has ports and the packet showed them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Namespace of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Arc<str>>,
    /// Name of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Arc<str>>,
    /// What runs the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Arc<Workload>>,
    /// The node: of the pod, or the one that the address belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Arc<str>>,
    /// The pod shares its node's network.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_network: bool,
    /// The Service that the sender asked for, where DNAT chose this end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceRef>,
    /// The port is one that the pod or Service declares. Not part of the schema: it decides
    /// whether a metric carries the port.
    #[serde(skip)]
    pub declared_port: bool,
}

/// What an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointKind {
    /// A pod with an address of its own.
    Pod,
    /// A node, or a pod on its node's network.
    Node,
    /// A Service's own address (no endpoint was chosen).
    Service,
    /// Inside a pod range of the nodes, and no object holds it.
    Unknown,
    /// Any other address.
    External,
}

impl EndpointKind {
    /// The name in events and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Node => "node",
            Self::Service => "service",
            Self::Unknown => "unknown",
            Self::External => "external",
        }
    }
}

/// What runs a pod: the top of its owner references.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Workload {
    /// `Deployment`, `StatefulSet`, any other kind.
    pub kind: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// A Service as the sender asked for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ServiceRef {
    /// Namespace of the Service.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// The address asked for.
    pub ip: IpAddr,
    /// The port asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// The question of a DNS query (RFC 1035, section 4.1.2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsQuestion {
    /// The name with its final dot.
    pub name: String,
    /// `A`, `AAAA`, ..., `TYPE65280` where it has no name here (RFC 3597).
    #[serde(rename = "type")]
    pub qtype: String,
    /// The query's id.
    pub id: u16,
}

/// Where and why the kernel dropped a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropSite {
    /// The kernel's reason without `SKB_DROP_REASON_`; absent on kernels before 5.17.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Arc<str>>,
    /// The function that freed the packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<Arc<str>>,
    /// The network device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<Arc<str>>,
    /// Inode number of the network namespace, as `lsns` and `/proc/PID/ns/net` show it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<u32>,
}

/// What the NetworkPolicies say about a drop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// How sure it is.
    pub confidence: Confidence,
    /// `ingress` or `egress`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<String>,
    /// The isolating policies as `namespace/name`.
    #[serde(default)]
    pub policies: Vec<String>,
    /// What is missing.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// One sentence for a person.
    pub summary: String,
    /// The policy, or the labels, that changed last before the pair's first drop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_change: Option<LastChange>,
}

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// It is new.
    Created,
    /// What it says is another.
    Changed,
    /// It is gone.
    Deleted,
    /// It has other labels.
    Labels,
}

/// The change that came last before the first drop of a pair, of all that decide about its connections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastChange {
    /// `NetworkPolicy`, `Namespace`, `Pod`, a workload's kind, or that of a tier's policy.
    pub kind: String,
    /// Its namespace; absent for what has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What happened to it.
    pub what: What,
    /// When that was seen.
    pub time: Timestamp,
    /// Seconds from then to the first drop of the pair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_before_first_drop: Option<f64>,
}

impl LastChange {
    /// A part of a sentence: `NetworkPolicy db/default-deny was created`.
    pub fn sentence(&self) -> String {
        let what = match self.what {
            What::Created => "was created",
            What::Changed => "was changed",
            What::Deleted => "was deleted",
            What::Labels => "got other labels",
        };
        let slash = match self.namespace.is_empty() {
            true => "",
            false => "/",
        };
        format!(
            "{} {}{slash}{} {what}",
            self.kind, self.namespace, self.name
        )
    }

    /// The same beside the first drop, where it was in the hour before: `NetworkPolicy db/default-deny was
    /// created 4 s before the first drop`. What is older is no rollout.
    pub fn beside_first_drop(&self) -> Option<String> {
        let before = match self.seconds_before_first_drop? {
            ..1.0 => "just".to_owned(),
            seconds @ ..120.0 => format!("{seconds:.0} s"),
            seconds @ ..=3600.0 => format!("{:.0} min", seconds / 60.0),
            _ => return None,
        };
        Some(format!(
            "{} {before} before the first drop",
            self.sentence()
        ))
    }
}

/// How sure an explanation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Confidence {
    /// Policies deny it, and hook, side and device fit.
    Confirmed,
    /// Policies deny it, the side is open.
    Consistent,
    /// Policies allow it: look elsewhere.
    Contradicted,
    /// Nothing is known.
    None,
}

/// One thing that is missing, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// A stable code, as `namespace-label-missing`.
    pub code: String,
    /// The sentence with the real names.
    pub message: String,
    /// YAML that can be applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// Events that a stream did not carry. It passes every selection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// How many packets or lines.
    pub lost: u64,
    /// Where: `ring` (the kernel's buffer), `queue` (inside the agent), `reader` (this reader was
    /// too slow).
    pub stage: LostStage,
    /// The node.
    pub node: Arc<str>,
}

/// Where events were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LostStage {
    /// Between kernel and agent.
    Ring,
    /// Inside the agent.
    Queue,
    /// Between the agent and this reader.
    Reader,
}

/// One line of a stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
#[allow(
    clippy::large_enum_variant,
    reason = "lines are handed around behind an Arc"
)]
pub enum Line {
    /// A loss. First, because an event never has the field `lost`.
    Lost(Lost),
    /// An event.
    Event(Event),
}

/// The example event that tests of other modules vary.
#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    reason = "a fixture that does not parse fails its test"
)]
pub(crate) mod testing {
    pub fn event() -> super::Event {
        serde_json::from_str(include_str!("../tests/fixtures/event.json")).unwrap()
    }
}
