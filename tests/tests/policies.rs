//! Drops laid against NetworkPolicies while they happen.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use whydrop::event::{Confidence, Event, Line};
use whydrop_tests::agent::Agent;
use whydrop_tests::expect::barrier;
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::scene::{TCP_PORT, UDP_PORT};
use whydrop_tests::traffic::{self, Connect};
use whydrop_tests::watching::wait_for;
use whydrop_tests::{counters, objects, on_both_families};

on_both_families!(a_denial_is_explained_as_it_happens);

fn policy(lab: &Lab, ingress: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": lab.namespace(), "name": "guard"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "server"}},
            "policyTypes": ["Ingress"], "ingress": ingress,
        },
    })
}

fn with_policy(lab: &Lab, ingress: &Value) -> Value {
    let mut list = objects::list(lab);
    let items = list["items"].as_array_mut().expect("items");
    items.push(policy(lab, ingress));
    list
}

/// The events from the client to the server after the first so many lines.
fn events(agent: &Agent, after: usize) -> Vec<Event> {
    let lines = agent.lines().split_off(after);
    let of_pair = lines.into_iter().filter_map(|line| match line {
        Line::Event(event) if event.destination.pod.as_deref() == Some("server") => Some(event),
        _ => None,
    });
    of_pair.collect()
}

fn denials(agent: &Agent) -> Result<Vec<(String, String, f64)>> {
    let metrics = agent.metrics()?;
    let of = metrics
        .iter()
        .filter(|sample| sample.name == "whydrop_policy_denials_total");
    Ok(of
        .map(|s| {
            (
                s.label("policy").to_owned(),
                s.label("finding").to_owned(),
                s.value,
            )
        })
        .collect())
}

fn a_denial_is_explained_as_it_happens(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let (ip, server) = (family.nft(), lab.address(Place::Of(Host::Server), family));
    // What an enforcer does for the policy: clients of another label are dropped.
    lab.nft(
        Host::Router,
        &format!(
            "table inet lab {{
               counter dropped {{ }}
               chain c {{ type filter hook forward priority 0;
                 {ip} daddr {server} udp dport {UDP_PORT} counter name dropped drop
                 {ip} daddr {server} tcp dport {TCP_PORT} counter name dropped drop
               }}
             }}"
        ),
    )?;
    let only_friends = json!([{"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}]}]);
    let agent = Agent::start_with(&lab.node(), &with_policy(&lab, &only_friends), &[])?;
    let send = || -> Result<()> {
        let tcp = lab.socket(Place::Of(Host::Server), family, TCP_PORT);
        let udp = lab.socket(Place::Of(Host::Server), family, UDP_PORT);
        ensure!(lab.within(Host::Client, || traffic::connect(tcp)) == Connect::Silent);
        lab.within(Host::Client, || traffic::udp_burst(udp, 30, 3, b"datagram"))?;
        barrier(&lab, &agent)
    };
    send()?;
    let dropped = counters::nft(&lab, Host::Router, "dropped")?;
    ensure!(dropped >= 31, "nft counted {dropped}");
    let full_name = format!("{}/guard", lab.namespace());
    wait_for("every packet is told", || {
        let told: u64 = events(&agent, 0).iter().map(|event| event.packets).sum();
        told == dropped
    })?;
    for event in events(&agent, 0) {
        let explanation = event.explanation.context("an explanation")?;
        ensure!(
            explanation.confidence == Confidence::Confirmed,
            "{explanation:?}"
        );
        ensure!(
            explanation.direction.as_deref() == Some("ingress"),
            "{explanation:?}"
        );
        ensure!(
            explanation.policies == [full_name.clone()],
            "{explanation:?}"
        );
        ensure!(
            explanation.summary.contains("app=friend"),
            "{explanation:?}"
        );
        ensure!(
            explanation.findings.iter().any(|f| f.fix.is_some()),
            "{explanation:?}"
        );
    }
    let counted = denials(&agent)?;
    let packets: f64 = counted.iter().map(|(.., packets)| packets).sum();
    ensure!(packets == dropped as f64, "{counted:?}");
    ensure!(
        counted.iter().all(|(policy, ..)| policy == "guard"),
        "{counted:?}"
    );
    // The policy lets it through now, and something else goes on dropping.
    let path = agent.objects();
    let changed = with_policy(&lab, &json!([{}])).to_string();
    fs::write(path.with_extension("new"), changed)?;
    fs::rename(path.with_extension("new"), &path)?;
    wait_for("the changed policy counts", || {
        let after = agent.lines().len();
        if send().is_err() {
            return false;
        }
        let events = events(&agent, after);
        let is_innocent = |event: &Event| {
            let explanation = event.explanation.as_ref();
            explanation.is_some_and(|e| e.confidence == Confidence::Contradicted)
        };
        !events.is_empty() && events.iter().all(is_innocent)
    })?;
    let before = denials(&agent)?;
    send()?;
    ensure!(denials(&agent)? == before, "an innocent policy is blamed");
    ensure!(agent.stop()?.success());
    Ok(())
}
