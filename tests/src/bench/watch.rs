//! Who watches the drops: nobody, a peer, bpftrace or the agent.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use aya::maps::PerCpuArray;
use aya::programs::BtfTracePoint;
use aya::sys::{Stats, enable_stats};
use aya::{Btf, Ebpf, EbpfLoader};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use whydrop::source::btf;
use whydrop::source::sys::Plain;
use whydrop_ebpf::Offsets;

use super::flows::{self, Amount, Flows};
use super::kernel;
use crate::agent::{Agent, POLL};
use crate::lab::{Family, Lab};

/// The peers, built beside the agent's own programs.
static PEERS: &[u8] = aya::include_bytes_aligned!(env!("WHYDROP_PEERS"));

/// bpftrace compiles its script first.
const BPFTRACE_START: Duration = Duration::from_secs(20);

/// Somebody who can watch drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watcher {
    /// Nobody.
    Nothing,
    /// A program that returns.
    Empty,
    /// A program that adds one to a per-CPU hash by 5-tuple.
    Minimal,
    /// bpftrace, counting by addresses, ports and reason.
    Bpftrace,
    /// The agent.
    Whydrop,
}

impl Watcher {
    /// What tables call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Empty => "empty program",
            Self::Minimal => "minimal program",
            Self::Bpftrace => "bpftrace",
            Self::Whydrop => "whydrop",
        }
    }

    /// Starts watching.
    ///
    /// # Errors
    /// The kernel refuses a program, or what is needed is not installed.
    pub fn start(self, lab: &Lab, family: Family) -> Result<Watching> {
        Ok(match self {
            Self::Nothing => Watching::Nothing,
            Self::Empty => Watching::Peer(Peer::attach("empty")?),
            Self::Minimal => Watching::Peer(Peer::attach("minimal")?),
            Self::Bpftrace => Watching::Bpftrace(Bpftrace::start(lab, family)?),
            Self::Whydrop => Watching::Whydrop(Agent::start_unfollowed(
                &lab.node(),
                &flows::objects(lab),
                &[],
            )?),
        })
    }
}

/// Somebody who watches; dropping it ends that.
pub enum Watching {
    /// Nobody.
    Nothing,
    /// One of the peers.
    Peer(Peer),
    /// bpftrace.
    Bpftrace(Bpftrace),
    /// The agent.
    Whydrop(Agent),
}

impl Watching {
    /// Runs of the program on kfree_skb and nanoseconds in it, while statistics were on.
    ///
    /// # Errors
    /// It has ended.
    pub fn spent(&self) -> Result<(u64, u64)> {
        self.spent_in("kfree_skb")
    }

    /// The same of the agent's program on any tracepoint; the others have one on kfree_skb.
    ///
    /// # Errors
    /// It has ended.
    pub fn spent_in(&self, tracepoint: &str) -> Result<(u64, u64)> {
        let pid = match self {
            Self::Nothing => return Ok((0, 0)),
            Self::Peer(_) => std::process::id(),
            Self::Bpftrace(bpftrace) => bpftrace.child.id(),
            Self::Whydrop(agent) => agent.pid(),
        };
        let programs = kernel::programs(pid)?;
        Ok(programs
            .iter()
            .filter(|program| match self {
                // The typed program is called so, the raw one has a suffix.
                Self::Whydrop(_) => program.name.starts_with(tracepoint),
                _ => true,
            })
            .fold((0, 0), |(runs, ns), program| {
                (runs + program.runs, ns + program.run_ns)
            }))
    }

    /// Time that a process of its own has been on a CPU.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu_time(&self) -> Result<Duration> {
        match self {
            Self::Nothing | Self::Peer(_) => Ok(Duration::ZERO),
            Self::Bpftrace(bpftrace) => kernel::cpu_time(bpftrace.child.id()),
            Self::Whydrop(agent) => kernel::cpu_time(agent.pid()),
        }
    }

    /// Ends it and waits for its end.
    ///
    /// # Errors
    /// The agent does not end as it should.
    pub fn stop(self) -> Result<()> {
        if let Self::Whydrop(agent) = self {
            agent.stop()?;
        }
        Ok(())
    }
}

/// One of the peers, attached.
pub struct Peer(Ebpf);

impl Peer {
    /// Attaches `empty`, `minimal` or `count`.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn attach(name: &str) -> Result<Self> {
        let offsets: Plain<Offsets> = Plain(btf::read()?.offsets);
        let btf = Btf::from_sys_fs().context("read the kernel's BTF")?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("OFFSETS", &offsets, true)
            .load(PEERS)
            .context("load the peers")?;
        let program: &mut BtfTracePoint = ebpf
            .program_mut(name)
            .with_context(|| format!("the peers have no program {name}"))?
            .try_into()?;
        program
            .load("kfree_skb", &btf)
            .with_context(|| format!("load {name}"))?;
        program.attach().with_context(|| format!("attach {name}"))?;
        Ok(Self(ebpf))
    }

    /// What `count` has counted on all CPUs.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn counted(&self) -> Result<u64> {
        let map = self.0.map("RUNS").context("the peers have no map RUNS")?;
        let runs: PerCpuArray<_, u64> = PerCpuArray::try_from(map)?;
        Ok(runs.get(&0, 0).context("read the count")?.iter().sum())
    }
}

/// A running bpftrace.
pub struct Bpftrace {
    child: Child,
}

impl Bpftrace {
    /// Whether it is installed.
    pub fn is_installed() -> bool {
        Command::new("bpftrace")
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success())
    }

    /// Starts it, and drops packets until its program has run.
    fn start(lab: &Lab, family: Family) -> Result<Self> {
        let (header, suffix) = family.pick(("iphdr", ""), ("ipv6hdr", ".in6_u.u6_addr8"));
        let script = format!(
            "tracepoint:skb:kfree_skb {{
               $skb = (struct sk_buff *)args->skbaddr;
               $ip = (struct {header} *)($skb->head + $skb->network_header);
               $udp = (struct udphdr *)($skb->head + $skb->transport_header);
               @[$ip->saddr{suffix}, $ip->daddr{suffix}, $udp->source, $udp->dest, args->reason] = count();
             }}"
        );
        // Tracepoint probes need tracefs; mounted where only this process sees it. Its keys must
        // have room, as those of everyone else.
        let child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg("[ -d /sys/kernel/tracing/events ] || mount -t tracefs none /sys/kernel/tracing && exec bpftrace -e \"$0\"")
            .arg(&script)
            .env("BPFTRACE_MAP_KEYS_MAX", "20000")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start unshare")?;
        let mut bpftrace = Self { child };
        bpftrace.wait_attached(lab, family)?;
        Ok(bpftrace)
    }

    fn wait_attached(&mut self, lab: &Lab, family: Family) -> Result<()> {
        let _stats = enable_stats(Stats::RunTime).context("switch statistics on")?;
        let flows = Flows::to_ports(lab, family, 1, 1)?;
        let deadline = Instant::now() + BPFTRACE_START;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                bail!("bpftrace ended at once: {status}");
            }
            flows.send(lab, Amount::Each(1))?;
            if kernel::programs(self.child.id())?
                .iter()
                .any(|program| program.runs > 0)
            {
                return Ok(());
            }
            std::thread::sleep(POLL);
        }
        bail!("bpftrace has seen no drop within {BPFTRACE_START:?}");
    }
}

impl Drop for Bpftrace {
    fn drop(&mut self) {
        if let Ok(pid) = self.child.id().try_into() {
            // It would print all its counts on SIGINT.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.wait();
    }
}
