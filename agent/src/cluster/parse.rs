//! One object: from a JSON or YAML value to what is used of it, or why it is malformed.
//!
//! Two steps, because a file's text is read item by item: [`parse`] takes the used fields out of a
//! value that is then forgotten, [`Parsed::strip`] turns them into an [`Object`] with shared
//! strings.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::objects::{
    Endpoints, Interner, Key, Labels, Node, Object, ObjectKind, Pod, Port, Service, ServicePort,
};
use crate::event::{Protocol, Workload};

/// An object that cannot be used, as far as it can be named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// Its `kind`; empty where it has none.
    pub kind: String,
    /// Its namespace; empty where it has none.
    pub namespace: String,
    /// Its name; empty where it has none.
    pub name: String,
    /// The field and what is wrong with it.
    pub message: String,
}

/// The used fields of one object.
#[derive(Debug)]
pub struct Parsed {
    kind: ObjectKind,
    fields: Fields,
}

#[derive(Debug)]
enum Fields {
    Pod(Box<RawPod>),
    Service(Box<Manifest<ServiceSpec, ServiceStatus>>),
    Endpoints(Metadata, Vec<(IpAddr, Port)>),
    Node(RawNode, Vec<IpAddr>),
    Meta(Manifest<Nothing, Nothing>),
}

/// Takes the used fields of an object. `list` is `apiVersion` and `kind` of the list that it came
/// in: the items of a `PodList` do not repeat them. `None` for kinds that are not used.
///
/// # Errors
/// The object lacks `kind` or a name, or a used field has the wrong type or form.
pub fn parse(value: &Value, list: Option<(&str, &str)>) -> Result<Option<Parsed>, Malformed> {
    let field = |name: &str| value.get(name).and_then(Value::as_str);
    let inherited = list.and_then(|(api, kind)| Some((api, kind.strip_suffix("List")?)));
    let kind = field("kind").or(inherited.map(|(_, kind)| kind));
    let api_version = field("apiVersion").or(inherited.map(|(api, _)| api));
    let malformed = |message: String| {
        let meta = |name: &str| {
            let text = value.get("metadata").and_then(|m| m.get(name));
            text.and_then(Value::as_str).unwrap_or("").to_owned()
        };
        Malformed {
            kind: kind.unwrap_or("").to_owned(),
            namespace: meta("namespace"),
            name: meta("name"),
            message,
        }
    };
    let (Some(kind), Some(api_version)) = (kind, api_version) else {
        return Err(malformed(
            "no kind and apiVersion: not a Kubernetes object".into(),
        ));
    };
    let Some(kind) = ObjectKind::of(api_version, kind) else {
        return Ok(None);
    };
    let fields = match kind {
        ObjectKind::Pod => read(value).map(|raw| Fields::Pod(Box::new(raw))),
        ObjectKind::Service => read(value).map(|raw| Fields::Service(Box::new(raw))),
        ObjectKind::EndpointSlice => read(value).and_then(RawEndpointSlice::targets),
        ObjectKind::Endpoints => read(value).map(RawEndpoints::targets),
        ObjectKind::Node => read(value).and_then(RawNode::addresses),
        ObjectKind::Namespace
        | ObjectKind::ReplicaSet
        | ObjectKind::Job
        | ObjectKind::NetworkPolicy => read(value).map(Fields::Meta),
    }
    .map_err(malformed)?;
    let parsed = Parsed { kind, fields };
    if parsed.metadata().name.is_empty() {
        return Err(malformed("metadata.name: is empty".into()));
    }
    Ok(Some(parsed))
}

fn read<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
    // The path names the field: `spec.containers[0].ports[0].containerPort: invalid type: ...`.
    serde_path_to_error::deserialize(value).map_err(|e| e.to_string())
}

impl Parsed {
    fn metadata(&self) -> &Metadata {
        match &self.fields {
            Fields::Pod(raw) => &raw.metadata,
            Fields::Service(raw) => &raw.metadata,
            Fields::Endpoints(metadata, _) => metadata,
            Fields::Node(raw, _) => &raw.metadata,
            Fields::Meta(raw) => &raw.metadata,
        }
    }

    /// The object with shared strings.
    pub fn strip(self, strings: &mut Interner) -> Object {
        let metadata = self.metadata();
        let namespace = match metadata.namespace.as_deref() {
            _ if !self.kind.is_namespaced() => "",
            // What `kubectl apply` makes of a manifest without a namespace.
            None | Some("") => "default",
            Some(namespace) => namespace,
        };
        let key = Key {
            kind: self.kind,
            namespace: strings.get(namespace),
            name: metadata.name.as_str().into(),
        };
        match self.fields {
            Fields::Pod(raw) => Object::Pod(Arc::new(raw.strip(key, strings))),
            Fields::Service(raw) => Object::Service(Arc::new(service(*raw, key, strings))),
            Fields::Endpoints(_, targets) => Object::Endpoints(Arc::new(Endpoints {
                key,
                targets: targets.into(),
            })),
            Fields::Node(raw, ips) => Object::Node(Arc::new(raw.strip(key, ips))),
            Fields::Meta(raw) => match self.kind {
                ObjectKind::ReplicaSet | ObjectKind::Job => {
                    Object::Owner(key, raw.metadata.controller(strings))
                }
                _ => Object::Named(key),
            },
        }
    }
}

// The API's own field names. Every field may be null, as the API server prints some.

#[derive(Debug, Deserialize)]
struct Nothing {}

#[derive(Debug, Deserialize)]
struct Manifest<Spec, Status> {
    metadata: Metadata,
    spec: Option<Spec>,
    status: Option<Status>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    namespace: Option<String>,
    uid: Option<String>,
    creation_timestamp: Option<Timestamp>,
    labels: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
}

#[derive(Debug, Deserialize)]
struct OwnerReference {
    kind: String,
    name: String,
    controller: Option<bool>,
}

impl Metadata {
    /// The owner that controls the object; of a single one that does not say, that one.
    fn controller(&self, strings: &mut Interner) -> Option<Workload> {
        let owners = self.owner_references.as_deref().unwrap_or_default();
        let owner = match owners {
            [only] if only.controller.is_none() => only,
            _ => owners.iter().find(|o| o.controller == Some(true))?,
        };
        Some(Workload {
            kind: strings.get(&owner.kind),
            name: strings.get(&owner.name),
        })
    }
}

fn shared(pairs: Option<BTreeMap<String, String>>, strings: &mut Interner) -> Labels {
    let pairs = pairs.unwrap_or_default();
    let shared = pairs.iter();
    shared
        .map(|(k, v)| (strings.get(k), strings.get(v)))
        .collect()
}

/// The plural field where it has something, else the singular one that it replaced.
fn both<T>(plural: Option<Vec<T>>, singular: Option<T>) -> Vec<T> {
    match plural {
        Some(list) if !list.is_empty() => list,
        _ => singular.into_iter().collect(),
    }
}

fn canonical(ips: impl IntoIterator<Item = IpAddr>) -> Box<[IpAddr]> {
    let mut seen: Vec<IpAddr> = Vec::new();
    for ip in ips {
        let ip = ip.to_canonical();
        if !seen.contains(&ip) {
            seen.push(ip);
        }
    }
    seen.into()
}

type RawPod = Manifest<PodSpec, PodStatus>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    node_name: Option<String>,
    host_network: Option<bool>,
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
}

#[derive(Debug, Deserialize)]
struct Container {
    ports: Option<Vec<ContainerPort>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    container_port: u16,
    protocol: Option<Protocol>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodStatus {
    phase: Option<String>,
    start_time: Option<Timestamp>,
    #[serde(rename = "podIP", default, deserialize_with = "addresses::one")]
    pod_ip: Option<IpAddr>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<Address>>,
}

#[derive(Debug, Deserialize)]
struct Address {
    ip: IpAddr,
}

impl RawPod {
    fn strip(self, key: Key, strings: &mut Interner) -> Pod {
        let controller = self.metadata.controller(strings);
        let workload = controller
            .clone()
            .map(|owner| top_of(owner, &self.metadata, strings));
        let spec = self.spec.unwrap_or(PodSpec {
            node_name: None,
            host_network: None,
            containers: None,
            init_containers: None,
        });
        let containers = spec.containers.into_iter().flatten();
        let containers = containers.chain(spec.init_containers.into_iter().flatten());
        let ports = containers.flat_map(|c| c.ports.unwrap_or_default());
        let mut ports: Vec<Port> = ports
            .map(|p| Port {
                protocol: p.protocol.unwrap_or(Protocol::TCP),
                port: p.container_port,
            })
            .collect();
        ports.sort_unstable();
        ports.dedup();
        let (mut ended, mut started, mut ips) = (false, None, Vec::new());
        if let Some(status) = self.status {
            ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
            started = status.start_time;
            let plural = status.pod_ips;
            let plural = plural.map(|ips| ips.into_iter().map(|a| a.ip).collect());
            ips = both(plural, status.pod_ip);
        }
        Pod {
            key,
            uid: self.metadata.uid.map(|uid| {
                let mut hasher = DefaultHasher::new();
                uid.hash(&mut hasher);
                hasher.finish()
            }),
            node: spec.node_name.map(|name| strings.get(&name)),
            ips: canonical(ips),
            host_network: spec.host_network.unwrap_or(false),
            ended,
            started,
            labels: shared(self.metadata.labels, strings),
            ports: ports.into(),
            controller,
            workload,
        }
    }
}

/// The owner's own owner, where names tell it: a Deployment names its ReplicaSets
/// `NAME-POD_TEMPLATE_HASH`, a CronJob its Jobs `NAME-SCHEDULED_MINUTE` (8 digits and more).
fn top_of(owner: Workload, pod: &Metadata, strings: &mut Interner) -> Workload {
    let top = match &*owner.kind {
        "ReplicaSet" => {
            let labels = pod.labels.as_ref();
            labels
                .and_then(|labels| labels.get("pod-template-hash"))
                .and_then(|hash| owner.name.strip_suffix(hash.as_str())?.strip_suffix('-'))
                .map(|name| ("Deployment", name))
        }
        "Job" => owner.name.rsplit_once('-').and_then(|(name, minute)| {
            let is_minute = minute.len() >= 8 && minute.bytes().all(|b| b.is_ascii_digit());
            is_minute.then_some(("CronJob", name))
        }),
        _ => None,
    };
    match top {
        Some((kind, name)) if !name.is_empty() => Workload {
            kind: strings.get(kind),
            name: strings.get(name),
        },
        _ => owner,
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceSpec {
    #[serde(rename = "clusterIP", default, deserialize_with = "addresses::one")]
    cluster_ip: Option<IpAddr>,
    #[serde(rename = "clusterIPs", default, deserialize_with = "addresses::many")]
    cluster_ips: Vec<IpAddr>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<IpAddr>>,
    ports: Option<Vec<RawServicePort>>,
    selector: Option<BTreeMap<String, String>>,
}

/// An address that may be empty, as a cluster IP of an ExternalName, or `None`, as a headless one.
mod addresses {
    use std::net::IpAddr;

    use serde::{Deserialize, Deserializer, de::Error};

    pub fn one<'de, D: Deserializer<'de>>(d: D) -> Result<Option<IpAddr>, D::Error> {
        match Option::<String>::deserialize(d)?.as_deref() {
            None | Some("" | "None") => Ok(None),
            Some(ip) => ip.parse().map(Some).map_err(D::Error::custom),
        }
    }

    pub fn many<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<IpAddr>, D::Error> {
        #[derive(Deserialize)]
        struct One(#[serde(deserialize_with = "one")] Option<IpAddr>);
        let ips = Option::<Vec<One>>::deserialize(d)?.unwrap_or_default();
        Ok(ips.into_iter().filter_map(|ip| ip.0).collect())
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawServicePort {
    port: u16,
    protocol: Option<Protocol>,
    target_port: Option<TargetPort>,
    node_port: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a port number or a port's name")]
enum TargetPort {
    Number(u16),
    #[allow(dead_code, reason = "a name is a container's port already")]
    Name(String),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceStatus {
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

fn service(raw: Manifest<ServiceSpec, ServiceStatus>, key: Key, strings: &mut Interner) -> Service {
    let balancer = raw.status.and_then(|s| s.load_balancer);
    let ingress = balancer.and_then(|b| b.ingress).unwrap_or_default();
    let mut service = Service {
        key,
        created: raw.metadata.creation_timestamp,
        cluster_ips: Box::default(),
        other_ips: Box::default(),
        ports: Box::default(),
        selector: Box::default(),
    };
    let mut other_ips: Vec<IpAddr> = ingress.into_iter().filter_map(|i| i.ip).collect();
    if let Some(spec) = raw.spec {
        service.cluster_ips = canonical(both(Some(spec.cluster_ips), spec.cluster_ip));
        other_ips.extend(spec.external_ips.unwrap_or_default());
        let ports = spec.ports.unwrap_or_default().into_iter();
        service.ports = ports
            .map(|p| ServicePort {
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

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEndpointSlice {
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
    /// Absent: all ports.
    port: Option<u16>,
    protocol: Option<Protocol>,
}

#[derive(Debug, Deserialize)]
struct RawEndpoints {
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

fn targets(
    ips: impl IntoIterator<Item = IpAddr>,
    ports: Option<Vec<EndpointPort>>,
) -> Vec<(IpAddr, Port)> {
    let ports = ports.unwrap_or_default();
    let mut targets = Vec::new();
    for ip in ips {
        targets.extend(ports.iter().filter_map(|p| {
            let protocol = p.protocol.unwrap_or(Protocol::TCP);
            let port = p.port?;
            Some((ip.to_canonical(), Port { protocol, port }))
        }));
    }
    targets
}

impl RawEndpointSlice {
    fn targets(self) -> Result<Fields, String> {
        let mut ips = Vec::new();
        // Slices of the type FQDN hold names, not addresses.
        if self.address_type.as_deref() != Some("FQDN") {
            for (i, endpoint) in self.endpoints.iter().flatten().enumerate() {
                for address in &endpoint.addresses {
                    ips.push(ip(address, || format!("endpoints[{i}].addresses"))?);
                }
            }
        }
        Ok(Fields::Endpoints(self.metadata, targets(ips, self.ports)))
    }
}

impl RawEndpoints {
    fn targets(self) -> Fields {
        let subsets = self.subsets.into_iter().flatten();
        let targets = subsets.flat_map(|s| {
            let ips = s.addresses.into_iter().chain(s.not_ready_addresses);
            targets(ips.flatten().map(|a| a.ip), s.ports)
        });
        Fields::Endpoints(self.metadata, targets.collect())
    }
}

fn ip(text: &str, field: impl Fn() -> String) -> Result<IpAddr, String> {
    text.parse()
        .map_err(|_| format!("{}: {text:?} is no IP address", field()))
}

type RawNode = Manifest<NodeSpec, NodeStatus>;

#[derive(Debug, Deserialize)]
struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<IpNet>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<IpNet>>,
}

#[derive(Debug, Deserialize)]
struct NodeStatus {
    addresses: Option<Vec<NodeAddress>>,
}

#[derive(Debug, Deserialize)]
struct NodeAddress {
    r#type: String,
    address: String,
}

impl RawNode {
    /// Host names and DNS names are left out: no packet carries them.
    fn addresses(self) -> Result<Fields, String> {
        let mut ips = Vec::new();
        let addresses = self.status.as_ref().and_then(|s| s.addresses.as_ref());
        for (i, a) in addresses.into_iter().flatten().enumerate() {
            if matches!(a.r#type.as_str(), "InternalIP" | "ExternalIP") {
                ips.push(ip(&a.address, || format!("status.addresses[{i}].address"))?);
            }
        }
        Ok(Fields::Node(self, ips))
    }

    fn strip(self, key: Key, ips: Vec<IpAddr>) -> Node {
        let ranges = self.spec.map(|s| both(s.pod_cidrs, s.pod_cidr));
        let ranges = ranges.unwrap_or_default();
        Node {
            key,
            created: self.metadata.creation_timestamp,
            ips: canonical(ips),
            pod_ranges: ranges.iter().map(IpNet::trunc).collect(),
        }
    }
}
