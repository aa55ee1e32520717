//! Looking for what nobody answered: a thread that goes through the kernel's maps of waiting connects
//! and DNS queries when one of them is due.
//!
//! Each is found exactly once. A look begins at a time T and tells of what was due between the last
//! look's time and T; what was due before was told by that one. What ends late leaves the map, but the
//! programs put it into a second one first, unless it was due before the last look; that one is read
//! after the first, so nothing slips through between them.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use whydrop_ebpf::attempt::{
    AttemptCpu, ClientKey, Connect, END_ABANDONED, END_LATE, EndedKey, Query, QueryKey, Swept,
};

use super::drain::add_attempts;
use super::load::{AttemptMaps, fd_info};
use super::sys::{self, Batch, Plain};

/// How often the programs' numbers are looked at.
const TICK: Duration = Duration::from_millis(100);
/// Between two looks, so that a flood of them does not cost more than the attempts do.
const MIN_INTERVAL_NS: u64 = 200_000_000;
/// Keys in one batch call: 400 KiB of queries.
const BATCH_KEYS: usize = 1024;
/// Attempts in one message to the pipeline.
const CHUNK: usize = 1024;
/// How long a query that was told of is kept, so that its resends are known as such: resolvers resend
/// after 5 s at the latest by default, some after twice that.
const KEEP_QUERIES_NS: u64 = 30_000_000_000;
/// The same for a resend from another port, which only its id and message tell from a new query. Ids are
/// used again by chance, so no longer than twice the longest default: of 100 queries a second for one
/// name, all unanswered, 1.5% have the id of one that was told of in 10 s.
const KEEP_IDS_NS: u64 = 10_000_000_000;
/// A SYN is resent after 120 s at the latest (TCP_RTO_MAX). What sent none for longer is no socket any
/// more: the program was not run when it ended.
const STALE_NS: u64 = 200_000_000_000;
/// DNS ids that were told of, of clients that resend from another port; some 60 bytes each.
const MAX_TOLD: usize = 65_536;

/// An attempt that nobody answered in time, as the programs noted it.
#[derive(Clone, Debug)]
pub enum Unanswered {
    /// A TCP connect.
    Connect(Connect),
    /// A DNS query.
    Query(QueryKey, Box<Query>),
}

/// What one look found.
#[derive(Debug, Default)]
pub struct Found {
    /// When it looked, `CLOCK_BOOTTIME` in nanoseconds.
    pub boot_ns: u64,
    /// What is due.
    pub unanswered: Vec<Unanswered>,
    /// Connects that were given up before; nobody is told of them, but other sources must know that
    /// they are not theirs.
    pub abandoned: Vec<Connect>,
    /// The programs' numbers.
    pub counts: AttemptCpu,
    /// Connects that were not told of because it is not sure that they still wait.
    pub doubtful: u64,
    /// Why a look failed.
    pub error: Option<String>,
}

/// What the thread is started with.
pub struct Setup {
    /// What waits.
    pub maps: AttemptMaps,
    /// The program that sees connects begin and end, to know of runs that the kernel skipped.
    pub state_program: Option<OwnedFd>,
    /// See `--syn-timeout`.
    pub syn_timeout: Duration,
    /// See `--dns-timeout`.
    pub dns_timeout: Duration,
    /// Queries that fit into their map.
    pub queries: u32,
    /// Whether answers to DNS queries are seen; it can begin later.
    pub is_dns_watched: Arc<AtomicBool>,
}

/// Starts the thread; it ends when `stop` is set, or when nobody receives any more.
///
/// # Errors
/// The thread cannot be started, or the programs cannot be told to note queries.
pub fn start(
    setup: Setup,
    stop: Arc<AtomicBool>,
    found: mpsc::Sender<Found>,
) -> std::io::Result<()> {
    let mut sweeper = Sweeper::new(setup);
    sweeper.write_swept().map_err(std::io::Error::other)?;
    std::thread::Builder::new()
        .name("attempts".to_owned())
        .spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(sweeper.pause(sys::boot_ns()));
                for chunk in sweeper.look(sys::boot_ns()) {
                    if found.blocking_send(chunk).is_err() {
                        return;
                    }
                }
            }
        })
        .map(drop)
}

struct Sweeper {
    setup: Setup,
    syn_timeout_ns: u64,
    dns_timeout_ns: u64,
    swept: Swept,
    /// When the next look is due.
    connects_due_ns: u64,
    queries_due_ns: u64,
    /// The numbers at the last look.
    counts: AttemptCpu,
    /// How many connects had ended when those were last fetched.
    ended_seen: u64,
    forgotten: u64,
    /// DNS ids that were told of, and when they were last seen waiting.
    told: HashMap<u64, u64>,
    /// Skipped runs of the program that sees connects end, and when their number last grew.
    missed: u64,
    missed_at_ns: u64,
}

impl Sweeper {
    fn new(setup: Setup) -> Self {
        let nanoseconds = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        Self {
            syn_timeout_ns: nanoseconds(setup.syn_timeout),
            dns_timeout_ns: nanoseconds(setup.dns_timeout),
            swept: Swept::default(),
            setup,
            connects_due_ns: 0,
            queries_due_ns: 0,
            counts: AttemptCpu::default(),
            ended_seen: 0,
            forgotten: 0,
            told: HashMap::new(),
            missed: 0,
            missed_at_ns: 0,
        }
    }

    /// How long nothing can be due; at most a tick, since what ends is seen by the numbers alone.
    fn pause(&self, now: u64) -> Duration {
        let due = [
            self.connects_due_ns
                .max(self.swept.connects_ns + MIN_INTERVAL_NS),
            self.queries_due_ns
                .max(self.swept.queries_ns + MIN_INTERVAL_NS),
        ];
        let next = due.into_iter().filter(|due| *due > now).min();
        next.map_or(TICK, |due| Duration::from_nanos(due - now).min(TICK))
    }

    /// What is due at `now`, in messages of a bounded size; nothing, if there is nothing to tell.
    fn look(&mut self, now: u64) -> Vec<Found> {
        let mut found = Found {
            boot_ns: now,
            ..Found::default()
        };
        if self.swept.is_dns_watched == 0 && self.setup.is_dns_watched.load(Ordering::Relaxed) {
            found.error = self.write_swept().err();
        }
        match self.counts() {
            Ok(counts) => {
                let result = self.look_at_connects(now, &counts, &mut found);
                let result = result.and(self.look_at_queries(now, &counts, &mut found));
                let is_news = counts.connects_lost != self.counts.connects_lost
                    || counts.queries_lost != self.counts.queries_lost
                    || counts.ended_lost != self.counts.ended_lost;
                self.counts = counts;
                found.counts = counts;
                found.error = found.error.or(result.err());
                if found.unanswered.is_empty()
                    && found.abandoned.is_empty()
                    && found.error.is_none()
                    && found.doubtful == 0
                    && !is_news
                {
                    return Vec::new();
                }
            }
            Err(error) => found.error = Some(error),
        }
        split(found)
    }

    fn look_at_connects(
        &mut self,
        now: u64,
        counts: &AttemptCpu,
        found: &mut Found,
    ) -> Result<(), String> {
        let last = self.swept.connects_ns;
        let waits = counts.connects > counts.connects_ended;
        let has_ended = counts.ended != self.ended_seen;
        if !(has_ended || waits && now >= self.connects_due_ns) || now < last + MIN_INTERVAL_NS {
            return Ok(());
        }
        self.note_missed(now);
        let timeout = self.syn_timeout_ns;
        let mut next = now + timeout;
        let mut due = Vec::new();
        let mut stale = Vec::new();
        let (read, map) = (Batch::Read, self.setup.maps.connects.as_fd());
        sys::batch(map, read, 1, BATCH_KEYS, |socket: u64, values| {
            for connect in values {
                let connect: Connect = connect;
                let due_ns = connect.start_ns.saturating_add(timeout);
                if due_ns > now {
                    next = next.min(due_ns);
                } else if due_ns > last && !was_told(connect.told_ns, due_ns) {
                    due.push((socket, connect));
                }
                if now.saturating_sub(connect.start_ns.max(connect.sent_ns)) > STALE_NS.max(timeout)
                {
                    stale.push(socket);
                }
            }
        })
        .map_err(|e| format!("cannot read which connects wait: {e}"))?;
        // Any of them can end before the other map is read.
        let key = |(socket, c): &(u64, Connect)| EndedKey {
            socket: *socket,
            start_ns: c.start_ns,
        };
        let known: HashSet<EndedKey> = due.iter().map(key).collect();
        let missed_at_ns = self.missed_at_ns;
        for (_, connect) in due {
            // The program may not have seen it end. One that still waits resends its SYN.
            let is_sure =
                connect.start_ns > missed_at_ns || connect.sent != 1 || connect.drop.packets != 0;
            if is_sure {
                found.unanswered.push(Unanswered::Connect(connect));
            } else {
                found.doubtful += 1;
            }
        }
        let (take, map) = (Batch::Take, self.setup.maps.ended.as_fd());
        sys::batch(map, take, 1, BATCH_KEYS, |key: EndedKey, values| {
            for connect in values {
                let connect: Connect = connect;
                match connect.end {
                    END_ABANDONED => found.abandoned.push(connect),
                    END_LATE
                        if connect.start_ns.saturating_add(timeout) <= last
                            || known.contains(&key) => {}
                    _ => found.unanswered.push(Unanswered::Connect(connect)),
                }
            }
        })
        .map_err(|e| format!("cannot read which connects ended: {e}"))?;
        for socket in stale {
            // It may have ended meanwhile.
            let _ = sys::delete(self.setup.maps.connects.as_fd(), &socket);
        }
        self.ended_seen = counts.ended;
        self.connects_due_ns = next;
        self.swept.connects_ns = now;
        self.write_swept()
    }

    /// Sees whether the kernel skipped a run of the program that sees connects end.
    fn note_missed(&mut self, now: u64) {
        let program = self.setup.state_program.as_ref();
        let missed = program.and_then(|fd| fd_info(fd, "recursion_misses"));
        let missed = missed.unwrap_or(self.missed);
        if missed != self.missed {
            self.missed = missed;
            self.missed_at_ns = now;
        }
    }

    fn look_at_queries(
        &mut self,
        now: u64,
        counts: &AttemptCpu,
        found: &mut Found,
    ) -> Result<(), String> {
        let last = self.swept.queries_ns;
        // Nothing to look at before the first query; later the map may hold what was told of.
        if counts.queries == 0 || now < self.queries_due_ns || now < last + MIN_INTERVAL_NS {
            return Ok(());
        }
        let timeout = self.dns_timeout_ns;
        let mut next = now + timeout;
        let mut over = Vec::new();
        let mut old = Vec::new();
        let mut due = Vec::new();
        let mut waiting = 0usize;
        let (read, map) = (Batch::Read, self.setup.maps.queries.as_fd());
        sys::batch(map, read, 1, BATCH_KEYS, |key: QueryKey, values| {
            for query in values {
                let query: Query = query;
                waiting += 1;
                let due_ns = query.start_ns.saturating_add(timeout);
                if query.answered_ns != 0 {
                    over.push(key);
                } else if due_ns <= last {
                    old.push((key, query.sent_ns));
                }
                if due_ns > now && query.answered_ns == 0 {
                    next = next.min(due_ns);
                } else if due_ns > last {
                    due.push(Unanswered::Query(key, Box::new(query)));
                }
            }
        })
        .map_err(|e| format!("cannot read which DNS queries wait: {e}"))?;
        // What fails from here on must not make the next look tell of them again.
        found.unanswered.extend(due);
        self.leave_out_refused(found);
        self.leave_out_resends(now, found);
        self.queries_due_ns = next;
        self.swept.queries_ns = now;
        // Room for what comes is worth more than to know resends.
        let is_crowded = waiting > self.setup.queries as usize / 2;
        let old = old
            .into_iter()
            .filter(|(_, sent_ns)| is_crowded || now.saturating_sub(*sent_ns) > KEEP_QUERIES_NS)
            .map(|(key, _)| key);
        let mut forgotten = 0;
        for key in over.into_iter().chain(old) {
            // Unless the programs took it out meanwhile.
            if sys::delete(self.setup.maps.queries.as_fd(), &key).is_ok() {
                forgotten += 1;
            }
        }
        if forgotten > 0 {
            self.forgotten += forgotten;
            let set = self.setup.maps.forgotten.set(0, self.forgotten, 0);
            set.map_err(|e| format!("cannot say how many DNS queries were forgotten: {e}"))?;
        }
        self.write_swept()
    }

    /// Takes out queries whose sender was told: by an answer to each of its packets that this node
    /// dropped, or by an error of its socket.
    fn leave_out_refused(&self, found: &mut Found) {
        let timeout = self.dns_timeout_ns;
        found.unanswered.retain(|unanswered| {
            let Unanswered::Query(key, query) = unanswered else {
                return true;
            };
            if query.drop.told != 0 && u32::from(query.drop.told) >= query.sent {
                return false;
            }
            let client = ClientKey {
                client: key.client,
                port: key.port,
                pad: 0,
            };
            let told_ns = self.setup.maps.clients_told.get(&Plain(client), 0);
            let due_ns = query.start_ns.saturating_add(timeout);
            !told_ns.is_ok_and(|told_ns| told_ns >= query.start_ns && was_told(told_ns, due_ns))
        });
    }

    /// Takes out queries that were told of before and were sent again from another port: the next
    /// server is asked from a new socket, with the same id.
    fn leave_out_resends(&mut self, now: u64, found: &mut Found) {
        self.told
            .retain(|_, seen_ns| now.saturating_sub(*seen_ns) < KEEP_IDS_NS);
        found.unanswered.retain(|unanswered| {
            let Unanswered::Query(key, query) = unanswered else {
                return true;
            };
            let mut hasher = DefaultHasher::new();
            (key.client, key.id, query.netns, query.message).hash(&mut hasher);
            let is_full = self.told.len() >= MAX_TOLD;
            match self.told.entry(hasher.finish()) {
                std::collections::hash_map::Entry::Occupied(mut known) => {
                    known.insert(now);
                    false
                }
                std::collections::hash_map::Entry::Vacant(new) => {
                    if !is_full {
                        new.insert(now);
                    }
                    true
                }
            }
        });
    }

    fn counts(&self) -> Result<AttemptCpu, String> {
        let mut sum = AttemptCpu::default();
        let values = self.setup.maps.counts.get(&0, 0);
        let values = values.map_err(|e| format!("cannot read the counts of attempts: {e}"))?;
        for Plain(own) in values.iter() {
            add_attempts(&mut sum, &own.cpu.attempts);
        }
        Ok(sum)
    }

    fn write_swept(&mut self) -> Result<(), String> {
        self.swept.is_dns_watched = self.setup.is_dns_watched.load(Ordering::Relaxed).into();
        let swept = Plain(self.swept);
        let set = self.setup.maps.swept.set(0, swept, 0);
        set.map_err(|e| format!("cannot tell the programs how far was looked: {e}"))
    }
}

/// Whether a sender was told that it was refused, before its attempt was due.
fn was_told(told_ns: u64, due_ns: u64) -> bool {
    told_ns != 0 && told_ns < due_ns
}

/// Divides what was found into messages of a bounded size; the first has the numbers.
fn split(mut found: Found) -> Vec<Found> {
    let mut chunks = Vec::new();
    let unanswered = std::mem::take(&mut found.unanswered);
    let mut rest = unanswered.into_iter().peekable();
    loop {
        let mut chunk = Found {
            boot_ns: found.boot_ns,
            counts: found.counts,
            unanswered: rest.by_ref().take(CHUNK).collect(),
            ..Found::default()
        };
        if chunks.is_empty() {
            chunk.abandoned = std::mem::take(&mut found.abandoned);
            chunk.doubtful = found.doubtful;
            chunk.error = found.error.take();
        }
        chunks.push(chunk);
        if rest.peek().is_none() {
            return chunks;
        }
    }
}
