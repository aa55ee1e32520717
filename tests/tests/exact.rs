//! Node-wide sums, so alone: cargo runs this binary after or before the others, never beside them,
//! and `Lab::alone` keeps out the labs of any other process.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use whydrop_tests::agent::Sample;
use whydrop_tests::bystander::Habit;
use whydrop_tests::counters;
use whydrop_tests::expect::Row;
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::on_both_families;
use whydrop_tests::scene::{Scene, UDP_PORT};
use whydrop_tests::traffic;

on_both_families!(flood);

/// How many packets, over how many flows.
const PACKETS: u64 = 200_000;
const FLOWS: usize = 500;

/// A flood of drops, to the packet, and the node's sums that everything must add up to.
fn flood(family: Family) -> Result<()> {
    let scene = Scene::with(Lab::alone()?, family, Habit::Connects, |lab| {
        lab.nft(
            Host::Router,
            &format!(
                "table inet lab {{
                   counter hits {{ }}
                   chain c {{ type filter hook forward priority 0;
                     udp dport {UDP_PORT} counter name hits drop
                   }}
                 }}"
            ),
        )
    })?;
    let to = scene.lab.socket(Place::Of(Host::Server), family, UDP_PORT);
    let burst = scene.lab.within(Host::Client, || {
        traffic::udp_burst(to, PACKETS, FLOWS, b"flood")
    })?;
    let hits = counters::nft(&scene.lab, Host::Router, "hits")?;
    ensure!(
        burst.accepted == PACKETS && hits == PACKETS,
        "{burst:?}, nft counted {hits}"
    );
    let rows = [Row::dropped("client", "server", hits)
        .protocol("UDP")
        .reason(&["NETFILTER_DROP"])];
    scene.check(&rows)?;
    // One scrape is one moment: what it shows must add up whatever else the node drops.
    sums(&scene.agent().metrics()?)?;
    scene.expect(&rows)
}

/// `whydrop_node_drops_total` by outcome is the sum of the pairs' counters.
fn sums(samples: &[Sample]) -> Result<()> {
    let mut sums: BTreeMap<String, f64> = BTreeMap::new();
    for sample in samples {
        let key = match sample.name.as_str() {
            "whydrop_node_drops_total" => format!("node {}", sample.label("outcome")),
            "whydrop_silent_drops_total" => "pairs dropped".to_owned(),
            "whydrop_rejected_packets_total" => "pairs rejected".to_owned(),
            _ => continue,
        };
        *sums.entry(key).or_default() += sample.value;
    }
    for outcome in ["dropped", "rejected"] {
        let of = |whose: &str| {
            sums.get(&format!("{whose} {outcome}"))
                .copied()
                .unwrap_or(0.0)
        };
        ensure!(
            of("node") == of("pairs"),
            "{outcome}: the sums differ: {sums:?}"
        );
    }
    Ok(())
}
