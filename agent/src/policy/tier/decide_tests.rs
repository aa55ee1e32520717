//! The points of the tiers' specification, each allowed and denied.

use super::*;
use crate::policy::evaluate::Because;
use crate::policy::testing::{flow, policy, world};

/// A ClusterNetworkPolicy for namespace `db`.
fn cnp(name: &str, tier: &str, priority: u16, rules: &str) -> String {
    format!(
        "---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {{name: {name}}}
spec:
  tier: {tier}
  priority: {priority}
  subject: {{namespaces: {{matchLabels: {{team: data}}}}}}
{rules}
"
    )
}

const ALL: &str = "from: [{namespaces: {}}]";

/// `+`, `-`, `?` and `.` as in evaluate_tests.rs; both ways of asking must agree.
fn check(more: &str, direction: Direction, cases: &[(&str, char)]) {
    let world = world(more);
    for (text, expected) in cases {
        let flow = flow(&world, text);
        let judgement = world.judge(&flow, direction);
        let mark = match judgement.verdict {
            Verdict::Allow => '+',
            Verdict::Deny => '-',
            Verdict::Undefined => '?',
            Verdict::NotApplicable => '.',
        };
        assert_eq!(mark, *expected, "{direction} of {text}: {judgement:?}");
        assert_eq!(judgement.verdict, world.verdict(&flow, direction), "{text}");
    }
}

fn ingress(more: &str, cases: &[(&str, char)]) {
    check(more, Direction::Ingress, cases);
}

fn egress(more: &str, cases: &[(&str, char)]) {
    check(more, Direction::Egress, cases);
}

fn because(more: &str, text: &str) -> (Because, Option<String>) {
    let world = world(more);
    let judgement = world.judge(&flow(&world, text), Direction::Ingress);
    let decided = judgement.decided.map(|i| &judgement.tiers[i]);
    (
        judgement.because,
        decided.map(|r| r.name(Direction::Ingress)),
    )
}

#[test]
fn the_admin_tier_is_asked_before_network_policies() {
    let deny_all = policy("p", "  ingress: []");
    let allow_all = policy("p", "  ingress: [{}]");
    let rule = |action| {
        cnp(
            "a",
            "Admin",
            5,
            &format!("  ingress: [{{action: {action}, {ALL}}}]"),
        )
    };
    let web = "shop/web db/pg TCP 1";
    for (tier, policies, mark) in [
        ("Accept", &deny_all, '+'),
        ("Accept", &allow_all, '+'),
        ("Deny", &deny_all, '-'),
        ("Deny", &allow_all, '-'),
        ("Pass", &deny_all, '-'),
        ("Pass", &allow_all, '+'),
    ] {
        ingress(&(rule(tier) + policies), &[(web, mark)]);
    }
    let (because, rule) = because(&(rule("Deny") + &allow_all), web);
    assert_eq!(because, Because::Tier(Tier::Admin));
    assert_eq!(
        rule.as_deref(),
        Some("ingress rule 1 of ClusterNetworkPolicy a (Admin tier, priority 5)")
    );
}

#[test]
fn the_baseline_tier_is_asked_for_pods_that_no_network_policy_isolates() {
    let rule = |action| {
        let rules = format!("  ingress: [{{name: no, action: {action}, {ALL}}}]");
        cnp("b", "Baseline", 5, &rules)
    };
    // db/pg is selected by the policy, db/backup is not.
    let allow = policy("p", "  ingress: [{}]");
    ingress(
        &(rule("Deny") + &allow),
        &[
            ("shop/web db/pg TCP 1", '+'),
            ("shop/web db/backup TCP 1", '-'),
            ("shop/web shop/job TCP 1", '+'),
        ],
    );
    // One that isolates the other direction only leaves this one to the tier.
    let other = policy("p", "  policyTypes: [Egress]");
    ingress(&(rule("Deny") + &other), &[("shop/web db/pg TCP 1", '-')]);
    for action in ["Accept", "Pass"] {
        ingress(&rule(action), &[("shop/web db/pg TCP 1", '+')]);
    }
    let (because, rule) = because(&rule("Deny"), "shop/web db/pg TCP 1");
    assert_eq!(because, Because::Tier(Tier::Baseline));
    let expected = "ingress rule 1 \"no\" of ClusterNetworkPolicy b (Baseline tier, priority 5)";
    assert_eq!(rule.as_deref(), Some(expected));
}

#[test]
fn the_lower_priority_and_the_first_rule_count() {
    let accept = format!("  ingress: [{{action: Accept, {ALL}}}]");
    let deny = format!("  ingress: [{{action: Deny, {ALL}}}]");
    let web = "shop/web db/pg TCP 1";
    let two = |a: u16, b: u16| cnp("a", "Admin", a, &accept) + &cnp("b", "Admin", b, &deny);
    ingress(&two(1, 2), &[(web, '+')]);
    ingress(&two(1000, 2), &[(web, '-')]);
    for (first, second, mark) in [("Accept", "Deny", '+'), ("Deny", "Accept", '-')] {
        let rules = format!("  ingress: [{{action: {first}, {ALL}}}, {{action: {second}, {ALL}}}]");
        ingress(&cnp("a", "Admin", 1, &rules), &[(web, mark)]);
    }
    // Pass leaves out the rest of its tier, and of its tier only.
    let pass = format!("  ingress: [{{action: Pass, {ALL}}}]");
    let passed = cnp("a", "Admin", 1, &pass) + &cnp("b", "Admin", 2, &deny);
    ingress(&passed, &[(web, '+')]);
    let below = cnp("c", "Baseline", 1, &deny);
    ingress(&(passed + &below), &[(web, '-')]);
    let base = cnp("a", "Baseline", 1, &pass) + &cnp("b", "Baseline", 2, &deny);
    ingress(&base, &[(web, '+')]);
}

#[test]
fn policies_of_one_priority_that_disagree_are_undefined() {
    let rule = |name, action: &str| {
        cnp(
            name,
            "Admin",
            7,
            &format!("  ingress: [{{action: {action}, {ALL}}}]"),
        )
    };
    let web = "shop/web db/pg TCP 1";
    let both = rule("a", "Accept") + &rule("b", "Deny");
    ingress(&both, &[(web, '?'), ("203.0.113.7 db/pg TCP 1", '+')]);
    assert_eq!(because(&both, web).0, Because::TierConflict);
    // Agreed, or of no consequence.
    ingress(&(rule("a", "Deny") + &rule("b", "Deny")), &[(web, '-')]);
    ingress(&(rule("a", "Accept") + &rule("b", "Pass")), &[(web, '+')]);
    let denied = rule("a", "Deny") + &rule("b", "Pass") + &policy("p", "  ingress: []");
    ingress(&denied, &[(web, '-'), ("shop/web db/backup TCP 1", '?')]);
    // One of an earlier priority settles it.
    let first = cnp(
        "c",
        "Admin",
        6,
        &format!("  ingress: [{{action: Deny, {ALL}}}]"),
    );
    ingress(&(both + &first), &[(web, '-')]);
}

#[test]
fn the_subject_is_a_set_of_pods_and_never_the_host_network() {
    let deny = format!("  ingress: [{{action: Deny, {ALL}}}]");
    let of = |subject: &str| {
        cnp("a", "Admin", 1, &deny).replace("{namespaces: {matchLabels: {team: data}}}", subject)
    };
    ingress(
        &of("{namespaces: {}}"),
        &[
            ("shop/web db/pg TCP 1", '-'),
            ("db/pg shop/web TCP 1", '-'),
            ("shop/web kube-system/agent-b TCP 1", '.'),
            ("db/pg db/pg TCP 1", '+'),
            ("kube-system/agent-b db/pg TCP 1", '+'),
        ],
    );
    ingress(
        &of("{pods: {namespaceSelector: {matchLabels: {team: data}}, \
             podSelector: {matchLabels: {app: pg}}}}"),
        &[
            ("shop/web db/pg TCP 1", '-'),
            ("shop/web db/backup TCP 1", '+'),
            ("db/pg shop/web TCP 1", '+'),
        ],
    );
}

#[test]
fn peers_are_pods_by_both_selectors_and_neither_nodes_nor_outside() {
    let rule = "  ingress: [{action: Deny, from: [{pods: {namespaceSelector: {matchLabels: \
                {env: prod}}, podSelector: {matchLabels: {tier: front}}}}]}]";
    ingress(
        &cnp("a", "Admin", 1, rule),
        &[
            ("shop/web db/pg TCP 1", '-'),
            ("shop/job db/pg TCP 1", '+'),
            ("db/backup db/pg TCP 1", '+'),
        ],
    );
    let all = format!("  ingress: [{{action: Deny, {ALL}}}]");
    ingress(
        &cnp("a", "Admin", 1, &all),
        &[
            ("203.0.113.7 db/pg TCP 1", '+'),
            ("192.168.0.1 db/pg TCP 1", '+'),
            ("kube-system/agent-a db/pg TCP 1", '+'),
        ],
    );
}

#[test]
fn egress_knows_nodes_networks_and_names() {
    let to = |peer: &str| {
        cnp(
            "a",
            "Admin",
            1,
            &format!("  egress: [{{action: Deny, to: [{peer}]}}]"),
        )
    };
    egress(
        &to("{nodes: {matchLabels: {zone: a}}}"),
        &[
            ("db/pg 192.168.0.1 TCP 1", '-'),
            ("db/pg kube-system/agent-a TCP 1", '-'),
            ("db/pg 192.168.0.2 TCP 1", '+'),
            ("db/pg shop/web TCP 1", '+'),
            ("db/pg 203.0.113.7 TCP 1", '+'),
        ],
    );
    // Unlike an ipBlock's, a network's addresses are those of pods too.
    egress(
        &to("{networks: [10.244.1.0/24, 203.0.113.0/28]}"),
        &[
            ("db/pg shop/web TCP 1", '-'),
            ("db/pg 203.0.113.7 TCP 1", '-'),
            ("db/pg 203.0.113.77 TCP 1", '+'),
            ("db/pg db/backup TCP 1", '+'),
        ],
    );
    let names = cnp(
        "a",
        "Admin",
        1,
        "  egress: [{action: Accept, to: [{domainNames: ['*.example.com']}]}, \
         {action: Deny, to: [{networks: [0.0.0.0/0]}]}]",
    );
    egress(&names, &[("db/pg 203.0.113.7 TCP 1", '?')]);
    let accepted = names.replace("action: Deny", "action: Accept");
    egress(&accepted, &[("db/pg 203.0.113.7 TCP 1", '+')]);
}

#[test]
fn ports_are_numbers_ranges_and_names() {
    let on = |protocols: &str| {
        let rules = format!("  ingress: [{{action: Deny, {ALL}, protocols: [{protocols}]}}]");
        cnp("a", "Admin", 1, &rules)
    };
    ingress(
        &on(
            "{tcp: {destinationPort: {number: 80}}}, {udp: {destinationPort: {range: {start: 5, end: 9}}}}",
        ),
        &[
            ("shop/web db/pg TCP 80", '-'),
            ("shop/web db/pg UDP 80", '+'),
            ("shop/web db/pg UDP 5", '-'),
            ("shop/web db/pg UDP 9", '-'),
            ("shop/web db/pg UDP 10", '+'),
            ("shop/web db/pg SCTP 80", '+'),
            ("shop/web db/pg ICMP", '+'),
        ],
    );
    ingress(
        &on("{destinationNamedPort: sql}"),
        &[
            ("shop/web db/pg TCP 5432", '-'),
            ("shop/web db/pg TCP 9187", '+'),
            ("shop/web db/pg UDP 5432", '+'),
            ("shop/web db/backup TCP 5432", '+'),
        ],
    );
    // Without ports of any protocol, also of those that NetworkPolicy does not define.
    let all = format!("  ingress: [{{action: Deny, {ALL}}}]");
    ingress(
        &cnp("a", "Admin", 1, &all),
        &[("shop/web db/pg ICMP", '-'), ("shop/web db/pg SCTP 7", '-')],
    );
}

#[test]
fn every_port_is_denied_where_one_is() {
    let rules = format!(
        "  ingress: [{{action: Accept, {ALL}, protocols: [{{tcp: {{destinationPort: {{number: 80}}}}}}]}}, \
         {{action: Deny, {ALL}, protocols: [{{tcp: {{destinationPort: {{range: {{start: 79, end: 81}}}}}}}}]}}]"
    );
    let more = cnp("a", "Admin", 1, &rules);
    ingress(
        &more,
        &[
            ("shop/web db/pg TCP", '-'),
            ("shop/web db/pg UDP", '+'),
            ("shop/web db/pg TCP 80", '+'),
            ("shop/web db/pg TCP 82", '+'),
        ],
    );
    let world = world(&more);
    let judgement = world.judge(&flow(&world, "shop/web db/pg TCP"), Direction::Ingress);
    assert_eq!(judgement.port, Some(79));
    // Covered twice, it is not denied at all.
    let covered = more
        .replace("start: 79, end: 81", "start: 80, end: 81")
        .replace("number: 80", "range: {start: 80, end: 82}");
    ingress(&covered, &[("shop/web db/pg TCP", '+')]);
}

#[test]
fn a_direction_without_rules_is_not_affected() {
    let more = cnp(
        "a",
        "Admin",
        1,
        &format!("  ingress: [{{action: Deny, {ALL}}}]"),
    );
    egress(&more, &[("db/pg shop/web TCP 1", '+')]);
    ingress(&more, &[("shop/web db/pg TCP 1", '-')]);
}

const V1ALPHA1: &str = "---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: AdminNetworkPolicy
metadata: {name: admin}
spec:
  priority: 10
  subject: {namespaces: {matchLabels: {team: data}}}
  ingress:
  - {action: Allow, from: [{namespaces: {}}], ports: [{portNumber: {protocol: TCP, port: 80}}]}
  - {action: Pass, from: [{namespaces: {}}], ports: [{portRange: {start: 1000, end: 2000}}]}
  - {action: Deny, from: [{namespaces: {}}], ports: [{namedPort: sql}, {portNumber: {protocol: UDP, port: 80}}]}
---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: BaselineAdminNetworkPolicy
metadata: {name: default}
spec:
  subject: {namespaces: {matchLabels: {team: data}}}
  ingress:
  - {action: Allow, from: [{namespaces: {}}], ports: [{portNumber: {protocol: TCP, port: 1500}}]}
  - {action: Deny, from: [{namespaces: {}}]}
";

#[test]
fn the_kinds_of_v1alpha1_are_the_same_tiers() {
    ingress(
        V1ALPHA1,
        &[
            ("shop/web db/pg TCP 80", '+'),
            ("shop/web db/pg UDP 80", '-'),
            ("shop/web db/pg TCP 5432", '-'),
            ("shop/web db/pg TCP 1500", '+'),
            ("shop/web db/pg TCP 1501", '-'),
            ("shop/web db/pg TCP 3000", '-'),
        ],
    );
    let isolated = V1ALPHA1.to_owned() + &policy("p", "  ingress: [{ports: [{port: 3000}]}]");
    ingress(
        &isolated,
        &[
            ("shop/web db/pg TCP 80", '+'),
            ("shop/web db/pg TCP 1500", '-'),
            ("shop/web db/pg TCP 3000", '+'),
        ],
    );
    // Its order beside ClusterNetworkPolicies of the tier is not defined.
    let beside = cnp(
        "b",
        "Baseline",
        1,
        &format!("  ingress: [{{action: Accept, {ALL}}}]"),
    );
    ingress(
        &(V1ALPHA1.to_owned() + &beside),
        &[
            ("shop/web db/pg TCP 3000", '?'),
            ("shop/web db/pg TCP 1500", '+'),
        ],
    );
}

#[test]
fn why_a_rule_does_not_match_is_told_for_its_closest_peer() {
    let rules = "  ingress: [{action: Accept, from: [{namespaces: {matchLabels: {a: b, c: d}}}, \
                 {namespaces: {matchLabels: {a: b}}}], protocols: [{tcp: {destinationPort: \
                 {number: 80}}}]}]\n  egress: [{action: Deny, to: [{nodes: {matchLabels: {zone: \
                 a}}}]}]";
    let world = world(&cnp("a", "Admin", 1, rules));
    let codes = |text: &str, direction| {
        let judgement = world.judge(&flow(&world, text), direction);
        let codes = judgement.tiers[0].failures.iter().map(Failure::code);
        codes.collect::<Vec<_>>()
    };
    let web = "shop/web db/pg TCP 1";
    assert_eq!(codes(web, Direction::Ingress), ["peer-namespace", "port"]);
    assert_eq!(
        codes("db/pg shop/web TCP 1", Direction::Egress),
        ["not-a-node"]
    );
    assert_eq!(
        codes("db/pg 192.168.0.2 TCP 1", Direction::Egress),
        ["peer-node"]
    );
}
