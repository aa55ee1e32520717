//! The real servers over a real unix socket, and the real `whydrop tail` as their reader.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::Value;
use whydrop::event::{Event, Line, LostStage};
use whydrop::output::http::{self, OPENMETRICS};
use whydrop::output::socket::LocalSocket;
use whydrop::output::stream::MAX_READERS;

use crate::support::{Agent, DEADLINE, Tail, event, status};

mod support;

#[test]
fn two_tails_get_every_line_as_it_comes() {
    let agent = Agent::start();
    agent.publish([1, 2, 3]);
    let mut one = agent.tail("-f --last 2");
    let mut two = agent.tail("-f --port 5432 --not --kind dns");
    agent.wait_for_readers(2);
    assert_eq!(one.packets(2), [2, 3]);
    for packets in 4..20 {
        agent.publish([packets]);
        // Each line is there before the next one is published: nothing waits in a buffer.
        assert_eq!(one.packets(1), [packets]);
        assert_eq!(two.packets(1), [packets]);
    }
}

#[test]
fn without_follow_it_ends_with_what_there_is() {
    let agent = Agent::start();
    agent.publish([1, 2, 3]);
    for (flags, expected) in [
        ("", 3),
        ("--last 1", 1),
        ("-n shop --since 1000w", 3),
        ("-n other", 0),
        ("--since 2026-11-22T12:03:11Z", 0),
    ] {
        let mut tail = agent.tail(flags);
        tail.packets(expected);
        assert!(tail.wait().success(), "{flags}");
        assert_eq!(tail.stderr(), "");
    }
}

#[test]
fn a_reader_that_stalls_loses_lines_and_nobody_else_does() {
    let agent = Agent::start();
    // Asks, and reads nothing.
    let mut stalled = agent.ask("/v1/drops?follow=true&port=1");
    let all = agent.ask("/v1/drops?follow=true");
    let mut reading = agent.tail("-f");
    agent.wait_for_readers(3);
    let lines = 60_000;
    let total: u64 = (1..=lines).sum();
    let begin = Instant::now();
    agent.publish(1..=lines);
    assert!(begin.elapsed() < DEADLINE, "the publisher waited");
    let mut sum = 0;
    while sum < total {
        sum += match reading.line() {
            Line::Event(event) => event.packets,
            Line::Lost(lost) => lost.lost,
        };
    }
    assert_eq!(sum, total);
    drop(reading);

    // It comes back, and is told what it missed, to the packet.
    agent.publish([7]);
    let mut seen = (0, 0);
    // A chunk holds whole lines, so what is no JSON is the framing.
    let lines = BufReader::new(all).lines().map(Result::unwrap);
    for line in lines.filter(|line| line.starts_with('{')) {
        match serde_json::from_str(&line).unwrap() {
            Line::Event(event) => seen.0 += event.packets,
            Line::Lost(lost) => {
                assert_eq!(lost.stage, LostStage::Reader);
                seen.1 += lost.lost;
            }
        }
        if seen.0 + seen.1 >= total + 7 {
            break;
        }
    }
    assert_eq!(seen.0 + seen.1, total + 7);
    assert!(seen.1 > 0, "it lost nothing");

    // One whose selection nothing matches had nothing to stall on.
    agent.state.stream.publish(Arc::new(Line::Event(Event {
        destination: whydrop::event::Endpoint {
            port: Some(1),
            ..Default::default()
        },
        ..event()
    })));
    let mut some = [0; 512];
    assert!(stalled.read(&mut some).unwrap() > 0);
}

#[test]
fn a_closed_pipe_ends_tail_quietly() {
    let agent = Agent::start();
    agent.publish([1, 2, 3]);
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            r#"{ "$0" "$@"; echo "ended with $?" >&2; } | head -n 1"#,
        ])
        .arg(env!("CARGO_BIN_EXE_whydrop"))
        .args(["tail", "-f", "--last", "3", "--socket"])
        .arg(agent.socket());
    // No further line comes: it must see the closed pipe itself.
    let mut pipe = Tail::start(command);
    let mut line = String::new();
    pipe.lines.read_line(&mut line).unwrap();
    assert!(line.contains("shop/web-7d9f → db/pg-0:5432"), "{line}");
    assert!(pipe.wait().success());
    assert_eq!(pipe.stderr(), "ended with 0\n");
}

#[test]
fn a_full_disk_is_one_sentence() {
    let agent = Agent::start();
    agent.publish([1]);
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let mut tail = Command::new(env!("CARGO_BIN_EXE_whydrop"));
    tail.args(["tail", "--socket"])
        .arg(agent.socket())
        .stdout(full());
    let output = tail.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains("standard output: No space left"), "{error}");
    // Where even that cannot be said, it ends as it would have.
    let status = tail.stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

/// What a tail has to tell of its agent goes where nothing more can be written.
#[test]
fn what_cannot_be_told_ends_nothing() {
    let mut agent = Agent::start();
    let mut command = Command::new("sh");
    command
        .args(["-c", r#"exec "$0" "$@" 2>/dev/full"#])
        .arg(env!("CARGO_BIN_EXE_whydrop"))
        .args(["tail", "-o", "json", "-f", "--socket"])
        .arg(agent.socket());
    let mut tail = Tail::start(command);
    agent.wait_for_readers(1);
    agent.end();
    let dir = std::mem::replace(&mut agent.dir, tempfile::tempdir().unwrap());
    let agent = Agent::start_in(dir);
    agent.wait_for_readers(1);
    agent.publish([1]);
    assert_eq!(tail.packets(1), [1]);
}

#[test]
fn without_an_agent_it_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    for command in ["tail", "status"] {
        let output = Command::new(env!("CARGO_BIN_EXE_whydrop"))
            .args([command, "--socket"])
            .arg(&path)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains("no whydrop agent answers on"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn tail_waits_for_an_agent_that_restarts() {
    let mut agent = Agent::start();
    let mut tail = agent.tail("-f");
    agent.wait_for_readers(1);
    agent.publish([1]);
    assert_eq!(tail.packets(1), [1]);
    agent.end();
    assert!(!agent.socket().exists());
    let dir = std::mem::replace(&mut agent.dir, tempfile::tempdir().unwrap());
    // An event of before the restart is not shown again, one of afterwards is.
    let later = Event {
        time: event().time + Duration::from_secs(1),
        packets: 2,
        ..event()
    };
    let _agent = Agent::start_with("node-a", dir, |state| {
        for event in [event(), later] {
            state.stream.publish(Arc::new(Line::Event(event)));
        }
    });
    assert_eq!(tail.packets(1), [2]);
    tail.child.kill().unwrap();
    let told = tail.stderr();
    assert_eq!(told.matches("went away").count(), 1, "{told}");
    assert_eq!(told.matches("is back").count(), 1, "{told}");
}

#[test]
fn the_end_waits_for_no_client() {
    let mut agent = Agent::start();
    let _tail = agent.tail("-f");
    let _silent = UnixStream::connect(agent.socket()).unwrap();
    let _stalled = agent.ask("/v1/drops?follow=true");
    agent.wait_for_readers(2);
    // Nobody reads either of them.
    agent.publish(1..=20_000);
    let took = agent.end();
    // Who waits for one of them waits ten seconds, or for ever.
    assert!(took < Duration::from_secs(8), "{took:?}");
    assert_eq!(std::fs::read_dir(agent.dir.path()).unwrap().count(), 0);
}

#[test]
fn what_was_published_before_the_end_is_shown() {
    let mut agent = Agent::start();
    let mut tail = agent.tail("-f");
    agent.wait_for_readers(1);
    agent.publish([1, 2, 3]);
    agent.end();
    assert_eq!(tail.packets(3), [1, 2, 3]);
}

#[test]
fn readers_are_bounded() {
    let agent = Agent::start();
    let readers: Vec<_> = (0..MAX_READERS)
        .map(|_| agent.ask("/v1/drops?follow=true"))
        .collect();
    agent.wait_for_readers(MAX_READERS);
    let (status, body) = agent.get("/v1/drops");
    assert_eq!(status, 503);
    let body: Value = serde_json::from_str(&body).unwrap();
    assert!(
        body["error"].as_str().unwrap().contains("64 readers"),
        "{body}"
    );
    assert_eq!(agent.get("/v1/status").0, 200);
    // A reader that goes away makes room, without a line.
    drop(readers);
    agent.wait_for_readers(0);
}

#[test]
fn errors_are_json_and_one_sentence() {
    let agent = Agent::start();
    for (target, status, sentence) in [
        (
            "/v1/drops?port=x",
            400,
            "port \"x\": expected a port from 1 to 65535",
        ),
        ("/v1/drops?pods=x", 400, "there is no selection \"pods\""),
        ("/v1/drops?last=x", 400, "last \"x\": expected a number"),
        ("/v2", 404, "there is no /v2 here"),
        // The metrics are not on this socket.
        ("/metrics", 404, "there is no /metrics here"),
    ] {
        let (got, body) = agent.get(target);
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(
            (got, body["error"].as_str()),
            (status, Some(sentence)),
            "{target}"
        );
    }
    assert_eq!(agent.get("/v1/pairs").0, 200);
}

#[test]
fn metrics_and_probes_are_on_tcp() {
    let agent = Agent::start();
    let (head, _) = agent.scrape("/metrics");
    assert_eq!(status(&head), 200);
    assert!(
        head.contains(&format!("content-type: {OPENMETRICS}")),
        "{head}"
    );
    assert_eq!(status(&agent.scrape("/healthz").0), 200);
    // Ready is who observes.
    assert_eq!(status(&agent.scrape("/readyz").0), 503);
    agent.state.observing.store(true, Ordering::Relaxed);
    assert_eq!(status(&agent.scrape("/readyz").0), 200);
    // The stream is not.
    assert_eq!(status(&agent.scrape("/v1/drops").0), 404);
}

#[tokio::test]
async fn a_port_in_use_is_one_sentence() {
    let first = http::listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let error = http::listen(first.local_addr().unwrap()).await.unwrap_err();
    let error = error.to_string();
    assert!(
        error.starts_with("another program listens on 127.0.0.1:"),
        "{error}"
    );
    assert!(error.contains("--listen"), "{error}");
}

#[tokio::test]
async fn a_second_agent_is_refused_and_the_first_goes_on() {
    let agent = Agent::start();
    let mode = std::fs::metadata(agent.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = LocalSocket::bind(&agent.socket()).unwrap_err().to_string();
    assert!(
        error.contains("another whydrop agent answers on"),
        "{error}"
    );
    assert_eq!(agent.get("/v1/status").0, 200);
}
