//! Who enforces policies on a node, as far as its pods show it.

use super::selector::value;
use super::world::World;
use crate::cluster::objects::Labels;

/// Labels of the pods of those who enforce, and what they are called.
const ENFORCERS: [(&str, &str); 14] = [
    ("calico-node", "Calico"),
    ("canal", "Canal"),
    ("cilium", "Cilium"),
    ("cilium-agent", "Cilium"),
    ("anetd", "GKE Dataplane V2"),
    ("kube-router", "kube-router"),
    ("weave-net", "Weave Net"),
    ("antrea", "Antrea"),
    ("ovnkube-node", "OVN-Kubernetes"),
    ("aws-node", "AWS VPC CNI"),
    ("azure-npm", "Azure NPM"),
    ("kindnet", "kindnet"),
    ("kube-network-policies", "kube-network-policies"),
    ("romana-agent", "Romana"),
];

/// The labels that tell what a pod is.
const NAMES: [&str; 4] = ["k8s-app", "app", "name", "app.kubernetes.io/name"];

/// The CNI whose enforcer a pod with these labels is.
pub fn of_labels(labels: &Labels) -> Option<&'static str> {
    NAMES.iter().find_map(|key| {
        let app = value(labels, key)?;
        let found = ENFORCERS.iter().find(|(label, _)| **label == **app)?;
        Some(found.1)
    })
}

/// What a node's agents say about who enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enforcer {
    /// This one does.
    Found(&'static str),
    /// The node's kube-proxy is among the objects and none that enforces is. Only then is its
    /// absence worth something: k3s enforces in a process of its own, and has no kube-proxy pod.
    /// Nor is flannel a sign, as others enforce beside it.
    NoneFound,
    /// The objects do not show it.
    Unknown,
}

/// Who enforces on a node.
pub fn enforcer(world: &World, node: &str) -> Enforcer {
    let (mut proxy, mut flannel) = (false, false);
    for (_, pod) in world.pods() {
        let here = pod.node.as_ref().is_some_and(|n| **n == *node);
        if !here || !pod.host_network || pod.ended {
            continue;
        }
        if let Some(name) = of_labels(&pod.labels) {
            return Enforcer::Found(name);
        }
        for app in NAMES.iter().filter_map(|key| value(&pod.labels, key)) {
            proxy |= &**app == "kube-proxy";
            flannel |= &**app == "flannel";
        }
    }
    match proxy && !flannel {
        true => Enforcer::NoneFound,
        false => Enforcer::Unknown,
    }
}
