//! One object: from a JSON or YAML value to what is used of it, or why it is malformed.
//!
//! Two steps, because a file's text is read item by item: [`parse`] takes the used fields out of a
//! value that is then forgotten, [`Parsed::strip`] turns them into an [`Object`] with shared
//! strings.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::network::{RawEndpointSlice, RawEndpoints, RawNode, RawService};
use self::pod::RawPod;
use self::pruned::Pruned;
use super::objects::{Endpoints, Interner, Key, Labels, Namespace, Object, ObjectKind};
use super::uid::{self, UidHash};
use crate::event::Workload;

mod network;
mod pod;
mod policy;
pub mod pruned;
mod tier;
pub mod used;

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
    Service(Box<RawService>),
    Endpoints(Box<Metadata>, network::Targets),
    Node(Box<RawNode>, Vec<IpAddr>),
    Policy(Box<policy::Policy>),
    Tier(Box<tier::Policy>),
    Meta(Box<Manifest<Nothing, Nothing>>),
}

/// Takes the used fields of an object. `list` is `apiVersion` and `kind` of the list that it came
/// in: the items of a `PodList` do not repeat them. `None` for kinds that are not used.
///
/// # Errors
/// The object lacks `kind` or a name, or a used field has the wrong type or form.
pub fn parse(value: &Value, list: Option<(&str, &str)>) -> Result<Option<Parsed>, Malformed> {
    let field = |name: &str| value.get(name).and_then(Value::as_str);
    // The items of a plain `List` must say themselves what they are.
    let inherited = list.and_then(|(api, kind)| {
        let kind = kind.strip_suffix("List").filter(|kind| !kind.is_empty())?;
        Some((api, kind))
    });
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
        ObjectKind::NetworkPolicy => policy::read(value),
        ObjectKind::ClusterNetworkPolicy
        | ObjectKind::AdminNetworkPolicy
        | ObjectKind::BaselineAdminNetworkPolicy => tier::read(value, kind),
        ObjectKind::Namespace | ObjectKind::ReplicaSet | ObjectKind::Job => {
            read(value).map(|raw| Fields::Meta(Box::new(raw)))
        }
    }
    .map_err(malformed)?;
    let parsed = Parsed { kind, fields };
    if parsed.metadata().name.is_empty() {
        return Err(malformed("metadata.name: is empty".into()));
    }
    Ok(Some(parsed))
}

/// The same of what [`used::read`] read of an object that was asked for as one of a kind.
///
/// # Errors
/// Those of [`parse`].
pub fn parse_pruned(kind: ObjectKind, object: Pruned) -> Result<Option<Parsed>, Malformed> {
    let says = |name: &str, expected: &str| {
        let said = object.get(name).and_then(Pruned::as_str);
        said.is_none_or(|said| said == expected)
    };
    let (api_version, name) = (kind.api_version(), kind.as_str());
    // Most objects of a cluster are pods, and nearly all changes. What is wrong with one is found out
    // the long way.
    if kind == ObjectKind::Pod
        && says("apiVersion", &api_version)
        && says("kind", name)
        && let Ok(raw) = RawPod::deserialize(&object)
        && !raw.metadata.name.is_empty()
    {
        let fields = Fields::Pod(Box::new(raw));
        return Ok(Some(Parsed { kind, fields }));
    }
    let list = format!("{name}List");
    parse(&object.into_value(), Some((&api_version, &list)))
}

fn read<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
    if let Ok(read) = T::deserialize(value) {
        return Ok(read);
    }
    // Once more with the path, which names the field and costs as much as the reading:
    // `spec.containers[0].ports[0].containerPort: invalid type: ...`.
    serde_path_to_error::deserialize(value).map_err(|e| e.to_string())
}

impl Parsed {
    fn metadata(&self) -> &Metadata {
        match &self.fields {
            Fields::Pod(raw) => &raw.metadata,
            Fields::Service(raw) => &raw.metadata,
            Fields::Endpoints(metadata, _) => metadata,
            Fields::Node(raw, _) => &raw.metadata,
            Fields::Policy(raw) => &raw.metadata,
            Fields::Tier(raw) => &raw.metadata,
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
            Fields::Service(raw) => Object::Service(Arc::new(raw.strip(key, strings))),
            Fields::Endpoints(metadata, targets) => Object::Endpoints(Arc::new(Endpoints {
                service: metadata.service(&key, strings),
                key,
                port_names: targets.names(strings),
                targets: targets.pairs.into(),
            })),
            Fields::Node(raw, ips) => Object::Node(Arc::new(raw.strip(key, ips, strings))),
            Fields::Meta(raw) => match self.kind {
                ObjectKind::ReplicaSet | ObjectKind::Job => {
                    Object::Owner(Box::new((key, raw.metadata.controller(strings))))
                }
                _ => Object::Namespace(Arc::new(Namespace {
                    key,
                    labels: shared(raw.metadata.labels, strings),
                })),
            },
            Fields::Policy(raw) => {
                let policy = raw.strip(&key, strings);
                Object::NetworkPolicy(Box::new(key), Arc::new(policy))
            }
            Fields::Tier(raw) => {
                let policy = raw.strip(&key, strings);
                Object::TierPolicy(Box::new(key), Arc::new(policy))
            }
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
    annotations: Option<Annotations>,
    owner_references: Option<Vec<OwnerReference>>,
    managed_fields: Option<Vec<ManagedFields>>,
}

/// Who wrote some of the fields, and when.
#[derive(Debug, Deserialize)]
struct ManagedFields {
    time: Option<Timestamp>,
    /// As `status`, which is no part of what somebody wants.
    subresource: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Annotations {
    #[serde(rename = "kubernetes.io/config.hash")]
    config_hash: Option<String>,
}

#[derive(Debug, Deserialize)]
struct OwnerReference {
    kind: String,
    name: String,
    controller: Option<bool>,
}

impl Metadata {
    /// When somebody last wrote anything but a subresource.
    fn written(&self) -> Option<Timestamp> {
        let writes = self.managed_fields.iter().flatten();
        let own = writes.filter(|w| w.subresource.as_deref().is_none_or(str::is_empty));
        own.filter_map(|w| w.time).max()
    }

    /// The UID of the static pod that a mirror pod stands for. Whoever may make a pod may write
    /// this annotation: what is no hash of the kubelet's is not taken, so that nobody takes the
    /// UID of a pod of the API.
    fn static_uid(&self) -> Option<UidHash> {
        let hash = self.annotations.as_ref()?.config_hash.as_deref()?;
        uid::is_config_hash(hash).then(|| UidHash::of(hash))
    }

    /// The Service of endpoints: a slice names it in a label, an Endpoints object is called as it.
    fn service(&self, key: &Key, strings: &mut Interner) -> Option<Arc<str>> {
        if key.kind == ObjectKind::Endpoints {
            return Some(key.name.clone());
        }
        let name = self.labels.as_ref()?.get("kubernetes.io/service-name")?;
        Some(strings.get(name))
    }

    /// The owner that controls the object; of a single one that does not say, that one.
    fn controller(&self, strings: &mut Interner) -> Option<Arc<Workload>> {
        let owners = self.owner_references.as_deref().unwrap_or_default();
        let owner = match owners {
            [only] if only.controller.is_none() => only,
            _ => owners.iter().find(|o| o.controller == Some(true))?,
        };
        Some(strings.workload(&owner.kind, &owner.name))
    }
}

fn shared(pairs: Option<BTreeMap<String, String>>, strings: &mut Interner) -> Labels {
    let pairs = pairs.unwrap_or_default();
    let shared = pairs.iter();
    let shared = shared
        .map(|(k, v)| (strings.get(k), strings.get(v)))
        .collect();
    strings.labels(shared)
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

#[derive(Debug, Deserialize)]
struct Address {
    ip: IpAddr,
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

fn ip(text: &str, field: impl Fn() -> String) -> Result<IpAddr, String> {
    text.parse()
        .map_err(|_| format!("{}: {text:?} is no IP address", field()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Why an object is malformed.
    fn error(value: Value) -> String {
        let malformed = parse(&value, None).unwrap_err();
        assert_eq!(malformed.name, "n");
        malformed.message
    }

    fn pod(spec: Value, status: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "n"}, "spec": spec,
            "status": status})
    }

    #[test]
    fn what_is_malformed_is_told_by_its_field() {
        let service = |spec: Value| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "n"}, "spec": spec});
        let node = |spec: Value, status: Value| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}, "spec": spec, "status": status});
        let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "n"},
            "addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0"]}]});
        for (value, says) in [
            (
                pod(
                    json!({}),
                    json!({"podIPs": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.256"}]}),
                ),
                "status.podIPs[1].ip: invalid IP address",
            ),
            (
                pod(json!({}), json!({"startTime": "yesterday"})),
                "status.startTime: ",
            ),
            (
                pod(json!({"containers": "web"}), json!({})),
                "spec.containers: invalid type: string",
            ),
            (
                pod(
                    json!({"containers": [{"ports": [{"containerPort": 65536}]}]}),
                    json!({}),
                ),
                "spec.containers[0].ports[0].containerPort: invalid value",
            ),
            (
                pod(
                    json!({"containers": [{"ports": [{"containerPort": 1, "protocol": "QUIC"}]}]}),
                    json!({}),
                ),
                "protocol: unknown protocol \"QUIC\"",
            ),
            (
                pod(json!({"hostNetwork": "yes"}), json!({})),
                "spec.hostNetwork: invalid type",
            ),
            (
                service(json!({"clusterIP": "10.96.0"})),
                "spec.clusterIP: invalid IP address",
            ),
            (
                service(json!({"clusterIPs": ["10.96.0.1", 7]})),
                "spec.clusterIPs",
            ),
            (
                service(json!({"ports": [{"port": 80, "targetPort": [1]}]})),
                "targetPort: expected a port number or a port's name",
            ),
            (
                service(json!({"selector": {"app": 1}})),
                "spec.selector.app: invalid type: integer",
            ),
            (
                node(json!({"podCIDR": "10.244.0.0/33"}), json!({})),
                "spec.podCIDR: invalid IP address syntax",
            ),
            (
                node(
                    json!({}),
                    json!({"addresses": [{"type": "InternalIP", "address": "n"}]}),
                ),
                "status.addresses[0].address: \"n\" is no IP address",
            ),
            (slice, "endpoints[0].addresses: \"10.0.0\" is no IP address"),
        ] {
            let error = error(value);
            assert!(error.contains(says), "{error:?} lacks {says:?}");
        }
    }

    #[test]
    fn what_has_no_name_or_kind_is_named_as_far_as_it_goes() {
        for value in [
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "shop"}}),
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "shop", "name": ""}}),
        ] {
            let malformed = parse(&value, None).unwrap_err();
            assert_eq!((&*malformed.kind, &*malformed.namespace), ("Pod", "shop"));
            assert!(malformed.message.starts_with("metadata"), "{malformed:?}");
        }
        for value in [
            json!({"metadata": {"name": "n"}}),
            json!(null),
            json!("text"),
            json!([1]),
        ] {
            let malformed = parse(&value, None).unwrap_err();
            assert!(malformed.message.contains("no kind"), "{malformed:?}");
        }
    }

    #[test]
    fn nulls_and_empty_fields_are_as_absent() {
        let empty = pod(
            json!({"nodeName": null, "containers": [{"ports": null}]}),
            json!({"podIP": "", "podIPs": null}),
        );
        let parsed = parse(&empty, None).unwrap().unwrap();
        let Object::Pod(pod) = parsed.strip(&mut Interner::default()) else {
            panic!("no pod");
        };
        assert_eq!(
            (&*pod.key.namespace, pod.ips.len(), &pod.workload),
            ("default", 0, &None)
        );
    }

    #[test]
    fn kinds_that_are_not_used_are_not_looked_into() {
        let other = json!({"apiVersion": "serving.knative.dev/v1", "kind": "Service", "spec": 1});
        assert!(parse(&other, None).unwrap().is_none());
    }
}
