//! What the pipeline writes and the servers read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use jiff::Timestamp;
use whydrop_ebpf::attempt::AttemptCpu;

use crate::awaited::Awaited;
use crate::cluster::watch::lookups;
use crate::cluster::{Index, ObjectKind};
use crate::event::Outcome;
use crate::explain::denials::Denials;
use crate::explain::worlds::Worlds;
use crate::kube_events;
use crate::output::stream::Stream;
use crate::record::listen::ListenDrops;
use crate::record::{Pair, Record};
use crate::senders::Senders;
use crate::source::accept_queues::AcceptQueues;
use crate::source::conntrack;
use crate::source::drain::Drainer;
use crate::source::hooks;
use crate::source::load::SourceStatus;
use crate::sync::lock;

/// How long a scrape waits for what the kernel has counted meanwhile. A drain takes 10 to 100 ms;
/// past this the scrape answers with what is there.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// Shared by the pipeline and the servers; every lock is held for one short step.
#[derive(Debug)]
pub struct State {
    /// The node's name.
    pub node: Arc<str>,
    /// The kernel's release, as `uname -r` prints it.
    pub kernel: Arc<str>,
    /// When the agent started.
    pub since: jiff::Timestamp,
    /// Who holds which address.
    pub index: RwLock<Index>,
    /// The last events, and everyone who follows them.
    pub stream: Stream,
    /// The counters.
    pub record: Mutex<Record>,
    /// What became of attempts, by who made them.
    pub senders: Mutex<Senders>,
    /// Connections lost to full accept queues.
    pub listen_drops: Mutex<ListenDrops>,
    /// What works, and what was lost.
    pub status: Mutex<Status>,
    /// What went wrong, by stage.
    pub errors: Errors,
    /// Fetches the counts; absent until the programs are attached.
    pub drainer: OnceLock<Drainer>,
    /// Reads the accept queues' counters, and knows the node's network namespaces.
    pub accept_queues: AcceptQueues,
    /// Drops are observed.
    pub observing: AtomicBool,
    /// Since when: what was dropped before, this agent has not seen.
    pub observing_since: OnceLock<Timestamp>,
    /// Addresses whose names are awaited.
    pub awaited: Awaited,
    /// Packets that policies denied.
    pub denials: Denials,
    /// The objects as policies are evaluated on.
    pub worlds: Worlds,
    /// What came of asking for pods by their address.
    pub lookups: lookups::Totals,
    /// What came of telling drops as Kubernetes Events.
    pub kube_events: kube_events::Totals,
}

/// What the pipeline last saw of the kernel side.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// What works, and why not.
    pub sources: Vec<SourceStatus>,
    /// Each attached program.
    pub programs: Vec<ProgramStatus>,
    /// Each map that can become full.
    pub maps: Vec<MapStatus>,
    /// Events that the ring buffer had no room for.
    pub ring_full: u64,
    /// Packets that were counted without their pair, because the flow map was full.
    pub overflow_packets: u64,
    /// Packets that were counted without their reason, because the program was already running.
    pub missed: u64,
    /// Answers that found no room in the flow map.
    pub answers_lost: u64,
    /// Events not sent because of their flow's limit.
    pub limited_flow: u64,
    /// Events not sent because of the CPU's limit.
    pub limited_cpu: u64,
    /// What the programs counted of attempts.
    pub attempts: AttemptCpu,
    /// What the conntrack source has done.
    pub conntrack: conntrack::Totals,
    /// Connects that were not told of because it was not sure that they still waited.
    pub doubtful_connects: u64,
}

impl Status {
    /// Forwarded attempts that conntrack shows and nobody is told of, because there was no room to
    /// follow them or to know whether they are counted already, or because events were lost.
    pub fn lost_forwarded(&self) -> u64 {
        self.conntrack.withheld
            + self.conntrack.untracked
            + self.conntrack.overruns
            + self.attempts.died_lost
    }

    /// Connects that are not counted by their result: there was no room for them, or it was not sure
    /// that they still waited.
    pub fn lost_connects(&self) -> u64 {
        self.attempts.connects_lost + self.attempts.ended_lost + self.doubtful_connects
    }
}

/// An attached program.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ProgramStatus {
    /// As in the eBPF object.
    pub name: String,
    /// Runs, as the kernel counts them (only with `kernel.bpf_stats_enabled`).
    pub runs: u64,
    /// Seconds in it, likewise.
    pub seconds: f64,
}

/// A kernel map that can become full.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct MapStatus {
    /// Its name.
    pub map: &'static str,
    /// Keys when it was last fetched.
    pub entries: u64,
    /// Keys that it has room for.
    pub capacity: u64,
}

/// Counters of what went wrong.
#[derive(Debug, Default)]
pub struct Errors {
    /// Objects and files that could not be used.
    pub objects: Arc<AtomicU64>,
    /// Lists and watches of the API server that failed, by kind.
    pub watch: [AtomicU64; ObjectKind::COUNT],
    /// Events that could not be read.
    pub decode: AtomicU64,
    /// Generations whose counts could not be fetched whole.
    pub drain: AtomicU64,
    /// Looks at what waits that failed.
    pub attempts: AtomicU64,
    /// Network namespaces that could not be looked at, and their counters.
    pub accept_queues: Arc<AtomicU64>,
}

impl Errors {
    /// All of them, by stage.
    pub fn counts(&self) -> [(&'static str, u64); 5] {
        [
            ("objects", self.objects.load(Ordering::Relaxed)),
            ("decode", self.decode.load(Ordering::Relaxed)),
            ("drain", self.drain.load(Ordering::Relaxed)),
            ("attempts", self.attempts.load(Ordering::Relaxed)),
            ("accept_queues", self.accept_queues.load(Ordering::Relaxed)),
        ]
    }
}

impl State {
    /// The state of an agent that has seen nothing yet.
    pub fn new(node: Arc<str>, record: Record, senders: Senders) -> Self {
        let kernel = nix::sys::utsname::uname()
            .map(|name| Arc::from(name.release().to_string_lossy()))
            .unwrap_or_default();
        let errors = Errors::default();
        Self {
            stream: Stream::new(node.clone()),
            node,
            kernel,
            since: jiff::Timestamp::now(),
            index: RwLock::default(),
            listen_drops: Mutex::new(ListenDrops::beside(&record)),
            record: Mutex::new(record),
            senders: Mutex::new(senders),
            status: Mutex::default(),
            accept_queues: AcceptQueues::new(errors.accept_queues.clone()),
            errors,
            drainer: OnceLock::new(),
            observing: AtomicBool::new(false),
            observing_since: OnceLock::new(),
            awaited: Awaited::default(),
            denials: Denials::default(),
            worlds: Worlds::default(),
            lookups: lookups::Totals::default(),
            kube_events: kube_events::Totals::default(),
        }
    }

    /// The rows of `/v1/pairs`: one for each series, most packets first.
    pub async fn pairs(&self) -> serde_json::Value {
        self.flush().await;
        let mut rows = lock(&self.record).snapshot().series;
        rows.sort_by_key(|(_, packets)| std::cmp::Reverse(*packets));
        rows.iter()
            .map(|(series, packets)| {
                let mut row = serde_json::json!({
                    "outcome": series.outcome,
                    "kind": series.kind,
                    "reason": &*series.reason,
                    "packets": packets,
                });
                match &*series.pair {
                    Pair::Other => row["other"] = true.into(),
                    Pair::Ends {
                        source,
                        destination,
                        service,
                        port,
                        protocol,
                    } => {
                        row["source"] = serde_json::json!(source);
                        row["destination"] = serde_json::json!(destination);
                        if let Some((namespace, name)) = service {
                            row["service"] = format!("{namespace}/{name}").into();
                        }
                        if let Some(port) = port {
                            row["port"] = (*port).into();
                        }
                        if let Some(protocol) = protocol {
                            row["protocol"] = protocol.to_string().into();
                        }
                    }
                }
                row
            })
            .collect()
    }

    /// The answer of `/v1/status`.
    pub fn status(&self) -> serde_json::Value {
        let index: serde_json::Map<_, _> = self
            .index()
            .counts()
            .map(|(kind, n)| (kind.to_owned(), n.into()))
            .collect();
        let counters = lock(&self.record).snapshot();
        let mut node_drops = std::collections::BTreeMap::<_, u64>::new();
        for (_, fate, packets) in &counters.node_drops {
            *node_drops.entry(fate.as_str()).or_default() += packets;
        }
        let series = |outcome| {
            counters
                .series
                .iter()
                .filter(|(s, _)| s.outcome == outcome)
                .count()
        };
        let status = lock(&self.status).clone();
        serde_json::json!({
            "node": &*self.node,
            "version": env!("CARGO_PKG_VERSION"),
            "kernel": &*self.kernel,
            "since": format!("{:.0}", self.since),
            "ready": self.ready().is_ok(),
            "observing_since": self.observing_since.get(),
            "sources": status.sources,
            "maps": status.maps,
            "programs": status.programs,
            "index": index,
            "series": {
                "silent": series(Outcome::Dropped),
                "rejected": series(Outcome::Rejected),
                "unanswered": series(Outcome::Unanswered),
                "overflow_packets": counters.overflow_packets,
            },
            "node_drops": node_drops,
            "stream": {
                "readers": self.stream.readers(),
                "kept_lines": self.stream.kept_lines(),
            },
            "lost": {
                "map": status.overflow_packets,
                "recursion": status.missed,
                "ring": status.ring_full,
                "answer": status.answers_lost,
                "connects": status.lost_connects(),
                "dns": status.attempts.queries_lost,
                "conntrack": status.lost_forwarded(),
                "queue": self.stream.lost(crate::event::LostStage::Queue),
                "reader": self.stream.lost(crate::event::LostStage::Reader),
            },
            "limited": { "flow": status.limited_flow, "cpu": status.limited_cpu },
            "errors": self.errors.counts().into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        })
    }

    /// Says nothing more of a source that there is no more.
    pub fn forget_source(&self, source: &str) {
        lock(&self.status).sources.retain(|s| s.source != source);
    }

    /// Says how a source does, in place of what was said of it before. What does not work, works
    /// again, or leaves out something else than before is logged.
    pub fn set_source(&self, now: SourceStatus) {
        let (source, up) = (now.source, now.up);
        let (why, lost) = (now.why.clone(), now.lost.unwrap_or(""));
        let mut status = lock(&self.status);
        let known = status.sources.iter_mut().find(|s| s.source == source);
        let before = match known {
            Some(known) => Some(std::mem::replace(known, now)),
            None => {
                status.sources.push(now);
                None
            }
        };
        drop(status);
        let before = before.as_ref().map(|b| (b.up, b.why.as_deref()));
        match (up, why.as_deref()) {
            now if before == Some(now) => {}
            (false, why) => {
                let why = why.unwrap_or("");
                tracing::warn!(source, why, lost, "a source does not work");
            }
            (true, Some(why)) => tracing::warn!(source, why, "a source leaves something out"),
            (true, None) if before.is_some() => tracing::info!(source, "a source works again"),
            (true, None) => {}
        }
    }

    /// `Ok` when drops are observed, else why they are not.
    pub fn ready(&self) -> Result<(), String> {
        if self.observing.load(Ordering::Relaxed) {
            Ok(())
        } else {
            let status = lock(&self.status);
            let drops = status.sources.iter().find(|s| s.source == hooks::DROPS);
            Err(match drops.and_then(|drops| drops.why.as_ref()) {
                Some(why) => format!("drops are not observed: {why}"),
                None => "drops are not observed yet".to_owned(),
            })
        }
    }

    /// The index, to read.
    pub fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index, to change by one short step.
    pub fn index_mut(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches what the kernel has counted so far, and waits until it is published, or for as long as a
    /// scrape may wait.
    pub async fn flush(&self) {
        if let Some(drainer) = self.drainer.get()
            && tokio::time::timeout(FLUSH_TIMEOUT, drainer.flush())
                .await
                .is_err()
        {
            tracing::debug!("the counts were not fetched in time; answering with the last ones");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Detail;

    #[test]
    fn a_source_is_listed_once_as_it_is_now() {
        let record = Record::new(Detail::Pod, 10, Duration::from_secs(900));
        let senders = Senders::new(Detail::Pod, 10, Duration::from_secs(900));
        let state = State::new("n".into(), record, senders);
        let set = |source, why: Option<&str>| {
            state.set_source(SourceStatus {
                source,
                up: why.is_none(),
                hook: None,
                why: why.map(str::to_owned),
                lost: None,
            });
        };
        set("one", None);
        set("two", Some("not yet"));
        set("one", Some("no more"));
        set("two", None);
        let sources = lock(&state.status).sources.clone();
        let sources: Vec<_> = sources
            .iter()
            .map(|s| (s.source, s.up, s.why.as_deref()))
            .collect();
        assert_eq!(
            sources,
            [("one", false, Some("no more")), ("two", true, None)]
        );
    }
}
