//! The agent's memory with 150,000 pods, 20,000 Services and 5,000 nodes, from a server that makes them
//! up as they are asked for.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream::{self, StreamExt as _};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use whydrop_tests::agent::Agent;
use whydrop_tests::bench::kernel;
use whydrop_tests::bench::report::{Must, Report};

use super::objects;

const PODS: usize = 150_000;
/// What is listed: path's end, how many, and each.
type Kind = (&'static str, usize, fn(usize) -> Value);
const KINDS: [Kind; 6] = [
    ("pods", PODS, objects::pod),
    ("services", 20_000, objects::service),
    ("endpointslices", 20_000, objects::endpoints),
    ("nodes", PODS / objects::PODS_A_NODE, objects::node),
    ("namespaces", 200, objects::namespace),
    ("networkpolicies", 500, objects::policy),
];
/// Until all are known; some 600 MB of JSON are made and read.
const DEADLINE: Duration = Duration::from_secs(300);

/// Memory of an agent that watches all, and of one that watches its node.
///
/// # Errors
/// The agent does not start, or does not get to know all.
pub async fn measure(report: &mut Report) -> Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let server = tokio::spawn(serve(listener));
    let folder = tempfile::tempdir()?;
    let kubeconfig = folder.path().join("kubeconfig");
    std::fs::write(&kubeconfig, kubeconfig_of(address).to_string())?;
    let of_node = objects::PODS_A_NODE;
    for (watch, pods, endpoints, must) in [
        ("cluster", PODS, 20_000, 150.0),
        ("node", of_node, 0, 40.0),
        ("auto", of_node, 0, 40.0),
    ] {
        let counts = [
            ("pods", pods),
            ("services", 20_000),
            ("endpointslices", endpoints),
        ];
        let kubeconfig = kubeconfig.clone();
        // It reads its answers on a thread that must not be one of the server's.
        let measured = tokio::task::spawn_blocking(move || run(&kubeconfig, watch, &counts));
        let (seconds, rss, peak) = measured.await??;
        let name = |what: &str| format!("150,000 pods, --watch {watch}: {what}");
        report.figure(name("RSS"), rss, "MiB", Must::AtMost(must));
        report.figure(name("RSS at most"), peak, "MiB", Must::Shown);
        report.figure(name("until all are known"), seconds, "s", Must::Shown);
    }
    server.abort();
    Ok(())
}

fn run(kubeconfig: &Path, watch: &str, counts: &[(&str, usize)]) -> Result<(f64, f64, f64)> {
    let started = Instant::now();
    let agent = Agent::start_with_cluster("node-7", kubeconfig, &["--watch", watch])?;
    wait_known(&agent, counts)?;
    let seconds = started.elapsed().as_secs_f64();
    // What the lists took is given back a moment after them.
    std::thread::sleep(Duration::from_secs(3));
    let mib = |field| {
        Ok::<_, anyhow::Error>(kernel::status_bytes(agent.pid(), field)? as f64 / 1048576.0)
    };
    let (rss, peak) = (mib("VmRSS")?, mib("VmHWM")?);
    agent.stop()?;
    Ok((seconds, rss, peak))
}

/// Waits until the agent knows so many objects of each kind.
///
/// # Errors
/// It does not in time; shows its log.
pub fn wait_known(agent: &Agent, counts: &[(&str, usize)]) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let metrics = agent.metrics()?;
        let is_known = |(kind, count): &(&str, usize)| {
            metrics.iter().any(|sample| {
                sample.name == "whydrop_index_objects"
                    && sample.label("kind") == *kind
                    && sample.value == *count as f64
            })
        };
        if counts.iter().all(is_known) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{counts:?} are not known: {}",
            agent.log()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn kubeconfig_of(address: SocketAddr) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    })
}

async fn serve(listener: tokio::net::TcpListener) {
    let app = Router::new().fallback(answer);
    while let Ok((stream, _)) = listener.accept().await {
        let service = TowerToHyperService::new(app.clone());
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        tokio::spawn(async move { drop(connection.await) });
    }
}

async fn answer(request: Request<Body>) -> Response {
    let path = request.uri().path();
    if path == "/version" {
        return version().to_string().into_response();
    }
    let query = request.uri().query().unwrap_or_default();
    let query: Vec<(String, String)> = form_urlencoded::parse(query.as_bytes())
        .into_owned()
        .collect();
    let value = |name: &str| {
        let pair = query.iter().find(|(known, _)| known == name);
        pair.map(|(_, value)| value.as_str())
    };
    let Some((_, count, make)) = KINDS.iter().find(|(plural, ..)| path.ends_with(plural)) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let range = match value("fieldSelector").and_then(|s| s.strip_prefix("spec.nodeName=node-")) {
        Some(node) => {
            let first = node.parse::<usize>().unwrap_or(0) * objects::PODS_A_NODE;
            first..first + objects::PODS_A_NODE
        }
        None => 0..*count,
    };
    if value("watch") == Some("true") {
        if value("sendInitialEvents") == Some("true") {
            return streamed(range, *make).into_response();
        }
        return Body::from_stream(stream::pending::<std::io::Result<Bytes>>()).into_response();
    }
    let from = value("continue").map_or(range.start, |from| from.parse().unwrap_or(0));
    let limit = value("limit").map_or(usize::MAX, |limit| limit.parse().unwrap_or(1));
    let to = range.end.min(from.saturating_add(limit));
    let mut metadata = json!({"resourceVersion": "5"});
    if to < range.end {
        metadata["continue"] = to.to_string().into();
        metadata["remainingItemCount"] = (range.end - to).into();
    }
    let items: Vec<Value> = (from..to).map(make).collect();
    json!({"apiVersion": "v1", "kind": "List", "metadata": metadata, "items": items})
        .to_string()
        .into_response()
}

/// A watch that begins with all objects.
fn streamed(range: std::ops::Range<usize>, make: fn(usize) -> Value) -> Body {
    let objects = range.map(move |n| json!({"type": "ADDED", "object": make(n)}));
    let end = json!({"type": "BOOKMARK", "object": {"apiVersion": "v1", "kind": "Pod",
        "metadata": {"resourceVersion": "5", "annotations": {"k8s.io/initial-events-end": "true"}}}});
    let lines = stream::iter(objects.chain([end]))
        .map(|event| Ok::<_, std::io::Error>(Bytes::from(format!("{event}\n"))));
    Body::from_stream(lines.chain(stream::pending()))
}

fn version() -> Value {
    json!({"major": "1", "minor": "34", "gitVersion": "v1.34.4", "gitCommit": "", "gitTreeState": "",
        "buildDate": "", "goVersion": "", "compiler": "", "platform": "", "emulationMajor": "",
        "emulationMinor": "", "minCompatibilityMajor": "", "minCompatibilityMinor": ""})
}
