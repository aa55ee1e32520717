//! The ring buffer as a stream of owned events.

use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context as _, Result};
use aya::maps::{MapData, RingBuf};
use jiff::{SignedDuration, Timestamp};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use whydrop_ebpf::DropEvent;

use super::sys;

/// Detail of drops, as the programs send it.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
    /// Entries of another size than an event's.
    pub malformed: u64,
    /// Read to its end: the kernel wakes a reader only after that.
    is_read: bool,
}

impl Events {
    /// Registers the buffer with the runtime; must be called inside it.
    pub fn new(ring: RingBuf<MapData>) -> Result<Self> {
        let ring = pollable(ring).context("cannot wait for the ring buffer")?;
        Ok(Self {
            ring,
            malformed: 0,
            is_read: true,
        })
    }

    /// Waits until there is something to read.
    ///
    /// # Errors
    /// The runtime cannot wait for it.
    pub async fn ready(&mut self) -> Result<()> {
        if self.is_read {
            let mut guard = self
                .ring
                .readable_mut()
                .await
                .context("cannot wait for the ring buffer")?;
            guard.clear_ready();
            self.is_read = false;
        }
        Ok(())
    }

    /// The next event, if there is one.
    pub fn take(&mut self) -> Option<DropEvent> {
        while let Some(item) = self.ring.get_mut().next() {
            match sys::read::<DropEvent>(&item) {
                Some(event) => return Some(event),
                None => self.malformed += 1,
            }
        }
        self.is_read = true;
        None
    }
}

/// Registers a ring buffer, or what owns one, with the runtime; must be called inside it.
#[expect(
    deprecated,
    reason = "the replacement is unsafe, and asks what aya's types keep: a file \
                               descriptor that is theirs and stays the same"
)]
pub fn pollable<T: AsRawFd>(ring: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(ring, Interest::READABLE)
}

/// Turns the kernel's boot time into the time of day. Taken anew for each batch, so that a clock
/// that is set meanwhile is right from then on.
#[derive(Clone, Copy, Debug)]
pub struct WallClock {
    now: Timestamp,
    boot_ns: u64,
}

impl WallClock {
    /// Reads both clocks.
    pub fn now() -> Self {
        Self {
            now: Timestamp::now(),
            boot_ns: sys::boot_ns(),
        }
    }

    /// The time of day at a boot time; now, if the result is no time.
    pub fn at(&self, boot_ns: u64) -> Timestamp {
        let ago = i128::from(self.boot_ns) - i128::from(boot_ns);
        let ago = SignedDuration::from_nanos_i128(ago);
        self.now.checked_sub(ago).unwrap_or(self.now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_time_becomes_the_time_of_day() {
        let clock = WallClock::now();
        let second = clock.at(clock.boot_ns - 1_000_000_000);
        assert_eq!(
            clock.now.as_nanosecond() - second.as_nanosecond(),
            1_000_000_000
        );
        assert!(clock.at(0) < clock.now);
    }

    /// The clock is set between two batches: each batch is right by the clock of its own moment,
    /// and what happened between two events stays as long as it was.
    #[test]
    fn a_clock_that_is_set_is_right_from_then_on() {
        let before = WallClock::now();
        for hours in [-24 * 365 * 30, -1, 1, 24 * 365 * 30] {
            let step = SignedDuration::from_hours(hours);
            let after = WallClock {
                now: before.now + step,
                ..before
            };
            let event = before.boot_ns - 5_000_000;
            assert_eq!(before.at(event) + step, after.at(event), "{hours} h");
            let later = after.at(event + 1_000).as_nanosecond() - after.at(event).as_nanosecond();
            assert_eq!(later, 1_000, "{hours} h");
        }
    }

    /// An event of a moment after the clocks were read, and times that no time of day has.
    #[test]
    fn no_boot_time_is_too_far() {
        let clock = WallClock::now();
        assert!(clock.at(clock.boot_ns + 1) > clock.now);
        assert!(clock.at(u64::MAX) > clock.now);
        for now in [Timestamp::MIN, Timestamp::MAX] {
            let clock = WallClock {
                now,
                boot_ns: u64::MAX / 2,
            };
            for boot_ns in [0, u64::MAX / 2, u64::MAX] {
                let _ = clock.at(boot_ns);
            }
        }
    }
}
