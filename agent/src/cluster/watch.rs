//! `--cluster`: the objects of the API server, kept up to date by kube's watchers. Nothing else of the
//! agent talks to it, and nothing waits for it.
//!
//! One task on a thread of its own takes one step after another from all watches and puts it into the
//! index, so no queue lies between: while the index is being written, the connections wait. Objects
//! are stripped while they are read (`object.rs`). Changes are taken in bunches, and between two of them the
//! whole thread sleeps.
//!
//! | module | holds |
//! |---|---|
//! | `server` | how a server is reached, and what it offers |
//! | `object` | the watches of all kinds, and their objects stripped while they are read |
//! | `intake` | from the steps of a watch to the index |
//! | [`lookups`] | pods that are asked for by their address |
//! | `pace` | requests of a kind a second apart |
//! | `health` | what went wrong, in one sentence |
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
use kube::Config;
use kube::runtime::watcher;
use tokio::sync::mpsc;

pub use self::health::causes;
use self::health::{Failure, Health};
use self::lookups::Lookups;
use self::object::Watches;
pub(super) use self::server::offered;
use self::server::{Server, discover};
use super::objects::{Change, Interner, Key, ObjectKind};
use crate::source::hooks::SourceStatus;
use crate::state::State;

pub(super) mod health;
mod intake;
pub mod lookups;
mod object;
mod pace;
mod server;

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
/// What is lost while it is down.
pub const LOST: &str = "names are as they were when the API server was last reached";

/// Objects in a page of a list. Some 5 MB of a large cluster's pods, which are read one by one.
const PAGE: u32 = 500;
/// How long nothing answers before the configuration is read again.
const UNREACHABLE: Duration = Duration::from_secs(60);
/// Pauses between two attempts to connect.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Between two looks at which of the optional kinds the server has.
const DISCOVERY: Duration = Duration::from_secs(300);
/// Between two bunches of changes. One by one they cost three times as much: each wakes a thread whose memory
/// is in no cache any more.
const BUNCH: Duration = Duration::from_millis(100);
/// A bunch ends when none has come for so long: what a connection has read comes piece by piece.
const SETTLED: Duration = Duration::from_millis(2);
/// Between two rounds of forgetting strings that nobody uses.
const HOUSEKEEPING: Duration = Duration::from_secs(60);

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
                Ok(config) => match Server::connect(config, times, reach).await {
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

/// The source that stands for a kind's watch.
pub fn source_of(kind: ObjectKind) -> &'static str {
    health::source(kind).0
}

/// A moment between none and a duration.
fn random(below: Duration) -> Duration {
    // Each RandomState has keys of its own, which is all the randomness that this needs.
    let bits = RandomState::new().build_hasher().finish();
    below.mul_f64((bits >> 11) as f64 / (1u64 << 53) as f64)
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
    /// Addresses whose pod is asked for.
    questions: mpsc::Receiver<IpAddr>,
    lookups: Lookups,
    strings: Interner,
    kinds: HashMap<ObjectKind, Kind>,
}

impl Cluster {
    /// Until the configuration should be read again, and why.
    async fn follow(&mut self, mut server: Server) -> String {
        self.say(true, Some(server.shown.clone()), None);
        let mut watches = Watches::default();
        for kind in KINDS {
            match server.watches(kind) {
                Some(true) => self.begin(kind, &server, &mut watches),
                // An earlier server had it, or more pods are there than it was watched for.
                Some(false) => self.forget(kind),
                None => {
                    let known = self.kind(kind);
                    (known.health, known.listing) = (Health::default(), None);
                }
            }
        }
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
        let mut second = tokio::time::interval(Duration::from_secs(1));
        let mut discovery = std::pin::pin!(discover(server.client.clone(), self.times.discovery));
        let mut settled = std::pin::pin!(tokio::time::sleep(Duration::ZERO));
        let mut took = false;
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
                (kind, step) = watches.next() => {
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
                () = &mut settled, if took => {
                    took = false;
                    // Lists are not held up, nor who waits for the answer to a question.
                    let is_listing = self.kinds.values().any(|kind| kind.listing.is_some());
                    if !is_listing && self.lookups.is_idle() {
                        // All of the thread, which does nothing else: a task that waited would be woken
                        // by each packet that comes meanwhile.
                        std::thread::sleep(BUNCH);
                    }
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

    /// Begins to watch a kind of a server. What is known of it stays until it is listed.
    fn begin(&mut self, kind: ObjectKind, server: &Server, watches: &mut Watches) {
        let known = self.kind(kind);
        *known = Kind {
            listed: known.listed,
            in_pages: !server.streams,
            ..Kind::default()
        };
        self.open(kind, server, watches);
    }

    /// A kind is not watched any more: nothing of it is known, nor how its watch does.
    fn forget(&mut self, kind: ObjectKind) {
        self.kinds.insert(kind, Kind::default());
        let now = Timestamp::now();
        let mut index = self.state.index_mut();
        let keys: Vec<Key> = index.keys(kind).cloned().collect();
        for key in keys {
            index.apply(Change::Delete(key), now);
        }
        drop(index);
        self.state.forget_source(health::source(kind).0);
    }

    /// Opens the watch of a kind, or opens it anew.
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
        let before = server.offered.replace(offered);
        for kind in OPTIONAL {
            let was = before.as_ref().map(|before| before.contains(&kind));
            match (was, server.watches(kind) == Some(true)) {
                (Some(true), true) | (Some(false), false) => {}
                (_, true) => self.begin(kind, server, watches),
                // With its definition each object is gone.
                (_, false) => {
                    watches.close(kind);
                    self.forget(kind);
                }
            }
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
        self.state.set_source(SourceStatus {
            source: SOURCE,
            up,
            hook,
            why,
            lost: (!up).then_some(LOST),
        });
    }
}
