//! Which fields of an object are used, so that reading one makes no tree of all the others: nine tenths
//! of a pod are its environment, its conditions and who wrote which field when (`managedFields`).

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::pruned::Pruned;
use crate::cluster::objects::ObjectKind;

/// What is used of a value.
#[derive(Clone, Copy, Debug)]
enum Used {
    /// All of it.
    All,
    /// Of a map these fields; of a list these of each item; anything else whole, as it is malformed.
    Fields(&'static [(&'static str, Used)]),
}

use Used::{All, Fields};

/// Of pods and nodes; the manifest that `kubectl apply` leaves in one is used of policies.
const ANNOTATIONS: Used = Fields(&[("kubernetes.io/config.hash", All)]);
const OWNERS: Used = Fields(&[("kind", All), ("name", All), ("controller", All)]);
const METADATA: Used = Fields(&[
    ("name", All),
    ("namespace", All),
    ("uid", All),
    ("resourceVersion", All),
    ("creationTimestamp", All),
    ("labels", All),
    ("annotations", ANNOTATIONS),
    ("ownerReferences", OWNERS),
]);
/// Who wrote which field is the larger part of many objects; when is used of policies.
const METADATA_AND_WHEN: Used = Fields(&[
    ("name", All),
    ("namespace", All),
    ("uid", All),
    ("resourceVersion", All),
    ("creationTimestamp", All),
    ("labels", All),
    ("annotations", All),
    ("ownerReferences", OWNERS),
    (
        "managedFields",
        Fields(&[("time", All), ("subresource", All)]),
    ),
]);
const CONTAINERS: Used = Fields(&[(
    "ports",
    Fields(&[("name", All), ("containerPort", All), ("protocol", All)]),
)]);
const POD: Used = Fields(&[
    ("apiVersion", All),
    ("kind", All),
    ("metadata", METADATA),
    (
        "spec",
        Fields(&[
            ("nodeName", All),
            ("hostNetwork", All),
            ("containers", CONTAINERS),
            ("initContainers", CONTAINERS),
        ]),
    ),
    (
        "status",
        Fields(&[
            ("phase", All),
            ("startTime", All),
            ("podIP", All),
            ("podIPs", All),
            (
                "containerStatuses",
                Fields(&[("ready", All), ("restartCount", All)]),
            ),
        ]),
    ),
]);
/// Its status also lists each image on it.
const NODE: Used = Fields(&[
    ("apiVersion", All),
    ("kind", All),
    ("metadata", METADATA),
    ("spec", Fields(&[("podCIDR", All), ("podCIDRs", All)])),
    ("status", Fields(&[("addresses", All)])),
]);
/// Kinds of which all is used.
const OTHER: Used = Fields(&[
    ("apiVersion", All),
    ("kind", All),
    ("metadata", METADATA_AND_WHEN),
    ("spec", All),
    ("status", All),
    // Of endpoints.
    ("addressType", All),
    ("endpoints", All),
    ("ports", All),
    ("subsets", All),
]);

/// Reads an object of a kind without what is not used of it.
///
/// # Errors
/// Those of the deserializer.
pub fn read<'de, D: Deserializer<'de>>(kind: ObjectKind, d: D) -> Result<Pruned, D::Error> {
    let used = match kind {
        ObjectKind::Pod => POD,
        ObjectKind::Node => NODE,
        _ => OTHER,
    };
    used.deserialize(d)
}

impl<'de> DeserializeSeed<'de> for Used {
    type Value = Pruned;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Pruned, D::Error> {
        match self {
            All => serde::Deserialize::deserialize(d).map(Pruned::Whole),
            Fields(_) => d.deserialize_any(self),
        }
    }
}

impl<'de> Visitor<'de> for Used {
    type Value = Pruned;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Pruned, A::Error> {
        let fields = match self {
            Fields(fields) => fields,
            All => &[],
        };
        let mut map = Vec::with_capacity(fields.len());
        while let Some(field) = from.next_key_seed(Field(fields))? {
            match field {
                Some((known, used)) => map.push((*known, from.next_value_seed(*used)?)),
                None => _ = from.next_value::<IgnoredAny>()?,
            }
        }
        Ok(Pruned::Map(map))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Pruned, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = from.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Pruned::List(list))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Pruned, E> {
        Ok(Pruned::Whole(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Pruned, E> {
        Ok(Pruned::Whole(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Pruned, E> {
        Ok(Pruned::Whole(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Pruned, E> {
        Ok(Pruned::Whole(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Pruned, E> {
        Ok(Pruned::Whole(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Pruned, E> {
        Ok(Pruned::Whole(Value::Null))
    }
}

/// Which of these fields a name is; made without a copy of the name, as most are of none.
#[derive(Clone, Copy)]
struct Field(&'static [(&'static str, Used)]);

impl<'de> DeserializeSeed<'de> for Field {
    type Value = Option<&'static (&'static str, Used)>;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_identifier(self)
    }
}

impl Visitor<'_> for Field {
    type Value = Option<&'static (&'static str, Used)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().find(|(known, _)| *known == name))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cluster::objects::Interner;
    use crate::cluster::parse::{Parsed, parse, parse_pruned};

    /// What is read of an object is what there is to read.
    #[test]
    fn nothing_that_is_read_is_left_out() {
        let metadata = json!({
            "name": "n", "namespace": "shop", "uid": "u-1", "resourceVersion": "7",
            "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"app": "web"},
            "annotations": {"kubernetes.io/config.hash": "0123456789abcdef0123456789abcdef",
                "kubectl.kubernetes.io/last-applied-configuration": "{\"spec\":{}}"},
            "ownerReferences": [{"kind": "ReplicaSet", "name": "web-1", "controller": true}],
            "managedFields": [{"manager": "kubectl", "time": "2026-01-02T00:00:00Z",
                "fieldsV1": {"f:status": {}}}],
        });
        let of = |api_version: &str, kind: &str, rest: Value| {
            let mut object = json!({"apiVersion": api_version, "kind": kind, "metadata": metadata});
            let fields = rest.as_object().unwrap().clone();
            object.as_object_mut().unwrap().extend(fields);
            object
        };
        let ports = json!([{"name": "http", "containerPort": 8080, "protocol": "UDP"}]);
        let selector = json!({"matchLabels": {"a": "b"}});
        let mut enforcer = of(
            "v1",
            "Pod",
            json!({"spec": {"hostNetwork": true}, "status": {"containerStatuses":
                [{"name": "c", "ready": true, "restartCount": 3, "image": "x"}]}}),
        );
        enforcer["metadata"]["labels"] = json!({"k8s-app": "calico-node"});
        let objects = [
            of(
                "v1",
                "Pod",
                json!({
                    "spec": {"nodeName": "node-a", "hostNetwork": true, "volumes": [{"name": "v"}],
                        "containers": [{"name": "c", "env": [{"name": "A"}], "ports": ports}],
                        "initContainers": [{"name": "i", "ports": ports}]},
                    "status": {"phase": "Running", "startTime": "2026-01-01T00:00:01Z",
                        "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
                        "conditions": [{"type": "Ready"}]},
                }),
            ),
            enforcer,
            of(
                "v1",
                "Node",
                json!({
                    "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24", "fd00::/64"]},
                    "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
                        "images": [{"names": ["x"]}]},
                }),
            ),
            of(
                "v1",
                "Service",
                json!({
                    "spec": {"clusterIP": "10.96.0.1", "selector": {"app": "web"},
                        "ports": [{"port": 80, "targetPort": "http"}]},
                    "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}},
                }),
            ),
            of(
                "discovery.k8s.io/v1",
                "EndpointSlice",
                json!({"addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}],
                    "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]}),
            ),
            of("v1", "Namespace", json!({"spec": {}, "status": {}})),
            of(
                "networking.k8s.io/v1",
                "NetworkPolicy",
                json!({"spec": {"podSelector": selector, "policyTypes": ["Ingress"],
                    "ingress": [{"from": [{"podSelector": selector}]}]}}),
            ),
            of(
                "policy.networking.k8s.io/v1alpha2",
                "ClusterNetworkPolicy",
                json!({"spec": {"tier": "Admin", "priority": 3,
                    "subject": {"namespaces": selector},
                    "ingress": [{"name": "r", "action": "Deny", "from": [{"namespaces": selector}]}]}}),
            ),
        ];
        for object in objects {
            let kind = object["kind"].as_str().unwrap();
            let kind = ObjectKind::of(object["apiVersion"].as_str().unwrap(), kind).unwrap();
            let less = read(kind, &object).unwrap();
            let version = less
                .get("metadata")
                .and_then(|meta| meta.get("resourceVersion"));
            assert_eq!(version.and_then(Pruned::as_str), Some("7"));
            assert!(!less.clone().into_value().to_string().contains("f:status"));
            let strip = |parsed: Result<Option<Parsed>, _>| {
                let parsed = parsed.unwrap().unwrap();
                parsed.strip(&mut Interner::default())
            };
            let expected = strip(parse(&object, None));
            assert_eq!(strip(parse_pruned(kind, less.clone())), expected);
            assert_eq!(strip(parse(&less.into_value(), None)), expected);
        }
    }

    #[test]
    fn what_is_malformed_is_left_for_who_says_so() {
        for spec in [
            json!("text"),
            json!(7),
            json!(-7),
            json!(0.5),
            json!(true),
            json!(null),
        ] {
            let pod = json!({"spec": spec, "status": [spec], "other": spec});
            let less = read(ObjectKind::Pod, &pod).unwrap().into_value();
            assert_eq!(less, json!({"spec": spec, "status": [spec]}));
        }
        for (spec, status) in [
            (json!(7), json!({})),
            (json!({"nodeName": 7}), json!({})),
            (json!({"containers": "web"}), json!({})),
            (
                json!({"containers": [{"ports": [{"containerPort": 65_536}]}]}),
                json!({}),
            ),
            (json!({}), json!({"podIPs": [{"ip": "10.0.0.256"}]})),
            (json!({}), json!({"startTime": "yesterday"})),
        ] {
            let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "n"},
                "spec": spec, "status": status});
            let less = read(ObjectKind::Pod, &pod).unwrap();
            let expected = parse(&pod, None).unwrap_err();
            assert_eq!(parse_pruned(ObjectKind::Pod, less).unwrap_err(), expected);
        }
    }

    /// A server that answers with something else is not believed because of what was asked for.
    #[test]
    fn what_says_that_it_is_no_pod_is_none() {
        for (object, is_used) in [
            (json!({"metadata": {"name": "n"}}), true),
            (json!({"apiVersion": "v1", "metadata": {"name": "n"}}), true),
            (json!({"kind": "Pig", "metadata": {"name": "n"}}), false),
            (
                json!({"apiVersion": "farm/v1", "metadata": {"name": "n"}}),
                false,
            ),
        ] {
            let less = read(ObjectKind::Pod, &object).unwrap();
            let parsed = parse_pruned(ObjectKind::Pod, less).unwrap();
            assert_eq!(parsed.is_some(), is_used, "{object}");
        }
        let nameless = json!({"metadata": {"name": ""}});
        let less = read(ObjectKind::Pod, &nameless).unwrap();
        assert!(parse_pruned(ObjectKind::Pod, less).is_err());
    }
}
