//! The evaluator against a second one that shares nothing with it: it reads the manifests' JSON as
//! the specification is written, without defaults set before, look-ups or compiled selectors.

use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;
use serde_json::{Value, json};

use self::tiers::Asked;
use super::*;
use crate::policy::testing;
use crate::policy::world::World;

#[path = "proposal_property_tests.rs"]
mod proposal;
#[path = "naive_tier_tests.rs"]
mod tiers;

/// Choices out of a list of numbers: shrinking the list makes a smaller cluster.
struct Tape<'a>(std::slice::Iter<'a, u16>);

impl Tape<'_> {
    fn below(&mut self, n: usize) -> usize {
        self.0.next().map_or(0, |x| usize::from(*x) % n)
    }

    fn one<'b, T: ?Sized>(&mut self, of: &[&'b T]) -> &'b T {
        of[self.below(of.len())]
    }

    fn labels(&mut self) -> Value {
        let mut labels = json!({});
        for key in ["a", "b"] {
            match self.below(3) {
                0 => {}
                n => labels[key] = json!(["x", "y"][n - 1]),
            }
        }
        labels
    }

    fn selector(&mut self) -> Value {
        let key = self.one(&["a", "b"]);
        let value = self.one(&["x", "y"]);
        match self.below(8) {
            0 | 1 => json!({}),
            2 | 3 => json!({"matchLabels": {key: value}}),
            4 => {
                json!({"matchExpressions": [{"key": key, "operator": "In", "values": ["y", "x"]}]})
            }
            5 => {
                json!({"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]})
            }
            6 => json!({"matchLabels": {"a": value},
                        "matchExpressions": [{"key": "b", "operator": "Exists"}]}),
            _ => json!({"matchExpressions": [{"key": key, "operator": "DoesNotExist"}]}),
        }
    }

    fn peer(&mut self) -> Value {
        match self.below(5) {
            0 => json!({"podSelector": self.selector()}),
            1 => json!({"namespaceSelector": self.selector()}),
            2 => json!({"namespaceSelector": self.selector(), "podSelector": self.selector()}),
            _ => {
                let (cidr, except) = self.below_of(&[
                    ("0.0.0.0/0", "10.244.0.0/16"),
                    ("10.244.0.0/16", "10.244.0.0/31"),
                    ("192.168.0.0/24", "192.168.0.2/32"),
                    ("203.0.113.0/24", "203.0.113.8/29"),
                    ("fd00::/8", "fd00::2/127"),
                ]);
                match self.below(2) {
                    0 => json!({"ipBlock": {"cidr": cidr}}),
                    _ => json!({"ipBlock": {"cidr": cidr, "except": [except]}}),
                }
            }
        }
    }

    fn below_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    fn port(&mut self) -> Value {
        let mut port = match self.below(5) {
            0 => json!({}),
            1 => json!({"port": 80}),
            2 => json!({"port": 80, "endPort": 8080}),
            _ => json!({"port": self.one(&["web", "dns"])}),
        };
        match self.below(4) {
            0 | 1 => {}
            2 => port["protocol"] = json!("UDP"),
            _ => port["protocol"] = json!("SCTP"),
        }
        port
    }

    fn rules(&mut self, peers: &str) -> Value {
        let rules = (0..self.below(3)).map(|_| {
            let of: Vec<Value> = (0..self.below(3)).map(|_| self.peer()).collect();
            let ports: Vec<Value> = (0..self.below(3)).map(|_| self.port()).collect();
            json!({peers: of, "ports": ports})
        });
        rules.collect()
    }

    fn policy(&mut self, i: usize) -> Value {
        let mut spec = json!({"podSelector": self.selector()});
        if self.below(4) > 0 {
            spec["ingress"] = self.rules("from");
        }
        if self.below(2) > 0 {
            spec["egress"] = self.rules("to");
        }
        match self.below(5) {
            0 => spec["policyTypes"] = json!(["Ingress"]),
            1 => spec["policyTypes"] = json!(["Egress"]),
            2 => spec["policyTypes"] = json!(["Ingress", "Egress"]),
            _ => {}
        }
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
               "metadata": {"name": format!("policy-{i}"), "namespace": self.one(&["n0", "n1"])},
               "spec": spec})
    }

    fn pod(&mut self, i: usize) -> Value {
        let node = self.below(2);
        let host = self.below(8) == 1;
        let (v4, v6) = match host {
            true => (
                format!("192.168.0.{}", node + 1),
                format!("fd00::{}", node + 1),
            ),
            false => (format!("10.244.0.{i}"), format!("fd00::1:{i}")),
        };
        let ips = match self.below(6) {
            0 => json!([{"ip": v6}]),
            1 | 2 => json!([{"ip": v4}, {"ip": v6}]),
            3 => json!([]),
            _ => json!([{"ip": v4}]),
        };
        let ports: Vec<Value> = (0..self.below(3))
            .map(|_| {
                json!({"name": self.one(&["web", "dns"]),
                       "containerPort": self.below_of(&[80, 443]),
                       "protocol": self.one(&["TCP", "UDP"])})
            })
            .collect();
        json!({"apiVersion": "v1", "kind": "Pod",
               "metadata": {"name": format!("pod-{i}"), "namespace": self.one(&["n0", "n1", "n2"]),
                            "labels": self.labels()},
               "spec": {"nodeName": format!("node-{node}"), "hostNetwork": host,
                        "containers": [{"ports": ports}]},
               "status": {"podIPs": ips}})
    }
}

const PODS: usize = 6;

fn cluster(tape: &mut Tape) -> Vec<Value> {
    let mut objects = Vec::new();
    // n2 is known by its pods alone.
    for name in ["n0", "n1"] {
        objects.push(json!({"apiVersion": "v1", "kind": "Namespace",
                            "metadata": {"name": name, "labels": tape.labels()}}));
    }
    for i in 0..2 {
        objects.push(json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": format!("node-{i}"), "labels": tape.labels()},
            "status": {"addresses": [
                {"type": "InternalIP", "address": format!("192.168.0.{}", i + 1)},
                {"type": "InternalIP", "address": format!("fd00::{}", i + 1)}]}}));
    }
    objects.extend((0..PODS).map(|i| tape.pod(i)));
    objects.extend((0..tape.below(5)).map(|i| tape.policy(i)));
    objects.extend((0..tape.below(4)).map(|i| tape.tier_policy(i)));
    objects
}

/// The second evaluator.
struct Naive<'a>(&'a [Value]);

/// One end: its pod or node and what addresses it may have.
struct NaiveEnd<'a> {
    object: Option<&'a Value>,
    ips: Vec<IpAddr>,
}

fn list<'a>(value: &'a Value, path: &str) -> &'a [Value] {
    value
        .pointer(path)
        .and_then(Value::as_array)
        .map_or(&[], |v| v)
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or("")
}

impl Naive<'_> {
    fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.0.iter().filter(move |o| o["kind"] == kind)
    }

    fn end(&self, name: &str) -> NaiveEnd<'_> {
        let of = |o: &Value, path: &str, field: &str| -> Vec<IpAddr> {
            let ips = list(o, path).iter();
            ips.map(|a| a[field].as_str().unwrap().parse().unwrap())
                .collect()
        };
        if let Some((namespace, name)) = name.split_once('/') {
            let pod = self.of_kind("Pod").find(|p| {
                text(p, "/metadata/namespace") == namespace && text(p, "/metadata/name") == name
            });
            let pod = pod.unwrap();
            let mut ips = of(pod, "/status/podIPs", "ip");
            if ips.is_empty() && is_host(pod) {
                let node = text(pod, "/spec/nodeName");
                let node = self
                    .of_kind("Node")
                    .find(|n| text(n, "/metadata/name") == node);
                ips = of(node.unwrap(), "/status/addresses", "address");
            }
            return NaiveEnd {
                object: Some(pod),
                ips,
            };
        }
        let ip: IpAddr = name.parse().unwrap();
        let has = |o: &&Value| {
            let pod =
                o["kind"] == "Pod" && !is_host(o) && of(o, "/status/podIPs", "ip").contains(&ip);
            pod || of(o, "/status/addresses", "address").contains(&ip)
        };
        NaiveEnd {
            object: self.0.iter().find(has),
            ips: vec![ip],
        }
    }

    fn verdict(
        &self,
        from: &NaiveEnd,
        to: &NaiveEnd,
        protocol: &str,
        port: Option<u64>,
        ingress: bool,
    ) -> Verdict {
        let (subject, peer) = if ingress { (to, from) } else { (from, to) };
        let Some(pod) = subject.object.filter(|o| o["kind"] == "Pod" && !is_host(o)) else {
            return Verdict::NotApplicable;
        };
        if peer.object.is_some_and(|o| std::ptr::eq(o, pod)) {
            return Verdict::Allow;
        }
        let node = text(pod, "/spec/nodeName");
        let from_node = peer.object.is_some_and(|o| match o["kind"] == "Node" {
            true => text(o, "/metadata/name") == node,
            false => is_host(o) && text(o, "/spec/nodeName") == node,
        });
        if ingress && from_node {
            return Verdict::Allow;
        }
        let to = to.object;
        let asked = Asked {
            pod,
            peer,
            subject,
            to,
            protocol,
            ingress,
        };
        let has_ports = matches!(protocol, "TCP" | "UDP" | "SCTP");
        // Every port is asked for: those at which a range of the generator begins or ends.
        let ports: Vec<Option<u64>> = match port {
            None if has_ports && self.governs(&asked) => {
                let ends = [1, 79, 80, 81, 442, 443, 444, 8080, 8081, 65535];
                ends.into_iter().map(Some).collect()
            }
            port => vec![port],
        };
        let verdicts: Vec<Verdict> = ports.iter().map(|port| self.tiers(&asked, *port)).collect();
        [Verdict::Deny, Verdict::Undefined]
            .into_iter()
            .find(|verdict| verdicts.contains(verdict))
            .unwrap_or(Verdict::Allow)
    }

    /// `None`: none isolates the pod.
    fn network_policies(&self, asked: &Asked, port: Option<u64>) -> Option<Verdict> {
        let (pod, ingress, protocol) = (asked.pod, asked.ingress, asked.protocol);
        let (field, items) = if ingress {
            ("ingress", "from")
        } else {
            ("egress", "to")
        };
        let (mut isolated, mut yes, mut maybe) = (false, false, false);
        for policy in self.of_kind("NetworkPolicy") {
            let spec = &policy["spec"];
            let isolates = match spec.get("policyTypes") {
                Some(types) => types
                    .as_array()
                    .unwrap()
                    .iter()
                    .any(|t| t.as_str().unwrap().to_lowercase() == field),
                None => ingress || !list(spec, "/egress").is_empty(),
            };
            let namespace = text(policy, "/metadata/namespace");
            if !isolates
                || text(pod, "/metadata/namespace") != namespace
                || !selects(&spec["podSelector"], &pod["metadata"]["labels"])
            {
                continue;
            }
            isolated = true;
            for rule in list(spec, &format!("/{field}")) {
                let ports = list(rule, "/ports");
                let port_fits =
                    ports.is_empty() || ports.iter().any(|p| fits(p, asked.to, protocol, port));
                let peers = list(rule, &format!("/{items}"));
                if !port_fits {
                    continue;
                }
                yes |= peers.is_empty();
                for item in peers {
                    match self.peer(item, namespace, asked.peer, asked.subject) {
                        Some(true) => yes = true,
                        Some(false) => {}
                        None => maybe = true,
                    }
                }
            }
        }
        match () {
            () if !isolated => None,
            () if !matches!(protocol, "TCP" | "UDP" | "SCTP") => Some(Verdict::Undefined),
            () if yes => Some(Verdict::Allow),
            () if maybe => Some(Verdict::Undefined),
            () => Some(Verdict::Deny),
        }
    }

    fn namespace_labels(&self, name: &str) -> Value {
        let mut namespaces = self.of_kind("Namespace");
        let object = namespaces.find(|n| text(n, "/metadata/name") == name);
        object.map_or(json!({}), |o| o["metadata"]["labels"].clone())
    }

    /// `None`: it depends.
    fn peer(&self, item: &Value, own: &str, peer: &NaiveEnd, subject: &NaiveEnd) -> Option<bool> {
        let is_pod = peer
            .object
            .is_some_and(|o| o["kind"] == "Pod" && !is_host(o));
        if let Some(block) = item.get("ipBlock") {
            let net = |v: &Value| v.as_str().unwrap().parse::<IpNet>().unwrap();
            let common: Vec<&IpAddr> = peer
                .ips
                .iter()
                .filter(|ip| {
                    subject.ips.is_empty()
                        || subject.ips.iter().any(|s| s.is_ipv4() == ip.is_ipv4())
                })
                .collect();
            let inside = common.iter().filter(|ip| {
                net(&block["cidr"]).contains(**ip)
                    && !list(block, "/except").iter().any(|e| net(e).contains(**ip))
            });
            return match inside.count() {
                0 => Some(false),
                n if n < common.len() || is_pod => None,
                _ => Some(true),
            };
        }
        let Some(pod) = peer.object.filter(|_| is_pod) else {
            return Some(false);
        };
        let namespace = text(pod, "/metadata/namespace");
        let right_namespace = match item.get("namespaceSelector") {
            None => namespace == own,
            Some(selector) => selects(selector, &self.namespace_labels(namespace)),
        };
        let right_pod = item
            .get("podSelector")
            .is_none_or(|selector| selects(selector, &pod["metadata"]["labels"]));
        Some(right_namespace && right_pod)
    }
}

fn is_host(pod: &Value) -> bool {
    pod.pointer("/spec/hostNetwork") == Some(&json!(true))
}

fn selects(selector: &Value, labels: &Value) -> bool {
    let same = |(k, v): (&String, &Value)| labels.get(k) == Some(v);
    let labels_fit = selector
        .get("matchLabels")
        .is_none_or(|m| m.as_object().unwrap().iter().all(same));
    labels_fit
        && list(selector, "/matchExpressions").iter().all(|e| {
            let value = labels.get(e["key"].as_str().unwrap());
            let listed = value.is_some_and(|v| list(e, "/values").contains(v));
            match e["operator"].as_str().unwrap() {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => value.is_some(),
                _ => value.is_none(),
            }
        })
}

fn fits(item: &Value, to: Option<&Value>, protocol: &str, port: Option<u64>) -> bool {
    if item.get("protocol").map_or("TCP", |p| p.as_str().unwrap()) != protocol {
        return false;
    }
    match (item.get("port"), port) {
        (None, _) => true,
        (Some(Value::String(name)), Some(port)) => {
            let containers = to.map_or(&[][..], |to| list(to, "/spec/containers"));
            containers.iter().flat_map(|c| list(c, "/ports")).any(|p| {
                p["name"] == **name && p["protocol"] == protocol && p["containerPort"] == port
            })
        }
        (Some(Value::Number(first)), Some(port)) => {
            let first = first.as_u64().unwrap();
            let last = item.get("endPort").map_or(first, |e| e.as_u64().unwrap());
            first <= port && port <= last
        }
        _ => false,
    }
}

const FLOWS: usize = 50;

/// How many flows are compared: `WHYDROP_TEST_FLOWS`.
fn flows() -> usize {
    let set = std::env::var("WHYDROP_TEST_FLOWS").ok();
    set.and_then(|n| n.parse().ok()).unwrap_or(8_000)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases((flows() / FLOWS) as u32))]

    #[test]
    fn it_agrees_with_a_naive_evaluator(
        choices in prop::collection::vec(any::<u16>(), 60..500),
        asked in prop::collection::vec(any::<[u16; 4]>(), FLOWS),
    ) {
        let objects = cluster(&mut Tape(choices.iter()));
        let parsed = testing::objects(&Value::Array(objects.clone()).to_string());
        let world = World::new(&parsed);
        let naive = Naive(&objects);
        let mut ends: Vec<String> = naive.of_kind("Pod")
            .map(|p| format!("{}/{}", text(p, "/metadata/namespace"), text(p, "/metadata/name")))
            .collect();
        ends.extend(["203.0.113.9", "192.168.0.1", "192.168.0.2", "10.244.0.1", "fd00::2",
                     "fd00::77"].map(str::to_owned));
        for pick in asked {
            let [from, to, protocol, port] = pick.map(usize::from);
            let (from, to) = (&ends[from % ends.len()], &ends[to % ends.len()]);
            let protocol = ["TCP", "UDP", "SCTP", "TCP", "ICMP"][protocol % 5];
            let port = [Some(80), Some(443), Some(8080), None][port % 4];
            let flow = Flow {
                source: testing::end(&world, from),
                destination: testing::end(&world, to),
                protocol: protocol.parse().unwrap(),
                port,
            };
            for ingress in [true, false] {
                let direction = if ingress { Direction::Ingress } else { Direction::Egress };
                let expected = naive.verdict(&naive.end(from), &naive.end(to), protocol,
                                             port.map(u64::from), ingress);
                prop_assert_eq!(
                    world.verdict(&flow, direction), expected,
                    "{} of {} to {} {} {:?}:\n{}", direction, from, to, protocol, port,
                    serde_json::to_string_pretty(&objects).unwrap()
                );
                prop_assert_eq!(world.judge(&flow, direction).verdict, expected);
            }
        }
    }
}
