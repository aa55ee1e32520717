//! `--cluster` against a scripted API server: each fault that a server, a proxy or a network makes.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::json;
use whydrop::cluster::ObjectKind;
use whydrop::cluster::watch::Reach;
use whydrop::event::{Endpoint, EndpointKind};

use crate::support::DEADLINE;
use crate::support::follower::{
    Error, Follower, Late, Lines, Text, bookmark, event, gone, list, pod,
};

mod support;

#[tokio::test]
async fn pages_then_changes() {
    let mut bare = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "shop", "name": "bare", "resourceVersion": "9"}});
    bare["metadata"]["annotations"] = json!({"huge": "x".repeat(1 << 20)});
    bare["novelty"] = json!([{"of": "2031"}]);
    let mut malformed = pod("malformed", "10.0.0.300", 9);
    malformed["status"]["podIP"] = json!("10.0.0.300");
    let follower = Follower::start("31", |script| {
        script.then(
            "pods",
            "list",
            [
                list(&[pod("web", "10.0.0.1", 3), malformed], "5", Some("more")),
                list(&[bare, pod("db", "10.0.0.2", 4)], "5", None),
            ],
        );
        let lines = vec![
            bookmark("6", false),
            event("ADDED", &pod("late", "10.0.0.3", 7)),
            event("DELETED", &pod("db", "10.0.0.2", 8)),
        ];
        script.then("pods", "watch", [Lines(lines, false)]);
    })
    .await;
    follower
        .until("late came, db went", |f| {
            f.now("10.0.0.3").is_some() && f.now("10.0.0.2").is_none()
        })
        .await;
    assert_eq!(follower.now("10.0.0.1").as_deref(), Some("web"));
    assert_eq!(follower.count("pods"), 3, "web, bare, late");
    let objects = follower.state.errors.objects.load(Ordering::Relaxed);
    assert_eq!(objects, 1, "only the malformed one is left out");
    // A watch that ended goes on behind what it told last, and is no error.
    follower
        .until("the watch goes on", |f| {
            f.script.asked("pods", "watch").len() == 2
        })
        .await;
    let asked = follower.script.asked("pods", "watch");
    assert!(asked[0].contains("resourceVersion=5"), "{asked:?}");
    assert!(asked[0].contains("allowWatchBookmarks=true"), "{asked:?}");
    assert!(asked[1].contains("resourceVersion=8"), "{asked:?}");
    assert_eq!(follower.script.asked("pods", "list").len(), 2);
    assert_eq!(follower.errors(ObjectKind::Pod), 0);
    for source in ["cluster", "cluster-pods", "cluster-networkpolicies"] {
        follower.until(source, |f| f.works(source)).await;
    }
}

#[tokio::test]
async fn what_vanished_while_nobody_looked_is_gone_and_still_named_for_its_time() {
    let follower = Follower::start("31", |script| {
        let before = [pod("web", "10.0.0.1", 3), pod("db", "10.0.0.2", 4)];
        // The address of db has a new pod.
        let after = [pod("web", "10.0.0.1", 3), pod("next", "10.0.0.2", 20)];
        let lists = [list(&before, "5", None), list(&after, "21", None)];
        script.then("pods", "list", lists);
        let too_old = Late(
            Duration::from_millis(300),
            Box::new(Lines(vec![gone()], true)),
        );
        script.then("pods", "watch", [too_old]);
    })
    .await;
    follower
        .until("db is there", |f| {
            f.now("10.0.0.2").as_deref() == Some("db")
        })
        .await;
    let then = Timestamp::now();
    follower
        .until("next is there", |f| {
            f.now("10.0.0.2").as_deref() == Some("next")
        })
        .await;
    follower.until("db is gone", |f| f.count("pods") == 2).await;
    assert_eq!(follower.holder("10.0.0.2", then).as_deref(), Some("db"));
    assert_eq!(follower.now("10.0.0.1").as_deref(), Some("web"));
    assert_eq!(follower.errors(ObjectKind::Pod), 1);
    follower
        .until("it works again", |f| f.works("cluster-pods"))
        .await;
}

#[tokio::test]
async fn a_place_that_is_refused_as_too_old_is_not_asked_for_again() {
    let follower = Follower::start("31", |script| {
        let lists = [
            list(&[pod("web", "10.0.0.1", 3)], "5", None),
            list(&[pod("db", "10.0.0.2", 20)], "21", None),
        ];
        script.then("pods", "list", lists);
        script.then("pods", "watch", [Error(410)]);
    })
    .await;
    follower
        .until("all is listed anew", |f| {
            f.now("10.0.0.2").is_some() && f.count("pods") == 1
        })
        .await;
    follower
        .until("it works", |f| f.works("cluster-pods"))
        .await;
}

#[tokio::test]
async fn errors_garbage_and_slowness_are_survived() {
    let follower = Follower::start("31", |script| {
        let good = list(&[pod("web", "10.0.0.1", 3)], "5", None);
        script.then("pods", "list", [Error(500), Error(429), good]);
        let garbage = vec![
            "<html>bad gateway</html>".to_owned(),
            "{\"type\":".to_owned(),
        ];
        let late = Lines(vec![event("ADDED", &pod("db", "10.0.0.2", 7))], true);
        let slow = Late(Duration::from_secs(3), Box::new(late));
        script.then("pods", "watch", [Lines(garbage, false), slow]);
    })
    .await;
    follower
        .until("the error is said", |f| {
            let source = f.source("cluster-pods");
            source.is_some_and(|(up, why)| !up && why.contains("500"))
        })
        .await;
    // The others do not wait for it.
    follower
        .until("services are listed", |f| f.works("cluster-services"))
        .await;
    follower
        .until("db is named", |f| f.now("10.0.0.2").is_some())
        .await;
    assert_eq!(follower.now("10.0.0.1").as_deref(), Some("web"));
    assert!(follower.errors(ObjectKind::Pod) >= 3);
    assert_eq!(follower.errors(ObjectKind::Service), 0);
    follower
        .until("it works again", |f| f.works("cluster-pods"))
        .await;
}

#[tokio::test]
async fn a_right_that_is_missing_turns_off_only_what_needs_it() {
    let follower = Follower::start("31", |script| {
        script.then(
            "pods",
            "list",
            [list(&[pod("web", "10.0.0.1", 3)], "5", None)],
        );
        script.then("networkpolicies", "list", [Error(403), Error(403)]);
    })
    .await;
    follower
        .until("the right is named", |f| {
            f.source("cluster-networkpolicies")
                .is_some_and(|(up, _)| !up)
        })
        .await;
    let (_, why) = follower.source("cluster-networkpolicies").unwrap();
    let rule =
        "{apiGroups: [\"networking.k8s.io\"], resources: [networkpolicies], verbs: [list, watch]}";
    assert!(why.contains("not allowed to list networkpolicies"), "{why}");
    assert!(why.contains(rule), "{why}");
    follower
        .until("pods are named", |f| f.now("10.0.0.1").is_some())
        .await;
    follower
        .until("pods work", |f| {
            f.works("cluster-pods") && f.works("cluster")
        })
        .await;
    // Given the right, it works without a restart.
    follower
        .until("it is tried again", |f| f.works("cluster-networkpolicies"))
        .await;
    assert_eq!(follower.errors(ObjectKind::NetworkPolicy), 2);
}

#[tokio::test]
async fn a_watch_that_is_silent_is_noticed() {
    let watch = Duration::from_secs(1);
    let follower = Follower::with("31", watch, &["t"], |script| {
        script.then(
            "pods",
            "list",
            [list(&[pod("web", "10.0.0.1", 3)], "5", None)],
        );
        let silent = Lines(vec![event("ADDED", &pod("db", "10.0.0.2", 7))], true);
        let next = Lines(vec![event("ADDED", &pod("late", "10.0.0.3", 8))], true);
        script.then("pods", "watch", [silent, next]);
    })
    .await;
    follower
        .until("it goes on", |f| f.now("10.0.0.3").is_some())
        .await;
    let asked = follower.script.asked("pods", "watch");
    assert!(asked[1].contains("resourceVersion=7"), "{asked:?}");
    assert!(follower.errors(ObjectKind::Pod) >= 1);
    assert_eq!(follower.script.asked("pods", "list").len(), 1);
}

#[tokio::test]
async fn credentials_that_are_refused_are_read_again() {
    let follower = Follower::with("31", DEADLINE, &["old", "new"], |script| {
        *script.token.lock().unwrap() = Some("new");
        script.then(
            "pods",
            "list",
            [list(&[pod("web", "10.0.0.1", 3)], "5", None)],
        );
    })
    .await;
    follower
        .until("pods are named", |f| f.now("10.0.0.1").is_some())
        .await;
    assert!(follower.configured.load(Ordering::Relaxed) >= 2);
    follower
        .until("it works", |f| {
            f.works("cluster") && f.works("cluster-pods")
        })
        .await;
}

#[tokio::test]
async fn lists_are_streamed_where_the_server_offers_it() {
    let follower = Follower::start("34", |script| {
        let lines = vec![
            event("ADDED", &pod("web", "10.0.0.1", 3)),
            bookmark("5", true),
            event("ADDED", &pod("db", "10.0.0.2", 7)),
        ];
        script.then("pods", "watch", [Lines(lines, true)]);
        // Switched off for this one.
        script.then("services", "watch", [Error(422)]);
    })
    .await;
    follower
        .until("db is named", |f| f.now("10.0.0.2").is_some())
        .await;
    assert_eq!(follower.now("10.0.0.1").as_deref(), Some("web"));
    assert!(follower.works("cluster-pods"));
    assert!(follower.script.asked("pods", "list").is_empty());
    let asked = follower.script.asked("pods", "watch");
    assert!(asked[0].contains("sendInitialEvents=true"), "{asked:?}");
    follower
        .until("services are listed", |f| f.works("cluster-services"))
        .await;
    assert_eq!(follower.script.asked("services", "list").len(), 1);
    assert_eq!(follower.errors(ObjectKind::Service), 0);
}

/// The same server after an outage, without the definitions of one of its kinds.
#[tokio::test]
async fn a_kind_that_the_server_has_no_more_after_a_reconnect_is_forgotten() {
    let follower = Follower::with("31", DEADLINE, &["old", "new"], |script| {
        let kinds = json!({"resources": [{"name": "adminnetworkpolicies"}]});
        script.then("v1alpha1", "list", [Text(kinds)]);
        let policy = json!({"metadata": {"name": "no-egress", "resourceVersion": "3"},
            "spec": {"priority": 1, "subject": {"namespaces": {}}, "egress": []}});
        script.then("adminnetworkpolicies", "list", [list(&[policy], "5", None)]);
        // Long enough for the other kinds to begin; what ends is asked for again.
        let ends = Late(Duration::from_secs(1), Box::new(Lines(Vec::new(), false)));
        script.then("pods", "watch", [ends]);
    })
    .await;
    let source = "cluster-adminnetworkpolicies";
    follower
        .until("the policy is known", |f| {
            f.count("adminnetworkpolicies") == 1 && f.works(source)
        })
        .await;
    *follower.script.token.lock().unwrap() = Some("new");
    follower
        .until("the policy is gone", |f| {
            f.count("adminnetworkpolicies") == 0
        })
        .await;
    assert_eq!(follower.source(source), None);
    follower
        .until("pods are watched again", |f| {
            f.works("cluster") && f.works("cluster-pods")
        })
        .await;
}

/// kube tells that a list begins before it asks for it, which is no good word.
#[tokio::test]
async fn a_list_that_fails_is_asked_for_ever_more_seldom() {
    let follower = Follower::start("31", |script| {
        script.then("services", "list", vec![Error(500); 100]);
    })
    .await;
    let asked = |f: &Follower| f.script.asked("services", "list").len();
    follower.until("it was refused", |f| asked(f) >= 3).await;
    // After pauses of 0.8, 1.6 and 3.2 s, and at most twice these: without a growing pause there are ten more.
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert!(asked(&follower) <= 6, "{} times", asked(&follower));
}

/// It may be large, and busy with that.
#[tokio::test]
async fn of_a_server_that_does_not_say_how_many_pods_there_are_only_the_nodes_are_watched() {
    let follower = Follower::reaching(Reach::Auto, |script| {
        script.then("pods", "list", [Error(500)]);
    })
    .await;
    follower
        .until("pods are watched", |f| f.works("cluster-pods"))
        .await;
    let lists = follower.script.asked("pods", "list");
    assert!(lists[0].contains("limit=1"), "{lists:?}");
    assert!(lists[1].contains("spec.nodeName%3Dnode-a"), "{lists:?}");
}

/// A StatefulSet's pod came here from another node, which a cache of the API server has not seen.
#[tokio::test]
async fn a_late_answer_takes_no_pod_of_this_nodes_place() {
    let mut elsewhere = pod("pg-0", "10.0.0.9", 3);
    elsewhere["spec"]["nodeName"] = json!("node-b");
    let follower = Follower::reaching(Reach::Node, |script| {
        let here = list(&[pod("pg-0", "10.0.0.1", 4)], "5", None);
        let answer = list(&[elsewhere], "5", None);
        script.then("pods", "list", [here, answer]);
    })
    .await;
    follower
        .until("names can be awaited", |f| f.state.awaited.asks())
        .await;
    let asked = Endpoint {
        ip: "10.0.0.9".parse().ok(),
        kind: Some(EndpointKind::External),
        ..Endpoint::default()
    };
    let found = |f: &Follower| f.state.lookups.found.load(Ordering::Relaxed);
    follower
        .until("it is answered", |f| {
            f.state.awaited.awaits(&asked, false, Instant::now());
            found(f) == 1
        })
        .await;
    assert_eq!(follower.now("10.0.0.1").as_deref(), Some("pg-0"));
    assert_eq!(follower.now("10.0.0.9"), None);
}
