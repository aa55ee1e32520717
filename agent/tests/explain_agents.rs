//! `whydrop explain --with` against what all agents of a cluster see.

use serde_json::Value;

use crate::support::cluster::{Cluster, Program, output, program};

mod support;

const OBJECTS: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}},
 spec: {nodeName: node-a}, status: {podIP: 10.244.1.7}}
---
{apiVersion: v1, kind: Pod, metadata: {name: db, namespace: shop, labels: {app: db}},
 spec: {nodeName: node-b}, status: {podIP: 10.244.2.9}}
";
const DENY: &str = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy,
 metadata: {name: deny, namespace: shop}, spec: {podSelector: {matchLabels: {app: db}}}}";

/// What an agent prints of its node.
fn sees(node: &str, to: &str, port: u16) -> Program {
    let text = format!(
        "{{\"node\":\"{node}\",\"source\":{{\"ip\":\"10.244.1.7\"}},\
         \"destination\":{{\"ip\":\"{to}\",\"port\":{port}}},\"connections\":3}}\n\
         {{\"node\":\"{node}\",\"time\":\"2026-01-01T00:00:00Z\",\"conntrack\":\"read\",\"connections\":3}}\n"
    );
    program(move |mut session| {
        let text = text.clone();
        async move {
            session.stdout(&text).await;
            session.exit(0).await;
        }
    })
}

fn fails() -> Program {
    program(|mut session| async move {
        session.stderr("whydrop: no whydrop agent answers\n").await;
        session.exit(1).await;
    })
}

#[test]
fn a_policy_is_laid_against_the_connections_of_all_nodes() {
    let cluster = Cluster::start();
    let folder = tempfile::tempdir().unwrap();
    let (objects, deny) = (folder.path().join("objects"), folder.path().join("deny"));
    std::fs::write(&objects, OBJECTS).unwrap();
    std::fs::write(&deny, DENY).unwrap();
    let line = format!(
        "explain -o json --with {} --objects {}",
        deny.display(),
        objects.display()
    );
    cluster.add("node-a", sees("node-a", "10.244.2.9", 5432));
    cluster.add("node-b", sees("node-b", "10.244.2.9", 5432));
    // One that is denied nothing, and one of which nothing is known.
    cluster.add("node-c", sees("node-c", "192.0.2.1", 443));
    cluster.add("node-d", fails());
    let (answer, told) = output(cluster.command(&line));
    assert_eq!(answer.status.code(), Some(1), "{told}");
    let json: Value = serde_json::from_slice(&answer.stdout).unwrap();
    let denied = json["denied"].as_array().unwrap();
    assert_eq!(denied.len(), 1, "{json}");
    assert_eq!(denied[0]["port"], 5432);
    // Both nodes tell of the same connections.
    assert_eq!(denied[0]["connections"], 3, "{json}");
    assert_eq!(json["checked"]["connections"], 6, "{json}");
    let nodes = json["checked"]["nodes"].as_array().unwrap();
    let shown: Vec<_> = nodes
        .iter()
        .map(|node| {
            (
                node["node"].as_str().unwrap(),
                node["conntrack"].as_str().unwrap(),
            )
        })
        .collect();
    let silent = "its agent does not tell: no whydrop agent answers";
    assert_eq!(
        shown,
        [
            ("node-a", "read"),
            ("node-b", "read"),
            ("node-c", "read"),
            ("node-d", silent)
        ]
    );
    let asked = cluster.execs("node-a");
    assert_eq!(asked, [["connections", "--socket=/run/whydrop/agent.sock"]]);

    // Where nobody tells, nothing is safe.
    let silent = Cluster::start();
    silent.add("node-d", fails());
    let (answer, told) = output(silent.command(&line));
    assert_eq!(answer.status.code(), Some(2), "{told}");
    silent.refuse("exec", 403);
    let (answer, told) = output(silent.command(&line));
    assert_eq!(answer.status.code(), Some(2));
    assert!(told.contains("not allowed to create pods/exec"), "{told}");
}
