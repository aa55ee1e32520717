use super::super::namespaces::fake::{Fake, pod, uid};
use super::*;

fn counts(overflows: u64, drops: u64) -> Counts {
    Counts { overflows, drops }
}

/// The queues of a procfs of files, and what was handed out.
struct Node {
    fake: Fake,
    scanner: Scanner,
    queues: AcceptQueues,
}

impl Node {
    fn new() -> Self {
        let fake = Fake::new();
        fake.netstat(1, 100, 100);
        Self {
            scanner: Scanner::new(fake.proc()),
            queues: AcceptQueues::at(fake.proc(), Arc::default()),
            fake,
        }
    }

    fn scan(&mut self) {
        self.queues.scan(&mut self.scanner).unwrap();
    }

    /// Reads, and settles everything.
    fn lost(&self) -> Vec<(u32, u64, u64)> {
        self.queues.read_all();
        self.settle(Instant::now(), Settled::Done)
    }

    fn settle(&self, now: Instant, answer: Settled) -> Vec<(u32, u64, u64)> {
        let mut lost = Vec::new();
        self.queues.settle(now, &mut |namespace, counts, _| {
            lost.push((namespace.id, counts.overflows, counts.drops));
            answer
        });
        lost.sort_unstable();
        lost
    }

    fn errors(&self) -> u64 {
        self.queues.errors.load(Ordering::Relaxed)
    }
}

#[test]
fn the_two_counters_are_found_by_their_names() {
    let text = include_str!("fixtures/netstat");
    assert_eq!(Counts::parse(text), Some(counts(0, 0)));
    let named = "TcpExt: A ListenDrops B ListenOverflows\nTcpExt: 1 2 3 4\n";
    assert_eq!(Counts::parse(named), Some(counts(4, 2)));
    for text in [
        "",
        "TcpExt: ListenOverflows ListenDrops\n",
        "TcpExt: ListenOverflows ListenDrops\nTcpExt: 1\n",
        "TcpExt: ListenOverflows\nTcpExt: 1\n",
        "IpExt: ListenOverflows ListenDrops\nIpExt: 1 2\n",
    ] {
        assert_eq!(Counts::parse(text), None, "{text:?}");
    }
}

#[test]
fn what_was_lost_before_is_ours_only_of_a_namespace_made_since() {
    let mut node = Node::new();
    node.fake.process(20, 7, &pod(1));
    node.fake.netstat(20, 3, 4);
    node.scan();
    assert_eq!(node.lost(), []);
    node.fake.netstat(20, 5, 9);
    node.fake.process(30, 8, &pod(2));
    node.fake.netstat(30, 2, 2);
    node.scan();
    assert_eq!(node.lost(), [(7, 2, 5), (8, 2, 2)]);
    assert_eq!(node.lost(), [], "nothing twice");
    node.fake.netstat(1, 101, 100);
    assert_eq!(node.lost(), [(1, 1, 0)]);
    assert_eq!(node.errors(), 0);
}

#[test]
fn counters_that_go_back_are_another_namespaces() {
    let mut node = Node::new();
    node.fake.process(20, 7, "0::/user.slice\n");
    node.fake.netstat(20, 30, 40);
    node.scan();
    node.lost();
    // The number and the process are as before: only the counters tell.
    node.fake.netstat(20, 1, 2);
    assert_eq!(node.lost(), [(7, 1, 2)]);
    node.fake.netstat(20, 2, 2);
    assert_eq!(node.lost(), [(7, 1, 0)]);
}

#[test]
fn the_last_loss_of_a_namespace_that_went_is_kept() {
    let mut node = Node::new();
    node.fake.process(20, 7, &pod(1));
    node.fake.netstat(20, 0, 0);
    node.scan();
    node.lost();
    node.fake.netstat(20, 6, 7);
    node.queues.read_all();
    node.fake.end(20);
    // It went between scan and reading: that is no error.
    node.queues.read_all();
    assert_eq!(node.errors(), 0);
    node.scan();
    node.queues.read_all();
    assert_eq!(
        lock(&node.queues.queues).queues.len(),
        1,
        "only the node's own is left"
    );
    assert_eq!(node.settle(Instant::now(), Settled::Done), [(7, 6, 7)]);
    assert_eq!(node.settle(Instant::now(), Settled::Done), []);
    // Its number again: from zero.
    node.fake.process(21, 7, &pod(1));
    node.fake.netstat(21, 2, 2);
    node.scan();
    assert_eq!(node.lost(), [(7, 2, 2)]);
}

#[test]
fn losses_wait_for_their_pod_and_not_for_ever() {
    let mut node = Node::new();
    node.scan();
    node.lost();
    node.fake.process(20, 7, &pod(1));
    node.fake.netstat(20, 1, 1);
    node.scan();
    node.queues.read_all();
    let start = Instant::now();
    assert_eq!(node.settle(start, Settled::Later), [(7, 1, 1)]);
    node.fake.netstat(20, 3, 3);
    node.queues.read_all();
    assert_eq!(node.settle(start, Settled::Later), [(7, 3, 3)], "added up");
    // The namespace goes meanwhile; what it lost keeps waiting.
    node.fake.end(20);
    node.scan();
    node.queues.read_all();
    let mut last = Vec::new();
    for second in [1, 11, 12] {
        let now = start + Duration::from_secs(second);
        node.queues.settle(now, &mut |namespace, counts, is_last| {
            assert_eq!(namespace.pod.as_ref().unwrap().as_str(), uid(1));
            last.push((second, counts.drops, is_last));
            Settled::Later
        });
    }
    assert_eq!(last, [(1, 3, false), (11, 3, true)]);
}

#[test]
fn an_overflow_is_told_from_the_time_on_that_was_asked_for() {
    let mut node = Node::new();
    node.fake.process(20, 7, &pod(1));
    node.fake.addresses(20, &["10.244.1.7"]);
    node.fake.netstat(20, 5, 5);
    node.scan();
    node.lost();
    let ip = "10.244.1.7".parse().unwrap();
    let start = Instant::now();
    assert!(!node.queues.overflowed_since(ip, 0, start));
    // Dropped, but not by a full accept queue.
    node.fake.netstat(20, 5, 6);
    assert!(!node.queues.overflowed_since(ip, 0, start));
    node.fake.netstat(20, 6, 7);
    assert!(node.queues.overflowed_since(ip, 0, start), "read at once");
    assert!(node.queues.overflowed_since(ip, 0, start), "and remembered");
    assert!(!node.queues.overflowed_since(ip, 0, Instant::now()));
    let other = "10.244.1.8".parse().unwrap();
    assert!(!node.queues.overflowed_since(other, 0, start));
    // What was read for an answer is counted like any other.
    assert_eq!(node.settle(Instant::now(), Settled::Done), [(7, 1, 2)]);
    assert_eq!(node.lost(), []);
}

#[test]
fn what_is_missing_is_said() {
    let mut node = Node::new();
    let scan = node.queues.scan(&mut node.scanner);
    node.queues.read_all();
    let status = status_of(&node.queues.status(&scan));
    assert!(
        status.up && status.why.is_none() && status.lost.is_none(),
        "{status:?}"
    );
    // A kernel without the counters.
    node.fake
        .write("1/net/netstat", "TcpExt: ArpFilter\nTcpExt: 1\n");
    node.queues.read_all();
    let status = status_of(&node.queues.status(&scan));
    assert!(!status.up && status.lost.is_some());
    assert!(status.why.unwrap().contains("ListenOverflows"));
    assert_eq!(node.errors(), 1);
    let of = |scan| status_of(&Ok(scan));
    let partly = of(Scan {
        processes: 9,
        closed: 2,
        ..Scan::default()
    });
    assert!(partly.up && partly.why.unwrap().contains("CAP_SYS_ADMIN"));
    let nearly = of(Scan {
        processes: 70,
        refused: 1,
        ..Scan::default()
    });
    assert!(nearly.up && nearly.why.unwrap().contains("some processes"));
    let blind = of(Scan {
        processes: 2,
        refused: 70,
        ..Scan::default()
    });
    assert!(!blind.up && blind.why.unwrap().contains("CAP_SYS_PTRACE"));
    assert!(!status_of(&Err("cannot read /proc".to_owned())).up);
}

#[test]
fn pauses_grow_with_failures() {
    let pauses = [0, 1, 2, 5, 6, 40].map(|failures| pause_after(failures).as_secs());
    assert_eq!(pauses, [1, 2, 4, 32, 60, 60]);
}

#[test]
fn a_source_that_fails_is_tried_again() {
    let node = Node::new();
    node.fake.process(20, 7, &pod(1));
    node.fake.netstat(20, 0, 0);
    let (running, stop) = std::sync::mpsc::channel();
    let (said, status) = std::sync::mpsc::channel();
    let (lost, losses) = std::sync::mpsc::channel();
    let (queues, fake) = (&node.queues, &node.fake);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let settle = |namespace: &Namespace, counts, _| {
                lost.send((namespace.id, counts)).unwrap();
                Settled::Done
            };
            queues.run(&stop, settle, |status| said.send(status).unwrap());
        });
        let is_up = || status.recv_timeout(Duration::from_secs(30)).unwrap().up;
        assert!(is_up());
        fake.write("1/net/netstat", "");
        assert!(!is_up());
        fake.netstat(20, 4, 4);
        fake.netstat(1, 100, 100);
        assert!(is_up());
        drop(running);
    });
    let losses: Vec<_> = losses.try_iter().collect();
    assert_eq!(
        losses,
        [(7, counts(4, 4))],
        "what was lost meanwhile is counted"
    );
}

#[test]
fn a_listener_with_a_backlog_is_found_by_its_port() {
    let tcp = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000002 00:00000000 00000000     0        0 1 1
   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1
   2: 0100007F:0051 0200007F:C000 01 00000000:00000005 00:00000000 00000000     0        0 3 1
   3: cut";
    assert!(listens_in_vain(tcp, 8080));
    assert!(!listens_in_vain(tcp, 80), "nobody waits");
    assert!(!listens_in_vain(tcp, 81), "no listener");
    assert!(!listens_in_vain(tcp, 82));
    assert!(!listens_in_vain("", 80));
}
