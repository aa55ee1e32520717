//! The objects that decide about a flow, with the look-ups that evaluating many flows needs.
//!
//! What a fix may change (policies, labels of namespaces) is kept apart from what it cannot (pods,
//! nodes, Services), so that a changed world costs little: a fix is proven in one.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use ipnet::IpNet;

use super::compiled::{self, Compiled, LabelsId, Memo, Sets, UNKNOWN};
use super::model::{Direction, NetworkPolicy};
use super::tier::{Tier, TierPolicy};
use crate::cluster::objects::{
    Endpoints, Key, Labels, Namespace, Node, Object, ObjectKind, Pod, Service,
};

/// The label that the API server gives every namespace since Kubernetes 1.21.
pub const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// A namespace in a [`World`].
pub type NamespaceId = u32;
/// A pod in a [`World`].
pub type PodId = u32;
/// A node in a [`World`].
pub type NodeId = u32;

/// Namespace and name.
type FullName = (Arc<str>, Arc<str>);
/// The policies that count for a pod, for ingress and for egress.
type Indices = [Box<[u32]>; 2];

/// Everything that decides about a flow.
#[derive(Clone, Debug)]
pub struct World {
    pub(super) inventory: Arc<Inventory>,
    pub(super) namespaces: Vec<Arc<Namespace>>,
    /// By namespace.
    policies: Vec<Arc<[Arc<NetworkPolicy>]>>,
    /// By pod, found when it is first asked for: ingress and egress as indices into `policies`.
    isolating: Arc<[OnceLock<Indices>]>,
    /// By namespace, the same laid out for many evaluations; none where a change was made.
    compiled: Vec<Option<Arc<[Compiled]>>>,
    pub(super) memo: Arc<Memo>,
    /// By namespace.
    pub(super) namespace_labels: Vec<LabelsId>,
    /// In the order in which they are asked.
    tiers: Arc<[Arc<TierPolicy>]>,
    /// By pod, as `isolating`, as indices into `tiers`.
    governing: Arc<[OnceLock<Indices>]>,
}

/// What no fix changes.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    pub(super) pods: Vec<Arc<Pod>>,
    pod_namespaces: Vec<NamespaceId>,
    /// By pod.
    pub(super) pod_labels: Vec<LabelsId>,
    on_host_network: Vec<bool>,
    pub(super) nodes: Vec<Arc<Node>>,
    by_name: HashMap<Arc<str>, HashMap<Arc<str>, PodId>>,
    by_ip: HashMap<IpAddr, Vec<PodId>>,
    node_by_ip: HashMap<IpAddr, NodeId>,
    node_by_name: HashMap<Arc<str>, NodeId>,
    namespace_ids: HashMap<Arc<str>, NamespaceId>,
    /// Namespaces that only their pods or policies told of.
    inferred: HashSet<NamespaceId>,
    services: BTreeMap<FullName, Arc<Service>>,
    service_by_ip: HashMap<IpAddr, Arc<Service>>,
    endpoints: HashMap<FullName, Vec<Arc<Endpoints>>>,
}

/// One change of a world.
#[derive(Clone, Debug)]
pub enum Change {
    /// The policy is as this, or new.
    Policy(Arc<NetworkPolicy>),
    /// The policy of this namespace and name is gone.
    NoPolicy(Arc<str>, Arc<str>),
    /// The policy of a tier is as this.
    Tier(Arc<TierPolicy>),
    /// The namespace has these labels.
    Namespace(Arc<Namespace>),
}

impl World {
    /// Takes the objects that matter.
    pub fn new<'a>(objects: impl IntoIterator<Item = &'a Object>) -> Self {
        let mut inventory = Inventory::default();
        let mut namespaces: Vec<Arc<Namespace>> = Vec::new();
        let mut policies: Vec<Arc<NetworkPolicy>> = Vec::new();
        let mut tiers: Vec<Arc<TierPolicy>> = Vec::new();
        for object in objects {
            match object {
                Object::Pod(pod) => inventory.pods.push(pod.clone()),
                Object::Node(node) => inventory.nodes.push(node.clone()),
                Object::Service(service) => {
                    for ip in service.ips() {
                        inventory.service_by_ip.insert(ip, service.clone());
                    }
                    let key = (service.key.namespace.clone(), service.key.name.clone());
                    inventory.services.insert(key, service.clone());
                }
                Object::Endpoints(endpoints) => {
                    if let Some(service) = &endpoints.service {
                        let key = (endpoints.key.namespace.clone(), service.clone());
                        let of_service = inventory.endpoints.entry(key).or_default();
                        of_service.push(endpoints.clone());
                    }
                }
                Object::Namespace(namespace) => {
                    let id = namespaces.len() as NamespaceId;
                    let name = namespace.key.name.clone();
                    if let Entry::Vacant(new) = inventory.namespace_ids.entry(name) {
                        new.insert(id);
                        namespaces.push(with_name_label(namespace));
                    }
                }
                Object::NetworkPolicy(_, policy) => policies.push(policy.clone()),
                Object::TierPolicy(_, policy) => tiers.push(policy.clone()),
                Object::Owner(..) => {}
            }
        }
        let named = inventory.pods.iter().map(|pod| &pod.key.namespace);
        let named = named.chain(policies.iter().map(|policy| &policy.namespace));
        for name in named {
            if !inventory.namespace_ids.contains_key(name) {
                let id = namespaces.len() as NamespaceId;
                inventory.namespace_ids.insert(name.clone(), id);
                inventory.inferred.insert(id);
                namespaces.push(with_name_label(&Namespace {
                    key: Key {
                        kind: ObjectKind::Namespace,
                        namespace: "".into(),
                        name: name.clone(),
                    },
                    labels: Labels::default(),
                }));
            }
        }
        let mut sets = Sets::default();
        inventory.fill(&mut sets);
        let mut by_namespace: Vec<Vec<Arc<NetworkPolicy>>> = vec![Vec::new(); namespaces.len()];
        for policy in policies {
            if let Some(id) = inventory.namespace_ids.get(&policy.namespace) {
                by_namespace[*id as usize].push(policy);
            }
        }
        let policies: Vec<Arc<[_]>> = by_namespace.into_iter().map(Arc::from).collect();
        let labels = namespaces.iter();
        let namespace_labels = labels.map(|namespace| sets.id(&namespace.labels)).collect();
        let (memo, compiled) = compiled::compile(&policies, &sets);
        Self {
            compiled,
            memo: Arc::new(memo),
            namespace_labels,
            isolating: fresh(inventory.pods.len()),
            tiers: in_order(tiers),
            governing: fresh(inventory.pods.len()),
            inventory: Arc::new(inventory),
            namespaces,
            policies,
        }
    }

    /// The world after a change.
    pub fn with(&self, change: &Change) -> Self {
        let mut world = self.clone();
        match change {
            Change::Namespace(namespace) => {
                if let Some(id) = self.inventory.namespace_ids.get(&namespace.key.name) {
                    world.namespaces[*id as usize] = with_name_label(namespace);
                    world.namespace_labels[*id as usize] = UNKNOWN;
                    world.governing = fresh(self.inventory.pods.len());
                }
            }
            Change::Tier(policy) => {
                let is_old =
                    |p: &&Arc<TierPolicy>| (p.kind, &p.name) == (policy.kind, &policy.name);
                let others = self.tiers.iter().filter(|p| !is_old(p)).cloned();
                world.tiers = in_order(others.chain([policy.clone()]).collect());
                world.governing = fresh(self.inventory.pods.len());
            }
            Change::NoPolicy(namespace, name) => {
                if let Some(id) = self.inventory.namespace_ids.get(namespace) {
                    let policies = self.policies[*id as usize].iter();
                    let rest = policies.filter(|policy| policy.name != *name).cloned();
                    world.set_policies(*id, rest.collect());
                }
            }
            Change::Policy(policy) => {
                let Some(id) = self.inventory.namespace_ids.get(&policy.namespace) else {
                    return world;
                };
                let mut policies = self.policies[*id as usize].to_vec();
                match policies.iter_mut().find(|p| p.name == policy.name) {
                    Some(old) => *old = policy.clone(),
                    None => policies.push(policy.clone()),
                }
                world.set_policies(*id, policies.into());
            }
        }
        world
    }

    /// Gives a namespace other policies.
    fn set_policies(&mut self, id: NamespaceId, policies: Arc<[Arc<NetworkPolicy>]>) {
        self.policies[id as usize] = policies;
        self.compiled[id as usize] = None;
        self.isolating = fresh(self.inventory.pods.len());
    }

    /// All pods, ended ones too.
    pub fn pods(&self) -> impl Iterator<Item = (PodId, &Arc<Pod>)> {
        (0..).zip(&self.inventory.pods)
    }

    /// A pod.
    pub fn pod(&self, id: PodId) -> &Arc<Pod> {
        &self.inventory.pods[id as usize]
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Arc<Node> {
        &self.inventory.nodes[id as usize]
    }

    /// The pod of a name.
    pub fn pod_named(&self, namespace: &str, name: &str) -> Option<PodId> {
        self.inventory.by_name.get(namespace)?.get(name).copied()
    }

    /// The pods of the pod network that have an address; the one that started last comes first.
    pub fn pods_at(&self, ip: IpAddr) -> &[PodId] {
        let found = self.inventory.by_ip.get(&ip.to_canonical());
        found.map_or(&[], |ids| ids)
    }

    /// The node that has an address.
    pub fn node_at(&self, ip: IpAddr) -> Option<NodeId> {
        self.inventory.node_by_ip.get(&ip.to_canonical()).copied()
    }

    /// The node of a name.
    pub fn node_named(&self, name: &str) -> Option<NodeId> {
        self.inventory.node_by_name.get(name).copied()
    }

    /// The Service that has an address.
    pub fn service_at(&self, ip: IpAddr) -> Option<&Arc<Service>> {
        self.inventory.service_by_ip.get(&ip.to_canonical())
    }

    /// The Service of a name.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Arc<Service>> {
        let key = (namespace.into(), name.into());
        self.inventory.services.get(&key)
    }

    /// The Services of a namespace.
    pub fn services_of(&self, namespace: &Arc<str>) -> impl Iterator<Item = &Arc<Service>> {
        let first = (namespace.clone(), Arc::from(""));
        let services = self.inventory.services.range(first..);
        let own = services.take_while(move |((of, _), _)| of == namespace);
        own.map(|(_, service)| service)
    }

    /// What lists the endpoints of a Service.
    pub fn endpoints(&self, service: &Service) -> &[Arc<Endpoints>] {
        let key = (service.key.namespace.clone(), service.key.name.clone());
        let found = self.inventory.endpoints.get(&key);
        found.map_or(&[], |endpoints| endpoints)
    }

    /// The nodes' pod ranges.
    pub fn pod_ranges(&self) -> impl Iterator<Item = &IpNet> {
        self.inventory
            .nodes
            .iter()
            .flat_map(|node| &node.pod_ranges)
    }

    /// The namespace of a pod.
    pub fn namespace_of(&self, pod: PodId) -> &Arc<Namespace> {
        &self.namespaces[self.inventory.pod_namespaces[pod as usize] as usize]
    }

    /// Whether a namespace is known, if only by its pods or policies.
    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.inventory.namespace_ids.contains_key(namespace)
    }

    /// Whether the objects hold the namespace itself: else only its name is known of its labels.
    pub fn is_inferred(&self, namespace: &str) -> bool {
        let id = self.inventory.namespace_ids.get(namespace);
        id.is_none_or(|id| self.inventory.inferred.contains(id))
    }

    /// All policies.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<NetworkPolicy>> {
        self.policies.iter().flat_map(|policies| policies.iter())
    }

    /// The policies of a namespace.
    pub fn policies_of(&self, namespace: &str) -> &[Arc<NetworkPolicy>] {
        let id = self.inventory.namespace_ids.get(namespace);
        id.map_or(&[], |id| &self.policies[*id as usize])
    }

    /// The number of a pod's namespace.
    pub(super) fn namespace_id(&self, pod: PodId) -> NamespaceId {
        self.inventory.pod_namespaces[pod as usize]
    }

    /// Whether a pod is on its node's network.
    pub(super) fn is_on_host_network(&self, pod: PodId) -> bool {
        self.inventory.on_host_network[pod as usize]
    }

    /// The policies that isolate a pod.
    pub fn isolating(
        &self,
        pod: PodId,
        direction: Direction,
    ) -> impl Iterator<Item = &Arc<NetworkPolicy>> + Clone {
        let policies = &self.policies[self.namespace_id(pod) as usize];
        let indices = self.isolating_indices(pod, direction);
        indices.iter().map(|i| &policies[*i as usize])
    }

    /// The same as they are laid out for many evaluations; `None` where a change was made.
    pub(super) fn isolating_compiled(
        &self,
        pod: PodId,
        direction: Direction,
    ) -> Option<impl Iterator<Item = (&Arc<NetworkPolicy>, &Compiled)>> {
        let namespace = self.namespace_id(pod) as usize;
        let (policies, compiled) = (
            &self.policies[namespace],
            self.compiled[namespace].as_ref()?,
        );
        let indices = self.isolating_indices(pod, direction).iter();
        Some(indices.map(|i| (&policies[*i as usize], &compiled[*i as usize])))
    }

    fn isolating_indices(&self, pod: PodId, direction: Direction) -> &[u32] {
        let namespace = self.namespace_id(pod);
        let policies = &self.policies[namespace as usize];
        let of_pod = self.isolating[pod as usize].get_or_init(|| {
            let labels = &self.pod(pod).labels;
            let selecting = (0..)
                .zip(policies.iter())
                .filter(|(_, policy)| policy.pod_selector.matches(labels));
            let selecting: Vec<(u32, &Arc<NetworkPolicy>)> = selecting.collect();
            Direction::ALL.map(|direction| {
                let isolating = selecting.iter();
                let isolating = isolating.filter(|(_, policy)| policy.side(direction).isolates);
                isolating.map(|(i, _)| *i).collect()
            })
        });
        of_direction(of_pod, direction)
    }

    /// All policies of the tiers, in the order in which they are asked.
    pub fn tiers(&self) -> &[Arc<TierPolicy>] {
        &self.tiers
    }

    /// The policies of a tier whose subject a pod is and that have rules for the direction, in the
    /// order in which they are asked.
    pub fn governing(
        &self,
        pod: PodId,
        direction: Direction,
        tier: Tier,
    ) -> impl Iterator<Item = &Arc<TierPolicy>> + Clone {
        // Most clusters have none: then no pod is looked at.
        let indices: &[u32] = match self.tiers.is_empty() {
            true => &[],
            false => {
                let of_pod = self.governing[pod as usize].get_or_init(|| {
                    let own = (0..).zip(self.tiers.iter());
                    let own: Vec<_> = own.filter(|(_, p)| self.is_in(pod, &p.subject)).collect();
                    Direction::ALL.map(|direction| {
                        let own = own.iter();
                        let own = own.filter(|(_, policy)| !policy.rules(direction).is_empty());
                        own.map(|(i, _)| *i).collect()
                    })
                });
                of_direction(of_pod, direction)
            }
        };
        let policies = indices.iter().map(|i| &self.tiers[*i as usize]);
        policies.filter(move |policy| policy.tier == tier)
    }
}

fn of_direction(indices: &Indices, direction: Direction) -> &[u32] {
    match direction {
        Direction::Ingress => &indices[0],
        Direction::Egress => &indices[1],
    }
}

fn in_order(mut policies: Vec<Arc<TierPolicy>>) -> Arc<[Arc<TierPolicy>]> {
    policies.sort_by(|a, b| {
        let order = |p: &TierPolicy| (p.tier, p.priority, p.kind);
        order(a).cmp(&order(b)).then_with(|| a.name.cmp(&b.name))
    });
    policies.into()
}

impl Inventory {
    /// The look-ups, once all objects are there.
    fn fill(&mut self, sets: &mut Sets) {
        for (id, pod) in (0..).zip(&self.pods) {
            self.pod_labels.push(sets.id(&pod.labels));
            self.on_host_network.push(pod.host_network);
            let namespace = self.namespace_ids.get(&pod.key.namespace).copied();
            self.pod_namespaces.push(namespace.unwrap_or_default());
            let names = self.by_name.entry(pod.key.namespace.clone()).or_default();
            names.insert(pod.key.name.clone(), id);
            // A host-network pod's addresses are its node's.
            if !pod.ended && !pod.host_network {
                for ip in &pod.ips {
                    self.by_ip.entry(*ip).or_default().push(id);
                }
            }
        }
        for ids in self.by_ip.values_mut() {
            ids.sort_by_key(|id| std::cmp::Reverse(self.pods[*id as usize].started));
        }
        for (id, node) in (0..).zip(&self.nodes) {
            self.node_by_ip.extend(node.ips.iter().map(|ip| (*ip, id)));
            self.node_by_name.insert(node.key.name.clone(), id);
        }
    }
}

fn fresh(pods: usize) -> Arc<[OnceLock<Indices>]> {
    (0..pods).map(|_| OnceLock::new()).collect()
}

fn with_name_label(namespace: &Namespace) -> Arc<Namespace> {
    let mut labels = namespace.labels.to_vec();
    let found = labels.binary_search_by(|(key, _)| (**key).cmp(NAME_LABEL));
    if let Err(at) = found {
        labels.insert(at, (NAME_LABEL.into(), namespace.key.name.clone()));
    }
    Arc::new(Namespace {
        key: namespace.key.clone(),
        labels: labels.into(),
    })
}
