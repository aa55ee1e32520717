//! The thread that follows entries without an answer.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::poll::{PollFd, PollFlags, poll};
use tokio::sync::mpsc;

use super::handle::{Shared, State, Totals};
use super::socket::{Dumped, Socket};
use super::stats::{entries, sysctl};
use super::tuple::{Tuple, Zone};
use super::waiting::{Due, Known, Times, Waiting, kind};
use super::wire::{Answer, Entry};
use super::{Destroy, Error, Setup};
use crate::cpu_time::cpu_time;
use crate::decode::Flow;
use crate::decode::attempt::Attempt;
use crate::event::{Kind, Protocol};
use crate::sync::lock;

/// Between the beginnings of two dumps, where they are cheap enough.
pub(super) const PERIOD: Duration = Duration::from_millis(500);
/// A dump may take this part of a core: the next one waits for so many times what the last took. It
/// walks the whole hash table in one go, with the softirqs of its CPU held off meanwhile.
const CORE_PARTS: u32 = 100;
/// How often the thread looks whether it is to end.
const STEP: Duration = Duration::from_millis(100);
/// Look-ups in one step, at 4 us: past it, attempts wait for the next dump, which tells of all.
const LOOK_UPS: usize = 100;
/// Attempts decided in one step; the rest is decided in the next.
const DECIDED_AT_ONCE: usize = 4096;
/// Between two tries to ask a kernel that does not answer.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(30);
/// `NFNLGRP_CONNTRACK_DESTROY` (include/uapi/linux/netfilter/nfnetlink.h).
const DESTROY_GROUP: u32 = 3;

/// The sockets.
struct Link {
    asks: Socket,
    /// Events of destroyed entries.
    events: Option<Socket>,
}

/// What the thread has.
pub(super) struct Thread {
    setup: Setup,
    attempts: mpsc::Sender<Vec<Attempt>>,
    shared: Arc<Mutex<Shared>>,
    waiting: Waiting,
    link: Option<Link>,
    /// Dumps are asked for with a filter, which most kernels that do not know it ignore.
    asks_filtered: bool,
    /// The last dump was filtered by the kernel.
    filtered: bool,
    times: Times,
    next_dump: Instant,
    /// Not before this, whatever happens: what the last one took has its price.
    may_dump: Instant,
    /// How long the next failure is waited out.
    retry: Duration,
    said_overrun: bool,
    totals: Totals,
}

impl Thread {
    /// One that has seen nothing yet.
    pub fn new(
        setup: Setup,
        attempts: mpsc::Sender<Vec<Attempt>>,
        shared: Arc<Mutex<Shared>>,
    ) -> Self {
        let totals = lock(&shared).totals;
        Self {
            times: Times {
                syn: setup.syn_timeout,
                dns: setup.dns_timeout,
                syn_sent_s: None,
                udp_s: None,
            },
            asks_filtered: setup.kernel_filter,
            setup,
            attempts,
            shared,
            waiting: Waiting::new(),
            link: None,
            filtered: true,
            next_dump: Instant::now(),
            may_dump: Instant::now(),
            retry: FIRST_RETRY,
            said_overrun: false,
            totals,
        }
    }

    /// Until it is told to stop, or nobody takes the attempts any more.
    pub fn run(mut self, stop: &AtomicBool) {
        // Also when it panics.
        let _ended = Ended(self.shared.clone());
        while !stop.load(Ordering::Relaxed) && !self.attempts.is_closed() {
            let next = match self.step() {
                Ok(()) => self.next_dump,
                Err(error) => self.failed(&error),
            };
            self.publish();
            self.wait_until(next, stop);
        }
    }

    /// One round: a dump if it is time, events, and what is due.
    fn step(&mut self) -> Result<(), Error> {
        if Instant::now() >= self.next_dump {
            let Some(entries) = entries(&self.setup.proc)? else {
                self.link = None;
                self.waiting = Waiting::new();
                self.set(State::Unused);
                self.next_dump = Instant::now() + PERIOD;
                return Ok(());
            };
            self.open()?;
            let lifetime_s = |name| sysctl(&self.setup.proc, name);
            self.times.syn_sent_s = lifetime_s("nf_conntrack_tcp_timeout_syn_sent");
            self.times.udp_s = lifetime_s("nf_conntrack_udp_timeout");
            if entries == 0 {
                // What has ended is told before it is missing.
                self.read_ends()?;
                self.waiting.nothing_there(Instant::now());
                self.next_dump = Instant::now() + PERIOD;
            } else {
                self.dump()?;
            }
            self.set(State::Works {
                filtered: self.filtered,
            });
            self.retry = FIRST_RETRY;
        }
        self.read_ends()?;
        self.decide_due()
    }

    /// Opens what is not open, and makes sure that the kernel answers.
    fn open(&mut self) -> Result<(), Error> {
        if self.link.is_some() {
            return Ok(());
        }
        let mut asks = Socket::open()?;
        let nobody = "0.0.0.0:0".parse().map_err(io::Error::other)?;
        asks.get(&Tuple::new(Protocol::TCP, nobody, nobody), Zone::default())?;
        let events = match self.setup.destroy {
            Destroy::Off => None,
            Destroy::On => {
                let events = Socket::open()?;
                events.subscribe(DESTROY_GROUP, self.setup.destroy_buffer_bytes)?;
                Some(events)
            }
        };
        self.link = Some(Link { asks, events });
        Ok(())
    }

    fn dump(&mut self) -> Result<(), Error> {
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        let (began, cpu) = (Instant::now(), cpu_time());
        let (waiting, times) = (&mut self.waiting, &self.times);
        waiting.begin_dump(began);
        let mut dump = |filtered| {
            link.asks.dump(filtered, |entry| {
                waiting.shown(&entry, times, Instant::now(), wall_ns());
            })
        };
        let dumped = match dump(self.asks_filtered) {
            // No kernel is known that refuses the filter, and none is worth failing for.
            Err(Error::Unsupported) if self.asks_filtered => {
                self.asks_filtered = false;
                dump(false)?
            }
            result => result?,
        };
        let took = cpu_time().saturating_sub(cpu);
        self.read_ends()?;
        self.waiting.end_dump(Instant::now());
        let Dumped {
            entries,
            replied,
            unreadable,
        } = dumped;
        // One or the other may be answered just while the kernel writes it down.
        self.filtered = self.asks_filtered && replied * 10 <= entries;
        self.totals.errors += unreadable;
        self.totals.dumps += 1;
        self.totals.dumped_entries += entries;
        self.totals.last_dump = took;
        let pause = self.totals.last_dump * CORE_PARTS;
        self.totals.period = PERIOD.max(pause);
        self.next_dump = began + self.totals.period;
        self.may_dump = began + pause;
        Ok(())
    }

    /// Reads what has ended, by all that tells of it.
    fn read_ends(&mut self) -> Result<(), Error> {
        self.read_died();
        self.read_events()
    }

    /// Reads what the programs have seen of entries that died unreplied: as many as their buffer
    /// holds.
    fn read_died(&mut self) {
        const MOST: usize = 512;
        let Some(next) = &mut self.setup.died else {
            return;
        };
        for died in std::iter::from_fn(next).take(MOST) {
            if let Some(entry) = Entry::died(&died) {
                let (now, wall_ns) = (Instant::now(), wall_ns());
                self.waiting.died(&entry, &self.times, now, wall_ns);
            }
        }
    }

    /// Reads what the kernel has told of destroyed entries.
    fn read_events(&mut self) -> Result<(), Error> {
        let Some(events) = self.link.as_mut().and_then(|link| link.events.as_mut()) else {
            return Ok(());
        };
        let (waiting, times) = (&mut self.waiting, &self.times);
        let (mut has_overrun, mut unreadable) = (false, 0);
        // A datagram is one event. As many as one full buffer holds, so that a flood of them does
        // not keep the thread from everything else.
        for _ in 0..self.setup.destroy_buffer_bytes / 512 + 1 {
            let result = events.receive(false, |received| match received.answer {
                Answer::Entry(entry) => {
                    waiting.destroyed(&entry, times, Instant::now(), wall_ns());
                }
                Answer::Unreadable => unreadable += 1,
                _ => {}
            });
            match result {
                Ok(true) => {}
                Ok(false) => break,
                Err(Error::Overrun) => {
                    self.totals.overruns += 1;
                    has_overrun = true;
                }
                Err(error) => return Err(error),
            }
        }
        self.totals.errors += unreadable;
        if has_overrun {
            // What died unseen is missing there.
            self.next_dump = self.next_dump.min(self.may_dump.max(Instant::now()));
            if !self.said_overrun {
                self.said_overrun = true;
                tracing::warn!(
                    "conntrack destroys entries faster than they are read: the kernel has dropped \
                     events, each time counted and followed by a dump; said once"
                );
            }
        }
        Ok(())
    }

    /// Hands on what waited long enough.
    fn decide_due(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        if self.waiting.next_due().is_none_or(|at| at > now) {
            return Ok(());
        }
        let attempts = self.attempts.clone();
        let Ok(permit) = attempts.try_reserve() else {
            return Ok(());
        };
        let mut reported = Vec::new();
        let mut look_ups = LOOK_UPS;
        let mut result = Ok(());
        for _ in 0..DECIDED_AT_ONCE {
            let Some(due) = self.waiting.due(now) else {
                break;
            };
            match self.decide(due, &mut look_ups) {
                Ok(Verdict::Report(due)) => reported.push(attempt(&due)),
                Ok(Verdict::Nothing) => {}
                Ok(Verdict::Later) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        if !reported.is_empty() {
            self.totals.reported += reported.len() as u64;
            permit.send(reported);
        }
        result
    }

    /// Decides one attempt, as late as possible: its socket may have been noted only now.
    fn decide(&mut self, mut due: Due, look_ups: &mut usize) -> Result<Verdict, Error> {
        let tuple = due.key.tuple;
        let now = Instant::now();
        if !(self.setup.is_foreign)(&tuple.source().ip()) {
            self.totals.not_foreign += 1;
            self.waiting.decide(&due.key, now);
            return Ok(Verdict::Nothing);
        }
        let (is_local, has_lost) = {
            let local = lock(&self.setup.local);
            (local.contains(&tuple, now), local.has_lost(now))
        };
        if is_local || has_lost {
            let total = if is_local {
                &mut self.totals.local
            } else {
                &mut self.totals.withheld
            };
            *total += 1;
            self.waiting.decide(&due.key, now);
            return Ok(Verdict::Nothing);
        }
        if due.now != Known::Waits {
            let Some(link) = &mut self.link else {
                return Ok(Verdict::Later);
            };
            let Some(left) = look_ups.checked_sub(1) else {
                return Ok(Verdict::Later);
            };
            *look_ups = left;
            let began = Instant::now();
            let found = link.asks.get(&tuple, due.key.zone)?;
            let is_unanswered = match &found {
                // A SYN that is sent again makes a new entry where the old one is gone; a query
                // from the same port is another one.
                Some(entry) => {
                    let is_it =
                        due.kind == Kind::Syn || entry.id == due.id || due.now == Known::Died;
                    is_it && kind(entry).is_some()
                }
                None => due.now == Known::Died,
            };
            if !is_unanswered {
                self.waiting.forget(&due.key);
                return Ok(Verdict::Nothing);
            }
            if let Some(entry) = found {
                due.sent = self
                    .waiting
                    .looked_up(&entry, began, Instant::now())
                    .unwrap_or(due.sent);
                due.real_destination = entry.real_destination;
            }
        }
        self.waiting.decide(&due.key, now);
        Ok(Verdict::Report(due))
    }

    /// Says it, once, and returns when to try again.
    fn failed(&mut self, error: &Error) -> Instant {
        self.totals.errors += 1;
        // A socket with half an answer in it is of no use.
        self.link = None;
        let delay = self.retry;
        self.retry = (delay * 2).min(LAST_RETRY);
        self.next_dump = Instant::now() + delay;
        let is_new = !matches!(lock(&self.shared).state, State::Failed(_));
        if is_new {
            tracing::warn!(%error, "conntrack does not answer; tried again until it does");
        } else {
            tracing::debug!(%error, ?delay, "conntrack does not answer");
        }
        self.set(State::Failed(error.to_string()));
        self.next_dump
    }

    fn set(&self, state: State) {
        let mut shared = lock(&self.shared);
        if matches!(shared.state, State::Failed(_)) && matches!(state, State::Works { .. }) {
            tracing::info!("conntrack answers again");
        }
        shared.state = state;
    }

    fn publish(&mut self) {
        self.totals.entries = self.waiting.len() as u64;
        self.totals.untracked = self.waiting.untracked();
        lock(&self.shared).totals = self.totals;
    }

    /// Sleeps until the next dump, the next attempt that is due, or an event.
    fn wait_until(&self, next_dump: Instant, stop: &AtomicBool) {
        let events = self.link.as_ref().and_then(|link| link.events.as_ref());
        let now = Instant::now();
        let until = match self.waiting.next_due() {
            Some(at) if at > now => at.min(next_dump),
            // Left over from this round.
            Some(_) => next_dump.min(now + STEP),
            None => next_dump,
        };
        while !stop.load(Ordering::Relaxed) {
            let left = until.saturating_duration_since(Instant::now()).min(STEP);
            if left.is_zero() {
                return;
            }
            let Some(events) = events else {
                std::thread::sleep(left);
                continue;
            };
            let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
            // Whole milliseconds, rounded up: STEP is far below what fits.
            let timeout = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
            match poll(&mut fds, timeout) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                // An error of the socket is what reading it says.
                _ => return,
            }
        }
    }
}

/// Says that the thread is gone, in whatever way.
struct Ended(Arc<Mutex<Shared>>);

impl Drop for Ended {
    fn drop(&mut self) {
        lock(&self.0).state = State::Ended;
    }
}

/// Nanoseconds of Unix time, as conntrack's timestamps are.
fn wall_ns() -> u64 {
    u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0)
}

/// Whether an attempt is handed on.
enum Verdict {
    /// It is.
    Report(Due),
    /// It is not.
    Nothing,
    /// Not decided yet: the next dump tells.
    Later,
}

fn attempt(due: &Due) -> Attempt {
    let waited = due.since.elapsed();
    let (source, asked, real) = (
        due.key.tuple.source(),
        due.key.tuple.destination(),
        due.real_destination,
    );
    Attempt {
        kind: due.kind,
        since: Timestamp::now()
            .checked_sub(waited)
            .unwrap_or(Timestamp::UNIX_EPOCH),
        waited,
        sent: due.sent,
        flow: Flow {
            source: source.ip(),
            source_port: Some(source.port()),
            destination: real.ip(),
            destination_port: Some(real.port()),
            protocol: due.key.tuple.protocol(),
            original_destination: (asked != real).then(|| (asked.ip(), asked.port())),
            icmp: None,
        },
        cgroup: None,
        netns: None,
        dns: None,
        drop: None,
    }
}
