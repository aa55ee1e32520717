//! What waits until an end of it has a name, in the order in which it came. See [`crate::awaited`].

use std::collections::VecDeque;
use std::time::Instant;

use crate::awaited::PATIENCE;

/// What waits, with the time until which it does.
#[derive(Debug)]
pub struct Held<T> {
    waiting: VecDeque<(Instant, T)>,
    max: usize,
}

impl<T> Held<T> {
    /// For at most so many.
    pub fn new(max: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            max,
        }
    }

    /// Takes something in, or gives it back if there is no room.
    pub fn hold(&mut self, what: T, now: Instant) -> Option<T> {
        if self.waiting.len() >= self.max {
            return Some(what);
        }
        self.waiting.push_back((now + PATIENCE, what));
        None
    }

    /// What need not wait any more: its time is over, or it is ready. With it whether it was ready.
    pub fn ready(&mut self, now: Instant, mut is_ready: impl FnMut(&T) -> bool) -> Vec<(T, bool)> {
        let mut ready = Vec::new();
        for (until, what) in std::mem::take(&mut self.waiting) {
            match is_ready(&what) {
                is_named if is_named || until <= now => ready.push((what, is_named)),
                _ => self.waiting.push_back((until, what)),
            }
        }
        ready
    }

    /// All of it, at the end.
    pub fn finish(&mut self) -> Vec<T> {
        self.waiting.drain(..).map(|(_, what)| what).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_goes_when_it_is_ready_or_its_time_is_over() {
        let mut held = Held::new(3);
        let start = Instant::now();
        for n in 1..=3 {
            assert_eq!(held.hold(n, start), None);
        }
        assert_eq!(held.hold(4, start), Some(4), "no room");
        assert_eq!(held.ready(start, |n| *n == 2), [(2, true)]);
        assert_eq!(held.hold(4, start + PATIENCE / 2), None);
        assert_eq!(
            held.ready(start + PATIENCE, |_| false),
            [(1, false), (3, false)]
        );
        assert_eq!(held.finish(), [4]);
    }
}
