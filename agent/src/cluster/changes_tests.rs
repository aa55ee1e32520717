use super::*;
use crate::cluster::objects::Namespace;
use crate::policy::testing::{objects, policy};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    let pairs = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into()));
    pairs.collect()
}

/// A pod of a Deployment in namespace db.
fn pod(name: &str, workload: Option<&str>, pairs: &[(&str, &str)]) -> Arc<Pod> {
    let yaml =
        format!("---\napiVersion: v1\nkind: Pod\nmetadata: {{namespace: db, name: {name}}}\n");
    let Some(Object::Pod(pod)) = objects(&yaml).into_iter().next() else {
        panic!("no pod");
    };
    let mut pod = Arc::unwrap_or_clone(pod);
    pod.labels = labels(pairs);
    pod.workload = workload.map(|name| {
        Arc::new(Workload {
            kind: "Deployment".into(),
            name: name.into(),
        })
    });
    Arc::new(pod)
}

fn policy_object(name: &str, spec: &str) -> Object {
    let object = objects(&policy(name, spec)).into_iter().next();
    object.expect("a policy")
}

/// What changed last for a pod at a time, as a sentence.
fn last(changes: &Changes, pod: &Pod, second: i64) -> Option<String> {
    let namespace_labels = Labels::default();
    let end = Concerned {
        pod,
        namespace_labels: &namespace_labels,
    };
    let change = changes.last_before(&[end], at(second));
    change.map(|change| change.sentence())
}

#[test]
fn the_last_change_that_concerns_a_pod_is_told() {
    let (pg, other) = (
        pod("pg", None, &[("app", "pg")]),
        pod("x", None, &[("app", "x")]),
    );
    let mut changes = Changes::default();
    let deny = policy_object("deny-pg", "  podSelector: {matchLabels: {app: pg}}");
    changes.upsert(None, &deny, at(10), false);
    let looser = policy_object(
        "deny-pg",
        "  podSelector: {matchLabels: {app: pg}}\n  ingress: [{}]",
    );
    assert_eq!(last(&changes, &pg, 9), None);
    let created = Some("NetworkPolicy db/deny-pg was created".to_owned());
    assert_eq!(last(&changes, &pg, 10), created);
    assert_eq!(
        last(&changes, &other, 10),
        None,
        "the policy does not select it"
    );

    // The same again is no change.
    changes.upsert(Some(&deny), &deny, at(20), false);
    assert_eq!(last(&changes, &pg, 25), created);
    changes.upsert(Some(&deny), &looser, at(30), false);
    let changed = Some("NetworkPolicy db/deny-pg was changed".to_owned());
    assert_eq!(last(&changes, &pg, 35), changed);
    changes.delete(&looser, at(40));
    let deleted = Some("NetworkPolicy db/deny-pg was deleted".to_owned());
    assert_eq!(last(&changes, &pg, 45), deleted);
    // What came later does not count for what was before.
    assert_eq!(last(&changes, &pg, 29), created);
}

#[test]
fn a_policy_of_before_is_told_by_its_own_times() {
    let Object::NetworkPolicy(key, read) = policy_object("deny", "") else {
        panic!("no policy");
    };
    let with = |created, written| {
        let mut policy = (*read).clone();
        (policy.created, policy.written) = (created, written);
        Object::NetworkPolicy(key.clone(), Arc::new(policy))
    };
    for (created, written, known) in [
        (Some(at(1)), Some(at(5)), Some(at(5))),
        (Some(at(1)), None, Some(at(1))),
        (None, None, None),
    ] {
        let mut changes = Changes::default();
        changes.upsert(None, &with(created, written), at(100), true);
        let told: Vec<_> = changes.policies().map(|(.., at)| at).collect();
        assert_eq!(told, known.into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn a_rollout_with_other_labels_is_a_change_of_its_workload() {
    let old = pod(
        "web-1-a",
        Some("web"),
        &[("app", "web"), ("pod-template-hash", "1")],
    );
    let same = pod(
        "web-2-a",
        Some("web"),
        &[("app", "web"), ("pod-template-hash", "2")],
    );
    let new = pod(
        "web-3-a",
        Some("web"),
        &[("app", "www"), ("pod-template-hash", "3")],
    );
    let object = |pod: &Arc<Pod>| Object::Pod(pod.clone());
    let mut changes = Changes::default();
    changes.upsert(None, &object(&old), at(0), true);
    changes.upsert(None, &object(&same), at(10), false);
    assert_eq!(last(&changes, &same, 15), None, "another revision alone");
    changes.upsert(None, &object(&new), at(20), false);
    let told = Some("Deployment db/web got other labels".to_owned());
    assert_eq!(last(&changes, &new, 25), told);
    // The old one is still told of, as it was.
    changes.upsert(Some(&object(&old)), &object(&old), at(30), false);
    assert_eq!(changes.last.len(), 1);

    // All end before the first of the next starts.
    for pod in [&old, &same, &new] {
        changes.delete(&object(pod), at(40));
    }
    let next = pod(
        "web-4-a",
        Some("web"),
        &[("app", "web"), ("pod-template-hash", "4")],
    );
    changes.purge(at(39));
    changes.upsert(None, &object(&next), at(50), false);
    assert_eq!(changes.last.len(), 2);
    changes.delete(&object(&next), at(60));
    changes.purge(at(60));
    assert!(changes.workloads.is_empty());
}

#[test]
fn a_label_of_a_bare_pod_is_its_own() {
    let before = pod("pg", None, &[("app", "pg")]);
    let after = pod("pg", None, &[("app", "pg"), ("team", "shop")]);
    let mut changes = Changes::default();
    changes.upsert(None, &Object::Pod(before.clone()), at(0), false);
    assert_eq!(last(&changes, &before, 5), None, "a pod that is new");
    changes.upsert(
        Some(&Object::Pod(before)),
        &Object::Pod(after.clone()),
        at(10),
        false,
    );
    let told = Some("Pod db/pg got other labels".to_owned());
    assert_eq!(last(&changes, &after, 15), told);
}

#[test]
fn labels_of_a_namespace_concern_its_pods() {
    let namespace = |pairs: &[(&str, &str)]| {
        Object::Namespace(Arc::new(Namespace {
            key: crate::cluster::Key {
                kind: ObjectKind::Namespace,
                namespace: "".into(),
                name: "db".into(),
            },
            labels: labels(pairs),
        }))
    };
    let pg = pod("pg", None, &[]);
    let mut changes = Changes::default();
    let (before, after) = (namespace(&[]), namespace(&[("team", "db")]));
    changes.upsert(None, &before, at(0), false);
    changes.upsert(Some(&before), &before, at(5), false);
    assert_eq!(last(&changes, &pg, 8), None);
    changes.upsert(Some(&before), &after, at(10), false);
    let told = Some("Namespace db got other labels".to_owned());
    assert_eq!(last(&changes, &pg, 12), told);
}

#[test]
fn only_the_last_ones_are_remembered() {
    let mut changes = Changes::default();
    let deny = policy_object("deny", "");
    for second in 0..MAX as i64 + 5 {
        changes.delete(&deny, at(second));
    }
    assert_eq!(changes.last.len(), MAX);
    assert_eq!(changes.last[0].at, at(5));
}
