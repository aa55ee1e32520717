//! A NetworkPolicy as it is evaluated: plain values with the API server's defaults set.

use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;

use super::selector::Selector;
use crate::cluster::objects::Labels;
use crate::event::Protocol;

/// Which way the subject's traffic goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// To the subject, which is the destination.
    Ingress,
    /// From the subject, which is the source.
    Egress,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// As events and JSON write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    /// As `policyTypes` writes it.
    pub const fn type_name(self) -> &'static str {
        match self {
            Self::Ingress => "Ingress",
            Self::Egress => "Egress",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A NetworkPolicy of `networking.k8s.io/v1`.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkPolicy {
    /// Its namespace, which is that of its subjects.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its labels: a fix that is applied must not take them away.
    pub labels: Labels,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// When it was last written, by its `managedFields`; absent where they say nothing.
    pub written: Option<Timestamp>,
    /// Which pods of its namespace it selects.
    pub pod_selector: Selector,
    /// Ingress.
    pub ingress: Side,
    /// Egress.
    pub egress: Side,
    /// Who wrote it named no `policyTypes`: what they are was derived.
    pub types_omitted: bool,
}

/// One direction of a policy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Side {
    /// The policy's types include it: pods that the policy selects are isolated.
    pub isolates: bool,
    /// Without effect if it does not isolate.
    pub rules: Box<[Rule]>,
}

impl NetworkPolicy {
    /// Whether two states of a policy decide alike: labels and annotations do not count.
    pub fn decides_as(&self, other: &Self) -> bool {
        self.pod_selector == other.pod_selector
            && self.ingress == other.ingress
            && self.egress == other.egress
    }

    /// One direction.
    pub const fn side(&self, direction: Direction) -> &Side {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// One direction, to change it.
    pub const fn side_mut(&mut self, direction: Direction) -> &mut Side {
        match direction {
            Direction::Ingress => &mut self.ingress,
            Direction::Egress => &mut self.egress,
        }
    }

    /// `namespace/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// One rule. It matches if one of its peers and one of its ports does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rule {
    /// Empty: everyone, outside of the cluster too.
    pub peers: Box<[Peer]>,
    /// Empty: no restriction.
    pub ports: Box<[PortItem]>,
}

/// One item of `from` or `to`.
#[derive(Clone, Debug, PartialEq)]
pub enum Peer {
    /// Pods of the policy's own namespace: a podSelector alone.
    Pods(Selector),
    /// All pods of namespaces: a namespaceSelector alone.
    Namespaces(Selector),
    /// Pods of namespaces: both selectors in one item.
    PodsIn {
        /// Which namespaces.
        namespaces: Selector,
        /// Which of their pods.
        pods: Selector,
    },
    /// Addresses.
    Block(Block),
}

/// An `ipBlock`.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// The range.
    pub cidr: IpNet,
    /// What is taken out of it again; of this item only.
    pub except: Box<[IpNet]>,
}

/// One item of `ports`.
#[derive(Clone, Debug, PartialEq)]
pub struct PortItem {
    /// TCP where the manifest does not say.
    pub protocol: Protocol,
    /// The ports of this protocol.
    pub port: PortMatch,
}

/// Which ports of a protocol.
#[derive(Clone, Debug, PartialEq)]
pub enum PortMatch {
    /// All of them.
    Any,
    /// `port` to `endPort`, both included.
    Range(u16, u16),
    /// What the destination pod calls so.
    Named(Arc<str>),
}

impl fmt::Display for PortItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.port {
            PortMatch::Any => write!(f, "{}", self.protocol),
            PortMatch::Range(from, to) if from == to => write!(f, "{} {from}", self.protocol),
            PortMatch::Range(from, to) => write!(f, "{} {from}-{to}", self.protocol),
            PortMatch::Named(name) => write!(f, "{} {name:?}", self.protocol),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pods(pods) => write!(f, "pods {pods} of its own namespace"),
            Self::Namespaces(namespaces) => write!(f, "all pods of namespaces {namespaces}"),
            Self::PodsIn { namespaces, pods } => {
                write!(f, "pods {pods} of namespaces {namespaces}")
            }
            Self::Block(block) if block.except.is_empty() => write!(f, "{}", block.cidr),
            Self::Block(block) => {
                let except: Vec<String> = block.except.iter().map(ToString::to_string).collect();
                write!(f, "{} except {}", block.cidr, except.join(", "))
            }
        }
    }
}
