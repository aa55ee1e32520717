//! The agent as a process: its end, its places taken by another, its objects changed under it.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use whydrop_tests::agent::{self, Agent, POLL};
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::patience::within;
use whydrop_tests::{expect, objects, traffic};

/// Until a changed objects file counts, by the contract.
const RELOAD: Duration = Duration::from_secs(2);
/// How much later it may be seen.
const SLACK: Duration = Duration::from_secs(2);

/// SIGTERM and SIGINT end it well and in time.
#[test]
fn ends_on_signals() -> Result<()> {
    let lab = Lab::new()?;
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let status = Agent::start(&lab)?.stop_by(signal)?;
        ensure!(status.success(), "{signal} ended it with {status}");
    }
    Ok(())
}

/// The same while drops come in and a reader follows.
#[test]
fn ends_under_drops() -> Result<()> {
    let lab = Lab::new()?;
    let agent = Agent::start(&lab)?;
    let to = lab.socket(Place::Marker, Family::V4, 9);
    let status = std::thread::scope(|scope| {
        scope.spawn(|| {
            lab.within(Host::Client2, || {
                traffic::udp_burst(to, 200_000, 50, b"marker")
            })
        });
        expect::barrier(&lab, &agent)?;
        agent.stop()
    })?;
    ensure!(status.success(), "it ended with {status}");
    Ok(())
}

/// Runs an agent that must not start, and takes what it says.
fn refused(arguments: &[&str]) -> Result<String> {
    let mut child = Command::new(agent::binary()?)
        .args(["agent", "--cluster", "none", "--node-name", "second"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
        }
        std::thread::sleep(POLL);
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code().is_some_and(|code| code != 0),
        "it must say that it cannot start, and fail: {}; {said}",
        output.status
    );
    Ok(said)
}

/// A second agent is refused with one clear sentence where it would share a place, and the first
/// goes on.
#[test]
fn places_in_use() -> Result<()> {
    let lab = Lab::new()?;
    let first = Agent::start(&lab)?;
    let directory = tempfile::tempdir()?;
    let other = directory.path().join("other.sock");
    let (listen, socket) = (
        first.listen().to_string(),
        first.socket().display().to_string(),
    );
    let said = refused(&[
        "--listen",
        &listen,
        "--socket",
        &other.display().to_string(),
    ])?;
    ensure!(said.contains(&listen), "it does not name {listen}: {said}");
    let said = refused(&["--listen", "127.0.0.1:0", "--socket", &socket])?;
    ensure!(said.contains(&socket), "it does not name {socket}: {said}");
    expect::barrier(&lab, &first)
}

/// Two agents with places of their own both count everything.
#[test]
fn two_agents() -> Result<()> {
    let lab = Lab::new()?;
    let (first, second) = (Agent::start(&lab)?, Agent::start(&lab)?);
    for agent in [&first, &second] {
        expect::barrier(&lab, agent)?;
    }
    ensure!(first.stop()?.success());
    expect::barrier(&lab, &second)
}

/// A changed file counts; a broken or empty one leaves the last good state, and is counted.
#[test]
fn objects_change() -> Result<()> {
    let lab = Lab::new()?;
    let agent = Agent::start(&lab)?;
    expect::barrier(&lab, &agent)?;
    let mut changed = objects::list(&lab);
    rename(&mut changed, "marker", "marker-reborn");
    fs::write(agent.objects(), serde_json::to_string(&changed)?)?;
    until_named(&lab, &agent, "marker-reborn")?;
    for broken in ["", "kind: [", "\u{0}"] {
        let before = errors(&agent)?;
        fs::write(agent.objects(), broken)?;
        let deadline = Instant::now() + within(RELOAD + SLACK);
        while errors(&agent)? == before {
            ensure!(
                Instant::now() < deadline,
                "no error was counted for {broken:?}"
            );
            std::thread::sleep(POLL);
        }
        until_named(&lab, &agent, "marker-reborn")?;
    }
    Ok(())
}

/// A malformed object is skipped alone.
#[test]
fn malformed_object() -> Result<()> {
    let lab = Lab::new()?;
    let mut list = objects::list(&lab);
    if let Some(items) = list["items"].as_array_mut() {
        items.insert(
            0,
            serde_json::json!({"apiVersion": "v1", "kind": "Pod", "metadata": 7}),
        );
        items.insert(3, serde_json::json!("no object"));
    }
    let agent = Agent::start_with(&lab.node(), &list, &[])?;
    ensure!(
        errors(&agent)? >= 2.0,
        "the two malformed objects were not counted"
    );
    until_named(&lab, &agent, "marker")
}

fn rename(list: &mut Value, from: &str, to: &str) {
    for item in list["items"].as_array_mut().into_iter().flatten() {
        if item["kind"] == "Pod" && item["metadata"]["name"] == from {
            item["metadata"]["name"] = to.into();
            item["metadata"]["uid"] = to.into();
        }
    }
}

fn errors(agent: &Agent) -> Result<f64> {
    Ok(agent
        .metrics()?
        .iter()
        .filter(|sample| sample.name == "whydrop_errors_total")
        .filter(|sample| sample.label("stage") == "objects")
        .map(|sample| sample.value)
        .sum())
}

/// Drops packets for the marker until one is counted under this name.
fn until_named(lab: &Lab, agent: &Agent, pod: &str) -> Result<()> {
    let counted = || -> Result<f64> {
        Ok(agent
            .metrics()?
            .iter()
            .filter(|sample| sample.label("destination_namespace") == lab.namespace())
            .filter(|sample| sample.label("destination_pod") == pod)
            .map(|sample| sample.value)
            .sum())
    };
    let before = counted()?;
    let to = lab.socket(Place::Marker, Family::V4, 9);
    let deadline = Instant::now() + within(RELOAD + SLACK);
    while counted()? <= before {
        ensure!(
            Instant::now() < deadline,
            "no drop was counted under the name {pod}"
        );
        lab.within(Host::Client2, || traffic::udp_burst(to, 1, 1, b"marker"))?;
        std::thread::sleep(POLL);
    }
    Ok(())
}
