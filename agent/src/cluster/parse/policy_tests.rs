use serde_json::{Value, json};

use crate::cluster::objects::{Interner, Object};
use crate::cluster::parse::parse;
use crate::policy::model::NetworkPolicy;

fn manifest(spec: Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "db"}, "spec": spec,
    })
}

fn read(value: &Value) -> std::sync::Arc<NetworkPolicy> {
    let parsed = parse(value, None).unwrap().unwrap();
    match parsed.strip(&mut Interner::default()) {
        Object::NetworkPolicy(_, policy) => policy,
        other => panic!("{other:?}"),
    }
}

#[test]
fn types_that_are_not_named_are_derived() {
    for (spec, ingress, egress, omitted) in [
        (json!({}), true, false, true),
        (json!({"ingress": [{}]}), true, false, true),
        (json!({"egress": []}), true, false, true),
        (json!({"egress": [{}]}), true, true, true),
        (json!({"egress": [{}], "policyTypes": []}), true, true, true),
        (
            json!({"egress": [{}], "policyTypes": ["Egress"]}),
            false,
            true,
            false,
        ),
        (
            json!({"egress": [{}], "policyTypes": ["Ingress"]}),
            true,
            false,
            false,
        ),
        (json!(null), true, false, true),
    ] {
        let policy = read(&manifest(spec.clone()));
        let got = (
            policy.ingress.isolates,
            policy.egress.isolates,
            policy.types_omitted,
        );
        assert_eq!(got, (ingress, egress, omitted), "{spec}");
    }
}

#[test]
fn what_the_author_left_out_is_seen_behind_the_servers_defaults() {
    let mut live = manifest(json!({"egress": [{}], "policyTypes": ["Ingress", "Egress"]}));
    for (applied, omitted) in [
        (r#"{"spec":{"egress":[{}]}}"#, true),
        (r#"{"spec":{"policyTypes":["Ingress","Egress"]}}"#, false),
        ("{broken", false),
    ] {
        live["metadata"]["annotations"] =
            json!({"kubectl.kubernetes.io/last-applied-configuration": applied});
        assert_eq!(read(&live).types_omitted, omitted, "{applied}");
    }
}

#[test]
fn unknown_fields_and_nulls_are_no_harm() {
    let policy = read(&manifest(json!({
        "podSelector": {"new": 1}, "future": {"x": []},
        "ingress": [null, {"from": null, "ports": null, "x": 1}, {"from": [], "ports": []}],
        "egress": null, "policyTypes": null,
    })));
    assert_eq!(policy.ingress.rules.len(), 3);
    assert!(
        policy
            .ingress
            .rules
            .iter()
            .all(|r| r.peers.is_empty() && r.ports.is_empty())
    );
}

#[test]
fn what_the_api_server_would_refuse_is_refused_by_name() {
    let ingress = |rule: Value| json!({"ingress": [rule]});
    let port = |port: Value| json!({"ingress": [{"ports": [port]}]});
    let selector = |e: Value| json!({"podSelector": {"matchExpressions": [e]}});
    for (spec, says) in [
        (
            json!({"policyTypes": ["Both"]}),
            "spec.policyTypes[0]: unknown type \"Both\"",
        ),
        (
            json!({"policyTypes": ["Ingress", "Egress", "Ingress"]}),
            "more than two",
        ),
        (
            ingress(json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]})),
            "spec.ingress[0].from[0].ipBlock.cidr: \"10.0.0.0/33\" is no CIDR",
        ),
        (
            ingress(json!({"from": [{"ipBlock": {}}]})),
            "ipBlock.cidr: \"\" is no CIDR",
        ),
        (
            ingress(json!({"from": [{"ipBlock":
                {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}]})),
            "except[0]: 11.0.0.0/16 is no part of 10.0.0.0/8",
        ),
        (
            ingress(json!({"from": [{"ipBlock":
                {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}}]})),
            "is no part",
        ),
        (
            ingress(json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]})),
            "an ipBlock beside a selector",
        ),
        (ingress(json!({"from": [{}]})), "from[0]: names no peer"),
        (
            json!({"egress": [{"to": [null]}]}),
            "spec.egress[0].to[0]: names no peer",
        ),
        (port(json!({"port": 0})), "ports[0].port: 0 is no port"),
        (port(json!({"port": 65536})), "65536 is no port"),
        (port(json!({"port": -1})), "-1 is no port"),
        (
            port(json!({"port": "HTTP"})),
            "\"HTTP\" is no name of a port",
        ),
        (
            port(json!({"port": 80, "endPort": 79})),
            "endPort: 79 is below port 80",
        ),
        (
            port(json!({"port": 80, "endPort": 70000})),
            "70000 is no port",
        ),
        (
            port(json!({"port": "http", "endPort": 90})),
            "beside a named port",
        ),
        (port(json!({"endPort": 90})), "without a port"),
        (
            port(json!({"protocol": "ICMP"})),
            "unknown protocol \"ICMP\"",
        ),
        (
            selector(json!({"key": "a", "operator": "Gt", "values": ["1"]})),
            "spec.podSelector.matchExpressions[0].operator: unknown operator \"Gt\"",
        ),
        (
            selector(json!({"key": "a", "operator": "In"})),
            "In needs values",
        ),
        (
            selector(json!({"key": "a", "operator": "NotIn", "values": []})),
            "NotIn needs values",
        ),
        (
            selector(json!({"key": "a", "operator": "Exists", "values": ["x"]})),
            "Exists takes none",
        ),
        (
            selector(json!({"key": "a/b/c", "operator": "Exists"})),
            "is no label's key",
        ),
        (
            json!({"podSelector": {"matchLabels": {"a": "b c"}}}),
            "is no label's value",
        ),
        (json!({"ingress": "all"}), "spec.ingress: invalid type"),
        (
            json!({"podSelector": {"matchLabels": {"a": 1}}}),
            "matchLabels.a: invalid type",
        ),
    ] {
        let malformed = parse(&manifest(spec.clone()), None).unwrap_err();
        assert!(malformed.message.contains(says), "{spec}: {malformed:?}");
        assert_eq!((&*malformed.namespace, &*malformed.name), ("db", "p"));
    }
}
