//! Objects of a small cluster, and the program as people run it.

use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

/// Two pods of two namespaces, of which one is isolated.
pub fn objects() -> Vec<Value> {
    let of = |kind: &str, namespace: Option<&str>, name: &str| {
        let mut value = json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name}});
        if let Some(namespace) = namespace {
            value["metadata"]["namespace"] = json!(namespace);
        }
        value
    };
    let pod = |namespace: &str, name: &str, ip: &str| {
        let mut pod = of("Pod", Some(namespace), name);
        pod["metadata"]["labels"] = json!({"app": name});
        pod["spec"] = json!({"nodeName": "node-a"});
        pod["status"] = json!({"podIP": ip, "phase": "Running"});
        pod
    };
    let mut policy = of("NetworkPolicy", Some("db"), "guard");
    policy["apiVersion"] = json!("networking.k8s.io/v1");
    policy["spec"] = json!({"podSelector": {}, "ingress": [{"from": [
        {"namespaceSelector": {"matchLabels": {"team": "shop"}}}]}]});
    vec![
        of("Namespace", None, "shop"),
        of("Namespace", None, "db"),
        pod("shop", "web", "10.244.1.7"),
        pod("db", "pg-0", "10.244.2.9"),
        policy,
    ]
}

/// The program without this machine's configuration.
pub fn whydrop(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_whydrop"));
    for (name, _) in std::env::vars() {
        if name.starts_with("WHYDROP_") || name.starts_with("KUBE") {
            command.env_remove(name);
        }
    }
    command.env("HOME", "/nonexistent").args(arguments);
    command.stdin(Stdio::null());
    command
}

/// Exit code, stdout and stderr.
pub fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    told(whydrop(arguments).output().unwrap())
}

/// The same of a program that has ended.
pub fn told(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}
