//! `whydrop explain` and `whydrop connections` as people run them: against an agent's socket, and against a
//! scripted API server.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use axum::Router;
use axum::extract::State as Extract;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};
use whydrop::cluster::document;
use whydrop::cluster::objects::Interner;
use whydrop::event::{DropSite, Event, Line};
use whydrop::source::load::SourceStatus;
use whydrop::sync::lock;

use crate::support::{Agent, api, event};

mod support;

/// Two pods of two namespaces, of which one is isolated.
fn objects() -> Vec<Value> {
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

fn load(agent: &Agent, objects: &[Value]) {
    let text = Value::Array(objects.to_vec()).to_string();
    let read = document::read(&text, true).unwrap();
    let mut strings = Interner::default();
    let parsed = read.parsed.into_iter().map(|p| p.strip(&mut strings));
    let parsed: Vec<_> = parsed.collect();
    let now = "2026-01-01T00:00:00Z".parse().unwrap();
    agent.state.index_mut().load(parsed, now);
}

/// The program without this machine's configuration.
fn whydrop(arguments: &[&str]) -> Command {
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

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    told(whydrop(arguments).output().unwrap())
}

fn told(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
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
    // Nothing was changed on the way.
    let changed = {
        let mut objects = objects();
        objects[0]["metadata"]["labels"] = json!({"team": "shop"});
        objects
    };
    load(&agent, &changed);
    let begin = std::time::Instant::now();
    support::until("the changed label counts", || {
        run(&asked).0 == Some(0) || begin.elapsed() > support::DEADLINE
    });
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
    // A kind that the API server refuses makes the answer open, not wrong.
    let source = |source, why: Option<&str>| {
        agent.state.set_source(SourceStatus {
            source,
            up: why.is_none(),
            hook: None,
            why: why.map(str::to_owned),
            lost: None,
        });
    };
    for kind in [
        "cluster",
        "cluster-pods",
        "cluster-nodes",
        "cluster-services",
    ] {
        source(kind, None);
    }
    source("cluster-namespaces", None);
    source(
        "cluster-networkpolicies",
        Some("not allowed to list networkpolicies"),
    );
    let asked = "/v1/explain?src=shop/web&dst=db/pg-0";
    let (_, body) = agent.get(asked);
    let known: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        known["allowed"], false,
        "what was listed once is known: {body}"
    );
    let agent = {
        drop(agent);
        let agent = Agent::start();
        load(&agent, &objects()[..4]);
        agent
    };
    let status = |source, why: Option<&str>| SourceStatus {
        source,
        up: why.is_none(),
        hook: None,
        why: why.map(str::to_owned),
        lost: None,
    };
    agent.state.set_source(status("cluster", None));
    let (_, body) = agent.get(asked);
    let open: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(open["allowed"], Value::Null, "{body}");
    assert_eq!(open["ingress"]["verdict"], "undefined");
    let missing = open["missing"].to_string();
    assert!(
        missing.contains("networkpolicies are not listed yet"),
        "{missing}"
    );
    assert_eq!(open["findings"], json!([]));
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
    assert!(conntrack.contains("switched off"), "{conntrack}");

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
    assert!(text.contains("conntrack: switched off"), "{text}");
    // Without the policy that denies it, the proposed one would.
    let (code, text, _) = with(&objects()[..4]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("3 packets or attempts that failed"), "{text}");
    assert!(text.contains("would be denied by db/deny"), "{text}");
}

/// An API server that answers lists by plural: a status, and pages.
type Lists = HashMap<&'static str, (u16, Vec<Value>)>;

async fn serve(Extract(lists): Extract<Arc<Lists>>, uri: Uri) -> Response {
    let (path, query) = (uri.path(), uri.query().unwrap_or(""));
    if path == "/apis/policy.networking.k8s.io/v1alpha2" {
        return axum::Json(json!({"resources": [{"name": "clusternetworkpolicies"}]}))
            .into_response();
    }
    let plural = path.rsplit('/').next().unwrap_or("");
    let Some((status, items)) = lists.get(plural) else {
        let is_list = query.contains("limit=");
        return match is_list {
            true => page(&[], None),
            false => api::error(404),
        };
    };
    if *status != 200 {
        return api::error(*status);
    }
    // One object a page.
    let at = query.split("continue=").nth(1);
    let at: usize = at.map_or(0, |at| at.parse().unwrap());
    if at == 0 && !query.contains("resourceVersion=0") {
        return (StatusCode::BAD_REQUEST, "not from the cache").into_response();
    }
    let next = (at + 1 < items.len()).then(|| (at + 1).to_string());
    page(&items[at..(at + 1).min(items.len())], next.as_deref())
}

fn page(items: &[Value], next: Option<&str>) -> Response {
    let (kind, version) = match items.first() {
        Some(item) => (
            format!("{}List", item["kind"].as_str().unwrap()),
            item["apiVersion"].clone(),
        ),
        None => ("List".to_owned(), json!("v1")),
    };
    let items = items.iter().cloned().map(|mut item| {
        let fields = item.as_object_mut().unwrap();
        fields.retain(|key, _| key != "kind" && key != "apiVersion");
        item
    });
    // The API server writes the kind first.
    let items = Value::Array(items.collect()).to_string();
    let next = next.unwrap_or("");
    let text = format!(
        "{{\"kind\":\"{kind}\",\"apiVersion\":{version},\
         \"metadata\":{{\"resourceVersion\":\"7\",\"continue\":\"{next}\"}},\"items\":{items}}}"
    );
    ([("content-type", "application/json")], text).into_response()
}

/// A scripted API server, and a kubeconfig that leads to it.
struct Server {
    _runtime: tokio::runtime::Runtime,
    folder: tempfile::TempDir,
}

impl Server {
    fn start(change: impl FnOnce(&mut Lists)) -> Self {
        let mut lists = Lists::new();
        for object in objects() {
            let plural = match object["kind"].as_str().unwrap() {
                "Namespace" => "namespaces",
                "Pod" => "pods",
                _ => "networkpolicies",
            };
            let list = lists.entry(plural).or_insert((200, Vec::new()));
            list.1.push(object);
        }
        change(&mut lists);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().fallback(serve).with_state(Arc::new(lists));
        runtime.spawn(api::accept(listener, app));
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "apiVersion: v1
kind: Config
current-context: c
clusters: [{{name: c, cluster: {{server: 'http://{address}'}}}}]
users: [{{name: u, user: {{token: t}}}}]
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
"
        );
        std::fs::write(folder.path().join("config"), config).unwrap();
        Self {
            _runtime: runtime,
            folder,
        }
    }

    fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let config = self.folder.path().join("config");
        told(
            whydrop(arguments)
                .env("KUBECONFIG", config)
                .output()
                .unwrap(),
        )
    }
}

const ASKED: [&str; 7] = [
    "explain", "shop/web", "db/pg-0", "--port", "5432", "--from", "cluster",
];

#[test]
fn the_api_server_is_asked_where_no_agent_is() {
    let server = Server::start(|_| {});
    let (code, text, told) = server.run(&ASKED);
    assert_eq!(code, Some(1), "{text}{told}");
    for part in [
        "shop/web → db/pg-0  TCP 5432: DENIED",
        "not observed: no agent was asked",
        "from the API server at http://127.0.0.1:",
        "namespace-label-missing",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let flows = server.folder.path().join("flows");
    let line = "{\"src\":\"db/pg-0\",\"dst\":\"shop/web\",\"port\":80,\"expect\":\"allow\"}\n";
    std::fs::write(&flows, line).unwrap();
    let flows = flows.to_str().unwrap();
    let (code, _, told) = server.run(&["explain", "--from", "cluster", "--flows", flows]);
    assert_eq!(code, Some(0));
    assert!(
        told.contains("pods and policies from the API server"),
        "{told}"
    );
}

#[test]
fn what_may_not_be_listed_is_said_and_what_hangs_on_it_is_open() {
    let refused =
        |plural: &'static str| Server::start(|lists| _ = lists.insert(plural, (403, vec![])));
    for (plural, resource) in [
        ("networkpolicies", "networkpolicies.networking.k8s.io"),
        ("namespaces", "namespaces"),
        (
            "clusternetworkpolicies",
            "clusternetworkpolicies.policy.networking.k8s.io",
        ),
    ] {
        let (code, text, told) = refused(plural).run(&ASKED);
        assert_eq!(code, Some(1), "{text}{told}");
        assert!(text.contains("UNDEFINED: objects are missing"), "{text}");
        let right = format!("list {resource} (verb list, resource {resource})");
        assert!(text.contains(&right), "no {right:?} in\n{text}");
    }
    // Pods that talk to pods need neither nodes nor Services.
    for plural in ["nodes", "services", "endpointslices"] {
        let (code, text, _) = refused(plural).run(&ASKED);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("DENIED") && text.contains(plural), "{text}");
    }
    let (code, text, told) = refused("pods").run(&ASKED);
    assert_eq!((code, text.as_str()), (Some(2), ""));
    assert!(told.contains("without pods nothing can be told"), "{told}");
    let broken = Server::start(|lists| _ = lists.insert("pods", (500, vec![])));
    let (code, _, told) = broken.run(&ASKED);
    assert_eq!(code, Some(2));
    assert!(
        told.contains("cannot list pods: the API server answers 500"),
        "{told}"
    );
}

#[test]
fn without_anyone_to_ask_it_says_what_to_do() {
    let nowhere = [
        "explain",
        "shop/web",
        "db/pg-0",
        "--socket",
        "/nonexistent/agent.sock",
    ];
    let (code, _, told) = run(&nowhere);
    assert_eq!(code, Some(2));
    assert!(
        told.contains("no whydrop agent answers on /nonexistent"),
        "{told}"
    );
    let (code, _, told) = run(&ASKED);
    assert_eq!(code, Some(2));
    assert!(told.contains("no configuration of a cluster"), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
}

#[test]
fn proposed_policies_come_from_standard_input_and_objects_from_the_cluster() {
    let server = Server::start(|_| {});
    let connections = server.folder.path().join("connections");
    let line = "{\"source\":{\"ip\":\"10.244.2.9\"},\"destination\":{\"ip\":\"10.244.1.7\",\"port\":80}}\n";
    std::fs::write(&connections, line).unwrap();
    let run = |policy: &str, connections: &Path| {
        let mut command = whydrop(&["explain", "--with", "-", "--connections"]);
        command.arg(connections);
        command.env("KUBECONFIG", server.folder.path().join("config"));
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(policy.as_bytes())
            .unwrap();
        told(child.wait_with_output().unwrap())
    };
    let deny = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, \
                metadata: {name: deny, namespace: shop}, spec: {podSelector: {}}}";
    let (code, text, told) = run(deny, &connections);
    assert_eq!(code, Some(1), "{text}{told}");
    assert!(
        text.contains("db/pg-0 (Pod) → shop/web (Pod)  TCP 80: 1 connection of 1 pair of pods"),
        "{text}"
    );
    let (code, _, told) = run("a: [", &connections);
    assert_eq!(code, Some(2));
    assert!(told.contains("standard input: it is no YAML"), "{told}");
}
