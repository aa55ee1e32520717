//! Where a node's stream goes on after a break, so that nothing is shown twice or missed.
//!
//! Lines are nearly in the order of time: a name that is awaited holds one back for up to 2 s, and a busy
//! flow's summary comes a second later. So a stream is asked again for a little more than what came last,
//! and what was seen of that is left out.

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use jiff::{SignedDuration, Timestamp};

/// How late a line may come: 2 s for its name, 1 s for a summary.
const LATE: SignedDuration = SignedDuration::from_secs(3);
/// Lines that are remembered of a node, some 40 bytes each. Where more came within [`LATE`], the stream is asked
/// for what came since the oldest of them.
const REMEMBERED: usize = 4096;

/// What was seen of one node.
#[derive(Debug, Default)]
pub struct Seen {
    newest: Option<Timestamp>,
    /// Nothing from before is asked for: the reader did not want it, or cannot tell it from what it saw.
    floor: Option<Timestamp>,
    recent: VecDeque<(Timestamp, u64)>,
    known: HashSet<u64>,
    /// Up to this time lines of a resumed stream can be known ones.
    replayed: Option<Timestamp>,
}

impl Seen {
    /// Takes in an event's line. `false`: it was seen before.
    pub fn is_new(&mut self, time: Timestamp, line: &str) -> bool {
        let mut hasher = DefaultHasher::new();
        line.hash(&mut hasher);
        let hash = hasher.finish();
        let is_replayed = self.replayed.is_some_and(|until| time <= until);
        if is_replayed && self.known.contains(&hash) {
            return false;
        }
        // The first line there is begins what was asked for.
        self.floor.get_or_insert(time);
        self.newest = self.newest.max(Some(time));
        self.recent.push_back((time, hash));
        self.known.insert(hash);
        if self.recent.len() > REMEMBERED
            && let Some((time, hash)) = self.recent.pop_front()
        {
            self.known.remove(&hash);
            let behind = time.checked_add(SignedDuration::from_nanos(1));
            self.floor = self.floor.max(behind.ok());
        }
        true
    }

    /// From when on the stream is asked for again; `None` if nothing came yet.
    pub fn resume(&mut self) -> Option<Timestamp> {
        let newest = self.newest?;
        self.replayed = Some(newest);
        let late = newest.checked_sub(LATE).unwrap_or(Timestamp::MIN);
        Some(self.floor.map_or(late, |floor| late.max(floor)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: i64) -> Timestamp {
        Timestamp::from_millisecond(milliseconds).unwrap()
    }

    /// Which of an agent's lines a reader shows that reads them by pieces, from where it was each time.
    fn shown(lines: &[i64], breaks: &[usize]) -> Vec<i64> {
        let mut seen = Seen::default();
        let mut shown = Vec::new();
        let mut since = Timestamp::MIN;
        for end in breaks.iter().chain([&lines.len()]) {
            for line in &lines[..*end] {
                if at(*line) >= since && seen.is_new(at(*line), &line.to_string()) {
                    shown.push(*line);
                }
            }
            since = seen.resume().unwrap_or(since);
        }
        shown
    }

    #[test]
    fn nothing_twice_and_nothing_missed_wherever_it_breaks() {
        // Late by up to 3 s, but never behind the break by more.
        let lines = [5000, 5001, 7000, 6000, 6500, 9000, 8999, 6100, 12000, 9100];
        for first in 1..lines.len() {
            for second in first..lines.len() {
                assert_eq!(shown(&lines, &[first, second]), lines, "{first} {second}");
            }
        }
    }

    #[test]
    fn what_was_not_asked_for_at_first_is_not_shown_later() {
        let mut seen = Seen::default();
        assert_eq!(seen.resume(), None);
        assert!(seen.is_new(at(10_000), "the last one"));
        assert_eq!(seen.resume(), Some(at(10_000)));
        assert!(!seen.is_new(at(10_000), "the last one"));
        assert!(seen.is_new(at(20_000), "next"));
        assert_eq!(seen.resume(), Some(at(17_000)));
    }

    #[test]
    fn of_a_flood_the_newest_are_remembered() {
        let mut seen = Seen::default();
        let flood = 2 * REMEMBERED as i64;
        for i in 0..flood {
            // The same line at another time is another one.
            assert!(seen.is_new(at(i / 8), &i.to_string()));
        }
        assert_eq!(seen.recent.len(), REMEMBERED);
        let since = seen.resume().unwrap();
        for i in 0..flood {
            if at(i / 8) >= since {
                assert!(!seen.is_new(at(i / 8), &i.to_string()), "{i}");
            }
        }
    }
}
