//! `whydrop tail` of a cluster that does not accept its credentials any more, and kubeconfigs that cannot be
//! used.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::cluster::{Cluster, agent, output, publish};
use crate::support::{Agent, Tail, until};

mod support;

/// An answer of a credential plugin, without a time at which it expires.
fn credential(token: &str) -> String {
    json!({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
        "status": {"token": token}})
    .to_string()
}

fn plugin(command: &str, arguments: &[&str]) -> Value {
    json!({"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": command,
        "args": arguments, "interactiveMode": "Never"}})
}

/// Until these agents are followed. A reader may still be the one that asked for what was before.
fn are_followed(agents: [(&Agent, u64); 2], tail: &mut Tail) {
    for (agent, second) in agents {
        publish(agent, [second]);
        assert_eq!(tail.packets(1), [second]);
        agent.wait_for_readers(1);
    }
}

/// Follows two nodes; then the token expires, and another is where the first one was.
fn a_token_is_replaced(log_in: impl Fn(&Cluster, &str)) {
    let cluster = Cluster::start();
    log_in(&cluster, "t");
    let (a, b) = (agent(&cluster, "node-a"), agent(&cluster, "node-b"));
    publish(&a, [1, 2]);
    let mut tail = cluster.tail("-f --since 1970-01-01T00:00:00Z");
    assert_eq!(tail.packets(2), [1, 2]);
    are_followed([(&a, 3), (&b, 4)], &mut tail);
    log_in(&cluster, "other");
    cluster.accept("other");
    // What is open stays so.
    publish(&b, [5]);
    assert_eq!(tail.packets(1), [5]);
    cluster.refuse("exec", 500);
    cluster.cut("node-a");
    a.wait_for_readers(0);
    publish(&a, [6]);
    cluster.refuse("exec", 200);
    assert_eq!(tail.packets(1), [6], "nothing twice and nothing missed");
    a.wait_for_readers(1);
    publish(&a, [7]);
    assert_eq!(tail.packets(1), [7]);
    // The watch goes on too.
    let c = agent(&cluster, "node-c");
    c.wait_for_readers(1);
    publish(&c, [8]);
    assert_eq!(tail.packets(1), [8]);
    assert!(cluster.unauthorized() >= 1, "it was not refused");
    tail.child.kill().unwrap();
    let told = tail.stderr();
    for sentence in [
        "the agent on node-a went away",
        "the agent on node-a is back",
        "the agent on node-c is followed too",
    ] {
        assert_eq!(told.matches(sentence).count(), 1, "{sentence}: {told}");
    }
    // Nobody has to know of it.
    assert_eq!(told.lines().count(), 3, "{told}");
}

#[test]
fn a_token_that_is_replaced_in_the_kubeconfig_is_read_anew() {
    a_token_is_replaced(|cluster, token| {
        // Meanwhile somebody works with another cluster: it is still this one that is followed.
        let current = if token == "t" { "c" } else { "elsewhere" };
        cluster.configure(current, json!({"token": token}));
    });
}

#[test]
fn a_token_file_that_is_replaced_is_read_anew() {
    a_token_is_replaced(|cluster, token| {
        let file = cluster.write("token", token);
        cluster.configure("c", json!({"tokenFile": file}));
    });
}

#[test]
fn a_credential_plugin_is_asked_anew() {
    a_token_is_replaced(|cluster, token| {
        let file = cluster.write("credential", &credential(token));
        cluster.configure("c", plugin("/bin/cat", &[file.to_str().unwrap()]));
    });
}

/// Nobody logs in for a while: said once, tried again, and then it goes on.
#[test]
fn credentials_that_stay_refused_are_said_once() {
    let cluster = Cluster::start();
    let (a, b) = (agent(&cluster, "node-a"), agent(&cluster, "node-b"));
    publish(&a, [1]);
    publish(&b, [2]);
    let mut tail = cluster.tail("-f --since 1970-01-01T00:00:00Z");
    assert_eq!(tail.packets(2), [1, 2]);
    are_followed([(&a, 3), (&b, 4)], &mut tail);
    cluster.accept("other");
    cluster.cut("node-a");
    cluster.cut("node-b");
    // Both nodes and the watch, with what was there and with what was read anew.
    until("credentials to be refused", || cluster.unauthorized() >= 6);
    // Half of a kubeconfig, as who writes it can leave it.
    cluster.write(".kube/config", "clusters: {");
    until("them to be tried again", || cluster.unauthorized() >= 9);
    cluster.configure("c", json!({"token": "other"}));
    a.wait_for_readers(1);
    b.wait_for_readers(1);
    publish(&a, [5]);
    assert_eq!(tail.packets(1), [5]);
    publish(&b, [6]);
    assert_eq!(tail.packets(1), [6]);
    tail.child.kill().unwrap();
    let told = tail.stderr();
    for sentence in [
        "the API server does not accept the credentials (401): log in again",
        "the credentials (401), and they cannot be read anew: ",
        "the API server accepts the credentials again",
        "the agent on node-a is back",
        "the agent on node-b is back",
    ] {
        assert_eq!(told.matches(sentence).count(), 1, "{sentence}: {told}");
    }
    // Beside them, that both went away.
    assert_eq!(told.lines().count(), 7, "{told}");
}

#[test]
fn a_kubeconfig_that_cannot_be_used_is_one_sentence() {
    let cluster = Cluster::start();
    let _a = agent(&cluster, "node-a");
    let told = |line: &str| {
        let (output, told) = output(cluster.command(line));
        assert_eq!(output.status.code(), Some(1), "{line}: {told}");
        assert!(output.stdout.is_empty(), "{line}");
        assert_eq!(told.lines().count(), 1, "{line}: {told}");
        assert!(told.starts_with("whydrop: "), "{line}: {told}");
        told
    };
    let nowhere = Path::new("/nowhere/file");
    let failing = ["-c", "echo first >&2; echo log in with x >&2; exit 3"];
    for (user, words) in [
        (json!({"tokenFile": nowhere}), &["/nowhere/file"] as &[&str]),
        (
            json!({"client-certificate": nowhere, "client-key": nowhere}),
            &["client certificate", "/nowhere/file"],
        ),
        (
            json!({"client-certificate-data": "bm8=", "client-key-data": "bm8="}),
            &["no client for http"],
        ),
        (
            plugin("/nowhere/login", &[]),
            &["the credential plugin \"/nowhere/login\" cannot be run"],
        ),
        (
            plugin("/bin/sh", &failing),
            &["the credential plugin \"/bin/sh\" failed (exit status: 3): log in with x"],
        ),
        (
            plugin("/bin/sh", &["-c", "echo no JSON"]),
            &["auth exec output", "of the credential plugin \"/bin/sh\""],
        ),
    ] {
        cluster.configure("c", user.clone());
        for command in ["tail", "tail -f", "status"] {
            let told = told(command);
            println!("{told}");
            for word in words {
                assert!(told.contains(word), "{user}: {told}");
            }
        }
    }
    let path = cluster.kubeconfig();
    let file = path.to_str().unwrap();
    let broken = |text: &str, words: &[&str]| {
        std::fs::write(&path, text).unwrap();
        let told = told(&format!("tail --kubeconfig {file}"));
        println!("{told}");
        for word in words.iter().chain([&file]) {
            assert!(told.contains(word), "{text:?}: {told}");
        }
    };
    broken(
        "",
        &["no current context is set; choose one with --context"],
    );
    broken("\u{0}", &["cannot be used; mend it"]);
    broken("just words", &["cannot be used; mend it"]);
    broken("current-context: gone", &["there is no context \"gone\""]);
    broken(
        "{current-context: c, contexts: [{name: c, context: {cluster: gone, user: u}}], users: [{name: u, user: {}}]}",
        &["there is no cluster \"gone\""],
    );
    broken(
        "{current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u, user: {}}], clusters: [{name: c, cluster: {server: 'https://a', certificate-authority: /nowhere/ca}}]}",
        &["/nowhere/ca"],
    );
    // A folder.
    let folder = cluster.home.path().to_str().unwrap();
    let told = told(&format!("tail --kubeconfig {folder}"));
    assert!(
        told.contains(folder) && told.contains("directory"),
        "{told}"
    );
}
