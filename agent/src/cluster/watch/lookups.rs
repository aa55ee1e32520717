//! With `--watch node` this node's pods are watched, and others asked for by their address when
//! something concerns them.
//!
//! What such a pod does later is not told, so what was found counts for [`LASTS`] and is then asked for
//! again. An API server finds a pod's address only by going through all pods, and only its first
//! address (`status.podIP`): so look-ups are few.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use hyper::Request;
use kube::Client;
use serde_json::Value;

use crate::cluster::objects::{Interner, Key, Object};
use crate::cluster::parse::parse;

/// How long what was found is believed.
const LASTS: Duration = Duration::from_secs(10);
/// Look-ups at one time.
const AT_ONCE: usize = 4;
/// Look-ups in a burst, and how many more each second after it: at most what a small part of an API
/// server answers when all agents of a large cluster ask.
const BURST: f64 = 20.0;
const PER_SECOND: f64 = 2.0;
/// A server that takes longer is too late: nobody waits for the answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What came of look-ups.
#[derive(Debug, Default)]
pub struct Totals {
    /// The address is a pod's.
    pub found: AtomicU64,
    /// It is nobody's.
    pub none: AtomicU64,
    /// The API server did not say.
    pub error: AtomicU64,
    /// Not asked, because too many were.
    pub limited: AtomicU64,
}

impl Totals {
    /// All of them, by result. `unasked`: those that did not even come so far.
    pub fn counts(&self, unasked: u64) -> [(&'static str, u64); 4] {
        let mut counts = [
            ("found", &self.found),
            ("none", &self.none),
            ("error", &self.error),
            ("limited", &self.limited),
        ]
        .map(|(name, count)| (name, count.load(Ordering::Relaxed)));
        counts[3].1 += unasked;
        counts
    }
}

type Answer = (IpAddr, Result<Value, kube::Error>);
type Asking = futures_util::future::BoxFuture<'static, Answer>;

/// Questions that wait for their answer, and what was answered lately.
pub struct Lookups {
    asking: FuturesUnordered<Asking>,
    found: HashMap<Key, Instant>,
    tokens: f64,
    refilled: Instant,
}

impl Default for Lookups {
    fn default() -> Self {
        Self {
            asking: FuturesUnordered::new(),
            found: HashMap::new(),
            tokens: BURST,
            refilled: Instant::now(),
        }
    }
}

impl Lookups {
    /// Whether one more may be asked now.
    pub fn has_room(&self) -> bool {
        self.asking.len() < AT_ONCE
    }

    /// Whether no answer is waited for.
    pub fn is_idle(&self) -> bool {
        self.asking.is_empty()
    }

    /// Asks who has an address, unless too many were asked for.
    pub fn ask(&mut self, client: &Client, ip: IpAddr, totals: &Totals) {
        let now = Instant::now();
        let refill = now.duration_since(self.refilled).as_secs_f64() * PER_SECOND;
        self.tokens = (self.tokens + refill).min(BURST);
        self.refilled = now;
        if self.tokens < 1.0 {
            totals.limited.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.tokens -= 1.0;
        let client = client.clone();
        self.asking
            .push(Box::pin(async move { (ip, ask(client, ip).await) }));
    }

    /// The next answer; for ever without one where nothing is asked.
    pub async fn answered(&mut self) -> Answer {
        match self.asking.next().await {
            Some(answer) => answer,
            None => std::future::pending().await,
        }
    }

    /// A pod was found.
    pub fn keep(&mut self, key: Key) {
        self.found.insert(key, Instant::now());
    }

    /// A pod is watched now, or is gone: how long it is believed is no question any more.
    pub fn forget(&mut self, key: &Key) {
        self.found.remove(key);
    }

    /// Pods that are believed no longer.
    pub fn expired(&mut self) -> Vec<Key> {
        let is_old = |since: &Instant| since.elapsed() >= LASTS;
        let old: Vec<Key> = self
            .found
            .iter()
            .filter(|(_, since)| is_old(since))
            .map(|(key, _)| key.clone())
            .collect();
        self.found.retain(|_, since| !is_old(since));
        old
    }
}

/// The pods that have an address, as the API server's cache has them.
async fn ask(client: Client, ip: IpAddr) -> Result<Value, kube::Error> {
    let query = form_urlencoded::Serializer::new(String::new())
        .append_pair("fieldSelector", &format!("status.podIP={ip}"))
        .append_pair("resourceVersion", "0")
        .finish();
    let request = Request::get(format!("/api/v1/pods?{query}")).body(Vec::new());
    let request = request.map_err(kube::Error::HttpError)?;
    match tokio::time::timeout(TIMEOUT, client.request(request)).await {
        Ok(answer) => answer,
        Err(_) => Err(kube::Error::Service(
            format!("no answer within {} s", TIMEOUT.as_secs()).into(),
        )),
    }
}

/// Whether an answer says that nobody has the address.
pub fn is_nobodys(answer: &Value) -> bool {
    answer["items"].as_array().is_some_and(Vec::is_empty)
}

/// The pods of an answer that hold addresses of their own; those of a node are watched anyway.
pub fn pods(answer: &Value, node: &str, strings: &mut Interner) -> Vec<Object> {
    let items = answer["items"].as_array();
    items
        .into_iter()
        .flatten()
        .filter_map(|item| parse(item, Some(("v1", "PodList"))).ok()?)
        .map(|parsed| parsed.strip(strings))
        .filter(|object| match object {
            Object::Pod(pod) => {
                let elsewhere = pod.node.as_deref().is_some_and(|of| of != node);
                elsewhere && !pod.host_network && !pod.ended
            }
            _ => false,
        })
        .collect()
}
