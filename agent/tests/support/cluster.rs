//! A scripted cluster: an API server with agents' pods, and `exec` in them over websockets, as a kubelet
//! speaks them. What runs in a pod is the real `whydrop`, or a script.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State as Extract;
use axum::http::{Request, Response, StatusCode, header};
use axum::response::IntoResponse as _;
use futures_util::stream::{self, StreamExt as _};
use futures_util::{FutureExt as _, SinkExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use whydrop::event::{Event, Line};

use super::api::{accept, error};
use super::{Agent, Tail, event};

/// What runs in a pod.
pub type Program = Arc<dyn Fn(Session) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// A program from an async function.
pub fn program<F: Future<Output = ()> + Send + 'static>(
    run: impl Fn(Session) -> F + Send + Sync + 'static,
) -> Program {
    Arc::new(move |session| run(session).boxed())
}

/// The real binary, asked of the agent behind a socket; with these arguments beside.
pub fn whydrop(socket: PathBuf, more: &'static [&'static str]) -> Program {
    program(move |session| run(session, socket.clone(), more))
}

#[derive(Default)]
struct Shared {
    pods: Mutex<BTreeMap<String, Program>>,
    objects: Mutex<BTreeMap<String, Value>>,
    /// Events of the watch; the index is the version before each.
    log: Mutex<Vec<String>>,
    logged: Notify,
    /// The token that is accepted, and how many requests had another.
    token: Mutex<String>,
    unauthorized: AtomicUsize,
    /// Codes with which requests of a kind are refused: `list`, `watch`, `exec`.
    refused: Mutex<HashMap<&'static str, u16>>,
    /// Pods in which something was run, in that order, with its arguments.
    execs: Mutex<Vec<(String, Vec<String>)>>,
    running: Mutex<HashMap<String, AbortHandle>>,
    opening: Gauge,
    open: Gauge,
}

/// A number that goes up and down, and its highest.
#[derive(Default)]
struct Gauge {
    now: AtomicUsize,
    highest: AtomicUsize,
}

impl Gauge {
    fn up(&self) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.highest.fetch_max(now, Ordering::SeqCst);
    }

    fn down(&self) {
        self.now.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The cluster; its server ends with it.
pub struct Cluster {
    shared: Arc<Shared>,
    pub home: tempfile::TempDir,
    pub url: String,
    _runtime: tokio::runtime::Runtime,
}

impl Cluster {
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let shared = Arc::new(Shared::default());
        let app = Router::new().fallback(serve).with_state(shared.clone());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"));
        let listener = listener.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(accept(listener, app));
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".kube")).unwrap();
        let cluster = Self {
            shared,
            home,
            url,
            _runtime: runtime,
        };
        cluster.accept("t");
        cluster.configure("c", json!({"token": "t"}));
        cluster
    }

    /// Where the kubeconfig is.
    pub fn kubeconfig(&self) -> PathBuf {
        self.home.path().join(".kube/config")
    }

    /// Writes the kubeconfig, with a current context and a user.
    pub fn configure(&self, current: &str, user: Value) {
        let config = json!({"current-context": current,
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": user}]});
        self.write(".kube/config", &config.to_string());
    }

    /// Writes a file in the home folder, in one step for who reads it.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.home.path().join(name);
        let new = path.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(&new, &path).unwrap();
        path
    }

    /// From now on only this token is accepted. Watches end, as they do every few minutes.
    pub fn accept(&self, token: &str) {
        *self.shared.token.lock().unwrap() = token.to_owned();
        self.shared.logged.notify_waiters();
    }

    /// How many requests had a token that was not accepted.
    pub fn unauthorized(&self) -> usize {
        self.shared.unauthorized.load(Ordering::SeqCst)
    }

    /// Adds an agent's pod, or changes what runs in it.
    pub fn add(&self, node: &str, program: Program) {
        self.add_in_phase(node, "Running", program);
    }

    pub fn add_in_phase(&self, node: &str, phase: &str, program: Program) {
        self.add_pod(node, node, phase, program);
    }

    /// Adds the pod that follows the one of a node; it is found as that of `NODE-next`.
    pub fn add_next(&self, node: &str, program: Program) {
        self.add_pod(&format!("{node}-next"), node, "Running", program);
    }

    fn add_pod(&self, name: &str, node: &str, phase: &str, program: Program) {
        let uid = format!("uid-{name}");
        let name = format!("whydrop-{name}");
        let object = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "whydrop", "name": name, "uid": uid},
            "spec": {"nodeName": node, "containers": [{"name": "agent"}]},
            "status": {"phase": phase}});
        self.shared
            .pods
            .lock()
            .unwrap()
            .insert(name.clone(), program);
        self.shared
            .objects
            .lock()
            .unwrap()
            .insert(name, object.clone());
        self.log("ADDED", object);
    }

    /// Begins to delete an agent's pod; what runs in it goes on.
    pub fn terminate(&self, node: &str) {
        self.modify(node, |object| {
            object["metadata"]["deletionTimestamp"] = "2026-11-22T12:03:10Z".into();
        });
    }

    /// An agent's pod is in another phase; what runs in it goes on.
    pub fn end(&self, node: &str, phase: &str) {
        self.modify(node, |object| object["status"]["phase"] = phase.into());
    }

    fn modify(&self, node: &str, modify: impl FnOnce(&mut Value)) {
        let name = format!("whydrop-{node}");
        let mut objects = self.shared.objects.lock().unwrap();
        let object = objects.get_mut(&name).unwrap();
        modify(object);
        let object = object.clone();
        drop(objects);
        self.log("MODIFIED", object);
    }

    /// Deletes an agent's pod; what runs in it goes on until it is cut.
    pub fn forget(&self, node: &str) {
        let name = format!("whydrop-{node}");
        let object = self.shared.objects.lock().unwrap().remove(&name).unwrap();
        self.shared.pods.lock().unwrap().remove(&name);
        self.log("DELETED", object);
    }

    fn log(&self, kind: &str, mut object: Value) {
        let mut log = self.shared.log.lock().unwrap();
        object["metadata"]["resourceVersion"] = (log.len() + 1).to_string().into();
        log.push(json!({"type": kind, "object": object}).to_string() + "\n");
        self.shared.logged.notify_waiters();
    }

    /// Breaks the connection to what runs in a pod.
    pub fn cut(&self, node: &str) {
        let name = format!("whydrop-{node}");
        let running = self.shared.running.lock().unwrap().remove(&name);
        running.iter().for_each(AbortHandle::abort);
    }

    /// From now on requests of a kind get this code; with 200 they do not.
    pub fn refuse(&self, what: &'static str, code: u16) {
        self.shared.refused.lock().unwrap().insert(what, code);
    }

    /// What was run in a node's pod so far: its arguments, without the program's name.
    pub fn execs(&self, node: &str) -> Vec<Vec<String>> {
        let name = format!("whydrop-{node}");
        let execs = self.shared.execs.lock().unwrap();
        let of = execs.iter().filter(|(pod, _)| *pod == name);
        of.map(|(_, arguments)| arguments.clone()).collect()
    }

    /// The most execs that were being opened at once, and that were open.
    pub fn highest(&self) -> (usize, usize) {
        let highest = |gauge: &Gauge| gauge.highest.load(Ordering::SeqCst);
        (highest(&self.shared.opening), highest(&self.shared.open))
    }

    /// `whydrop` as someone runs it who has the kubeconfig in its usual place.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_whydrop"));
        command
            .args(line.split_whitespace())
            .env_clear()
            .env("HOME", self.home.path());
        command
    }

    /// A running `whydrop tail -o json`.
    pub fn tail(&self, flags: &str) -> Tail {
        Tail::start(self.command(&format!("tail -o json {flags}")))
    }
}

async fn serve(shared: Extract<Arc<Shared>>, mut request: Request<Body>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or("").to_owned();
    let token = shared.token.lock().unwrap().clone();
    if request.headers()[header::AUTHORIZATION] != format!("Bearer {token}") {
        shared.unauthorized.fetch_add(1, Ordering::SeqCst);
        return error(401);
    }
    let pods = path.strip_prefix("/api/v1/namespaces/whydrop/pods");
    let Some(pod) = pods else {
        return error(404);
    };
    let pod = pod.strip_prefix('/').and_then(|p| p.strip_suffix("/exec"));
    let what = match pod {
        Some(_) => "exec",
        None if query.contains("watch=true") => "watch",
        None => "list",
    };
    let refused = shared.refused.lock().unwrap().get(what).copied();
    if let Some(code) = refused.filter(|code| *code != 200) {
        return error(code);
    }
    match (what, pod) {
        ("exec", Some(pod)) => exec(&shared, &mut request, pod, &query),
        ("watch", _) => watch(&shared, &query, token),
        _ => {
            assert!(query.contains("labelSelector=app.kubernetes.io%2Fname%3Dwhydrop"));
            let version = shared.log.lock().unwrap().len().to_string();
            let items: Vec<Value> = shared.objects.lock().unwrap().values().cloned().collect();
            let list = json!({"kind": "PodList", "apiVersion": "v1", "items": items,
                "metadata": {"resourceVersion": version}});
            axum::Json(list).into_response()
        }
    }
}

/// Events behind the version that the query names, and those that come while the token is accepted.
fn watch(shared: &Arc<Shared>, query: &str, token: String) -> Response<Body> {
    let version = form_urlencoded::parse(query.as_bytes())
        .find(|(key, _)| key == "resourceVersion")
        .map_or(0, |(_, value)| value.parse().unwrap());
    let begin = (shared.clone(), version, token);
    let lines = stream::unfold(begin, |(shared, at, token)| async move {
        loop {
            let mut logged = std::pin::pin!(shared.logged.notified());
            logged.as_mut().enable();
            if *shared.token.lock().unwrap() != token {
                return None;
            }
            let line = shared.log.lock().unwrap().get(at).cloned();
            if let Some(line) = line {
                let line = Ok::<_, std::io::Error>(Bytes::from(line));
                return Some((line, (shared.clone(), at + 1, token)));
            }
            logged.await;
        }
    });
    Body::from_stream(lines).into_response()
}

fn exec(
    shared: &Arc<Shared>,
    request: &mut Request<Body>,
    pod: &str,
    query: &str,
) -> Response<Body> {
    let Some(program) = shared.pods.lock().unwrap().get(pod).cloned() else {
        return error(404);
    };
    let parameters: Vec<_> = form_urlencoded::parse(query.as_bytes()).collect();
    let of = |name: &str| {
        let of = parameters.iter().filter(|(key, _)| key == name);
        of.map(|(_, value)| value.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(of("container"), ["agent"]);
    let mut arguments = of("command");
    assert_eq!(arguments.remove(0), "whydrop");
    let asked = (pod.to_owned(), arguments.clone());
    shared.opening.up();
    shared.open.up();
    let offered = request.headers()[header::SEC_WEBSOCKET_PROTOCOL].clone();
    assert!(offered.to_str().unwrap().contains("v5.channel.k8s.io"));
    let key = derive_accept_key(request.headers()[header::SEC_WEBSOCKET_KEY].as_bytes());
    let upgrade = hyper::upgrade::on(request);
    let opened = Opened {
        shared: shared.clone(),
        is_opening: true,
    };
    let task = tokio::spawn(async move {
        let upgraded = TokioIo::new(upgrade.await.unwrap());
        let mut socket = WebSocketStream::from_raw_socket(upgraded, Role::Server, None).await;
        // A kubelet begins with an empty message for each channel.
        for channel in 1..=3 {
            drop(socket.send(Message::binary(vec![channel])).await);
        }
        program(Session {
            arguments,
            socket,
            opened,
        })
        .await;
    });
    let mut running = shared.running.lock().unwrap();
    running.insert(pod.to_owned(), task.abort_handle());
    drop(running);
    shared.execs.lock().unwrap().push(asked);
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_ACCEPT, key)
        .header(header::SEC_WEBSOCKET_PROTOCOL, "v5.channel.k8s.io")
        .body(Body::empty())
        .unwrap()
}

/// Counts an exec as being opened until it says something, and as open until it ends.
struct Opened {
    shared: Arc<Shared>,
    is_opening: bool,
}

impl Opened {
    fn answers(&mut self) {
        if std::mem::take(&mut self.is_opening) {
            self.shared.opening.down();
        }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.answers();
        self.shared.open.down();
    }
}

/// One exec; dropped, its connection breaks.
pub struct Session {
    pub arguments: Vec<String>,
    socket: WebSocketStream<TokioIo<Upgraded>>,
    opened: Opened,
}

impl Session {
    async fn send(&mut self, channel: u8, bytes: &[u8]) -> bool {
        let message = [&[channel], bytes].concat();
        self.socket.send(Message::binary(message)).await.is_ok()
    }

    /// `false` if nobody takes it any more.
    pub async fn stdout(&mut self, text: &str) -> bool {
        self.opened.answers();
        self.send(1, text.as_bytes()).await
    }

    pub async fn stderr(&mut self, text: &str) {
        self.send(2, text.as_bytes()).await;
    }

    /// The program ended, as the kubelet says it.
    pub async fn exit(mut self, code: i32) {
        let status = match code {
            0 => json!({"metadata": {}, "status": "Success"}),
            code => json!({"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
                "message": format!("command terminated with non-zero exit code: {code}"),
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]}}),
        };
        // Whoever hears of it may open the next one at once.
        drop(self.opened);
        let message = [&[3], status.to_string().as_bytes()].concat();
        drop(self.socket.send(Message::binary(message)).await);
        drop(self.socket.close(None).await);
    }

    /// Until the other end is gone.
    pub async fn gone(&mut self) {
        while let Some(Ok(_)) = self.socket.next().await {}
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn run(mut session: Session, socket: PathBuf, more: &[&str]) {
    let here = "--socket=/run/whydrop/agent.sock";
    assert!(session.arguments.iter().any(|a| a == here));
    let there = format!("--socket={}", socket.display());
    let arguments = session.arguments.iter();
    let arguments = arguments.map(|a| if a == here { &there } else { a });
    let mut command = Command::new(env!("CARGO_BIN_EXE_whydrop"));
    command
        .args(arguments)
        .args(more)
        .env_clear()
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = Killed(command.spawn().unwrap());
    let (sender, mut pieces) = mpsc::channel(4);
    pass_on(1, child.0.stdout.take().unwrap(), sender.clone());
    pass_on(2, child.0.stderr.take().unwrap(), sender);
    while let Some((channel, piece)) = pieces.recv().await {
        session.opened.answers();
        if !session.send(channel, &piece).await {
            return;
        }
    }
    let code = child.0.wait().unwrap().code().unwrap_or(137);
    session.exit(code).await;
}

fn pass_on(channel: u8, mut from: impl Read + Send + 'static, to: mpsc::Sender<(u8, Vec<u8>)>) {
    std::thread::spawn(move || {
        let mut piece = [0; 8192];
        while let Ok(read @ 1..) = from.read(&mut piece) {
            if to.blocking_send((channel, piece[..read].to_vec())).is_err() {
                return;
            }
        }
    });
}

/// An event of a node at a second, which is also the number of its packets.
pub fn at(node: &str, second: u64) -> Line {
    Line::Event(Event {
        node: node.into(),
        time: Timestamp::from_second(second as i64).unwrap(),
        packets: second,
        ..event()
    })
}

/// A real agent without a kernel, whose pod is in the cluster.
pub fn agent(cluster: &Cluster, node: &str) -> Agent {
    let agent = Agent::start_as(node, tempfile::tempdir().unwrap());
    cluster.add(node, whydrop(agent.socket(), &[]));
    agent
}

pub fn publish(agent: &Agent, seconds: impl IntoIterator<Item = u64>) {
    for second in seconds {
        let line = at(&agent.state.node, second);
        agent.state.stream.publish(Arc::new(line));
    }
}

pub fn output(mut command: Command) -> (Output, String) {
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    (output, stderr)
}

/// An agent that says this, and then nothing for as long as it is followed.
pub fn says(text: String) -> Program {
    program(move |mut session| {
        let text = text.clone();
        async move {
            session.stdout(&text).await;
            session.gone().await;
        }
    })
}

pub fn line(node: &str, second: u64) -> String {
    serde_json::to_string(&at(node, second)).unwrap() + "\n"
}
