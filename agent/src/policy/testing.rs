//! Worlds from manifests, for tests.

use super::evaluate::{End, Flow, Verdict, Who};
use super::findings::{Context, Finding, findings};
use super::model::Direction;
use super::world::{Change, World};
use crate::cluster::document;
use crate::cluster::objects::{Interner, Object};

/// The objects of a text, none of them malformed.
pub fn objects(text: &str) -> Vec<Object> {
    let read = document::read(text, false).unwrap();
    assert_eq!(read.malformed, [], "{text}");
    let mut strings = Interner::default();
    let parsed = read.parsed.into_iter();
    parsed.map(|p| p.strip(&mut strings)).collect()
}

/// A cluster with one pod in each of two namespaces, a second node, and whatever `more` holds.
pub fn world(more: &str) -> World {
    World::new(&objects(&format!("{BASE}{more}")))
}

/// `ns/pod` or an address.
pub fn end(world: &World, text: &str) -> End {
    if let Some((namespace, name)) = text.split_once('/') {
        return End::pod(world.pod_named(namespace, name).unwrap());
    }
    let ip = text.parse().unwrap();
    let who = match (world.pods_at(ip).first(), world.node_at(ip)) {
        (Some(pod), _) => Who::Pod(*pod),
        (None, Some(node)) => Who::Node(node),
        (None, None) => Who::Outside,
    };
    End { who, ip: Some(ip) }
}

/// A flow: `"shop/web db/pg TCP 5432"`; without a port every port is meant.
pub fn flow(world: &World, text: &str) -> Flow {
    let words: Vec<&str> = text.split_whitespace().collect();
    Flow {
        source: end(world, words[0]),
        destination: end(world, words[1]),
        protocol: words[2].parse().unwrap(),
        port: words.get(3).map(|port| port.parse().unwrap()),
    }
}

/// A policy of namespace `db` that selects `app=pg`; `rest` continues its spec, indented by two.
pub fn policy(name: &str, rest: &str) -> String {
    format!(
        "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {name}, namespace: db}}
spec:
  podSelector: {{matchLabels: {{app: pg}}}}
{rest}
"
    )
}

/// As [`policy`], of namespace `shop` for `app=web`.
pub fn shop_policy(name: &str, rest: &str) -> String {
    policy(name, rest)
        .replace("namespace: db", "namespace: shop")
        .replace("app: pg", "app: web")
}

/// The findings of a flow.
pub fn of(world: &World, text: &str, context: &Context) -> Vec<Finding> {
    let flow = flow(world, text);
    let egress = world.judge(&flow, Direction::Egress);
    let ingress = world.judge(&flow, Direction::Ingress);
    findings(world, &flow, &egress, &ingress, context)
}

/// The codes of a flow's findings.
pub fn codes(world: &World, text: &str) -> Vec<&'static str> {
    let findings = of(world, text, &Context::default());
    findings.iter().map(|f| f.code).collect()
}

/// The one finding of a code; each of its fixes is applied as its YAML says and must work.
pub fn found(more: &str, text: &str, code: &str) -> Finding {
    let world = world(more);
    let findings = of(&world, text, &Context::default());
    let finding = findings.into_iter().find(|f| f.code == code);
    let finding = finding.unwrap_or_else(|| panic!("no {code} for {text}"));
    for fix in &finding.fixes {
        let changed = apply(&world, objects(&fix.yaml).remove(0));
        let flow = flow(&changed, text);
        let side = finding.direction.unwrap();
        assert_eq!(changed.verdict(&flow, side), Verdict::Allow, "{}", fix.yaml);
        write_down(more, text, side, &fix.yaml);
    }
    finding
}

/// Leaves a fix for `tests/kube/tests/fixes.rs`, which a real API server must take, in the folder that
/// `WHYDROP_TEST_FIXES` names.
fn write_down(more: &str, text: &str, side: Direction, fix: &str) {
    let Some(folder) = std::env::var_os("WHYDROP_TEST_FIXES") else {
        return;
    };
    let case = serde_json::json!({
        "objects": format!("{BASE}{more}"), "flow": text, "side": side.as_str(), "fix": fix,
    });
    let mut hasher = std::hash::DefaultHasher::new();
    std::hash::Hash::hash(&case.to_string(), &mut hasher);
    let name = format!("{:016x}.json", std::hash::Hasher::finish(&hasher));
    let path = std::path::Path::new(&folder).join(name);
    std::fs::write(path, case.to_string()).unwrap();
}

/// The world after a manifest is applied.
pub fn apply(world: &World, object: Object) -> World {
    world.with(&match object {
        Object::NetworkPolicy(_, policy) => Change::Policy(policy),
        Object::TierPolicy(_, policy) => Change::Tier(policy),
        Object::Namespace(namespace) => Change::Namespace(namespace),
        other => panic!("{other:?}"),
    })
}

/// A DNS pod and its Service, which leads to another port.
pub const DNS: &str = "---
apiVersion: v1
kind: Pod
metadata: {name: coredns, namespace: kube-system, labels: {k8s-app: kube-dns, pod-template-hash: x}}
spec: {nodeName: node-a, containers: [{ports: [{name: dns, containerPort: 5353, protocol: UDP}]}]}
status: {podIP: 10.244.1.53}
---
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec:
  clusterIP: 10.96.0.10
  selector: {k8s-app: kube-dns}
  ports: [{name: dns, port: 53, protocol: UDP, targetPort: 5353}]
";

/// The cluster of [`world`].
pub const BASE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {env: prod}}
---
apiVersion: v1
kind: Namespace
metadata: {name: db, labels: {team: data}}
---
apiVersion: v1
kind: Namespace
metadata: {name: kube-system}
---
apiVersion: v1
kind: Node
metadata: {name: node-a, labels: {zone: a}}
spec: {podCIDR: 10.244.1.0/24}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: node-b}
spec: {podCIDR: 10.244.2.0/24}
status: {addresses: [{type: InternalIP, address: 192.168.0.2}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web, tier: front}}
spec: {nodeName: node-a}
status: {podIP: 10.244.1.7}
---
apiVersion: v1
kind: Pod
metadata: {name: job, namespace: shop, labels: {app: job}}
spec: {nodeName: node-a}
status: {podIP: 10.244.1.8}
---
apiVersion: v1
kind: Pod
metadata: {name: pg, namespace: db, labels: {app: pg}}
spec:
  nodeName: node-b
  containers: [{ports: [{name: sql, containerPort: 5432}, {name: metrics, containerPort: 9187}]}]
status: {podIP: 10.244.2.9}
---
apiVersion: v1
kind: Pod
metadata: {name: backup, namespace: db, labels: {app: backup, tier: front}}
spec: {nodeName: node-b}
status: {podIP: 10.244.2.10}
---
apiVersion: v1
kind: Pod
metadata: {name: agent-a, namespace: kube-system, labels: {app: agent}}
spec: {nodeName: node-a, hostNetwork: true}
status: {podIP: 192.168.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: agent-b, namespace: kube-system, labels: {app: agent}}
spec: {nodeName: node-b, hostNetwork: true}
status: {podIP: 192.168.0.2}
";
