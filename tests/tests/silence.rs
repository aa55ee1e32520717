//! Thousands at once: each attempt that nobody answers is told once, by its own port and id, with
//! where it was lost, and the totals are those of the traffic.

use anyhow::{Result, ensure};
use whydrop_tests::lab::{Family, Host};
use whydrop_tests::scene::Scene;
use whydrop_tests::silence::{CONNECTS, QUERIES, Traffic, rules};
use whydrop_tests::{tallies, unanswered};

#[test]
fn thousands() -> Result<()> {
    // Longer than the default: the test's own servers answer thousands.
    let scene = Scene::with_arguments(Family::V4, &["--dns-timeout", "6s"], rules)?;
    let traffic = Traffic::start(&scene.lab)?;
    let begun = scene.grown(Host::Client, "TcpActiveOpens", "TcpActiveOpens")?;
    ensure!(
        (begun, traffic.results.sum(), traffic.dns.queries)
            == (CONNECTS as u64, CONNECTS as u64, QUERIES as u64),
        "the client's kernel began {begun} connects, the test {:?}, {:?}",
        traffic.results,
        traffic.dns
    );
    let (lab, agent) = (&scene.lab, scene.agent());
    unanswered::expect(lab, agent, &traffic.unanswered)?;
    tallies::connects(lab, agent, "client", traffic.results)?;
    tallies::dns(lab, agent, "client", &traffic.dns)?;
    drop(traffic);
    scene.finish()
}
