//! Policies that are not applied yet: the world with them, and what becomes of a flow.

use std::sync::Arc;

use super::evaluate::{Flow, Verdict};
use super::world::{Change, World};
use crate::cluster::objects::Object;

/// What is proposed.
#[derive(Clone, Debug, Default)]
pub struct Proposal(Vec<Change>);

impl Proposal {
    /// Takes a policy, or a namespace with its labels, as it is proposed. Returns whether it is one.
    pub fn add(&mut self, object: Object) -> bool {
        self.0.push(match object {
            Object::NetworkPolicy(_, policy) => Change::Policy(policy),
            Object::TierPolicy(_, policy) => Change::Tier(policy),
            Object::Namespace(namespace) => Change::Namespace(namespace),
            _ => return false,
        });
        true
    }

    /// Takes a NetworkPolicy away.
    pub fn remove(&mut self, namespace: &str, name: &str) {
        self.0.push(Change::NoPolicy(namespace.into(), name.into()));
    }

    /// Namespaces of proposed policies, and proposed namespaces, that a world does not know: no pod is
    /// there that they would select.
    pub fn unknown_namespaces(&self, world: &World) -> Vec<Arc<str>> {
        let mut unknown: Vec<Arc<str>> = Vec::new();
        for change in &self.0 {
            let namespace = match change {
                Change::Policy(policy) => &policy.namespace,
                Change::Namespace(namespace) => &namespace.key.name,
                Change::NoPolicy(..) | Change::Tier(_) => continue,
            };
            if !world.has_namespace(namespace) && !unknown.contains(namespace) {
                unknown.push(namespace.clone());
            }
        }
        unknown
    }

    /// The world with it.
    pub fn applied_to(&self, world: &World) -> World {
        let mut after = world.clone();
        for change in &self.0 {
            after = after.with(change);
        }
        after
    }
}

/// What a proposal does to a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Effect {
    /// It would be denied, and is not now.
    Denied,
    /// It would depend on the CNI, and does not now.
    Open,
    /// Policies deny it now already.
    DeniedAlready,
    /// Nothing that takes anything away.
    None,
}

/// What a change of worlds does to a flow.
pub fn effect(now: &World, then: &World, flow: &Flow) -> Effect {
    match (now.both(flow), then.both(flow)) {
        (Verdict::Deny, _) => Effect::DeniedAlready,
        (_, Verdict::Deny) => Effect::Denied,
        (Verdict::Undefined, _) => Effect::None,
        (_, Verdict::Undefined) => Effect::Open,
        (_, Verdict::Allow | Verdict::NotApplicable) => Effect::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::testing::{flow, objects, policy, world};

    const DENY: &str = "  policyTypes: [Ingress]";

    fn proposed(more: &str, proposal: &str, asked: &str) -> Effect {
        let world = world(more);
        let mut all = Proposal::default();
        for object in objects(proposal) {
            assert!(all.add(object));
        }
        let flow = flow(&world, asked);
        effect(&world, &all.applied_to(&world), &flow)
    }

    #[test]
    fn a_policy_that_replaces_one_of_its_name_counts_alone() {
        let asked = "shop/web db/pg TCP 5432";
        let open = policy("guard", "  ingress: [{}]");
        let closed = policy("guard", DENY);
        assert_eq!(proposed("", &closed, asked), Effect::Denied);
        assert_eq!(proposed(&open, &closed, asked), Effect::Denied);
        assert_eq!(proposed(&closed, &open, asked), Effect::DeniedAlready);
        assert_eq!(proposed(&open, &policy("other", DENY), asked), Effect::None);
        assert_eq!(proposed("", &closed, "db/pg shop/web TCP 80"), Effect::None);
    }

    #[test]
    fn what_depends_on_the_cni_is_open() {
        let block = policy(
            "block",
            "  ingress: [{from: [{ipBlock: {cidr: 10.244.1.0/24}}]}]",
        );
        let asked = "shop/web db/pg TCP 5432";
        assert_eq!(proposed("", &block, asked), Effect::Open);
        assert_eq!(proposed(&block, &block, asked), Effect::None);
    }

    #[test]
    fn an_allow_that_is_taken_away_is_missed() {
        let allow = policy("allow", "  ingress: [{}]");
        let world = world(&format!("{allow}{}", policy("deny", DENY)));
        let asked = flow(&world, "shop/web db/pg TCP 5432");
        let mut proposal = Proposal::default();
        proposal.remove("db", "allow");
        let then = proposal.applied_to(&world);
        assert_eq!(effect(&world, &then, &asked), Effect::Denied);
        assert_eq!(proposal.unknown_namespaces(&world).len(), 0);
    }

    #[test]
    fn namespaces_that_are_not_there_are_named() {
        let world = world("");
        let mut proposal = Proposal::default();
        let elsewhere = policy("guard", DENY).replace("namespace: db", "namespace: new");
        assert!(proposal.add(objects(&elsewhere).remove(0)));
        assert_eq!(proposal.unknown_namespaces(&world), ["new".into()]);
        let pod = "{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: n}}";
        assert!(!proposal.add(objects(pod).remove(0)));
    }
}
