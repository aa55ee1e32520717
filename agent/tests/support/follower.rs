//! The cluster side of an agent against a scripted API server.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::State as Extract;
use axum::http::Request;
use axum::response::{IntoResponse as _, Response};
use axum::{Json, Router};
use futures_util::stream::{self, StreamExt as _};
use jiff::Timestamp;
use kube::Config;
use serde_json::{Value, json};
use whydrop::cluster::ObjectKind;
use whydrop::cluster::index::Holder;
use whydrop::cluster::watch::{self, Reach, Times};
use whydrop::record::{Detail, Record};
use whydrop::senders::Senders;
use whydrop::state::State;

use super::DEADLINE;
use super::api::{accept, error};

/// What the server does with one request.
#[derive(Clone)]
pub enum Reply {
    /// An error of the API.
    Error(u16),
    /// A body.
    Text(Value),
    /// Lines of a watch, which then stays open, or ends.
    Lines(Vec<String>, bool),
    /// The other one, later.
    Late(Duration, Box<Reply>),
}

pub use Reply::{Error, Late, Lines, Text};

/// The server: what it does with the next requests of a kind, `list` or `watch`. Without more in the
/// script a list is empty, and a watch stays open without a word.
#[derive(Default)]
pub struct Script {
    pub replies: Mutex<HashMap<(String, &'static str), VecDeque<Reply>>>,
    pub requests: Mutex<Vec<(String, &'static str, String)>>,
    pub minor: &'static str,
    /// Only with this token, if one is set.
    pub token: Mutex<Option<&'static str>>,
}

impl Script {
    pub fn then(&self, plural: &str, verb: &'static str, replies: impl IntoIterator<Item = Reply>) {
        let mut all = self.replies.lock().unwrap();
        let queue = all.entry((plural.to_owned(), verb)).or_default();
        queue.extend(replies);
    }

    /// The queries of all requests of a kind so far.
    pub fn asked(&self, plural: &str, verb: &str) -> Vec<String> {
        let requests = self.requests.lock().unwrap();
        let of = requests
            .iter()
            .filter(|(p, v, _)| p == plural && *v == verb);
        of.map(|(.., query)| query.clone()).collect()
    }
}

async fn serve(script: Extract<Arc<Script>>, request: Request<Body>) -> Response {
    let path = request.uri().path();
    if path == "/version" {
        let minor = script.minor;
        return Json(
            json!({"major": "1", "minor": minor, "gitVersion": format!("v1.{minor}.0"),
            "gitCommit": "", "gitTreeState": "", "buildDate": "", "goVersion": "", "compiler": "",
            "platform": "", "emulationMajor": "", "emulationMinor": "",
            "minCompatibilityMajor": "", "minCompatibilityMinor": ""}),
        )
        .into_response();
    }
    let token = *script.token.lock().unwrap();
    let given = request.headers().get("authorization").cloned();
    if let Some(token) = token
        && given.is_none_or(|given| given != format!("Bearer {token}"))
    {
        return error(401);
    }
    let plural = path.rsplit('/').next().unwrap().to_owned();
    let query = request.uri().query().unwrap_or("").to_owned();
    let verb = match query.contains("watch=true") {
        true => "watch",
        false => "list",
    };
    let request = (plural.clone(), verb, query);
    script.requests.lock().unwrap().push(request);
    let next = {
        let mut all = script.replies.lock().unwrap();
        all.get_mut(&(plural, verb)).and_then(VecDeque::pop_front)
    };
    answer(next.unwrap_or(match verb {
        "watch" => Lines(Vec::new(), true),
        _ => list(&[], "1", None),
    }))
    .await
}

async fn answer(reply: Reply) -> Response {
    match reply {
        Error(code) => error(code),
        Text(value) => Json(value).into_response(),
        Lines(lines, stays) => {
            let lines = stream::iter(lines).map(|l| Ok::<_, std::io::Error>(Bytes::from(l + "\n")));
            match stays {
                true => Body::from_stream(lines.chain(stream::pending())).into_response(),
                false => Body::from_stream(lines).into_response(),
            }
        }
        Late(by, reply) => {
            tokio::time::sleep(by).await;
            Box::pin(answer(*reply)).await
        }
    }
}

pub fn list(items: &[Value], version: &str, more: Option<&str>) -> Reply {
    // As the API server does, without the kind of each item.
    let items = items.iter().cloned().map(|mut item| {
        item.as_object_mut()
            .unwrap()
            .retain(|key, _| key != "kind" && key != "apiVersion");
        item
    });
    Text(
        json!({"kind": "List", "apiVersion": "v1", "items": items.collect::<Vec<_>>(),
        "metadata": {"resourceVersion": version, "continue": more.unwrap_or("")}}),
    )
}

pub fn pod(name: &str, ip: &str, version: u32) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-{name}-{ip}"),
            "resourceVersion": version.to_string()},
        "spec": {"nodeName": "node-a"},
        "status": {"podIP": ip, "phase": "Running"}})
}

pub fn event(kind: &str, object: &Value) -> String {
    json!({"type": kind, "object": object}).to_string()
}

pub fn bookmark(version: &str, ends_list: bool) -> String {
    let annotations = match ends_list {
        true => json!({"k8s.io/initial-events-end": "true"}),
        false => json!({}),
    };
    json!({"type": "BOOKMARK", "object": {"kind": "Pod", "apiVersion": "v1",
        "metadata": {"resourceVersion": version, "annotations": annotations}}})
    .to_string()
}

pub fn gone() -> String {
    json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": 410, "message": "too old resource version", "reason": "Expired"}})
    .to_string()
}

/// An agent's cluster side, following a scripted server.
pub struct Follower {
    pub script: Arc<Script>,
    pub state: Arc<State>,
    /// How often the configuration was asked for.
    pub configured: Arc<AtomicUsize>,
    pub tasks: [tokio::task::JoinHandle<()>; 2],
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl Follower {
    pub async fn start(minor: &'static str, script: impl FnOnce(&Script)) -> Self {
        Self::with(minor, Duration::from_secs(200), &["t"], script).await
    }

    /// As `--watch` says which pods, with a server that lists in pages.
    pub async fn reaching(reach: Reach, script: impl FnOnce(&Script)) -> Self {
        Self::by("31", Duration::from_secs(200), &["t"], reach, script).await
    }

    /// `tokens` are those of each reading of the configuration.
    pub async fn with(
        minor: &'static str,
        watch: Duration,
        tokens: &'static [&'static str],
        script: impl FnOnce(&Script),
    ) -> Self {
        Self::by(minor, watch, tokens, Reach::Cluster, script).await
    }

    async fn by(
        minor: &'static str,
        watch: Duration,
        tokens: &'static [&'static str],
        reach: Reach,
        script: impl FnOnce(&Script),
    ) -> Self {
        let all = Arc::new(Script {
            minor,
            ..Script::default()
        });
        script(&all);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let app = Router::new().fallback(serve).with_state(all.clone());
        let record = Record::new(Detail::Pod, 100, DEADLINE);
        let senders = Senders::new(Detail::Pod, 100, DEADLINE);
        let state = Arc::new(State::new("node-a".into(), record, senders));
        let configured = Arc::new(AtomicUsize::new(0));
        let count = configured.clone();
        let configuration = move || {
            let at = count.fetch_add(1, Ordering::Relaxed);
            let token = tokens
                .get(at)
                .or(tokens.last())
                .copied()
                .unwrap_or_default();
            let mut config = Config::new(format!("http://{address}").parse().unwrap());
            config.auth_info.token = Some(token.to_owned().into());
            async move { Ok(config) }
        };
        let times = Times {
            watch,
            discovery: Duration::from_secs(300),
            start_jitter: Duration::from_millis(1),
        };
        let run = watch::run(
            state.clone(),
            times,
            reach,
            configuration,
            std::future::pending(),
        );
        Self {
            script: all,
            state,
            configured,
            tasks: [tokio::spawn(accept(listener, app)), tokio::spawn(run)],
        }
    }

    /// Waits until something is so.
    pub async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(self) {
            let status = self.state.status();
            assert!(Instant::now() < deadline, "not so: {what}; {status:#}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn count(&self, kind: &str) -> usize {
        let index = self.state.index();
        let mut counts = index.counts();
        counts.find(|(plural, _)| *plural == kind).unwrap().1
    }

    pub fn holder(&self, ip: &str, at: Timestamp) -> Option<String> {
        let index = self.state.index();
        match index.holder(ip.parse().unwrap(), at)? {
            Holder::Pod(pod) => Some(pod.key.name.to_string()),
            _ => None,
        }
    }

    pub fn now(&self, ip: &str) -> Option<String> {
        self.holder(ip, Timestamp::now())
    }

    pub fn errors(&self, kind: ObjectKind) -> u64 {
        self.state.errors.watch[kind as usize].load(Ordering::Relaxed)
    }

    /// Whether a source works, and why not.
    pub fn source(&self, name: &str) -> Option<(bool, String)> {
        let status = self.state.status();
        let mut sources = status["sources"].as_array().unwrap().iter();
        let source = sources.find(|s| s["source"] == name)?;
        let why = source["why"].as_str().unwrap_or("").to_owned();
        Some((source["up"] == true, why))
    }

    pub fn works(&self, name: &str) -> bool {
        self.source(name).is_some_and(|(up, _)| up)
    }
}
