//! `--cluster` against a scripted API server: each fault that a server, a proxy or a network makes.

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

use crate::support::api::{accept, error};

mod support;

/// Nothing here takes this long, on any machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// What the server does with one request.
#[derive(Clone)]
enum Reply {
    /// An error of the API.
    Error(u16),
    /// A body.
    Text(Value),
    /// Lines of a watch, which then stays open, or ends.
    Lines(Vec<String>, bool),
    /// The other one, later.
    Late(Duration, Box<Reply>),
}

use Reply::{Error, Late, Lines, Text};

/// The server: what it does with the next requests of a kind, `list` or `watch`. Without more in the
/// script a list is empty, and a watch stays open without a word.
#[derive(Default)]
struct Script {
    replies: Mutex<HashMap<(String, &'static str), VecDeque<Reply>>>,
    requests: Mutex<Vec<(String, &'static str, String)>>,
    minor: &'static str,
    /// Only with this token, if one is set.
    token: Mutex<Option<&'static str>>,
}

impl Script {
    fn then(&self, plural: &str, verb: &'static str, replies: impl IntoIterator<Item = Reply>) {
        let mut all = self.replies.lock().unwrap();
        let queue = all.entry((plural.to_owned(), verb)).or_default();
        queue.extend(replies);
    }

    /// The queries of all requests of a kind so far.
    fn asked(&self, plural: &str, verb: &str) -> Vec<String> {
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

fn list(items: &[Value], version: &str, more: Option<&str>) -> Reply {
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

fn pod(name: &str, ip: &str, version: u32) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-{name}-{ip}"),
            "resourceVersion": version.to_string()},
        "spec": {"nodeName": "node-a"},
        "status": {"podIP": ip, "phase": "Running"}})
}

fn event(kind: &str, object: &Value) -> String {
    json!({"type": kind, "object": object}).to_string()
}

fn bookmark(version: &str, ends_list: bool) -> String {
    let annotations = match ends_list {
        true => json!({"k8s.io/initial-events-end": "true"}),
        false => json!({}),
    };
    json!({"type": "BOOKMARK", "object": {"kind": "Pod", "apiVersion": "v1",
        "metadata": {"resourceVersion": version, "annotations": annotations}}})
    .to_string()
}

fn gone() -> String {
    json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": 410, "message": "too old resource version", "reason": "Expired"}})
    .to_string()
}

/// An agent's cluster side, following a scripted server.
struct Follower {
    script: Arc<Script>,
    state: Arc<State>,
    /// How often the configuration was asked for.
    configured: Arc<AtomicUsize>,
    tasks: [tokio::task::JoinHandle<()>; 2],
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl Follower {
    async fn start(minor: &'static str, script: impl FnOnce(&Script)) -> Self {
        Self::with(minor, Duration::from_secs(200), &["t"], script).await
    }

    /// `tokens` are those of each reading of the configuration.
    async fn with(
        minor: &'static str,
        watch: Duration,
        tokens: &'static [&'static str],
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
            Reach::Cluster,
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
    async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(self) {
            let status = self.state.status();
            assert!(Instant::now() < deadline, "not so: {what}; {status:#}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn count(&self, kind: &str) -> usize {
        let index = self.state.index();
        let mut counts = index.counts();
        counts.find(|(plural, _)| *plural == kind).unwrap().1
    }

    fn holder(&self, ip: &str, at: Timestamp) -> Option<String> {
        let index = self.state.index();
        match index.holder(ip.parse().unwrap(), at)? {
            Holder::Pod(pod) => Some(pod.key.name.to_string()),
            _ => None,
        }
    }

    fn now(&self, ip: &str) -> Option<String> {
        self.holder(ip, Timestamp::now())
    }

    fn errors(&self, kind: ObjectKind) -> u64 {
        self.state.errors.watch[kind as usize].load(Ordering::Relaxed)
    }

    /// Whether a source works, and why not.
    fn source(&self, name: &str) -> Option<(bool, String)> {
        let status = self.state.status();
        let mut sources = status["sources"].as_array().unwrap().iter();
        let source = sources.find(|s| s["source"] == name)?;
        let why = source["why"].as_str().unwrap_or("").to_owned();
        Some((source["up"] == true, why))
    }

    fn works(&self, name: &str) -> bool {
        self.source(name).is_some_and(|(up, _)| up)
    }
}

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
