//! The cluster side of an agent, without programs in the kernel, following a server.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::Config;
use whydrop::cluster::ObjectKind;
use whydrop::cluster::index::Holder;
use whydrop::cluster::watch::{self, Reach, Times};
use whydrop::event::Endpoint;
use whydrop::record::{Detail, Record};
use whydrop::senders::Senders;
use whydrop::state::State;

/// Nothing takes this long, on any machine.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// One that follows until it is dropped.
pub struct Follower {
    state: Arc<State>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Follower {
    /// Follows a configuration.
    pub fn start(config: Config) -> Self {
        Self::reaching(config, Reach::Cluster)
    }

    /// Follows a configuration, and these pods of it.
    pub fn reaching(config: Config, reach: Reach) -> Self {
        Self::with(reach, move || {
            let config = config.clone();
            async move { Ok(config) }
        })
    }

    /// Follows by a configuration that is asked for each time that it connects.
    pub fn with<F>(reach: Reach, configuration: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Config, String>> + Send + 'static,
    {
        let record = Record::new(Detail::Pod, 100, DEADLINE);
        let senders = Senders::new(Detail::Pod, 100, DEADLINE);
        let state = Arc::new(State::new("node-a".into(), record, senders));
        let times = Times {
            watch: Duration::from_secs(240),
            discovery: Duration::from_secs(2),
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
            state,
            task: tokio::spawn(run),
        }
    }

    /// Waits until something is so.
    ///
    /// # Panics
    /// It does not become so; with what the agent says of itself.
    pub async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(self) {
            let status = self.state.status();
            assert!(Instant::now() < deadline, "not so: {what}; {status:#}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Says that something concerns an address, as the pipeline does; whether its name is awaited.
    pub fn concerns(&self, ip: &str) -> bool {
        let mut end = Endpoint {
            ip: ip.parse().ok(),
            ..Endpoint::default()
        };
        let index = self.state.index();
        index.name(&mut end, None, Timestamp::now());
        let knows_ranges = index.knows_pod_ranges();
        drop(index);
        self.state
            .awaited
            .awaits(&end, knows_ranges, Instant::now())
    }

    /// What came of look-ups by address, by result.
    pub fn lookups(&self, result: &str) -> u64 {
        let counts = self.state.lookups.counts(0);
        counts
            .iter()
            .find(|(r, _)| *r == result)
            .map_or(0, |(_, n)| *n)
    }

    /// How many objects of a kind it knows, by the kind's plural.
    pub fn count(&self, kind: &str) -> usize {
        let index = self.state.index();
        let mut counts = index.counts();
        counts
            .find(|(plural, _)| *plural == kind)
            .map_or(0, |(_, n)| n)
    }

    /// The pod that had an address at a time.
    pub fn holder(&self, ip: &str, at: Timestamp) -> Option<String> {
        let index = self.state.index();
        match index.holder(ip.parse().ok()?, at)? {
            Holder::Pod(pod) => Some(pod.key.name.to_string()),
            _ => None,
        }
    }

    /// The pod that has an address now.
    pub fn now(&self, ip: &str) -> Option<String> {
        self.holder(ip, Timestamp::now())
    }

    /// Errors of lists and watches of a kind.
    pub fn errors(&self, kind: ObjectKind) -> u64 {
        self.state.errors.watch[kind as usize].load(Ordering::Relaxed)
    }

    /// Whether a source works, and why not.
    pub fn source(&self, name: &str) -> Option<(bool, String)> {
        let status = self.state.status();
        let mut sources = status["sources"].as_array()?.iter();
        let source = sources.find(|s| s["source"] == name)?;
        let why = source["why"].as_str().unwrap_or("").to_owned();
        Some((source["up"] == true, why))
    }

    /// Whether a source works.
    pub fn works(&self, name: &str) -> bool {
        self.source(name).is_some_and(|(up, _)| up)
    }
}
