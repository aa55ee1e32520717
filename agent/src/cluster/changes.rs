//! What changed last of all that decides about connections: policies, labels of namespaces, and labels of
//! pods. So that a rollout can be laid beside the first timeout.
//!
//! A change is what an object's watch or file told after the first look: when it was seen, which is a
//! moment after it was made. What happened before the first look is known as far as the object says it:
//! a policy was last written at the latest time in its `managedFields`, else made at its
//! `creationTimestamp`; of labels nothing is known.
//!
//! Pods of a Deployment do not change their labels: new ones have others. So a workload's labels are those
//! of the pod that came last.

use std::collections::VecDeque;
use std::sync::Arc;

use jiff::Timestamp;

use super::FastMap;
use super::objects::{Labels, Object, ObjectKind, Pod};
use crate::event::{LastChange, What, Workload};
use crate::policy::model::NetworkPolicy;
use crate::policy::tier::TierPolicy;

/// Changes that are remembered, the last ones: a rollout of some hundred objects several times over. Some
/// 120 bytes each, and of policies that are gone what they said.
const MAX: usize = 1_024;
/// Labels that differ between the pods of one workload at any time: a revision's, a replica's, a run's.
const OF_ONE: [&str; 10] = [
    "pod-template-hash",
    "controller-revision-hash",
    "pod-template-generation",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    "batch.kubernetes.io/job-completion-index",
    "controller-uid",
    "batch.kubernetes.io/controller-uid",
    "job-name",
    "batch.kubernetes.io/job-name",
];

/// A change, and whom it concerns.
#[derive(Clone, Debug)]
struct Entry {
    at: Timestamp,
    what: What,
    of: Of,
}

#[derive(Clone, Debug)]
enum Of {
    /// As it is, and as it was: either may have concerned a pod.
    Policy([Option<Arc<NetworkPolicy>>; 2]),
    Tier([Option<Arc<TierPolicy>>; 2]),
    Namespace(Arc<str>),
    /// Also of pods without a workload, by their own name.
    Workload(Arc<str>, Arc<Workload>),
}

/// The last changes.
#[derive(Debug, Default)]
pub struct Changes {
    last: VecDeque<Entry>,
    /// When each NetworkPolicy changed last, as far as that is known; namespace and name.
    policies: FastMap<(Arc<str>, Arc<str>), Timestamp>,
    workloads: FastMap<(Arc<str>, Arc<Workload>), OfWorkload>,
}

#[derive(Debug)]
struct OfWorkload {
    /// Of the pod that came last.
    labels: Labels,
    pods: u32,
    /// When the last pod went: a rollout may end all before it starts one.
    empty_since: Timestamp,
}

/// An end of a connection, as far as changes can concern it.
#[derive(Clone, Copy, Debug)]
pub struct Concerned<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// The labels of its namespace.
    pub namespace_labels: &'a Labels,
}

impl Changes {
    /// Notes what a new state of an object changes. `first`: it was there at the first look.
    pub fn upsert(&mut self, old: Option<&Object>, new: &Object, at: Timestamp, first: bool) {
        let what = match old {
            None => What::Created,
            Some(_) => What::Changed,
        };
        match (old, new) {
            (old, Object::NetworkPolicy(key, new)) => {
                let old = match old {
                    Some(Object::NetworkPolicy(_, old)) => Some(old.clone()),
                    _ => None,
                };
                if old.as_ref().is_some_and(|old| old.decides_as(new)) {
                    return;
                }
                let time = match first {
                    true => new.written.or(new.created),
                    false => Some(at),
                };
                if let Some(time) = time {
                    let name = (key.namespace.clone(), key.name.clone());
                    self.policies.insert(name, time);
                    self.push(time, what, Of::Policy([Some(new.clone()), old]));
                }
            }
            (old, Object::TierPolicy(_, new)) => {
                let old = match old {
                    Some(Object::TierPolicy(_, old)) => Some(old.clone()),
                    _ => None,
                };
                let time = match first {
                    true => new.created,
                    false => Some(at),
                };
                if old.as_ref() != Some(new)
                    && let Some(time) = time
                {
                    self.push(time, what, Of::Tier([Some(new.clone()), old]));
                }
            }
            (Some(Object::Namespace(old)), Object::Namespace(new)) if old.labels != new.labels => {
                self.push(at, What::Labels, Of::Namespace(new.key.name.clone()));
            }
            (old, Object::Pod(new)) => {
                let old = match old {
                    Some(Object::Pod(old)) => Some(old),
                    _ => None,
                };
                self.pod(old, new, at, first);
            }
            _ => {}
        }
    }

    fn pod(&mut self, old: Option<&Arc<Pod>>, new: &Arc<Pod>, at: Timestamp, first: bool) {
        let is_same = |old: &&Arc<Pod>| old.workload == new.workload && old.key == new.key;
        let old = match old {
            Some(old) if !is_same(&old) => {
                self.forget(old, at);
                None
            }
            old => old,
        };
        // A pod of an earlier revision goes on being told of, as it was.
        if old.is_some_and(|old| old.labels == new.labels) {
            return;
        }
        let key = (new.key.namespace.clone(), runs(new));
        let known = self.workloads.entry(key).or_insert_with(|| OfWorkload {
            labels: new.labels.clone(),
            pods: 0,
            empty_since: at,
        });
        known.pods += u32::from(old.is_none());
        // Shared where they are equal, which is nearly always.
        if Arc::ptr_eq(&known.labels, &new.labels) {
            return;
        }
        let is_other = !same_but_for_one(&known.labels, &new.labels);
        known.labels = new.labels.clone();
        if is_other && !first {
            let of = Of::Workload(new.key.namespace.clone(), runs(new));
            self.push(at, What::Labels, of);
        }
    }

    fn forget(&mut self, old: &Pod, at: Timestamp) {
        let key = (old.key.namespace.clone(), runs(old));
        if let Some(known) = self.workloads.get_mut(&key) {
            known.pods = known.pods.saturating_sub(1);
            known.empty_since = at;
        }
    }

    /// Notes that an object is gone.
    pub fn delete(&mut self, old: &Object, at: Timestamp) {
        match old {
            Object::NetworkPolicy(key, old) => {
                let name = (key.namespace.clone(), key.name.clone());
                self.policies.remove(&name);
                self.push(at, What::Deleted, Of::Policy([Some(old.clone()), None]));
            }
            Object::TierPolicy(_, old) => {
                self.push(at, What::Deleted, Of::Tier([Some(old.clone()), None]));
            }
            Object::Pod(old) => self.forget(old, at),
            _ => {}
        }
    }

    fn push(&mut self, at: Timestamp, what: What, of: Of) {
        // Nearly always at the end: those of the first look come in no order.
        let place = self.last.partition_point(|known| known.at <= at);
        self.last.insert(place, Entry { at, what, of });
        if self.last.len() > MAX {
            self.last.pop_front();
        }
    }

    /// Forgets workloads that had no pod since a moment.
    pub fn purge(&mut self, since: Timestamp) {
        self.workloads
            .retain(|_, known| known.pods > 0 || known.empty_since > since);
    }

    /// When each NetworkPolicy changed last, by namespace and name; of some it is not known.
    pub fn policies(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>, Timestamp)> {
        let policies = self.policies.iter();
        policies.map(|((namespace, name), at)| (namespace, name, *at))
    }

    /// The last change until a moment that concerns one of these ends.
    pub fn last_before(&self, ends: &[Concerned<'_>], until: Timestamp) -> Option<LastChange> {
        let past = self.last.partition_point(|entry| entry.at <= until);
        let mut newest_first = self.last.range(..past).rev();
        let entry = newest_first.find(|entry| ends.iter().any(|end| entry.of.concerns(end)))?;
        let (kind, namespace, name) = entry.of.named();
        Some(LastChange {
            kind,
            namespace,
            name,
            what: entry.what,
            time: entry.at,
            seconds_before_first_drop: None,
        })
    }
}

impl Of {
    fn concerns(&self, end: &Concerned<'_>) -> bool {
        match self {
            Self::Policy(states) => states.iter().flatten().any(|policy| {
                policy.namespace == end.pod.key.namespace
                    && policy.pod_selector.matches(&end.pod.labels)
            }),
            Self::Tier(states) => states.iter().flatten().any(|policy| {
                policy.subject.namespaces.matches(end.namespace_labels)
                    && policy.subject.pods.matches(&end.pod.labels)
            }),
            Self::Namespace(name) => *name == end.pod.key.namespace,
            Self::Workload(namespace, workload) => {
                *namespace == end.pod.key.namespace && *workload == runs(end.pod)
            }
        }
    }

    /// Kind, namespace and name.
    fn named(&self) -> (String, String, String) {
        let namespaced = |kind: &str, namespace: &str, name: &str| {
            (kind.to_owned(), namespace.to_owned(), name.to_owned())
        };
        match self {
            Self::Policy(states) => {
                let policy = states.iter().flatten().next();
                let (namespace, name) = policy.map_or(("", ""), |p| (&*p.namespace, &*p.name));
                namespaced("NetworkPolicy", namespace, name)
            }
            Self::Tier(states) => {
                let policy = states.iter().flatten().next();
                let (kind, name) = policy.map_or(("", ""), |p| (p.kind.as_str(), &*p.name));
                namespaced(kind, "", name)
            }
            Self::Namespace(name) => namespaced("Namespace", "", name),
            Self::Workload(namespace, workload) => {
                namespaced(&workload.kind, namespace, &workload.name)
            }
        }
    }
}

/// What runs a pod, as far as it tells itself; a bare pod runs itself.
fn runs(pod: &Pod) -> Arc<Workload> {
    let itself = || Workload {
        kind: ObjectKind::Pod.as_str().into(),
        name: pod.key.name.clone(),
    };
    pod.workload.clone().unwrap_or_else(|| itself().into())
}

/// Whether labels differ at most in those that each pod may have of its own.
fn same_but_for_one(a: &Labels, b: &Labels) -> bool {
    fn kept(labels: &Labels) -> impl Iterator<Item = &(Arc<str>, Arc<str>)> {
        let labels = labels.iter();
        labels.filter(|(key, _)| !OF_ONE.contains(&&**key))
    }
    kept(a).eq(kept(b))
}

#[cfg(test)]
#[path = "changes_tests.rs"]
mod tests;
