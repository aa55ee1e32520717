//! How late something may be. That whydrop is in time is measured where time is that of the machine's own
//! instructions: in the virtual machines of `cargo xtask test vm`, which set `WHYDROP_TIMES=strict`. A machine
//! that others use as well stands still for seconds now and then, and there only what never comes is a fault.

use std::time::Duration;

/// What such a machine adds to a limit.
const STALL: Duration = Duration::from_secs(15);

/// Whether time is kept for the test alone.
pub fn is_strict() -> bool {
    std::env::var_os("WHYDROP_TIMES").is_some_and(|times| times == "strict")
}

/// The limit, and where the machine may stand still much more.
pub fn within(limit: Duration) -> Duration {
    match is_strict() {
        true => limit,
        false => limit + STALL,
    }
}
