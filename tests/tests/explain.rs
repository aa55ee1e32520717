//! Explanations and proposed policies against the connections that a node really has.

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use whydrop_tests::agent::{Agent, binary};
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::watching::{DEAF, OPEN, begin_connect, deaf_lab, wait_for};
use whydrop_tests::{objects, on_both_families, tracked};

on_both_families!(
    proposed_policies_are_laid_against_real_connections,
    a_connection_is_explained_with_what_was_seen_of_it,
    a_large_table_is_read_whole_in_little_room,
);

/// A port of the Service that is sent on to [`OPEN`].
const ASKED: u16 = 8080;
/// An UDP port that answers.
const ECHO: u16 = 1053;

fn start(lab: &Lab) -> Result<Agent> {
    let list = objects::with_workloads(objects::list(lab));
    let agent = Agent::start_in(&lab.netns(Host::Router), &lab.node(), &list, &[])?;
    wait_for("conntrack is asked", || {
        run(&agent, &["connections"]).is_ok_and(|(_, text)| text.contains("\"conntrack\":\"read\""))
    })?;
    Ok(agent)
}

/// Exit code and what is printed.
fn run(agent: &Agent, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let output = Command::new(binary()?)
        .args(arguments)
        .arg("--socket")
        .arg(agent.socket())
        .output()
        .context("run whydrop")?;
    let told = String::from_utf8(output.stderr)?;
    let code = output.status.code();
    ensure!(code.is_some_and(|code| code < 2), "{arguments:?}: {told}");
    Ok((code, String::from_utf8(output.stdout)?))
}

/// What the agent tells of connections from the client to the server that were answered.
fn connections(agent: &Agent) -> Result<Vec<Value>> {
    let (_, text) = run(agent, &["connections"])?;
    let lines = text.lines().map(serde_json::from_str::<Value>);
    let lines = lines.collect::<Result<Vec<_>, _>>()?;
    let own = lines.into_iter().filter(|line| {
        line["seen"] == "answered"
            && line["source"]["pod"] == "client"
            && line["destination"]["pod"] == "server"
    });
    Ok(own.collect())
}

/// The Service's port leads to the server.
fn translate(lab: &Lab, family: Family) -> Result<()> {
    let server = lab.address(Place::Of(Host::Server), family);
    let service = lab.address(Place::Service, family);
    let ip = family.nft();
    let to = SocketAddr::new(server, OPEN);
    lab.nft(
        Host::Router,
        &format!(
            "table inet services {{ chain c {{ type nat hook prerouting priority -100;
                 {ip} daddr {service} tcp dport {ASKED} dnat {ip} to {to}
               }}
             }}"
        ),
    )
}

fn proposed_policies_are_laid_against_real_connections(family: Family) -> Result<()> {
    let lab = deaf_lab()?;
    translate(&lab, family)?;
    let real = lab.socket(Place::Of(Host::Server), family, OPEN);
    let _listener = lab.within(Host::Server, || TcpListener::bind(real))?;
    let echo = lab.socket(Place::Of(Host::Server), family, ECHO);
    let echo = lab.within(Host::Server, || UdpSocket::bind(echo))?;
    let agent = start(&lab)?;
    ensure!(connections(&agent)?.is_empty(), "nobody connected yet");

    let service = lab.socket(Place::Service, family, ASKED);
    let asks = lab.address(Place::Of(Host::Client), family);
    let kept = lab.within(Host::Client, || -> Result<_> {
        let direct = (0..3).map(|_| TcpStream::connect(real));
        let direct = direct.collect::<Result<Vec<_>, _>>()?;
        let by_service = (0..2).map(|_| TcpStream::connect(service));
        let by_service = by_service.collect::<Result<Vec<_>, _>>()?;
        let udp = UdpSocket::bind((asks, 0))?;
        udp.send_to(b"x", echo.local_addr()?)?;
        Ok((direct, by_service, udp))
    })?;
    let (_, back) = echo.recv_from(&mut [0; 8])?;
    echo.send_to(b"y", back)?;
    // Nobody answers this one: it is no connection.
    let (_, _connecting) = begin_connect(&lab, family, DEAF)?;

    let seen = connections(&agent)?;
    let count = |protocol: &str, port: u16, service: bool| -> u64 {
        let of = seen.iter().filter(|c| {
            c["protocol"] == protocol
                && c["destination"]["port"] == port
                && c["destination"]["service"].is_object() == service
        });
        of.filter_map(|c| c["connections"].as_u64()).sum()
    };
    ensure!(
        (
            count("TCP", OPEN, false),
            count("TCP", OPEN, true),
            count("UDP", ECHO, false),
            seen.len()
        ) == (3, 2, 1, 3),
        "{seen:#?}"
    );

    // A policy that admits TCP alone.
    let directory = tempfile::tempdir()?;
    let propose = |ingress: &Value| -> Result<(Option<i32>, Value)> {
        let path = directory.path().join("policy.json");
        let policy = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": lab.namespace(), "name": "guard"},
            "spec": {"podSelector": {"matchLabels": {"app": "server"}}, "ingress": ingress},
        });
        std::fs::write(&path, policy.to_string())?;
        let (objects, path) = (agent.objects(), path.display().to_string());
        let objects = objects.display().to_string();
        let flags = [
            "explain",
            "--with",
            &path,
            "--objects",
            &objects,
            "-o",
            "json",
        ];
        let (code, text) = run(&agent, &flags)?;
        Ok((code, serde_json::from_str(&text)?))
    };
    let (code, report) = propose(&json!([{"ports": [{"port": OPEN}]}]))?;
    let denied = report["denied"].as_array().context("a list")?;
    // The attempt that nobody answered may be among them, as one that failed.
    let answered: Vec<&Value> = denied.iter().filter(|g| g["connections"] != 0).collect();
    ensure!(code == Some(1) && answered.len() == 1, "{report:#}");
    let first = answered[0];
    ensure!(
        (&first["protocol"], &first["port"], &first["connections"])
            == (&json!("UDP"), &json!(ECHO), &json!(1)),
        "{report:#}"
    );
    let namespace = lab.namespace();
    ensure!(
        first["source"] == format!("{namespace}/client (StatefulSet)"),
        "{report:#}"
    );
    ensure!(
        first["sides"][0]["policies"][0] == format!("{namespace}/guard"),
        "{report:#}"
    );
    // One that admits nobody denies all six, and one that admits everyone none.
    let (code, report) = propose(&json!([]))?;
    let denied = report["denied"].as_array().context("a list")?;
    let connections: u64 = denied
        .iter()
        .filter_map(|g| g["connections"].as_u64())
        .sum();
    ensure!((code, connections) == (Some(1), 6), "{report:#}");
    let (code, report) = propose(&json!([{}]))?;
    ensure!(code == Some(0), "{report:#}");
    ensure!(
        report["checked"]["connections"].as_u64() >= Some(6),
        "{report:#}"
    );
    drop(kept);
    ensure!(agent.stop()?.success());
    Ok(())
}

/// Their sum: kernels without reasons have functions in their place.
fn by_reason(seen: &Value) -> Option<u64> {
    let reasons = seen["reasons"].as_object()?;
    reasons.values().map(Value::as_u64).sum()
}

fn a_connection_is_explained_with_what_was_seen_of_it(family: Family) -> Result<()> {
    let lab = deaf_lab()?;
    let real = lab.socket(Place::Of(Host::Server), family, OPEN);
    let _listener = lab.within(Host::Server, || TcpListener::bind(real))?;
    let agent = start(&lab)?;
    let _kept = lab.within(Host::Client, || TcpStream::connect(real))?;
    let (_, _connecting) = begin_connect(&lab, family, DEAF)?;
    let namespace = lab.namespace();
    let explain = |port: u16| -> Result<Value> {
        let (from, to) = (format!("{namespace}/client"), format!("{namespace}/server"));
        let port = port.to_string();
        let flags = ["explain", &from, &to, "--port", &port, "-o", "json"];
        let (code, text) = run(&agent, &flags)?;
        ensure!(code == Some(0), "no policy is there: {text}");
        Ok(serde_json::from_str(&text)?)
    };
    let answer = explain(OPEN)?;
    ensure!(answer["observed"]["connections"] == 1, "{answer:#}");
    ensure!(answer["observed"]["dropped"]["count"] == 0, "{answer:#}");
    // The server's own rule drops the SYNs, which this kernel sees.
    wait_for("the drop is seen", || {
        explain(DEAF).is_ok_and(|answer| {
            let observed = &answer["observed"];
            let dropped = &observed["dropped"];
            dropped["count"].as_u64() >= Some(1)
                && by_reason(dropped) == dropped["count"].as_u64()
                && dropped["last_seen"].is_string()
                && observed["connections"] == 0
                && observed["events"].as_array().is_some_and(|e| !e.is_empty())
        })
    })?;
    ensure!(agent.stop()?.success());
    Ok(())
}

/// Entries of the large table; it is one for the whole machine, and mostly empty.
const MANY: u64 = 100_000;
/// What reading it may add to the agent's memory at its highest.
const MOST_BYTES: u64 = 64 << 20;

fn a_large_table_is_read_whole_in_little_room(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    lab.nft(
        Host::Router,
        "table inet lab { chain c { type filter hook forward priority 0; ct state new accept
           }
         }",
    )?;
    tracked::prepare(&lab)?;
    let agent = start(&lab)?;
    let highest = || -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.context("no VmHWM")?.trim().trim_end_matches(" kB");
        Ok(kib.parse::<u64>()? << 10)
    };
    tracked::fill(&lab, family, MANY)?;
    // Its highest is from now on.
    std::fs::write(format!("/proc/{}/clear_refs", agent.pid()), "5")?;
    let before = highest()?;
    let begin = Instant::now();
    let seen = connections(&agent)?;
    let took = begin.elapsed();
    let told: u64 = seen.iter().filter_map(|c| c["connections"].as_u64()).sum();
    let added = highest()?.saturating_sub(before);
    eprintln!(
        "{told} connections as {} lines in {took:?}, {added} bytes more",
        seen.len()
    );
    // All but the agent's own and whatever has ended.
    ensure!(told >= MANY - 100, "{told} of {MANY}: {seen:?}");
    ensure!(added < MOST_BYTES, "{added} bytes more");
    ensure!(agent.stop()?.success());
    Ok(())
}
