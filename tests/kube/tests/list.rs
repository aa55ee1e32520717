//! The objects of a real API server, read once, as `whydrop explain` does.

use serde_json::json;
use whydrop::cluster::ObjectKind;
use whydrop::cluster::list::{Listed, list};
use whydrop_kube_tests::objects::{create, namespace, pod};
use whydrop_kube_tests::server::{Server, User};

/// Pods: more than a page has.
const PODS: usize = 520;

fn count(listed: &Listed, kind: ObjectKind) -> usize {
    let of = listed.objects.iter().filter(|o| o.key().kind == kind);
    of.count()
}

#[tokio::test]
async fn all_pages_of_all_kinds_that_a_user_may_list_are_read() {
    let server = Server::start().await.unwrap();
    let client = server.client(User::Admin).await.unwrap();
    create(&client, &namespace("shop")).await.unwrap();
    for i in 0..PODS {
        let ip = format!("10.1.{}.{}", i / 250, i % 250 + 1);
        let pod = pod("shop", &format!("web-{i}"), "node-a", &ip);
        create(&client, &pod).await.unwrap();
    }
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "shop", "name": "guard"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    });
    create(&client, &policy).await.unwrap();
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": "reader"},
        "rules": [{
            "apiGroups": ["", "discovery.k8s.io"],
            "resources": ["pods", "services", "nodes", "namespaces", "endpointslices"],
            "verbs": ["list"],
        }],
    });
    create(&client, &role).await.unwrap();
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "reader"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "reader"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "reader"}],
    });
    create(&client, &binding).await.unwrap();

    let listed = list(&client).await.unwrap();
    assert_eq!(count(&listed, ObjectKind::Pod), PODS);
    assert_eq!(count(&listed, ObjectKind::NetworkPolicy), 1);
    assert!(
        count(&listed, ObjectKind::Namespace) >= 4,
        "the server's own"
    );
    assert!(count(&listed, ObjectKind::Service) >= 1, "the server's own");
    // No definition of a tier's policies is there: that is no gap.
    assert_eq!((listed.missing, listed.malformed), (vec![], vec![]));

    // One right less, which the server's own answer tells; a new one is seen a moment later.
    let reader = server.client(User::Named("reader")).await.unwrap();
    let mut listed = list(&reader).await.unwrap();
    for _ in 0..100 {
        if listed.missing.len() == 1 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        listed = list(&reader).await.unwrap();
    }
    assert_eq!(count(&listed, ObjectKind::Pod), PODS);
    let [(kind, why)] = &listed.missing[..] else {
        panic!("{:?}", listed.missing);
    };
    assert_eq!(*kind, ObjectKind::NetworkPolicy);
    assert!(
        why.contains("list networkpolicies.networking.k8s.io (verb list"),
        "{why}"
    );
}
