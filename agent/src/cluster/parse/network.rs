//! The fields of Services, endpoints and nodes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;

use super::{Address, Fields, Manifest, Metadata, addresses, both, canonical, ip, shared};
use crate::cluster::objects::{Interner, Key, Node, Port, Service, ServicePort};
use crate::event::Protocol;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceSpec {
    #[serde(rename = "clusterIP", default, deserialize_with = "addresses::one")]
    cluster_ip: Option<IpAddr>,
    #[serde(rename = "clusterIPs", default, deserialize_with = "addresses::many")]
    cluster_ips: Vec<IpAddr>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<IpAddr>>,
    ports: Option<Vec<RawServicePort>>,
    selector: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawServicePort {
    name: Option<String>,
    port: u16,
    protocol: Option<Protocol>,
    target_port: Option<TargetPort>,
    node_port: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a port number or a port's name")]
enum TargetPort {
    Number(u16),
    Name(String),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceStatus {
    load_balancer: Option<LoadBalancer>,
}

#[derive(Debug, Deserialize)]
struct LoadBalancer {
    ingress: Option<Vec<Ingress>>,
}

#[derive(Debug, Deserialize)]
struct Ingress {
    ip: Option<IpAddr>,
}

pub(super) type RawService = Manifest<ServiceSpec, ServiceStatus>;

impl RawService {
    pub(super) fn strip(self, key: Key, strings: &mut Interner) -> Service {
        let balancer = self.status.and_then(|s| s.load_balancer);
        let ingress = balancer.and_then(|b| b.ingress).unwrap_or_default();
        let mut service = Service {
            key,
            created: self.metadata.creation_timestamp,
            cluster_ips: Box::default(),
            other_ips: Box::default(),
            ports: Box::default(),
            selector: Arc::default(),
        };
        let mut other_ips: Vec<IpAddr> = ingress.into_iter().filter_map(|i| i.ip).collect();
        if let Some(spec) = self.spec {
            service.cluster_ips = canonical(both(Some(spec.cluster_ips), spec.cluster_ip));
            other_ips.extend(spec.external_ips.unwrap_or_default());
            let ports = spec.ports.unwrap_or_default().into_iter();
            service.ports = ports
                .map(|p| ServicePort {
                    name: strings.get(p.name.as_deref().unwrap_or("")),
                    target_name: match &p.target_port {
                        Some(TargetPort::Name(name)) => Some(strings.get(name)),
                        _ => None,
                    },
                    port: Port {
                        protocol: p.protocol.unwrap_or(Protocol::TCP),
                        port: p.port,
                    },
                    target_port: match p.target_port {
                        None | Some(TargetPort::Number(0)) => Some(p.port),
                        Some(TargetPort::Number(port)) => Some(port),
                        Some(TargetPort::Name(_)) => None,
                    },
                    node_port: p.node_port.filter(|port| *port != 0),
                })
                .collect();
            service.selector = shared(spec.selector, strings);
        }
        service.other_ips = canonical(other_ips);
        service
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawEndpointSlice {
    metadata: Metadata,
    address_type: Option<String>,
    endpoints: Option<Vec<RawEndpoint>>,
    ports: Option<Vec<EndpointPort>>,
}

#[derive(Debug, Deserialize)]
struct RawEndpoint {
    addresses: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct EndpointPort {
    name: Option<String>,
    /// Absent: all ports.
    port: Option<u16>,
    protocol: Option<Protocol>,
}

#[derive(Debug, Deserialize)]
pub(super) struct RawEndpoints {
    metadata: Metadata,
    subsets: Option<Vec<Subset>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Subset {
    addresses: Option<Vec<Address>>,
    not_ready_addresses: Option<Vec<Address>>,
    ports: Option<Vec<EndpointPort>>,
}

/// What endpoints list.
#[derive(Debug, Default)]
pub(super) struct Targets {
    pub(super) pairs: Vec<(IpAddr, Port)>,
    names: Vec<(String, Port)>,
}

impl Targets {
    fn add(&mut self, ips: impl IntoIterator<Item = IpAddr>, ports: Option<Vec<EndpointPort>>) {
        let ports = ports.unwrap_or_default().into_iter();
        let ports = ports.filter_map(|p| {
            let protocol = p.protocol.unwrap_or(Protocol::TCP);
            let port = p.port?;
            Some((p.name.unwrap_or_default(), Port { protocol, port }))
        });
        let ports: Vec<(String, Port)> = ports.collect();
        for ip in ips {
            let pairs = ports.iter().map(|(_, port)| (ip.to_canonical(), *port));
            self.pairs.extend(pairs);
        }
        for port in ports {
            if !self.names.contains(&port) {
                self.names.push(port);
            }
        }
    }

    pub(super) fn names(&self, strings: &mut Interner) -> Box<[(Arc<str>, Port)]> {
        let names = self.names.iter();
        names
            .map(|(name, port)| (strings.get(name), *port))
            .collect()
    }
}

impl RawEndpointSlice {
    pub(super) fn targets(self) -> Result<Fields, String> {
        let mut ips = Vec::new();
        // Slices of the type FQDN hold names, not addresses.
        if self.address_type.as_deref() != Some("FQDN") {
            for (i, endpoint) in self.endpoints.iter().flatten().enumerate() {
                for address in &endpoint.addresses {
                    ips.push(ip(address, || format!("endpoints[{i}].addresses"))?);
                }
            }
        }
        let mut targets = Targets::default();
        targets.add(ips, self.ports);
        Ok(Fields::Endpoints(Box::new(self.metadata), targets))
    }
}

impl RawEndpoints {
    pub(super) fn targets(self) -> Fields {
        let mut targets = Targets::default();
        for subset in self.subsets.into_iter().flatten() {
            let ips = subset
                .addresses
                .into_iter()
                .chain(subset.not_ready_addresses);
            targets.add(ips.flatten().map(|a| a.ip), subset.ports);
        }
        Fields::Endpoints(Box::new(self.metadata), targets)
    }
}

pub(super) type RawNode = Manifest<NodeSpec, NodeStatus>;

#[derive(Debug, Deserialize)]
pub(super) struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<IpNet>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<IpNet>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct NodeStatus {
    addresses: Option<Vec<NodeAddress>>,
}

#[derive(Debug, Deserialize)]
struct NodeAddress {
    r#type: String,
    address: String,
}

impl RawNode {
    /// Host names and DNS names are left out: no packet carries them.
    pub(super) fn addresses(self) -> Result<Fields, String> {
        let mut ips = Vec::new();
        let addresses = self.status.as_ref().and_then(|s| s.addresses.as_ref());
        for (i, a) in addresses.into_iter().flatten().enumerate() {
            if matches!(a.r#type.as_str(), "InternalIP" | "ExternalIP") {
                ips.push(ip(&a.address, || format!("status.addresses[{i}].address"))?);
            }
        }
        Ok(Fields::Node(Box::new(self), ips))
    }

    pub(super) fn strip(self, key: Key, ips: Vec<IpAddr>, strings: &mut Interner) -> Node {
        let ranges = self.spec.map(|s| both(s.pod_cidrs, s.pod_cidr));
        let ranges = ranges.unwrap_or_default();
        Node {
            key,
            created: self.metadata.creation_timestamp,
            ips: canonical(ips),
            pod_ranges: ranges.iter().map(IpNet::trunc).collect(),
            labels: shared(self.metadata.labels, strings),
        }
    }
}
