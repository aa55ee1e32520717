//! `whydrop explain` and `whydrop connections` against an agent's socket.

use std::sync::Arc;

use serde_json::{Value, json};
use whydrop::cluster::document;
use whydrop::cluster::objects::Interner;
use whydrop::event::{DropSite, Event, Line};
use whydrop::source::load::SourceStatus;
use whydrop::sync::lock;

use crate::support::command::{objects, run, told, whydrop};
use crate::support::{Agent, event};

mod support;

fn load(agent: &Agent, objects: &[Value]) {
    let text = Value::Array(objects.to_vec()).to_string();
    let read = document::read(&text, true).unwrap();
    let mut strings = Interner::default();
    let parsed = read.parsed.into_iter().map(|p| p.strip(&mut strings));
    let parsed: Vec<_> = parsed.collect();
    let now = "2026-01-01T00:00:00Z".parse().unwrap();
    agent.state.index_mut().load(parsed, now);
}

/// A drop of web's connection to pg-0, counted and published.
fn drop_one(agent: &Agent) {
    let mut event = Event {
        packets: 3,
        drop: Some(DropSite {
            reason: Some("NETFILTER_DROP".into()),
            ..DropSite::default()
        }),
        ..event()
    };
    let ends = [
        (&mut event.source, "shop", "web", "10.244.1.7"),
        (&mut event.destination, "db", "pg-0", "10.244.2.9"),
    ];
    for (end, namespace, pod, ip) in ends {
        end.namespace = Some(namespace.into());
        end.pod = Some(pod.into());
        end.ip = ip.parse().ok();
        end.service = None;
    }
    event.destination.port = Some(5432);
    lock(&agent.state.record).add(&event, "NETFILTER_DROP".into(), std::time::Instant::now());
    agent.state.stream.publish(Arc::new(Line::Event(event)));
}

#[test]
fn an_agent_explains_by_its_objects_and_tells_what_it_saw() {
    let agent = Agent::start();
    load(&agent, &objects());
    drop_one(&agent);
    let (status, body) = agent.get("/v1/explain?src=shop/web&dst=db/pg-0&port=5432");
    assert_eq!(status, 200, "{body}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(answer["allowed"], false);
    assert_eq!(answer["findings"][0]["code"], "namespace-label-missing");
    assert_eq!(answer["objects"]["node"], "node-a");
    let observed = &answer["observed"];
    assert_eq!(
        observed["dropped"]["reasons"]["NETFILTER_DROP"], 3,
        "{observed}"
    );
    assert_eq!(observed["events"].as_array().unwrap().len(), 1);
    assert_eq!(observed["connections"], Value::Null);

    let socket = agent.socket();
    let socket = socket.to_str().unwrap();
    let asked = [
        "explain", "shop/web", "db/pg-0", "--port", "5432", "--socket", socket,
    ];
    let (code, text, _) = run(&asked);
    assert_eq!(code, Some(1));
    for part in [
        "shop/web → db/pg-0  TCP 5432: DENIED",
        "silent: 3 packets dropped (NETFILTER_DROP 3)",
        "from the agent on node node-a, as of ",
        "kubectl label namespace shop team=shop",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let mut as_json = asked.to_vec();
    as_json.extend(["-o", "json"]);
    let (code, text, _) = run(&as_json);
    let same: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &same["ingress"]), (Some(1), &answer["ingress"]));
    // A change of the objects counts within a second or so.
    let changed = {
        let mut objects = objects();
        objects[0]["metadata"]["labels"] = json!({"team": "shop"});
        objects
    };
    load(&agent, &changed);
    support::until("the changed label counts", || run(&asked).0 == Some(0));
}

#[test]
fn many_questions_are_asked_of_an_agent() {
    let agent = Agent::start();
    load(&agent, &objects());
    let flows = agent.dir.path().join("flows");
    let lines = "{\"src\":\"shop/web\",\"dst\":\"db/pg-0\",\"port\":5432,\"expect\":\"deny\"}\n{\n\
                 {\"src\":\"shop/none\",\"dst\":\"db/pg-0\"}\n\
                 {\"src\":\"db/pg-0\",\"dst\":\"shop/web\",\"port\":80,\"expect\":\"allow\"}\n";
    std::fs::write(&flows, lines).unwrap();
    let socket = agent.socket();
    let flags = [
        "explain",
        "-o",
        "json",
        "--socket",
        socket.to_str().unwrap(),
        "--flows",
    ];
    let (code, text, told) = told(whydrop(&flags).arg(&flows).output().unwrap());
    let lines: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!((code, lines.len()), (Some(2), 4), "{text}{told}");
    assert_eq!(
        (&lines[0]["met"], &lines[3]["met"]),
        (&json!(true), &json!(true))
    );
    let error = lines[2]["error"].as_str().unwrap();
    assert!(error.contains("no pod shop/none"), "{error}");
    assert!(told.contains("answers of the agent"), "{told}");
}

#[test]
fn what_an_agent_cannot_answer_is_one_sentence() {
    let agent = Agent::start();
    let ask = |query: &str| {
        let (status, body) = agent.get(&format!("/v1/explain?{query}"));
        let body: Value = serde_json::from_str(&body).unwrap();
        (status, body["error"].as_str().unwrap_or("").to_owned())
    };
    let (status, error) = ask("src=shop/web&dst=db/pg-0");
    assert_eq!(status, 503);
    assert!(error.contains("knows no objects yet"), "{error}");
    load(&agent, &objects());
    for (query, part) in [
        ("src=shop/web", "dst is missing"),
        ("src=shop/web&dst=db/pg-0&port=x", "port \"x\""),
        ("src=shop/web&dst=db/pg-0&protocol=QUIC", "unknown protocol"),
        ("src=shop/web&dst=db/none", "no pod db/none"),
        ("src=shop/web&dst=db", "expected namespace/pod"),
        ("src=shop/web&dst=db/pg-0&fix=1", "no parameter \"fix\""),
    ] {
        let (status, error) = ask(query);
        assert_eq!(status, 400, "{query}: {error}");
        assert!(error.contains(part), "{query}: {error}");
    }
    let (status, _) = agent.get("/v1/connections?x=1");
    assert_eq!(status, 400);
}

#[test]
fn a_kind_that_was_never_listed_makes_the_answer_open_and_not_wrong() {
    let asked = |agent: &Agent| {
        let (status, body) = agent.get("/v1/explain?src=shop/web&dst=db/pg-0");
        (status, serde_json::from_str::<Value>(&body).unwrap())
    };
    let source = |agent: &Agent, source, why: Option<&str>| {
        agent.state.set_source(SourceStatus {
            source,
            up: why.is_none(),
            hook: None,
            why: why.map(str::to_owned),
            lost: None,
        });
    };
    let agent = Agent::start();
    load(&agent, &objects());
    source(&agent, "cluster", None);
    let (status, answer) = asked(&agent);
    let error = answer["error"].as_str().unwrap();
    assert_eq!(status, 503);
    assert!(error.contains("pods are not listed yet"), "{error}");
    let listed = [
        "cluster-pods",
        "cluster-nodes",
        "cluster-services",
        "cluster-namespaces",
    ];
    for kind in listed {
        source(&agent, kind, None);
    }
    // Some of them are there, but not all.
    let (_, answer) = asked(&agent);
    assert_eq!(answer["allowed"], Value::Null, "{answer:#}");
    assert_eq!(answer["ingress"]["verdict"], "undefined");
    assert_eq!(answer["findings"], json!([]));
    let missing = answer["missing"].to_string();
    assert!(
        missing.contains("networkpolicies are not listed yet"),
        "{missing}"
    );
    source(&agent, "cluster-networkpolicies", None);
    assert_eq!(asked(&agent).1["allowed"], false);
    // An outage leaves them as they were.
    let refused = Some("not allowed to list networkpolicies");
    source(&agent, "cluster-networkpolicies", refused);
    assert_eq!(asked(&agent).1["allowed"], false);
    // But of what was refused from the start nothing is known.
    let agent = Agent::start();
    load(&agent, &objects()[..4]);
    for kind in listed.into_iter().chain(["cluster"]) {
        source(&agent, kind, None);
    }
    source(&agent, "cluster-networkpolicies", refused);
    let (_, answer) = asked(&agent);
    assert_eq!(answer["allowed"], Value::Null, "{answer:#}");
    assert!(
        answer["missing"]
            .to_string()
            .contains("not allowed to list")
    );
}

#[test]
fn connections_are_told_with_what_was_looked_at() {
    let agent = Agent::start();
    load(&agent, &objects());
    drop_one(&agent);
    let socket = agent.socket();
    let socket = socket.to_str().unwrap();
    let (code, text, _) = run(&["connections", "--socket", socket]);
    assert_eq!(code, Some(0));
    let lines: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    // The counters' pair, and that conntrack was not asked.
    assert_eq!(lines.len(), 2, "{text}");
    assert_eq!(
        (
            &lines[0]["seen"],
            &lines[0]["source"]["pod"],
            &lines[0]["destination"]["port"]
        ),
        (&json!("dropped"), &json!("web"), &json!(5432))
    );
    let conntrack = lines[1]["conntrack"].as_str().unwrap();
    assert!(conntrack.contains("--conntrack off"), "{conntrack}");

    // Policies deny that pair now: nothing is taken away from it.
    let deny = agent.dir.path().join("deny.yaml");
    let policy = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, \
                  metadata: {name: deny, namespace: db}, spec: {podSelector: {}}}";
    std::fs::write(&deny, policy).unwrap();
    let objects_file = agent.dir.path().join("objects.json");
    let with = |objects: &[Value]| {
        std::fs::write(&objects_file, Value::Array(objects.to_vec()).to_string()).unwrap();
        let deny = deny.to_str().unwrap();
        let objects = objects_file.to_str().unwrap();
        run(&[
            "explain",
            "--with",
            deny,
            "--objects",
            objects,
            "--socket",
            socket,
        ])
    };
    let (code, text, _) = with(&objects());
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("conntrack: not looked at"), "{text}");
    // Without the policy that denies it, the proposed one would.
    let (code, text, _) = with(&objects()[..4]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("3 packets or attempts that failed"), "{text}");
    assert!(text.contains("would be denied by db/deny"), "{text}");
}
