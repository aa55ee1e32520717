//! The lab's addresses as Kubernetes objects, for `--objects`.

use serde_json::{Value, json};

use crate::lab::{Family, Host, Lab, Place};

/// The name of a pod's place in objects and labels.
pub const PODS: [(Place, &str); 8] = [
    (Place::Of(Host::Client), "client"),
    (Place::Of(Host::Server), "server"),
    (Place::Of(Host::Client2), "client2"),
    (Place::Of(Host::Server2), "server2"),
    (Place::Absent, "absent"),
    (Place::Marker, "marker"),
    (Place::InnerClient, "inner-client"),
    (Place::InnerServer, "inner-server"),
];

/// The ports that the server's pod and its Service declare.
pub const PORTS: [(&str, u16, &str); 4] = [
    ("http", 80, "TCP"),
    ("feed", 5000, "UDP"),
    ("dns", 53, "UDP"),
    ("dns-tcp", 53, "TCP"),
];

/// A `List` of the lab's namespace, node, pods, Service and its endpoints. It is JSON, which is
/// YAML too.
pub fn list(lab: &Lab) -> Value {
    let namespace = lab.namespace();
    let addresses = |place| Family::BOTH.map(|family| lab.address(place, family).to_string());
    let mut items = vec![
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}),
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": lab.node()},
            "spec": {
                "podCIDR": lab.range(Family::V4),
                "podCIDRs": Family::BOTH.map(|family| lab.range(family)),
            },
            "status": {"addresses": Host::PODS.iter()
                .flat_map(|pod| addresses(Place::RouterTowards(*pod)))
                .map(|address| json!({"type": "InternalIP", "address": address}))
                .collect::<Vec<_>>()},
        }),
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": namespace, "name": "server"},
            "spec": {
                "clusterIP": addresses(Place::Service)[0],
                "clusterIPs": addresses(Place::Service),
                "selector": {"app": "server"},
                "ports": PORTS.map(|(name, port, protocol)| json!({
                    "name": name, "port": port, "protocol": protocol, "targetPort": port,
                })),
            },
        }),
    ];
    for family in Family::BOTH {
        items.push(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "addressType": family.to_string(),
            "metadata": {
                "namespace": namespace,
                "name": format!("server-{}", family.to_string().to_lowercase()),
                "labels": {"kubernetes.io/service-name": "server"},
            },
            "endpoints": [{
                "addresses": [lab.address(Place::Of(Host::Server), family)],
                "conditions": {"ready": true},
                "targetRef": {"kind": "Pod", "namespace": namespace, "name": "server"},
            }],
            "ports": PORTS.map(|(name, port, protocol)| json!({
                "name": name, "port": port, "protocol": protocol,
            })),
        }));
    }
    for (place, name) in PODS {
        let ports = if name == "server" { &PORTS[..] } else { &[] };
        items.push(pod(&namespace, name, &lab.node(), &addresses(place), ports));
    }
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

/// The same list, each pod of a StatefulSet of its own name: counters that name no pod tell them
/// apart by workload.
pub fn with_workloads(mut list: Value) -> Value {
    for item in list["items"].as_array_mut().into_iter().flatten() {
        if item["kind"] == "Pod" {
            let name = item["metadata"]["name"].clone();
            item["metadata"]["ownerReferences"] = json!([{
                "apiVersion": "apps/v1", "kind": "StatefulSet", "name": name, "uid": name,
                "controller": true,
            }]);
        }
    }
    list
}

/// The same list, its Service with further ports: `(port, protocol, target port)`.
pub fn with_service_ports(mut list: Value, ports: &[(u16, &str, u16)]) -> Value {
    for item in list["items"].as_array_mut().into_iter().flatten() {
        if item["kind"] == "Service"
            && let Some(declared) = item["spec"]["ports"].as_array_mut()
        {
            declared.retain(|known| {
                !ports.iter().any(|(port, protocol, _)| {
                    known["port"] == *port && known["protocol"] == *protocol
                })
            });
            declared.extend(ports.iter().map(|(port, protocol, target)| {
                json!({
                    "name": format!("{}-{port}", protocol.to_lowercase()),
                    "port": port, "protocol": protocol, "targetPort": target,
                })
            }));
        }
    }
    list
}

/// A running pod, labelled `app: NAME`.
pub fn pod(
    namespace: &str,
    name: &str,
    node: &str,
    addresses: &[String],
    ports: &[(&str, u16, &str)],
) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "namespace": namespace, "name": name, "labels": {"app": name},
            "uid": format!("{namespace}-{name}"),
        },
        "spec": {
            "nodeName": node,
            "containers": [{
                "name": "main", "image": "example.invalid/main",
                "ports": ports.iter().map(|(name, port, protocol)| json!({
                    "name": name, "containerPort": port, "protocol": protocol,
                })).collect::<Vec<_>>(),
            }],
        },
        "status": {
            "phase": "Running",
            "podIP": addresses.first(),
            "podIPs": addresses.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>(),
        },
    })
}
