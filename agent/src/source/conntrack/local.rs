//! Attempts that another source counts: those of this kernel's sockets.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::tuple::Tuple;

/// How long a tuple is remembered: as long as the kernel keeps an entry of a SYN that nobody answers
/// (`nf_conntrack_tcp_timeout_syn_sent`, 120 s). An attempt that goes on for longer is to be noted
/// again when it ends, because each packet that is sent again keeps its entry alive.
pub const REMEMBERED: Duration = Duration::from_secs(120);

/// Tuples remembered at once: 400 attempts a second without an answer, all through [`REMEMBERED`],
/// in 9 MB. On a node on which more fails, senders that are no sockets of it can wait.
const MAX_TUPLES: usize = 50_000;

/// Tuples of attempts without an answer whose sender is a socket of this kernel, and which are
/// therefore counted by the source that sees that socket.
///
/// Whoever sees the socket notes its attempt here within [`NOTED_WITHIN`](super::NOTED_WITHIN) of its
/// timeout; see [`Setup::local`](super::Setup::local).
#[derive(Debug)]
pub struct LocalTuples {
    noted: HashMap<Tuple, Instant>,
    /// In the order of noting; one that was noted again is put off when its turn comes.
    order: VecDeque<(Instant, Tuple)>,
    capacity: usize,
    lost_at: Option<Instant>,
    lost: u64,
}

impl Default for LocalTuples {
    fn default() -> Self {
        Self::with_capacity(MAX_TUPLES)
    }
}

impl LocalTuples {
    /// An empty set with room for 50,000 tuples.
    pub fn new() -> Self {
        Self::default()
    }

    fn with_capacity(capacity: usize) -> Self {
        Self {
            noted: HashMap::new(),
            order: VecDeque::new(),
            capacity,
            lost_at: None,
            lost: 0,
        }
    }

    /// Notes an attempt as its socket sees it: source, destination before DNAT. One that is there is
    /// remembered anew. Where there is no room it is not noted, which [`Self::has_lost`] then tells.
    pub fn insert(&mut self, tuple: Tuple, now: Instant) {
        self.expire(now);
        if let Some(at) = self.noted.get_mut(&tuple) {
            *at = now;
        } else if self.noted.len() >= self.capacity {
            self.lost_at = Some(now);
            self.lost += 1;
        } else {
            self.noted.insert(tuple, now);
            self.order.push_back((now, tuple));
        }
    }

    /// Whether the tuple was noted within [`REMEMBERED`].
    pub fn contains(&self, tuple: &Tuple, now: Instant) -> bool {
        self.noted.get(tuple).is_some_and(|at| is_recent(*at, now))
    }

    /// Whether a tuple found no room within [`REMEMBERED`]: then a tuple that is not here may be
    /// local all the same.
    pub fn has_lost(&self, now: Instant) -> bool {
        self.lost_at.is_some_and(|at| is_recent(at, now))
    }

    /// Tuples that found no room, ever.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    fn expire(&mut self, now: Instant) {
        while let Some((at, tuple)) = self.order.front().copied() {
            if is_recent(at, now) {
                return;
            }
            self.order.pop_front();
            match self.noted.get(&tuple) {
                Some(again) if is_recent(*again, now) => self.order.push_back((*again, tuple)),
                _ => drop(self.noted.remove(&tuple)),
            }
        }
    }
}

fn is_recent(at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(at) < REMEMBERED
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Protocol;

    fn tuple(port: u16) -> Tuple {
        Tuple::new(
            Protocol::TCP,
            ([10, 0, 0, 1], port).into(),
            ([10, 0, 0, 2], 80).into(),
        )
    }

    #[test]
    fn a_tuple_is_forgotten_in_time_unless_noted_again() {
        let mut local = LocalTuples::new();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        local.insert(tuple(1), at(0));
        local.insert(tuple(2), at(0));
        local.insert(tuple(1), at(100));
        assert!(local.contains(&tuple(1), at(119)) && local.contains(&tuple(2), at(119)));
        assert!(local.contains(&tuple(1), at(120)) && !local.contains(&tuple(2), at(120)));
        assert!(local.contains(&tuple(1), at(219)) && !local.contains(&tuple(1), at(220)));
        // What is forgotten takes no room, whatever the order of noting was.
        local.insert(tuple(3), at(150));
        assert_eq!((local.noted.len(), local.order.len()), (2, 2));
        local.insert(tuple(4), at(300));
        assert_eq!((local.noted.len(), local.order.len()), (1, 1));
    }

    #[test]
    fn it_takes_what_the_bound_says() {
        let map = (MAX_TUPLES * 8 / 7).next_power_of_two() * (size_of::<(Tuple, Instant)>() + 1);
        let order = MAX_TUPLES.next_power_of_two() * size_of::<(Instant, Tuple)>();
        assert!(map + order <= 9_000_000, "{map} + {order}");
    }

    #[test]
    fn what_finds_no_room_is_told_for_two_minutes() {
        let mut local = LocalTuples::with_capacity(2);
        let start = Instant::now();
        local.insert(tuple(1), start);
        local.insert(tuple(2), start);
        assert!(!local.has_lost(start));
        // Not a new one.
        local.insert(tuple(2), start);
        assert!(!local.has_lost(start));
        local.insert(tuple(3), start);
        assert!(local.has_lost(start) && !local.contains(&tuple(3), start));
        assert_eq!(local.lost(), 1);
        let later = start + REMEMBERED;
        assert!(!local.has_lost(later));
        local.insert(tuple(3), later);
        assert!(local.contains(&tuple(3), later) && !local.has_lost(later));
    }
}
