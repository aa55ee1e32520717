//! Whether a flow goes to the cluster's DNS.

use std::net::IpAddr;

use super::evaluate::{Flow, Who};
use super::selector::value;
use super::world::World;
use crate::cluster::objects::{Pod, selects};
use crate::event::Protocol;

/// The port that clients ask.
pub const PORT: u16 = 53;

/// Labels that DNS pods carry, by the usual ways to install them.
const LABELS: [(&str, &str); 6] = [
    ("k8s-app", "kube-dns"),
    ("k8s-app", "coredns"),
    ("k8s-app", "node-local-dns"),
    ("app.kubernetes.io/name", "coredns"),
    ("app.kubernetes.io/name", "node-local-dns"),
    ("dns.operator.openshift.io/daemonset-dns", "default"),
];

/// Whether the destination is a DNS pod or node-local cache, and the port the one that it listens
/// on: after DNAT that need not be 53.
pub fn is_query(world: &World, flow: &Flow) -> bool {
    if !matches!(flow.protocol, Protocol::UDP | Protocol::TCP) {
        return false;
    }
    let listens = |pod: &Pod| {
        flow.port == Some(PORT)
            || world.services_of(&pod.key.namespace).any(|service| {
                selects(&service.selector, &pod.labels)
                    && service.ports.iter().any(|p| {
                        let target = p.target_port;
                        let named = || {
                            pod.port_names.iter().any(|(name, port)| {
                                Some(name) == p.target_name.as_ref() && Some(port.port) == flow.port
                            })
                        };
                        p.port.port == PORT && (target.is_some() && target == flow.port || named())
                    })
            })
    };
    match flow.destination.who {
        Who::Pod(id) => {
            let pod = world.pod(id);
            let has = |(key, of): &(&str, &str)| {
                value(&pod.labels, key).is_some_and(|value| &**value == *of)
            };
            LABELS.iter().any(has) && listens(pod)
        }
        // The cache listens on a link-local address of each node.
        _ => {
            let is_local = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.is_link_local(),
                IpAddr::V6(ip) => ip.is_unicast_link_local(),
            };
            flow.port == Some(PORT) && flow.destination.ip.is_some_and(is_local)
        }
    }
}
