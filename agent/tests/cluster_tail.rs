//! `whydrop tail` and `whydrop status` over all agents of a scripted cluster. In its pods runs the real
//! `whydrop`, asked of a real local API, wherever a script is not the point.

use std::os::unix::process::CommandExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::Semaphore;

use crate::support::cluster::{Cluster, agent, line, output, program, publish, says, whydrop};
use crate::support::{Agent, Tail, until};

mod support;

#[test]
fn what_all_nodes_keep_is_one_sequence() {
    let cluster = Cluster::start();
    let (a, b) = (agent(&cluster, "node-a"), agent(&cluster, "node-b"));
    publish(&a, [1, 4, 5, 8]);
    publish(&b, [2, 3, 6, 7]);
    for (flags, expected) in [
        ("", &[1u64, 2, 3, 4, 5, 6, 7, 8] as &[u64]),
        ("--last 3", &[6, 7, 8]),
        ("--since 1970-01-01T00:00:05Z", &[5, 6, 7, 8]),
        ("--node-name node-b", &[2, 3, 6, 7]),
        ("--not --node-name *-b --last 2", &[5, 8]),
        ("-n other", &[]),
    ] {
        let mut tail = cluster.tail(flags);
        assert_eq!(tail.packets(expected.len()), expected, "{flags}");
        assert_eq!(tail.wait().code(), Some(0), "{flags}");
        assert_eq!(tail.stderr(), "");
    }
    // The selection is made on the node, and one that is not selected is not asked.
    let (asked_a, asked_b) = (cluster.execs("node-a"), cluster.execs("node-b"));
    assert_eq!((asked_a.len(), asked_b.len()), (5, 5));
    assert!(
        asked_a[4].contains(&"--namespace=other".to_owned()),
        "{asked_a:?}"
    );
    // For people the node is named.
    let (text, _) = output(cluster.command("tail --last 1"));
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("  node-a  DROPPED "), "{text}");
}

#[test]
fn what_comes_is_sorted_within_a_second() {
    let cluster = Cluster::start();
    // One after the other in the wrong order, without a process between.
    let (first, second) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (to_second, to_first) = (second.clone(), first.clone());
    cluster.add(
        "node-a",
        program(move |mut session| {
            let (first, second) = (first.clone(), to_second.clone());
            async move {
                session.stdout("\n").await;
                first.acquire().await.unwrap().forget();
                session.stdout(&line("node-a", 20)).await;
                second.add_permits(1);
                session.gone().await;
            }
        }),
    );
    cluster.add(
        "node-b",
        program(move |mut session| {
            let (first, second) = (to_first.clone(), second.clone());
            async move {
                session.stdout("\n").await;
                // Both are followed.
                first.add_permits(1);
                second.acquire().await.unwrap().forget();
                let text = line("node-b", 10) + &line("node-b", 30);
                session.stdout(&text).await;
                session.gone().await;
            }
        }),
    );
    let begin = Instant::now();
    let mut tail = cluster.tail("-f");
    assert_eq!(tail.packets(3), [10, 20, 30]);
    // Not the moment that they came: they wait for one another, and no longer than a second.
    assert!(begin.elapsed() >= Duration::from_millis(900));
}

/// The whydrops in the pods end with the one that asked.
#[test]
fn nothing_is_left_in_the_pods() {
    let cluster = Cluster::start();
    let a = agent(&cluster, "node-a");
    let tail = cluster.tail("-f");
    a.wait_for_readers(1);
    drop(tail);
    a.wait_for_readers(0);
}

#[test]
fn a_node_that_breaks_off_goes_on_where_it_was() {
    let cluster = Cluster::start();
    let (a, b) = (agent(&cluster, "node-a"), agent(&cluster, "node-b"));
    publish(&a, [1, 2]);
    publish(&b, [3]);
    let mut tail = cluster.tail("-f --last 2");
    assert_eq!(tail.packets(2), [2, 3]);
    a.wait_for_readers(1);
    publish(&a, [5]);
    assert_eq!(tail.packets(1), [5]);
    cluster.refuse("exec", 500);
    cluster.cut("node-a");
    a.wait_for_readers(0);
    // One of them with a time from before the break: its name was awaited.
    publish(&a, [6, 4]);
    publish(&b, [7]);
    assert_eq!(tail.packets(1), [7]);
    cluster.refuse("exec", 200);
    a.wait_for_readers(1);
    assert_eq!(tail.packets(2), [4, 6]);
    publish(&a, [8]);
    assert_eq!(tail.packets(1), [8]);
    tail.child.kill().unwrap();
    let told = tail.stderr();
    assert_eq!(
        told.matches("the agent on node-a went away").count(),
        1,
        "{told}"
    );
    assert_eq!(
        told.matches("the agent on node-a is back").count(),
        1,
        "{told}"
    );
    assert_eq!(told.lines().count(), 2, "{told}");
}

#[test]
fn what_came_before_a_history_broke_off_is_not_shown_again() {
    let cluster = Cluster::start();
    let asked = Arc::new(AtomicU64::new(0));
    cluster.add(
        "node-a",
        program(move |mut session| {
            let times = asked.fetch_add(1, Ordering::Relaxed);
            async move {
                session.stdout(&line("node-a", 1)).await;
                if times > 0 {
                    let rest = line("node-a", 2) + &line("node-a", 3);
                    session.stdout(&rest).await;
                    session.gone().await;
                }
            }
        }),
    );
    let mut tail = cluster.tail("-f --since 1970-01-01T00:00:01Z");
    assert_eq!(tail.packets(3), [1, 2, 3]);
}

#[test]
fn agents_that_come_are_followed_and_those_that_go_are_forgotten() {
    let cluster = Cluster::start();
    let a = agent(&cluster, "node-a");
    cluster.add_in_phase("node-c", "Pending", says(String::new()));
    let mut tail = cluster.tail("-f");
    a.wait_for_readers(1);
    let b = agent(&cluster, "node-b");
    b.wait_for_readers(1);
    publish(&b, [1]);
    assert_eq!(tail.packets(1), [1]);
    let c = agent(&cluster, "node-c");
    c.wait_for_readers(1);
    publish(&c, [2]);
    assert_eq!(tail.packets(1), [2]);
    cluster.forget("node-b");
    // The watch tells in order: who follows this one knows of it.
    cluster.add("node-d", says(line("node-d", 3)));
    assert_eq!(tail.packets(1), [3]);
    cluster.cut("node-b");
    b.wait_for_readers(0);
    publish(&a, [4]);
    assert_eq!(tail.packets(1), [4]);
    // It is not tried again.
    let execs = cluster.execs("node-b").len();
    cluster.cut("node-a");
    until("node-a to be tried again", || {
        cluster.execs("node-a").len() == 2
    });
    assert_eq!(cluster.execs("node-b").len(), execs);
    tail.child.kill().unwrap();
    let told = tail.stderr();
    for sentence in [
        "the agent on node-c: its pod is Pending; it is followed once it runs",
        "the agent on node-b is followed too",
        "the agent on node-c is followed too",
        "the agent on node-b went away: its pod is being deleted",
    ] {
        assert_eq!(told.matches(sentence).count(), 1, "{sentence}: {told}");
    }
}

/// As in a rolling update: the old pod ends, and the next one of its node comes.
#[test]
fn a_pod_that_is_being_deleted_is_read_to_its_end_and_not_asked_again() {
    let cluster = Cluster::start();
    let a = agent(&cluster, "node-a");
    let mut tail = cluster.tail("-f");
    a.wait_for_readers(1);
    cluster.terminate("node-a");
    publish(&a, [1]);
    assert_eq!(tail.packets(1), [1]);
    let next = Agent::start_as("node-a", tempfile::tempdir().unwrap());
    cluster.add_next("node-a", whydrop(next.socket(), &[]));
    next.wait_for_readers(1);
    publish(&next, [2]);
    assert_eq!(tail.packets(1), [2]);
    cluster.forget("node-a");
    cluster.cut("node-a");
    a.wait_for_readers(0);
    // As long as a node that is away waits for its first tries.
    std::thread::sleep(Duration::from_secs(2));
    publish(&next, [3]);
    assert_eq!(tail.packets(1), [3]);
    assert_eq!(cluster.execs("node-a").len(), 1);
    assert_eq!(cluster.execs("node-a-next").len(), 1);
    tail.child.kill().unwrap();
    let told = tail.stderr();
    for sentence in [
        "the agent on node-a went away: its pod is being deleted",
        "the agent on node-a is followed too",
    ] {
        assert_eq!(told.matches(sentence).count(), 1, "{sentence}: {told}");
    }
    assert_eq!(told.lines().count(), 2, "{told}");
}

/// Its pod begins to be deleted, or fails, between the question and the first answer.
#[test]
fn what_a_pod_that_goes_away_says_at_last_is_read() {
    let cluster = Cluster::start();
    let is_free = Arc::new(Semaphore::new(0));
    for (node, second) in [("node-a", 1), ("node-b", 2)] {
        let is_free = is_free.clone();
        let late = program(move |mut session| {
            let is_free = is_free.clone();
            async move {
                is_free.acquire().await.unwrap().forget();
                session.stdout(&line(node, second)).await;
            }
        });
        cluster.add(node, late);
    }
    let mut tail = cluster.tail("-f");
    let asked = |node| until("it to be asked", || cluster.execs(node).len() == 1);
    asked("node-a");
    asked("node-b");
    cluster.terminate("node-a");
    cluster.end("node-b", "Failed");
    // The watch tells in order: who follows this one knows of the two.
    cluster.add("node-c", says(line("node-c", 3)));
    assert_eq!(tail.packets(1), [3]);
    is_free.add_permits(2);
    assert_eq!(tail.packets(2), [1, 2]);
    cluster.add("node-d", says(line("node-d", 4)));
    assert_eq!(tail.packets(1), [4]);
    tail.child.kill().unwrap();
    let told = tail.stderr();
    for sentence in [
        "the agent on node-a went away: its pod is being deleted",
        "the agent on node-b went away: its pod is Failed",
        "the agent on node-c is followed too",
        "the agent on node-d is followed too",
    ] {
        assert_eq!(told.matches(sentence).count(), 1, "{sentence}: {told}");
    }
    assert_eq!(told.lines().count(), 4, "{told}");
}

#[test]
fn a_pod_that_is_being_deleted_at_first_is_told_of_unless_the_next_one_is_there() {
    let cluster = Cluster::start();
    let a = agent(&cluster, "node-a");
    let b = agent(&cluster, "node-b");
    publish(&a, [1]);
    cluster.terminate("node-a");
    let mut tail = cluster.tail("-f");
    b.wait_for_readers(1);
    let next = Agent::start_as("node-a", tempfile::tempdir().unwrap());
    cluster.add_next("node-a", whydrop(next.socket(), &[]));
    next.wait_for_readers(1);
    publish(&next, [2]);
    assert_eq!(tail.packets(1), [2]);
    tail.child.kill().unwrap();
    let told = tail.stderr();
    let sentence =
        "the agent on node-a: its pod is being deleted; the next one is followed once it runs";
    assert_eq!(told.matches(sentence).count(), 1, "{told}");
    // What has been replaced is not asked, and is no failure.
    let mut tail = cluster.tail("");
    assert_eq!(tail.packets(1), [2]);
    assert_eq!(tail.wait().code(), Some(0));
    assert_eq!(tail.stderr(), "");
    assert!(cluster.execs("node-a").is_empty());
}

#[test]
fn status_of_a_cluster_that_is_well_ends_with_0() {
    let cluster = Cluster::start();
    let agents = ["node-a", "node-b"].map(|node| agent(&cluster, node));
    let (status, told) = output(cluster.command("status"));
    assert_eq!((status.status.code(), &*told), (Some(0), ""));
    let table = String::from_utf8(status.stdout).unwrap();
    assert!(table.starts_with("NODE    VERSION"), "{table}");
    assert_eq!(table.lines().count(), 3, "{table}");
    // Only some nodes.
    for (flags, rows) in [
        ("status --node-name node-b", 1),
        ("status --node-name *-a --node-name node-b", 2),
    ] {
        let (status, told) = output(cluster.command(&format!("{flags} -o json")));
        assert_eq!((status.status.code(), &*told), (Some(0), ""));
        let found: Vec<Value> = serde_json::from_slice(&status.stdout).unwrap();
        assert_eq!(found.len(), rows, "{flags}: {found:?}");
    }
    let (status, told) = output(cluster.command("status --node-name node-c"));
    assert_eq!(status.status.code(), Some(1));
    assert!(
        told.contains("no agent is on a node that --node-name selects"),
        "{told}"
    );
    // Of one agent likewise.
    let socket = agents[0].socket();
    for (node, code) in [("node-a", 0), ("node-b", 1)] {
        let line = format!("status --node-name {node} --socket {}", socket.display());
        let (status, told) = output(cluster.command(&line));
        assert_eq!(status.status.code(), Some(code), "{told}");
        assert_eq!(told.contains("is on node node-a"), code == 1, "{told}");
    }
}

#[test]
fn as_kubectls_plugin_it_takes_kubectls_flags() {
    let cluster = Cluster::start();
    let a = agent(&cluster, "node-a");
    publish(&a, [1]);
    let elsewhere = cluster.home.path().join("elsewhere");
    std::fs::rename(cluster.kubeconfig(), &elsewhere).unwrap();
    // Behind the command, before it, and on both sides.
    for (before, behind) in [
        ("", "--context c --request-timeout 10s --kubeconfig FILE"),
        ("--context c --kubeconfig FILE", ""),
        ("--kubeconfig FILE --cluster=c -n shop", "--context c"),
    ] {
        let line = format!("{before} tail -o json {behind}");
        let line = line.replace("FILE", elsewhere.to_str().unwrap());
        let mut command = cluster.command(&line);
        command.arg0("/usr/local/bin/kubectl-whydrop");
        let mut tail = Tail::start(command);
        assert_eq!(tail.packets(1), [1], "{line}");
        assert_eq!(tail.wait().code(), Some(0));
    }
    let mut command = cluster.command("tail --no-such-flag");
    command.arg0("kubectl-whydrop");
    let (wrong, told) = output(command);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(told.contains("Usage: kubectl whydrop tail"), "{told}");
}
