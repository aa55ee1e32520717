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
/// turn over, for 10 minutes; with two addresses each, for half of that. At some 200 bytes and the pod itself
/// this is 30 MB at worst.
pub const TOMBSTONES_MAX: usize = 65_536;

/// For each key the claims of its owners, each from a time until it ended.
///
/// Of several claims that hold at a time the one that started last wins; of those that started
/// together the one that was made last. So a later pod takes an address over even if the earlier
/// one's end was never seen, and the earlier one has it back when the later one lets go.
#[derive(Debug)]
pub struct Claims<K, T> {
    /// The one claim that nearly all keys have, small: with an address for a key two lie in a cache
    /// line, and a look-up in a large cluster waits for memory and for little else.
    lasting: FastMap<K, Lasting<T>>,
    /// Claims that ended or that another took over, in the order of precedence: none that started
    /// when the lasting one did was made after it.
    others: FastMap<K, Vec<Claim<T>>>,
    /// Ended claims in the order in which they ended.
    tombstones: VecDeque<Tombstone<K>>,
    tombstones_max: usize,
    next_id: u64,
    evicted: u64,
}

#[derive(Debug)]
struct Lasting<T> {
    from_ns: i64,
    owner: Arc<T>,
}

#[derive(Debug)]
struct Claim<T> {
    /// By which its tombstone finds it.
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
            lasting: FastMap::default(),
            others: FastMap::default(),
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
        let claim = Lasting {
            from_ns: ns(from),
            owner,
        };
        let earlier = match self.lasting.entry(key.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(claim);
                return;
            }
            Entry::Occupied(mut entry) => match entry.get().from_ns <= claim.from_ns {
                true => entry.insert(claim),
                false => claim,
            },
        };
        self.put_aside(key, earlier, LASTS);
    }

    fn put_aside(&mut self, key: K, claim: Lasting<T>, to_ns: i64) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let claims = self.others.entry(key).or_default();
        let place = claims.partition_point(|c| c.from_ns <= claim.from_ns);
        claims.reserve_exact(1);
        claims.insert(
            place,
            Claim {
                id,
                from_ns: claim.from_ns,
                to_ns,
                owner: claim.owner,
            },
        );
        id
    }

    /// The owner's lasting claim goes on under its changed self.
    pub fn update(&mut self, key: &K, old: &Arc<T>, new: Arc<T>) {
        match self.lasting.get_mut(key) {
            Some(claim) if Arc::ptr_eq(&claim.owner, old) => claim.owner = new,
            _ => {
                if let Some(claim) = self.taken_over(key, old) {
                    claim.owner = new;
                }
            }
        }
    }

    /// The owner's lasting claim ends.
    pub fn end(&mut self, key: &K, owner: &Arc<T>, at: Timestamp) {
        let to_ns = ns(at);
        let is_owners = |claim: &Lasting<T>| Arc::ptr_eq(&claim.owner, owner);
        let id = if self.lasting.get(key).is_some_and(is_owners) {
            let Some(claim) = self.lasting.remove(key) else {
                return;
            };
            self.put_aside(key.clone(), claim, to_ns)
        } else if let Some(claim) = self.taken_over(key, owner) {
            claim.to_ns = to_ns;
            claim.id
        } else {
            return;
        };
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

    /// The owner's claim that lasts beneath another's.
    fn taken_over(&mut self, key: &K, owner: &Arc<T>) -> Option<&mut Claim<T>> {
        let mut claims = self.others.get_mut(key)?.iter_mut();
        claims.find(|c| c.to_ns == LASTS && Arc::ptr_eq(&c.owner, owner))
    }

    /// Who held the key at a time.
    pub fn holder(&self, key: &K, at: Timestamp) -> Option<&Arc<T>> {
        let at_ns = ns(at);
        let lasting = self.lasting.get(key).filter(|c| c.from_ns <= at_ns);
        let other = self.others_at(key, at_ns).next();
        match (lasting, other) {
            (Some(lasting), Some(other)) if lasting.from_ns < other.from_ns => Some(&other.owner),
            (Some(lasting), _) => Some(&lasting.owner),
            (None, other) => other.map(|other| &other.owner),
        }
    }

    /// Who held the key at a time if it was one alone.
    pub fn only_holder(&self, key: &K, at: Timestamp) -> Option<&Arc<T>> {
        let at_ns = ns(at);
        let lasting = self.lasting.get(key).filter(|c| c.from_ns <= at_ns);
        let others = self.others_at(key, at_ns).map(|other| &other.owner);
        let mut owners = lasting.map(|claim| &claim.owner).into_iter().chain(others);
        let first = owners.next()?;
        owners.next().is_none().then_some(first)
    }

    /// Of the others those that held at a time, the one that is believed first.
    fn others_at(&self, key: &K, at_ns: i64) -> impl Iterator<Item = &Claim<T>> {
        // Mostly there are none at all.
        let others = match self.others.is_empty() {
            true => None,
            false => self.others.get(key),
        };
        let claims = others.into_iter().flat_map(|claims| claims.iter().rev());
        claims.filter(move |c| c.from_ns <= at_ns && at_ns < c.to_ns)
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
        let Some(claims) = self.others.get_mut(key) else {
            return;
        };
        claims.retain(|c| c.id != id);
        if claims.is_empty() {
            self.others.remove(key);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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

    /// One after the other, each with whether it lasts: what [`Claims`] does with one key, the slow way.
    #[derive(Default)]
    struct Naive(Vec<(i64, i64, Arc<u8>)>);

    impl Naive {
        fn holding(&self, at: i64) -> Vec<Arc<u8>> {
            let mut all: Vec<_> = self.0.iter().enumerate().collect();
            all.retain(|(_, (from, to, _))| (*from..*to).contains(&at));
            all.sort_by_key(|(i, (from, ..))| (*from, *i));
            all.into_iter()
                .rev()
                .map(|(_, claim)| claim.2.clone())
                .collect()
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Begin(u8, i64),
        End(u8, i64),
        Update(u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..3_u8, 0..6_i64).prop_map(|(owner, from)| Step::Begin(owner, from)),
            (0..3_u8, 3..9_i64).prop_map(|(owner, to)| Step::End(owner, to)),
            (0..3_u8).prop_map(Step::Update),
        ];
        prop::collection::vec(step, 0..24)
    }

    proptest! {
        #[test]
        fn who_holds_is_as_when_all_claims_are_looked_at(steps in steps()) {
            let (mut claims, mut naive) = (Claims::default(), Naive::default());
            let mut owners = [0, 1, 2].map(Arc::new);
            for step in steps {
                let lasting = |naive: &Naive, owner: &Arc<u8>| {
                    let mut all = naive.0.iter();
                    all.position(|(_, to, o)| *to == LASTS && Arc::ptr_eq(o, owner))
                };
                match step {
                    // An owner has an address once.
                    Step::Begin(owner, from) => {
                        let owner = &owners[usize::from(owner)];
                        if lasting(&naive, owner).is_none() {
                            claims.begin((), at(from), owner.clone());
                            naive.0.push((from, LASTS, owner.clone()));
                        }
                    }
                    Step::End(owner, to) => {
                        let owner = &owners[usize::from(owner)];
                        claims.end(&(), owner, at(to));
                        if let Some(place) = lasting(&naive, owner) {
                            naive.0[place].1 = to;
                        }
                    }
                    Step::Update(owner) => {
                        let new = Arc::new(owner);
                        let old = std::mem::replace(&mut owners[usize::from(owner)], new.clone());
                        claims.update(&(), &old, new.clone());
                        if let Some(place) = lasting(&naive, &old) {
                            naive.0[place].2 = new;
                        }
                    }
                }
                for second in 0..10 {
                    let expected = naive.holding(second);
                    let only = expected.first().filter(|_| expected.len() == 1);
                    prop_assert_eq!(claims.holder(&(), at(second)), expected.first());
                    prop_assert_eq!(claims.only_holder(&(), at(second)), only);
                }
            }
            claims.purge(at(9) + TOMBSTONE_TTL);
            naive.0.retain(|(_, to, _)| *to == LASTS);
            let others: usize = claims.others.values().map(Vec::len).sum();
            prop_assert_eq!(claims.lasting.len() + others, naive.0.len());
        }
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
        assert_eq!((claims.lasting.len(), claims.others.len()), (0, 2));
    }
}
