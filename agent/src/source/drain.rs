//! Fetching the counts: flip the generation, wait until no program writes to the old one, drain it.
//!
//! A thread of its own, because waiting for the programs takes 10 to 100 ms and must not hold up
//! the reading of events.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aya::maps::PerCpuValues;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};
use whydrop_ebpf::attempt::{AttemptCpu, DETAILS, TALLIES, Tally, TallyKey};
use whydrop_ebpf::{Control, Cpu, FlowCount, FlowKey, OverflowCount, OverflowKey, PerCpu};

use super::budget::Budget;
use super::load::{self, Maps};
use super::sys::{self, Plain};
use crate::sync::lock;

/// How long a generation lasts while something is dropped. Each flow that goes on is a new key in
/// each generation, which costs several times what adding to it does; a scrape need not wait for
/// the end.
pub const GENERATION: Duration = Duration::from_secs(1);

/// How often the programs' own numbers are looked at: whether there is anything to fetch, and
/// whether the map is filling. Also the window of the limits on events.
const WINDOW: Duration = Duration::from_millis(100);

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
    /// What became of attempts for whose sender there was no room: [`TallyKey::what`],
    /// [`TallyKey::detail`] and the sum; only those above zero.
    pub tallies: Vec<(u8, u8, Tally)>,
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
    /// When it ended: later packets are the next one's.
    pub until: Timestamp,
    /// Its flows, all CPUs together.
    pub flows: Vec<(FlowKey, FlowCount)>,
    /// What became of attempts in it.
    pub tallies: Vec<(TallyKey, Tally)>,
    /// Everything else, as of now.
    pub totals: Totals,
    /// The drain failed part-way; said once by the reader.
    pub error: Option<String>,
    /// Whoever asked for it is told when the counts are published.
    pub asked_by: Vec<oneshot::Sender<()>>,
}

/// A handle to the thread.
#[derive(Clone, Debug)]
pub struct Drainer {
    requests: SyncSender<oneshot::Sender<()>>,
    stop: Arc<AtomicBool>,
}

/// The attached programs: their names and file descriptors. Some are attached later.
pub type Programs = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// What the thread is started with.
pub struct Setup {
    /// The counts.
    pub maps: Maps,
    /// File descriptors of the attached programs, by name.
    pub programs: Programs,
    /// Numbers of the reasons that are benign whatever the packet was.
    pub benign_reasons: Vec<u32>,
    /// Sizes.
    pub budget: Budget,
}

impl Drainer {
    /// Starts the thread; `drained` gets every generation, the last one after [`Self::stop`], and is
    /// then closed.
    ///
    /// # Errors
    /// The thread cannot be started, or the programs cannot be switched on.
    pub fn start(setup: Setup, drained: mpsc::Sender<Drained>) -> std::io::Result<Self> {
        // Scrapes that ask at the same moment; more are refused and read what is there.
        let (requests, receiver) = sync_channel(32);
        let stop = Arc::new(AtomicBool::new(false));
        let mut state = State {
            setup,
            generation: 0,
            window: 0,
            seen: 0,
            inserted: 0,
            fetched: Instant::now(),
            totals: Totals::default(),
            waits_by_time: false,
        };
        state.write_control().map_err(std::io::Error::other)?;
        let stopped = stop.clone();
        std::thread::Builder::new()
            .name("drain".to_owned())
            .spawn(move || state.run(&receiver, &stopped, &drained))?;
        Ok(Self { requests, stop })
    }

    /// Fetches what was counted until now, and returns when it is published; false if the thread
    /// is too busy or gone.
    pub async fn flush(&self) -> bool {
        let (done, published) = oneshot::channel();
        self.requests.try_send(done).is_ok() && published.await.is_ok()
    }

    /// Fetches for the last time and ends the thread, within [`WINDOW`].
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct State {
    setup: Setup,
    generation: u64,
    window: u32,
    /// What [`seen`] was at the last drain: nothing new, nothing to do.
    seen: u64,
    /// [`Cpu::inserted`] at the last drain.
    inserted: u64,
    fetched: Instant,
    /// The last that could be read.
    totals: Totals,
    /// `membarrier` does not work here, which was said.
    waits_by_time: bool,
}

impl State {
    fn run(
        mut self,
        requests: &Receiver<oneshot::Sender<()>>,
        stop: &AtomicBool,
        drained: &mpsc::Sender<Drained>,
    ) {
        loop {
            let first = requests.recv_timeout(WINDOW);
            let stop = stop.load(Ordering::Relaxed)
                || matches!(first, Err(RecvTimeoutError::Disconnected));
            let asked_by: Vec<_> = first.into_iter().chain(requests.try_iter()).collect();
            let mut error = None;
            let cpu = self.cpu().unwrap_or_else(|e| {
                error = Some(e);
                self.totals.cpu
            });
            // Benign drops are of interest only to who asks.
            let is_new = seen(&cpu) != self.seen;
            let is_old = self.fetched.elapsed() >= GENERATION;
            let fills = cpu.inserted - self.inserted.min(cpu.inserted)
                > u64::from(self.setup.budget.flows / 2);
            if is_new && (is_old || fills) || !asked_by.is_empty() || stop {
                self.seen = seen(&cpu);
                self.inserted = cpu.inserted;
                let mut batch = self.drain();
                batch.error = batch.error.or(error);
                batch.asked_by = asked_by;
                if drained.blocking_send(batch).is_err() {
                    return;
                }
            } else if is_new {
                self.window += 1;
                if let Err(error) = self.write_control() {
                    tracing::debug!(%error, "the limits on events do not begin anew");
                }
            }
            if stop {
                return;
            }
        }
    }

    fn drain(&mut self) -> Drained {
        let old = self.generation;
        let mut drained = Drained {
            generation: old,
            until: Timestamp::now(),
            flows: Vec::new(),
            tallies: Vec::new(),
            totals: Totals::default(),
            error: None,
            asked_by: Vec::new(),
        };
        self.generation += 1;
        self.window += 1;
        if let Err(e) = self.write_control() {
            // The programs still write to the old one: it is drained another time.
            self.generation = old;
            drained.error = Some(e);
        } else {
            self.wait_for_programs();
            let map = &self.setup.maps.flows[(old & 1) as usize];
            let flows = &mut drained.flows;
            let cpus = self.setup.budget.cpus;
            let take = sys::Batch::Take;
            let result = sys::batch(map.as_fd(), take, cpus, BATCH_KEYS, |key, counts| {
                let mut sum = FlowCount::default();
                for count in counts {
                    let count: FlowCount = count;
                    sum.packets += count.packets;
                    sum.told += count.told;
                    sum.answers += count.answers;
                }
                flows.push((key, sum));
            });
            let map = &self.setup.maps.tallies[(old & 1) as usize];
            let tallies = &mut drained.tallies;
            // Not per CPU: one value a key.
            let tallied = sys::batch(map.as_fd(), take, 1, BATCH_KEYS, |key, values| {
                tallies.push((key, sum(values)));
            });
            let result = result.and(tallied);
            if let Err(e) = result {
                drained.error = Some(format!("cannot read the counts of generation {old}: {e}"));
            }
        }
        self.fetched = Instant::now();
        match self.read_totals() {
            Ok(totals) => self.totals = totals,
            Err(e) => drained.error = Some(e),
        }
        drained.totals = self.totals.clone();
        drained
    }

    /// Returns when no program that saw the old generation can still be running.
    fn wait_for_programs(&mut self) {
        if !self.waits_by_time {
            let Err(error) = sys::wait_for_programs() else {
                return;
            };
            // Not with nohz_full, or without CONFIG_MEMBARRIER.
            tracing::warn!(
                %error,
                "membarrier does not work here; counts are fetched 100 ms after each switch, \
                 and a program that was interrupted for longer can lose one"
            );
            self.waits_by_time = true;
        }
        std::thread::sleep(WINDOW);
    }

    fn write_control(&mut self) -> Result<(), String> {
        let control = Control {
            generation: self.generation,
            window: self.window,
            events_per_cpu: self.setup.budget.events_per_cpu(),
        };
        self.setup
            .maps
            .control
            .set(0, Plain(control), 0)
            .map_err(|e| format!("cannot switch the programs to the next generation: {e}"))
    }

    fn cpu(&self) -> Result<Cpu, String> {
        let mut sum = Cpu::default();
        let values: PerCpuValues<Plain<PerCpu>> = self
            .setup
            .maps
            .cpu
            .get(&0, 0)
            .map_err(|e| format!("cannot read the CPUs' own counts: {e}"))?;
        for Plain(PerCpu { cpu, .. }) in values.iter() {
            sum.counted += cpu.counted;
            sum.inserted += cpu.inserted;
            sum.overflow += cpu.overflow;
            sum.unplaced += cpu.unplaced;
            sum.unplaced_told += cpu.unplaced_told;
            sum.ring_full += cpu.ring_full;
            sum.limited_flow += cpu.limited_flow;
            sum.limited_cpu += cpu.limited_cpu;
            sum.neighbour_waits += cpu.neighbour_waits;
            sum.answers_counted += cpu.answers_counted;
            sum.answers_lost += cpu.answers_lost;
            sum.missed += cpu.missed;
            add_attempts(&mut sum.attempts, &cpu.attempts);
        }
        Ok(sum)
    }

    /// All or nothing: a sum of which a part is missing would seem to go backwards.
    fn read_totals(&self) -> Result<Totals, String> {
        let maps = &self.setup.maps;
        let mut benign = Vec::new();
        for reason in &self.setup.benign_reasons {
            let values = maps.benign.get(reason, 0);
            let values =
                values.map_err(|e| format!("cannot read the counts of benign drops: {e}"))?;
            let packets = values.iter().sum();
            if packets > 0 {
                benign.push((*reason, packets));
            }
        }
        let mut overflow: HashMap<OverflowKey, OverflowCount> = HashMap::new();
        for entry in maps.overflow.iter() {
            let (Plain(key), values) =
                entry.map_err(|e| format!("cannot read the counts of drops without flow: {e}"))?;
            let sum = overflow.entry(key).or_default();
            for Plain(count) in values.iter() {
                sum.untold += count.untold;
                sum.told += count.told;
            }
        }
        let mut tallies = Vec::new();
        for index in 0..(TALLIES * DETAILS) as u32 {
            let values = maps.tallies_other.get(&index, 0);
            let values = values
                .map_err(|e| format!("cannot read the counts of attempts without sender: {e}"))?;
            let sum = sum(values.iter().map(|Plain(tally)| *tally));
            if sum != Tally::default() {
                let (what, detail) = (index / DETAILS as u32, index % DETAILS as u32);
                tallies.push((what as u8, detail as u8, sum));
            }
        }
        let programs = lock(&self.setup.programs)
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
        Ok(Totals {
            cpu: self.cpu()?,
            benign,
            overflow: overflow.into_iter().collect(),
            tallies,
            programs,
        })
    }
}

/// Changes whenever there is something new to fetch.
fn seen(cpu: &Cpu) -> u64 {
    cpu.counted + cpu.answers_counted + cpu.attempts.tallied
}

fn sum(tallies: impl Iterator<Item = Tally>) -> Tally {
    tallies.fold(Tally::default(), |a, b| Tally {
        count: a.count.wrapping_add(b.count),
        sum_ns: a.sum_ns.wrapping_add(b.sum_ns),
    })
}

/// Adds one CPU's counts about attempts to a sum.
pub fn add_attempts(sum: &mut AttemptCpu, cpu: &AttemptCpu) {
    sum.connects += cpu.connects;
    sum.connects_ended += cpu.connects_ended;
    sum.connects_lost += cpu.connects_lost;
    sum.ended += cpu.ended;
    sum.ended_lost += cpu.ended_lost;
    sum.queries += cpu.queries;
    sum.queries_lost += cpu.queries_lost;
    sum.tallied += cpu.tallied;
    sum.died_lost += cpu.died_lost;
}
