//! The stream of lines: one writer that never waits, and readers that may be slow.
//!
//! There is one ring for everyone. A reader is a position in it, so history and live lines are the
//! same sequence (no gap, no duplicate), and a reader that stalls costs nothing but its position.
//! When the ring has passed a reader, the packets that it missed are the difference of two running
//! totals, so the number is exact however many lines are gone.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::event::{Line, Lost, LostStage};
use crate::selection::Selection;
use crate::sync::lock;

/// How many lines are kept. At 20,000 lines a second, the most that the pipeline makes, that gives
/// a reader 0.4 s to come back; at the hundred a second of a bad day it is more than a minute of
/// history. A line takes about 1 KiB, so a full ring is 8 MiB, and an idle node's is empty.
pub const KEPT_LINES: usize = 8192;

/// How many readers there may be at once. Each costs the formatting of every line it takes; 64 are
/// more people than look at one node.
pub const MAX_READERS: usize = 64;

/// Lines that a reader takes in one step. Bounds the time that the writer's lock is held (some
/// microseconds) and the memory of a chunk (about 256 KiB).
const BATCH_LINES: usize = 256;

/// The stream; clones share it.
#[derive(Clone, Debug)]
pub struct Stream(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    node: Arc<str>,
    capacity: usize,
    ring: Mutex<Ring>,
    published: Notify,
    readers: Arc<Semaphore>,
    lost: [AtomicU64; 3],
}

#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<Kept>,
    /// Where the next line will be.
    end: Position,
}

#[derive(Debug)]
struct Kept {
    line: Arc<Line>,
    /// Packets of all lines before this one, since the agent started.
    packets_before: u64,
}

/// A place between two lines.
#[derive(Clone, Copy, Debug, Default)]
struct Position {
    /// Lines before it, since the agent started.
    lines: u64,
    /// Their packets.
    packets: u64,
}

impl Ring {
    /// The place before the oldest line that is kept.
    fn start(&self) -> Position {
        self.lines.front().map_or(self.end, |k| Position {
            lines: self.end.lines - self.lines.len() as u64,
            packets: k.packets_before,
        })
    }
}

/// Which part of the stream a reader wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// Go on with live lines; otherwise the reader ends where the stream ended when it began.
    pub follow: bool,
    /// Begin with the last this many events that the selection matches.
    pub last: Option<usize>,
    /// Begin with events of this time or later.
    pub since: Option<Timestamp>,
}

/// There are [`MAX_READERS`] readers already.
#[derive(Debug, thiserror::Error)]
#[error("{MAX_READERS} readers follow this agent already; end one of them and try again")]
pub struct TooManyReaders;

impl Stream {
    /// An empty stream of [`KEPT_LINES`]; `node` stands in the lines about losses of readers.
    pub fn new(node: Arc<str>) -> Self {
        Self::with_capacity(node, KEPT_LINES)
    }

    fn with_capacity(node: Arc<str>, capacity: usize) -> Self {
        Self(Arc::new(Shared {
            node,
            capacity,
            ring: Mutex::default(),
            published: Notify::new(),
            readers: Arc::new(Semaphore::new(MAX_READERS)),
            lost: [const { AtomicU64::new(0) }; 3],
        }))
    }

    /// Adds a line. Waits for nobody: a slow reader loses lines. A [`Line::Lost`] of an earlier
    /// stage is counted for [`Stream::lost`] on its way.
    pub fn publish(&self, line: Arc<Line>) {
        let packets = match &*line {
            Line::Event(event) => event.packets,
            Line::Lost(lost) => {
                self.count_lost(lost.stage, lost.lost);
                lost.lost
            }
        };
        let gone = {
            let mut ring = lock(&self.0.ring);
            let gone = if ring.lines.len() >= self.0.capacity {
                ring.lines.pop_front()
            } else {
                None
            };
            let packets_before = ring.end.packets;
            ring.lines.push_back(Kept {
                line,
                packets_before,
            });
            ring.end.lines += 1;
            ring.end.packets = ring.end.packets.saturating_add(packets);
            gone
        };
        // Freed outside the lock.
        std::mem::drop(gone);
        self.0.published.notify_waiters();
    }

    /// What the stream lost so far, by stage: packets that a [`Line::Lost`] told of, for
    /// [`LostStage::Reader`] the sum over all readers.
    pub fn lost(&self, stage: LostStage) -> u64 {
        self.0.lost[stage as usize].load(Ordering::Relaxed)
    }

    /// Readers at this moment.
    pub fn readers(&self) -> usize {
        MAX_READERS - self.0.readers.available_permits()
    }

    /// Lines that are kept at this moment.
    pub fn kept_lines(&self) -> usize {
        lock(&self.0.ring).lines.len()
    }

    /// All lines that are kept, oldest first.
    pub fn kept(&self) -> Vec<Arc<Line>> {
        let ring = lock(&self.0.ring);
        ring.lines.iter().map(|k| Arc::clone(&k.line)).collect()
    }

    /// Begins to read. Without `last` and `since` a following reader begins with the next line,
    /// and one that does not follow reads all lines that are kept.
    ///
    /// # Errors
    /// [`TooManyReaders`]
    pub fn read(&self, range: Range, selection: Selection) -> Result<Reader, TooManyReaders> {
        let permit = Arc::clone(&self.0.readers)
            .try_acquire_owned()
            .map_err(|_| TooManyReaders)?;
        let (start, end, history) = {
            let ring = lock(&self.0.ring);
            let wanted = range.last.is_some() || range.since.is_some();
            let history: Vec<Arc<Line>> = if wanted {
                ring.lines.iter().map(|k| Arc::clone(&k.line)).collect()
            } else {
                Vec::new()
            };
            (ring.start(), ring.end, history)
        };
        let mut reader = Reader {
            stream: self.clone(),
            selection,
            next: if range.follow { end } else { start },
            end: (!range.follow).then_some(end),
            since: range.since.map(|since| (since, end.lines)),
            _permit: permit,
        };
        // Matched outside the lock, which the writer needs.
        if !history.is_empty() {
            let skip = reader.first_wanted(&history, start.lines, range.last);
            reader.next = history[..skip].iter().fold(start, Position::after);
        }
        Ok(reader)
    }

    fn count_lost(&self, stage: LostStage, packets: u64) {
        self.0.lost[stage as usize].fetch_add(packets, Ordering::Relaxed);
    }
}

impl Position {
    fn after(self, line: &Arc<Line>) -> Self {
        let packets = match &**line {
            Line::Event(event) => event.packets,
            Line::Lost(lost) => lost.lost,
        };
        Self {
            lines: self.lines + 1,
            packets: self.packets.saturating_add(packets),
        }
    }
}

/// One reader of the [`Stream`]; dropping it makes room for another.
#[derive(Debug)]
pub struct Reader {
    stream: Stream,
    selection: Selection,
    next: Position,
    end: Option<Position>,
    /// Lines before this index are history, and of it only events since this time are wanted.
    /// Live events are not compared: the clock may step back.
    since: Option<(Timestamp, u64)>,
    _permit: OwnedSemaphorePermit,
}

impl Reader {
    /// The next lines (never an empty batch), as soon as there are any; `None` at the end.
    /// Cancelling it loses nothing.
    pub async fn next(&mut self) -> Option<Vec<Arc<Line>>> {
        let shared = Arc::clone(&self.stream.0);
        loop {
            // Before looking, so that a line published in between wakes it.
            let mut published = std::pin::pin!(shared.published.notified());
            published.as_mut().enable();
            let (batch, seen) = self.take();
            if !batch.is_empty() {
                return Some(batch);
            }
            if self.end.is_some_and(|end| self.next.lines >= end.lines) {
                return None;
            }
            if seen {
                // All that was read was not selected: let others run before reading on.
                tokio::task::yield_now().await;
            } else {
                published.await;
            }
        }
    }

    /// Ends this reader where the stream is now: [`Reader::next`] still gives what was published
    /// before.
    pub fn finish(&mut self) {
        if self.end.is_none() {
            self.end = Some(lock(&self.stream.0.ring).end);
        }
    }

    /// The next selected lines that are there, and whether any line was looked at.
    fn take(&mut self) -> (Vec<Arc<Line>>, bool) {
        let mut missed = 0;
        let first;
        let mut batch = Vec::new();
        {
            let ring = lock(&self.stream.0.ring);
            let end = self.end.unwrap_or(ring.end);
            let mut start = ring.start();
            if start.lines > end.lines {
                start = end;
            }
            if self.next.lines < start.lines {
                missed = start.packets - self.next.packets;
                self.next = start;
            }
            first = self.next.lines;
            let offset = (self.next.lines - ring.start().lines.min(self.next.lines)) as usize;
            let count = ((end.lines - self.next.lines) as usize).min(BATCH_LINES);
            batch.extend(
                ring.lines
                    .iter()
                    .skip(offset)
                    .take(count)
                    .map(|k| Arc::clone(&k.line)),
            );
        }
        self.next = batch.iter().fold(self.next, Position::after);
        let seen = !batch.is_empty() || missed > 0;
        let mut index = first;
        batch.retain(|line| {
            index += 1;
            self.wants(line, index - 1)
        });
        if missed > 0 {
            self.stream.count_lost(LostStage::Reader, missed);
            let lost = Lost {
                lost: missed,
                stage: LostStage::Reader,
                node: Arc::clone(&self.stream.0.node),
            };
            batch.insert(0, Arc::new(Line::Lost(lost)));
        }
        (batch, seen)
    }

    fn wants(&self, line: &Line, index: u64) -> bool {
        let in_time = match (self.since, line) {
            (Some((since, live)), Line::Event(event)) => index >= live || event.time >= since,
            _ => true,
        };
        in_time && self.selection.matches(line)
    }

    /// How many lines of the history to pass over. `begin` is the index of its first.
    fn first_wanted(&self, history: &[Arc<Line>], begin: u64, last: Option<usize>) -> usize {
        let mut wanted = (0..history.len()).filter(|&i| {
            matches!(*history[i], Line::Event(_)) && self.wants(&history[i], begin + i as u64)
        });
        match last {
            None => wanted.next(),
            Some(0) => None,
            Some(n) => wanted.rev().take(n).last(),
        }
        .unwrap_or(history.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Event, testing::event};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn publish(stream: &Stream, seconds: std::ops::Range<i64>) {
        for s in seconds {
            let event = Event {
                time: at(s),
                packets: s as u64,
                ..event()
            };
            stream.publish(Arc::new(Line::Event(event)));
        }
    }

    /// Seconds of events, and minus the packets of losses.
    fn shown(lines: &[Arc<Line>]) -> Vec<i64> {
        lines
            .iter()
            .map(|line| match &**line {
                Line::Event(e) => e.time.as_second(),
                Line::Lost(l) => -(l.lost as i64),
            })
            .collect()
    }

    async fn all(mut reader: Reader) -> Vec<i64> {
        reader.finish();
        let mut seen = Vec::new();
        while let Some(batch) = reader.next().await {
            assert!(!batch.is_empty());
            seen.extend(shown(&batch));
        }
        seen
    }

    fn stream(capacity: usize) -> Stream {
        Stream::with_capacity("node-a".into(), capacity)
    }

    fn read(stream: &Stream, range: Range) -> Reader {
        stream.read(range, Selection::default()).unwrap()
    }

    const FOLLOW: Range = Range {
        follow: true,
        last: None,
        since: None,
    };

    #[tokio::test]
    async fn history_and_live_lines_are_one_sequence() {
        let stream = stream(100);
        publish(&stream, 1..11);
        let mut reader = read(
            &stream,
            Range {
                last: Some(3),
                ..FOLLOW
            },
        );
        publish(&stream, 11..13);
        assert_eq!(shown(&reader.next().await.unwrap()), [8, 9, 10, 11, 12]);
        publish(&stream, 13..14);
        assert_eq!(shown(&reader.next().await.unwrap()), [13]);
    }

    #[tokio::test]
    async fn a_range_decides_where_a_reader_begins() {
        let stream = stream(100);
        publish(&stream, 1..6);
        let range = |last, since: Option<i64>| Range {
            follow: false,
            last,
            since: since.map(at),
        };
        for (range, expected) in [
            (FOLLOW, vec![]),
            (range(None, None), vec![1, 2, 3, 4, 5]),
            (range(Some(2), None), vec![4, 5]),
            (range(Some(0), None), vec![]),
            (range(Some(9), None), vec![1, 2, 3, 4, 5]),
            (range(None, Some(4)), vec![4, 5]),
            (range(None, Some(9)), vec![]),
            (range(Some(1), Some(4)), vec![5]),
            (range(Some(4), Some(4)), vec![4, 5]),
        ] {
            assert_eq!(all(read(&stream, range)).await, expected, "{range:?}");
        }
    }

    #[tokio::test]
    async fn last_counts_selected_events() {
        let stream = stream(100);
        publish(&stream, 1..4);
        let mut other = event();
        other.node = "node-b".into();
        other.time = at(9);
        for _ in 0..50 {
            stream.publish(Arc::new(Line::Event(other.clone())));
        }
        let selection = Selection::from_query([("not.node-name", "node-b")]).unwrap();
        let range = Range {
            last: Some(2),
            ..Range::default()
        };
        let reader = stream.read(range, selection).unwrap();
        assert_eq!(all(reader).await, [2, 3]);
    }

    #[tokio::test]
    async fn live_events_pass_when_the_clock_steps_back() {
        let stream = stream(100);
        publish(&stream, 50..52);
        let range = Range {
            since: Some(at(51)),
            ..FOLLOW
        };
        let reader = read(&stream, range);
        publish(&stream, 10..11);
        assert_eq!(all(reader).await, [51, 10]);
    }

    #[tokio::test]
    async fn a_slow_reader_is_told_how_many_packets_it_missed() {
        let stream = stream(4);
        let mut reader = read(&stream, FOLLOW);
        publish(&stream, 1..3);
        assert_eq!(shown(&reader.next().await.unwrap()), [1, 2]);
        publish(&stream, 3..11);
        let missed = 3 + 4 + 5 + 6;
        assert_eq!(
            shown(&reader.next().await.unwrap()),
            [-missed, 7, 8, 9, 10],
            "the loss stands where the lines are missing"
        );
        assert_eq!(stream.lost(LostStage::Reader), missed as u64);
    }

    #[tokio::test]
    async fn a_loss_passes_every_selection_and_counts_lost_lines_too() {
        let stream = stream(2);
        let selection = Selection::from_query([("port", "1")]).unwrap();
        let mut reader = stream.read(FOLLOW, selection).unwrap();
        let lost = Lost {
            lost: 100,
            stage: LostStage::Ring,
            node: "node-a".into(),
        };
        stream.publish(Arc::new(Line::Lost(lost)));
        publish(&stream, 1..4);
        assert_eq!(shown(&reader.next().await.unwrap()), [-101]);
        assert_eq!(stream.lost(LostStage::Ring), 100);
        assert_eq!(stream.lost(LostStage::Queue), 0);
    }

    #[tokio::test]
    async fn a_reader_that_was_to_end_is_not_told_of_later_losses() {
        let stream = stream(2);
        publish(&stream, 1..3);
        let mut reader = read(&stream, Range::default());
        publish(&stream, 3..50);
        assert_eq!(shown(&reader.next().await.unwrap()), [-3]);
        assert!(reader.next().await.is_none());
    }

    #[tokio::test]
    async fn readers_are_bounded_and_leave_their_place() {
        let stream = stream(2);
        let mut readers: Vec<_> = (0..MAX_READERS).map(|_| read(&stream, FOLLOW)).collect();
        assert!(stream.read(FOLLOW, Selection::default()).is_err());
        readers.pop();
        assert_eq!(stream.readers(), MAX_READERS - 1);
        assert!(stream.read(FOLLOW, Selection::default()).is_ok());
    }

    /// What every reader got and what it lost adds up, however the threads ran.
    #[test]
    fn packets_add_up_under_load() {
        let stream = stream(64);
        let total: u64 = (1..20_000).sum();
        let readers: Vec<_> = (0..3).map(|_| read(&stream, FOLLOW)).collect();
        std::thread::scope(|scope| {
            let threads: Vec<_> = readers
                .into_iter()
                .map(|mut reader| {
                    scope.spawn(move || {
                        let runtime = tokio::runtime::Builder::new_current_thread()
                            .build()
                            .unwrap();
                        runtime.block_on(async move {
                            let mut packets = 0;
                            while packets < total {
                                let batch = reader.next().await.unwrap();
                                packets +=
                                    shown(&batch).iter().map(|n| n.unsigned_abs()).sum::<u64>();
                            }
                            packets
                        })
                    })
                })
                .collect();
            publish(&stream, 1..20_000);
            for thread in threads {
                assert_eq!(thread.join().unwrap(), total);
            }
        });
    }
}
