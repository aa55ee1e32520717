//! The agent's watches against a real API server, and what can go wrong with one.

use std::fs;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::PostParams;
use serde_json::json;
use whydrop::cluster::ObjectKind;
use whydrop::cluster::watch::Reach;
use whydrop_kube_tests::follower::Follower;
use whydrop_kube_tests::objects::{create, delete, namespace, pod};
use whydrop_kube_tests::server::{Server, User};

/// Of whom `User::Named` is granted these rights.
fn role(user: &str, resources: serde_json::Value) -> [serde_json::Value; 2] {
    let api = "rbac.authorization.k8s.io";
    [
        json!({
            "apiVersion": format!("{api}/v1"), "kind": "ClusterRole", "metadata": {"name": user},
            "rules": [{
                "apiGroups": ["", "discovery.k8s.io", "networking.k8s.io"],
                "resources": resources, "verbs": ["list", "watch"],
            }],
        }),
        json!({
            "apiVersion": format!("{api}/v1"), "kind": "ClusterRoleBinding",
            "metadata": {"name": user},
            "roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": user},
            "subjects": [
                {"apiGroup": api, "kind": "User", "name": user},
                {"kind": "ServiceAccount", "namespace": "default", "name": user},
            ],
        }),
    ]
}

#[tokio::test]
async fn an_address_is_its_pods_from_second_to_second() {
    let server = Server::start().await.unwrap();
    let client = server.client(User::Admin).await.unwrap();
    create(&client, &namespace("shop")).await.unwrap();
    let web = pod("shop", "web", "node-a", "10.1.0.7");
    create(&client, &web).await.unwrap();
    let follower = Follower::start(server.config(User::Admin).await.unwrap());
    let has = |name: &'static str| move |f: &Follower| f.now("10.1.0.7").as_deref() == Some(name);
    follower.until("listed", has("web")).await;
    // Streamed, as this server offers it: a watch that begins with all objects.
    let mut before = Timestamp::now();
    for round in 0..5 {
        let (old, new) = match round % 2 {
            0 => ("web", "db"),
            _ => ("db", "web"),
        };
        delete(&client, &pod("shop", old, "node-a", ""))
            .await
            .unwrap();
        create(&client, &pod("shop", new, "node-b", "10.1.0.7"))
            .await
            .unwrap();
        follower.until(new, has(new)).await;
        assert_eq!(follower.holder("10.1.0.7", before).as_deref(), Some(old));
        before = Timestamp::now();
    }
    // A pod without an address, then with one; one that is done gives it back.
    let mut late = pod("shop", "late", "node-a", "10.1.0.9");
    let status = late.as_object_mut().unwrap().remove("status").unwrap();
    create(&client, &late).await.unwrap();
    follower.until("three", |f| f.count("pods") == 2).await;
    assert_eq!(follower.now("10.1.0.9"), None);
    let api = whydrop_kube_tests::objects::api(&client, &late).unwrap();
    for (phase, holder) in [("Running", Some("late")), ("Succeeded", None)] {
        let mut status = status.clone();
        status["phase"] = phase.into();
        let patch = kube::api::Patch::Merge(json!({ "status": status }));
        api.patch_status("late", &Default::default(), &patch)
            .await
            .unwrap();
        follower
            .until(phase, |f| f.now("10.1.0.9").as_deref() == holder)
            .await;
    }
    assert_eq!(follower.errors(ObjectKind::Pod), 0);
}

#[tokio::test]
async fn what_happened_while_the_server_was_away_is_known_afterwards() {
    let mut server = Server::start().await.unwrap();
    let client = server.client(User::Admin).await.unwrap();
    create(&client, &namespace("shop")).await.unwrap();
    for n in 1..=3 {
        let (name, ip) = (format!("web-{n}"), format!("10.1.0.{n}"));
        create(&client, &pod("shop", &name, "node-a", &ip))
            .await
            .unwrap();
    }
    let follower = Follower::start(server.config(User::Admin).await.unwrap());
    follower.until("listed", |f| f.count("pods") == 3).await;
    follower.until("up", |f| f.works("cluster")).await;
    let second = server.second().await.unwrap();
    server.kill_api();
    follower.until("down", |f| !f.works("cluster")).await;
    let names = || ["10.1.0.1", "10.1.0.2", "10.1.0.3"].map(|ip| follower.now(ip));
    let known = ["web-1", "web-2", "web-3"].map(|name| Some(name.to_owned()));
    assert_eq!(names(), known, "names stay while nobody answers");
    let before = Timestamp::now();
    // The server that comes back begins after these: it answers 410 to who asks from before.
    delete(&second.client, &pod("shop", "web-1", "node-a", ""))
        .await
        .unwrap();
    create(&second.client, &pod("shop", "new", "node-a", "10.1.0.1"))
        .await
        .unwrap();
    server.start_api().await.unwrap();
    follower
        .until("caught up", |f| f.now("10.1.0.1").as_deref() == Some("new"))
        .await;
    follower
        .until("up again", |f| f.works("cluster-pods"))
        .await;
    // It works once it is answered, and is complete when all is listed.
    follower.until("listed", |f| f.count("pods") == 3).await;
    assert_eq!(
        follower.holder("10.1.0.1", before).as_deref(),
        Some("web-1")
    );
    assert!(
        follower.errors(ObjectKind::Pod) > 0,
        "the outage is counted"
    );
}

#[tokio::test]
async fn a_right_that_is_missing_is_named_and_works_once_granted() {
    let server = Server::start().await.unwrap();
    let admin = server.client(User::Admin).await.unwrap();
    create(&admin, &namespace("shop")).await.unwrap();
    create(&admin, &pod("shop", "web", "node-a", "10.1.0.7"))
        .await
        .unwrap();
    let rights = role("reader", json!(["namespaces", "nodes", "pods", "services"]));
    for object in &rights {
        create(&admin, object).await.unwrap();
    }
    let follower = Follower::start(server.config(User::Named("reader")).await.unwrap());
    follower
        .until("pods", |f| f.now("10.1.0.7").is_some())
        .await;
    for (kind, group) in [
        ("endpointslices", "discovery.k8s.io"),
        ("networkpolicies", "networking.k8s.io"),
    ] {
        let source = format!("cluster-{kind}");
        follower
            .until(&source, |f| f.source(&source).is_some_and(|(up, _)| !up))
            .await;
        let (_, why) = follower.source(&source).unwrap();
        let rule =
            format!("{{apiGroups: [\"{group}\"], resources: [{kind}], verbs: [list, watch]}}");
        assert!(why.contains(&rule), "{why}");
    }
    follower
        .until("the others work", |f| {
            f.works("cluster-pods") && f.works("cluster")
        })
        .await;
    delete(&admin, &rights[0]).await.unwrap();
    let more = json!([
        "namespaces",
        "nodes",
        "pods",
        "services",
        "endpointslices",
        "networkpolicies"
    ]);
    create(&admin, &role("reader", more)[0]).await.unwrap();
    for source in ["cluster-endpointslices", "cluster-networkpolicies"] {
        follower.until(source, |f| f.works(source)).await;
    }
}

#[tokio::test]
async fn kinds_of_the_admin_tier_are_watched_while_they_are_defined() {
    let server = Server::start().await.unwrap();
    let admin = server.client(User::Admin).await.unwrap();
    let follower = Follower::start(server.config(User::Admin).await.unwrap());
    follower
        .until("up", |f| f.works("cluster-networkpolicies"))
        .await;
    let source = "cluster-clusternetworkpolicies";
    assert_eq!(follower.source(source), None, "not defined, not missed");
    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": "clusternetworkpolicies.policy.networking.k8s.io",
            "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/network-policy-api/pull/300"},
        },
        "spec": {
            "group": "policy.networking.k8s.io", "scope": "Cluster",
            "names": {"kind": "ClusterNetworkPolicy", "plural": "clusternetworkpolicies"},
            "versions": [{"name": "v1alpha2", "served": true, "storage": true, "schema": {
                "openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            }}],
        },
    });
    create(&admin, &definition).await.unwrap();
    let policy = json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "no-db"},
        "spec": {"tier": "Admin", "priority": 10, "subject": {"namespaces": {}},
            "ingress": [{"name": "closed", "action": "Deny", "from": [{"namespaces": {}}]}]},
    });
    let mut created = create(&admin, &policy).await;
    for _ in 0..100 {
        if created.is_ok() {
            break;
        }
        // The definition counts a moment later.
        tokio::time::sleep(Duration::from_millis(200)).await;
        created = create(&admin, &policy).await;
    }
    created.unwrap();
    let count = |f: &Follower| f.count("clusternetworkpolicies");
    follower.until("it is known", |f| count(f) == 1).await;
    follower.until("its watch works", |f| f.works(source)).await;
    delete(&admin, &definition).await.unwrap();
    follower.until("it is gone", |f| count(f) == 0).await;
    follower
        .until("nothing is missed", |f| f.source(source).is_none())
        .await;
}

#[tokio::test]
async fn a_token_that_is_rotated_is_read_again() {
    let server = Server::start().await.unwrap();
    let admin = server.client(User::Admin).await.unwrap();
    create(&admin, &namespace("shop")).await.unwrap();
    let all = json!([
        "namespaces",
        "nodes",
        "pods",
        "services",
        "endpointslices",
        "networkpolicies"
    ]);
    for object in &role("agent", all) {
        create(&admin, object).await.unwrap();
    }
    let accounts: Api<ServiceAccount> = Api::namespaced(admin.clone(), "default");
    let account: ServiceAccount =
        serde_json::from_value(json!({"metadata": {"name": "agent"}})).unwrap();
    let create_account = || async {
        let params = PostParams::default();
        accounts.create(&params, &account).await.unwrap();
        let request: TokenRequest =
            serde_json::from_value(json!({"spec": {"audiences": [], "expirationSeconds": 600}}))
                .unwrap();
        let token = accounts
            .create_token_request("agent", &params, &request)
            .await
            .unwrap();
        token.status.unwrap().token
    };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    fs::write(&file, create_account().await).unwrap();
    // Asked for again after a refusal, as by an agent in its pod.
    let config = server.config_by_token(&file).await.unwrap();
    let follower = Follower::start(config);
    follower.until("up", |f| f.works("cluster-pods")).await;
    // The account is made anew: its old tokens are worth nothing.
    accounts.delete("agent", &Default::default()).await.unwrap();
    let token = create_account().await;
    // Longer than the server believes a token that it has seen.
    tokio::time::sleep(Duration::from_secs(11)).await;
    fs::write(&file, token).unwrap();
    create(&admin, &pod("shop", "web", "node-a", "10.1.0.7"))
        .await
        .unwrap();
    follower
        .until("web is known", |f| f.now("10.1.0.7").is_some())
        .await;
}

#[tokio::test]
async fn a_hundred_namespaces_go_at_once() {
    let server = Server::start().await.unwrap();
    let admin = server.client(User::Admin).await.unwrap();
    let name = |n: usize| format!("team-{n}");
    for n in 0..100 {
        create(&admin, &namespace(&name(n))).await.unwrap();
        let ip = format!("10.1.1.{n}");
        create(&admin, &pod(&name(n), "web", "node-a", &ip))
            .await
            .unwrap();
    }
    let follower = Follower::start(server.config(User::Admin).await.unwrap());
    follower.until("all", |f| f.count("pods") == 100).await;
    follower
        .until("namespaces", |f| f.count("namespaces") > 100)
        .await;
    let before = Timestamp::now();
    let known = follower.count("namespaces");
    let gone = (0..100).map(|n| {
        let admin = admin.clone();
        async move {
            delete(&admin, &pod(&name(n), "web", "node-a", ""))
                .await
                .unwrap();
            let all = namespace(&name(n));
            delete(&admin, &all).await.unwrap();
            // What the namespace controller does when nothing is left in it.
            let body = json!({"apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": name(n)}, "spec": {"finalizers": []}});
            let path = format!("/api/v1/namespaces/{}/finalize", name(n));
            let request = hyper::Request::put(path)
                .header("content-type", "application/json")
                .body(body.to_string().into_bytes())
                .unwrap();
            admin.request_text(request).await.unwrap();
        }
    });
    let mut tasks: tokio::task::JoinSet<()> = gone.collect();
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    follower
        .until("all gone", |f| {
            f.count("pods") == 0 && f.count("namespaces") + 100 == known
        })
        .await;
    for n in [0, 57, 99] {
        let ip = format!("10.1.1.{n}");
        assert_eq!(follower.now(&ip), None);
        assert_eq!(follower.holder(&ip, before).as_deref(), Some("web"));
    }
}

#[tokio::test]
async fn pods_of_other_nodes_are_asked_for_by_their_address() {
    let server = Server::start().await.unwrap();
    let admin = server.client(User::Admin).await.unwrap();
    create(&admin, &namespace("shop")).await.unwrap();
    create(&admin, &pod("shop", "near", "node-a", "10.1.0.7"))
        .await
        .unwrap();
    for n in 1..=40 {
        let (name, ip) = (format!("far-{n}"), format!("10.2.0.{n}"));
        create(&admin, &pod("shop", &name, "node-b", &ip))
            .await
            .unwrap();
    }
    let config = server.config(User::Admin).await.unwrap();
    let follower = Follower::reaching(config.clone(), Reach::Node);
    follower.until("listed", |f| f.works("cluster-pods")).await;
    assert_eq!(follower.count("pods"), 1);
    assert_eq!(follower.now("10.1.0.7").as_deref(), Some("near"));
    // Its own are watched, the others looked up: once, however often it is concerned.
    assert!(!follower.concerns("10.1.0.7"));
    follower
        .until("far is found", |f| {
            f.concerns("10.2.0.1");
            f.now("10.2.0.1").as_deref() == Some("far-1")
        })
        .await;
    assert!(!follower.concerns("10.2.0.1"), "it has its name");
    assert_eq!(follower.lookups("found"), 1);
    // Nobody's address is known to be nobody's before patience ends.
    assert!(follower.concerns("192.0.2.9"));
    follower
        .until("nobody is known", |f| f.lookups("none") == 1)
        .await;
    assert!(
        !follower.concerns("192.0.2.9"),
        "asked in vain a moment ago"
    );
    // A burst is limited, and the rest counted.
    for n in 2..=40 {
        follower.concerns(&format!("10.2.0.{n}"));
    }
    follower
        .until("all were answered or not asked", |f| {
            f.lookups("found") + f.lookups("limited") == 40
        })
        .await;
    assert!(follower.lookups("limited") > 0);
    // What was found is believed for a while only: the pod may be gone, and the address another's.
    delete(&admin, &pod("shop", "far-1", "node-b", ""))
        .await
        .unwrap();
    create(&admin, &pod("shop", "next", "node-b", "10.2.0.1"))
        .await
        .unwrap();
    follower
        .until("the next one is found", |f| {
            f.concerns("10.2.0.1");
            f.now("10.2.0.1").as_deref() == Some("next")
        })
        .await;
    // Few pods: all of them are watched.
    let all = Follower::reaching(config, Reach::Auto);
    all.until("all", |f| f.count("pods") == 41).await;
    assert!(!all.concerns("192.0.2.9"));
}
