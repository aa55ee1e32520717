//! Fetching the counts: flip the generation, wait until no program writes to the old one, drain it.
//!
//! A thread of its own, because waiting for the programs takes 10 to 100 ms and must not hold up
//! the reading of events.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use aya::maps::PerCpuValues;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};
use whydrop_ebpf::{Control, Cpu, FlowCount, FlowKey, OverflowCount, OverflowKey};

use super::load::{self, Maps};
use super::sys::{self, Plain};

/// How often counts are fetched while there are any. Shorter lets the flow map fill less, longer
/// costs less; a drain of 50,000 keys takes 20 ms.
pub const PERIOD: Duration = Duration::from_millis(100);

/// Keys in one batch call: 128 KiB of keys and values on 2 CPUs, 2 MiB on 128.
const BATCH_KEYS: usize = 1024;

/// Sums that only ever grow, read at one moment.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// All CPUs' own counts together (`answers` is left empty).
    pub cpu: Cpu,
    /// Packets by benign reason number; only those above zero.
    pub benign: Vec<(u32, u64)>,
    /// Packets without a flow.
    pub overflow: Vec<(OverflowKey, OverflowCount)>,
    /// What the kernel says of each program.
    pub programs: Vec<ProgramTotals>,
}

/// What the kernel says of a program.
#[derive(Clone, Debug, Default)]
pub struct ProgramTotals {
    /// As in the eBPF object.
    pub name: String,
    /// Runs that it skipped because the program was already running on that CPU (Linux 5.12 on).
    pub missed: u64,
    /// Runs, where `kernel.bpf_stats_enabled` is 1.
    pub runs: u64,
    /// Nanoseconds in it, likewise.
    pub run_ns: u64,
}

/// One generation's counts.
#[derive(Debug)]
pub struct Drained {
    /// Which one.
    pub generation: u64,
    /// When it ended.
    pub until: Timestamp,
    /// Its flows, all CPUs together.
    pub flows: Vec<(FlowKey, FlowCount)>,
    /// Everything else, as of now.
    pub totals: Totals,
    /// The drain failed part-way; said once by the reader.
    pub error: Option<String>,
    /// Whoever asked for it is told when the counts are published.
    pub asked_by: Vec<oneshot::Sender<()>>,
}

/// What can be asked of the thread.
#[derive(Debug)]
enum Request {
    /// Fetch now.
    Flush(oneshot::Sender<()>),
    /// Fetch for the last time, then end.
    Stop,
}

/// A handle to the thread.
#[derive(Clone, Debug)]
pub struct Drainer(SyncSender<Request>);

impl Drainer {
    /// Starts the thread; `drained` gets every generation, the last one after [`Self::stop`], and is
    /// then closed.
    pub fn start(
        maps: Maps,
        programs: Vec<(String, OwnedFd)>,
        benign_reasons: Vec<u32>,
        events_per_cpu: u64,
        drained: mpsc::Sender<Drained>,
    ) -> std::io::Result<Self> {
        // Scrapes that ask at the same moment; more are refused and read what is there.
        let (sender, receiver) = sync_channel(32);
        let mut state = State {
            maps,
            programs,
            benign_reasons,
            events_per_cpu,
            generation: 0,
            seen: 0,
        };
        state.write_control().map_err(std::io::Error::other)?;
        std::thread::Builder::new()
            .name("drain".to_owned())
            .spawn(move || state.run(&receiver, &drained))?;
        Ok(Self(sender))
    }

    /// Fetches what was counted until now, and returns when it is published; false if the thread
    /// is too busy or gone.
    pub async fn flush(&self) -> bool {
        let (done, published) = oneshot::channel();
        self.0.try_send(Request::Flush(done)).is_ok() && published.await.is_ok()
    }

    /// Fetches for the last time and ends the thread.
    pub fn stop(&self) {
        // Full: the thread is alive and will find the channel closed when the last handle is gone.
        let _ = self.0.try_send(Request::Stop);
    }
}

struct State {
    maps: Maps,
    programs: Vec<(String, OwnedFd)>,
    /// Numbers of the reasons that are benign whatever the packet was.
    benign_reasons: Vec<u32>,
    events_per_cpu: u64,
    generation: u64,
    /// [`Cpu::counted`] and the answers at the last drain: nothing new, nothing to do.
    seen: u64,
}

impl State {
    fn run(mut self, requests: &Receiver<Request>, drained: &mpsc::Sender<Drained>) {
        loop {
            let mut asked_by = Vec::new();
            let mut stop = false;
            match requests.recv_timeout(PERIOD) {
                Ok(Request::Flush(done)) => asked_by.push(done),
                Ok(Request::Stop) | Err(RecvTimeoutError::Disconnected) => stop = true,
                Err(RecvTimeoutError::Timeout) => {}
            }
            while let Ok(request) = requests.try_recv() {
                match request {
                    Request::Flush(done) => asked_by.push(done),
                    Request::Stop => stop = true,
                }
            }
            let cpu = self.cpu();
            // Overflow and neighbours that are waited for come with `counted`; benign ones do not,
            // and are of interest only to who asks.
            let now = cpu.counted + cpu.answers_seen;
            if now != self.seen || !asked_by.is_empty() || stop {
                self.seen = now;
                let mut batch = self.drain();
                batch.asked_by = asked_by;
                if drained.blocking_send(batch).is_err() {
                    return;
                }
            }
            if stop {
                return;
            }
        }
    }

    fn drain(&mut self) -> Drained {
        let old = self.generation;
        self.generation += 1;
        let mut error = self.write_control().err();
        if let Err(e) = sys::wait_for_programs() {
            // Without membarrier (CONFIG_MEMBARRIER=n) a grace period is waited out by time; a
            // program runs for a microsecond.
            error.get_or_insert_with(|| format!("membarrier is not available: {e}"));
            std::thread::sleep(PERIOD);
        }
        let mut flows = Vec::new();
        let map = &self.maps.flow_fds[(old & 1) as usize];
        let cpus = aya::util::nr_cpus().unwrap_or(1);
        if let Err(e) = sys::drain_flows(map.as_fd(), cpus, BATCH_KEYS, |key, count| {
            flows.push((key, count));
        }) {
            error.get_or_insert_with(|| format!("cannot read the counts of generation {old}: {e}"));
        }
        Drained {
            generation: old,
            until: Timestamp::now(),
            flows,
            totals: self.totals(),
            error,
            asked_by: Vec::new(),
        }
    }

    fn write_control(&mut self) -> Result<(), String> {
        let control = Control {
            generation: self.generation,
            events_per_cpu: self.events_per_cpu,
        };
        self.maps
            .control
            .set(0, Plain(control), 0)
            .map_err(|e| format!("cannot switch the programs to the next generation: {e}"))
    }

    fn cpu(&self) -> Cpu {
        let mut sum = Cpu::default();
        let values: PerCpuValues<Plain<Cpu>> = match self.maps.cpu.get(&0, 0) {
            Ok(values) => values,
            Err(error) => {
                tracing::debug!(%error, "cannot read the CPUs' counts");
                return sum;
            }
        };
        for Plain(cpu) in values.iter() {
            sum.drops += cpu.drops;
            sum.counted += cpu.counted;
            sum.overflow += cpu.overflow;
            sum.unplaced += cpu.unplaced;
            sum.unplaced_told += cpu.unplaced_told;
            sum.ring_full += cpu.ring_full;
            sum.limited_flow += cpu.limited_flow;
            sum.limited_cpu += cpu.limited_cpu;
            sum.neighbour_waits += cpu.neighbour_waits;
            sum.answers_seen += cpu.answers_seen;
            sum.answers_lost += cpu.answers_lost;
            sum.missed += cpu.missed;
        }
        sum
    }

    fn totals(&self) -> Totals {
        let mut benign = Vec::new();
        for reason in &self.benign_reasons {
            if let Ok(values) = self.maps.benign.get(reason, 0) {
                let packets = values.iter().sum();
                if packets > 0 {
                    benign.push((*reason, packets));
                }
            }
        }
        let mut overflow: HashMap<OverflowKey, OverflowCount> = HashMap::new();
        for (Plain(key), values) in self.maps.overflow.iter().flatten() {
            let sum = overflow.entry(key).or_default();
            for Plain(count) in values.iter() {
                sum.packets += count.packets;
                sum.told += count.told;
            }
        }
        let programs = self
            .programs
            .iter()
            .map(|(name, fd)| {
                let field = |field| load::fd_info(fd, field).unwrap_or(0);
                ProgramTotals {
                    name: name.clone(),
                    missed: field("recursion_misses"),
                    runs: field("run_cnt"),
                    run_ns: field("run_time_ns"),
                }
            })
            .collect();
        Totals {
            cpu: self.cpu(),
            benign,
            overflow: overflow.into_iter().collect(),
            programs,
        }
    }
}
