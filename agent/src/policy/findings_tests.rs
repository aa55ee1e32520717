//! Every finding, where it is and where it is not; every fix is read back from its YAML and the
//! flow evaluated again.

use super::*;
use crate::cluster::objects::Object;
use crate::policy::testing::{DNS, codes, flow, found, objects, of, policy, shop_policy, world};

#[test]
fn missing_dns_egress() {
    let deny = shop_policy("p", "  policyTypes: [Egress]") + DNS;
    for port in [53, 5353] {
        let text = format!("shop/web kube-system/coredns UDP {port}");
        let finding = found(&deny, &text, "missing-dns-egress");
        let yaml = &finding.fixes[0].yaml;
        assert!(
            yaml.contains("k8s-app: kube-dns") && !yaml.contains("pod-template-hash"),
            "{yaml}"
        );
        assert!(yaml.contains("TCP") && yaml.contains("UDP"), "{yaml}");
        assert!(finding.message.contains("shop/p"), "{}", finding.message);
    }
    let world = world(&deny);
    for text in [
        "shop/web kube-system/coredns UDP 80",
        "shop/web 203.0.113.53 UDP 53",
        "shop/web db/pg UDP 53",
    ] {
        assert!(
            !codes(&world, text).contains(&"missing-dns-egress"),
            "{text}"
        );
    }
    let local = codes(&world, "shop/web 169.254.20.10 UDP 53");
    assert!(local.contains(&"missing-dns-egress"));
}

const BY_TEAM: &str = "  ingress: [{from: [{namespaceSelector: {matchLabels: {team: shop}}}], ports: [{port: 5432}]}]";

#[test]
fn namespace_label_missing() {
    let more = policy("p", BY_TEAM);
    let finding = found(&more, "shop/web db/pg TCP 5432", "namespace-label-missing");
    for part in [
        "team=shop",
        "namespace shop has no label team",
        "env=prod",
        "db/p",
    ] {
        assert!(finding.message.contains(part), "{}", finding.message);
    }
    assert_eq!(finding.fixes.len(), 2);
    // By the label that is always there comes first.
    assert!(
        finding.fixes[0]
            .yaml
            .contains("kubernetes.io/metadata.name")
    );
    assert_eq!(finding.fixes[0].admits.peers, 1);
    assert_eq!(finding.fixes[0].admits.examples, ["shop/job"]);
    let label = &finding.fixes[1];
    let command = label.command.as_deref().unwrap();
    assert_eq!(
        command,
        "kubectl label namespace shop team=shop --overwrite"
    );
    assert!(label.yaml.contains("env: prod"), "{}", label.yaml);
    // A label that another policy looks at says so.
    let other = more.clone() + &policy("q", BY_TEAM);
    let finding = found(&other, "shop/web db/pg TCP 5432", "namespace-label-missing");
    let elsewhere = finding.fixes.iter().flat_map(|f| &f.admits.elsewhere);
    assert_eq!(elsewhere.count(), 1);
    // Not where the port is wrong as well, nor where the label is there.
    let world = world(&more);
    assert_eq!(codes(&world, "shop/web db/pg TCP 80"), ["no-ingress-rule"]);
    assert_eq!(
        codes(&world, "203.0.113.7 db/pg TCP 5432"),
        ["no-ingress-rule"]
    );
}

#[test]
fn pod_selector_scope() {
    let more = policy(
        "p",
        "  ingress: [{from: [{podSelector: {matchLabels: {tier: front}}}]}]",
    );
    let finding = found(&more, "shop/web db/pg TCP 5432", "pod-selector-scope");
    assert!(
        finding.message.contains("own namespace db"),
        "{}",
        finding.message
    );
    // Those of the own namespace stay admitted.
    let changed = world(&more).with(&finding.fixes[0].change);
    assert_eq!(
        changed.both(&flow(&changed, "db/backup db/pg TCP 1")),
        Verdict::Allow
    );
    assert_eq!(finding.fixes[0].admits.sentence(), "nothing else");
    assert_eq!(
        codes(&world(&more), "shop/job db/pg TCP 1"),
        ["no-ingress-rule"]
    );
}

#[test]
fn policy_types_inert() {
    let inert = policy(
        "rules",
        "  policyTypes: [Egress]\n  ingress: [{from: [{namespaceSelector: {}}]}]",
    );
    let more = policy("deny", "  policyTypes: [Ingress]") + &inert;
    let finding = found(&more, "shop/web db/pg TCP 1", "policy-types-inert");
    assert!(
        finding.message.contains("db/rules has ingress rules"),
        "{}",
        finding.message
    );
    assert_eq!(finding.fixes.len(), 1);
    // Where nothing is denied it is said without a fix, which could only take something away.
    let finding = found(&inert, "shop/web db/pg TCP 1", "policy-types-inert");
    assert_eq!(finding.fixes.len(), 0);
    let effective = inert.replace("[Egress]", "[Ingress]");
    assert_eq!(
        codes(&world(&effective), "shop/web db/pg TCP 1"),
        ["not-policy"]
    );
}

#[test]
fn policy_types_implied() {
    let more = policy("p", "  egress: [{}]");
    let finding = found(&more, "shop/web db/pg TCP 1", "policy-types-implied");
    assert!(
        finding.message.contains("db/p names no policyTypes"),
        "{}",
        finding.message
    );
    assert!(
        finding.fixes[0].yaml.contains("- Egress") && !finding.fixes[0].yaml.contains("Ingress")
    );
    assert!(finding.fixes[0].admits.outside);
    let stated = policy("p", "  policyTypes: [Ingress, Egress]\n  egress: [{}]");
    assert!(!codes(&world(&stated), "shop/web db/pg TCP 1").contains(&"policy-types-implied"));
}

#[test]
fn no_ingress_rule_and_no_egress_rule() {
    let deny = policy("deny", "  policyTypes: [Ingress]");
    let finding = found(&deny, "shop/web db/pg TCP 5432", "no-ingress-rule");
    let fix = &finding.fixes[0];
    assert!(
        fix.yaml.contains("app: web") && !fix.yaml.contains("tier"),
        "{}",
        fix.yaml
    );
    assert_eq!(fix.admits.sentence(), "nothing else");
    for text in [
        "203.0.113.7 db/pg TCP 1",
        "192.168.0.1 db/pg UDP 2",
        "db/backup db/pg SCTP 3",
    ] {
        assert_eq!(
            found(&deny, text, "no-ingress-rule").fixes.len(),
            1,
            "{text}"
        );
    }
    let deny = shop_policy("deny", "  policyTypes: [Egress]");
    let finding = found(&deny, "shop/web db/pg TCP 5432", "no-egress-rule");
    assert!(
        finding.message.contains("shop/deny has no egress rules"),
        "{}",
        finding.message
    );
    assert_eq!(codes(&world(""), "shop/web db/pg TCP 5432"), ["not-policy"]);
}

#[test]
fn where_both_sides_deny_the_fixes_are_proven_together() {
    let more =
        policy("in", "  policyTypes: [Ingress]") + &shop_policy("out", "  policyTypes: [Egress]");
    let world = world(&more);
    let findings = of(&world, "shop/web db/pg TCP 5432", &Context::default());
    let codes: Vec<_> = findings.iter().map(|f| f.code).collect();
    assert_eq!(codes, ["no-egress-rule", "no-ingress-rule"]);
    let changed = findings
        .iter()
        .fold(world, |world, f| world.with(&f.fixes[0].change));
    assert_eq!(
        changed.both(&flow(&changed, "shop/web db/pg TCP 5432")),
        Verdict::Allow
    );
}

#[test]
fn a_fix_that_is_not_proven_is_not_shown() {
    // Egress stays undefined: the peer is a pod, and only a block matches it.
    let more = policy("in", "  policyTypes: [Ingress]")
        + &shop_policy(
            "out",
            "  policyTypes: [Egress]\n  egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0}}]}]",
        );
    let findings = of(
        &world(&more),
        "shop/web db/pg TCP 5432",
        &Context::default(),
    );
    assert!(findings.iter().all(|f| f.fixes.is_empty()), "{findings:?}");
}

#[test]
fn port_not_allowed() {
    let more = policy(
        "p",
        "  ingress: [{from: [{namespaceSelector: {}}], ports: [{port: 5432}]}]",
    );
    let finding = found(&more, "shop/web db/pg TCP 9187", "port-not-allowed");
    assert!(
        finding.message.contains("it allows TCP 5432"),
        "{}",
        finding.message
    );
    assert_eq!(finding.fixes[0].admits.peers, 2);
    assert_eq!(
        found(&more, "shop/web db/pg UDP 5432", "port-not-allowed")
            .fixes
            .len(),
        1
    );
    assert_eq!(
        codes(&world(&more), "shop/web db/pg TCP 5432"),
        ["not-policy"]
    );
}

#[test]
fn named_port_unresolved() {
    let more = policy("p", "  ingress: [{ports: [{port: postgres}]}]");
    let finding = found(&more, "shop/web db/pg TCP 5432", "named-port-unresolved");
    for part in ["called \"postgres\"", "\"sql\" = TCP 5432", "kube-router"] {
        assert!(finding.message.contains(part), "{}", finding.message);
    }
    let named = policy("p", "  ingress: [{ports: [{port: sql}]}]");
    assert_eq!(
        codes(&world(&named), "shop/web db/pg TCP 9187"),
        ["port-not-allowed"]
    );
}

fn at_eni() -> Context {
    Context {
        site: Some(DropSite {
            reason: Some("TC_EGRESS".into()),
            interface: Some("eni12ab".into()),
            ..DropSite::default()
        }),
        ..Context::default()
    }
}

fn agent(app: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {app}, namespace: kube-system, labels: {{k8s-app: {app}}}}}
spec: {{nodeName: node-b, hostNetwork: true}}
"
    )
}

#[test]
fn aws_port_limit() {
    let ports: Vec<String> = (1..=25).map(|p| format!("{{port: {p}}}")).collect();
    let rule = |n: usize| {
        policy(
            "p",
            &format!("  ingress: [{{ports: [{}]}}]", ports[..n].join(", ")),
        )
    };
    let has = |more: &str, context: &Context| {
        let findings = of(&world(more), "shop/web db/pg TCP 1", context);
        findings.iter().any(|f| f.code == "aws-port-limit")
    };
    assert!(has(&(rule(25) + &agent("aws-node")), &at_eni()));
    assert!(!has(&(rule(24) + &agent("aws-node")), &at_eni()));
    assert!(!has(&(rule(25) + &agent("cilium")), &at_eni()));
    assert!(!has(&(rule(25) + &agent("aws-node")), &Context::default()));

    // Joined where ports are neighbours, and not shown where that does not help.
    let fixes = |ports: &str| {
        let more = policy("p", &format!("  ingress: [{{ports: [{ports}]}}]")) + &agent("aws-node");
        let findings = of(&world(&more), "shop/web db/pg TCP 1", &at_eni());
        let finding = findings.into_iter().find(|f| f.code == "aws-port-limit");
        finding.unwrap().fixes
    };
    let mixed = "{port: 80}, {port: 90, endPort: 95}, {port: 93, endPort: 99}, {port: sql}, \
                 {port: 7, protocol: UDP}";
    let fix = fixes(&format!("{}, {mixed}", ports.join(", "))).remove(0);
    assert_eq!(fix.admits.sentence(), "nothing else");
    let Object::NetworkPolicy(_, joined) = objects(&fix.yaml).remove(0) else {
        panic!("{}", fix.yaml);
    };
    let joined: Vec<String> = joined.ingress.rules[0]
        .ports
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        joined,
        ["TCP 1-25", "TCP 80", "TCP 90-99", "TCP \"sql\"", "UDP 7"]
    );
    let apart: Vec<String> = (0..25)
        .map(|p| format!("{{port: {}}}", 1 + 2 * p))
        .collect();
    assert_eq!(fixes(&apart.join(", ")).len(), 0);
}

#[test]
fn host_network() {
    let more = "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: kube-system}
spec: {podSelector: {}}
";
    let finding = found(more, "shop/web kube-system/agent-b TCP 1", "host-network");
    assert!(
        finding
            .message
            .contains("kube-system/deny does not restrict"),
        "{}",
        finding.message
    );
    assert!(!codes(&world(more), "shop/web db/pg TCP 1").contains(&"host-network"));
}

#[test]
fn icmp_undefined() {
    let more = policy("p", "  ingress: [{}]");
    let finding = found(&more, "shop/web db/pg ICMP", "icmp-undefined");
    assert!(
        finding.message.contains("isolated by db/p"),
        "{}",
        finding.message
    );
    assert_eq!(
        codes(&world(&more), "shop/web db/backup ICMP"),
        ["not-policy"]
    );
}

#[test]
fn cni_not_enforcing() {
    let deny = policy("deny", "  ingress: []");
    let has = |agents: &[&str]| {
        let agents: String = agents.iter().map(|app| agent(app)).collect();
        let world = world(&format!("{deny}{agents}"));
        codes(&world, "shop/web db/pg TCP 1").contains(&"cni-not-enforcing")
    };
    assert!(has(&["kube-proxy"]));
    assert!(!has(&["kube-proxy", "calico-node"]));
    // k3s shows no pods at all, and others enforce beside flannel.
    assert!(!has(&[]));
    assert!(!has(&["kube-proxy", "flannel"]));
}

#[test]
fn not_policy_points_elsewhere_by_the_drops_reason() {
    let context = Context {
        site: Some(DropSite {
            reason: Some("NEIGH_FAILED".into()),
            ..DropSite::default()
        }),
        ..Context::default()
    };
    let findings = of(&world(""), "shop/web db/pg TCP 1", &context);
    assert_eq!(findings[0].code, "not-policy");
    assert!(
        findings[0].message.contains("MAC address"),
        "{}",
        findings[0].message
    );
    let allowed = of(
        &world(&policy("p", "  ingress: [{}]")),
        "shop/web db/pg TCP 1",
        &context,
    );
    assert!(
        allowed[0]
            .message
            .starts_with("the NetworkPolicies allow it")
    );
}

/// Point 19: allow rules can lag behind isolation.
#[test]
fn point_19_transient() {
    let more = "---
apiVersion: v1
kind: Pod
metadata: {name: new, namespace: shop}
spec: {nodeName: node-a}
status: {podIP: 10.244.1.99, startTime: '2026-11-22T12:00:00Z'}
";
    let world = world(more);
    for (at, expected) in [
        ("2026-11-22T12:00:03Z", true),
        ("2026-11-22T12:00:30Z", false),
        ("2026-11-22T11:59:59Z", false),
    ] {
        let context = Context {
            at: Some(at.parse().unwrap()),
            ..Context::default()
        };
        let findings = of(&world, "shop/new db/pg TCP 1", &context);
        assert_eq!(findings[0].code == "transient", expected, "{at}");
    }
}
