use serde_json::{Value, json};

use crate::cluster::objects::{Interner, Object};
use crate::cluster::parse::parse;
use crate::policy::tier::{Action, Tier, TierPeer, TierPolicy};

fn manifest(kind: &str, spec: Value) -> Value {
    let version = match kind {
        "ClusterNetworkPolicy" => "v1alpha2",
        _ => "v1alpha1",
    };
    json!({
        "apiVersion": format!("policy.networking.k8s.io/{version}"), "kind": kind,
        "metadata": {"name": "default"}, "spec": spec,
    })
}

fn strip(value: &Value, list: Option<(&str, &str)>) -> TierPolicy {
    let parsed = parse(value, list).unwrap().unwrap();
    match parsed.strip(&mut Interner::default()) {
        Object::TierPolicy(key, policy) => {
            assert_eq!(&*key.namespace, "");
            TierPolicy::clone(&policy)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_kind_has_its_tier_and_priority() {
    let subject = json!({"namespaces": {}});
    for (kind, spec, tier, priority) in [
        (
            "ClusterNetworkPolicy",
            json!({"tier": "Admin", "priority": 0, "subject": subject}),
            Tier::Admin,
            Some(0),
        ),
        (
            "ClusterNetworkPolicy",
            json!({"tier": "Baseline", "priority": 1000, "subject": subject}),
            Tier::Baseline,
            Some(1000),
        ),
        (
            "AdminNetworkPolicy",
            json!({"priority": 7, "subject": subject}),
            Tier::Admin,
            Some(7),
        ),
        (
            "BaselineAdminNetworkPolicy",
            json!({"subject": subject}),
            Tier::Baseline,
            None,
        ),
    ] {
        let policy = strip(&manifest(kind, spec), None);
        assert_eq!((policy.tier, policy.priority), (tier, priority), "{kind}");
    }
}

#[test]
fn an_item_of_a_list_and_unknown_fields_are_no_harm() {
    let item = json!({"metadata": {"name": "n", "labels": {"a": "b"}}, "spec": {
        "tier": "Admin", "priority": 1, "future": 1, "subject": {"pods": {"podSelector": {}}},
        "ingress": null, "egress": [{"action": "Accept", "name": "", "to": [
            {"networks": ["10.1.2.3/8"]}, {"nodes": {}}, {"domainNames": ["a.b"]}]}]}});
    let list = (
        "policy.networking.k8s.io/v1alpha2",
        "ClusterNetworkPolicyList",
    );
    let policy = strip(&item, Some(list));
    assert_eq!(&*policy.api_version, "policy.networking.k8s.io/v1alpha2");
    assert_eq!(policy.labels.len(), 1);
    let rule = &policy.egress[0];
    assert_eq!((rule.action, &rule.name), (Action::Accept, &None));
    let TierPeer::Networks(networks) = &rule.peers[0] else {
        panic!("{rule:?}");
    };
    assert_eq!(networks[0].to_string(), "10.0.0.0/8");
}

#[test]
fn what_the_crds_refuse_is_refused_by_name() {
    let subject = json!({"namespaces": {}});
    let cnp = |field: &str, value: Value| {
        let mut spec = json!({"tier": "Admin", "priority": 1, "subject": subject});
        spec[field] = value;
        manifest("ClusterNetworkPolicy", spec)
    };
    let rule = |more: Value| {
        let mut rule = json!({"action": "Deny", "to": [{"namespaces": {}}]});
        for (key, value) in more.as_object().unwrap() {
            rule[key] = value.clone();
        }
        cnp("egress", json!([rule]))
    };
    let port = |port: Value| rule(json!({"protocols": [port]}));
    let banp = |spec: Value| manifest("BaselineAdminNetworkPolicy", spec);
    let mut misnamed = banp(json!({"subject": subject}));
    misnamed["metadata"]["name"] = json!("other");
    for (value, says) in [
        (cnp("tier", json!("admin")), "unknown tier \"admin\""),
        (cnp("tier", Value::Null), "spec.tier: is missing"),
        (cnp("priority", json!(1001)), "1001 is not from 0 to 1000"),
        (cnp("priority", json!(-1)), "-1 is not from"),
        (cnp("priority", Value::Null), "spec.priority: is missing"),
        (cnp("subject", Value::Null), "spec.subject: is missing"),
        (cnp("subject", json!({})), "spec.subject: names no peer"),
        (
            cnp("subject", json!({"nodes": {}})),
            "takes namespaces or pods only",
        ),
        (
            cnp(
                "subject",
                json!({"namespaces": {}, "pods": {"podSelector": {}}}),
            ),
            "names more than one kind",
        ),
        (
            cnp("subject", json!({"pods": {}})),
            "podSelector: is missing",
        ),
        (
            cnp("egress", json!(vec![json!({}); 26])),
            "spec.egress: has 26 items, more than 25",
        ),
        (
            rule(json!({"action": "Allow"})),
            "spec.egress[0].action: unknown action \"Allow\"",
        ),
        (
            rule(json!({"action": null})),
            "unknown action \"\": Accept, Deny, Pass",
        ),
        (
            rule(json!({"name": "x".repeat(101)})),
            "name: is longer than 100",
        ),
        (rule(json!({"to": []})), "spec.egress[0].to: names no peer"),
        (
            rule(json!({"to": [{"future": {}}]})),
            "to[0]: names no peer",
        ),
        (
            rule(json!({"to": [{"networks": ["10/8"]}]})),
            "networks[0]: \"10/8\" is no CIDR",
        ),
        (
            rule(json!({"to": [{"networks": []}]})),
            "takes 1 to 25 CIDRs",
        ),
        (
            rule(json!({"to": [{"domainNames": ["a.b"]}]})),
            "for the action Accept only",
        ),
        (
            cnp(
                "ingress",
                json!([{"action": "Deny", "from": [{"nodes": {}}]}]),
            ),
            "from[0]: takes namespaces or pods only",
        ),
        (rule(json!({"ports": []})), "calls this field protocols"),
        (rule(json!({"protocols": []})), "protocols: is empty"),
        (port(json!({})), "protocols[0]: has 0 of its fields"),
        (port(json!({"tcp": {}})), "destinationPort: is missing"),
        (
            port(json!({"tcp": {"destinationPort": {}}})),
            "takes a number or a range",
        ),
        (
            port(json!({"tcp": {"destinationPort": {"number": 1}}, "destinationNamedPort": "a"})),
            "has 2 of its fields",
        ),
        (
            port(json!({"udp": {"destinationPort": {"number": 0}}})),
            "0 is no port",
        ),
        (
            port(json!({"sctp": {"destinationPort": {"range": {"start": 5, "end": 5}}}})),
            "its end 5 is not above its start 5",
        ),
        (
            rule(json!({"to": [{"nodes": {}}], "protocols": [{"destinationNamedPort": "a"}]})),
            "a named port is beside peers",
        ),
        (misnamed, "is called default"),
        (
            banp(json!({"subject": subject, "ingress": [
                {"action": "Pass", "from": [{"namespaces": {}}]}]})),
            "unknown action \"Pass\": Allow, Deny",
        ),
        (
            banp(json!({"subject": {"pods": {"podSelector": {}}}})),
            "namespaceSelector: is missing",
        ),
        (
            banp(json!({"subject": subject, "ingress": [{"action": "Deny",
                "from": [{"namespaces": {}}],
                "ports": [{"portNumber": {"protocol": "ICMP", "port": 1}}]}]})),
            "ports[0].portNumber.protocol: unknown protocol \"ICMP\"",
        ),
    ] {
        let malformed = parse(&value, None).unwrap_err();
        assert!(malformed.message.contains(says), "{says:?}: {malformed:?}");
    }
}
