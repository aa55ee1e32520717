//! The naive evaluator's tiers: every way that things may be is gone through, one by one.

use std::collections::BTreeSet;

use super::*;

const GROUP: &str = "policy.networking.k8s.io";

impl Tape<'_> {
    fn pods_of(&mut self) -> Value {
        match self.below(2) {
            0 => json!({"namespaces": self.selector()}),
            _ => json!({"pods": {"namespaceSelector": self.selector(),
                                 "podSelector": self.selector()}}),
        }
    }

    fn tier_rule(&mut self, egress: bool, cluster: bool, pass: bool) -> Value {
        let actions: &[&str] = if pass {
            &["A", "Deny", "Pass"]
        } else {
            &["A", "Deny"]
        };
        let action = match self.one(actions) {
            "A" if cluster => "Accept",
            "A" => "Allow",
            other => other,
        };
        let accept = action.starts_with('A');
        let mut only_pods = true;
        let mut peers = vec![self.pods_of()];
        for _ in 0..self.below(3) {
            let peer = match self.below(5) {
                0 if egress => json!({"nodes": self.selector()}),
                1 if egress => json!({"networks": [self.one(&["10.244.0.0/29", "fd00::/8"]),
                    self.one(&["203.0.113.0/24", "192.168.0.1/32", "10.244.0.0/16"])]}),
                2 if egress && accept => json!({"domainNames": ["a.example"]}),
                _ => self.pods_of(),
            };
            only_pods &= peer.get("namespaces").is_some() || peer.get("pods").is_some();
            peers.push(peer);
        }
        if self.below(3) == 1 {
            peers.remove(0);
        }
        let ports: Vec<Value> = (0..self.below(3))
            .map(|_| self.tier_port(cluster, only_pods))
            .collect();
        let mut rule = json!({"action": action, if egress { "to" } else { "from" }: peers});
        if peers_are_none(&rule) {
            rule[if egress { "to" } else { "from" }] = json!([{"namespaces": {}}]);
        }
        if !ports.is_empty() {
            rule[if cluster { "protocols" } else { "ports" }] = json!(ports);
        }
        rule
    }

    fn tier_port(&mut self, cluster: bool, may_be_named: bool) -> Value {
        let protocol = self.one(&["TCP", "UDP", "SCTP", "TCP"]);
        match (self.below(4), cluster) {
            (0, true) if may_be_named => json!({"destinationNamedPort": self.one(&["web", "dns"])}),
            (0, false) if may_be_named => json!({"namedPort": self.one(&["web", "dns"])}),
            (1, true) => json!({protocol.to_lowercase():
                {"destinationPort": {"range": {"start": 80, "end": 443}}}}),
            (1, false) => json!({"portRange": {"protocol": protocol, "start": 80, "end": 443}}),
            (_, true) => json!({protocol.to_lowercase(): {"destinationPort": {"number": 80}}}),
            (_, false) => json!({"portNumber": {"protocol": protocol, "port": 80}}),
        }
    }

    pub(super) fn tier_policy(&mut self, i: usize) -> Value {
        let kinds = [
            "ClusterNetworkPolicy",
            "ClusterNetworkPolicy",
            "AdminNetworkPolicy",
        ];
        // A cluster has one BaselineAdminNetworkPolicy at most.
        let kind = match (i, self.below(3)) {
            (0, 1) => "BaselineAdminNetworkPolicy",
            (_, n) => kinds[n],
        };
        let cluster = kind == "ClusterNetworkPolicy";
        let mut spec = json!({"subject": self.pods_of()});
        if cluster {
            spec["tier"] = json!(self.one(&["Admin", "Baseline"]));
        }
        if kind != "BaselineAdminNetworkPolicy" {
            spec["priority"] = json!(self.below(2));
        }
        let pass = kind != "BaselineAdminNetworkPolicy";
        for (field, egress) in [("ingress", false), ("egress", true)] {
            let rules = (0..self.below(4)).map(|_| self.tier_rule(egress, cluster, pass));
            spec[field] = rules.collect();
        }
        let name = match pass {
            true => format!("tier-{i}"),
            false => "default".to_owned(),
        };
        let version = if cluster { "v1alpha2" } else { "v1alpha1" };
        json!({"apiVersion": format!("{GROUP}/{version}"), "kind": kind,
               "metadata": {"name": name}, "spec": spec})
    }
}

fn peers_are_none(rule: &Value) -> bool {
    list(rule, "/from").is_empty() && list(rule, "/to").is_empty()
}

/// The question of one side.
pub(super) struct Asked<'a> {
    pub(super) pod: &'a Value,
    pub(super) peer: &'a NaiveEnd<'a>,
    pub(super) subject: &'a NaiveEnd<'a>,
    pub(super) to: Option<&'a Value>,
    pub(super) protocol: &'a str,
    pub(super) ingress: bool,
}

fn tier_of(policy: &Value) -> &str {
    match policy["kind"].as_str().unwrap() {
        "AdminNetworkPolicy" => "Admin",
        "BaselineAdminNetworkPolicy" => "Baseline",
        "ClusterNetworkPolicy" => text(policy, "/spec/tier"),
        _ => "",
    }
}

/// What may come of policies whose order is not defined, by going through all ways in which each of
/// them may act: in each way, any that does something may be the one that counts.
fn any_of(policies: &[BTreeSet<&'static str>]) -> BTreeSet<&'static str> {
    let mut ways: Vec<Vec<&'static str>> = vec![Vec::new()];
    for policy in policies {
        let longer = ways.iter().flat_map(|way| {
            let act = |action: &&'static str| way.iter().copied().chain([*action]).collect();
            policy.iter().map(act).collect::<Vec<Vec<_>>>()
        });
        ways = longer.collect();
    }
    let of_way = |way: Vec<&'static str>| {
        let acts: Vec<_> = way.into_iter().filter(|action| *action != "none").collect();
        if acts.is_empty() { vec!["none"] } else { acts }
    };
    ways.into_iter().flat_map(of_way).collect()
}

impl Naive<'_> {
    /// Tier after tier.
    pub(super) fn tiers(&self, asked: &Asked, port: Option<u64>) -> Verdict {
        let mut may = self.tier("Admin", asked, port);
        if may.remove("Pass") {
            match self.network_policies(asked, port) {
                Some(Verdict::Allow) => may.extend(["Accept"]),
                Some(Verdict::Deny) => may.extend(["Deny"]),
                Some(_) => may.extend(["Accept", "Deny"]),
                None => {
                    let mut baseline = self.tier("Baseline", asked, port);
                    if baseline.remove("Pass") {
                        baseline.insert("Accept");
                    }
                    may.extend(baseline);
                }
            }
        }
        match (may.contains("Accept"), may.contains("Deny")) {
            (true, true) => Verdict::Undefined,
            (false, true) => Verdict::Deny,
            _ => Verdict::Allow,
        }
    }

    fn rules<'a>(&'a self, asked: &Asked, policy: &'a Value) -> &'a [Value] {
        match self.in_set(&policy["spec"]["subject"], asked.pod) {
            true if asked.ingress => list(policy, "/spec/ingress"),
            true => list(policy, "/spec/egress"),
            false => &[],
        }
    }

    /// Whether any tier has rules for the subject.
    pub(super) fn governs(&self, asked: &Asked) -> bool {
        let tiers = self.0.iter().filter(|o| !tier_of(o).is_empty());
        tiers.into_iter().any(|p| !self.rules(asked, p).is_empty())
    }

    /// What may come of a tier: Accept, Deny, or that it goes on.
    pub(super) fn tier(
        &self,
        tier: &str,
        asked: &Asked,
        port: Option<u64>,
    ) -> BTreeSet<&'static str> {
        let all: Vec<&Value> = self.0.iter().filter(|o| tier_of(o) == tier).collect();
        let of = |priority: Option<u64>| {
            let same = all
                .iter()
                .filter(|p| p["spec"]["priority"].as_u64() == priority);
            let acts: Vec<_> = same.map(|p| self.acts(asked, p, port)).collect();
            any_of(&acts)
        };
        let mut ordered = BTreeSet::from(["none"]);
        for priority in 0..2 {
            if ordered.remove("none") {
                ordered.extend(of(Some(priority)));
            }
        }
        let all = any_of(&[ordered, of(None)]);
        let on = |action| if action == "none" { "Pass" } else { action };
        all.into_iter().map(on).collect()
    }

    fn acts(&self, asked: &Asked, policy: &Value, port: Option<u64>) -> BTreeSet<&'static str> {
        let mut acts = BTreeSet::new();
        for rule in self.rules(asked, policy) {
            let (ports, protocols) = (list(rule, "/ports"), list(rule, "/protocols"));
            let items: Vec<&Value> = ports.iter().chain(protocols).collect();
            if !items.is_empty() && !items.iter().any(|i| tier_fits(i, asked, port)) {
                continue;
            }
            let peers = list(rule, "/from").iter().chain(list(rule, "/to"));
            let matched: Vec<Option<bool>> = peers.map(|p| self.tier_peer(p, asked)).collect();
            let action = match rule["action"].as_str().unwrap() {
                "Allow" | "Accept" => "Accept",
                "Deny" => "Deny",
                _ => "Pass",
            };
            if matched.contains(&Some(true)) {
                acts.insert(action);
                return acts;
            }
            if matched.contains(&None) {
                acts.insert(action);
            }
        }
        acts.insert("none");
        acts
    }

    fn in_set(&self, set: &Value, pod: &Value) -> bool {
        let everything = json!({});
        let (namespaces, pods) = match set.get("namespaces") {
            Some(namespaces) => (namespaces, &everything),
            None => (
                &set["pods"]["namespaceSelector"],
                &set["pods"]["podSelector"],
            ),
        };
        let namespace = text(pod, "/metadata/namespace");
        selects(namespaces, &self.namespace_labels(namespace))
            && selects(pods, &pod["metadata"]["labels"])
    }

    fn tier_peer(&self, item: &Value, asked: &Asked) -> Option<bool> {
        let peer = asked.peer;
        if item.get("domainNames").is_some() {
            return None;
        }
        if let Some(nodes) = item.get("nodes") {
            let node = peer.object.and_then(|o| match o["kind"] == "Node" {
                true => Some(o),
                false if is_host(o) => self
                    .of_kind("Node")
                    .find(|n| text(n, "/metadata/name") == text(o, "/spec/nodeName")),
                false => None,
            });
            return Some(node.is_some_and(|n| selects(nodes, &n["metadata"]["labels"])));
        }
        if item.get("networks").is_some() {
            let families: Vec<bool> = asked.subject.ips.iter().map(IpAddr::is_ipv4).collect();
            let common = peer.ips.iter();
            let common =
                common.filter(|ip| families.is_empty() || families.contains(&ip.is_ipv4()));
            let common: Vec<&IpAddr> = common.collect();
            let inside = common.iter().filter(|ip| {
                let mut nets = list(item, "/networks").iter();
                nets.any(|n| n.as_str().unwrap().parse::<IpNet>().unwrap().contains(**ip))
            });
            return match inside.count() {
                0 => Some(false),
                n if n < common.len() => None,
                _ => Some(true),
            };
        }
        let pod = peer.object.filter(|o| o["kind"] == "Pod" && !is_host(o));
        Some(pod.is_some_and(|pod| self.in_set(item, pod)))
    }
}

fn tier_fits(item: &Value, asked: &Asked, port: Option<u64>) -> bool {
    let named = item.get("namedPort").or(item.get("destinationNamedPort"));
    if let Some(name) = named {
        let as_policy = json!({"port": name, "protocol": asked.protocol});
        return fits(&as_policy, asked.to, asked.protocol, port);
    }
    let (protocol, number) = match item.as_object().unwrap().iter().next().unwrap() {
        (key, number) if key.starts_with("port") => {
            let protocol = number
                .get("protocol")
                .map_or("TCP", |p| p.as_str().unwrap());
            (protocol.to_owned(), number)
        }
        (protocol, number) => (protocol.to_uppercase(), &number["destinationPort"]),
    };
    let range = number.get("range").unwrap_or(number);
    let first = ["number", "port", "start"]
        .iter()
        .find_map(|f| range[f].as_u64());
    let first = first.unwrap();
    let last = range["end"].as_u64().unwrap_or(first);
    protocol == asked.protocol && port.is_some_and(|port| first <= port && port <= last)
}
