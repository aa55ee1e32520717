//! The handle to the source, and what it tells of itself.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc;

use super::thread::{PERIOD, Thread};
use super::{Destroy, SOURCE, Setup};
use crate::decode::attempt::Attempt;
use crate::source::load::SourceStatus;
use crate::sync::lock;

/// Sums that only ever grow, unless it says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Dumps that were complete.
    pub dumps: u64,
    /// Entries that the kernel sent in them.
    pub dumped_entries: u64,
    /// CPU time that the last one took.
    pub last_dump: Duration,
    /// What lies between two dumps now.
    pub period: Duration,
    /// Entries followed now.
    pub entries: u64,
    /// Entries that found no room to be followed, at least.
    pub untracked: u64,
    /// Attempts handed on.
    pub reported: u64,
    /// Attempts not handed on, because the source of this kernel's sockets counts them.
    pub local: u64,
    /// Attempts not handed on, because their sender is not foreign.
    pub not_foreign: u64,
    /// Attempts not handed on, because nobody can tell whether they are local: see
    /// [`LocalTuples::has_lost`](super::LocalTuples::has_lost).
    pub withheld: u64,
    /// TCP attempts not handed on, because their SYN was sent only once.
    pub not_resent: u64,
    /// Times that events of destroyed entries were lost, each an unknown number.
    pub overruns: u64,
    /// Requests that failed, and messages that could not be read.
    pub errors: u64,
}

/// A handle to the thread.
#[derive(Clone, Debug)]
pub struct Source {
    shared: Arc<Mutex<Shared>>,
    stop: Arc<AtomicBool>,
    destroy: Destroy,
}

/// What the thread writes and the handle reads.
#[derive(Debug)]
pub(super) struct Shared {
    /// What it is doing.
    pub state: State,
    /// What it has done.
    pub totals: Totals,
}

/// What the source is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It has not asked yet.
    Starts,
    /// The kernel answers.
    Works {
        /// It chooses the entries of a dump.
        filtered: bool,
    },
    /// Conntrack is not loaded.
    Unused,
    /// The kernel does not answer.
    Failed(String),
    /// The thread is gone.
    Ended,
}

impl Source {
    /// Starts the thread in the caller's network namespace. `attempts` gets what nobody answered; it
    /// is closed when the thread ends. While it is full nothing is decided, so nothing is lost.
    ///
    /// # Errors
    /// The thread cannot be started. That the kernel does not answer is no error: it is tried again.
    pub fn start(setup: Setup, attempts: mpsc::Sender<Vec<Attempt>>) -> io::Result<Self> {
        let source = Self {
            destroy: setup.destroy,
            shared: Arc::new(Mutex::new(Shared {
                state: State::Starts,
                totals: Totals {
                    period: PERIOD,
                    ..Totals::default()
                },
            })),
            stop: Arc::default(),
        };
        let thread = Thread::new(setup, attempts, source.shared.clone());
        let stop = source.stop.clone();
        std::thread::Builder::new()
            .name(SOURCE.to_owned())
            .spawn(move || thread.run(&stop))?;
        Ok(source)
    }

    /// Whether it works, and how.
    pub fn status(&self) -> SourceStatus {
        let shared = lock(&self.shared);
        let why = match &shared.state {
            State::Starts => Some("the kernel has not been asked yet".to_owned()),
            State::Works { .. } => None,
            State::Unused => Some("connection tracking is not in use on this node".to_owned()),
            State::Failed(why) => Some(why.clone()),
            State::Ended => Some("its thread has ended".to_owned()),
        };
        let hook = match &shared.state {
            State::Works { filtered } => Some(describe(&shared.totals, *filtered, self.destroy)),
            _ => None,
        };
        SourceStatus {
            source: SOURCE,
            up: why.is_none(),
            hook,
            lost: why.is_some().then_some(
                "unanswered attempts are seen only of senders that are sockets of this node's kernel",
            ),
            why,
        }
    }

    /// What it has done so far.
    pub fn totals(&self) -> Totals {
        lock(&self.shared).totals
    }

    /// Ends the thread, within 100 ms after the dump under way.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// How it works, for people.
fn describe(totals: &Totals, filtered: bool, destroy: Destroy) -> String {
    let mut text = format!(
        "a dump by ctnetlink every {:.1} s, filtered by {}",
        totals.period.as_secs_f64(),
        if filtered {
            "the kernel"
        } else {
            "whydrop, as this kernel does not (Linux before 5.18)"
        }
    );
    if totals.period > PERIOD {
        text += &format!(
            "; {:.1} s would take more than 1% of a core, as a dump takes {:.0} ms",
            PERIOD.as_secs_f64(),
            totals.last_dump.as_secs_f64() * 1000.0
        );
    }
    if destroy == Destroy::On {
        text += "; events of destroyed entries";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretched_period_is_said() {
        let mut totals = Totals {
            period: PERIOD,
            last_dump: Duration::from_millis(4),
            ..Totals::default()
        };
        assert_eq!(
            describe(&totals, true, Destroy::Off),
            "a dump by ctnetlink every 0.5 s, filtered by the kernel"
        );
        totals.period = Duration::from_millis(1_740);
        totals.last_dump = Duration::from_micros(17_400);
        assert_eq!(
            describe(&totals, false, Destroy::On),
            "a dump by ctnetlink every 1.7 s, filtered by whydrop, as this kernel does not (Linux \
             before 5.18); 0.5 s would take more than 1% of a core, as a dump takes 17 ms; events \
             of destroyed entries"
        );
    }
}
