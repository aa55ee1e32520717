//! Objects of a generated cluster, as large as real ones: some 4 kB of a pod are never used.

use serde_json::{Value, json};

/// Of the pods: so many run on a node.
pub const PODS_A_NODE: usize = 30;

/// The name of a node.
pub fn node_name(n: usize) -> String {
    format!("node-{n}")
}

/// The address of a pod.
pub fn pod_ip(n: usize) -> String {
    format!("10.{}.{}.{}", 128 + (n >> 16), n >> 8 & 255, n & 255)
}

fn namespace_name(n: usize) -> String {
    format!("team-{}", n % 200)
}

/// A pod of a Deployment with ten replicas.
pub fn pod(n: usize) -> Value {
    let (app, ip) = (n / 10, pod_ip(n));
    let container = json!({
        "name": "main", "image": format!("registry.example.invalid/team/app-{app}:1.2.3"),
        "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
        "env": (0..20).map(|e| json!({"name": format!("SETTING_{e}"), "value": "x".repeat(60)}))
            .collect::<Vec<_>>(),
        "resources": {"limits": {"cpu": "1", "memory": "512Mi"}},
    });
    let condition = |kind| json!({"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let conditions = ["Initialized", "Ready", "ContainersReady", "PodScheduled"].map(condition);
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "namespace": namespace_name(app), "name": format!("app-{app}-7d9f8c6b5-{n:05}"),
            "uid": format!("00000000-0000-4000-8000-{n:012}"), "resourceVersion": "5",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": format!("app-{app}"), "pod-template-hash": "7d9f8c6b5", "tier": "web",
                "app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"checksum/config": "0123456789abcdef".repeat(4),
                "kubectl.kubernetes.io/restartedAt": "2026-01-01T00:00:00Z"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "controller": true,
                "name": format!("app-{app}-7d9f8c6b5"), "uid": format!("rs-{app}")}],
        },
        "spec": {"nodeName": node_name(n / PODS_A_NODE), "containers": [container]},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "startTime": "2026-01-01T00:00:00Z",
            "conditions": conditions},
    })
}

/// A Service of a Deployment.
pub fn service(n: usize) -> Value {
    // The first 256 are the API server's own, and those it gives away by itself.
    let ip = format!("10.96.{}.{}", 1 + (n >> 8), n & 255);
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": namespace_name(n), "name": format!("app-{n}"), "resourceVersion": "5",
            "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"clusterIP": ip, "clusterIPs": [ip],
            "selector": {"app": format!("app-{n}")},
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}]},
    })
}

/// The endpoints of a Service.
pub fn endpoints(n: usize) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": namespace_name(n), "name": format!("app-{n}-abcde"),
            "resourceVersion": "5", "labels": {"kubernetes.io/service-name": format!("app-{n}")}},
        "endpoints": (n * 10..n * 10 + 8).map(|pod| json!({"addresses": [pod_ip(pod)]}))
            .collect::<Vec<_>>(),
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    })
}

/// A node.
pub fn node(n: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node_name(n), "resourceVersion": "5"},
        "spec": {"podCIDRs": [format!("10.{}.{}.0/24", n >> 8, n & 255)]},
        "status": {"addresses": [{"type": "InternalIP",
            "address": format!("192.168.{}.{}", n >> 8, n & 255)}]},
    })
}

/// A namespace.
pub fn namespace(n: usize) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace_name(n),
        "resourceVersion": "5", "labels": {"team": namespace_name(n)}}})
}

/// A policy.
pub fn policy(n: usize) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace_name(n), "name": format!("allow-{n}"), "resourceVersion": "5"},
        "spec": {"podSelector": {"matchLabels": {"app": format!("app-{n}")}}, "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": namespace_name(n + 1)}}}],
                "ports": [{"port": 8080, "protocol": "TCP"}]}]},
    })
}
