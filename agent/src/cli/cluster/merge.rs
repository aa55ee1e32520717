//! Lines of many nodes in the order of time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use jiff::Timestamp;
use tokio::time::{Duration, Instant};

/// How long a line waits for earlier ones of other nodes.
pub const WINDOW: Duration = Duration::from_secs(1);

/// What may wait at once: with 10,000 lines a second, all of a window.
pub const REORDERED: Bounds = Bounds {
    lines: 16_384,
    bytes: 32 << 20,
};

/// What whole answers may take together: all that 12 agents with full rings have, or 500 with 200 lines
/// each. A line takes about 1 KiB.
pub const COLLECTED: Bounds = Bounds {
    lines: 100_000,
    bytes: 128 << 20,
};

/// How much is held at most.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Lines.
    pub lines: usize,
    /// Their text.
    pub bytes: usize,
}

/// A line with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Of its event; of a loss that of the event before it.
    pub time: Timestamp,
    /// The packets that it stands for.
    pub packets: u64,
    /// Not so for one about a loss.
    pub is_event: bool,
    /// The agent that sent it.
    pub node: Arc<str>,
    /// JSON.
    pub line: String,
}

/// Among lines of one time the order in which they came.
type Place = (Timestamp, u64);

/// Lines in the order of time, bounded.
#[derive(Debug)]
struct Sorted {
    bounds: Bounds,
    items: BTreeMap<Place, Item>,
    bytes: usize,
    next: u64,
}

impl Sorted {
    fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            items: BTreeMap::new(),
            bytes: 0,
            next: 0,
        }
    }

    fn push(&mut self, item: Item) -> Place {
        let place = (item.time, self.next);
        self.next += 1;
        self.bytes += item.line.len();
        self.items.insert(place, item);
        place
    }

    fn pop(&mut self) -> Option<Item> {
        let (_, item) = self.items.pop_first()?;
        self.bytes -= item.line.len();
        Some(item)
    }

    /// The oldest, if there are more than fit.
    fn pop_excess(&mut self) -> Option<Item> {
        let is_full = self.items.len() > self.bounds.lines || self.bytes > self.bounds.bytes;
        if is_full { self.pop() } else { None }
    }

    /// The oldest, if it is not behind a place.
    fn pop_until(&mut self, place: Place) -> Option<Item> {
        let (first, _) = self.items.first_key_value()?;
        if *first <= place { self.pop() } else { None }
    }
}

/// Lines as they come: each is held back for a window, so that earlier ones of slower nodes still get
/// before it.
#[derive(Debug)]
pub struct Reorder {
    sorted: Sorted,
    /// When the lines came, in that order.
    arrived: VecDeque<(Instant, Place)>,
}

impl Reorder {
    /// Holds nothing yet.
    pub fn new(bounds: Bounds) -> Self {
        Self {
            sorted: Sorted::new(bounds),
            arrived: VecDeque::new(),
        }
    }

    /// Takes in a line. When there is no room, the oldest go out at once: none is lost.
    pub fn push(&mut self, item: Item, now: Instant, out: &mut Vec<Item>) {
        let place = self.sorted.push(item);
        self.arrived.push_back((now, place));
        while let Some(oldest) = self.sorted.pop_excess() {
            out.push(oldest);
        }
        // Of lines that went out so, what is left here is small, and goes with its time.
        if self.arrived.len() > 2 * self.sorted.bounds.lines {
            let items = &self.sorted.items;
            self.arrived.retain(|(_, place)| items.contains_key(place));
        }
    }

    /// The lines that waited for a whole window, and all before them.
    pub fn pop_due(&mut self, now: Instant, window: Duration, out: &mut Vec<Item>) {
        while let Some((came, place)) = self.arrived.front().copied()
            && came + window <= now
        {
            self.arrived.pop_front();
            while let Some(item) = self.sorted.pop_until(place) {
                out.push(item);
            }
        }
    }

    /// When [`Reorder::pop_due`] has something next.
    pub fn next_due(&self, window: Duration) -> Option<Instant> {
        self.arrived.front().map(|(came, _)| *came + window)
    }
}

/// The newest lines of whole answers.
#[derive(Debug)]
pub struct Newest {
    sorted: Sorted,
    /// Events that are wanted.
    last: Option<usize>,
    events: usize,
    /// Packets of wanted lines for which there was no room, by node.
    discarded: BTreeMap<Arc<str>, u64>,
}

impl Newest {
    /// Holds nothing yet; of all events the last so many are wanted.
    pub fn new(bounds: Bounds, last: Option<usize>) -> Self {
        Self {
            sorted: Sorted::new(bounds),
            last,
            events: 0,
            discarded: BTreeMap::new(),
        }
    }

    /// Takes in a line.
    pub fn push(&mut self, item: Item) {
        self.events += usize::from(item.is_event);
        self.sorted.push(item);
        while self.last.is_some_and(|last| self.events > last) {
            match self.sorted.pop() {
                Some(item) => self.events -= usize::from(item.is_event),
                None => break,
            }
        }
        while let Some(item) = self.sorted.pop_excess() {
            self.events -= usize::from(item.is_event);
            *self.discarded.entry(item.node).or_default() += item.packets;
        }
    }

    /// All of them in the order of time, and the packets of each node that had no room.
    pub fn finish(mut self) -> (Vec<Item>, BTreeMap<Arc<str>, u64>) {
        let items = std::iter::from_fn(|| self.sorted.pop()).collect();
        (items, self.discarded)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn item(milliseconds: i64) -> Item {
        Item {
            time: Timestamp::from_millisecond(milliseconds).unwrap(),
            packets: 2,
            is_event: true,
            node: "node-a".into(),
            line: milliseconds.to_string(),
        }
    }

    fn times(items: &[Item]) -> Vec<i64> {
        items.iter().map(|i| i.time.as_millisecond()).collect()
    }

    /// Lines that come at these milliseconds of these times: what goes out, and when.
    fn run(lines: &[(u64, i64)], bounds: Bounds) -> Vec<(u64, i64)> {
        let begin = Instant::now();
        let mut reorder = Reorder::new(bounds);
        let mut all = Vec::new();
        let mut due = |reorder: &mut Reorder, until: Option<u64>| {
            while let Some(next) = reorder.next_due(WINDOW)
                && until.is_none_or(|ms| next <= begin + Duration::from_millis(ms))
            {
                let mut out = Vec::new();
                reorder.pop_due(next, WINDOW, &mut out);
                let at = (next - begin).as_millis() as u64;
                all.extend(times(&out).into_iter().map(|time| (at, time)));
            }
        };
        let mut excess = Vec::new();
        for (came, time) in lines {
            due(&mut reorder, Some(*came));
            reorder.push(
                item(*time),
                begin + Duration::from_millis(*came),
                &mut excess,
            );
        }
        due(&mut reorder, None);
        assert!(excess.is_empty());
        assert!(reorder.sorted.items.is_empty());
        assert_eq!(reorder.sorted.bytes, 0);
        all
    }

    #[test]
    fn an_earlier_line_of_a_slower_node_gets_before_a_later_one() {
        let out = run(&[(0, 100), (10, 50), (900, 20), (1200, 300)], REORDERED);
        // The first one's second is over at 1000; nothing waits longer than a second.
        assert_eq!(out, [(1000, 20), (1000, 50), (1000, 100), (2200, 300)]);
        // What comes too late to be sorted in goes out no later than in its own second.
        let out = run(&[(0, 100), (1001, 50)], REORDERED);
        assert_eq!(out, [(1000, 100), (2001, 50)]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_held_for_more_than_a_window(
            lines in proptest::collection::vec((0u64..5000, 0i64..800), 0..60)
        ) {
            let mut lines = lines;
            lines.sort_by_key(|(came, _)| *came);
            // A line is made up to 800 ms before it comes.
            let lines: Vec<_> = lines.iter().map(|(came, lag)| (*came, *came as i64 - lag)).collect();
            let out = run(&lines, REORDERED);
            let mut expected: Vec<_> = lines.iter().map(|(_, time)| *time).collect();
            expected.sort();
            let shown: Vec<_> = out.iter().map(|(_, time)| *time).collect();
            // Lags below a window are put right wholly.
            prop_assert_eq!(shown, expected);
            for (at, time) in &out {
                prop_assert!((*at as i64 - time) <= 800 + 1000);
            }
        }
    }

    #[test]
    fn without_room_the_oldest_go_out_at_once() {
        for bounds in [
            Bounds {
                lines: 2,
                bytes: 1000,
            },
            Bounds {
                lines: 1000,
                bytes: 6,
            },
        ] {
            let mut reorder = Reorder::new(bounds);
            let (now, mut out) = (Instant::now(), Vec::new());
            for time in [300, 100, 200, 400] {
                reorder.push(item(time), now, &mut out);
            }
            assert_eq!(times(&out), [100, 200]);
            reorder.pop_due(now + WINDOW, WINDOW, &mut out);
            assert_eq!(times(&out), [100, 200, 300, 400]);
            // A flood leaves nothing behind.
            for time in 0..100 {
                reorder.push(item(100 + time), now, &mut out);
            }
            assert!(reorder.arrived.len() <= 2 * bounds.lines.min(100) + 2);
        }
    }

    #[test]
    fn the_last_are_those_of_all_nodes_together() {
        let mut newest = Newest::new(COLLECTED, Some(2));
        for time in [10, 30, 50] {
            newest.push(item(time));
        }
        newest.push(Item {
            is_event: false,
            ..item(45)
        });
        newest.push(item(40));
        let (items, discarded) = newest.finish();
        // A line about a loss is none of the two.
        assert_eq!(times(&items), [40, 45, 50]);
        // Nobody asked for more.
        assert!(discarded.is_empty());
    }

    #[test]
    fn what_has_no_room_is_counted() {
        let mut newest = Newest::new(
            Bounds {
                lines: 2,
                bytes: 1000,
            },
            None,
        );
        for time in [10, 30, 20] {
            newest.push(item(time));
        }
        let (items, discarded) = newest.finish();
        assert_eq!(times(&items), [20, 30]);
        assert_eq!(discarded, [("node-a".into(), 2)].into());
    }
}
