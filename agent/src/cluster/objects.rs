//! Kubernetes objects, stripped to what is used: an index of 150,000 pods must stay small.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;

use super::FastSet;
use super::uid::UidHash;
use crate::event::{Protocol, Workload};
use crate::policy::model::NetworkPolicy;
use crate::policy::tier::TierPolicy;

/// The kinds that are used; all others are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectKind {
    /// `v1`.
    Pod,
    /// `v1`.
    Service,
    /// `discovery.k8s.io/v1`.
    EndpointSlice,
    /// `v1`, what endpoint slices replaced.
    Endpoints,
    /// `v1`.
    Node,
    /// `v1`.
    Namespace,
    /// `apps/v1`: known for its owner.
    ReplicaSet,
    /// `batch/v1`: known for its owner.
    Job,
    /// `networking.k8s.io/v1`.
    NetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha2`.
    ClusterNetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha1`, what ClusterNetworkPolicies of the Admin tier replaced.
    AdminNetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha1`, what those of the Baseline tier replaced.
    BaselineAdminNetworkPolicy,
}

/// The API group of the policies above and below NetworkPolicies.
const TIERS: &str = "policy.networking.k8s.io";

impl ObjectKind {
    /// How many kinds there are.
    pub const COUNT: usize = Self::TABLE.len();

    /// Every kind with its API group, its name in manifests and its plural.
    const TABLE: [(Self, &'static str, &'static str, &'static str); 12] = [
        (Self::Pod, "", "Pod", "pods"),
        (Self::Service, "", "Service", "services"),
        (
            Self::EndpointSlice,
            "discovery.k8s.io",
            "EndpointSlice",
            "endpointslices",
        ),
        (Self::Endpoints, "", "Endpoints", "endpoints"),
        (Self::Node, "", "Node", "nodes"),
        (Self::Namespace, "", "Namespace", "namespaces"),
        (Self::ReplicaSet, "apps", "ReplicaSet", "replicasets"),
        (Self::Job, "batch", "Job", "jobs"),
        (
            Self::NetworkPolicy,
            "networking.k8s.io",
            "NetworkPolicy",
            "networkpolicies",
        ),
        (
            Self::ClusterNetworkPolicy,
            TIERS,
            "ClusterNetworkPolicy",
            "clusternetworkpolicies",
        ),
        (
            Self::AdminNetworkPolicy,
            TIERS,
            "AdminNetworkPolicy",
            "adminnetworkpolicies",
        ),
        (
            Self::BaselineAdminNetworkPolicy,
            TIERS,
            "BaselineAdminNetworkPolicy",
            "baselineadminnetworkpolicies",
        ),
    ];

    /// All kinds.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::TABLE.into_iter().map(|(kind, ..)| kind)
    }

    /// The kind that a manifest names. The group counts: others have a `Service`, a `Job` or a
    /// `NetworkPolicy` too (Knative, Volcano, Calico). The version does not.
    pub fn of(api_version: &str, kind: &str) -> Option<Self> {
        let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        Self::TABLE
            .into_iter()
            .find(|(_, g, k, _)| *g == group && *k == kind)
            .map(|(kind, ..)| kind)
    }

    /// The name in manifests, as `Pod`.
    pub fn as_str(self) -> &'static str {
        Self::TABLE[self as usize].2
    }

    /// The plural of the API, as `pods`: the label of `whydrop_index_objects`.
    pub fn plural(self) -> &'static str {
        Self::TABLE[self as usize].3
    }

    /// The API group; empty for the core one.
    pub fn group(self) -> &'static str {
        Self::TABLE[self as usize].1
    }

    /// The version of the API, as `v1`.
    pub fn version(self) -> &'static str {
        match self {
            Self::ClusterNetworkPolicy => "v1alpha2",
            Self::AdminNetworkPolicy | Self::BaselineAdminNetworkPolicy => "v1alpha1",
            _ => "v1",
        }
    }

    /// The group with its version, as `discovery.k8s.io/v1`.
    pub fn api_version(self) -> String {
        match self.group() {
            "" => self.version().to_owned(),
            group => format!("{group}/{}", self.version()),
        }
    }

    /// Whether objects of this kind live in a namespace.
    pub const fn is_namespaced(self) -> bool {
        !matches!(
            self,
            Self::Node
                | Self::Namespace
                | Self::ClusterNetworkPolicy
                | Self::AdminNetworkPolicy
                | Self::BaselineAdminNetworkPolicy
        )
    }
}

/// What an object is called.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Its kind.
    pub kind: ObjectKind,
    /// Its namespace; empty for kinds that have none.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// A port that a pod or a Service declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port {
    /// TCP where the object does not say.
    pub protocol: Protocol,
    /// The number.
    pub port: u16,
}

/// A pod. In this order in memory: what names an end comes first and lies in two cache lines, of the four
/// that a look-up would wait for in a large cluster.
#[derive(Clone, Debug, PartialEq)]
#[repr(C)]
pub struct Pod {
    /// Its name.
    pub key: Key,
    /// `spec.nodeName`.
    pub node: Option<Arc<str>>,
    /// The top of its owners as far as the pod itself tells.
    pub workload: Option<Arc<Workload>>,
    /// Ports of its containers, restartable init containers among them.
    pub ports: Arc<[Port]>,
    /// Tells it from an earlier pod of the same name.
    pub uid: Option<UidHash>,
    /// The UID of the static pod that this one mirrors: the kubelet's own, which its cgroups
    /// carry.
    pub static_uid: Option<UidHash>,
    /// `status.podIPs` (and `podIP`) of both families.
    pub ips: Box<[IpAddr]>,
    /// `spec.hostNetwork`: the addresses are its node's.
    pub host_network: bool,
    /// Its phase is Succeeded or Failed: it holds no address any more.
    pub ended: bool,
    /// `status.startTime`.
    pub started: Option<Timestamp>,
    /// Sorted by key.
    pub labels: Labels,
    /// What its containers call their ports. One name may stand for several numbers.
    pub port_names: PortNames,
    /// Its controlling owner as the reference says it: often a ReplicaSet or a Job.
    pub controller: Option<Arc<Workload>>,
    /// What its status says, if it is one of those who enforce policies on their node.
    pub enforcer: Option<Box<Enforcer>>,
}

/// How the pod does that enforces policies on its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enforcer {
    /// What is called so: the CNI.
    pub cni: &'static str,
    /// All its containers are.
    pub is_ready: bool,
    /// Restarts of all its containers.
    pub restarts: u64,
}

impl Pod {
    /// Every UID that it is known by.
    pub fn uids(&self) -> impl Iterator<Item = UidHash> {
        self.uid.into_iter().chain(self.static_uid)
    }
}

/// A Service.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Its name.
    pub key: Key,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// `spec.clusterIPs`; empty for a headless Service. Each belongs to this Service alone.
    pub cluster_ips: Box<[IpAddr]>,
    /// `spec.externalIPs` and the addresses of its load balancer, which several Services may share
    /// and which may be a node's own.
    pub other_ips: Box<[IpAddr]>,
    /// Its ports.
    pub ports: Box<[ServicePort]>,
    /// `spec.selector`, sorted by key; empty where somebody else writes the endpoints.
    pub selector: Labels,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name, by which endpoints refer to it; empty where it has none.
    pub name: Arc<str>,
    /// What the sender asks for.
    pub port: Port,
    /// The port of the pods; `None` where it is a name, which is then a container's port anyway.
    pub target_port: Option<u16>,
    /// That name.
    pub target_name: Option<Arc<str>>,
    /// The port on every node.
    pub node_port: Option<u16>,
}

impl Service {
    /// All addresses of its own; none twice.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> {
        let others = self.other_ips.iter();
        let others = others.filter(|ip| !self.cluster_ips.contains(ip));
        self.cluster_ips.iter().chain(others).copied()
    }

    /// The ports of the pods that it selects. Those that it gives by name are containers' ports
    /// anyway; one without a selector has endpoints for that.
    pub fn targets(&self) -> impl Iterator<Item = Port> {
        let ports = self.ports.iter().filter(|_| !self.selector.is_empty());
        ports.filter_map(|p| {
            Some(Port {
                protocol: p.port.protocol,
                port: p.target_port?,
            })
        })
    }
}

impl ServicePort {
    /// Its port on every node.
    pub fn on_node(&self) -> Option<Port> {
        Some(Port {
            protocol: self.port.protocol,
            port: self.node_port?,
        })
    }
}

/// An EndpointSlice or Endpoints object: ports that a Service sends to.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoints {
    /// Its name.
    pub key: Key,
    /// The Service that it belongs to, in its namespace.
    pub service: Option<Arc<str>>,
    /// What its ports are called; empty for one without a name.
    pub port_names: Box<[(Arc<str>, Port)]>,
    /// Each address, ready or not, with each of its ports.
    pub targets: Box<[(IpAddr, Port)]>,
}

/// A node.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Its name.
    pub key: Key,
    /// When it joined.
    pub created: Option<Timestamp>,
    /// `status.addresses` of the types InternalIP and ExternalIP.
    pub ips: Box<[IpAddr]>,
    /// `spec.podCIDRs` (and `podCIDR`).
    pub pod_ranges: Box<[IpNet]>,
    /// Sorted by key: policies of the tiers select nodes by them.
    pub labels: Labels,
}

/// A namespace.
#[derive(Clone, Debug, PartialEq)]
pub struct Namespace {
    /// Its name.
    pub key: Key,
    /// Sorted by key.
    pub labels: Labels,
}

/// One object. Owners are kept by name only. Three words, whatever the kind: there are many pods.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A pod.
    Pod(Arc<Pod>),
    /// A Service.
    Service(Arc<Service>),
    /// An EndpointSlice or Endpoints object.
    Endpoints(Arc<Endpoints>),
    /// A node.
    Node(Arc<Node>),
    /// A ReplicaSet or a Job, and what controls it.
    Owner(Box<(Key, Option<Arc<Workload>>)>),
    /// A namespace.
    Namespace(Arc<Namespace>),
    /// A NetworkPolicy.
    NetworkPolicy(Box<Key>, Arc<NetworkPolicy>),
    /// A ClusterNetworkPolicy, AdminNetworkPolicy or BaselineAdminNetworkPolicy.
    TierPolicy(Box<Key>, Arc<TierPolicy>),
}

impl Object {
    /// What it is called.
    pub fn key(&self) -> &Key {
        match self {
            Self::Pod(o) => &o.key,
            Self::Service(o) => &o.key,
            Self::Endpoints(o) => &o.key,
            Self::Node(o) => &o.key,
            Self::Namespace(o) => &o.key,
            Self::Owner(owner) => &owner.0,
            Self::NetworkPolicy(key, _) | Self::TierPolicy(key, _) => key,
        }
    }
}

/// One step of the cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The object is there, new or changed.
    Upsert(Object),
    /// It is gone.
    Delete(Key),
}

/// Labels or a selector, sorted by key.
pub type Labels = Arc<[(Arc<str>, Arc<str>)]>;

/// What ports are called.
pub type PortNames = Arc<[(Arc<str>, Port)]>;

/// Whether labels have all that a selector asks for. An empty selector selects nothing, as in a
/// Service.
pub fn selects(selector: &Labels, labels: &Labels) -> bool {
    !selector.is_empty()
        && selector.iter().all(|(key, value)| {
            labels
                .binary_search_by(|(k, _)| k.cmp(key))
                .is_ok_and(|i| labels[i].1 == *value)
        })
}

/// Makes what is equal one allocation: namespaces, nodes and workloads repeat, and all pods of a
/// workload have the same labels and ports.
#[derive(Debug, Default)]
pub struct Interner {
    strings: FastSet<Arc<str>>,
    workloads: FastSet<Arc<Workload>>,
    labels: FastSet<Labels>,
    ports: FastSet<Arc<[Port]>>,
    port_names: FastSet<PortNames>,
}

/// The one copy of a list.
fn shared<T: Eq + std::hash::Hash>(known: &mut FastSet<Arc<[T]>>, list: Vec<T>) -> Arc<[T]> {
    if let Some(known) = known.get(list.as_slice()) {
        return known.clone();
    }
    let new: Arc<[T]> = list.into();
    known.insert(new.clone());
    new
}

impl Interner {
    /// The one copy of a string.
    pub fn get(&mut self, s: &str) -> Arc<str> {
        if let Some(known) = self.strings.get(s) {
            return known.clone();
        }
        let new: Arc<str> = s.into();
        self.strings.insert(new.clone());
        new
    }

    /// The one copy of a workload.
    pub fn workload(&mut self, kind: &str, name: &str) -> Arc<Workload> {
        let new = Workload {
            kind: self.get(kind),
            name: self.get(name),
        };
        if let Some(known) = self.workloads.get(&new) {
            return known.clone();
        }
        let new = Arc::new(new);
        self.workloads.insert(new.clone());
        new
    }

    /// The one copy of labels, sorted by key.
    pub fn labels(&mut self, labels: Vec<(Arc<str>, Arc<str>)>) -> Labels {
        shared(&mut self.labels, labels)
    }

    /// The one copy of ports.
    pub fn ports(&mut self, ports: Vec<Port>) -> Arc<[Port]> {
        shared(&mut self.ports, ports)
    }

    /// The one copy of named ports.
    pub fn port_names(&mut self, names: Vec<(Arc<str>, Port)>) -> PortNames {
        shared(&mut self.port_names, names)
    }

    /// Forgets what nobody uses any more.
    pub fn purge(&mut self) {
        self.labels.retain(|list| Arc::strong_count(list) > 1);
        self.ports.retain(|list| Arc::strong_count(list) > 1);
        self.port_names.retain(|list| Arc::strong_count(list) > 1);
        self.workloads.retain(|w| Arc::strong_count(w) > 1);
        self.strings.retain(|s| Arc::strong_count(s) > 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect()
    }

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (i, kind) in ObjectKind::all().enumerate() {
            assert_eq!(kind as usize, i);
        }
    }

    #[test]
    fn the_group_tells_kinds_of_one_name_apart() {
        assert_eq!(ObjectKind::of("v1", "Service"), Some(ObjectKind::Service));
        assert_eq!(ObjectKind::of("serving.knative.dev/v1", "Service"), None);
        assert_eq!(
            ObjectKind::of("networking.k8s.io/v1", "NetworkPolicy"),
            Some(ObjectKind::NetworkPolicy)
        );
        assert_eq!(
            ObjectKind::of("projectcalico.org/v3", "NetworkPolicy"),
            None
        );
        let tiers = ObjectKind::of("policy.networking.k8s.io/v1beta1", "ClusterNetworkPolicy");
        assert_eq!(tiers, Some(ObjectKind::ClusterNetworkPolicy));
    }

    #[test]
    fn kinds_that_are_no_v1_say_their_version() {
        for (kind, version) in [
            (ObjectKind::Pod, "v1"),
            (ObjectKind::NetworkPolicy, "networking.k8s.io/v1"),
            (
                ObjectKind::ClusterNetworkPolicy,
                "policy.networking.k8s.io/v1alpha2",
            ),
            (
                ObjectKind::AdminNetworkPolicy,
                "policy.networking.k8s.io/v1alpha1",
            ),
            (
                ObjectKind::BaselineAdminNetworkPolicy,
                "policy.networking.k8s.io/v1alpha1",
            ),
        ] {
            assert_eq!(kind.api_version(), version);
        }
    }

    #[test]
    fn a_selector_asks_for_each_of_its_labels() {
        let pod = labels(&[("app", "web"), ("tier", "front")]);
        assert!(selects(&labels(&[("tier", "front")]), &pod));
        assert!(selects(&pod, &pod));
        assert!(!selects(&labels(&[("app", "db")]), &pod));
        assert!(!selects(&labels(&[("app", "web"), ("zone", "a")]), &pod));
        assert!(!selects(&labels(&[]), &pod));
    }

    #[test]
    fn interned_strings_are_shared_and_forgotten() {
        let mut interner = Interner::default();
        let a = interner.get("shop");
        let b = interner.get("shop");
        assert!(Arc::ptr_eq(&a, &b));
        interner.purge();
        assert_eq!(interner.strings.len(), 1);
        drop((a, b));
        interner.purge();
        assert_eq!(interner.strings.len(), 0);
    }
}
