//! `whydrop tail` and `whydrop status` over all agents of a cluster that refuses, fails, is large or is
//! slow.

use std::collections::HashSet;
use std::io::{BufRead as _, Read as _};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use whydrop::event::Line;

use crate::support::cluster::{
    Cluster, Program, agent, line, output, program, publish, says, whydrop,
};
use crate::support::{DEADLINE, until};

mod support;

/// A sentence on stderr, and nothing on stdout.
fn sentence(command: Command) -> String {
    let (output, stderr) = output(command);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(output.stdout.is_empty());
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

#[test]
fn who_may_not_is_told_which_right_is_missing() {
    let cluster = Cluster::start();
    let a = agent(&cluster, "node-a");
    publish(&a, [1]);
    for command in ["tail", "tail -f", "tail -f --last 1", "status"] {
        cluster.refuse("exec", 403);
        let told = sentence(cluster.command(command));
        let what = "not allowed to create pods/exec in namespace whydrop: add the rule {apiGroups: \
                    [\"\"], resources: [pods/exec], verbs: [create, get]}";
        assert!(told.contains(what), "{command}: {told}");
        cluster.refuse("exec", 401);
        let told = sentence(cluster.command(command));
        assert!(
            told.contains("does not accept the credentials (401)"),
            "{told}"
        );
        cluster.refuse("exec", 200);
        cluster.refuse("list", 403);
        let told = sentence(cluster.command(command));
        let what = "not allowed to list pods in namespace whydrop: add the rule {apiGroups: [\"\"], \
                    resources: [pods], verbs: [list, watch]}";
        assert!(told.contains(what), "{command}: {told}");
        cluster.refuse("list", 401);
        let told = sentence(cluster.command(command));
        assert!(
            told.contains("does not accept the credentials (401)"),
            "{told}"
        );
        cluster.refuse("list", 200);
    }
    // Lists, and may not watch: follows those that there are.
    cluster.refuse("watch", 403);
    let mut tail = cluster.tail("-f --last 1");
    assert_eq!(tail.packets(1), [1]);
    a.wait_for_readers(1);
    publish(&a, [2]);
    assert_eq!(tail.packets(1), [2]);
    let (told, rest) = tail.first_sentence();
    assert_eq!(rest, "");
    assert!(
        told.contains("not allowed to watch pods in namespace whydrop"),
        "{told}"
    );
}

#[test]
fn where_nobody_can_be_asked_it_says_what_was_looked_at() {
    let cluster = Cluster::start();
    for command in ["tail", "status"] {
        let told = sentence(cluster.command(command));
        let what = "no agent runs in namespace whydrop (pods with app.kubernetes.io/name=whydrop): \
                    deploy them with `kubectl apply -k deploy/base`";
        assert!(told.contains(what), "{told}");
    }
    let _a = agent(&cluster, "node-a");
    let told = sentence(cluster.command("tail --node-name node-b"));
    assert!(
        told.contains("no agent is on a node that --node-name selects; there are 1"),
        "{told}"
    );
    let told = sentence(cluster.command("tail --context other"));
    assert!(told.contains("there is no context \"other\""), "{told}");
    let mut command = cluster.command("tail");
    command.env("KUBECONFIG", "/nowhere/config");
    let told = sentence(command);
    assert!(told.contains("/nowhere/config"), "{told}");
    std::fs::write(cluster.kubeconfig(), "clusters: {").unwrap();
    let told = sentence(cluster.command("tail"));
    assert!(
        told.contains("the kubeconfig cannot be used; mend it"),
        "{told}"
    );
    let told = sentence(cluster.command("tail --server http://127.0.0.1:1 --token t --context c"));
    assert!(told.contains("the kubeconfig cannot be used"), "{told}");
    // Nobody listens there.
    std::fs::write(cluster.kubeconfig(), "").unwrap();
    let told = sentence(cluster.command("status --server http://127.0.0.1:1"));
    assert!(
        told.contains("cannot list pods in namespace whydrop"),
        "{told}"
    );
    // Without any cluster it is this node's agent.
    std::fs::remove_file(cluster.kubeconfig()).unwrap();
    let local = std::path::Path::new("/run/whydrop/agent.sock");
    if !local.exists() {
        let told = sentence(cluster.command("tail"));
        assert!(
            told.contains("no whydrop agent answers on /run/whydrop/agent.sock"),
            "{told}"
        );
    }
}

#[test]
fn one_agent_that_cannot_answer_keeps_nobody_else_from_it() {
    let cluster = Cluster::start();
    let a = agent(&cluster, "node-a");
    publish(&a, [1]);
    // Of another version: this flag is unknown there.
    cluster.add(
        "node-b",
        whydrop(a.socket(), &["--flag-of-another-version"]),
    );
    // Its agent is gone, and its whydrop says so.
    cluster.add("node-c", whydrop("/nowhere/agent.sock".into(), &[]));
    // Nothing ever comes.
    cluster.add(
        "node-d",
        program(|mut session| async move { session.gone().await }),
    );
    cluster.add_in_phase("node-e", "Failed", says(String::new()));
    // Breaks in the middle of a line.
    let half = line("node-f", 2)[..40].to_owned();
    cluster.add(
        "node-f",
        program(move |mut session| {
            let half = half.clone();
            async move { _ = session.stdout(&half).await }
        }),
    );
    let version = "its whydrop does not know what it is asked (unexpected argument \
                   '--flag-of-another-version' found): is it of another version than";
    let mut tail = cluster.tail("--request-timeout 10s");
    assert_eq!(tail.packets(1), [1]);
    assert_eq!(tail.wait().code(), Some(1));
    let told = tail.stderr();
    for (node, why) in [
        ("node-b", version),
        ("node-c", "no whydrop agent answers on /nowhere/agent.sock"),
        ("node-d", "no answer within 10 s"),
        ("node-e", "its pod is Failed"),
        ("node-f", "the connection broke"),
    ] {
        assert!(
            told.contains(&format!("the agent on {node}: {why}")),
            "{node}: {told}"
        );
    }
    assert_eq!(told.lines().count(), 5, "{told}");

    let mut tail = cluster.tail("--request-timeout 5s -f --since 1970-01-01T00:00:00Z");
    assert_eq!(tail.packets(1), [1]);
    until("node-d to be tried again", || {
        cluster.execs("node-d").len() > 3
    });
    assert_eq!(
        cluster.execs("node-b").len(),
        3,
        "asked once each time, and not again"
    );
    tail.child.kill().unwrap();
    let told = tail.stderr();
    assert!(
        told.contains(&format!("the agent on node-b is left out: {version}")),
        "{told}"
    );
    let silent = "the agent on node-d does not answer (no answer within 5 s); waiting for it";
    assert_eq!(told.matches(silent).count(), 1, "{told}");

    // Both at once, as each takes its time.
    let [status, table] = ["status -o json", "status"].map(|command| {
        let command = cluster.command(&format!("{command} --request-timeout 10s"));
        std::thread::spawn(|| output(command))
    });
    let (status, told) = status.join().unwrap();
    assert_eq!((status.status.code(), &*told), (Some(1), ""));
    let rows: Vec<Value> = serde_json::from_slice(&status.stdout).unwrap();
    let nodes: Vec<_> = rows
        .iter()
        .map(|row| row["node"].as_str().unwrap())
        .collect();
    assert_eq!(
        nodes,
        ["node-a", "node-b", "node-c", "node-d", "node-e", "node-f"]
    );
    assert_eq!(rows[0]["version"], env!("CARGO_PKG_VERSION"));
    assert!(rows[0]["error"].is_null());
    assert!(
        rows[3]["error"]
            .as_str()
            .unwrap()
            .contains("no answer within 10 s")
    );
    let (table, _) = table.join().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert_eq!(table.lines().count(), 7, "{table}");
}

/// A little now and then, and never an end: what came of it is shown, and the others are not kept waiting.
#[test]
fn an_answer_that_has_no_end_is_not_waited_for() {
    let cluster = Cluster::start();
    let text = line("node-a", 1);
    let trickle = program(move |mut session| {
        let text = text.clone();
        async move {
            while session.stdout(&text).await {
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        }
    });
    cluster.add("node-a", trickle);
    cluster.add(
        "node-b",
        says_and_ends(&serde_json::from_str(&line("node-b", 2)).unwrap()),
    );
    // Both at once, as each takes its time.
    let [tail, status] = ["tail", "status"].map(|command| {
        let command = cluster.command(&format!("{command} -o json --request-timeout 4s"));
        std::thread::spawn(|| output(command))
    });
    let (tail, told) = tail.join().unwrap();
    assert_eq!(tail.status.code(), Some(1));
    let endless = "its answer did not end within 16 s";
    assert_eq!(told, format!("whydrop: the agent on node-a: {endless}\n"));
    let lines = String::from_utf8(tail.stdout).unwrap();
    let packets: Vec<u64> = lines
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["packets"]
                .as_u64()
                .unwrap()
        })
        .collect();
    assert!(
        packets.starts_with(&[1]) && packets.ends_with(&[1, 2]),
        "{packets:?}"
    );
    let (status, _) = status.join().unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(rows[0]["error"], endless);
}

#[test]
fn lines_that_cannot_be_read_and_losses_of_agents_are_said() {
    let cluster = Cluster::start();
    let lost = r#"{"lost":7,"stage":"ring","node":"node-a"}"#;
    let text = format!(
        "{}what?\n{{}}\n{lost}\n{}",
        line("node-a", 1),
        line("node-a", 2)
    );
    cluster.add("node-a", says(text));
    let mut tail = cluster.tail("-f");
    let mut losses = Vec::new();
    let mut events = Vec::new();
    for _ in 0..4 {
        match tail.line() {
            Line::Event(event) => events.push(event.packets),
            Line::Lost(lost) => losses.push((lost.lost, format!("{:?} {}", lost.stage, lost.node))),
        }
    }
    losses.sort();
    assert_eq!(events, [1, 2]);
    let expected = [
        (2, "Reader node-a".to_owned()),
        (7, "Ring node-a".to_owned()),
    ];
    assert_eq!(losses, expected);
    tail.child.kill().unwrap();
    let told = tail.stderr();
    assert_eq!(told.matches("cannot read").count(), 1, "{told}");
}

/// An event of a later version has more, one of an earlier version less: each is shown, and what another
/// version calls an event is not lost in silence.
#[test]
fn events_of_other_versions_are_shown() {
    let cluster = Cluster::start();
    let mut later: Value = serde_json::from_str(&line("node-a", 1)).unwrap();
    later["colour"] = "red".into();
    later["source"]["zone"] = "z".into();
    cluster.add("node-a", says_and_ends(&later));
    let mut earlier: Value = serde_json::from_str(&line("node-b", 2)).unwrap();
    let fields = earlier.as_object_mut().unwrap();
    for field in ["explanation", "dns", "drop", "tcp_flags", "ip_version"] {
        fields.remove(field);
    }
    cluster.add("node-b", says_and_ends(&earlier));
    let mut unknown: Value = serde_json::from_str(&line("node-c", 3)).unwrap();
    unknown["outcome"] = "teleported".into();
    cluster.add("node-c", says_and_ends(&unknown));

    // As JSON they come as they were.
    let (json, told) = output(cluster.command("tail -o json"));
    assert_eq!((json.status.code(), &*told), (Some(0), ""));
    let lines: Vec<Value> = serde_json::Deserializer::from_slice(&json.stdout)
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert_eq!(lines, [later, earlier, unknown]);
    // For people what this version knows of them.
    let (text, told) = output(cluster.command("tail"));
    let text = String::from_utf8(text.stdout).unwrap();
    assert_eq!(
        text.matches("shop/web-7d9f → db/pg-0:5432").count(),
        2,
        "{text}"
    );
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(
        told.contains("sent a line that this whydrop cannot read ("),
        "{told}"
    );
    assert!(told.contains("are both of the same version?"), "{told}");
}

fn says_and_ends(line: &Value) -> Program {
    let text = line.to_string() + "\n";
    program(move |mut session| {
        let text = text.clone();
        async move {
            session.stdout(&text).await;
            session.exit(0).await;
        }
    })
}

#[test]
fn five_hundred_nodes_are_opened_a_few_at_a_time() {
    const NODES: u64 = 500;
    let cluster = Cluster::start();
    let follows = Arc::new(AtomicBool::new(false));
    for number in 0..NODES {
        let node = format!("node-{number:03}");
        let text = line(&node, number + 1);
        let follows = follows.clone();
        let agent = program(move |mut session| {
            let (text, follows) = (text.clone(), follows.load(Ordering::Relaxed));
            async move {
                // A kubelet takes its time.
                tokio::time::sleep(Duration::from_millis(20)).await;
                session.stdout(&text).await;
                match follows {
                    true => session.gone().await,
                    false => session.exit(0).await,
                }
            }
        });
        cluster.add(&node, agent);
    }
    let mut tail = cluster.tail("");
    let all: Vec<u64> = (1..=NODES).collect();
    assert_eq!(tail.packets(NODES as usize), all);
    assert_eq!(tail.wait().code(), Some(0));
    let (opening, open) = cluster.highest();
    assert!(opening <= 32 && open <= 32, "{opening} {open}");

    follows.store(true, Ordering::Relaxed);
    let mut tail = cluster.tail("-f");
    let seen: HashSet<u64> = tail.packets(NODES as usize).into_iter().collect();
    assert_eq!(seen.len(), NODES as usize);
    let (opening, open) = cluster.highest();
    assert!(opening <= 32, "{opening} were being opened at once");
    assert_eq!(open, NODES as usize, "all are kept open");
    assert!(opening > 1, "they wait for one another");
    let resident = resident_kib(tail.child.id());
    println!("{NODES} nodes, {resident} KiB");
    assert!(resident < 200 << 10, "{resident} KiB");
}

fn resident_kib(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Nobody reads what is printed: the agent is not read any more, and no memory is taken for it.
#[test]
fn a_slow_reader_holds_up_the_agents_and_takes_no_memory() {
    let cluster = Cluster::start();
    let sent = Arc::new(AtomicU64::new(0));
    let count = sent.clone();
    cluster.add(
        "node-a",
        program(move |mut session| {
            let sent = count.clone();
            async move {
                for second in 1.. {
                    let text = line("node-a", second);
                    if !session.stdout(&text).await {
                        return;
                    }
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            }
        }),
    );
    let alive = program(|mut session| async move {
        while session.stdout("\n").await {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    cluster.add("node-b", alive);
    let mut tail = cluster.tail("-f");
    let mut packets = tail.packets(1);
    let mut before = 0;
    let mut calm = 0;
    let begin = Instant::now();
    // Until nothing has been taken in for a second.
    while calm < 10 {
        assert!(
            begin.elapsed() < 3 * DEADLINE,
            "{before} lines were taken in"
        );
        std::thread::sleep(Duration::from_millis(100));
        let now = sent.load(Ordering::Relaxed);
        calm = if now == before { calm + 1 } else { 0 };
        before = now;
    }
    let resident = resident_kib(tail.child.id());
    println!("{before} lines, {resident} KiB, {:?}", begin.elapsed());
    assert!(resident < 200 << 10, "{resident} KiB after {before} lines");
    // The reader comes back: everything is there, in order.
    packets.extend(tail.packets(before as usize));
    let expected: Vec<u64> = (1..=before + 1).collect();
    assert_eq!(packets, expected);
    // And goes on.
    let mut rest = String::new();
    tail.lines.read_line(&mut rest).unwrap();
    assert!(rest.ends_with("}\n"));
    tail.child.kill().unwrap();
    let mut told = String::new();
    tail.child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut told)
        .unwrap();
    assert_eq!(told, "");
}
