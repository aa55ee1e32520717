//! Kinds of objects that could not be read: what hangs on them is undefined, not guessed.

use crate::cluster::ObjectKind;
use crate::policy::evaluate::{Flow, Who};
use crate::policy::model::Direction;
use crate::policy::world::World;

/// What could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing(Vec<(ObjectKind, String)>);

impl Missing {
    /// A kind of which nothing was read, and why in one sentence.
    pub fn add(&mut self, kind: ObjectKind, why: String) {
        self.0.push((kind, why));
    }

    /// Why each of them was not read.
    pub fn sentences(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(_, why)| why.as_str())
    }

    /// Why a kind was not read.
    pub fn why(&self, kind: ObjectKind) -> Option<&str> {
        let found = self.0.iter().find(|(missing, _)| *missing == kind);
        found.map(|(_, why)| why.as_str())
    }

    /// Whether what policies say of a flow may be otherwise with what is missing.
    pub fn is_open(&self, world: &World, flow: &Flow) -> bool {
        if self.0.is_empty() {
            return false;
        }
        let has_tiers = !world.tiers().is_empty();
        let ends = [
            (flow.source, Direction::Egress),
            (flow.destination, Direction::Ingress),
        ];
        let is_isolated = ends.iter().any(|(end, direction)| match end.who {
            Who::Pod(id) => world.isolating(id, *direction).next().is_some(),
            Who::Node(_) | Who::Outside => false,
        });
        let has_stranger = ends.iter().any(|(end, _)| end.who == Who::Outside);
        self.0.iter().any(|(kind, _)| match kind {
            ObjectKind::NetworkPolicy
            | ObjectKind::ClusterNetworkPolicy
            | ObjectKind::AdminNetworkPolicy
            | ObjectKind::BaselineAdminNetworkPolicy
            | ObjectKind::Pod => true,
            // Selectors ask for their labels.
            ObjectKind::Namespace => is_isolated || has_tiers,
            // An address may be a node's, and tiers ask for nodes' labels.
            ObjectKind::Node => (has_stranger && is_isolated) || has_tiers,
            // An address may be a Service's, behind which is another end.
            ObjectKind::Service => has_stranger,
            // Where they are needed, a Service is answered with an error.
            ObjectKind::EndpointSlice
            | ObjectKind::Endpoints
            | ObjectKind::ReplicaSet
            | ObjectKind::Job => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::testing::{flow, policy, world};

    fn is_open(kind: ObjectKind, more: &str, asked: &str) -> bool {
        let world = world(more);
        let mut missing = Missing::default();
        missing.add(kind, "not allowed".to_owned());
        missing.is_open(&world, &flow(&world, asked))
    }

    #[test]
    fn only_what_hangs_on_it_is_open() {
        let deny = policy("deny", "  policyTypes: [Ingress]");
        let pods = "shop/web db/pg TCP 5432";
        for (kind, more, asked, expected) in [
            (ObjectKind::NetworkPolicy, "", pods, true),
            (ObjectKind::AdminNetworkPolicy, "", pods, true),
            (ObjectKind::Namespace, "", pods, false),
            (ObjectKind::Namespace, &*deny, pods, true),
            (ObjectKind::Node, &*deny, pods, false),
            (ObjectKind::Node, &*deny, "203.0.113.7 db/pg TCP 5432", true),
            (ObjectKind::Node, "", "203.0.113.7 db/pg TCP 5432", false),
            (ObjectKind::Service, "", "shop/web 10.96.0.7 TCP 80", true),
            (ObjectKind::Service, "", pods, false),
            (ObjectKind::EndpointSlice, &*deny, pods, false),
        ] {
            assert_eq!(is_open(kind, more, asked), expected, "{kind:?} {asked}");
        }
        let world = world(&deny);
        assert!(!Missing::default().is_open(&world, &flow(&world, pods)));
    }
}
