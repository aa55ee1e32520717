use std::net::SocketAddr;

use super::*;
use crate::source::conntrack::tuple::{Tuple, Zone};

const TIMES: Times = Times {
    syn: Duration::from_secs(3),
    dns: Duration::from_secs(2),
    syn_sent_s: Some(120),
    udp_s: Some(30),
};
/// The time of day, in nanoseconds.
const WALL: u64 = 1_700_000_000_000_000_000;

/// A table at a time of one's own making.
struct Table {
    waiting: Waiting,
    start: Instant,
}

impl Table {
    fn new() -> Self {
        Self::with_capacity(MAX_ENTRIES)
    }

    fn with_capacity(capacity: usize) -> Self {
        Self {
            waiting: Waiting::with_capacity(capacity),
            start: Instant::now() + Duration::from_secs(1_000_000),
        }
    }

    fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    /// A complete dump in no time.
    fn dump(&mut self, ms: u64, entries: &[Entry]) {
        let now = self.at(ms);
        self.waiting.begin_dump(now);
        for entry in entries {
            self.waiting.shown(entry, &TIMES, now, WALL);
        }
        self.waiting.end_dump(now);
    }

    fn destroyed(&mut self, ms: u64, entry: &Entry) {
        let now = self.at(ms);
        self.waiting.destroyed(entry, &TIMES, now, WALL);
    }

    /// What is due at a time, in milliseconds; nothing is decided.
    fn due(&self, ms: u64) -> Option<Due> {
        self.waiting.due(self.at(ms))
    }

    fn decide(&mut self, key: &Key) {
        let now = self.at(0);
        self.waiting.decide(key, now);
    }

    /// When the next is due, in milliseconds.
    fn next_due(&self) -> Option<u128> {
        let at = self.waiting.next_due()?;
        Some(at.duration_since(self.start).as_millis())
    }
}

fn entry(id: u32, protocol: Protocol, port: u16, expires_in_s: u32) -> Entry {
    let address = |text: &str| text.parse::<SocketAddr>().expect("an address");
    let mut destination = address("10.2.0.2:0");
    destination.set_port(port);
    // Each id has a tuple of its own, unless a test says otherwise.
    let mut source = address("10.1.0.2:0");
    source.set_port(4000 + id as u16);
    Entry {
        key: Key {
            tuple: Tuple::new(protocol, source, destination),
            zone: Zone::default(),
        },
        id,
        real_destination: destination,
        unreplied: true,
        syn_sent: protocol == Protocol::TCP,
        expires_in_s: Some(expires_in_s),
        packets: None,
        start_ns: None,
    }
}

fn syn(id: u32, expires_in_s: u32) -> Entry {
    entry(id, Protocol::TCP, 5432, expires_in_s)
}

#[test]
fn what_is_watched() {
    assert_eq!(kind(&syn(1, 119)), Some(Kind::Syn));
    assert_eq!(kind(&entry(1, Protocol::UDP, 53, 29)), Some(Kind::Dns));
    assert_eq!(kind(&entry(1, Protocol::UDP, 54, 29)), None);
    assert_eq!(kind(&entry(1, Protocol::TCP, 53, 119)), Some(Kind::Syn));
    // A service whose port DNAT changes to 53.
    let real_destination = "10.2.0.9:53".parse().expect("an address");
    let behind = Entry {
        real_destination,
        ..entry(1, Protocol::UDP, 1053, 29)
    };
    assert_eq!(kind(&behind), Some(Kind::Dns));
    // And one whose pods listen elsewhere.
    let real_destination = "10.2.0.9:1053".parse().expect("an address");
    let before = Entry {
        real_destination,
        ..entry(1, Protocol::UDP, 53, 29)
    };
    assert_eq!(kind(&before), Some(Kind::Dns));
    assert_eq!(
        kind(&Entry {
            unreplied: false,
            ..syn(1, 119)
        }),
        None
    );
    assert_eq!(
        kind(&Entry {
            syn_sent: false,
            ..syn(1, 119)
        }),
        None
    );
}

#[test]
fn an_attempt_is_due_in_time_and_once() {
    let mut table = Table::new();
    table.dump(0, &[]);
    // Sent just after the last dump or just now: nobody can tell.
    table.dump(500, &[syn(1, 119)]);
    let grace = NOTED_WITHIN.as_millis() as u64;
    assert_eq!(table.next_due(), Some(500 + 3000 + u128::from(grace)));
    for ms in (1000..=3500).step_by(500) {
        table.dump(ms, &[syn(1, 119)]);
        assert_eq!(table.due(ms), None);
    }
    let due = table.due(3500 + grace).expect("due");
    assert_eq!((due.kind, due.now), (Kind::Syn, Known::Unknown));
    assert_eq!(due.since, table.at(500));
    // A dump that began since then spares the look-up.
    table.dump(4000, &[syn(1, 119)]);
    assert_eq!(table.due(4000).map(|due| due.now), Some(Known::Waits));
    table.decide(&due.key);
    assert_eq!(table.next_due(), None);
    for ms in (4500..200_000).step_by(500) {
        table.dump(ms, &[syn(1, 60)]);
        assert_eq!(table.due(ms), None, "reported twice, at {ms} ms");
    }
    assert_eq!(table.waiting.len(), 1);
}

#[test]
fn dns_has_its_own_timeout() {
    let mut table = Table::new();
    table.dump(0, &[]);
    table.dump(500, &[entry(1, Protocol::UDP, 53, 29)]);
    assert_eq!(
        table.next_due(),
        Some(500 + 2000 + NOTED_WITHIN.as_millis())
    );
}

#[test]
fn an_answer_takes_it_out() {
    let mut table = Table::new();
    table.dump(0, &[syn(1, 119), syn(2, 119)]);
    // One is not shown any more, the other is shown because the kernel does not filter.
    table.dump(
        500,
        &[Entry {
            unreplied: false,
            ..syn(2, 431_999)
        }],
    );
    assert_eq!((table.waiting.len(), table.next_due()), (0, None));
    assert!(table.waiting.due.is_empty());
}

#[test]
fn the_timer_tells_the_age_where_no_dump_can() {
    // At the start: 110 s left of 120 is 9 s at least.
    let mut table = Table::new();
    table.dump(20_000, &[syn(1, 110), syn(2, 119), syn(3, 300)]);
    let since = |table: &Table, id| {
        let (_, state) = table
            .waiting
            .entries
            .iter()
            .find(|(_, state)| state.id == id)
            .expect("there");
        state.since.duration_since(table.start).as_millis()
    };
    assert_eq!(
        [1, 2, 3].map(|id| since(&table, id)),
        [11_000, 20_000, 20_000]
    );
    // Later, a timer that begins with less than the default is no proof of age: the last dump did
    // not show the entry.
    table.dump(20_500, &[syn(1, 110), syn(2, 119), syn(3, 300), syn(4, 20)]);
    assert_eq!(since(&table, 4), 20_000);
    // The first value stays, whatever later dumps show.
    table.dump(21_000, &[syn(1, 119), syn(2, 10), syn(3, 1), syn(4, 1)]);
    assert_eq!(
        [1, 2, 3, 4].map(|id| since(&table, id)),
        [11_000, 20_000, 20_000, 20_000]
    );
}

#[test]
fn a_timestamp_is_better_than_the_timer() {
    let mut table = Table::new();
    let started = |ms_ago: u64| Some(WALL - ms_ago * 1_000_000);
    table.dump(0, &[]);
    table.dump(
        500,
        &[Entry {
            start_ns: started(123),
            ..syn(1, 110)
        }],
    );
    assert_eq!(
        table.next_due(),
        Some(500 - 123 + 3000 + NOTED_WITHIN.as_millis())
    );
    // The clock was set back meanwhile, or forth.
    table.dump(
        1000,
        &[Entry {
            start_ns: started(0).map(|ns| ns * 2),
            ..syn(2, 119)
        }],
    );
    table.dump(
        1500,
        &[Entry {
            start_ns: Some(0),
            ..syn(3, 119)
        }],
    );
    assert_eq!(
        table.next_due(),
        Some(1000 + 3000 + NOTED_WITHIN.as_millis())
    );
}

#[test]
fn packets_sent_again_are_counted_by_the_timer() {
    // A query at 0.1 s, then after 1, 2 and 4 s more, as its entry's timer shows it to dumps.
    let sent = [100, 1100, 3100, 7100];
    let mut table = Table::new();
    for ms in (0..9000).step_by(500) {
        let last = sent.iter().rev().find(|at| **at <= ms);
        let left = |at: &u64| ((30_000 - (ms - at)) / 1000) as u32;
        let shown = last.map(|at| entry(1, Protocol::UDP, 53, left(at)));
        let shown: Vec<Entry> = shown.into_iter().collect();
        table.dump(ms, &shown);
    }
    let state = table.waiting.entries.values().next().expect("there");
    assert_eq!(state.sent, 4);
}

#[test]
fn packets_of_the_kernel_s_own_count() {
    let mut table = Table::new();
    table.dump(
        0,
        &[Entry {
            packets: Some(2),
            ..syn(1, 119)
        }],
    );
    table.dump(
        500,
        &[Entry {
            packets: Some(5),
            ..syn(1, 119)
        }],
    );
    let state = table.waiting.entries.values().next().expect("there");
    assert_eq!(state.sent, 5);
}

#[test]
fn a_dump_that_breaks_off_takes_nothing_out() {
    let mut table = Table::new();
    table.dump(0, &[syn(1, 119)]);
    table.waiting.begin_dump(table.at(500));
    // It failed; the next one is whole.
    table.dump(1000, &[syn(1, 119)]);
    assert_eq!(table.waiting.len(), 1);
    assert_eq!(table.next_due(), Some(3000 + NOTED_WITHIN.as_millis()));
}

#[test]
fn an_empty_table_is_as_good_as_a_dump() {
    let mut table = Table::new();
    table.dump(0, &[syn(1, 119)]);
    table.waiting.nothing_there(table.at(500));
    assert_eq!((table.waiting.len(), table.next_due()), (0, None));
}

#[test]
fn what_finds_no_room_is_counted_once() {
    let mut table = Table::with_capacity(2);
    let entries = [1, 2, 3, 4, 5].map(|id| syn(id, 119));
    table.dump(0, &entries);
    table.dump(500, &entries);
    assert_eq!((table.waiting.len(), table.waiting.untracked()), (2, 3));
    table.dump(1000, &entries[1..]);
    // One place is free, and taken at the next dump; nothing is untracked that was not before.
    table.dump(1500, &entries[1..]);
    assert_eq!((table.waiting.len(), table.waiting.untracked()), (2, 3));
    table.destroyed(1600, &syn(9, 0));
    assert_eq!((table.waiting.len(), table.waiting.untracked()), (2, 4));
}

#[test]
fn one_that_died_unanswered_is_due_all_the_same() {
    let mut table = Table::new();
    table.dump(0, &[]);
    table.dump(500, &[syn(1, 119)]);
    table.destroyed(700, &syn(1, 0));
    // And one that no dump saw.
    table.destroyed(800, &syn(2, 0));
    table.dump(1000, &[]);
    let grace = NOTED_WITHIN.as_millis() as u64;
    let first = table.due(3500 + grace).expect("due");
    assert_eq!((first.id, first.now), (1, Known::Died));
    table.decide(&first.key);
    assert_eq!(table.due(3799 + grace), None);
    let second = table.due(3800 + grace).expect("due");
    assert_eq!((second.id, second.now), (2, Known::Died));
    table.decide(&second.key);
    assert_eq!(table.next_due(), None);
    table.dump(200_000, &[]);
    assert_eq!(table.waiting.len(), 0);
}

#[test]
fn one_that_died_answered_or_refused_is_not() {
    let mut table = Table::new();
    table.dump(0, &[syn(1, 119), syn(2, 119)]);
    table.destroyed(
        100,
        &Entry {
            unreplied: false,
            ..syn(1, 0)
        },
    );
    table.destroyed(
        100,
        &Entry {
            syn_sent: false,
            ..syn(2, 0)
        },
    );
    table.destroyed(
        100,
        &Entry {
            syn_sent: false,
            ..syn(3, 0)
        },
    );
    assert_eq!((table.waiting.len(), table.next_due()), (0, None));
}

#[test]
fn the_end_of_one_that_was_reported_is_no_news() {
    let mut table = Table::new();
    table.dump(0, &[syn(1, 119)]);
    table.decide(&syn(1, 0).key);
    // It expires: dumps hide it, and the kernel tells of it when it collects it.
    table.dump(500, &[]);
    table.destroyed(60_000, &syn(1, 0));
    table.dump(60_500, &[]);
    assert_eq!((table.waiting.len(), table.next_due()), (1, None));
    table.dump(120_500, &[]);
    assert_eq!(table.waiting.len(), 0);
    // One of which the kernel never tells is forgotten.
    table.dump(121_000, &[syn(2, 119)]);
    table.decide(&syn(2, 0).key);
    table.dump(121_500, &[]);
    table.dump(121_500 + 119_999, &[]);
    assert_eq!(table.waiting.len(), 1);
    table.dump(121_500 + 120_000, &[]);
    assert_eq!(table.waiting.len(), 0);
}

/// Another entry of the same tuple.
fn with_id(entry: Entry, id: u32) -> Entry {
    Entry { id, ..entry }
}

#[test]
fn a_syn_that_is_sent_again_is_the_same_attempt_by_another_entry() {
    let mut table = Table::new();
    let pod = |text: &str| text.parse().expect("an address");
    table.dump(0, &[syn(1, 119)]);
    // Its entry has died, the SYN was sent again, and to another pod.
    let again = Entry {
        real_destination: pod("10.2.0.9:5432"),
        ..with_id(syn(1, 119), 7)
    };
    table.dump(2000, std::slice::from_ref(&again));
    let due = table.due(3500).expect("due since the first");
    assert_eq!((due.id, due.sent, due.since), (7, 2, table.at(0)));
    assert_eq!(due.real_destination, pod("10.2.0.9:5432"));
    table.decide(&due.key);
    // And again, after a while without an entry.
    table.dump(4000, &[]);
    table.dump(100_000, &[with_id(syn(1, 119), 8)]);
    assert_eq!((table.waiting.len(), table.next_due()), (1, None));
    // Much later the port is used for something else.
    table.dump(101_000, &[]);
    table.dump(300_000, &[]);
    table.dump(300_500, &[with_id(syn(1, 119), 9)]);
    assert!(table.next_due().is_some());
}

#[test]
fn a_query_by_another_entry_is_another_query() {
    let query = entry(1, Protocol::UDP, 53, 29);
    let mut table = Table::new();
    table.dump(0, std::slice::from_ref(&query));
    table.decide(&query.key);
    table.dump(500, &[with_id(query.clone(), 7)]);
    let due = table.next_due().expect("another");
    assert!(due > 500, "{due}");
    table.dump(1000, &[with_id(query.clone(), 7)]);
    assert_eq!(table.next_due(), Some(due));
    table.decide(&query.key);
    // Another at the same address has the same id.
    table.dump(1500, &[]);
    table.dump(2000, &[with_id(query.clone(), 7)]);
    assert!(table.next_due().is_some_and(|due| due > 2000));
    assert_eq!((table.waiting.len(), table.waiting.due.len()), (1, 1));
}

#[test]
fn the_end_of_a_query_that_was_reported_is_no_news_without_its_id() {
    let query = entry(1, Protocol::UDP, 53, 29);
    let mut table = Table::new();
    table.dump(0, std::slice::from_ref(&query));
    table.decide(&query.key);
    // It expires, and the programs, which do not know ids, see it freed after the dump.
    table.dump(30_000, &[]);
    let now = table.at(30_001);
    let ended = with_id(query.clone(), 0);
    table.waiting.died(&ended, &TIMES, now, WALL);
    assert_eq!(table.next_due(), None, "reported twice");
    // One that nobody has seen is news.
    let now = table.at(30_002);
    let unseen = with_id(entry(2, Protocol::UDP, 53, 29), 0);
    table.waiting.died(&unseen, &TIMES, now, WALL);
    assert!(table.next_due().is_some());
}

#[test]
fn what_died_may_go_on() {
    let mut table = Table::new();
    table.dump(0, &[syn(1, 119)]);
    table.destroyed(100, &syn(1, 0));
    table.dump(500, &[with_id(syn(1, 119), 7)]);
    // Its first entry's end is told late: it is no end of the attempt.
    table.destroyed(600, &syn(1, 0));
    table.dump(3500, &[with_id(syn(1, 119), 7)]);
    let due = table.due(3500).expect("due");
    assert_eq!((due.now, due.since), (Known::Waits, table.at(0)));
    // Answered at last.
    table.dump(4000, &[]);
    assert_eq!((table.waiting.len(), table.next_due()), (0, None));
}

#[test]
fn one_that_a_dump_missed_is_not_reported_again() {
    let mut table = Table::new();
    table.dump(0, &[syn(1, 119)]);
    table.decide(&syn(1, 0).key);
    table.dump(500, &[]);
    table.dump(1000, &[syn(1, 119)]);
    table.dump(200_000, &[syn(1, 119)]);
    assert_eq!((table.waiting.len(), table.next_due()), (1, None));
}

#[test]
fn a_look_up_refreshes_what_is_known() {
    let mut table = Table::new();
    table.dump(0, &[syn(1, 119)]);
    let (began, now) = (table.at(3000), table.at(3001));
    assert_eq!(table.waiting.looked_up(&syn(1, 118), began, now), Some(2));
    assert_eq!(table.waiting.looked_up(&syn(2, 118), began, now), None);
}

#[test]
fn it_takes_what_the_bound_says() {
    // Hashbrown: a power of two of places, of which 7 in 8 are used, and a byte for each.
    let places = (MAX_ENTRIES * 8 / 7).next_power_of_two();
    let entries = places * (size_of::<(Key, State)>() + 1);
    // A node of a B-tree is at least half full.
    let due = MAX_ENTRIES * 2 * size_of::<(Instant, Key)>();
    assert!(entries + due <= 20_000_000, "{entries} + {due}");
}
