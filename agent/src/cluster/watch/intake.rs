//! From the steps of a watch to the index.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::Instant;

use jiff::Timestamp;
use serde_json::Value;

use super::health::causes;
use super::object::{Item, Step};
use super::{Cluster, NAMING, lookups};
use crate::cluster::objects::{Change, Key, ObjectKind};
use crate::source::sys;

impl Cluster {
    /// Takes one step of a kind's watch.
    pub(super) fn step(&mut self, kind: ObjectKind, step: Step) {
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
                // Where the pods of this node alone are watched, one of its name may be on another by now.
                if self.state.awaited.asks() && self.is_here(&key) == Some(false) {
                    return;
                }
                self.state
                    .index_mut()
                    .apply(Change::Delete(key), Timestamp::now());
            }
        }
    }

    /// Whether a pod that is known is of this node.
    fn is_here(&self, key: &Key) -> Option<bool> {
        let index = self.state.index();
        let pod = index
            .pod_named(&key.namespace, &key.name)
            .filter(|_| key.kind == ObjectKind::Pod)?;
        Some(pod.node.as_deref() == Some(&*self.state.node))
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
    pub(super) fn found(&mut self, ip: IpAddr, answer: Result<Value, kube::Error>) {
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
            // A pod of this node is told by its watch in a moment.
            if lookups::is_nobodys(&answer) {
                self.state.awaited.is_nobodys(ip);
            }
            return;
        }
        totals.found.fetch_add(1, Ordering::Relaxed);
        for pod in pods {
            // The answer may be older than what the watch told meanwhile of a pod of that name.
            if self.is_here(pod.key()) == Some(true) {
                continue;
            }
            self.lookups.keep(pod.key().clone());
            self.state.index_mut().load([pod], Timestamp::now());
        }
    }

    /// All objects of a kind were listed: what the index has beyond them went away unseen.
    pub(super) fn complete(&mut self, kind: ObjectKind) {
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
}
