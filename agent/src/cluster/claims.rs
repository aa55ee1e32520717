//! Who held something, and when: addresses and ports change hands, and a drop belongs to who held
//! them when it happened.

use std::collections::VecDeque;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::FastMap;

/// How long a claim that ended can still be asked for. A drop is told within seconds; an attempt
/// without an answer at the latest when the kernel gives it up: 127 s for a SYN resent 6 times,
/// 180 s for a conntrack entry with its collection. The rest is for stalls.
pub const TOMBSTONE_TTL: SignedDuration = SignedDuration::from_mins(10);

/// How many ended claims are kept: 100 pods a second that go, the most that a cluster is built to
/// turn over, for 10 minutes. At some 150 bytes each this is 10 MB at worst.
pub const TOMBSTONES_MAX: usize = 65_536;

/// For each key the claims of its owners, each from a time until it ended.
///
/// Of several claims that hold at a time the one that started last wins; of those that started
/// together the one that was made last. So a later pod takes an address over even if the earlier
/// one's end was never seen, and the earlier one has it back when the later one lets go.
#[derive(Debug)]
pub struct Claims<K, T> {
    by_key: FastMap<K, Slot<T>>,
    /// Ended claims in the order in which they ended.
    tombstones: VecDeque<Tombstone<K>>,
    tombstones_max: usize,
    next_id: u64,
    evicted: u64,
}

/// The claims of one key in the order of precedence. Nearly all keys have one in their life, so
/// the last one needs no allocation and no further step in memory.
#[derive(Debug)]
struct Slot<T> {
    last: Claim<T>,
    /// Hardly any key has one; a list in itself would be the larger part of what most keys take.
    earlier: Option<Box<Earlier<T>>>,
}

/// Never empty.
#[derive(Debug)]
struct Earlier<T>(Vec<Claim<T>>);

#[derive(Debug)]
struct Claim<T> {
    id: u64,
    from_ns: i64,
    /// [`LASTS`] while it does.
    to_ns: i64,
    owner: Arc<T>,
}

const LASTS: i64 = i64::MAX;

/// Nanoseconds since 1970 in half the space of a [`Timestamp`]. Times before 1677 and after 2262
/// are those years.
fn ns(time: Timestamp) -> i64 {
    let bounded = time
        .as_nanosecond()
        .clamp(i64::MIN.into(), (i64::MAX - 1).into());
    i64::try_from(bounded).unwrap_or(i64::MIN)
}

#[derive(Debug)]
struct Tombstone<K> {
    ended: Timestamp,
    key: K,
    id: u64,
}

impl<K, T> Default for Claims<K, T> {
    fn default() -> Self {
        Self {
            by_key: FastMap::default(),
            tombstones: VecDeque::new(),
            tombstones_max: TOMBSTONES_MAX,
            next_id: 0,
            evicted: 0,
        }
    }
}

impl<K: Hash + Eq + Clone, T> Claims<K, T> {
    /// An owner claims a key from a time on.
    pub fn begin(&mut self, key: K, from: Timestamp, owner: Arc<T>) {
        let id = self.next_id;
        self.next_id += 1;
        let claim = Claim {
            id,
            from_ns: ns(from),
            to_ns: LASTS,
            owner,
        };
        match self.by_key.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Slot {
                    last: claim,
                    earlier: None,
                });
            }
            Entry::Occupied(mut entry) => entry.get_mut().add(claim),
        }
    }

    /// The owner's lasting claim goes on under its changed self.
    pub fn update(&mut self, key: &K, old: &Arc<T>, new: Arc<T>) {
        if let Some(claim) = self.lasting(key, old) {
            claim.owner = new;
        }
    }

    /// The owner's lasting claim ends.
    pub fn end(&mut self, key: &K, owner: &Arc<T>, at: Timestamp) {
        let Some(claim) = self.lasting(key, owner) else {
            return;
        };
        claim.to_ns = ns(at);
        let id = claim.id;
        if self.tombstones.len() >= self.tombstones_max
            && let Some(oldest) = self.tombstones.pop_front()
        {
            self.remove(&oldest.key, oldest.id);
            self.evicted += 1;
        }
        self.tombstones.push_back(Tombstone {
            ended: at,
            key: key.clone(),
            id,
        });
    }

    fn lasting(&mut self, key: &K, owner: &Arc<T>) -> Option<&mut Claim<T>> {
        let slot = self.by_key.get_mut(key)?;
        let earlier = slot.earlier.iter_mut().flat_map(|earlier| &mut earlier.0);
        let mut claims = std::iter::once(&mut slot.last).chain(earlier);
        claims.find(|c| c.to_ns == LASTS && Arc::ptr_eq(&c.owner, owner))
    }

    /// Who held the key at a time.
    pub fn holder(&self, key: &K, at: Timestamp) -> Option<&Arc<T>> {
        self.by_key.get(key)?.holding(at).next()
    }

    /// Who held the key at a time if it was one alone.
    pub fn only_holder(&self, key: &K, at: Timestamp) -> Option<&Arc<T>> {
        let mut owners = self.by_key.get(key)?.holding(at);
        let first = owners.next()?;
        owners.next().is_none().then_some(first)
    }

    /// Forgets claims that ended [`TOMBSTONE_TTL`] ago. Returns how many.
    pub fn purge(&mut self, now: Timestamp) -> usize {
        let Ok(limit) = now.checked_sub(TOMBSTONE_TTL) else {
            return 0;
        };
        let before = self.tombstones.len();
        // After a clock step backwards the first ones keep the others a little longer.
        while let Some(oldest) = self.tombstones.pop_front_if(|t| t.ended <= limit) {
            self.remove(&oldest.key, oldest.id);
        }
        before - self.tombstones.len()
    }

    fn remove(&mut self, key: &K, id: u64) {
        let Some(slot) = self.by_key.get_mut(key) else {
            return;
        };
        let Some(earlier) = &mut slot.earlier else {
            if slot.last.id == id {
                self.by_key.remove(key);
            }
            return;
        };
        if slot.last.id != id {
            earlier.0.retain(|c| c.id != id);
        } else if let Some(claim) = earlier.0.pop() {
            slot.last = claim;
        }
        if earlier.0.is_empty() {
            slot.earlier = None;
        }
    }

    /// How many ended claims are kept.
    pub fn tombstones(&self) -> usize {
        self.tombstones.len()
    }

    /// How many ended claims were forgotten early, because [`TOMBSTONES_MAX`] was reached.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }
}

impl<T> Slot<T> {
    fn add(&mut self, claim: Claim<T>) {
        let earlier = self
            .earlier
            .get_or_insert_with(|| Box::new(Earlier(Vec::new())));
        if self.last.from_ns <= claim.from_ns {
            earlier.0.push(std::mem::replace(&mut self.last, claim));
        } else {
            let place = earlier.0.partition_point(|c| c.from_ns <= claim.from_ns);
            earlier.0.insert(place, claim);
        }
    }

    /// The owners at a time, the one who is believed first.
    fn holding(&self, at: Timestamp) -> impl Iterator<Item = &Arc<T>> {
        let at_ns = ns(at);
        let earlier = self
            .earlier
            .iter()
            .flat_map(|earlier| earlier.0.iter().rev());
        let claims = std::iter::once(&self.last).chain(earlier);
        let holding = claims.filter(move |c| c.from_ns <= at_ns && at_ns < c.to_ns);
        holding.map(|c| &c.owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn holder(claims: &Claims<u8, &'static str>, second: i64) -> Option<&'static str> {
        claims.holder(&1, at(second)).map(|owner| **owner)
    }

    #[test]
    fn a_key_belongs_to_who_held_it_then() {
        let mut claims = Claims::default();
        let (a, b) = (Arc::new("a"), Arc::new("b"));
        claims.begin(1, at(10), a.clone());
        claims.end(&1, &a, at(20));
        claims.begin(1, at(30), b);
        let held = [9, 10, 19, 20, 29, 30, 99].map(|t| holder(&claims, t));
        assert_eq!(
            held,
            [None, Some("a"), Some("a"), None, None, Some("b"), Some("b")]
        );
    }

    #[test]
    fn the_later_start_wins_while_it_lasts() {
        let mut claims = Claims::default();
        let (a, b) = (Arc::new("a"), Arc::new("b"));
        // Told in the wrong order.
        claims.begin(1, at(20), b.clone());
        claims.begin(1, at(10), a);
        claims.end(&1, &b, at(30));
        let held = [15, 25, 35].map(|t| holder(&claims, t));
        assert_eq!(held, [Some("a"), Some("b"), Some("a")]);
        assert_eq!(claims.only_holder(&1, at(25)), None);
        assert_eq!(claims.only_holder(&1, at(35)).map(|o| **o), Some("a"));
    }

    #[test]
    fn tombstones_go_after_their_time_and_leave_the_living() {
        let mut claims = Claims::default();
        let (a, b) = (Arc::new("a"), Arc::new("b"));
        claims.begin(1, at(0), a.clone());
        claims.end(&1, &a, at(100));
        claims.begin(1, at(100), b);
        assert_eq!(claims.purge(at(699)), 0);
        assert_eq!(holder(&claims, 50), Some("a"));
        assert_eq!(claims.purge(at(700)), 1);
        assert_eq!(holder(&claims, 50), None);
        assert_eq!(holder(&claims, 100), Some("b"));
    }

    #[test]
    fn the_oldest_tombstone_makes_room() {
        let mut claims = Claims {
            tombstones_max: 2,
            ..Claims::default()
        };
        for key in 0..3 {
            let owner = Arc::new("pod");
            claims.begin(key, at(0), owner.clone());
            claims.end(&key, &owner, at(i64::from(key) + 1));
        }
        assert_eq!((claims.tombstones(), claims.evicted()), (2, 1));
        assert!(claims.holder(&0, at(0)).is_none());
        assert!(claims.holder(&1, at(0)).is_some());
        assert_eq!(claims.by_key.len(), 2);
    }
}
