//! What is said where a tier denies; every fix is read back from its YAML and evaluated.

use crate::policy::evaluate::Verdict;
use crate::policy::testing::{DNS, codes, flow, found, policy, world};

fn cnp(tier: &str, rules: &str) -> String {
    format!(
        "---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {{name: guard, labels: {{owner: ops}}}}
spec:
  tier: {tier}
  priority: 5
  subject: {{namespaces: {{}}}}
{rules}
"
    )
}

const DENY: &str = "  ingress: [{name: closed, action: Deny, from: [{namespaces: {}}]}]";

#[test]
fn admin_tier_denied() {
    let more = cnp("Admin", DENY) + &policy("p", "  ingress: [{}]");
    let finding = found(&more, "shop/web db/pg TCP 5432", "admin-tier-denied");
    for part in [
        "ingress rule 1 \"closed\" of ClusterNetworkPolicy guard (Admin tier, priority 5) denies \
         shop/web to db/pg on TCP 5432",
        "where the CNI enforces ClusterNetworkPolicy",
    ] {
        assert!(finding.message.contains(part), "{}", finding.message);
    }
    // To leave it to the namespace comes first; both go before the rule that denies.
    assert_eq!(finding.fixes.len(), 2);
    for (fix, action) in finding.fixes.iter().zip(["Pass", "Accept"]) {
        let at = |text: &str| {
            fix.yaml
                .find(text)
                .unwrap_or_else(|| panic!("{}", fix.yaml))
        };
        assert!(at(&format!("action: {action}")) < at("name: closed"));
        assert!(fix.yaml.contains("owner: ops"), "{}", fix.yaml);
        // The subject is every pod: of those that it denied, two more are reached by the peer.
        assert_eq!(fix.admits.subjects, 2, "{}", fix.admits.sentence());
    }
    // Where the NetworkPolicies deny as well, passing it on is no fix.
    let more = cnp("Admin", DENY) + &policy("p", "  ingress: []");
    let finding = found(&more, "shop/web db/pg TCP 5432", "admin-tier-denied");
    assert_eq!(finding.fixes.len(), 1);
    assert!(finding.fixes[0].yaml.contains("action: Accept"));
    // Nor does a rule for all protocols mend ICMP: it would admit more than that.
    let icmp = found(&more, "shop/web db/pg ICMP", "admin-tier-denied");
    assert_eq!(icmp.fixes.len(), 0);
    let accepts = cnp("Admin", &DENY.replace("Deny", "Accept"));
    assert_eq!(
        codes(&world(&accepts), "shop/web db/pg TCP 1"),
        ["not-policy"]
    );
}

#[test]
fn admin_tier_denies_egress_to_the_outside() {
    let more = cnp(
        "Admin",
        "  egress: [{action: Deny, to: [{networks: [0.0.0.0/0]}]}]",
    );
    let finding = found(&more, "shop/web 203.0.113.7 TCP 443", "admin-tier-denied");
    assert!(finding.fixes[0].yaml.contains("203.0.113.7/32"));
    assert_eq!(finding.fixes[0].admits.peers, 0);
    let every = found(&more, "shop/web 203.0.113.7 TCP", "admin-tier-denied");
    assert!(
        every.fixes[0].yaml.contains("end: 65535"),
        "{}",
        every.fixes[0].yaml
    );
    // A full policy takes no more rules.
    let rule = "{action: Deny, to: [{networks: [0.0.0.0/0]}]}";
    let rules = vec![rule; 25].join(", ");
    let full = cnp("Admin", &format!("  egress: [{rules}]"));
    let finding = found(&full, "shop/web 203.0.113.7 TCP 443", "admin-tier-denied");
    assert_eq!(finding.fixes.len(), 0);
}

#[test]
fn a_tier_that_denies_dns_says_so_first() {
    let more = cnp(
        "Admin",
        "  egress: [{action: Deny, to: [{namespaces: {}}]}]",
    ) + DNS;
    let text = "shop/web kube-system/coredns UDP 5353";
    assert_eq!(
        codes(&world(&more), text),
        ["missing-dns-egress", "admin-tier-denied"]
    );
    let finding = found(&more, text, "missing-dns-egress");
    let changed = world(&more).with(&finding.fixes[0].change);
    for also in ["UDP 53", "TCP 53", "TCP 5353"] {
        let flow = flow(&changed, &format!("shop/web kube-system/coredns {also}"));
        assert_eq!(changed.both(&flow), Verdict::Allow, "{also}");
    }
    let other = codes(&world(&more), "shop/web db/pg UDP 5353");
    assert_eq!(other, ["admin-tier-denied"]);
}

#[test]
fn baseline_tier_denied() {
    let more = cnp("Baseline", DENY);
    let finding = found(&more, "shop/web db/pg TCP 5432", "baseline-tier-denied");
    assert!(
        finding
            .message
            .starts_with("no NetworkPolicy isolates db/pg for ingress"),
        "{}",
        finding.message
    );
    // The namespace's own way, which says that it isolates, and the admin's, which is about more pods.
    assert_eq!(finding.fixes.len(), 2);
    assert!(finding.fixes[1].yaml.contains("kind: ClusterNetworkPolicy"));
    let own = &finding.fixes[0];
    assert!(own.yaml.contains("name: allow-ingress"), "{}", own.yaml);
    assert_eq!(own.admits.isolates, 1);
    assert!(own.admits.sentence().contains("isolates 1 pod"));
    // A name that is taken is not taken again.
    let taken = more.clone() + &policy("allow-ingress", "  policyTypes: [Egress]");
    let finding = found(&taken, "shop/web db/pg TCP 5432", "baseline-tier-denied");
    assert!(finding.fixes[0].yaml.contains("name: allow-ingress-2"));
    let overridden = more + &policy("p", "  ingress: [{}]");
    assert_eq!(
        codes(&world(&overridden), "shop/web db/pg TCP 5432"),
        ["not-policy"]
    );
}

#[test]
fn the_fixes_of_v1alpha1_are_of_v1alpha1() {
    let more = "---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: BaselineAdminNetworkPolicy
metadata: {name: default}
spec: {subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}
";
    let finding = found(more, "shop/web db/pg TCP 5432", "baseline-tier-denied");
    let yaml = &finding.fixes[1].yaml;
    for part in [
        "policy.networking.k8s.io/v1alpha1",
        "action: Allow",
        "portNumber",
    ] {
        assert!(yaml.contains(part), "{yaml}");
    }
}

#[test]
fn tier_conflict_and_tier_unknown() {
    let accept = cnp("Admin", &DENY.replace("Deny", "Accept")).replace("guard", "open");
    let both = cnp("Admin", DENY) + &accept;
    let finding = found(&both, "shop/web db/pg TCP 1", "tier-conflict");
    for part in ["guard", "says Deny", "open", "says Accept"] {
        assert!(finding.message.contains(part), "{}", finding.message);
    }
    let apart = cnp("Admin", DENY) + &accept.replace("priority: 5", "priority: 6");
    assert_eq!(
        codes(&world(&apart), "shop/web db/pg TCP 1"),
        ["admin-tier-denied"]
    );
    let names = cnp(
        "Admin",
        "  egress: [{action: Accept, to: [{domainNames: [a.example]}]}, \
         {action: Deny, to: [{networks: [0.0.0.0/0]}]}]",
    );
    let finding = found(&names, "shop/web 203.0.113.7 TCP 1", "tier-unknown");
    assert!(finding.message.contains("DNS"), "{}", finding.message);
    let icmp = codes(&world(&names), "203.0.113.7 shop/web TCP 1");
    assert_eq!(icmp, ["not-policy"]);
}
