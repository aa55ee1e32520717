//! The index: which pod, node or Service has this address and port, at this time.
//!
//! Time matters because addresses are reused within seconds, and a drop is looked up after it
//! happened. From when an object holds its addresses:
//!
//! | object | from |
//! |---|---|
//! | pod | `status.startTime`; without it always, if it was there at the start, else when it was seen |
//! | Service, node | `creationTimestamp`, else as a pod; an address that it got later, when that was seen |
//!
//! until its end was seen: it was deleted, lost the address, or (a pod) ended with Succeeded or
//! Failed. Of several holders at one time the one that started last is believed, see [`Claims`].
//! What an object declares and says of itself (ports, labels, owners) is taken as it is now.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;

use super::FastMap;
use super::changes::Changes;
use super::claims::{Claims, TOMBSTONE_TTL};
use super::objects::{Change, Enforcer, Key, Labels, Node, Object, ObjectKind, Pod, Port, Service};
use super::ranges::Ranges;
use super::uid::ByUid;
pub use naming::Holder;
use table::Table;

mod naming;
mod table;

/// An address of either family, IPv4's as IPv6 maps it: a claim of one takes half a cache line.
type Address = u128;

fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// Objects and who holds which address. Changes are small steps; look-ups take well under a
/// microsecond and allocate nothing.
#[derive(Debug, Default)]
pub struct Index {
    objects: Table,
    counts: [usize; ObjectKind::COUNT],
    /// NetworkPolicies by namespace.
    policies: BTreeMap<Arc<str>, usize>,
    pods: Claims<Address, Pod>,
    pods_by_uid: ByUid,
    /// Pods that enforce policies on their node.
    enforcers: BTreeMap<Key, Arc<Pod>>,
    nodes: Claims<Address, Node>,
    /// Every address of a Service's own.
    services: Claims<Address, Service>,
    service_ports: Claims<(IpAddr, Port), Service>,
    node_ports: Claims<Port, Service>,
    /// Ports that host-network pods declare, by node.
    host_ports: Claims<(Arc<str>, Port), Pod>,
    /// Services with a selector by target port and namespace. The port comes first because most
    /// that are asked for are a client's, and nobody's target.
    targets: FastMap<Port, FastMap<Arc<str>, Vec<Arc<Service>>>>,
    /// Addresses in endpoints by port, and how many objects list them.
    endpoints: FastMap<Port, FastMap<IpAddr, u32>>,
    pod_ranges: Ranges,
    revision: u64,
    changes: Changes,
    /// More is to be told: an address that nobody has may be anybody's.
    is_partial: bool,
}

/// How much the index keeps of what is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tombstones {
    /// Ended claims that can still be asked for.
    pub kept: usize,
    /// Those forgotten before their time since the start, because there were too many.
    pub evicted_total: u64,
}

/// When an object came, for addresses without a time of their own.
#[derive(Clone, Copy)]
struct Seen {
    at: Timestamp,
    /// It was there before the first look.
    first: bool,
}

impl Seen {
    /// From when an object holds its addresses. A time in the future is another node's clock.
    fn since(self, started: Option<Timestamp>) -> Timestamp {
        match started {
            Some(started) => started.min(self.at),
            None if self.first => Timestamp::MIN,
            None => self.at,
        }
    }
}

impl Index {
    /// Takes in what there was at the start.
    pub fn load(&mut self, objects: impl IntoIterator<Item = Object>, at: Timestamp) {
        for object in objects {
            self.upsert(object, Seen { at, first: true });
        }
    }

    /// Takes in one change that was seen at a time.
    pub fn apply(&mut self, change: Change, at: Timestamp) {
        match change {
            Change::Upsert(object) => self.upsert(object, Seen { at, first: false }),
            Change::Delete(key) => self.delete(&key, at),
        }
    }

    /// Whether what there is was not told whole yet: then no address is called external.
    pub fn set_partial(&mut self, is_partial: bool) {
        self.is_partial = is_partial;
    }

    fn upsert(&mut self, object: Object, seen: Seen) {
        // Most changes of pods are of what is not kept.
        if self.objects.get(object.key()) == Some(&object) {
            return;
        }
        let old = self.objects.insert(object.clone());
        if old.is_none() {
            self.count(object.key(), 1);
        }
        self.revision += 1;
        self.changes
            .upsert(old.as_ref(), &object, seen.at, seen.first);
        match (&old, &object) {
            (Some(Object::Pod(old)), Object::Pod(new)) => self.pod(Some(old), Some(new), seen),
            (_, Object::Pod(new)) => self.pod(None, Some(new), seen),
            (Some(Object::Service(old)), Object::Service(new)) => {
                self.service_changed(Some(old), Some(new), seen);
            }
            (_, Object::Service(new)) => self.service_changed(None, Some(new), seen),
            (Some(Object::Node(old)), Object::Node(new)) => self.node(Some(old), Some(new), seen),
            (_, Object::Node(new)) => self.node(None, Some(new), seen),
            (old, Object::Endpoints(new)) => {
                for (ip, port) in &new.targets {
                    let listed = self.endpoints.entry(*port).or_default();
                    *listed.entry(*ip).or_default() += 1;
                }
                if let Some(old) = old {
                    self.forget_endpoints(old);
                }
            }
            (
                _,
                Object::Owner(..)
                | Object::Namespace(_)
                | Object::NetworkPolicy(..)
                | Object::TierPolicy(..),
            ) => {}
        }
    }

    fn delete(&mut self, key: &Key, at: Timestamp) {
        let Some(old) = self.objects.remove(key) else {
            return;
        };
        self.count(key, -1);
        self.revision += 1;
        self.changes.delete(&old, at);
        let seen = Seen { at, first: false };
        match &old {
            Object::Pod(old) => self.pod(Some(old), None, seen),
            Object::Service(old) => self.service_changed(Some(old), None, seen),
            Object::Node(old) => self.node(Some(old), None, seen),
            Object::Endpoints(_) => self.forget_endpoints(&old),
            Object::Owner(..)
            | Object::Namespace(_)
            | Object::NetworkPolicy(..)
            | Object::TierPolicy(..) => {}
        }
    }

    fn count(&mut self, key: &Key, by: isize) {
        let count = &mut self.counts[key.kind as usize];
        *count = count.saturating_add_signed(by);
        if key.kind == ObjectKind::NetworkPolicy {
            let policies = self.policies.entry(key.namespace.clone()).or_default();
            *policies = policies.saturating_add_signed(by);
            if *policies == 0 {
                self.policies.remove(&key.namespace);
            }
        }
    }

    fn pod(&mut self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>, seen: Seen) {
        let same = old.zip(new).is_some_and(|(old, new)| same_pod(old, new));
        for old in old.into_iter().filter(|old| old.enforcer.is_some()) {
            self.enforcers.remove(&old.key);
        }
        for new in new.into_iter().filter(|new| new.enforcer.is_some()) {
            self.enforcers.insert(new.key.clone(), new.clone());
        }
        self.pods_by_uid.change(old, new, same, seen.at);
        let from = new.map_or(seen.at, |pod| seen.since(pod.started));
        let times = Times { same, from, seen };
        move_claims(&mut self.pods, old, new, times, |pod| {
            match pod.host_network {
                true => Vec::new(),
                false if pod.ended => Vec::new(),
                false => pod.ips.iter().copied().map(address).collect(),
            }
        });
        if let Some((old, new)) = old.zip(new)
            && same
            && ends_with_its_first_address(old, new)
        {
            for ip in distinct(new.ips.iter().copied().map(address).collect()) {
                self.pods.begin(ip, from, new.clone());
                self.pods.end(&ip, new, seen.at);
            }
        }
        move_claims(&mut self.host_ports, old, new, times, |pod| {
            let node = pod.node.as_ref();
            let node = node.filter(|_| pod.host_network && !pod.ended);
            let ports = node.map(|node| pod.ports.iter().map(|port| (node.clone(), *port)));
            ports.into_iter().flatten().collect()
        });
    }

    fn service_changed(
        &mut self,
        old: Option<&Arc<Service>>,
        new: Option<&Arc<Service>>,
        seen: Seen,
    ) {
        let times = Times::lasting(old, new.map(|s| s.created), seen);
        move_claims(&mut self.services, old, new, times, |service| {
            service.ips().map(address).collect()
        });
        move_claims(&mut self.service_ports, old, new, times, |service| {
            let ports = service.ports.iter().map(|p| p.port);
            ports
                .flat_map(|port| service.ips().map(move |ip| (ip, port)))
                .collect()
        });
        move_claims(&mut self.node_ports, old, new, times, |service| {
            service.ports.iter().filter_map(|p| p.on_node()).collect()
        });
        if let Some(old) = old {
            self.forget_targets(old);
        }
        if let Some(new) = new {
            for port in new.targets() {
                let by_namespace = self.targets.entry(port).or_default();
                let services = by_namespace.entry(new.key.namespace.clone());
                services.or_default().push(new.clone());
            }
        }
    }

    fn forget_targets(&mut self, old: &Arc<Service>) {
        for port in old.targets() {
            let Some(by_namespace) = self.targets.get_mut(&port) else {
                continue;
            };
            if let Some(services) = by_namespace.get_mut(&old.key.namespace) {
                services.retain(|service| !Arc::ptr_eq(service, old));
                if services.is_empty() {
                    by_namespace.remove(&old.key.namespace);
                }
            }
            if by_namespace.is_empty() {
                self.targets.remove(&port);
            }
        }
    }

    fn node(&mut self, old: Option<&Arc<Node>>, new: Option<&Arc<Node>>, seen: Seen) {
        let times = Times::lasting(old, new.map(|n| n.created), seen);
        move_claims(&mut self.nodes, old, new, times, |node| {
            node.ips.iter().copied().map(address).collect()
        });
        for range in new.into_iter().flat_map(|node| &node.pod_ranges) {
            self.pod_ranges.add(*range);
        }
        for range in old.into_iter().flat_map(|node| &node.pod_ranges) {
            self.pod_ranges.remove(*range);
        }
    }

    fn forget_endpoints(&mut self, old: &Object) {
        let Object::Endpoints(old) = old else {
            return;
        };
        for (ip, port) in &old.targets {
            let Some(listed) = self.endpoints.get_mut(port) else {
                continue;
            };
            if let Some(times) = listed.get_mut(ip) {
                *times -= 1;
                if *times == 0 {
                    listed.remove(ip);
                }
            }
            if listed.is_empty() {
                self.endpoints.remove(port);
            }
        }
    }

    /// Whether nodes tell which addresses are pods'.
    pub fn knows_pod_ranges(&self) -> bool {
        !self.pod_ranges.is_empty()
    }

    /// Whether a pod is there, ended or not.
    pub fn pod_exists(&self, namespace: &Arc<str>, name: &Arc<str>) -> bool {
        self.pod_named(namespace, name).is_some()
    }

    /// Whether anything may deny a connection.
    pub fn has_policies(&self) -> bool {
        [
            ObjectKind::NetworkPolicy,
            ObjectKind::ClusterNetworkPolicy,
            ObjectKind::AdminNetworkPolicy,
            ObjectKind::BaselineAdminNetworkPolicy,
        ]
        .iter()
        .any(|kind| self.counts[*kind as usize] > 0)
    }

    /// How often an object changed in what is kept of it.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// All objects.
    pub fn objects(&self) -> impl Iterator<Item = &Object> {
        self.objects.values()
    }

    /// The names of all objects of a kind.
    pub fn keys(&self, kind: ObjectKind) -> impl Iterator<Item = &Key> {
        self.objects.keys().filter(move |key| key.kind == kind)
    }

    /// How many objects of each kind there are, by the plural of the kind.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, usize)> {
        ObjectKind::all().map(|kind| (kind.plural(), self.counts[kind as usize]))
    }

    /// How many NetworkPolicies each namespace has; namespaces without any are left out.
    pub fn network_policies(&self) -> &BTreeMap<Arc<str>, usize> {
        &self.policies
    }

    /// The pods that enforce policies on a node.
    pub fn enforcers(&self, node: &str) -> impl Iterator<Item = (&Arc<Pod>, &Enforcer)> {
        let all = self.enforcers.values().filter(|pod| !pod.ended);
        let here = all.filter(move |pod| pod.node.as_deref() == Some(node));
        here.filter_map(|pod| Some((pod, pod.enforcer.as_deref()?)))
    }

    /// What changed last.
    pub fn changes(&self) -> &Changes {
        &self.changes
    }

    /// The labels of a namespace.
    pub fn namespace_labels(&self, name: &Arc<str>) -> Labels {
        let key = Key {
            kind: ObjectKind::Namespace,
            namespace: "".into(),
            name: name.clone(),
        };
        match self.objects.get(&key) {
            Some(Object::Namespace(namespace)) => namespace.labels.clone(),
            _ => Labels::default(),
        }
    }

    /// A pod by its name.
    pub fn pod_named(&self, namespace: &Arc<str>, name: &Arc<str>) -> Option<&Arc<Pod>> {
        let key = Key {
            kind: ObjectKind::Pod,
            namespace: namespace.clone(),
            name: name.clone(),
        };
        match self.objects.get(&key) {
            Some(Object::Pod(pod)) => Some(pod),
            _ => None,
        }
    }

    /// Forgets what ended long ago; to be called now and then. Returns how many claims went.
    pub fn purge(&mut self, now: Timestamp) -> usize {
        self.changes
            .purge(now.checked_sub(TOMBSTONE_TTL).unwrap_or(Timestamp::MIN));
        self.pods.purge(now)
            + self.pods_by_uid.purge(now)
            + self.nodes.purge(now)
            + self.services.purge(now)
            + self.service_ports.purge(now)
            + self.node_ports.purge(now)
            + self.host_ports.purge(now)
    }

    /// How much is kept of what is gone.
    pub fn tombstones(&self) -> Tombstones {
        Tombstones {
            kept: self.pods.tombstones()
                + self.pods_by_uid.tombstones()
                + self.nodes.tombstones()
                + self.services.tombstones()
                + self.service_ports.tombstones()
                + self.node_ports.tombstones()
                + self.host_ports.tombstones(),
            evicted_total: self.pods.evicted()
                + self.pods_by_uid.evicted()
                + self.nodes.evicted()
                + self.services.evicted()
                + self.service_ports.evicted()
                + self.node_ports.evicted()
                + self.host_ports.evicted(),
        }
    }
}

/// Whether two states are of one pod, and not of two that had the name one after the other.
fn same_pod(old: &Pod, new: &Pod) -> bool {
    match (old.uid, new.uid) {
        (Some(old), Some(new)) => old == new,
        _ => old.started == new.started,
    }
}

/// Whether a pod's addresses and its end are told at once, as of a Job's pod that ends before its kubelet tells
/// of it a second time. It had them until then.
fn ends_with_its_first_address(old: &Pod, new: &Pod) -> bool {
    old.ips.is_empty() && !old.ended && new.ended && !new.host_network
}

/// When claims begin and end.
#[derive(Clone, Copy)]
struct Times {
    /// Old and new are one object: claims that both have go on.
    same: bool,
    /// When new claims begin.
    from: Timestamp,
    seen: Seen,
}

impl Times {
    /// Of objects that keep their names for good: what they get later they have from then on.
    fn lasting<T>(old: Option<&T>, created: Option<Option<Timestamp>>, seen: Seen) -> Self {
        Self {
            same: true,
            from: match old {
                Some(_) => seen.at,
                None => seen.since(created.flatten()),
            },
            seen,
        }
    }
}

/// Ends the claims that an object has no more, and begins those that it has now.
fn move_claims<K: std::hash::Hash + Eq + Clone, T>(
    claims: &mut Claims<K, T>,
    old: Option<&Arc<T>>,
    new: Option<&Arc<T>>,
    times: Times,
    keys: impl Fn(&T) -> Vec<K>,
) {
    let (old_keys, new_keys) = (
        old.map_or_else(Vec::new, |old| distinct(keys(old))),
        new.map_or_else(Vec::new, |new| distinct(keys(new))),
    );
    for key in &old_keys {
        match (old, new) {
            (Some(old), Some(new)) if times.same && new_keys.contains(key) => {
                claims.update(key, old, new.clone());
            }
            (Some(old), _) => claims.end(key, old, times.seen.at),
            (None, _) => {}
        }
    }
    for key in new_keys {
        if let Some(new) = new
            && !(times.same && old_keys.contains(&key))
        {
            claims.begin(key, times.from, new.clone());
        }
    }
}

/// What a file says twice is claimed once. There are few.
fn distinct<K: Eq>(mut keys: Vec<K>) -> Vec<K> {
    for at in (0..keys.len()).rev() {
        if keys[..at].contains(&keys[at]) {
            keys.remove(at);
        }
    }
    keys
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "index_property_tests.rs"]
mod property_tests;
