//! A NetworkPolicy's fields. What the API server would refuse is refused here too: it can be in no
//! cluster, so whoever wrote it meant something else.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::{Fields, Manifest, Metadata, Nothing, shared};
use crate::cluster::objects::{Interner, Key};
use crate::event::Protocol;
use crate::policy::model::{Block, NetworkPolicy, Peer, PortItem, PortMatch, Rule, Side};
use crate::policy::selector::{Operator, Requirement, Selector};

type RawPolicy = Manifest<RawSpec, Nothing>;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSpec {
    pod_selector: Option<RawSelector>,
    policy_types: Option<Vec<String>>,
    ingress: Option<Vec<Option<RawRule>>>,
    egress: Option<Vec<Option<RawRule>>>,
}

#[derive(Debug, Default, Deserialize)]
struct RawRule {
    from: Option<Vec<Option<RawPeer>>>,
    to: Option<Vec<Option<RawPeer>>>,
    ports: Option<Vec<Option<RawPort>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPeer {
    pod_selector: Option<RawSelector>,
    namespace_selector: Option<RawSelector>,
    ip_block: Option<RawBlock>,
}

#[derive(Debug, Deserialize)]
struct RawBlock {
    cidr: Option<String>,
    except: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    protocol: Option<String>,
    port: Option<NumberOrName>,
    end_port: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a port number or a port's name")]
enum NumberOrName {
    Number(i64),
    Name(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawSelector {
    match_labels: Option<BTreeMap<String, String>>,
    match_expressions: Option<Vec<RawRequirement>>,
}

#[derive(Debug, Deserialize)]
struct RawRequirement {
    key: String,
    operator: String,
    values: Option<Vec<String>>,
}

/// What is kept of a NetworkPolicy until its strings are shared.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) metadata: Metadata,
    pod_selector: Selector,
    ingress: Side,
    egress: Side,
    types_omitted: bool,
}

pub(super) fn read(value: &Value) -> Result<Fields, String> {
    let raw: RawPolicy = super::read(value)?;
    let spec = raw.spec.unwrap_or_default();
    let types = spec.policy_types.unwrap_or_default();
    for (i, name) in types.iter().enumerate() {
        if !matches!(name.as_str(), "Ingress" | "Egress") {
            return Err(format!(
                "spec.policyTypes[{i}]: unknown type {name:?}: Ingress or Egress"
            ));
        }
    }
    if types.len() > 2 {
        return Err("spec.policyTypes: more than two".into());
    }
    let selector = spec.pod_selector.unwrap_or_default();
    let pod_selector = selector.compile("spec.podSelector")?;
    let ingress = rules(spec.ingress, "ingress")?;
    let egress = rules(spec.egress, "egress")?;
    let named = |name: &str| types.iter().any(|t| t == name);
    let omitted = types.is_empty();
    Ok(Fields::Policy(Box::new(Policy {
        types_omitted: omitted || was_omitted(value),
        metadata: raw.metadata,
        pod_selector,
        ingress: Side {
            isolates: omitted || named("Ingress"),
            rules: ingress,
        },
        egress: Side {
            isolates: named("Egress") || (omitted && !egress.is_empty()),
            rules: egress,
        },
    })))
}

/// The API server writes derived types into the object; what the author wrote is in the annotation
/// that `kubectl apply` leaves.
fn was_omitted(value: &Value) -> bool {
    const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
    let annotations = value.get("metadata").and_then(|m| m.get("annotations"));
    let applied = annotations.and_then(|a| a.get(LAST_APPLIED)?.as_str());
    let applied = applied.and_then(|text| serde_json::from_str::<Value>(text).ok());
    let Some(spec) = applied.as_ref().and_then(|a| a.get("spec")) else {
        return false;
    };
    let types = spec.get("policyTypes").and_then(Value::as_array);
    types.is_none_or(Vec::is_empty)
}

impl Policy {
    pub(super) fn strip(self, key: &Key, strings: &mut Interner) -> NetworkPolicy {
        NetworkPolicy {
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            created: self.metadata.creation_timestamp,
            written: self.metadata.written(),
            labels: shared(self.metadata.labels, strings),
            pod_selector: self.pod_selector,
            ingress: self.ingress,
            egress: self.egress,
            types_omitted: self.types_omitted,
        }
    }
}

fn rules(raw: Option<Vec<Option<RawRule>>>, direction: &str) -> Result<Box<[Rule]>, String> {
    let rules = raw.unwrap_or_default().into_iter().enumerate();
    rules
        .map(|(i, rule)| {
            let rule = rule.unwrap_or_default();
            let (peers, field) = match direction {
                "ingress" => (rule.from, "from"),
                _ => (rule.to, "to"),
            };
            let at = format!("spec.{direction}[{i}]");
            let peers = peers.unwrap_or_default().into_iter().enumerate();
            let ports = rule.ports.unwrap_or_default().into_iter().enumerate();
            Ok(Rule {
                peers: peers
                    .map(|(i, peer)| {
                        peer.unwrap_or_default()
                            .compile(&format!("{at}.{field}[{i}]"))
                    })
                    .collect::<Result<_, String>>()?,
                ports: ports
                    .map(|(i, port)| {
                        port.unwrap_or_default()
                            .compile(&format!("{at}.ports[{i}]"))
                    })
                    .collect::<Result<_, String>>()?,
            })
        })
        .collect()
}

impl RawPeer {
    fn compile(self, at: &str) -> Result<Peer, String> {
        let pods = self.pod_selector;
        let pods = pods.map(|s| s.compile(&format!("{at}.podSelector")));
        let namespaces = self.namespace_selector;
        let namespaces = namespaces.map(|s| s.compile(&format!("{at}.namespaceSelector")));
        match (namespaces.transpose()?, pods.transpose()?, self.ip_block) {
            (None, None, None) => Err(format!("{at}: names no peer")),
            (None, None, Some(block)) => block.compile(&format!("{at}.ipBlock")).map(Peer::Block),
            (_, _, Some(_)) => Err(format!("{at}: an ipBlock beside a selector")),
            (None, Some(pods), None) => Ok(Peer::Pods(pods)),
            (Some(namespaces), None, None) => Ok(Peer::Namespaces(namespaces)),
            (Some(namespaces), Some(pods), None) => Ok(Peer::PodsIn { namespaces, pods }),
        }
    }
}

impl RawBlock {
    fn compile(self, at: &str) -> Result<Block, String> {
        let parse = |text: &str, field: &str| {
            let net: IpNet = text
                .parse()
                .map_err(|_| format!("{at}.{field}: {text:?} is no CIDR, as 10.0.0.0/8"))?;
            Ok::<_, String>(net.trunc())
        };
        let cidr = self.cidr.unwrap_or_default();
        let cidr = parse(&cidr, "cidr")?;
        let except = self.except.unwrap_or_default().into_iter().enumerate();
        let except = except.map(|(i, text)| {
            let net = parse(&text, &format!("except[{i}]"))?;
            match cidr.contains(&net) && net != cidr {
                true => Ok(net),
                false => Err(format!("{at}.except[{i}]: {text} is no part of {cidr}")),
            }
        });
        Ok(Block {
            cidr,
            except: except.collect::<Result<_, String>>()?,
        })
    }
}

impl RawPort {
    fn compile(self, at: &str) -> Result<PortItem, String> {
        let protocol = match self.protocol.as_deref() {
            None | Some("" | "TCP") => Protocol::TCP,
            Some("UDP") => Protocol::UDP,
            Some("SCTP") => Protocol::SCTP,
            Some(other) => {
                return Err(format!(
                    "{at}.protocol: unknown protocol {other:?}: TCP, UDP or SCTP"
                ));
            }
        };
        let number = |n: i64, field: &str| match u16::try_from(n) {
            Ok(n) if n > 0 => Ok(n),
            _ => Err(format!("{at}.{field}: {n} is no port: 1 to 65535")),
        };
        let port = match (self.port, self.end_port) {
            (None, None) => PortMatch::Any,
            (None, Some(_)) => return Err(format!("{at}.endPort: without a port")),
            (Some(NumberOrName::Name(_)), Some(_)) => {
                return Err(format!("{at}.endPort: beside a named port"));
            }
            (Some(NumberOrName::Name(name)), None) => match is_port_name(&name) {
                true => PortMatch::Named(name.into()),
                false => return Err(format!("{at}.port: {name:?} is no name of a port")),
            },
            (Some(NumberOrName::Number(port)), end) => {
                let from = number(port, "port")?;
                let to = end.map_or(Ok(from), |end| number(end, "endPort"))?;
                if to < from {
                    return Err(format!("{at}.endPort: {to} is below port {from}"));
                }
                PortMatch::Range(from, to)
            }
        };
        Ok(PortItem { protocol, port })
    }
}

/// RFC 6335, section 5.1, in lower case.
pub(super) fn is_port_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=15).contains(&bytes.len())
        && bytes
            .iter()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && bytes.iter().any(u8::is_ascii_lowercase)
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.contains("--")
}

impl RawSelector {
    pub(super) fn compile(self, at: &str) -> Result<Selector, String> {
        let mut requirements = Vec::new();
        for (key, value) in self.match_labels.unwrap_or_default() {
            let at = format!("{at}.matchLabels");
            is_key(&key, &at)?;
            is_value(&value, &at)?;
            requirements.push(Requirement {
                key: key.into(),
                operator: Operator::In,
                values: [value.into()].into(),
            });
        }
        let expressions = self.match_expressions.unwrap_or_default();
        for (i, raw) in expressions.into_iter().enumerate() {
            let at = format!("{at}.matchExpressions[{i}]");
            is_key(&raw.key, &at)?;
            let values = raw.values.unwrap_or_default();
            let operator = match raw.operator.as_str() {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                other => {
                    return Err(format!(
                        "{at}.operator: unknown operator {other:?}: \
                         In, NotIn, Exists or DoesNotExist"
                    ));
                }
            };
            let lists = matches!(operator, Operator::In | Operator::NotIn);
            if lists && values.is_empty() {
                return Err(format!("{at}.values: {} needs values", operator.as_str()));
            }
            if !lists && !values.is_empty() {
                return Err(format!("{at}.values: {} takes none", operator.as_str()));
            }
            if operator == Operator::In || operator == Operator::NotIn {
                for value in &values {
                    is_value(value, &format!("{at}.values"))?;
                }
            }
            requirements.push(Requirement {
                key: raw.key.into(),
                operator,
                values: values.into_iter().map(Arc::from).collect(),
            });
        }
        Ok(Selector::new(requirements))
    }
}

/// A name of labels: at most 63 letters, digits, `-`, `_` and `.` that begins and ends with a
/// letter or digit.
fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    bytes.len() <= 63
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn is_key(key: &str, at: &str) -> Result<(), String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    // A DNS subdomain.
    let good = prefix.is_none_or(|p| {
        p.len() <= 253
            && p.split('.').all(|part| {
                !part.is_empty()
                    && !part.starts_with('-')
                    && !part.ends_with('-')
                    && part
                        .bytes()
                        .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
            })
    });
    match good && is_name(name) {
        true => Ok(()),
        false => Err(format!("{at}: {key:?} is no label's key")),
    }
}

fn is_value(value: &str, at: &str) -> Result<(), String> {
    match value.is_empty() || is_name(value) {
        true => Ok(()),
        false => Err(format!("{at}: {value:?} is no label's value")),
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
