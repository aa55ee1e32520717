use super::fake::{Fake, pod, uid};
use super::*;

struct Scans {
    fake: Fake,
    scanner: Scanner,
    namespaces: Namespaces,
}

impl Scans {
    fn new() -> Self {
        let fake = Fake::new();
        Self {
            scanner: Scanner::new(fake.proc()),
            namespaces: Namespaces::default(),
            fake,
        }
    }

    fn scan(&mut self) -> Scan {
        self.scanner.scan(&self.namespaces).unwrap()
    }

    fn get(&self, id: u32) -> Arc<Namespace> {
        self.namespaces.get(id).unwrap()
    }

    fn pod(&self, id: u32) -> Option<String> {
        self.get(id).pod.as_ref().map(ToString::to_string)
    }

    fn with(&self, ip: &str) -> Vec<u32> {
        let with = self.namespaces.with_address(ip.parse().unwrap());
        with.iter().map(|namespace| namespace.id).collect()
    }
}

#[test]
fn a_namespace_is_a_pods_by_its_cgroup_and_has_addresses() {
    let mut scans = Scans::new();
    let fake = &scans.fake;
    // Two containers, and something that was sent into the namespace from the host.
    fake.process(20, 7, &pod(1));
    fake.process(21, 7, &pod(1));
    fake.process(22, 7, "0::/user.slice\n");
    fake.addresses(20, &["127.0.0.1", "169.254.1.1", "10.244.1.7"]);
    fake.write(
        "20/net/if_inet6",
        "fd000010024400010000000000000007 02 40 00 80 eth0\n",
    );
    // Processes of two pods: nobody knows whose it is.
    fake.process(30, 8, &pod(2));
    fake.process(31, 8, &pod(3));
    // A host-network pod.
    fake.process(40, 1, &pod(4));
    fake.addresses(1, &["192.168.1.10"]);
    // Not a process, one that has just ended, and a zombie.
    fake.write("sys/kernel/osrelease", "");
    fs_dir(fake, "50");
    let scan = scans.scan();
    assert_eq!((scan.processes, scan.errors, scan.left_out), (7, 0, 0));
    assert_eq!(scans.pod(7), Some(uid(1)));
    assert_eq!((scans.pod(8), scans.pod(1)), (None, None));
    assert!(scans.get(1).host && !scans.get(7).host);
    assert_eq!(scans.get(7).addresses.len(), 2);
    assert_eq!(scans.with("10.244.1.7"), [7]);
    assert_eq!(scans.with("::ffff:10.244.1.7"), [7]);
    assert_eq!(scans.with("fd00:10:244:1::7"), [7]);
    assert_eq!(scans.with("192.168.1.10"), [1]);
    assert_eq!(scans.with("127.0.0.1"), [0; 0]);
}

fn fs_dir(fake: &Fake, path: &str) {
    std::fs::create_dir_all(fake.path(path)).unwrap();
}

#[test]
fn what_comes_after_the_first_scan_was_made_then() {
    let mut scans = Scans::new();
    scans.fake.process(20, 7, &pod(1));
    scans.scan();
    scans.fake.process(30, 8, &pod(2));
    scans.scan();
    assert_eq!((scans.get(7).born, scans.get(8).born), (false, true));
    let serial = scans.get(8).serial;
    scans.fake.end(30);
    scans.scan();
    assert!(scans.namespaces.get(8).is_none());
    // The number again, for another one.
    scans.fake.process(31, 8, &pod(2));
    scans.scan();
    assert!(scans.get(8).serial != serial && scans.get(8).born);
}

/// The kernel gives a number anew as soon as it is free, so also between two scans.
#[test]
fn a_number_may_be_another_namespaces_at_the_next_scan() {
    let mut scans = Scans::new();
    scans.fake.process(20, 7, &pod(1));
    scans.fake.addresses(20, &["10.244.1.7"]);
    scans.scan();
    let first = scans.get(7);
    // A container restarts: the same pod, the same namespace.
    scans.fake.process(21, 7, &pod(1));
    scans.fake.addresses(21, &["10.244.1.7"]);
    scans.fake.end(20);
    scans.scan();
    assert_eq!(
        (scans.get(7).serial, scans.get(7).born),
        (first.serial, false)
    );
    // Another pod.
    scans.fake.end(21);
    scans.fake.process(30, 7, &pod(2));
    scans.fake.addresses(30, &["10.244.1.8"]);
    scans.scan();
    let second = scans.get(7);
    assert!(second.serial != first.serial && second.born);
    assert_eq!(scans.pod(7), Some(uid(2)));
    assert_eq!(
        (scans.with("10.244.1.7").len(), scans.with("10.244.1.8")),
        (0, vec![7])
    );
    // One that has nothing to do with a pod, told by its address.
    scans.fake.end(30);
    scans.fake.process(31, 7, "0::/user.slice\n");
    scans.fake.addresses(31, &["172.17.0.2"]);
    scans.scan();
    assert!(scans.get(7).serial != second.serial);
    assert_eq!(scans.pod(7), None);
}

#[test]
fn a_young_namespace_is_looked_at_until_it_is_known() {
    let mut scans = Scans::new();
    scans.scan();
    // As a runtime makes it: mounted, then a process of its own, then the pod's; the address last.
    scans
        .fake
        .process(20, 7, "0::/system.slice/containerd.service\n");
    scans.scan();
    assert_eq!(scans.pod(7), None);
    scans.fake.process(21, 7, &pod(1));
    scans.scan();
    assert_eq!(scans.pod(7), Some(uid(1)));
    scans.fake.addresses(20, &["10.244.1.7"]);
    scans.scan();
    assert_eq!(scans.with("10.244.1.7"), [7]);
    // What is known is looked at in ever longer intervals.
    let mut scans_until = |ip: &str| {
        scans.fake.addresses(20, &[ip]);
        let count = (1..100).find(|_| {
            scans.scan();
            !scans.with(ip).is_empty()
        });
        count.unwrap()
    };
    let waits: Vec<i32> = (1..=8)
        .map(|n| scans_until(&format!("10.244.2.{n}")))
        .collect();
    assert_eq!(waits, [2, 4, 8, 16, 32, 32, 32, 32]);
}

#[test]
fn a_namespace_without_a_process_is_found_by_its_mount() {
    let mut scans = Scans::new();
    scans.fake.process(20, 7, &pod(1));
    let mount = |id: u32, path: &str| format!("43 42 0:4 net:[{id}] {path} rw - nsfs nsfs rw\n");
    let own = mount(7, "/run/netns/a") + &mount(8, "/run/netns/own");
    scans.fake.write("1/mountinfo", &own);
    scans.scan();
    assert_eq!(
        scans.get(7).mount.as_deref(),
        Some(Path::new("/run/netns/a"))
    );
    assert_eq!(
        scans.get(8).mount.as_deref(),
        Some(Path::new("/run/netns/own"))
    );
    assert!(scans.get(8).pids.is_empty());
}

/// In a container the node's mounts are those of the first process.
#[test]
fn the_nodes_mounts_are_reached_through_the_first_process() {
    let mut scans = Scans::new();
    scans.fake.process(50, 1, &pod(9));
    scans.fake.link("self", "50");
    scans.fake.link("50/ns/mnt", "mnt:[2]");
    scans.fake.write("50/mountinfo", "");
    scans.fake.write(
        "1/mountinfo",
        "43 42 0:4 net:[8] /run/netns/cni-1 rw - nsfs nsfs rw\n",
    );
    fs_dir(&scans.fake, "1/root");
    scans.scan();
    let expected = scans.fake.path("1/root/run/netns/cni-1");
    assert_eq!(scans.get(8).mount.as_deref(), Some(&*expected));
}

#[test]
fn past_the_limit_namespaces_are_left_out_and_later_ones_are_not_taken_for_new() {
    let mut scans = Scans::new();
    let mounts = |count: usize| -> String {
        let ids = 100..100 + count;
        ids.map(|id| format!("43 42 0:4 net:[{id}] /run/netns/{id} rw - nsfs nsfs rw\n"))
            .collect()
    };
    scans.fake.write("1/mountinfo", &mounts(MAX_NAMESPACES));
    let scan = scans.scan();
    assert_eq!(
        (scan.left_out, scans.namespaces.all().len()),
        (1, MAX_NAMESPACES)
    );
    assert!(!scan.is_complete());
    assert!(scans.get(1).host, "the node's own is never left out");
    // The list of mounts is read when the kernel says that it changed, which this one cannot.
    scans.scanner.mounts = Mounts::new(scans.fake.proc());
    scans.fake.write("1/mountinfo", "");
    scans.fake.process(20, 7, &pod(1));
    scans.scan();
    assert!(!scans.get(7).born);
    scans.fake.process(21, 8, &pod(2));
    scans.scan();
    assert!(scans.get(8).born);
}

#[test]
fn without_proc_what_was_found_stays() {
    let mut scans = Scans::new();
    scans.scan();
    scans.scanner.proc = scans.fake.path("nowhere");
    assert!(scans.scanner.scan(&scans.namespaces).is_err());
    assert!(scans.namespaces.get(1).is_some());
}
