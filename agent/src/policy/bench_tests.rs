//! How long many evaluations take: `cargo test --release -p whydrop --lib million -- --ignored
//! --nocapture`.

use std::fmt::Write as _;
use std::time::Instant;

use super::evaluate::{End, Flow, Verdict};
use super::testing;
use super::world::World;
use crate::event::Protocol;

const NAMESPACES: usize = 100;
const PODS: usize = 10_000;
const POLICIES: usize = 1_000;
const FLOWS: usize = 1_000_000;

/// A hundred namespaces, each with ten policies of ten rules and a hundred pods.
fn cluster(tiers: bool) -> World {
    let mut text = String::new();
    for i in 0..NAMESPACES {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: n{i}, labels: {{team: t{}}}}}\n",
            i % 7
        );
    }
    for i in 0..PODS {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{i}, namespace: n{}, labels: \
             {{app: a{}, tier: r{}}}}}\nspec: {{nodeName: node-{}}}\nstatus: {{podIP: \
             10.{}.{}.{}}}\n",
            i % NAMESPACES,
            i / NAMESPACES % 10,
            i % 3,
            i % 50,
            i >> 16,
            i >> 8 & 255,
            i & 255,
        );
    }
    for i in 0..POLICIES {
        let mut rules = String::new();
        for j in 0..10 {
            let _ = write!(
                rules,
                "\n  - from: [{{namespaceSelector: {{matchLabels: {{team: t{j}}}}}, podSelector: \
                 {{matchLabels: {{tier: r{}}}}}}}]\n    ports: [{{port: {}}}, {{port: 8080}}]",
                j % 3,
                80 + j,
            );
        }
        let _ = write!(
            text,
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: q{i}, \
             namespace: n{}}}\nspec:\n  podSelector: {{matchLabels: {{app: a{}}}}}\n  ingress:{rules}\n",
            i % NAMESPACES,
            i / NAMESPACES,
        );
    }
    for i in (0..20).filter(|_| tiers) {
        let _ = write!(
            text,
            "---\napiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\n\
             metadata: {{name: c{i}}}\nspec:\n  tier: {}\n  priority: {i}\n  subject: {{namespaces: \
             {{matchLabels: {{team: t{}}}}}}}\n  ingress: [{{action: Deny, from: [{{pods: \
             {{namespaceSelector: {{}}, podSelector: {{matchLabels: {{app: a{}}}}}}}}}], protocols: \
             [{{tcp: {{destinationPort: {{number: 22}}}}}}]}}]\n",
            if i % 2 == 0 { "Admin" } else { "Baseline" },
            i % 7,
            i % 10,
        );
    }
    World::new(&testing::objects(&text))
}

#[test]
#[ignore = "measures; nothing else may run"]
fn a_million_evaluations() {
    for (tiers, what) in [
        (false, "NetworkPolicies"),
        (true, "with 20 policies of the tiers"),
    ] {
        let world = cluster(tiers);
        let mut counts = [0; 3];
        let begun = Instant::now();
        let mut next: u32 = 1;
        for _ in 0..FLOWS {
            // A linear congruential generator: its high bits are good enough here.
            let mut pick = |n: u32| {
                next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (next >> 8) % n
            };
            let flow = Flow {
                source: End::pod(pick(PODS as u32)),
                destination: End::pod(pick(PODS as u32)),
                protocol: Protocol::TCP,
                port: Some([22, 80, 84, 443, 8080][pick(5) as usize]),
            };
            match world.both(&flow) {
                Verdict::Allow => counts[0] += 1,
                Verdict::Deny => counts[1] += 1,
                Verdict::Undefined | Verdict::NotApplicable => counts[2] += 1,
            }
        }
        let took = begun.elapsed();
        println!("{what}: {FLOWS} evaluations in {took:?}, allowed/denied/other {counts:?}");
        assert!(
            counts[0] > FLOWS / 100 && counts[1] > FLOWS / 100,
            "{counts:?}"
        );
        assert!(took.as_secs_f64() < 1.0, "{took:?}");
    }
}
