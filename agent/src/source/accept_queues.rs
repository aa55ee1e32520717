//! Connections lost to a full accept queue, by network namespace.
//!
//! A SYN that finds the queue full is freed as if it had been taken (net/ipv4/tcp_input.c,
//! `tcp_conn_request`), so no `kfree_skb` tells of it. The kernel counts it in `ListenOverflows` and
//! `ListenDrops` of the namespace, which are read every second.
//!
//! What a namespace had lost when it was first seen is not ours, unless it was made while we
//! watched. What it loses between the last reading and its end is not seen.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::load::SourceStatus;
use super::namespaces::reader::Reader;
use super::namespaces::{Namespace, Namespaces, Scan, Scanner};
use crate::cpu_time::timed;
use crate::sync::lock;

/// Its name in `/v1/status` and `whydrop_source_up`.
pub const SOURCE: &str = "accept_queues";
const HOOK: &str = "/proc/PID/net/netstat";
const LOST_WITHOUT: &str = "connections lost to a full accept queue are not counted";

/// How often the counters are read, and how often namespaces are looked for. Where a node has so
/// many that a reading takes more than 1 % of a CPU, or a scan 0.25 %, less often.
const READ_EVERY: Duration = Duration::from_secs(1);
const READ_SHARE: u32 = 100;
const SCAN_EVERY: Duration = Duration::from_secs(3);
const SCAN_SHARE: u32 = 400;
/// The longest pause after failures.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// How long losses wait for their pod to be known: the address of a new one shows in its object a
/// second or two after its network is there.
const PATIENCE: Duration = Duration::from_secs(10);
/// Namespaces that are gone, with losses that wait.
const MAX_GONE: usize = 4_096;

/// How long it is remembered whether a listener has a backlog, and of how many.
const BACKLOG_AGE: Duration = Duration::from_millis(250);
const MAX_BACKLOGS: usize = 1_024;

/// Two counters of `TcpExt` in `/proc/net/netstat`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// `ListenOverflows`: the accept queue was full.
    pub overflows: u64,
    /// `ListenDrops`: a listener dropped a SYN or a final ACK for whatever reason, a full accept
    /// queue among them.
    pub drops: u64,
}

impl Counts {
    /// Takes them out of the text of `/proc/net/netstat` (net/ipv4/proc.c, `netstat_seq_show`):
    /// a line of names, then a line of values. `None` if they are not there.
    pub fn parse(netstat: &str) -> Option<Self> {
        let mut lines = netstat.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, values) = (lines.next()?, lines.next()?);
        let mut counts = [None; 2];
        let pairs = names
            .split_ascii_whitespace()
            .zip(values.split_ascii_whitespace());
        for (name, value) in pairs {
            match name {
                "ListenOverflows" => counts[0] = value.parse().ok(),
                "ListenDrops" => counts[1] = value.parse().ok(),
                _ => {}
            }
        }
        let [overflows, drops] = counts;
        Some(Self {
            overflows: overflows?,
            drops: drops?,
        })
    }

    /// By how much they grew. Smaller ones are of another namespace, from its start.
    fn since(self, before: Self) -> Self {
        if self.overflows < before.overflows || self.drops < before.drops {
            return self;
        }
        Self {
            overflows: self.overflows - before.overflows,
            drops: self.drops - before.drops,
        }
    }

    fn add(&mut self, more: Self) {
        self.overflows += more.overflows;
        self.drops += more.drops;
    }

    fn is_zero(self) -> bool {
        self == Self::default()
    }
}

/// What a namespace lost and has not been settled yet.
#[derive(Clone, Debug)]
struct Owed {
    namespace: Arc<Namespace>,
    counts: Counts,
    since: Instant,
}

#[derive(Debug)]
struct Queue {
    /// The last reading; before the first one of an old namespace there is none.
    last: Option<Counts>,
    /// When [`Counts::overflows`] was last seen to have grown.
    overflowed: Option<Instant>,
    owed: Owed,
}

#[derive(Debug)]
struct Queues {
    reader: Reader,
    text: String,
    /// By the namespace's serial number.
    queues: HashMap<u64, Queue>,
    /// Of namespaces that are gone.
    gone: Vec<Owed>,
    /// The node's own counters can be read.
    readable: Result<(), String>,
    /// Listeners that were looked at, when, and whether connections wait to be accepted.
    backlogs: HashMap<(IpAddr, u32, u16), (Instant, bool)>,
}

/// The accept queues of all namespaces.
#[derive(Debug)]
pub struct AcceptQueues {
    proc: PathBuf,
    namespaces: Namespaces,
    queues: Mutex<Queues>,
    /// Readings that failed, and looks at namespaces.
    errors: Arc<AtomicU64>,
}

/// What is to be done with losses that are handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// They are counted, or nobody's.
    Done,
    /// Their pod is not known yet: to be asked again, but not after the last time.
    Later,
}

impl AcceptQueues {
    /// Of namespaces that [`Self::run`] finds. `errors` counts readings that failed; a namespace
    /// that goes away meanwhile is none.
    pub fn new(errors: Arc<AtomicU64>) -> Self {
        Self::at(Path::new("/proc"), errors)
    }

    fn at(proc: &Path, errors: Arc<AtomicU64>) -> Self {
        Self {
            proc: proc.to_owned(),
            namespaces: Namespaces::default(),
            queues: Mutex::new(Queues {
                reader: Reader::new(proc),
                text: String::new(),
                queues: HashMap::new(),
                gone: Vec::new(),
                readable: Ok(()),
                backlogs: HashMap::new(),
            }),
            errors,
        }
    }

    /// The node's namespaces, as of the last scan.
    pub fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    /// The namespaces in which a sender in a namespace finds an address: a loopback is its own.
    fn places(&self, ip: IpAddr, sender_netns: u32) -> Vec<Arc<Namespace>> {
        if ip.is_loopback() {
            self.namespaces.get(sender_netns).into_iter().collect()
        } else {
            self.namespaces.with_address(ip)
        }
    }

    /// Whether a listener at an address lost connections to a full queue since a time, as far as
    /// can be told: the kernel counts by namespace, not by listener, and a loss of up to a second
    /// before that time may have been seen only after it. Reads the counters now, which takes
    /// some 30 µs; those of a namespace that is not known yet are not there.
    pub fn overflowed_since(&self, ip: IpAddr, sender_netns: u32, since: Instant) -> bool {
        self.places(ip, sender_netns).into_iter().any(|namespace| {
            let mut queues = lock(&self.queues);
            // What cannot be read now may have been read before.
            let _ = self.read(&mut queues, &namespace);
            let queue = queues.queues.get(&namespace.serial);
            queue.is_some_and(|queue| queue.overflowed.is_some_and(|at| at >= since))
        })
    }

    /// Whether a listener at an address and port has connections that wait to be accepted, now. With
    /// [`Self::overflowed_since`] it tells which of a pod's listeners is the one that lost some.
    ///
    /// Reads the namespace's `/proc/net/tcp` and `tcp6`, where a listener's `rx_queue` is its
    /// `sk_ack_backlog` (net/ipv4/tcp_ipv4.c, `get_tcp4_sock`); what it found is good for a quarter of a
    /// second, because many connections hang at once.
    pub fn has_backlog(&self, ip: IpAddr, sender_netns: u32, port: u16) -> bool {
        let now = Instant::now();
        let mut queues = lock(&self.queues);
        let Queues {
            reader,
            text,
            backlogs,
            ..
        } = &mut *queues;
        if backlogs.len() >= MAX_BACKLOGS {
            backlogs.clear();
        }
        let place = (ip, if ip.is_loopback() { sender_netns } else { 0 }, port);
        let known = backlogs.get(&place);
        if let Some((at, backlog)) = known
            && now.duration_since(*at) < BACKLOG_AGE
        {
            return *backlog;
        }
        let namespaces = self.places(ip, sender_netns);
        let backlog = namespaces.iter().any(|namespace| {
            // An IPv6 listener takes IPv4 as well.
            ["tcp", "tcp6"].into_iter().any(|file| {
                matches!(reader.read(namespace, file, text), Ok(true))
                    && listens_in_vain(text, port)
            })
        });
        backlogs.insert(place, (now, backlog));
        backlog
    }

    /// Looks for namespaces and reads their counters until the other end of `stop` is dropped or
    /// sends.
    ///
    /// `settle` gets what each namespace lost. It may ask to be asked again while the pod is not
    /// known; the third argument says that it is the last time. `status` is called when something
    /// about the source changed.
    pub fn run(
        &self,
        stop: &Receiver<()>,
        mut settle: impl FnMut(&Namespace, Counts, bool) -> Settled,
        mut status: impl FnMut(SourceStatus),
    ) {
        let mut scanner = Scanner::new(&self.proc);
        let mut scanned = Err(String::new());
        let mut scan_at = Instant::now();
        let mut said: Option<SourceStatus> = None;
        let mut failures = 0;
        loop {
            if scanned.is_err() || Instant::now() >= scan_at {
                let (result, took) = timed(|| self.scan(&mut scanner));
                scanned = result;
                scan_at = Instant::now() + SCAN_EVERY.max(took * SCAN_SHARE);
            }
            let ((), took) = timed(|| {
                if scanned.is_ok() {
                    self.read_all();
                }
            });
            self.settle(Instant::now(), &mut settle);
            let now = self.status(&scanned);
            failures = match &now {
                Ok(_) => 0,
                Err(_) => failures + 1,
            };
            let now = status_of(&now);
            if said.as_ref() != Some(&now) {
                said = Some(now.clone());
                status(now);
            }
            let pause = pause_after(failures).max(took * READ_SHARE);
            if !matches!(stop.recv_timeout(pause), Err(RecvTimeoutError::Timeout)) {
                return;
            }
        }
    }

    fn scan(&self, scanner: &mut Scanner) -> Result<Scan, String> {
        let scan = scanner.scan(&self.namespaces);
        if let Ok(scan) = &scan {
            self.errors.fetch_add(scan.errors as u64, Ordering::Relaxed);
        }
        scan.map_err(|error| format!("cannot read /proc: {error}"))
    }

    /// Reads every namespace's counters; those of namespaces that are gone are kept until settled.
    fn read_all(&self) {
        let all = self.namespaces.all();
        let is_there = |owed: &Owed| {
            let now = all.get(&owed.namespace.id);
            now.is_some_and(|now| now.serial == owed.namespace.serial)
        };
        {
            let mut queues = lock(&self.queues);
            let gone = queues.queues.extract_if(|_, queue| !is_there(&queue.owed));
            let owed = gone.map(|(_, queue)| queue.owed);
            let owed: Vec<_> = owed.filter(|owed| !owed.counts.is_zero()).collect();
            queues.gone.extend(owed);
        }
        for namespace in all.values() {
            // Each on its own, so that whoever asks for one waits for one.
            let mut queues = lock(&self.queues);
            let result = self.read(&mut queues, namespace);
            if namespace.host {
                queues.readable = result;
            }
        }
    }

    /// Reads a namespace's counters.
    fn read(&self, queues: &mut Queues, namespace: &Arc<Namespace>) -> Result<(), String> {
        let Queues { reader, text, .. } = queues;
        let mut refused = false;
        let counts = match reader.read(namespace, "netstat", text) {
            Ok(false) => return Ok(()),
            Ok(true) => Counts::parse(text)
                .ok_or_else(|| format!("no ListenOverflows and ListenDrops in {HOOK}")),
            Err(error) => {
                // Of what may not be entered the scan has told.
                refused = error.kind() == io::ErrorKind::PermissionDenied;
                Err(format!("cannot read {HOOK}: {error}"))
            }
        };
        match counts {
            Ok(counts) => queues.note(namespace, counts, Instant::now()),
            Err(error) => {
                if !refused {
                    tracing::debug!(netns = namespace.id, error, "accept queues");
                    self.errors.fetch_add(1, Ordering::Relaxed);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn settle(&self, now: Instant, settle: &mut impl FnMut(&Namespace, Counts, bool) -> Settled) {
        // Taken out first: naming a pod takes the index's lock, which must not be waited for
        // while this one is held.
        let mut queues = lock(&self.queues);
        let too_many = queues.gone.len() > MAX_GONE;
        let mut due = std::mem::take(&mut queues.gone);
        let lasting = due.len();
        for queue in queues.queues.values_mut() {
            if !queue.owed.counts.is_zero() {
                due.push(queue.owed.clone());
                queue.owed.counts = Counts::default();
            }
        }
        drop(queues);
        let mut kept = Vec::new();
        for (n, owed) in due.into_iter().enumerate() {
            let waited = now.saturating_duration_since(owed.since);
            let last = waited >= PATIENCE || too_many;
            if settle(&owed.namespace, owed.counts, last) == Settled::Later && !last {
                kept.push((n < lasting, owed));
            }
        }
        let mut queues = lock(&self.queues);
        for (is_gone, owed) in kept {
            match queues.queues.get_mut(&owed.namespace.serial) {
                Some(queue) if !is_gone => {
                    queue.owed.counts.add(owed.counts);
                    queue.owed.since = owed.since;
                }
                _ => queues.gone.push(owed),
            }
        }
    }

    /// What the last scan saw, or why the counters cannot be read.
    fn status(&self, scanned: &Result<Scan, String>) -> Result<Scan, String> {
        let scan = scanned.clone()?;
        lock(&self.queues).readable.clone().map(|()| scan)
    }
}

impl Queues {
    fn note(&mut self, namespace: &Arc<Namespace>, counts: Counts, now: Instant) {
        let queue = self
            .queues
            .entry(namespace.serial)
            .or_insert_with(|| Queue {
                last: namespace.born.then(Counts::default),
                overflowed: None,
                owed: Owed {
                    namespace: namespace.clone(),
                    counts: Counts::default(),
                    since: now,
                },
            });
        // It may have got its address, or its pod, since.
        if !Arc::ptr_eq(&queue.owed.namespace, namespace) {
            queue.owed.namespace = namespace.clone();
        }
        let grown = queue
            .last
            .map_or_else(Counts::default, |last| counts.since(last));
        queue.last = Some(counts);
        if grown.overflows > 0 {
            queue.overflowed = Some(now);
        }
        if !grown.is_zero() {
            if queue.owed.counts.is_zero() {
                queue.owed.since = now;
            }
            queue.owed.counts.add(grown);
        }
    }
}

/// Whether `/proc/net/tcp` shows a listener at a port with connections that wait to be accepted.
fn listens_in_vain(tcp: &str, port: u16) -> bool {
    /// TCP_LISTEN, include/net/tcp_states.h.
    const LISTEN: &str = "0A";
    // `sl local_address rem_address st tx_queue:rx_queue ...`
    tcp.lines().skip(1).any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let local = fields.next().and_then(|address| address.rsplit_once(':'));
        let is_at = local.and_then(|(_, p)| u16::from_str_radix(p, 16).ok()) == Some(port);
        let state = fields.nth(1);
        let waiting = fields.next().and_then(|queues| queues.split_once(':'));
        let waiting = waiting.and_then(|(_, rx)| u32::from_str_radix(rx, 16).ok());
        is_at && state == Some(LISTEN) && waiting.is_some_and(|waiting| waiting > 0)
    })
}

/// Whether it works here, for `whydrop check`: one scan, and one reading of the node's counters.
pub fn probe() -> SourceStatus {
    let queues = AcceptQueues::new(Arc::default());
    let scanned = queues.scan(&mut Scanner::new(&queues.proc));
    if let Some(host) = queues.namespaces.all().values().find(|n| n.host) {
        let mut state = lock(&queues.queues);
        state.readable = queues.read(&mut state, host);
    }
    status_of(&queues.status(&scanned))
}

/// What is said of the source: it works even where some namespaces are left out, which is said.
fn status_of(scanned: &Result<Scan, String>) -> SourceStatus {
    let (up, why) = match scanned {
        Err(why) => (false, Some(why.clone())),
        Ok(scan) => (!scan.is_blind(), left_out(scan)),
    };
    SourceStatus {
        source: SOURCE,
        up,
        hook: Some(HOOK.to_owned()),
        lost: (!up).then_some(LOST_WITHOUT),
        why,
    }
}

/// Without numbers: they would change from one moment to the next.
fn left_out(scan: &Scan) -> Option<String> {
    let mut parts = Vec::new();
    if scan.is_blind() {
        parts.push("CAP_SYS_PTRACE is missing, to see the network namespaces of processes");
    } else if scan.refused > 0 {
        parts.push("some processes do not show their network namespace");
    }
    if scan.closed > 0 {
        parts.push("CAP_SYS_ADMIN is missing, to enter network namespaces without a process");
    }
    if scan.left_out > 0 {
        parts.push("there are more processes, namespaces or addresses than are looked at");
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// The pause until the next reading, after so many failures in a row.
fn pause_after(failures: u32) -> Duration {
    (READ_EVERY * 2_u32.saturating_pow(failures)).min(MAX_PAUSE)
}

#[cfg(test)]
#[path = "accept_queues/tests.rs"]
mod tests;
