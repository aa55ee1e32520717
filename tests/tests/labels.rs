//! `--labels`: how finely series name the two ends.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use whydrop_tests::agent::{Agent, POLL, Sample};
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::{objects, traffic};

/// Until a drop must be on `/metrics`.
const DEADLINE: Duration = Duration::from_secs(60);
const PACKETS: u64 = 40;

/// Client and client2 become two pods of one Deployment.
fn owned(mut list: Value) -> Value {
    for item in list["items"].as_array_mut().into_iter().flatten() {
        let name = item["metadata"]["name"].as_str().unwrap_or_default();
        if item["kind"] == "Pod" && name.starts_with("client") {
            item["metadata"]["labels"]["pod-template-hash"] = "7d9f8c".into();
            item["metadata"]["ownerReferences"] = json!([{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-7d9f8c",
                "uid": "web-7d9f8c", "controller": true,
            }]);
        }
    }
    list
}

/// Drops packets of two pods of one workload; the silent drops of the lab, as `level` labels them.
fn series(level: &str) -> Result<(Lab, Vec<Sample>)> {
    let lab = Lab::new()?;
    let server = lab.address(Place::Of(Host::Server), Family::V4);
    lab.nft(
        Host::Router,
        &format!(
            "table ip lab {{ chain c {{ type filter hook forward priority 0;
               ip daddr {server} drop
             }}
             }}"
        ),
    )?;
    let list = owned(objects::list(&lab));
    let agent = Agent::start_with(&lab.node(), &list, &["--labels", level])?;
    let to = lab.socket(Place::Of(Host::Server), Family::V4, 5000);
    for host in [Host::Client, Host::Client2] {
        lab.within(host, || traffic::udp_burst(to, PACKETS, 1, b"x"))?;
    }
    let deadline = Instant::now() + DEADLINE;
    loop {
        let mut samples = agent.metrics()?;
        samples.retain(|sample| {
            sample.name == "whydrop_silent_drops_total"
                && sample.label("source_namespace") == lab.namespace()
        });
        let sum: f64 = samples.iter().map(|sample| sample.value).sum();
        if sum >= 2.0 * PACKETS as f64 {
            ensure!(sum == 2.0 * PACKETS as f64, "{samples:?}");
            return Ok((lab, samples));
        }
        ensure!(Instant::now() < deadline, "{samples:?}");
        std::thread::sleep(POLL);
    }
}

#[test]
fn pod() -> Result<()> {
    let (_lab, samples) = series("pod")?;
    ensure!(samples.len() == 2, "{samples:?}");
    for sample in &samples {
        ensure!(
            sample.label("source_pod").starts_with("client"),
            "{sample:?}"
        );
        ensure!(sample.label("source_workload") == "web", "{sample:?}");
        ensure!(sample.label("destination_pod") == "server", "{sample:?}");
    }
    Ok(())
}

#[test]
fn workload() -> Result<()> {
    let (_lab, samples) = series("workload")?;
    let [sample] = &samples[..] else {
        anyhow::bail!("not one series: {samples:?}");
    };
    ensure!(sample.label("source_workload") == "web", "{sample:?}");
    for label in ["source_pod", "destination_pod"] {
        ensure!(sample.label(label).is_empty(), "{sample:?}");
    }
    Ok(())
}

#[test]
fn namespace() -> Result<()> {
    let (lab, samples) = series("namespace")?;
    let [sample] = &samples[..] else {
        anyhow::bail!("not one series: {samples:?}");
    };
    ensure!(
        sample.label("destination_namespace") == lab.namespace(),
        "{sample:?}"
    );
    for label in [
        "source_pod",
        "source_workload",
        "destination_pod",
        "destination_workload",
    ] {
        ensure!(sample.label(label).is_empty(), "{sample:?}");
    }
    Ok(())
}
