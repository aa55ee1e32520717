//! Why a rule does not match a flow.

use ipnet::IpNet;

use super::selector::Requirement;

/// A predicate of a rule that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure<'w> {
    /// The policy has no rules for this direction.
    NoRules,
    /// The peer's namespace lacks a label, or has another value.
    PeerNamespace(&'w Requirement),
    /// The peer pod does.
    PeerPod(&'w Requirement),
    /// A podSelector alone, and the peer is in another namespace.
    SameNamespaceOnly,
    /// Selectors never match addresses from outside of the cluster.
    PeerExternal,
    /// Selectors do not match nodes and host-network pods, whose address is a node's.
    PeerHostNetwork,
    /// A tier's rule selects nodes, and this is none.
    NotANode,
    /// The node lacks a label, or has another value.
    PeerNode(&'w Requirement),
    /// The address is not in the range.
    CidrMiss(&'w IpNet),
    /// It is taken out of the range.
    CidrExcept(&'w IpNet),
    /// The rule's ports are of other protocols.
    Protocol,
    /// They are others.
    Port,
    /// The destination has no port of this name and protocol.
    NamedPortUnresolved(&'w str),
    /// NetworkPolicy does not define the protocol.
    ProtocolUndefined,
}

impl Failure<'_> {
    /// Its stable name.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoRules => "no-rules",
            Self::PeerNamespace(_) => "peer-namespace",
            Self::PeerPod(_) => "peer-pod",
            Self::SameNamespaceOnly => "same-namespace-only",
            Self::PeerExternal => "peer-external",
            Self::PeerHostNetwork => "peer-host-network",
            Self::NotANode => "not-a-node",
            Self::PeerNode(_) => "peer-node",
            Self::CidrMiss(_) => "cidr-miss",
            Self::CidrExcept(_) => "cidr-except",
            Self::Protocol => "protocol",
            Self::Port => "port",
            Self::NamedPortUnresolved(_) => "named-port-unresolved",
            Self::ProtocolUndefined => "protocol-undefined",
        }
    }

    /// What was asked for, where the failure has something.
    pub fn detail(&self) -> Option<String> {
        match self {
            Self::PeerNamespace(requirement)
            | Self::PeerPod(requirement)
            | Self::PeerNode(requirement) => Some(requirement.to_string()),
            Self::CidrMiss(net) | Self::CidrExcept(net) => Some(net.to_string()),
            Self::NamedPortUnresolved(name) => Some((*name).to_owned()),
            _ => None,
        }
    }

    /// Whether it is about ports, not about the peer.
    pub const fn is_port(&self) -> bool {
        matches!(
            self,
            Self::Protocol | Self::Port | Self::NamedPortUnresolved(_)
        )
    }
}
