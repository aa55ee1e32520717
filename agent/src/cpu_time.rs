//! CPU time of the calling thread: what is limited by a share of a core is measured by it, so that time in which
//! others had the core does not count.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// CPU time of this thread so far; zero where the kernel does not tell.
pub fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// What something comes to, and the CPU time that it takes.
pub fn timed<T>(run: impl FnOnce() -> T) -> (T, Duration) {
    let before = cpu_time();
    let result = run();
    (result, cpu_time().saturating_sub(before))
}
