//! What `whydrop tail` and `/v1/drops` select by: Hubble's flags and their meaning.
//!
//! A flag repeated is OR, different flags are AND. `--not` negates the one flag behind it; an event
//! is out if any negated flag matches it. (Hubble joins negated flags of different names by AND;
//! here each stands for itself, as one reads it.) Lines about losses pass every selection.
//!
//! Pods and services match by prefix: `NS/PREFIX`; `NS/` is all of a namespace. As in Hubble, a
//! bare `PREFIX` is looked for in the namespaces that `--namespace` (for `--from-pod` also
//! `--from-namespace`, for `--to-pod` `--to-namespace`) gives, else in `default`.
//!
//! As query parameters of `/v1/drops` the flags have the same names without `--`, a repeated flag
//! is a repeated key, and a negated one has the prefix `not.`:
//! `namespace=shop&port=80&port=443&not.to-pod=shop/web-`.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::event::{Endpoint, Event, Kind, Line, Outcome, Protocol};

/// A flag that selects. The order is that of `--help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "`help` is their documentation")]
pub enum Flag {
    Namespace,
    FromNamespace,
    ToNamespace,
    Pod,
    FromPod,
    ToPod,
    Service,
    Ip,
    FromIp,
    ToIp,
    Port,
    Protocol,
    Kind,
    Outcome,
    Reason,
    Policy,
    NodeName,
}

impl Flag {
    /// All flags; the index is the flag as a number.
    pub const ALL: [Self; 17] = [
        Self::Namespace,
        Self::FromNamespace,
        Self::ToNamespace,
        Self::Pod,
        Self::FromPod,
        Self::ToPod,
        Self::Service,
        Self::Ip,
        Self::FromIp,
        Self::ToIp,
        Self::Port,
        Self::Protocol,
        Self::Kind,
        Self::Outcome,
        Self::Reason,
        Self::Policy,
        Self::NodeName,
    ];

    const fn row(self) -> [&'static str; 3] {
        match self {
            Self::Namespace => ["namespace", "NS", "Either end is in this namespace"],
            Self::FromNamespace => ["from-namespace", "NS", "The sender is in this namespace"],
            Self::ToNamespace => ["to-namespace", "NS", "The receiver is in this namespace"],
            Self::Pod => [
                "pod",
                "NS/NAME",
                "Either end is a pod whose name begins so (NS/ for all of a namespace; without NS/ \
                 in --namespace, else in default)",
            ],
            Self::FromPod => ["from-pod", "NS/NAME", "The sender is such a pod"],
            Self::ToPod => ["to-pod", "NS/NAME", "The receiver is such a pod"],
            Self::Service => [
                "service",
                "NS/NAME",
                "The sender asked for a Service whose name begins so",
            ],
            Self::Ip => [
                "ip",
                "IP|CIDR",
                "Either end has this address, or the Service asked for",
            ],
            Self::FromIp => ["from-ip", "IP|CIDR", "The sender has this address"],
            Self::ToIp => [
                "to-ip",
                "IP|CIDR",
                "The receiver has this address, or the Service asked for",
            ],
            Self::Port => [
                "port",
                "PORT",
                "Either end has this port, or the Service asked for",
            ],
            Self::Protocol => [
                "protocol",
                "PROTOCOL",
                "TCP, UDP, SCTP, ICMP, ICMPv6 or a number",
            ],
            Self::Kind => ["kind", "KIND", "syn, dns or packet"],
            Self::Outcome => ["outcome", "OUTCOME", "dropped, rejected or unanswered"],
            Self::Reason => [
                "reason",
                "REASON",
                "The kernel's drop reason, as NETFILTER_DROP",
            ],
            Self::Policy => [
                "policy",
                "NS/NAME",
                "A NetworkPolicy that explains the drop; without NS/ in any namespace",
            ],
            Self::NodeName => [
                "node-name",
                "NODE",
                "The node that saw it; * stands for anything",
            ],
        }
    }

    /// The long flag without `--`, and the query parameter.
    pub const fn name(self) -> &'static str {
        self.row()[0]
    }

    /// What stands for the value in `--help`.
    pub const fn value_name(self) -> &'static str {
        self.row()[1]
    }

    /// The line in `--help`.
    pub const fn help(self) -> &'static str {
        self.row()[2]
    }

    /// The flag of this [`Flag::name`].
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|flag| flag.name() == name)
    }

    fn parse(self, s: &str) -> Result<Value, SelectionError> {
        let wrong = |expected: &'static str| SelectionError::Value {
            flag: self.name(),
            value: s.to_owned(),
            expected,
        };
        if s.is_empty() {
            return Err(wrong("it needs a value"));
        }
        Ok(match self {
            Self::Namespace | Self::FromNamespace | Self::ToNamespace => {
                if s.contains('/') {
                    return Err(wrong("expected the name of a namespace"));
                }
                Value::Text(s.to_owned())
            }
            Self::Pod | Self::FromPod | Self::ToPod | Self::Service | Self::Policy => {
                let (namespace, name) = match s.split_once('/') {
                    Some((namespace, name)) => (Some(namespace), name),
                    None => (None, s),
                };
                if namespace == Some("") || name.contains('/') {
                    return Err(wrong("expected NAMESPACE/NAME"));
                }
                Value::Named(namespace.map(str::to_owned), name.to_owned())
            }
            Self::Ip | Self::FromIp | Self::ToIp => {
                let net = s
                    .parse()
                    .or_else(|_| s.parse::<IpAddr>().map(IpNet::from))
                    .map_err(|_| wrong("expected an IP address or a CIDR, as 10.0.0.0/8"))?;
                Value::Net(net.trunc())
            }
            Self::Port => match s.parse() {
                Ok(0) | Err(_) => return Err(wrong("expected a port from 1 to 65535")),
                Ok(port) => Value::Port(port),
            },
            Self::Protocol => Value::Protocol(s.parse().map_err(|_| {
                wrong("expected TCP, UDP, SCTP, ICMP, ICMPv6 or a number up to 255")
            })?),
            Self::Kind => Value::Kind(
                [Kind::Syn, Kind::Dns, Kind::Packet]
                    .into_iter()
                    .find(|k| k.as_str().eq_ignore_ascii_case(s))
                    .ok_or_else(|| wrong("expected syn, dns or packet"))?,
            ),
            Self::Outcome => Value::Outcome(
                [Outcome::Dropped, Outcome::Rejected, Outcome::Unanswered]
                    .into_iter()
                    .find(|o| o.as_str().eq_ignore_ascii_case(s))
                    .ok_or_else(|| wrong("expected dropped, rejected or unanswered"))?,
            ),
            Self::Reason => {
                let upper = s.to_ascii_uppercase();
                let reason = upper.strip_prefix("SKB_DROP_REASON_").unwrap_or(&upper);
                Value::Text(reason.to_owned())
            }
            Self::NodeName => Value::Text(s.to_owned()),
        })
    }

    fn matches(self, value: &Value, event: &Event) -> bool {
        let (from, to) = (&event.source, &event.destination);
        match self {
            Self::Namespace => value.is_namespace(from) || value.is_namespace(to),
            Self::FromNamespace => value.is_namespace(from),
            Self::ToNamespace => value.is_namespace(to),
            Self::Pod => value.is_pod(from) || value.is_pod(to),
            Self::FromPod => value.is_pod(from),
            Self::ToPod => value.is_pod(to),
            Self::Service => [from, to].into_iter().any(|end| value.is_service(end)),
            Self::Ip => value.has_ip(from) || value.has_ip(to),
            Self::FromIp => value.has_ip(from),
            Self::ToIp => value.has_ip(to),
            Self::Port => value.has_port(from) || value.has_port(to),
            Self::Protocol => matches!(value, Value::Protocol(p) if event.protocol == Some(*p)),
            Self::Kind => matches!(value, Value::Kind(k) if event.kind == *k),
            Self::Outcome => matches!(value, Value::Outcome(o) if event.outcome == *o),
            Self::Reason => {
                let reason = event.drop.as_ref().and_then(|d| d.reason.as_deref());
                matches!(value, Value::Text(t) if reason.is_some_and(|r| r == t.as_str()))
            }
            Self::Policy => event.explanation.iter().flat_map(|e| &e.policies).any(|p| {
                match (value, p.split_once('/')) {
                    (Value::Named(ns, name), Some((policy_ns, policy))) => {
                        ns.as_deref().is_none_or(|ns| ns == policy_ns)
                            && (name == policy || name.is_empty())
                    }
                    _ => false,
                }
            }),
            Self::NodeName => matches!(value, Value::Text(t) if glob(t, &event.node)),
        }
    }
}

/// A parsed value. Bare pod and service names have their namespace once a [`Selection`] holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Text(String),
    Named(Option<String>, String),
    Net(IpNet),
    Port(u16),
    Protocol(Protocol),
    Kind(Kind),
    Outcome(Outcome),
}

impl Value {
    fn is_namespace(&self, end: &Endpoint) -> bool {
        let Self::Text(wanted) = self else {
            return false;
        };
        let service = end.service.as_ref().map(|s| &s.namespace);
        [end.namespace.as_ref(), service]
            .into_iter()
            .flatten()
            .any(|ns| **ns == **wanted)
    }

    fn is_named(&self, namespace: &str, name: &str) -> bool {
        matches!(self, Self::Named(Some(ns), prefix) if ns == namespace && name.starts_with(prefix))
    }

    fn is_pod(&self, end: &Endpoint) -> bool {
        match (&end.namespace, &end.pod) {
            (Some(namespace), Some(pod)) => self.is_named(namespace, pod),
            _ => false,
        }
    }

    fn is_service(&self, end: &Endpoint) -> bool {
        end.service
            .as_ref()
            .is_some_and(|s| self.is_named(&s.namespace, &s.name))
    }

    fn has_ip(&self, end: &Endpoint) -> bool {
        let service = end.service.as_ref().map(|s| s.ip);
        let Self::Net(net) = self else { return false };
        [end.ip, service]
            .into_iter()
            .flatten()
            .any(|ip| net.contains(&ip))
    }

    fn has_port(&self, end: &Endpoint) -> bool {
        let Self::Port(port) = self else {
            return false;
        };
        end.port == Some(*port) || end.service.as_ref().and_then(|s| s.port) == Some(*port)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Named(None, name) => f.write_str(name),
            Self::Named(Some(namespace), name) => write!(f, "{namespace}/{name}"),
            Self::Net(net) if net.prefix_len() == net.max_prefix_len() => net.addr().fmt(f),
            Self::Net(net) => net.fmt(f),
            Self::Port(port) => port.fmt(f),
            Self::Protocol(protocol) => protocol.fmt(f),
            Self::Kind(kind) => f.write_str(kind.as_str()),
            Self::Outcome(outcome) => f.write_str(outcome.as_str()),
        }
    }
}

/// Whether `text` is `pattern`, in which `*` stands for any characters.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let (first, last) = (parts.next().unwrap_or_default(), parts.next_back());
    let Some(last) = last else {
        return pattern == text;
    };
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    // The leftmost place of each part leaves the most for those behind it.
    for part in parts {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// Why a selection cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectionError {
    /// No flag has this name.
    #[error("there is no selection {0:?}")]
    Unknown(String),
    /// A flag's value does not fit it.
    #[error("{flag} {value:?}: {expected}")]
    Value {
        /// [`Flag::name`]
        flag: &'static str,
        /// As it was given.
        value: String,
        /// What is wrong with it, or what it should be.
        expected: &'static str,
    },
}

/// Which lines a reader wants; the default is all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection(Vec<Term>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Term {
    not: bool,
    flag: Flag,
    value: Value,
}

impl Selection {
    /// From flags in any order; `true` negates.
    ///
    /// # Errors
    /// The first value that does not fit its flag.
    pub fn new<S: AsRef<str>>(
        flags: impl IntoIterator<Item = (bool, Flag, S)>,
    ) -> Result<Self, SelectionError> {
        let terms = flags
            .into_iter()
            .map(|(not, flag, value)| {
                let value = flag.parse(value.as_ref())?;
                Ok(Term { not, flag, value })
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self(terms.iter().flat_map(|t| t.named(&terms)).collect()))
    }

    /// From the query parameters of `/v1/drops` (see the module).
    ///
    /// # Errors
    /// The first parameter that is unknown or whose value does not fit it.
    pub fn from_query<S: AsRef<str>>(
        parameters: impl IntoIterator<Item = (S, S)>,
    ) -> Result<Self, SelectionError> {
        let flags = parameters
            .into_iter()
            .map(|(key, value)| {
                let key = key.as_ref();
                let name = key.strip_prefix("not.");
                let flag = Flag::by_name(name.unwrap_or(key))
                    .ok_or_else(|| SelectionError::Unknown(key.to_owned()))?;
                Ok((name.is_some(), flag, value))
            })
            .collect::<Result<Vec<_>, _>>()?;
        Self::new(flags)
    }

    /// As query parameters; [`Selection::from_query`] makes the same selection of them.
    pub fn to_query(&self) -> impl Iterator<Item = (String, String)> {
        self.0.iter().map(|term| {
            let not = if term.not { "not." } else { "" };
            (format!("{not}{}", term.flag.name()), term.value.to_string())
        })
    }

    /// Whether events of a node can be selected, as far as its name tells.
    pub fn may_be_on(&self, node: &str) -> bool {
        let of_nodes = || self.0.iter().filter(|term| term.flag == Flag::NodeName);
        let matches =
            |term: &Term| matches!(&term.value, Value::Text(pattern) if glob(pattern, node));
        let mut wanted = of_nodes().filter(|term| !term.not).peekable();
        let is_wanted = wanted.peek().is_none() || wanted.any(matches);
        is_wanted && !of_nodes().any(|term| term.not && matches(term))
    }

    /// Whether a reader with this selection gets the line.
    pub fn matches(&self, line: &Line) -> bool {
        let Line::Event(event) = line else {
            return true;
        };
        // One bit a flag: which were asked for, which of them matched.
        let (mut asked, mut met) = (0u32, 0u32);
        for term in &self.0 {
            let matches = term.flag.matches(&term.value, event);
            if term.not && matches {
                return false;
            }
            if !term.not {
                let bit = 1 << term.flag as u32;
                asked |= bit;
                met |= if matches { bit } else { 0 };
            }
        }
        asked == met
    }
}

impl Term {
    /// This term, or what it stands for if it is a pod or service without a namespace.
    fn named(&self, all: &[Self]) -> Vec<Self> {
        let side = match self.flag {
            Flag::Pod | Flag::Service => Flag::Namespace,
            Flag::FromPod => Flag::FromNamespace,
            Flag::ToPod => Flag::ToNamespace,
            _ => return vec![self.clone()],
        };
        let Value::Named(None, name) = &self.value else {
            return vec![self.clone()];
        };
        let given = |flag| {
            all.iter()
                .filter(move |t| t.flag == flag && !t.not)
                .map(|t| t.value.to_string())
        };
        let mut namespaces: Vec<_> = given(side).collect();
        if namespaces.is_empty() {
            namespaces = given(Flag::Namespace).collect();
        }
        if namespaces.is_empty() {
            namespaces.push("default".to_owned());
        }
        namespaces
            .into_iter()
            .map(|namespace| Self {
                value: Value::Named(Some(namespace), name.clone()),
                ..*self
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
