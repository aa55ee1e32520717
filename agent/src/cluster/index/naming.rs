//! From an address and a port to names, at a time.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;

use super::{Index, address};
use crate::cluster::objects::{Key, Node, Object, ObjectKind, Pod, Port, Service, selects};
use crate::cluster::uid::PodUid;
use crate::event::{Endpoint, EndpointKind, Protocol, ServiceRef, Workload};

/// Who has an address.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Holder<'a> {
    /// A pod with an address of its own.
    Pod(&'a Arc<Pod>),
    /// A node.
    Node(&'a Arc<Node>),
    /// A Service.
    Service(&'a Arc<Service>),
}

impl Index {
    /// Who had an address at a time. A pod comes before a node, a node before a Service: the
    /// address of a load balancer may be a node's own.
    pub fn holder(&self, ip: IpAddr, at: Timestamp) -> Option<Holder<'_>> {
        let address = address(ip);
        if let Some(pod) = self.pods.holder(&address, at) {
            return Some(Holder::Pod(pod));
        }
        if let Some(node) = self.nodes.holder(&address, at) {
            return Some(Holder::Node(node));
        }
        self.services.holder(&address, at).map(Holder::Service)
    }

    /// Names an end by its address and port at a time: fills everything that is known, and
    /// nothing else. `service` is filled where the address is a Service's own.
    pub fn name(&self, end: &mut Endpoint, protocol: Option<Protocol>, at: Timestamp) {
        let Some(ip) = end.ip.map(|ip| ip.to_canonical()) else {
            return;
        };
        let port = to_port(protocol, end.port);
        let listed = || port.is_some_and(|port| self.lists(ip, port));
        match self.holder(ip, at) {
            Some(Holder::Pod(pod)) => {
                end.kind = Some(EndpointKind::Pod);
                self.name_pod(end, pod);
                end.node = pod.node.clone();
                end.declared_port = port.is_some_and(|port| self.declares(pod, port)) || listed();
            }
            Some(Holder::Node(node)) => {
                end.kind = Some(EndpointKind::Node);
                end.node = Some(node.key.name.clone());
                let pod = port.and_then(|port| {
                    let key = (node.key.name.clone(), port);
                    self.host_ports.only_holder(&key, at)
                });
                if let Some(pod) = pod {
                    end.host_network = true;
                    self.name_pod(end, pod);
                }
                let node_port = || port.is_some_and(|p| self.node_ports.holder(&p, at).is_some());
                end.declared_port = pod.is_some() || node_port() || listed();
            }
            Some(Holder::Service(_)) => {
                end.kind = Some(EndpointKind::Service);
                end.service = self.service(ip, end.port, protocol, at);
                end.declared_port =
                    port.is_some_and(|port| self.service_ports.holder(&(ip, port), at).is_some());
            }
            None if self.pod_ranges.contains(ip) => end.kind = Some(EndpointKind::Unknown),
            None if self.is_partial => {}
            None => end.kind = Some(EndpointKind::External),
        }
    }

    /// The pod that has a UID, or had it until a while ago: that of the API, or of a static pod
    /// the kubelet's own. Ended and host-network pods are among them. The UID alone tells the pod
    /// at any time, as none is given twice.
    ///
    /// Pods are found by [a hash](crate::cluster::uid::UidHash) of it.
    pub fn pod_by_uid(&self, uid: &PodUid) -> Option<&Arc<Pod>> {
        self.pods_by_uid.get(uid.hash())
    }

    /// Fills in a pod and what runs it, and nothing else.
    pub fn name_pod(&self, end: &mut Endpoint, pod: &Pod) {
        let workload = self.workload(pod);
        end.namespace = Some(pod.key.namespace.clone());
        end.pod = Some(pod.key.name.clone());
        end.workload = workload.cloned();
    }

    /// What runs a pod: its owner's owner where that is known, else what the pod itself tells.
    fn workload<'a>(&'a self, pod: &'a Pod) -> Option<&'a Arc<Workload>> {
        let known = |kind| self.counts[kind as usize] > 0;
        // Only files have them.
        if !known(ObjectKind::ReplicaSet) && !known(ObjectKind::Job) {
            return pod.workload.as_ref();
        }
        let owner = pod.controller.as_ref()?;
        let kind = match &*owner.kind {
            "ReplicaSet" => ObjectKind::ReplicaSet,
            "Job" => ObjectKind::Job,
            _ => return pod.workload.as_ref(),
        };
        if !known(kind) {
            return pod.workload.as_ref();
        }
        let key = Key {
            kind,
            namespace: pod.key.namespace.clone(),
            name: owner.name.clone(),
        };
        match self.objects.get(&key) {
            Some(Object::Owner(known)) => Some(known.1.as_ref().unwrap_or(owner)),
            _ => pod.workload.as_ref(),
        }
    }

    /// Whether endpoints list an address and port.
    fn lists(&self, ip: IpAddr, port: Port) -> bool {
        let listed = self.endpoints.get(&port);
        listed.is_some_and(|listed| listed.contains_key(&ip))
    }

    /// Whether the pod's containers or a Service that selects it declare a port. Only a pod whose
    /// containers do not is compared with Services: those of its namespace with this target port.
    fn declares(&self, pod: &Pod, port: Port) -> bool {
        let selected = || {
            let services = self.targets.get(&port)?.get(&pod.key.namespace)?;
            Some(services.iter().any(|s| selects(&s.selector, &pod.labels)))
        };
        pod.ports.binary_search(&port).is_ok() || selected().unwrap_or(false)
    }

    /// The Service that has an address and port: a cluster IP, an external or load balancer's
    /// address, or a node's address and a node port. A cluster IP names its Service also without
    /// a port, or with one that it does not have; the other addresses may be shared.
    pub fn service(
        &self,
        ip: IpAddr,
        port: Option<u16>,
        protocol: Option<Protocol>,
        at: Timestamp,
    ) -> Option<ServiceRef> {
        let ip = ip.to_canonical();
        let by_port = to_port(protocol, port).and_then(|port| {
            self.service_ports.holder(&(ip, port), at).or_else(|| {
                self.nodes.holder(&address(ip), at)?;
                self.node_ports.holder(&port, at)
            })
        });
        let service = by_port.or_else(|| {
            let by_address = self.services.holder(&address(ip), at);
            by_address.filter(|service| service.cluster_ips.contains(&ip))
        })?;
        Some(ServiceRef {
            namespace: service.key.namespace.clone(),
            name: service.key.name.clone(),
            ip,
            port,
        })
    }
}

fn to_port(protocol: Option<Protocol>, port: Option<u16>) -> Option<Port> {
    let protocol = protocol.filter(|p| p.has_ports())?;
    Some(Port {
        protocol,
        port: port?,
    })
}
