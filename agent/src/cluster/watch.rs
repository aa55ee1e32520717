//! `--cluster`: the objects of the API server, kept up to date by kube's watchers. Nothing else of the
//! agent talks to it, and nothing waits for it.
//!
//! One task on a thread of its own takes one step after another from all watches and puts it into the
//! index, so no queue lies between: while the index is being written, the connections wait. Objects
//! are stripped while they are read (`object.rs`). Changes are taken in bunches, 50 ms apart.
//!
//! | when | then |
//! |---|---|
//! | the server offers streaming lists (1.32 on) | a list is a watch that begins with all objects; else it comes in pages |
//! | a watch ends | it goes on where it was |
//! | its place is too old (410) | all is listed anew; what is not listed any more is gone |
//! | the server does not answer, or with an error | it is tried again, at most 30 s later; the index stays as it was |
//! | it is silent for longer than a watch may last | that is an error as well |
//! | one kind is refused (403) | only what needs that kind is missing; it is tried again |
//! | the credentials are refused (401), or nothing answers for a minute | the configuration is read again |
//!
//! In a large cluster an agent that watched all pods would be large, and a thousand of them a burden: then
//! it watches those of its node and asks for others when something concerns them (`lookups.rs`).

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::client::ClientBuilder;
use kube::runtime::watcher;
use kube::{Client, Config};
use serde_json::Value;
use tokio::sync::mpsc;

pub use self::health::causes;
use self::health::{Failure, Health};
use self::lookups::Lookups;
use self::object::{Item, Step, Watches};
use self::pace::{Pace, PaceLayer};
use super::objects::{Change, Interner, Key, ObjectKind};
use crate::source::hooks::SourceStatus;
use crate::source::sys;
use crate::state::State;

pub(super) mod health;
pub mod lookups;
mod object;
mod pace;

/// The kinds that are watched. ReplicaSets and Jobs are not: a pod itself tells what they would, and in
/// a large cluster they are as many as the pods.
pub const KINDS: [ObjectKind; 9] = [
    ObjectKind::Namespace,
    ObjectKind::Node,
    ObjectKind::Service,
    ObjectKind::Pod,
    ObjectKind::EndpointSlice,
    ObjectKind::NetworkPolicy,
    ObjectKind::ClusterNetworkPolicy,
    ObjectKind::AdminNetworkPolicy,
    ObjectKind::BaselineAdminNetworkPolicy,
];
/// Of these the kinds that only some clusters have.
pub const OPTIONAL: [ObjectKind; 3] = [
    ObjectKind::ClusterNetworkPolicy,
    ObjectKind::AdminNetworkPolicy,
    ObjectKind::BaselineAdminNetworkPolicy,
];

/// Of these the kinds that have addresses: until they are listed, nobody knows whose an address is.
const NAMING: [ObjectKind; 3] = [ObjectKind::Node, ObjectKind::Service, ObjectKind::Pod];

/// The source's name; each kind has one of its own beside it.
pub const SOURCE: &str = "cluster";

/// Objects in a page of a list. Some 5 MB of a large cluster's pods, which are read one by one.
const PAGE: u32 = 500;
/// The first minor version of 1.x that offers streaming lists; one that has them switched off refuses.
const STREAMING_LISTS: u32 = 32;
/// A server that takes longer to say its version does not answer.
const VERSION_TIMEOUT: Duration = Duration::from_secs(30);
/// The client's own deadline comes after the server's end of a watch and before kube's.
const SILENCE_MARGIN: Duration = Duration::from_secs(3);
/// How long nothing answers before the configuration is read again.
const UNREACHABLE: Duration = Duration::from_secs(60);
/// Pauses between two attempts to connect.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Between two looks at which of the optional kinds the server has.
const DISCOVERY: Duration = Duration::from_secs(300);
/// Between two bunches of changes. One by one they cost three times as much: each wakes a thread whose memory
/// is in no cache any more.
const BUNCH: Duration = Duration::from_millis(50);
/// A bunch ends when none has come for so long: what a connection has read comes piece by piece.
const SETTLED: Duration = Duration::from_millis(2);
/// Between two rounds of forgetting strings that nobody uses.
const HOUSEKEEPING: Duration = Duration::from_secs(60);

/// Pods of a cluster whose agents watch those of their node alone, if they may choose. Some 1.4 kB each:
/// 20,000 are 28 MB.
pub const MANY_PODS: u64 = 20_000;
/// Addresses that wait to be asked for; past it they have no name.
const QUESTIONS: usize = 64;

/// Which pods are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Reach {
    /// All, in a cluster of less than 20,000; else those of this node.
    Auto,
    /// All.
    Cluster,
    /// Those of this node; others are asked for by their address.
    Node,
}

/// Times that tests make shorter.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// How long a watch may last, which is also how long one that is silent goes unnoticed.
    pub watch: Duration,
    /// Between two looks at which of the optional kinds the server has; half of it to one and a half.
    pub discovery: Duration,
    /// The first request comes at a random moment before this has passed, so that the agents of a
    /// cluster that start together do not ask together.
    pub start_jitter: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            // Not the same on each node, so that they do not ask together again.
            watch: Duration::from_secs(240) + random(Duration::from_secs(60)),
            discovery: DISCOVERY,
            start_jitter: Duration::from_secs(3),
        }
    }
}

/// Whether there is a configuration: a kubeconfig, or a pod's ServiceAccount.
pub async fn is_configured() -> bool {
    Config::infer().await.is_ok()
}

/// Follows the cluster until `shutdown`. `configuration` is asked before each attempt to connect.
pub async fn run<F>(
    state: Arc<State>,
    times: Times,
    reach: Reach,
    configuration: impl Fn() -> F,
    shutdown: impl Future<Output = ()>,
) where
    F: Future<Output = Result<Config, String>>,
{
    let (sender, questions) = mpsc::channel(QUESTIONS);
    state.awaited.answer_by(sender);
    let mut cluster = Cluster {
        state,
        times,
        reach,
        questions,
        lookups: Lookups::default(),
        strings: Interner::default(),
        kinds: KINDS.map(|kind| (kind, Kind::default())).into(),
    };
    cluster.state.index_mut().set_partial(true);
    let follow = async {
        tokio::time::sleep(random(times.start_jitter)).await;
        let mut pause = PAUSES.0;
        loop {
            let began = Instant::now();
            let why = match configuration().await {
                Ok(config) => match cluster.connect(config).await {
                    Ok(server) => cluster.follow(server).await,
                    Err(why) => why,
                },
                Err(why) => why,
            };
            cluster.say(false, None, Some(why));
            pause = match began.elapsed() > UNREACHABLE {
                true => PAUSES.0,
                false => pause,
            };
            tokio::time::sleep(pause / 2 + random(pause / 2)).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    };
    tokio::select! {
        () = follow => {}
        () = shutdown => {}
    }
}

/// The configuration as kubectl finds it: `KUBECONFIG`, `~/.kube/config`, a pod's ServiceAccount.
///
/// # Errors
/// There is none, or it cannot be read.
pub async fn infer() -> Result<Config, String> {
    let config = Config::infer().await;
    config.map_err(|error| {
        format!(
            "no configuration of a cluster: {}; set KUBECONFIG, or run as a pod with a ServiceAccount",
            causes(&error)
        )
    })
}

impl Server {
    /// Optional kinds only where they are. Of all endpoints an agent that watches its node would keep more than of all pods of it.
    fn watches(&self, kind: ObjectKind) -> bool {
        match kind {
            ObjectKind::EndpointSlice => !self.is_of_node,
            kind if OPTIONAL.contains(&kind) => self.offered.contains(&kind),
            _ => true,
        }
    }
}

/// The source that stands for a kind's watch.
pub fn source_of(kind: ObjectKind) -> &'static str {
    health::source(kind).0
}

/// The optional kinds that the server has; `None` if it does not say.
pub(super) async fn offered(client: &Client) -> Option<Vec<ObjectKind>> {
    let mut offered = Vec::new();
    for kind in OPTIONAL {
        let path = format!("/apis/{}", kind.api_version());
        let request = hyper::Request::get(path).body(Vec::new()).ok()?;
        let answer = tokio::time::timeout(VERSION_TIMEOUT, client.request::<Value>(request));
        let resources = match answer.await.ok()? {
            Ok(answer) => answer["resources"].as_array().cloned().unwrap_or_default(),
            // The group, or this version of it.
            Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
            Err(_) => return None,
        };
        if resources.iter().any(|known| known["name"] == kind.plural()) {
            offered.push(kind);
        }
    }
    Some(offered)
}

/// The same after a while, a different one on each node.
async fn discover(client: Client, after: Duration) -> Option<Vec<ObjectKind>> {
    tokio::time::sleep(after / 2 + random(after)).await;
    offered(&client).await
}

/// How many pods there are; `None` if the server does not tell.
async fn count_pods(client: &Client) -> Option<u64> {
    let request = hyper::Request::get("/api/v1/pods?limit=1").body(Vec::new());
    let answer = client.request::<Value>(request.ok()?);
    let answer = tokio::time::timeout(VERSION_TIMEOUT, answer)
        .await
        .ok()?
        .ok()?;
    let first = answer["items"].as_array()?.len() as u64;
    let more = &answer["metadata"]["remainingItemCount"];
    Some(first + more.as_u64().unwrap_or(0))
}

/// A moment between none and a duration.
fn random(below: Duration) -> Duration {
    // Each RandomState has keys of its own, which is all the randomness that this needs.
    let bits = RandomState::new().build_hasher().finish();
    below.mul_f64((bits >> 11) as f64 / (1u64 << 53) as f64)
}

struct Server {
    client: Client,
    pace: Arc<Pace>,
    /// What is shown of it: its address, and which pods are watched.
    shown: String,
    url: String,
    streams: bool,
    /// Only the pods of this node are watched.
    is_of_node: bool,
    /// The optional kinds that it has.
    offered: Vec<ObjectKind>,
}

/// What is known of one kind's watch.
#[derive(Debug, Default)]
struct Kind {
    health: Health,
    /// It was listed whole once.
    listed: bool,
    /// The server refuses streaming lists of it.
    in_pages: bool,
    /// While it is being listed: since when, and what was listed.
    listing: Option<(Instant, HashSet<Key>)>,
}

struct Cluster {
    state: Arc<State>,
    times: Times,
    reach: Reach,
    /// Addresses whose pod is asked for.
    questions: mpsc::Receiver<IpAddr>,
    lookups: Lookups,
    strings: Interner,
    kinds: HashMap<ObjectKind, Kind>,
}

impl Cluster {
    async fn connect(&mut self, mut config: Config) -> Result<Server, String> {
        let url = config.cluster_url.to_string();
        config.read_timeout = Some(self.times.watch + SILENCE_MARGIN);
        // Each failure is to be counted and shown; kube's watchers try again.
        config.default_retry = false;
        let pace = Arc::new(Pace::default());
        let client = ClientBuilder::try_from(config)
            .map_err(|error| format!("no client for {url}: {}", causes(&error)))?
            .with_layer(&PaceLayer(pace.clone()))
            .build();
        let version = tokio::time::timeout(VERSION_TIMEOUT, client.apiserver_version()).await;
        let version = version
            .map_err(|_| {
                format!(
                    "{url} does not answer within {} s",
                    VERSION_TIMEOUT.as_secs()
                )
            })?
            .map_err(|error| format!("{url} does not answer: {}", causes(&error)))?;
        // Some write `31+`.
        let minor = version
            .minor
            .trim_end_matches(|c: char| !c.is_ascii_digit());
        let streams =
            version.major != "1" || minor.parse().is_ok_and(|m: u32| m >= STREAMING_LISTS);
        let offered = offered(&client).await.unwrap_or_default();
        let pods = match self.reach {
            Reach::Auto => count_pods(&client).await,
            Reach::Cluster | Reach::Node => None,
        };
        let is_of_node = match self.reach {
            Reach::Node => true,
            Reach::Cluster => false,
            // Who may not ask for it learns that from the watch.
            Reach::Auto => pods.is_some_and(|pods| pods > MANY_PODS),
        };
        let shown = match (is_of_node, pods) {
            (false, _) => url.clone(),
            (true, Some(pods)) => {
                format!("{url}, pods of this node alone, because there are {pods}")
            }
            (true, None) => format!("{url}, pods of this node alone"),
        };
        tracing::info!(
            url,
            version = version.git_version,
            streams,
            is_of_node,
            pods,
            "following the cluster"
        );
        Ok(Server {
            client,
            pace,
            shown,
            url,
            streams,
            is_of_node,
            offered,
        })
    }

    /// Until the configuration should be read again, and why.
    async fn follow(&mut self, mut server: Server) -> String {
        self.say(true, Some(server.shown.clone()), None);
        let mut watches = Watches::default();
        for kind in KINDS.into_iter().filter(|kind| server.watches(*kind)) {
            let known = self.kind(kind);
            known.health = Health::default();
            known.in_pages = !server.streams;
            self.open(kind, &server, &mut watches);
        }
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
        let mut second = tokio::time::interval(Duration::from_secs(1));
        let mut discovery = std::pin::pin!(discover(server.client.clone(), self.times.discovery));
        let mut rest = std::pin::pin!(tokio::time::sleep(Duration::ZERO));
        let mut settled = std::pin::pin!(tokio::time::sleep(Duration::ZERO));
        let (mut is_resting, mut took) = (false, false);
        loop {
            tokio::select! {
                // A list of minutes must not hold up the others.
                biased;
                kinds = server.pace.answered() => {
                    for kind in kinds {
                        self.answered(kind);
                    }
                }
                Some(ip) = self.questions.recv(), if self.lookups.has_room() => {
                    if server.is_of_node {
                        self.lookups.ask(&server.client, ip, &self.state.lookups);
                    }
                }
                (ip, answer) = self.lookups.answered() => self.found(ip, answer),
                _ = second.tick() => {
                    for key in self.lookups.expired() {
                        let change = Change::Delete(key);
                        self.state.index_mut().apply(change, Timestamp::now());
                    }
                }
                offered = &mut discovery => {
                    discovery.set(discover(server.client.clone(), self.times.discovery));
                    self.offered(&mut server, offered, &mut watches);
                }
                _ = housekeeping.tick() => self.strings.purge(),
                () = &mut rest, if is_resting => {
                    is_resting = false;
                    continue;
                }
                (kind, step) = watches.next(), if !is_resting => {
                    let failure = match step {
                        Ok(step) => {
                            took = true;
                            settled.as_mut().reset(tokio::time::Instant::now() + SETTLED);
                            self.step(kind, step);
                            continue;
                        }
                        Err(error) => Failure::of(kind, &error),
                    };
                    if failure.refuses_streams && !self.kind(kind).in_pages {
                        self.kind(kind).in_pages = true;
                        self.open(kind, &server, &mut watches);
                        continue;
                    }
                    if failure.is_too_old {
                        self.open(kind, &server, &mut watches);
                    }
                    self.failed(kind, &failure);
                    if failure.is_unauthorized {
                        return format!("{} does not accept the credentials", server.url);
                    }
                }
                // Lists are not held up.
                () = &mut settled, if took => {
                    took = false;
                    is_resting = self.kinds.values().all(|kind| kind.listing.is_none());
                    rest.as_mut().reset(tokio::time::Instant::now() + BUNCH);
                    continue;
                }
            }
            let is_reached = self.kinds.values().any(|kind| kind.health.is_reached());
            let lost = self
                .kinds
                .values()
                .filter_map(|kind| kind.health.lost_since());
            match lost.min() {
                Some(since) if !is_reached => {
                    let why = format!("{} cannot be reached", server.url);
                    if since.elapsed() > UNREACHABLE {
                        return why;
                    }
                    self.say(false, None, Some(why));
                }
                _ => self.say(true, Some(server.shown.clone()), None),
            }
            let is_listed = self
                .kinds
                .get(&ObjectKind::Pod)
                .is_some_and(|pods| pods.listed);
            self.state.awaited.follow(is_listed, server.is_of_node);
        }
    }

    fn kind(&mut self, kind: ObjectKind) -> &mut Kind {
        self.kinds.entry(kind).or_default()
    }

    /// Begins to watch a kind, or begins anew.
    fn open(&mut self, kind: ObjectKind, server: &Server, watches: &mut Watches) {
        let seconds = u32::try_from(self.times.watch.as_secs()).unwrap_or(u32::MAX);
        let config = watcher::Config::default().timeout(seconds).page_size(PAGE);
        let config = match kind == ObjectKind::Pod && server.is_of_node {
            true => config.fields(&format!("spec.nodeName={}", self.state.node)),
            false => config,
        };
        let config = match self.kind(kind).in_pages {
            true => config,
            false => config.streaming_lists(),
        };
        watches.open(kind, server.client.clone(), config);
    }

    /// Definitions of optional kinds came or went.
    fn offered(
        &mut self,
        server: &mut Server,
        offered: Option<Vec<ObjectKind>>,
        watches: &mut Watches,
    ) {
        let Some(offered) = offered else {
            return;
        };
        let before = std::mem::replace(&mut server.offered, offered);
        for kind in OPTIONAL {
            match (before.contains(&kind), server.offered.contains(&kind)) {
                (false, true) => {
                    self.kind(kind).in_pages = !server.streams;
                    self.open(kind, server, watches);
                }
                (true, false) => {
                    watches.close(kind);
                    // With its definition each object is gone.
                    self.kind(kind).listing = Some((Instant::now(), HashSet::new()));
                    self.complete(kind);
                    self.state.forget_source(health::source(kind).0);
                }
                _ => {}
            }
        }
    }

    fn step(&mut self, kind: ObjectKind, step: Step) {
        match step {
            Step::Restart => {
                self.kind(kind).listing = Some((Instant::now(), HashSet::new()));
            }
            Step::Listed(item) => {
                let key = self.take(kind, item);
                if let Some((_, listed)) = &mut self.kind(kind).listing {
                    listed.extend(key);
                }
            }
            Step::Complete => self.complete(kind),
            Step::Changed(item) => _ = self.take(kind, item),
            Step::Gone(namespace, name) => {
                let key = self.key(kind, &namespace, &name);
                self.state
                    .index_mut()
                    .apply(Change::Delete(key), Timestamp::now());
            }
        }
    }

    fn key(&mut self, kind: ObjectKind, namespace: &str, name: &str) -> Key {
        Key {
            kind,
            namespace: self.strings.get(namespace),
            name: name.into(),
        }
    }

    /// Puts an object into the index. Of one that is malformed the last good state stays.
    fn take(&mut self, kind: ObjectKind, item: Item) -> Option<Key> {
        let object = match item {
            Ok(parsed) => parsed?.strip(&mut self.strings),
            Err(malformed) => {
                let (namespace, name) = (&malformed.namespace, &malformed.name);
                self.state.errors.objects.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    kind = kind.as_str(),
                    namespace,
                    name,
                    "an object of the cluster is not used: {}",
                    malformed.message,
                );
                return Some(self.key(kind, namespace, name));
            }
        };
        let key = object.key().clone();
        self.lookups.forget(&key);
        let now = Timestamp::now();
        let mut index = self.state.index_mut();
        match self.kinds.get(&kind).is_some_and(|kind| kind.listed) {
            true => index.apply(Change::Upsert(object), now),
            false => index.load([object], now),
        }
        Some(key)
    }

    /// Takes in who has an address that was asked for.
    fn found(&mut self, ip: IpAddr, answer: Result<Value, kube::Error>) {
        let totals = &self.state.lookups;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                totals.error.fetch_add(1, Ordering::Relaxed);
                let why = causes(&error);
                tracing::debug!(%ip, why, "the API server does not say who has an address");
                return;
            }
        };
        let pods = lookups::pods(&answer, &self.state.node, &mut self.strings);
        if pods.is_empty() {
            totals.none.fetch_add(1, Ordering::Relaxed);
            return self.state.awaited.is_nobodys(ip);
        }
        totals.found.fetch_add(1, Ordering::Relaxed);
        for pod in pods {
            self.lookups.keep(pod.key().clone());
            self.state.index_mut().load([pod], Timestamp::now());
        }
    }

    /// All objects of a kind were listed: what the index has beyond them went away unseen.
    fn complete(&mut self, kind: ObjectKind) {
        let Some((began, listed)) = self.kind(kind).listing.take() else {
            return;
        };
        let gone: Vec<Key> = {
            let index = self.state.index();
            let keys = index.keys(kind);
            keys.filter(|key| !listed.contains(key)).cloned().collect()
        };
        tracing::info!(
            kind = kind.plural(),
            objects = listed.len(),
            gone = gone.len(),
            milliseconds = began.elapsed().as_millis(),
            "listed",
        );
        let now = Timestamp::now();
        for key in gone {
            self.state.index_mut().apply(Change::Delete(key), now);
        }
        let known = self.kind(kind);
        known.listed = true;
        known.health.answered();
        let is_listed = |kind| self.kinds.get(kind).is_some_and(|known| known.listed);
        if NAMING.iter().all(is_listed) {
            self.state.index_mut().set_partial(false);
        }
        self.say_of(kind, None);
        drop(listed);
        self.strings.purge();
        if self.kinds.values().all(|kind| kind.listing.is_none()) {
            sys::release_free_memory();
        }
    }

    fn failed(&mut self, kind: ObjectKind, failure: &Failure) {
        self.state.errors.watch[kind as usize].fetch_add(1, Ordering::Relaxed);
        self.kind(kind).health.failed(failure);
        self.say_of(kind, Some(failure.why.clone()));
    }

    /// The server gave a good answer: what failed before works again. A kind that was never listed
    /// whole still has to be.
    fn answered(&mut self, kind: ObjectKind) {
        let known = self.kind(kind);
        known.health.answered();
        if known.listed && known.listing.is_none() {
            self.say_of(kind, None);
        }
    }

    fn say_of(&self, kind: ObjectKind, why: Option<String>) {
        let (source, lost) = health::source(kind);
        self.state.set_source(SourceStatus {
            source,
            up: why.is_none(),
            hook: None,
            lost: why.is_some().then_some(lost),
            why,
        });
    }

    fn say(&self, up: bool, hook: Option<String>, why: Option<String>) {
        let lost = "names are as they were when the API server was last reached";
        self.state.set_source(SourceStatus {
            source: SOURCE,
            up,
            hook,
            why,
            lost: (!up).then_some(lost),
        });
    }
}
