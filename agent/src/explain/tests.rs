use std::time::Duration;

use super::*;
use crate::cluster::objects::Object;
use crate::event::testing;
use crate::policy::testing::{objects, policy};
use crate::record::{Detail, Record};
use crate::senders::Senders;

/// A state whose index holds pods web (node-a) and pg (node-b), and these policies.
fn state(node: &str, more: &str) -> Arc<State> {
    let record = Record::new(Detail::Pod, 100, Duration::from_secs(60));
    let senders = Senders::new(Detail::Pod, 100, Duration::from_secs(60));
    let state = Arc::new(State::new(node.into(), record, senders));
    let all: Vec<Object> = objects(&format!("{}{more}", crate::policy::testing::BASE));
    state
        .index_mut()
        .load(all, "2026-01-01T00:00:00Z".parse().unwrap());
    state
}

/// A SYN from web to pg, dropped for a reason at a node.
fn syn(state: &State, reason: Option<&str>) -> Event {
    let mut event = testing::event();
    event.time = "2026-06-01T00:00:00Z".parse().unwrap();
    event.explanation = None;
    for (end, ip) in [
        (&mut event.source, "10.244.1.7"),
        (&mut event.destination, "10.244.2.9"),
    ] {
        *end = Endpoint {
            ip: ip.parse().ok(),
            port: end.port,
            ..Endpoint::default()
        };
        state.index().name(end, event.protocol, event.time);
    }
    event.drop = reason.map(|reason| DropSite {
        reason: Some(reason.into()),
        location: Some("nft_do_chain".into()),
        interface: None,
        netns: None,
    });
    if reason.is_none() {
        event.outcome = Outcome::Unanswered;
    }
    event
}

const DENY: &str = "  policyTypes: [Ingress]";

fn explained(node: &str, more: &str, reason: Option<&str>) -> Option<Explanation> {
    let state = state(node, more);
    let event = syn(&state, reason);
    Explainer::new(state).explain(&event, Instant::now())
}

#[test]
fn without_policies_nothing_is_explained() {
    assert_eq!(explained("node-b", "", Some("NETFILTER_DROP")), None);
}

#[test]
fn a_denial_is_confirmed_where_the_enforcer_is() {
    let deny = policy("default-deny", DENY);
    let there = explained("node-b", &deny, Some("NETFILTER_DROP")).unwrap();
    assert_eq!(there.confidence, Confidence::Confirmed);
    assert_eq!(there.direction.as_deref(), Some("ingress"));
    assert_eq!(there.policies, ["db/default-deny"]);
    assert!(
        there
            .summary
            .starts_with("ingress to db/pg is isolated by db/default-deny"),
        "{}",
        there.summary
    );
    let best = there.findings.iter().find_map(|f| f.fix.as_deref());
    assert!(
        best.is_some_and(|yaml| yaml.contains("kind: NetworkPolicy")),
        "{there:?}"
    );
    // On the sender's node an ingress policy of another node's pod is not enforced by every CNI; and
    // nobody saw a drop of what is unanswered.
    for (node, reason) in [("node-a", Some("NETFILTER_DROP")), ("node-a", None)] {
        let here = explained(node, &deny, reason).unwrap();
        assert_eq!(here.confidence, Confidence::Consistent, "{node} {reason:?}");
        assert_eq!(here.policies, ["db/default-deny"]);
    }
}

#[test]
fn an_innocent_policy_is_not_blamed() {
    let allow = policy("allow-all", "  policyTypes: [Ingress]\n  ingress: [{}]");
    let allowed = explained("node-b", &allow, Some("NETFILTER_DROP")).unwrap();
    assert_eq!(allowed.confidence, Confidence::Contradicted);
    assert!(allowed.policies.is_empty() && allowed.direction.is_none());
    assert!(allowed.summary.contains("allow it"), "{}", allowed.summary);
    // Policies deny it, but no enforcer drops like this.
    let deny = policy("default-deny", DENY);
    for reason in [
        "NEIGH_FAILED",
        "NO_SOCKET",
        "IP_OUTNOROUTES",
        "SOCKET_RCVBUFF",
    ] {
        assert_eq!(explained("node-b", &deny, Some(reason)), None, "{reason}");
    }
}

#[test]
fn both_sides_are_named_where_either_may_have_done_it() {
    let both = policy("deny-in", DENY)
        + &crate::policy::testing::shop_policy("deny-out", "  policyTypes: [Egress]");
    let explained = explained("node-b", &both, Some("TC_INGRESS")).unwrap();
    assert_eq!(explained.confidence, Confidence::Consistent);
    assert_eq!(explained.direction, None);
    assert_eq!(explained.policies, ["shop/deny-out", "db/deny-in"]);
}

#[test]
fn an_explanation_is_worked_out_once_for_a_flow_and_a_state_of_the_objects() {
    let state = state("node-b", &policy("default-deny", DENY));
    let event = syn(&state, Some("NETFILTER_DROP"));
    let mut explainer = Explainer::new(state.clone());
    let start = Instant::now();
    let mut now = start;
    let first = explainer.explain(&event, now);
    for _ in 0..10_000 {
        now += Duration::from_micros(10);
        assert_eq!(explainer.explain(&event, now), first);
    }
    assert_eq!(explainer.computed(), 1);
    // Nothing that is kept of an object changed: no new state.
    let pods = objects(crate::policy::testing::BASE);
    for object in pods {
        let change = crate::cluster::Change::Upsert(object);
        state.index_mut().apply(change, event.time);
    }
    explainer.explain(&event, now + worlds::APART);
    assert_eq!(explainer.computed(), 1);
    // The policy goes, as soon as objects are looked at again.
    let gone = objects(&policy("default-deny", DENY));
    let key = gone[0].key().clone();
    let other = objects(&policy("other", "  policyTypes: [Egress]"));
    let upsert = crate::cluster::Change::Upsert(other[0].clone());
    state.index_mut().apply(upsert, event.time);
    let delete = crate::cluster::Change::Delete(key);
    state.index_mut().apply(delete, event.time);
    let after = explainer
        // However long the first look took, 20 times that are over.
        .explain(&event, now + Duration::from_secs(1_000))
        .unwrap();
    assert_eq!(after.confidence, Confidence::Contradicted);
    assert_eq!(explainer.computed(), 2);
}

#[test]
fn only_what_opens_a_connection_is_asked_about() {
    let state = state("node-b", &policy("default-deny", DENY));
    let mut event = syn(&state, Some("NETFILTER_DROP"));
    event.kind = Kind::Packet;
    let mut explainer = Explainer::new(state);
    assert_eq!(
        explainer.explain(&event, Instant::now()),
        None,
        "of TCP, a reply perhaps"
    );
}

#[test]
fn denials_are_counted_for_each_policy_and_bounded() {
    let state = state("node-b", &(policy("one", DENY) + &policy("two", DENY)));
    let mut event = syn(&state, Some("NETFILTER_DROP"));
    event.packets = 3;
    event.explanation = Explainer::new(state.clone()).explain(&event, Instant::now());
    state.denials.add(&event);
    state.denials.add(&event);
    let all = state.denials.all();
    let names: Vec<(&str, u64)> = all.iter().map(|(d, n)| (&*d.policy.1, *n)).collect();
    assert_eq!(names, [("one", 6), ("two", 6)]);
    assert_eq!(all[0].0.namespaces, ["shop".into(), "db".into()]);
    assert_eq!(
        (all[0].0.confidence, &*all[0].0.direction),
        ("confirmed", "ingress")
    );
    for n in 0..11_000 {
        if let Some(explanation) = &mut event.explanation {
            explanation.policies = vec![format!("db/policy-{n}")];
        }
        state.denials.add(&event);
    }
    let all = state.denials.all();
    assert_eq!(all.len(), 10_001);
    assert_eq!(all.iter().map(|(_, n)| n).sum::<u64>(), 12 + 3 * 11_000);
}

#[test]
fn a_rule_of_a_tier_is_named_before_any_namespace_s_policy() {
    let admin = "---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: no-db}
spec:
  tier: Admin
  priority: 10
  subject: {namespaces: {matchLabels: {kubernetes.io/metadata.name: db}}}
  ingress: [{name: closed, action: Deny, from: [{namespaces: {}}]}]
";
    let explained = explained("node-b", admin, Some("NETFILTER_DROP")).unwrap();
    assert_eq!(explained.confidence, Confidence::Confirmed);
    assert_eq!(explained.policies, ["ClusterNetworkPolicy no-db"]);
    assert_eq!(explained.findings[0].code, "admin-tier-denied");
    assert!(explained.summary.contains("no-db"), "{}", explained.summary);
}

/// The policies change while drops happen.
fn apply(state: &State, yaml: &str, at: &str) {
    for object in objects(yaml) {
        let change = crate::cluster::Change::Upsert(object);
        state.index_mut().apply(change, at.parse().unwrap());
    }
}

#[test]
fn what_changed_last_before_the_first_drop_is_told() {
    let state = state("node-b", "");
    apply(
        &state,
        &policy("default-deny", DENY),
        "2026-06-01T00:00:00Z",
    );
    let mut explainer = Explainer::new(state.clone());
    let mut event = syn(&state, Some("NETFILTER_DROP"));
    event.time = "2026-06-01T00:00:04Z".parse().unwrap();
    let first = explainer.explain(&event, Instant::now()).unwrap();
    let change = first.last_change.unwrap();
    assert_eq!(
        (&*change.kind, &*change.namespace, &*change.name),
        ("NetworkPolicy", "db", "default-deny")
    );
    assert_eq!(change.seconds_before_first_drop, Some(4.0));
    let told = "; NetworkPolicy db/default-deny was created 4 s before the first drop";
    assert!(first.summary.ends_with(told), "{}", first.summary);

    // Later drops are of the same episode, whatever changes meanwhile.
    apply(
        &state,
        &policy("other", "  policyTypes: [Ingress, Egress]"),
        "2026-06-01T00:02:00Z",
    );
    event.time = "2026-06-01T00:05:00Z".parse().unwrap();
    let later = explainer
        .explain(&event, Instant::now() + Duration::from_secs(60))
        .unwrap();
    assert_eq!(later.last_change.unwrap().name, "default-deny");

    // After a pause of more than ten minutes another one begins.
    event.time = "2026-06-01T00:15:01Z".parse().unwrap();
    let again = explainer
        .explain(&event, Instant::now() + Duration::from_secs(120))
        .unwrap();
    let change = again.last_change.unwrap();
    assert_eq!(change.name, "other");
    assert_eq!(change.seconds_before_first_drop, Some(781.0));
    assert!(again.summary.ends_with("13 min before the first drop"));
}
