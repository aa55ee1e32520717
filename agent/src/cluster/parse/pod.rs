//! A pod's fields, and what runs it.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Deserialize;

use super::{Address, Manifest, Metadata, addresses, both, canonical, shared};
use crate::cluster::objects::{Enforcer, Interner, Key, Pod, Port};
use crate::cluster::uid::UidHash;
use crate::event::{Protocol, Workload};
use crate::policy::cni;

pub(super) type RawPod = Manifest<PodSpec, PodStatus>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodSpec {
    node_name: Option<String>,
    host_network: Option<bool>,
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
}

#[derive(Debug, Deserialize)]
struct Container {
    ports: Option<Vec<ContainerPort>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    container_port: u16,
    protocol: Option<Protocol>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodStatus {
    phase: Option<String>,
    start_time: Option<Timestamp>,
    #[serde(rename = "podIP", default, deserialize_with = "addresses::one")]
    pod_ip: Option<IpAddr>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<Address>>,
    container_statuses: Option<Vec<ContainerStatus>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerStatus {
    ready: Option<bool>,
    restart_count: Option<u64>,
}

impl ContainerStatus {
    /// How all containers of an enforcer do.
    fn of_enforcer(cni: &'static str, all: &[Self]) -> Box<Enforcer> {
        Box::new(Enforcer {
            cni,
            is_ready: !all.is_empty() && all.iter().all(|c| c.ready == Some(true)),
            restarts: all.iter().filter_map(|c| c.restart_count).sum(),
        })
    }
}

impl RawPod {
    pub(super) fn strip(self, key: Key, strings: &mut Interner) -> Pod {
        let controller = self.metadata.controller(strings);
        let workload = controller
            .clone()
            .map(|owner| top_of(owner, &self.metadata, strings));
        let spec = self.spec.unwrap_or(PodSpec {
            node_name: None,
            host_network: None,
            containers: None,
            init_containers: None,
        });
        let containers = spec.containers.into_iter().flatten();
        let containers = containers.chain(spec.init_containers.into_iter().flatten());
        let ports = containers.flat_map(|c| c.ports.unwrap_or_default());
        let mut port_names = Vec::new();
        let mut ports: Vec<Port> = ports
            .map(|p| {
                let port = Port {
                    protocol: p.protocol.unwrap_or(Protocol::TCP),
                    port: p.container_port,
                };
                let name = p.name.filter(|name| !name.is_empty());
                port_names.extend(name.map(|name| (strings.get(&name), port)));
                port
            })
            .collect();
        ports.sort_unstable();
        ports.dedup();
        let (mut ended, mut started, mut ips) = (false, None, Vec::new());
        let static_uid = self.metadata.static_uid();
        let labels = shared(self.metadata.labels, strings);
        let host_network = spec.host_network.unwrap_or(false);
        let cni = cni::of_labels(&labels).filter(|_| host_network);
        let mut enforcer = cni.map(|cni| ContainerStatus::of_enforcer(cni, &[]));
        if let Some(status) = self.status {
            let containers = status.container_statuses.unwrap_or_default();
            enforcer = cni.map(|cni| ContainerStatus::of_enforcer(cni, &containers));
            ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
            started = status.start_time;
            let plural = status.pod_ips;
            let plural = plural.map(|ips| ips.into_iter().map(|a| a.ip).collect());
            ips = both(plural, status.pod_ip);
        }
        Pod {
            key,
            uid: self.metadata.uid.as_deref().map(UidHash::of),
            static_uid,
            node: spec.node_name.map(|name| strings.get(&name)),
            ips: canonical(ips),
            host_network,
            ended,
            started,
            labels,
            ports: strings.ports(ports),
            port_names: strings.port_names(port_names),
            controller,
            workload,
            enforcer,
        }
    }
}

/// The owner's own owner, where names tell it: a Deployment names its ReplicaSets
/// `NAME-POD_TEMPLATE_HASH`, a CronJob its Jobs `NAME-SCHEDULED_MINUTE` (8 digits and more).
fn top_of(owner: Arc<Workload>, pod: &Metadata, strings: &mut Interner) -> Arc<Workload> {
    let top = match &*owner.kind {
        "ReplicaSet" => {
            let labels = pod.labels.as_ref();
            labels
                .and_then(|labels| labels.get("pod-template-hash"))
                .and_then(|hash| owner.name.strip_suffix(hash.as_str())?.strip_suffix('-'))
                .map(|name| ("Deployment", name))
        }
        "Job" => owner.name.rsplit_once('-').and_then(|(name, minute)| {
            let is_minute = minute.len() >= 8 && minute.bytes().all(|b| b.is_ascii_digit());
            is_minute.then_some(("CronJob", name))
        }),
        _ => None,
    };
    match top {
        Some((kind, name)) if !name.is_empty() => strings.workload(kind, name),
        _ => owner,
    }
}
