//! The specification's points, one named case or more for each.

use super::*;
use crate::policy::testing::{flow, policy, shop_policy, world};
use crate::policy::world::World;

/// Whether a side allows it: `+`, `-`, `?` (undefined), `.` (not applicable).
fn mark(verdict: Verdict) -> char {
    match verdict {
        Verdict::Allow => '+',
        Verdict::Deny => '-',
        Verdict::Undefined => '?',
        Verdict::NotApplicable => '.',
    }
}

/// Asserts the verdict of one side for flows, and that both ways of asking agree.
fn check(world: &World, direction: Direction, cases: &[(&str, char)]) {
    for (text, expected) in cases {
        let flow = flow(world, text);
        let judged = world.judge(&flow, direction).verdict;
        assert_eq!(mark(judged), *expected, "{direction} of {text}");
        assert_eq!(judged, world.verdict(&flow, direction), "{text}");
    }
}

fn ingress(rest: &str, cases: &[(&str, char)]) {
    check(&world(&policy("p", rest)), Direction::Ingress, cases);
}

fn egress(rest: &str, cases: &[(&str, char)]) {
    check(&world(&shop_policy("p", rest)), Direction::Egress, cases);
}

/// The first failed predicate of each item, in order.
fn failures(world: &World, direction: Direction, text: &str) -> Vec<&'static str> {
    let flow = flow(world, text);
    let judgement = world.judge(&flow, direction);
    let first = judgement.rules.iter();
    first
        .map(|r| r.failures.first().map_or("", Failure::code))
        .collect()
}

#[test]
fn point_01_types_omitted_with_egress_rules_isolate_both_ways() {
    let implied = "  egress: [{to: [{podSelector: {}}]}]";
    egress(
        implied,
        &[
            ("shop/web shop/job TCP 1", '+'),
            ("shop/web db/pg TCP 1", '-'),
        ],
    );
    check(
        &world(&shop_policy("p", implied)),
        Direction::Ingress,
        &[("db/pg shop/web TCP 1", '-'), ("db/pg shop/job TCP 1", '+')],
    );
    let empty = "  egress: []";
    egress(empty, &[("shop/web db/pg TCP 1", '+')]);
    ingress(empty, &[("shop/web db/pg TCP 1", '-')]);
}

#[test]
fn point_02_rules_of_a_direction_that_the_types_leave_out_are_inert() {
    let inert = "  policyTypes: [Egress]\n  ingress: [{from: [{podSelector: {}}]}]";
    ingress(inert, &[("shop/web db/pg TCP 1", '+')]);
    let effective = inert.replace("[Egress]", "[Ingress]");
    ingress(&effective, &[("shop/web db/pg TCP 1", '-')]);
}

#[test]
fn point_03_no_rules_deny_all_and_an_empty_rule_allows_all() {
    ingress(
        "  ingress: []",
        &[
            ("shop/web db/pg TCP 1", '-'),
            ("203.0.113.7 db/pg TCP 1", '-'),
        ],
    );
    ingress(
        "  ingress: [{}]",
        &[
            ("shop/web db/pg TCP 1", '+'),
            ("203.0.113.7 db/pg UDP 1", '+'),
        ],
    );
}

#[test]
fn point_04_a_missing_from_is_everyone_and_an_empty_pod_selector_the_own_namespace() {
    ingress(
        "  ingress: [{ports: [{port: 5432}]}]",
        &[
            ("203.0.113.7 db/pg TCP 5432", '+'),
            ("192.168.0.1 db/pg TCP 5432", '+'),
            ("shop/web db/pg TCP 5433", '-'),
        ],
    );
    ingress(
        "  ingress: [{from: [{podSelector: {}}]}]",
        &[
            ("db/backup db/pg TCP 1", '+'),
            ("shop/web db/pg TCP 1", '-'),
            ("203.0.113.7 db/pg TCP 1", '-'),
        ],
    );
}

#[test]
fn point_05_two_selectors_in_one_item_are_and_two_items_are_or() {
    let namespace = "namespaceSelector: {matchLabels: {env: prod}}";
    let pods = "podSelector: {matchLabels: {tier: front}}";
    ingress(
        &format!("  ingress: [{{from: [{{{namespace}, {pods}}}]}}]"),
        &[
            ("shop/web db/pg TCP 1", '+'),
            ("shop/job db/pg TCP 1", '-'),
            ("db/backup db/pg TCP 1", '-'),
        ],
    );
    ingress(
        &format!("  ingress: [{{from: [{{{namespace}}}, {{{pods}}}]}}]"),
        &[
            ("shop/web db/pg TCP 1", '+'),
            ("shop/job db/pg TCP 1", '+'),
            ("db/backup db/pg TCP 1", '+'),
        ],
    );
}

#[test]
fn point_06_an_empty_namespace_selector_is_all_pods_and_no_external_address() {
    let rule = "  ingress: [{from: [{namespaceSelector: {}}]}]";
    ingress(
        rule,
        &[
            ("shop/web db/pg TCP 1", '+'),
            ("db/backup db/pg TCP 1", '+'),
            ("203.0.113.7 db/pg TCP 1", '-'),
            ("192.168.0.1 db/pg TCP 1", '-'),
        ],
    );
    let world = world(&policy("p", rule));
    let of = |text| failures(&world, Direction::Ingress, text);
    assert_eq!(of("203.0.113.7 db/pg TCP 1"), ["peer-external"]);
    assert_eq!(of("192.168.0.1 db/pg TCP 1"), ["peer-host-network"]);
}

#[test]
fn point_07_not_in_and_does_not_exist_match_an_absent_key() {
    let rule = |expression: &str| {
        format!(
            "  ingress: [{{from: [{{namespaceSelector: {{matchExpressions: [{expression}]}}}}]}}]"
        )
    };
    for (expression, shop, db) in [
        ("{key: team, operator: NotIn, values: [data]}", '+', '-'),
        ("{key: team, operator: DoesNotExist}", '+', '-'),
        ("{key: team, operator: In, values: [data, x]}", '-', '+'),
        ("{key: team, operator: Exists}", '-', '+'),
    ] {
        ingress(
            &rule(expression),
            &[
                ("shop/web db/pg TCP 1", shop),
                ("db/backup db/pg TCP 1", db),
            ],
        );
    }
}

#[test]
fn point_08_a_protocol_alone_is_all_its_ports_and_no_ports_no_restriction() {
    ingress(
        "  ingress: [{ports: [{protocol: UDP}]}]",
        &[
            ("shop/web db/pg UDP 53", '+'),
            ("shop/web db/pg UDP 1", '+'),
            ("shop/web db/pg UDP", '+'),
            ("shop/web db/pg TCP 53", '-'),
        ],
    );
    ingress(
        "  ingress: [{from: [{namespaceSelector: {}}], ports: []}]",
        &[
            ("shop/web db/pg SCTP 7", '+'),
            ("shop/web db/pg TCP 7", '+'),
        ],
    );
}

#[test]
fn point_09_end_port_is_inclusive() {
    ingress(
        "  ingress: [{ports: [{port: 100, endPort: 102}]}]",
        &[
            ("shop/web db/pg TCP 99", '-'),
            ("shop/web db/pg TCP 100", '+'),
            ("shop/web db/pg TCP 102", '+'),
            ("shop/web db/pg TCP 103", '-'),
            ("shop/web db/pg TCP", '-'),
        ],
    );
}

#[test]
fn point_10_a_named_port_resolves_on_the_destination_by_name_and_protocol() {
    ingress(
        "  ingress: [{ports: [{port: sql}]}]",
        &[
            ("shop/web db/pg TCP 5432", '+'),
            ("shop/web db/pg TCP 9187", '-'),
        ],
    );
    let udp = "  ingress: [{ports: [{port: sql, protocol: UDP}]}]";
    ingress(udp, &[("shop/web db/pg UDP 5432", '-')]);
    let of = |more: &str, text| failures(&world(more), Direction::Ingress, text);
    assert_eq!(
        of(&policy("p", udp), "shop/web db/pg UDP 5432"),
        ["named-port-unresolved"]
    );
    egress(
        "  policyTypes: [Egress]\n  egress: [{ports: [{port: sql}]}]",
        &[
            ("shop/web db/pg TCP 5432", '+'),
            ("shop/web db/backup TCP 5432", '-'),
            ("shop/web 203.0.113.7 TCP 5432", '-'),
        ],
    );
    let two = "---
apiVersion: v1
kind: Pod
metadata: {name: two, namespace: db, labels: {app: pg}}
spec:
  containers:
  - ports: [{name: sql, containerPort: 1}]
  - ports: [{name: sql, containerPort: 2}]
status: {podIP: 10.244.2.11}
";
    check(
        &world(&(policy("p", "  ingress: [{ports: [{port: sql}]}]") + two)),
        Direction::Ingress,
        &[
            ("shop/web db/two TCP 1", '+'),
            ("shop/web db/two TCP 2", '+'),
            ("shop/web db/two TCP 3", '-'),
        ],
    );
}

#[test]
fn point_11_a_block_over_a_pods_address_is_undefined_and_over_others_is_not() {
    let rule = "  ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}]}]";
    ingress(
        rule,
        &[
            ("shop/web db/pg TCP 1", '?'),
            ("203.0.113.7 db/pg TCP 1", '+'),
            ("192.168.0.1 db/pg TCP 1", '+'),
        ],
    );
    // A rule that matches for certain leaves no doubt.
    let both = world(&(policy("p", rule) + &policy("q", "  ingress: [{}]")));
    check(&both, Direction::Ingress, &[("shop/web db/pg TCP 1", '+')]);
}

#[test]
fn point_12_except_cuts_its_own_item_only() {
    let cut = "{ipBlock: {cidr: 203.0.113.0/24, except: [203.0.113.0/28]}}";
    let rule = format!("  ingress: [{{from: [{cut}]}}]");
    ingress(
        &rule,
        &[
            ("203.0.113.7 db/pg TCP 1", '-'),
            ("203.0.113.99 db/pg TCP 1", '+'),
        ],
    );
    let again = format!("  ingress: [{{from: [{cut}, {{ipBlock: {{cidr: 203.0.113.7/32}}}}]}}]");
    ingress(&again, &[("203.0.113.7 db/pg TCP 1", '+')]);
    let world = world(&policy("p", &rule));
    let of = |text| failures(&world, Direction::Ingress, text);
    assert_eq!(of("203.0.113.7 db/pg TCP 1"), ["cidr-except"]);
    assert_eq!(of("198.51.100.1 db/pg TCP 1"), ["cidr-miss"]);
}

#[test]
fn point_13_only_the_original_direction_is_judged() {
    // The client is isolated for ingress, the answer to its own connection needs no rule.
    let world = world(&shop_policy("p", "  ingress: []"));
    assert_eq!(
        world.both(&flow(&world, "shop/web db/pg TCP 1")),
        Verdict::Allow
    );
    assert_eq!(
        world.both(&flow(&world, "db/pg shop/web TCP 1")),
        Verdict::Deny
    );
}

#[test]
fn point_14_the_own_node_is_always_allowed_in_and_others_are_not() {
    ingress(
        "  ingress: []",
        &[
            ("192.168.0.2 db/pg TCP 1", '+'),
            ("kube-system/agent-b db/pg TCP 1", '+'),
            ("192.168.0.1 db/pg TCP 1", '-'),
            ("kube-system/agent-a db/pg TCP 1", '-'),
            ("db/pg db/pg TCP 1", '+'),
        ],
    );
    // Out to the own node needs a rule.
    egress(
        "  policyTypes: [Egress]",
        &[
            ("shop/web 192.168.0.1 TCP 1", '-'),
            ("shop/web shop/web TCP 1", '+'),
        ],
    );
}

#[test]
fn point_15_host_network_pods_are_no_subjects_and_as_peers_their_nodes() {
    let all = "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: kube-system}
spec: {podSelector: {}}
";
    check(
        &world(all),
        Direction::Ingress,
        &[("shop/web kube-system/agent-b TCP 1", '.')],
    );
    ingress(
        "  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: agent}}}]}]",
        &[("kube-system/agent-a db/pg TCP 1", '-')],
    );
    ingress(
        "  ingress: [{from: [{ipBlock: {cidr: 192.168.0.1/32}}]}]",
        &[
            ("kube-system/agent-a db/pg TCP 1", '+'),
            ("192.168.0.1 db/pg TCP 1", '+'),
        ],
    );
}

#[test]
fn point_16_icmp_is_undefined_where_the_pod_is_isolated() {
    let rule = "  ingress: [{}]";
    ingress(
        rule,
        &[
            ("shop/web db/pg ICMP", '?'),
            ("shop/web db/backup ICMP", '+'),
        ],
    );
    ingress(
        "  ingress: []",
        &[("shop/web db/pg ICMPv6", '?'), ("shop/web db/pg 47", '?')],
    );
    let world = world(&policy("p", rule));
    let of = |text| failures(&world, Direction::Ingress, text);
    assert_eq!(of("shop/web db/pg ICMP"), ["protocol-undefined"]);
}

#[test]
fn point_17_rules_for_udp_or_sctp_admit_no_tcp() {
    let rule = "  ingress: [{ports: [{protocol: UDP, port: 1}, {protocol: SCTP, port: 1}]}]";
    ingress(
        rule,
        &[
            ("shop/web db/pg TCP 1", '-'),
            ("shop/web db/pg UDP 1", '+'),
            ("shop/web db/pg SCTP 1", '+'),
        ],
    );
    let world = world(&policy("p", rule));
    let of = |text| failures(&world, Direction::Ingress, text);
    assert_eq!(of("shop/web db/pg TCP 1"), ["protocol"]);
    assert_eq!(of("shop/web db/pg UDP 2"), ["port"]);
}

#[test]
fn point_18_a_policy_isolates_in_its_own_namespace_only() {
    let world = world(&policy("p", "  ingress: []").replace("{matchLabels: {app: pg}}", "{}"));
    let cases = [
        ("db/pg shop/web TCP 1", '+'),
        ("shop/web db/backup TCP 1", '-'),
    ];
    check(&world, Direction::Ingress, &cases);
}

// Point 19, the lag of allow rules, is the finding `transient`: findings_tests.rs.

#[test]
fn every_failed_predicate_is_told_and_the_first_one_first() {
    let rule = "  ingress: [{from: [{namespaceSelector: {matchLabels: {team: shop}}, \
                podSelector: {matchLabels: {tier: back}}}, {podSelector: {}}], \
                ports: [{port: 80}]}]";
    let world = world(&policy("p", rule));
    let flow = flow(&world, "shop/web db/pg TCP 5432");
    let judgement = world.judge(&flow, Direction::Ingress);
    let codes: Vec<Vec<&str>> = judgement
        .rules
        .iter()
        .map(|r| r.failures.iter().map(Failure::code).collect())
        .collect();
    assert_eq!(
        codes,
        [
            vec!["peer-namespace", "peer-pod", "port"],
            vec!["same-namespace-only", "port"]
        ]
    );
    let first = judgement.rules[0].failures[0].detail();
    assert_eq!(first.as_deref(), Some("team=shop"));
    let none = world_of_no_rules();
    assert_eq!(
        failures(&none, Direction::Ingress, "shop/web db/pg TCP 1"),
        ["no-rules"]
    );
}

fn world_of_no_rules() -> World {
    world(&policy("p", ""))
}

#[test]
fn dual_stack_matches_by_the_family_that_both_ends_have() {
    let pods = "---
apiVersion: v1
kind: Pod
metadata: {name: six, namespace: kube-system}
spec: {nodeName: node-x, hostNetwork: true}
status: {podIPs: [{ip: 192.168.0.9}, {ip: 'fd00::9'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: dual, namespace: db, labels: {app: pg}}
spec: {nodeName: node-b}
status: {podIPs: [{ip: 10.244.2.12}, {ip: 'fd01::12'}]}
";
    let rule = "  ingress: [{from: [{ipBlock: {cidr: 192.168.0.0/24}}]}]";
    check(
        &world(&(policy("p", rule) + pods)),
        Direction::Ingress,
        &[
            ("kube-system/six db/pg TCP 1", '+'),
            // By which family is open.
            ("kube-system/six db/dual TCP 1", '?'),
            ("fd00::77 db/dual TCP 1", '-'),
        ],
    );
}

#[test]
fn hundreds_of_rules_are_no_harm() {
    let rules: Vec<String> = (1..=600)
        .map(|i| format!("{{ports: [{{port: {i}}}]}}"))
        .collect();
    ingress(
        &format!("  ingress: [{}]", rules.join(", ")),
        &[
            ("shop/web db/pg TCP 600", '+'),
            ("shop/web db/pg TCP 601", '-'),
        ],
    );
}
