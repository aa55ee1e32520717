//! Connections lost to a full accept queue, which no drop shows: compared with the kernel's own
//! counters, read in the namespace by the test.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;
use whydrop::source::accept_queues::{AcceptQueues, Settled};
use whydrop::source::cgroups::Cgroups;
use whydrop_tests::agent::{Agent, POLL, Sample};
use whydrop_tests::bystander::{Bystander, Habit};
use whydrop_tests::counters::Snmp;
use whydrop_tests::lab::{Family, Host, Lab, Place, command};
use whydrop_tests::{objects, on_both_families, packet, traffic};

on_both_families!(by_address);

const PORT: u16 = 80;
/// Until a loss is on `/metrics`: a scan, a reading, and what a busy machine takes.
const DEADLINE: Duration = Duration::from_secs(60);
/// Connects that find a queue full.
const CONNECTS: usize = 12;

/// `ListenOverflows` and `ListenDrops`.
type Lost = (u64, u64);

fn since(now: &Snmp, before: &Snmp) -> Lost {
    let grown = |name: &str| now.since(before, name);
    (grown("TcpExtListenOverflows"), grown("TcpExtListenDrops"))
}

/// Waits for what the agent's samples are asked for.
fn wait<T>(agent: &Agent, what: &str, mut found: impl FnMut(&[Sample]) -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let samples = agent.metrics()?;
        if let Some(found) = found(&samples) {
            return Ok(found);
        }
        let shown: Vec<_> = samples
            .iter()
            .filter(|s| {
                s.name == "whydrop_listen_drops_total" || s.label("source") == "accept_queues"
            })
            .collect();
        ensure!(
            Instant::now() < deadline,
            "not within {DEADLINE:?}: {what}; shown are {shown:?}\n{}",
            agent.log()
        );
        std::thread::sleep(POLL);
    }
}

/// What is shown for a pod, if it is: of both stats.
fn shown(samples: &[Sample], namespace: &str, pod: &str) -> Option<Lost> {
    let of = |stat: &str| {
        let sample = samples.iter().find(|s| {
            s.name == "whydrop_listen_drops_total"
                && s.label("namespace") == namespace
                && s.label("pod") == pod
                && s.label("stat") == stat
        })?;
        Some(sample.value as u64)
    };
    of("overflows").zip(of("drops"))
}

/// An agent that has read every namespace once: later losses count.
fn start(lab: &Lab, objects: &serde_json::Value, arguments: &[&str]) -> Result<Agent> {
    let agent = Agent::start_with(&lab.node(), objects, arguments)?;
    wait_for_source(&agent, 1.0)?;
    Ok(agent)
}

fn wait_for_source(agent: &Agent, up: f64) -> Result<()> {
    wait(agent, "the state of the source", |samples| {
        samples
            .iter()
            .find(|s| s.name == "whydrop_source_up" && s.label("source") == "accept_queues")
            .filter(|s| s.value == up)
            .map(drop)
    })
}

/// A queue at the server that is full, with what its namespace has lost by then.
fn fill(lab: &Lab, family: Family) -> Result<(std::os::fd::OwnedFd, Snmp)> {
    let at = lab.socket(Place::Of(Host::Server), family, PORT);
    let listener = lab.within(Host::Server, || traffic::deaf_listener(at, 0))?;
    // One by itself: of several at once, two CPUs may both find the last place free.
    ensure!(lab.within(Host::Client, || traffic::connects(at, 1)) == 1);
    ensure!(
        traffic::has_arrived(&listener, DEADLINE)?,
        "the first connection never came to its queue"
    );
    let taken = lab.within(Host::Client, || traffic::connects(at, CONNECTS));
    ensure!(taken == 0, "{taken} connections were taken by a full queue");
    let lost = Snmp::read(lab, Host::Server)?;
    ensure!(lost.get("TcpExtListenOverflows") > 0);
    Ok((listener, lost))
}

/// The pod is known by its address, its namespace by its mount: no process is in it. What it lost
/// before the agent came is not counted, and the pair beside it loses nothing.
fn by_address(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let (_listener, before) = fill(&lab, family)?;
    let agent = start(&lab, &objects::list(&lab), &[])?;
    let bystander = Bystander::start(&lab, family, Habit::Connects)?;
    let at = lab.socket(Place::Of(Host::Server), family, PORT);
    for round in 1..=2 {
        ensure!(lab.within(Host::Client, || traffic::connects(at, CONNECTS)) == 0);
        let lost = since(&Snmp::read(&lab, Host::Server)?, &before);
        ensure!(lost.0 >= (round * CONNECTS) as u64, "{lost:?}");
        wait(&agent, &format!("{lost:?} of the server"), |samples| {
            (shown(samples, &lab.namespace(), "server") == Some(lost)).then_some(())
        })?;
    }
    bystander.finish()?;
    let samples = agent.metrics()?;
    for pod in ["client", "client2", "server2"] {
        let lost = shown(&samples, &lab.namespace(), pod);
        ensure!(lost.is_none(), "{pod} lost {lost:?}");
    }
    ensure!(agent.stop()?.success());
    Ok(())
}

/// `ListenDrops` counts more than full accept queues: here the queue of half-open connections is
/// full.
#[test]
fn drops_without_overflow() -> Result<()> {
    let (lab, family) = (Lab::new()?, Family::V4);
    lab.sysctl(Host::Server, "net/ipv4/tcp_syncookies", "0")?;
    // Nobody completes or resets what the server answers.
    lab.nft(
        Host::Client,
        "table inet lab { chain c { type filter hook input priority 0; tcp flags & syn == syn drop; }\n}",
    )?;
    let agent = start(&lab, &objects::list(&lab), &[])?;
    let before = Snmp::read(&lab, Host::Server)?;
    let [from, at] =
        [Host::Client, Host::Server].map(|host| lab.socket(Place::Of(host), family, PORT));
    let _listener = lab.within(Host::Server, || traffic::deaf_listener(at, 4))?;
    let syns = (40_000..40_030)
        .map(|port| packet::segment((from.ip(), port), (at.ip(), PORT), packet::flags::SYN));
    lab.within(Host::Client, || traffic::raw_ip(at.ip(), syns))?;
    let lost = since(&Snmp::read(&lab, Host::Server)?, &before);
    ensure!(lost.0 == 0 && lost.1 > 10, "{lost:?}");
    wait(&agent, &format!("{lost:?} of the server"), |samples| {
        (shown(samples, &lab.namespace(), "server") == Some(lost)).then_some(())
    })
}

/// A cgroup of version 2, removed with what is above it.
struct Cgroup {
    path: PathBuf,
    above: PathBuf,
}

impl Cgroup {
    /// As the kubelet makes it with systemd; `None` where this machine does not let us.
    fn of_pod(lab: &Lab, uid: &str) -> Option<Self> {
        let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].into_iter();
        let root = root
            .map(Path::new)
            .find(|root| root.join("cgroup.procs").exists())?;
        let kubepods = format!("wdlab{}-kubepods", lab.id());
        let above = root.join(format!("{kubepods}.slice"));
        let uid = uid.replace('-', "_");
        let path = above.join(format!("{kubepods}-besteffort-pod{uid}.slice"));
        match fs::create_dir_all(&path) {
            Ok(()) => Some(Self { path, above }),
            Err(error) => {
                eprintln!("skipped: cannot make {}: {error}", path.display());
                None
            }
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for path in [&self.path, &self.above] {
            if let Err(error) = fs::remove_dir(path) {
                eprintln!("remove {}: {error}", path.display());
            }
        }
    }
}

/// A process that does nothing, killed when it is dropped.
struct Idle(Child);

impl Idle {
    fn start() -> Result<Self> {
        let mut command = Command::new("sleep");
        let child = command.arg("1000").stdin(Stdio::null()).spawn();
        Ok(Self(child.context("start sleep")?))
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A pod that is known by its UID alone, in a namespace that is made, loses connections and goes
/// while the agent watches: all of it counts, and stays until the pod is gone as well.
#[test]
fn by_cgroup_in_a_namespace_that_comes_and_goes() -> Result<()> {
    let lab = Lab::new()?;
    let uid = format!("9f0c5a1e-2b7d-4f60-8a43-{:012x}", lab.id());
    let Some(cgroup) = Cgroup::of_pod(&lab, &uid) else {
        return Ok(());
    };
    let mut list = objects::list(&lab);
    let items = list["items"].as_array_mut().context("a list")?;
    items.push(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": lab.namespace(), "name": "short-lived", "uid": uid,
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "once", "controller": true}]},
        "spec": {"nodeName": lab.node()},
    }));
    let agent = start(&lab, &list, &["--series-ttl", "1s"])?;
    let in_namespace = || -> Result<_> {
        unshare(CloneFlags::CLONE_NEWNET).context("make a namespace")?;
        command(&["ip", "link", "set", "lo", "up"], None)?;
        let process = Idle::start()?;
        fs::write(cgroup.path.join("cgroup.procs"), process.0.id().to_string())
            .context("put a process into the pod's cgroup")?;
        let at = (std::net::Ipv4Addr::LOCALHOST, PORT).into();
        let listener = traffic::deaf_listener(at, 0)?;
        // As in `fill`.
        ensure!(traffic::connects(at, 1) == 1);
        ensure!(traffic::has_arrived(&listener, DEADLINE)?);
        // The agent looks once in three seconds: most of these come before it knows.
        ensure!(traffic::connects(at, CONNECTS) == 0);
        let lost = since(&Snmp::here()?, &Snmp::default());
        ensure!(lost.0 > 5, "{lost:?}");
        Ok((process, listener, lost))
    };
    let entered = std::thread::scope(|scope| scope.spawn(in_namespace).join());
    let (process, listener, lost) =
        entered.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    wait(&agent, &format!("{lost:?} of the pod"), |samples| {
        (shown(samples, &lab.namespace(), "short-lived") == Some(lost)).then_some(())
    })?;
    drop((process, listener));
    // The id of the cgroup, as the kernel gives it to programs, leads to the pod too.
    let id = fs::metadata(&cgroup.path)?.ino();
    let found = Cgroups::open().pod_uid(id);
    ensure!(
        found.as_ref().is_some_and(|found| found.as_str() == uid),
        "{found:?}"
    );
    // The namespace is gone, and no error.
    let samples = agent.metrics()?;
    ensure!(shown(&samples, &lab.namespace(), "short-lived") == Some(lost));
    ensure!(errors(&samples) == Some(0.0), "{:?}", errors(&samples));
    // Its pod goes: so does its series, at the second look after that, each ten seconds.
    fs::write(
        agent.objects(),
        serde_json::to_string(&objects::list(&lab))?,
    )?;
    let gone = Instant::now();
    while shown(&agent.metrics()?, &lab.namespace(), "short-lived").is_some() {
        ensure!(
            gone.elapsed() < 3 * DEADLINE,
            "the series of a pod that is gone stays"
        );
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// The node's own namespace has no name, whoever's address it has.
#[test]
fn the_nodes_own_namespace_is_no_pods() -> Result<()> {
    let lab = Lab::new()?;
    let agent = start(&lab, &objects::list(&lab), &[])?;
    let own = |samples: &[Sample]| shown(samples, "", "").unwrap_or_default().0;
    let (before, counted) = (Snmp::here()?, own(&agent.metrics()?));
    let at = (std::net::Ipv4Addr::LOCALHOST, 0).into();
    let listener = traffic::deaf_listener(at, 0)?;
    let at = nix::sys::socket::getsockname::<nix::sys::socket::SockaddrIn>(
        std::os::fd::AsRawFd::as_raw_fd(&listener),
    )?;
    traffic::connects((at.ip(), at.port()).into(), CONNECTS);
    let (overflows, _) = since(&Snmp::here()?, &before);
    ensure!(overflows > 5, "{overflows}");
    // Others may lose connections on this node meanwhile.
    wait(
        &agent,
        &format!("{overflows} and more of the node"),
        |samples| (own(samples) - counted >= overflows).then_some(()),
    )
}

/// Whoever asks is answered by a reading of that moment, and only for that address.
#[test]
fn asked_whether_a_listener_overflowed() -> Result<()> {
    let (lab, family) = (Lab::new()?, Family::V4);
    let queues = AcceptQueues::new(Default::default());
    let (running, stop) = channel();
    let (known, is_known) = channel();
    std::thread::scope(|scope| {
        let queues = &queues;
        scope.spawn(move || {
            let settled = |_: &_, _, _| Settled::Done;
            queues.run(&stop, settled, |status| drop(known.send(status)));
        });
        let status = is_known.recv_timeout(DEADLINE)?;
        ensure!(status.up, "{status:?}");
        let [server, server2] =
            [Host::Server, Host::Server2].map(|host| lab.address(Place::Of(host), family));
        let start = Instant::now();
        ensure!(!queues.overflowed_since(server, 0, start));
        let _listener = fill(&lab, family)?;
        ensure!(queues.overflowed_since(server, 0, start));
        ensure!(!queues.overflowed_since(server2, 0, start));
        ensure!(!queues.overflowed_since(server, 0, Instant::now()));
        drop(running);
        Ok(())
    })
}

/// Without the right to see other processes it says so, and the rest goes on.
#[test]
fn without_the_right_to_see_processes() -> Result<()> {
    without("-sys_ptrace", 0.0, "CAP_SYS_PTRACE")
}

/// Without the right to enter namespaces those without a process are left out.
#[test]
fn without_the_right_to_enter_namespaces() -> Result<()> {
    without("-sys_admin", 1.0, "CAP_SYS_ADMIN")
}

fn without(capability: &str, up: f64, said: &str) -> Result<()> {
    let lab = Lab::new()?;
    let wrapper = ["setpriv", "--bounding-set", capability];
    let agent = Agent::start_by(&wrapper, &lab.node(), &objects::list(&lab), &[])?;
    wait_for_source(&agent, up)?;
    ensure!(agent.log().contains(said), "{}", agent.log());
    let _full = fill(&lab, Family::V4)?;
    // Whatever it cannot see it does not lay to anyone, and it is no error.
    let status = agent.get("/readyz")?.0;
    ensure!(status == 200, "/readyz answers {status}");
    ensure!(errors(&agent.metrics()?) == Some(0.0));
    ensure!(agent.stop()?.success());
    Ok(())
}

fn errors(samples: &[Sample]) -> Option<f64> {
    let mut errors = samples.iter().filter(|s| s.name == "whydrop_errors_total");
    let errors = errors.find(|s| s.label("stage") == "accept_queues");
    errors.map(|s| s.value)
}
