//! The policies of the Admin and Baseline tiers. What their CRDs refuse is refused here too.

use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::policy::RawSelector;
use super::{Fields, Manifest, Metadata, Nothing, shared};
use crate::cluster::objects::{Interner, Key, ObjectKind};
use crate::event::Protocol;
use crate::policy::model::{PortItem, PortMatch};
use crate::policy::tier::{
    Action, PodSet, Tier, TierPeer, TierPolicy, TierPort, TierRule, most_items,
};

type RawPolicy = Manifest<RawSpec, Nothing>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSpec {
    tier: Option<String>,
    priority: Option<i64>,
    subject: Option<RawPeer>,
    ingress: Option<Vec<RawRule>>,
    egress: Option<Vec<RawRule>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawRule {
    name: Option<String>,
    action: Option<String>,
    from: Option<Vec<RawPeer>>,
    to: Option<Vec<RawPeer>>,
    /// Of a ClusterNetworkPolicy.
    protocols: Option<Vec<RawProtocol>>,
    /// Of the kinds that it replaced.
    ports: Option<Vec<RawPort>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPeer {
    namespaces: Option<RawSelector>,
    pods: Option<RawPods>,
    nodes: Option<RawSelector>,
    networks: Option<Vec<String>>,
    domain_names: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPods {
    namespace_selector: Option<RawSelector>,
    pod_selector: Option<RawSelector>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawProtocol {
    tcp: Option<RawDestination>,
    udp: Option<RawDestination>,
    sctp: Option<RawDestination>,
    destination_named_port: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDestination {
    destination_port: Option<RawNumber>,
}

#[derive(Debug, Deserialize)]
struct RawNumber {
    number: Option<i64>,
    range: Option<RawRange>,
}

#[derive(Debug, Deserialize)]
struct RawRange {
    protocol: Option<String>,
    start: i64,
    end: i64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    port_number: Option<RawPortNumber>,
    named_port: Option<String>,
    port_range: Option<RawRange>,
}

#[derive(Debug, Deserialize)]
struct RawPortNumber {
    protocol: Option<String>,
    port: i64,
}

/// What is kept of a policy until its strings are shared.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) metadata: Metadata,
    api_version: Option<String>,
    tier: Tier,
    priority: Option<u16>,
    subject: PodSet,
    ingress: Box<[TierRule]>,
    egress: Box<[TierRule]>,
}

pub(super) fn read(value: &Value, kind: ObjectKind) -> Result<Fields, String> {
    let raw: RawPolicy = super::read(value)?;
    let spec = raw.spec.ok_or("spec: is missing")?;
    let tier = match (kind, spec.tier.as_deref()) {
        (ObjectKind::AdminNetworkPolicy, _) => Tier::Admin,
        (ObjectKind::BaselineAdminNetworkPolicy, _) => Tier::Baseline,
        (_, Some("Admin")) => Tier::Admin,
        (_, Some("Baseline")) => Tier::Baseline,
        (_, Some(other)) => {
            return Err(format!(
                "spec.tier: unknown tier {other:?}: Admin or Baseline"
            ));
        }
        (_, None) => return Err("spec.tier: is missing: Admin or Baseline".into()),
    };
    let priority = match (kind, spec.priority) {
        (ObjectKind::BaselineAdminNetworkPolicy, _) if raw.metadata.name != "default" => {
            return Err("metadata.name: the one that a cluster may have is called default".into());
        }
        (ObjectKind::BaselineAdminNetworkPolicy, _) => None,
        (_, Some(priority)) => match u16::try_from(priority) {
            Ok(priority) if priority <= 1000 => Some(priority),
            _ => return Err(format!("spec.priority: {priority} is not from 0 to 1000")),
        },
        (_, None) => return Err("spec.priority: is missing: 0 to 1000".into()),
    };
    let subject = spec.subject.ok_or("spec.subject: is missing")?;
    let subject = match subject.compile("spec.subject", kind, false)? {
        TierPeer::Pods(pods) => pods,
        _ => return Err("spec.subject: is neither namespaces nor pods".into()),
    };
    let api_version = value.get("apiVersion").and_then(Value::as_str);
    Ok(Fields::Tier(Box::new(Policy {
        api_version: api_version.map(str::to_owned),
        metadata: raw.metadata,
        tier,
        priority,
        subject,
        ingress: rules(spec.ingress, "ingress", kind)?,
        egress: rules(spec.egress, "egress", kind)?,
    })))
}

impl Policy {
    pub(super) fn strip(self, key: &Key, strings: &mut Interner) -> TierPolicy {
        // The items of a list do not say their version.
        let version = self.api_version.unwrap_or_else(|| key.kind.api_version());
        TierPolicy {
            kind: key.kind,
            api_version: strings.get(&version),
            name: key.name.clone(),
            labels: shared(self.metadata.labels, strings),
            created: self.metadata.creation_timestamp,
            tier: self.tier,
            priority: self.priority,
            subject: self.subject,
            ingress: self.ingress,
            egress: self.egress,
        }
    }
}

/// At most so many as the CRD of the kind takes.
fn few<T>(items: Vec<T>, at: &str, kind: ObjectKind) -> Result<Vec<T>, String> {
    let most = most_items(kind);
    match items.len() > most {
        true => Err(format!("{at}: has {} items, more than {most}", items.len())),
        false => Ok(items),
    }
}

fn rules(
    raw: Option<Vec<RawRule>>,
    direction: &str,
    kind: ObjectKind,
) -> Result<Box<[TierRule]>, String> {
    let raw = few(raw.unwrap_or_default(), &format!("spec.{direction}"), kind)?;
    let rules = raw.into_iter().enumerate();
    rules
        .map(|(i, rule)| rule.compile(&format!("spec.{direction}[{i}]"), direction, kind))
        .collect()
}

impl RawRule {
    fn compile(self, at: &str, direction: &str, kind: ObjectKind) -> Result<TierRule, String> {
        let name = self.name.filter(|name| !name.is_empty());
        if name.as_ref().is_some_and(|name| name.chars().count() > 100) {
            return Err(format!("{at}.name: is longer than 100 characters"));
        }
        let accept = Action::Accept.as_str(kind);
        let action = match self.action.as_deref() {
            Some(action) if action == accept => Action::Accept,
            Some("Deny") => Action::Deny,
            Some("Pass") if kind != ObjectKind::BaselineAdminNetworkPolicy => Action::Pass,
            other => {
                let other = other.unwrap_or_default();
                let pass = match kind {
                    ObjectKind::BaselineAdminNetworkPolicy => "",
                    _ => ", Pass",
                };
                return Err(format!(
                    "{at}.action: unknown action {other:?}: {accept}, Deny{pass}"
                ));
            }
        };
        let egress = direction == "egress";
        let (peers, field) = match egress {
            true => (self.to, "to"),
            false => (self.from, "from"),
        };
        let field = format!("{at}.{field}");
        let peers = few(peers.unwrap_or_default(), &field, kind)?;
        if peers.is_empty() {
            return Err(format!("{field}: names no peer"));
        }
        let peers = peers.into_iter().enumerate();
        let peers: Box<[TierPeer]> = peers
            .map(|(i, peer)| peer.compile(&format!("{field}[{i}]"), kind, egress))
            .collect::<Result<_, _>>()?;
        let ports = ports(self.protocols, self.ports, at, kind)?;
        let named = ports.iter().any(|port| matches!(port, TierPort::Named(_)));
        if named && !peers.iter().all(|peer| matches!(peer, TierPeer::Pods(_))) {
            return Err(format!(
                "{field}: a named port is beside peers that have no names for ports"
            ));
        }
        let domains = peers
            .iter()
            .any(|peer| matches!(peer, TierPeer::Domains(_)));
        if domains && action != Action::Accept {
            return Err(format!(
                "{field}: domainNames are for the action {accept} only"
            ));
        }
        Ok(TierRule {
            name: name.map(Arc::from),
            action,
            peers,
            ports,
        })
    }
}

impl RawPeer {
    fn compile(self, at: &str, kind: ObjectKind, egress: bool) -> Result<TierPeer, String> {
        let mut peers = Vec::new();
        if let Some(namespaces) = self.namespaces {
            peers.push(TierPeer::Pods(PodSet {
                namespaces: namespaces.compile(&format!("{at}.namespaces"))?,
                ..PodSet::default()
            }));
        }
        if let Some(pods) = self.pods {
            let at = format!("{at}.pods");
            let Some(pod_selector) = pods.pod_selector else {
                return Err(format!("{at}.podSelector: is missing"));
            };
            if pods.namespace_selector.is_none() && kind != ObjectKind::ClusterNetworkPolicy {
                return Err(format!("{at}.namespaceSelector: is missing"));
            }
            let namespaces = pods.namespace_selector.unwrap_or_default();
            peers.push(TierPeer::Pods(PodSet {
                namespaces: namespaces.compile(&format!("{at}.namespaceSelector"))?,
                pods: pod_selector.compile(&format!("{at}.podSelector"))?,
            }));
        }
        if let Some(nodes) = self.nodes {
            peers.push(TierPeer::Nodes(nodes.compile(&format!("{at}.nodes"))?));
        }
        if let Some(networks) = self.networks {
            peers.push(TierPeer::Networks(self::networks(&networks, at)?));
        }
        if let Some(names) = self.domain_names {
            let names = names.iter().map(|name| Arc::from(&**name));
            peers.push(TierPeer::Domains(names.collect()));
        }
        let peer = peers.pop();
        match (peer, peers.is_empty()) {
            (None, _) => Err(format!("{at}: names no peer")),
            (_, false) => Err(format!("{at}: names more than one kind of peer")),
            (Some(peer), true) => match egress || matches!(peer, TierPeer::Pods(_)) {
                true => Ok(peer),
                false => Err(format!("{at}: takes namespaces or pods only")),
            },
        }
    }
}

fn networks(raw: &[String], at: &str) -> Result<Box<[IpNet]>, String> {
    if raw.is_empty() || raw.len() > 25 {
        return Err(format!("{at}.networks: takes 1 to 25 CIDRs"));
    }
    let parsed = raw.iter().enumerate().map(|(i, text)| {
        let net: Result<IpNet, _> = text.parse();
        let net = net.map(|net| net.trunc());
        net.map_err(|_| format!("{at}.networks[{i}]: {text:?} is no CIDR, as 10.0.0.0/8"))
    });
    parsed.collect()
}

fn ports(
    protocols: Option<Vec<RawProtocol>>,
    ports: Option<Vec<RawPort>>,
    at: &str,
    kind: ObjectKind,
) -> Result<Box<[TierPort]>, String> {
    let (field, other) = match kind {
        ObjectKind::ClusterNetworkPolicy => ("protocols", ports.is_some().then_some("ports")),
        _ => ("ports", protocols.is_some().then_some("protocols")),
    };
    // The API server would leave it out, and the rule would be about every port.
    if let Some(other) = other {
        let kind = kind.as_str();
        return Err(format!("{at}.{other}: {kind} calls this field {field}"));
    }
    let at = format!("{at}.{field}");
    let written = protocols.is_some() || ports.is_some();
    let protocols = few(protocols.unwrap_or_default(), &at, kind)?.into_iter();
    let ports = few(ports.unwrap_or_default(), &at, kind)?.into_iter();
    let protocols = protocols.enumerate();
    let protocols = protocols.map(|(i, protocol)| protocol.compile(&format!("{at}[{i}]")));
    let ports = ports.enumerate();
    let ports = ports.map(|(i, port)| port.compile(&format!("{at}[{i}]")));
    let all: Box<[TierPort]> = protocols.chain(ports).collect::<Result<_, _>>()?;
    match written && all.is_empty() {
        true => Err(format!("{at}: is empty; left out, it is every port")),
        false => Ok(all),
    }
}

/// The only item of several fields.
fn only(items: Vec<TierPort>, at: &str) -> Result<TierPort, String> {
    let [only] = <[TierPort; 1]>::try_from(items)
        .map_err(|items| format!("{at}: has {} of its fields, not one", items.len()))?;
    Ok(only)
}

fn number(n: i64, at: &str) -> Result<u16, String> {
    match u16::try_from(n) {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(format!("{at}: {n} is no port: 1 to 65535")),
    }
}

fn single(protocol: Protocol, n: i64, at: &str) -> Result<TierPort, String> {
    let n = number(n, at)?;
    let port = PortMatch::Range(n, n);
    Ok(TierPort::Number(PortItem { protocol, port }))
}

fn range(protocol: Protocol, raw: &RawRange, at: &str) -> Result<TierPort, String> {
    let from = number(raw.start, &format!("{at}.start"))?;
    let to = number(raw.end, &format!("{at}.end"))?;
    if from >= to {
        return Err(format!("{at}: its end {to} is not above its start {from}"));
    }
    let port = PortMatch::Range(from, to);
    Ok(TierPort::Number(PortItem { protocol, port }))
}

impl RawProtocol {
    fn compile(self, at: &str) -> Result<TierPort, String> {
        let mut items = Vec::new();
        for (protocol, raw, name) in [
            (Protocol::TCP, self.tcp, "tcp"),
            (Protocol::UDP, self.udp, "udp"),
            (Protocol::SCTP, self.sctp, "sctp"),
        ] {
            let Some(raw) = raw else {
                continue;
            };
            let at = format!("{at}.{name}.destinationPort");
            let port = raw.destination_port.ok_or(format!("{at}: is missing"))?;
            items.push(match (port.number, port.range) {
                (Some(n), None) => single(protocol, n, &format!("{at}.number"))?,
                (None, Some(raw)) => range(protocol, &raw, &format!("{at}.range"))?,
                _ => return Err(format!("{at}: takes a number or a range")),
            });
        }
        let named = self.destination_named_port.filter(|name| !name.is_empty());
        items.extend(named.map(|name| TierPort::Named(name.into())));
        only(items, at)
    }
}

impl RawPort {
    fn compile(self, at: &str) -> Result<TierPort, String> {
        let mut items = Vec::new();
        if let Some(raw) = self.port_number {
            let at = format!("{at}.portNumber");
            let protocol = protocol(raw.protocol.as_deref(), &at)?;
            items.push(single(protocol, raw.port, &format!("{at}.port"))?);
        }
        if let Some(raw) = self.port_range {
            let at = format!("{at}.portRange");
            items.push(range(protocol(raw.protocol.as_deref(), &at)?, &raw, &at)?);
        }
        items.extend(self.named_port.map(|name| TierPort::Named(name.into())));
        only(items, at)
    }
}

fn protocol(name: Option<&str>, at: &str) -> Result<Protocol, String> {
    match name {
        None | Some("TCP") => Ok(Protocol::TCP),
        Some("UDP") => Ok(Protocol::UDP),
        Some("SCTP") => Ok(Protocol::SCTP),
        Some(other) => Err(format!(
            "{at}.protocol: unknown protocol {other:?}: TCP, UDP or SCTP"
        )),
    }
}

#[cfg(test)]
#[path = "tier_tests.rs"]
mod tests;
