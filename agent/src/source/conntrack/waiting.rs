//! Entries that wait for an answer: how long, and when it is time to say that none came.
//!
//! No I/O: what was seen and when comes in, what is due comes out.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::NOTED_WITHIN;
use super::tuple::Key;
use super::wire::Entry;
use crate::event::{Kind, Protocol};

/// Entries followed at once. A node's table has 262,144 by default; so many of them unanswered at the
/// same time are a scan or a flood, of which nobody reads every attempt. 20 MB when full.
pub(super) const MAX_ENTRIES: usize = 50_000;

/// How long an attempt that was decided is remembered when no dump shows it any more. A SYN that is
/// sent again up to a minute later makes another entry of the same attempt; the kernel tells of the
/// end of expired entries when it collects them, up to a minute later (`GC_SCAN_INTERVAL_MAX`).
const GONE_REMEMBERED: Duration = Duration::from_secs(120);

/// When an attempt counts as unanswered, and what the kernel's own timers are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// For TCP.
    pub syn: Duration,
    /// For DNS queries over UDP.
    pub dns: Duration,
    /// Whole seconds that an entry has when its first SYN was just seen.
    pub syn_sent_s: Option<u64>,
    /// The same for a UDP entry without an answer.
    pub udp_s: Option<u64>,
}

impl Times {
    fn timeout(&self, kind: Kind) -> Duration {
        match kind {
            Kind::Dns => self.dns,
            Kind::Syn | Kind::Packet => self.syn,
        }
    }

    fn lifetime_s(&self, kind: Kind) -> Option<u64> {
        match kind {
            Kind::Dns => self.udp_s,
            Kind::Syn | Kind::Packet => self.syn_sent_s,
        }
    }
}

/// What kind of attempt an entry is; `None` if it is none that is watched, or no longer one.
pub(super) fn kind(entry: &Entry) -> Option<Kind> {
    const DNS: u16 = 53;
    let tuple = &entry.key.tuple;
    let asks_dns = tuple.destination().port() == DNS || entry.real_destination.port() == DNS;
    match tuple.protocol() {
        _ if !entry.unreplied => None,
        // A reset destroys the entry before the kernel notes that there was a reply, but not before
        // it changes the state.
        Protocol::TCP => entry.syn_sent.then_some(Kind::Syn),
        Protocol::UDP => asks_dns.then_some(Kind::Dns),
        _ => None,
    }
}

/// An attempt that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Due {
    /// What names it.
    pub key: Key,
    /// Its entry.
    pub id: u32,
    /// Connection attempt or DNS query.
    pub kind: Kind,
    /// Where its packets really went.
    pub real_destination: SocketAddr,
    /// When its first packet was seen, at the latest.
    pub since: Instant,
    /// Packets of the sender, as far as can be told; at least one.
    pub sent: u64,
    /// What is known of it now.
    pub now: Known,
}

/// What is known of an entry that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// A dump that began after it was due showed it without an answer.
    Waits,
    /// No dump since has looked.
    Unknown,
    /// It was destroyed without an answer.
    Died,
}

#[derive(Debug)]
struct State {
    id: u32,
    kind: Kind,
    real_destination: SocketAddr,
    since: Instant,
    sent: u64,
    /// When it expires at the latest, by what was seen since its last packet.
    expires_by: Option<Instant>,
    /// When it is decided; `None` once it is.
    due: Option<Instant>,
    /// When the last dump that showed it began.
    seen: Instant,
    /// Since when no dump shows it.
    gone: Option<Instant>,
    /// Destroyed; it stays until it is decided.
    died: bool,
}

/// The entries.
#[derive(Debug)]
pub(super) struct Waiting {
    entries: HashMap<Key, State>,
    /// Those that are not decided, by when they are.
    due: BTreeSet<(Instant, Key)>,
    capacity: usize,
    /// When the dump that is under way began, and the last one that was complete.
    dump: Option<Instant>,
    last_dump: Option<Instant>,
    /// Of this dump and of the last: entries without room.
    without_room: [u64; 2],
    untracked: u64,
}

impl Waiting {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::with_capacity(MAX_ENTRIES)
    }

    fn with_capacity(capacity: usize) -> Self {
        Self {
            entries: HashMap::new(),
            due: BTreeSet::new(),
            capacity,
            dump: None,
            last_dump: None,
            without_room: [0; 2],
            untracked: 0,
        }
    }

    /// Entries followed now.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Entries that found no room, at least: one that is still there at the next dump is not counted
    /// anew, nor is one that took its place.
    pub fn untracked(&self) -> u64 {
        self.untracked
    }

    /// A dump begins. One that is never ended changes nothing but what it showed.
    pub fn begin_dump(&mut self, now: Instant) {
        self.dump = Some(now);
        self.without_room[0] = 0;
    }

    /// The dump under way shows an entry, read at `now`, at the time of day `wall_ns` (of Unix time).
    pub fn shown(&mut self, entry: &Entry, times: &Times, now: Instant, wall_ns: u64) {
        let began = self.dump.unwrap_or(now);
        let Some(kind) = kind(entry) else {
            // Answered since, or in another state: the end of the dump takes it out.
            return;
        };
        if let Some(state) = self.entries.get_mut(&entry.key) {
            if state.is_continued_by(entry) {
                state.seen = began;
                state.gone = None;
                state.died = false;
                state.refresh(entry, began, now);
                return;
            }
            self.forget(&entry.key);
        }
        if self.entries.len() >= self.capacity {
            self.without_room[0] += 1;
            return;
        }
        // It cannot have been there for longer than since the last dump, which did not show it.
        let unseen = self
            .last_dump
            .map(|last| now.saturating_duration_since(last));
        let waited = age(entry, kind, times, wall_ns).min(unseen.unwrap_or(Duration::MAX));
        let mut state = State::new(entry, kind, before(now, waited), began);
        state.refresh(entry, began, now);
        self.insert(entry.key, state, times);
    }

    /// The dump under way is complete: what it did not show is gone. It collects expired entries, so
    /// events of their end are to be read before.
    pub fn end_dump(&mut self, now: Instant) {
        let Some(began) = self.dump.take() else {
            return;
        };
        let due = &mut self.due;
        self.entries.retain(|key, state| {
            if state.seen >= began || state.died {
                return true;
            }
            if let Some(at) = state.due {
                due.remove(&(at, *key));
                return false;
            }
            let gone = *state.gone.get_or_insert(now);
            now.saturating_duration_since(gone) < GONE_REMEMBERED
        });
        let [now_without, last_without] = self.without_room;
        self.untracked += now_without.saturating_sub(last_without);
        self.without_room = [0, now_without];
        self.last_dump = Some(began);
    }

    /// The table is empty, which is as good as a dump of it.
    pub fn nothing_there(&mut self, now: Instant) {
        self.begin_dump(now);
        self.end_dump(now);
    }

    /// An entry has died unreplied; its id is not known.
    pub fn died(&mut self, entry: &Entry, times: &Times, now: Instant, wall_ns: u64) {
        match self.entries.get_mut(&entry.key) {
            Some(state) if state.due.is_some() => state.died = true,
            // Of what is decided, this is the end: it may come after a dump that missed it.
            Some(_) => {}
            None => self.destroyed(entry, times, now, wall_ns),
        }
    }

    /// The kernel has destroyed an entry.
    pub fn destroyed(&mut self, entry: &Entry, times: &Times, now: Instant, wall_ns: u64) {
        let kind = kind(entry);
        match self.entries.get_mut(&entry.key) {
            // Answered or refused.
            Some(state) if state.id == entry.id && kind.is_none() => {
                self.forget(&entry.key);
                return;
            }
            Some(state) if state.id == entry.id && state.due.is_some() => {
                state.died = true;
                state.sent = state.sent.max(entry.packets.unwrap_or(0));
                return;
            }
            Some(state) if state.is_continued_by(entry) || state.gone.is_none() => {
                // Decided before, or its next entry is followed by now.
                return;
            }
            Some(_) => self.forget(&entry.key),
            None => {}
        }
        let Some(kind) = kind else {
            return;
        };
        if self.entries.len() >= self.capacity {
            self.untracked += 1;
            return;
        }
        // It lived for less than the time between two dumps, or expired since the last.
        let waited = match entry.start_ns {
            Some(_) => age(entry, kind, times, wall_ns),
            None => Duration::ZERO,
        };
        let mut state = State::new(entry, kind, before(now, waited), now);
        state.died = true;
        self.insert(entry.key, state, times);
    }

    /// When the next attempt is due.
    pub fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// The attempt that is due first, if it is by now.
    pub fn due(&self, now: Instant) -> Option<Due> {
        let (at, key) = self.due.first().filter(|(at, _)| *at <= now)?;
        let state = self.entries.get(key)?;
        Some(Due {
            key: *key,
            id: state.id,
            kind: state.kind,
            real_destination: state.real_destination,
            since: state.since,
            sent: state.sent,
            now: if state.died {
                Known::Died
            } else if state.seen >= *at {
                Known::Waits
            } else {
                Known::Unknown
            },
        })
    }

    /// It is decided: it will not be due again.
    pub fn decide(&mut self, key: &Key, now: Instant) {
        let Some(state) = self.entries.get_mut(key) else {
            return;
        };
        if let Some(at) = state.due.take() {
            self.due.remove(&(at, *key));
        }
        if std::mem::take(&mut state.died) {
            state.gone = Some(now);
        }
    }

    /// A look-up since `began` showed it; returns what it has sent so far.
    pub fn looked_up(&mut self, entry: &Entry, began: Instant, now: Instant) -> Option<u64> {
        let state = self.entries.get_mut(&entry.key)?;
        state.refresh(entry, began, now);
        Some(state.sent)
    }

    /// It was answered, or it is gone.
    pub fn forget(&mut self, key: &Key) {
        if let Some(at) = self.entries.remove(key).and_then(|state| state.due) {
            self.due.remove(&(at, *key));
        }
    }

    fn insert(&mut self, key: Key, mut state: State, times: &Times) {
        let due = state.since + times.timeout(state.kind) + NOTED_WITHIN;
        state.due = Some(due);
        self.due.insert((due, key));
        self.entries.insert(key, state);
    }
}

impl State {
    fn new(entry: &Entry, kind: Kind, since: Instant, seen: Instant) -> Self {
        Self {
            id: entry.id,
            kind,
            real_destination: entry.real_destination,
            since,
            sent: entry.packets.unwrap_or(1).max(1),
            expires_by: None,
            due: None,
            seen,
            gone: None,
            died: false,
        }
    }

    /// Whether an entry of the same tuple is of the same attempt: a SYN that is sent again makes a new
    /// one where the old one is gone, while a UDP port that is used again asks something else.
    fn is_continued_by(&self, entry: &Entry) -> bool {
        match self.kind {
            Kind::Syn => true,
            Kind::Dns | Kind::Packet => self.id == entry.id && self.gone.is_none(),
        }
    }

    /// Counts packets: by the kernel's own count where it keeps one, else by the timer, which a UDP
    /// packet sets anew. (A SYN that is sent again does neither, since stable kernels of 2023:
    /// nf_conntrack_proto_tcp.c.) The kernel read it between `began` and `now`, in whole seconds.
    fn refresh(&mut self, entry: &Entry, began: Instant, now: Instant) {
        if self.id != entry.id {
            self.id = entry.id;
            self.real_destination = entry.real_destination;
            self.expires_by = None;
            self.sent += 1;
        }
        let Some(left) = entry.expires_in_s.map(u64::from) else {
            return;
        };
        let at_least = began + Duration::from_secs(left);
        let at_most = now + Duration::from_secs(left + 1);
        let was_sent_again = self.expires_by.is_some_and(|by| at_least > by);
        match (entry.packets, self.expires_by) {
            (Some(packets), _) => self.sent = self.sent.max(packets),
            (None, _) if was_sent_again => self.sent += 1,
            _ => {}
        }
        self.expires_by = Some(match self.expires_by {
            Some(by) if !was_sent_again => by.min(at_most),
            _ => at_most,
        });
    }
}

fn before(now: Instant, duration: Duration) -> Instant {
    now.checked_sub(duration).unwrap_or(now)
}

/// How long an entry has been there, at least.
fn age(entry: &Entry, kind: Kind, times: &Times, wall_ns: u64) -> Duration {
    if let Some(start) = entry.start_ns {
        return Duration::from_nanos(wall_ns.saturating_sub(start));
    }
    // What is left is shown in whole seconds, so up to one second has passed that does not show.
    let passed_s = match (times.lifetime_s(kind), entry.expires_in_s) {
        (Some(whole), Some(left)) => whole.saturating_sub(u64::from(left) + 1),
        _ => 0,
    };
    Duration::from_secs(passed_s)
}

#[cfg(test)]
#[path = "waiting_tests.rs"]
mod tests;
