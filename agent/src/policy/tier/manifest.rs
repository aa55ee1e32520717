//! A policy of a tier as a manifest that `kubectl apply` takes.

use serde_json::{Value, json};

use super::{PodSet, TierPeer, TierPolicy, TierPort, TierRule};
use crate::cluster::objects::ObjectKind;
use crate::event::Protocol;
use crate::policy::manifest::{labels, selector};
use crate::policy::model::{Direction, PortMatch};

/// The whole policy.
pub fn policy(policy: &TierPolicy) -> Value {
    let mut metadata = json!({"name": &*policy.name});
    if !policy.labels.is_empty() {
        metadata["labels"] = labels(&policy.labels);
    }
    let mut spec = json!({});
    if policy.kind == ObjectKind::ClusterNetworkPolicy {
        spec["tier"] = json!(policy.tier.as_str());
    }
    if let Some(priority) = policy.priority {
        spec["priority"] = json!(priority);
    }
    spec["subject"] = pods(&policy.subject);
    for (direction, peers) in [(Direction::Ingress, "from"), (Direction::Egress, "to")] {
        let rules = policy.rules(direction);
        if !rules.is_empty() {
            let rules = rules.iter().map(|r| rule(r, peers, policy.kind));
            spec[direction.as_str()] = rules.collect();
        }
    }
    json!({
        "apiVersion": &*policy.api_version,
        "kind": policy.kind.as_str(),
        "metadata": metadata,
        "spec": spec,
    })
}

fn rule(rule: &TierRule, peers: &str, kind: ObjectKind) -> Value {
    let mut value = json!({});
    if let Some(name) = &rule.name {
        value["name"] = json!(name);
    }
    value["action"] = json!(rule.action.as_str(kind));
    value[peers] = rule.peers.iter().map(peer).collect();
    if !rule.ports.is_empty() {
        let (field, of): (_, fn(&TierPort) -> Value) = match kind {
            ObjectKind::ClusterNetworkPolicy => ("protocols", protocol),
            _ => ("ports", port),
        };
        value[field] = rule.ports.iter().map(of).collect();
    }
    value
}

fn pods(set: &PodSet) -> Value {
    match set.pods.is_empty() {
        true => json!({"namespaces": selector(&set.namespaces)}),
        false => json!({"pods": {
            "namespaceSelector": selector(&set.namespaces),
            "podSelector": selector(&set.pods),
        }}),
    }
}

fn peer(peer: &TierPeer) -> Value {
    match peer {
        TierPeer::Pods(set) => pods(set),
        TierPeer::Nodes(nodes) => json!({"nodes": selector(nodes)}),
        TierPeer::Networks(networks) => json!({"networks": networks}),
        TierPeer::Domains(names) => json!({"domainNames": names}),
    }
}

fn ends(port: &PortMatch) -> (u16, u16) {
    match port {
        PortMatch::Range(from, to) => (*from, *to),
        PortMatch::Any | PortMatch::Named(_) => (1, u16::MAX),
    }
}

fn protocol(port: &TierPort) -> Value {
    let item = match port {
        TierPort::Named(name) => return json!({"destinationNamedPort": name}),
        TierPort::Number(item) => item,
    };
    let name = match item.protocol {
        Protocol::UDP => "udp",
        Protocol::SCTP => "sctp",
        _ => "tcp",
    };
    let port = match ends(&item.port) {
        (from, to) if from == to => json!({"number": from}),
        (from, to) => json!({"range": {"start": from, "end": to}}),
    };
    json!({name: {"destinationPort": port}})
}

fn port(port: &TierPort) -> Value {
    let item = match port {
        TierPort::Named(name) => return json!({"namedPort": name}),
        TierPort::Number(item) => item,
    };
    let protocol = item.protocol.to_string();
    match ends(&item.port) {
        (from, to) if from == to => json!({"portNumber": {"protocol": protocol, "port": from}}),
        (start, end) => {
            json!({"portRange": {"protocol": protocol, "start": start, "end": end}})
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::objects::Object;
    use crate::policy::manifest::yaml;
    use crate::policy::testing::objects;

    #[test]
    fn a_manifest_reads_back_as_the_same_policy() {
        let text = "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: c, labels: {a: b}}
spec:
  tier: Baseline
  priority: 3
  subject: {pods: {namespaceSelector: {matchLabels: {a: b}}, podSelector: {matchLabels: {c: d}}}}
  ingress: [{action: Pass, from: [{namespaces: {}}], protocols: [{destinationNamedPort: web}]}]
  egress:
  - name: out
    action: Accept
    to:
    - {nodes: {matchLabels: {zone: a}}}
    - {networks: [10.0.0.0/8, 'fd00::/8']}
    - {domainNames: ['*.example.com']}
    protocols:
    - {udp: {destinationPort: {number: 53}}}
    - {sctp: {destinationPort: {range: {start: 1, end: 9}}}}
---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: AdminNetworkPolicy
metadata: {name: a}
spec:
  priority: 0
  subject: {namespaces: {}}
  ingress:
  - action: Allow
    from: [{namespaces: {}}]
    ports: [{portNumber: {protocol: UDP, port: 53}}, {portRange: {start: 1, end: 9}}, {namedPort: x}]
---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: BaselineAdminNetworkPolicy
metadata: {name: default}
spec: {subject: {namespaces: {}}, egress: [{action: Deny, to: [{networks: [0.0.0.0/0]}]}]}
";
        for object in objects(text) {
            let Object::TierPolicy(_, first) = object else {
                panic!("{object:?}");
            };
            let written = yaml(&policy(&first)).unwrap();
            let Object::TierPolicy(_, again) = objects(&written).remove(0) else {
                panic!("{written}");
            };
            assert_eq!(first, again, "{written}");
        }
    }
}
