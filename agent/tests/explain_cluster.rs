//! `whydrop explain` against a scripted API server.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use axum::Router;
use axum::extract::State as Extract;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use crate::support::api;
use crate::support::command::{objects, run, told, whydrop};

mod support;

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
