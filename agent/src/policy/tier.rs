//! Policies of the Admin and Baseline tiers, which are asked before and after NetworkPolicies: a
//! ClusterNetworkPolicy, or one of the two kinds that it replaced.

use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;

use super::model::{Direction, PortItem};
use super::selector::Selector;
use crate::cluster::objects::{Labels, ObjectKind};

pub mod decide;
pub(super) mod findings;
pub mod manifest;

/// When a policy is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Before NetworkPolicies, which cannot undo what it says.
    Admin,
    /// For pods that no NetworkPolicy isolates.
    Baseline,
}

impl Tier {
    /// As `spec.tier` writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "Admin",
            Self::Baseline => "Baseline",
        }
    }
}

/// What a rule does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// It is allowed, for good. `Allow` in v1alpha1.
    Accept,
    /// It is denied, for good.
    Deny,
    /// The rest of the tier is left out.
    Pass,
}

impl Action {
    /// As manifests of a kind write it.
    pub const fn as_str(self, kind: ObjectKind) -> &'static str {
        match (self, kind) {
            (Self::Accept, ObjectKind::ClusterNetworkPolicy) => "Accept",
            (Self::Accept, _) => "Allow",
            (Self::Deny, _) => "Deny",
            (Self::Pass, _) => "Pass",
        }
    }
}

/// A policy of a tier.
#[derive(Clone, Debug, PartialEq)]
pub struct TierPolicy {
    /// ClusterNetworkPolicy, AdminNetworkPolicy or BaselineAdminNetworkPolicy.
    pub kind: ObjectKind,
    /// `apiVersion`, so that a fix is of the version that the cluster has.
    pub api_version: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its labels: a fix that is applied must not take them away.
    pub labels: Labels,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// Its tier.
    pub tier: Tier,
    /// The lower, the earlier. A BaselineAdminNetworkPolicy has none.
    pub priority: Option<u16>,
    /// Which pods it is for.
    pub subject: PodSet,
    /// Ingress; the first rule that matches counts.
    pub ingress: Box<[TierRule]>,
    /// Egress.
    pub egress: Box<[TierRule]>,
}

/// Pods by labels, never those of the host network.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodSet {
    /// Of which namespaces.
    pub namespaces: Selector,
    /// Which of their pods; empty where the manifest names namespaces only.
    pub pods: Selector,
}

/// One rule. It matches if one of its peers and one of its ports does.
#[derive(Clone, Debug, PartialEq)]
pub struct TierRule {
    /// Its name, where it has one.
    pub name: Option<Arc<str>>,
    /// What it does.
    pub action: Action,
    /// At least one.
    pub peers: Box<[TierPeer]>,
    /// Empty: no restriction, of the protocol neither.
    pub ports: Box<[TierPort]>,
}

/// One item of `from` or `to`.
#[derive(Clone, Debug, PartialEq)]
pub enum TierPeer {
    /// Pods.
    Pods(PodSet),
    /// Nodes by their labels; for egress only.
    Nodes(Selector),
    /// Addresses, those of pods too; for egress only.
    Networks(Box<[IpNet]>),
    /// Whatever the cluster's DNS answers for these names; for egress only.
    Domains(Box<[Arc<str>]>),
}

/// One item of `protocols` or `ports`.
#[derive(Clone, Debug, PartialEq)]
pub enum TierPort {
    /// By number.
    Number(PortItem),
    /// What the destination pod calls so, of whichever protocol.
    Named(Arc<str>),
}

impl TierPolicy {
    /// The rules of one direction.
    pub const fn rules(&self, direction: Direction) -> &[TierRule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// The rules of one direction, to change them.
    pub const fn rules_mut(&mut self, direction: Direction) -> &mut Box<[TierRule]> {
        match direction {
            Direction::Ingress => &mut self.ingress,
            Direction::Egress => &mut self.egress,
        }
    }

    /// How many rules of a direction the API server takes.
    pub const fn most_rules(&self) -> usize {
        most_items(self.kind)
    }

    /// `ClusterNetworkPolicy no-db`.
    pub fn full_name(&self) -> String {
        format!("{} {}", self.kind.as_str(), self.name)
    }

    /// `egress rule 2 "no-db" of ClusterNetworkPolicy no-db (Admin tier, priority 10)`.
    pub fn rule_name(&self, direction: Direction, index: usize) -> String {
        let rule = self.rules(direction).get(index);
        let name = rule.and_then(|rule| rule.name.as_ref());
        let name = name.map_or_else(String::new, |name| format!(" {name:?}"));
        let priority = self.priority.map(|p| format!(", priority {p}"));
        format!(
            "{direction} rule {}{name} of {} ({} tier{})",
            index + 1,
            self.full_name(),
            self.tier.as_str(),
            priority.unwrap_or_default(),
        )
    }
}

/// How many rules, peers of a rule and ports of it the API server takes.
pub const fn most_items(kind: ObjectKind) -> usize {
    match kind {
        ObjectKind::ClusterNetworkPolicy => 25,
        _ => 100,
    }
}

impl fmt::Display for TierPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(item) => write!(f, "{item}"),
            Self::Named(name) => write!(f, "{name:?}"),
        }
    }
}
