//! Policies and namespaces as manifests that `kubectl apply` takes.

use serde_json::{Map, Value, json};

use super::model::{Direction, NetworkPolicy, Peer, PortItem, PortMatch, Rule};
use super::selector::{Operator, Selector};
use crate::cluster::objects::{Labels, Namespace};
use crate::event::Protocol;

/// The whole policy, its types said.
pub fn policy(policy: &NetworkPolicy) -> Value {
    let mut metadata = json!({"name": &*policy.name, "namespace": &*policy.namespace});
    if !policy.labels.is_empty() {
        metadata["labels"] = labels(&policy.labels);
    }
    let mut spec = json!({"podSelector": selector(&policy.pod_selector)});
    let mut types = Vec::new();
    for direction in Direction::ALL {
        let side = policy.side(direction);
        if side.isolates {
            types.push(direction.type_name());
        }
        let (field, peers) = match direction {
            Direction::Ingress => ("ingress", "from"),
            Direction::Egress => ("egress", "to"),
        };
        if !side.rules.is_empty() {
            spec[field] = side.rules.iter().map(|r| rule(r, peers)).collect();
        }
    }
    spec["policyTypes"] = json!(types);
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": spec,
    })
}

/// The namespace with all its labels: what is left out here, `kubectl apply` would take away.
pub fn namespace(namespace: &Namespace) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": &*namespace.key.name, "labels": labels(&namespace.labels)},
    })
}

/// A manifest as YAML.
///
/// # Errors
/// None that is known: values of JSON can all be written.
pub fn yaml(value: &Value) -> Result<String, serde_saphyr::ser::Error> {
    serde_saphyr::to_string(value)
}

pub(super) fn labels(labels: &Labels) -> Value {
    let pairs = labels.iter();
    pairs
        .map(|(k, v)| (k.to_string(), Value::from(&**v)))
        .collect::<Map<_, _>>()
        .into()
}

pub(super) fn selector(selector: &Selector) -> Value {
    let (mut labels, mut expressions) = (Map::new(), Vec::new());
    for r in selector.requirements() {
        match (r.operator, &*r.values) {
            // A key twice in matchLabels would lose one.
            (Operator::In, [value]) if !labels.contains_key(&*r.key) => {
                labels.insert(r.key.to_string(), Value::from(&**value));
            }
            _ => {
                let mut expression = json!({"key": &*r.key, "operator": r.operator.as_str()});
                if !r.values.is_empty() {
                    expression["values"] = r.values.iter().map(|v| Value::from(&**v)).collect();
                }
                expressions.push(expression);
            }
        }
    }
    let mut value = json!({});
    if !labels.is_empty() {
        value["matchLabels"] = labels.into();
    }
    if !expressions.is_empty() {
        value["matchExpressions"] = expressions.into();
    }
    value
}

fn rule(rule: &Rule, peers: &str) -> Value {
    let mut value = json!({});
    if !rule.peers.is_empty() {
        value[peers] = rule.peers.iter().map(peer).collect();
    }
    if !rule.ports.is_empty() {
        value["ports"] = rule.ports.iter().map(port).collect();
    }
    value
}

fn peer(peer: &Peer) -> Value {
    match peer {
        Peer::Pods(pods) => json!({"podSelector": selector(pods)}),
        Peer::Namespaces(namespaces) => json!({"namespaceSelector": selector(namespaces)}),
        Peer::PodsIn { namespaces, pods } => {
            json!({"namespaceSelector": selector(namespaces), "podSelector": selector(pods)})
        }
        Peer::Block(block) if block.except.is_empty() => json!({"ipBlock": {"cidr": block.cidr}}),
        Peer::Block(block) => json!({"ipBlock": {"cidr": block.cidr, "except": block.except}}),
    }
}

fn port(item: &PortItem) -> Value {
    let protocol = match item.protocol {
        Protocol::UDP => "UDP",
        Protocol::SCTP => "SCTP",
        _ => "TCP",
    };
    match &item.port {
        PortMatch::Any => json!({"protocol": protocol}),
        PortMatch::Range(from, to) if from == to => json!({"protocol": protocol, "port": from}),
        PortMatch::Range(from, to) => {
            json!({"protocol": protocol, "port": from, "endPort": to})
        }
        PortMatch::Named(name) => json!({"protocol": protocol, "port": &**name}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::objects::Object;
    use crate::policy::testing::objects;

    #[test]
    fn a_manifest_reads_back_as_the_same_policy() {
        let text = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: db, labels: {a: b, n: '1'}}
spec:
  podSelector:
    matchLabels: {app: pg, on: 'true'}
    matchExpressions:
    - {key: app, operator: In, values: [pg]}
    - {key: x, operator: NotIn, values: [b, a]}
    - {key: y, operator: Exists}
    - {key: z, operator: DoesNotExist}
  policyTypes: [Egress]
  ingress: [{}]
  egress:
  - ports: [{port: 1}, {port: 1, endPort: 9, protocol: SCTP}, {port: web}, {protocol: UDP}]
    to:
    - podSelector: {}
    - namespaceSelector: {}
    - {podSelector: {}, namespaceSelector: {matchLabels: {a: b}}}
    - ipBlock: {cidr: 'fd00::/8', except: ['fd00:1::/32']}
";
        let read = |text: &str| match objects(text).remove(0) {
            Object::NetworkPolicy(_, policy) => policy,
            other => panic!("{other:?}"),
        };
        let first = read(text);
        let again = read(&yaml(&policy(&first)).unwrap());
        assert_eq!(first, again);
    }
}
