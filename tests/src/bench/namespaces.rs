//! `namespaces`: what it takes to know a full node's network namespaces, accept queues and cgroups.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::time::{ClockId, clock_gettime};
use whydrop::source::accept_queues::Counts;
use whydrop::source::cgroups::Cgroups;
use whydrop::source::namespaces::reader::Reader;
use whydrop::source::namespaces::{Namespaces, Scanner};

use super::report::{Must, Report, median};
use super::{flows, kernel};
use crate::agent::Agent;
use crate::lab::Lab;

/// Twice what a node is built for: 110 pods.
const NAMESPACES: usize = 200;
const PROCESSES: usize = 10 * NAMESPACES;
/// Cgroups of as many pods, with what is above them.
const CGROUPS_PER_POD: usize = 9;
const ROUNDS: usize = 20;
/// How long the agent is looked at.
const AGENT: Duration = Duration::from_secs(20);

/// Processes in namespaces of their own, killed when it is dropped.
struct Node(Vec<Child>);

impl Node {
    fn fill() -> Result<Self> {
        let mut node = Self(Vec::new());
        for _ in 0..NAMESPACES {
            let made = std::thread::scope(|scope| {
                let fill = || -> Result<Vec<Child>> {
                    unshare(CloneFlags::CLONE_NEWNET).context("make a namespace")?;
                    let idle = || {
                        Command::new("sleep")
                            .arg("1000")
                            .stdin(Stdio::null())
                            .spawn()
                    };
                    let processes = (0..PROCESSES / NAMESPACES).map(|_| idle());
                    processes.map(|p| p.context("start sleep")).collect()
                };
                scope.spawn(fill).join()
            });
            node.0
                .extend(made.map_err(|_| anyhow::anyhow!("a thread panicked"))??);
        }
        Ok(node)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for child in &mut self.0 {
            drop(child.kill());
        }
        for child in &mut self.0 {
            drop(child.wait());
        }
    }
}

/// Cgroups as the kubelet makes them, removed when it is dropped.
struct Tree(Vec<PathBuf>);

impl Tree {
    fn grow(lab: &Lab) -> Result<Self> {
        let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].into_iter();
        let mut roots = root.map(Path::new);
        let root = roots.find(|root| root.join("cgroup.procs").exists());
        let above = root.context("no cgroup version 2")?;
        let above = above.join(format!("wdlab{}-kubepods", lab.id()));
        let mut tree = Self(Vec::new());
        tree.make(above.clone())?;
        for pod in 0..NAMESPACES {
            let pod = above.join(format!("pod9f0c5a1e-2b7d-4f60-8a43-{pod:012x}"));
            tree.make(pod.clone())?;
            for container in 0..CGROUPS_PER_POD {
                tree.make(pod.join(format!("{container:064x}")))?;
            }
        }
        Ok(tree)
    }

    fn make(&mut self, path: PathBuf) -> Result<()> {
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        self.0.push(path);
        Ok(())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            drop(fs::remove_dir(path));
        }
    }
}

/// CPU time of this thread that something takes, in milliseconds.
fn cpu_ms<T>(run: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let now = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
    let before = now()?;
    let result = run()?;
    Ok((result, (now()? - before).as_secs_f64() * 1e3))
}

/// Scans, readings and walks on a full node, and an agent there.
///
/// # Errors
/// The node cannot be filled, or the agent does not start.
pub fn namespaces(report: &mut Report) -> Result<()> {
    let lab = Lab::alone()?;
    let idle = agent_percent(&lab)?;
    let node = Node::fill()?;
    let (published, mut scanner) = (Namespaces::default(), Scanner::default());
    let ((), first) = cpu_ms(|| scanner.scan(&published).map(drop).map_err(Into::into))?;
    let all = published.all();
    ensure!(all.len() > NAMESPACES, "found {} namespaces", all.len());
    let mut scans = Vec::new();
    for _ in 0..ROUNDS {
        scans.push(cpu_ms(|| Ok(scanner.scan(&published)?))?.1);
    }
    let mut reader = Reader::new(Path::new("/proc"));
    let mut text = String::new();
    let mut readings = Vec::new();
    for _ in 0..ROUNDS {
        let read = || {
            for namespace in all.values() {
                if reader.read(namespace, "netstat", &mut text)? {
                    Counts::parse(&text).context("no counters")?;
                }
            }
            Ok(())
        };
        readings.push(cpu_ms(read)?.1);
    }
    report.count("namespaces", all.len() as u64, Must::Shown);
    report.figure(
        format!("first scan, {PROCESSES} processes"),
        first,
        "ms",
        Must::Shown,
    );
    report.figure("a later scan", median(&scans), "ms", Must::Shown);
    let percent = |ms: f64, every_ms: f64| ms / every_ms * 100.0;
    let scan_percent = percent(median(&scans), 3_000.0);
    report.figure("scans, of one core", scan_percent, "%", Must::Below(1.0));
    report.figure("reading all counters", median(&readings), "ms", Must::Shown);
    let read_percent = percent(median(&readings), 1_000.0);
    report.figure("readings, of one core", read_percent, "%", Must::Below(1.0));
    let busy = agent_percent(&lab)?;
    report.figure("an agent there, of one core", busy, "%", Must::Below(2.0));
    report.figure(
        "an agent before it was full, of one core",
        idle,
        "%",
        Must::Shown,
    );
    drop(node);
    walks(report, &lab)
}

/// What the tree of cgroups takes.
fn walks(report: &mut Report, lab: &Lab) -> Result<()> {
    let tree = match Tree::grow(lab) {
        Ok(tree) => tree,
        Err(error) => {
            report.skipped("walk of the cgroups", format!("{error:#}"));
            return Ok(());
        }
    };
    let mut walks = Vec::new();
    for _ in 0..ROUNDS {
        let mut cgroups = Cgroups::open();
        walks.push(cpu_ms(|| Ok(cgroups.pod_uid(u64::MAX)))?.1);
        let walk = cgroups.last_walk();
        ensure!(
            walk.cgroups >= tree.0.len() && walk.left_out == 0,
            "{walk:?}"
        );
    }
    report.count("cgroups", tree.0.len() as u64, Must::Shown);
    report.figure("a walk of the cgroups", median(&walks), "ms", Must::Shown);
    let percent = median(&walks) / 1_000.0 * 100.0;
    report.figure(
        "walks, of one core at most",
        percent,
        "%",
        Must::AtMost(1.0),
    );
    Ok(())
}

/// CPU time of an agent with nothing to see, in percent of one core.
fn agent_percent(lab: &Lab) -> Result<f64> {
    let agent = Agent::start_unfollowed(&lab.node(), &flows::objects(lab), &[])?;
    // What starting takes is over.
    std::thread::sleep(Duration::from_secs(3));
    let (cpu, started) = (kernel::cpu_time(agent.pid())?, Instant::now());
    std::thread::sleep(AGENT);
    let used = kernel::cpu_time(agent.pid())? - cpu;
    let percent = used.as_secs_f64() / started.elapsed().as_secs_f64() * 100.0;
    agent.stop()?;
    Ok(percent)
}
