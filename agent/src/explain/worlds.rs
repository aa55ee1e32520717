//! The objects that decide, taken out of the index no more often than explanations need them: shared by
//! the pipeline and by the local API.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::cluster::Index;
use crate::cpu_time::timed;
use crate::policy::world::World;
use crate::sync::lock;

/// Between two looks at the objects.
pub(super) const APART: Duration = Duration::from_secs(1);
/// A look that took long is followed by so many times as long without one.
const IDLE_SHARE: u32 = 20;
/// Where no policy is, only questions need it, and it is not kept for longer than that.
const UNUSED: Duration = Duration::from_secs(60);

/// The objects as they were.
#[derive(Debug)]
struct Seen {
    revision: u64,
    world: Arc<World>,
    /// As of when.
    time: Timestamp,
    taken: Instant,
    took: Duration,
    used: Instant,
}

/// The last look at the objects.
#[derive(Debug, Default)]
pub struct Worlds(Mutex<Option<Seen>>);

impl Worlds {
    /// The objects, as new as they may be, and as of when.
    pub fn latest(&self, index: &Index, now: Instant) -> (Arc<World>, Timestamp) {
        let mut last = lock(&self.0);
        let revision = index.revision();
        if let Some(seen) = &mut *last {
            seen.used = now;
            if seen.revision == revision {
                seen.time = Timestamp::now();
            }
            let apart = APART.max(seen.took * IDLE_SHARE);
            if seen.revision == revision || now.saturating_duration_since(seen.taken) < apart {
                return (seen.world.clone(), seen.time);
            }
        }
        let (world, took) = timed(|| Arc::new(World::new(index.objects())));
        let time = Timestamp::now();
        *last = Some(Seen {
            revision,
            world: world.clone(),
            time,
            taken: now,
            took,
            used: now,
        });
        (world, time)
    }

    /// Forgets objects that nobody asked for lately.
    pub fn forget_unused(&self, now: Instant) {
        let mut last = lock(&self.0);
        let is_old = |seen: &Seen| now.saturating_duration_since(seen.used) > UNUSED;
        if last.as_ref().is_some_and(is_old) {
            *last = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::testing::{BASE, objects, policy};

    #[test]
    fn they_are_taken_anew_when_they_changed_and_not_too_often() {
        let (mut index, worlds) = (Index::default(), Worlds::default());
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let day = "2026-01-01T00:00:00Z".parse().unwrap();
        index.load(objects(BASE), day);
        let (first, _) = worlds.latest(&index, start);
        let same = |at: Instant, index: &Index| Arc::ptr_eq(&first, &worlds.latest(index, at).0);
        assert!(same(start + second * 100, &index), "nothing changed");
        index.load(objects(&policy("deny", "  policyTypes: [Ingress]")), day);
        assert!(same(start + second / 2, &index), "too early");
        // However long it took, 20 times that are over.
        let later = start + second * 1000;
        let (second_one, _) = worlds.latest(&index, later);
        assert_eq!(second_one.policies().count(), 1);
        worlds.forget_unused(later + second * 61);
        let (third, _) = worlds.latest(&index, later);
        assert!(!Arc::ptr_eq(&second_one, &third));
    }
}
