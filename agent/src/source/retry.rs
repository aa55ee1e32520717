//! Trying again to attach what could not be attached at start: a kprobe in a module that is loaded
//! later, a right that was given meanwhile.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::Ebpf;

use super::hooks::{self, Attach, HOOKS, SourceStatus};

/// How long the thread sleeps before it looks whether it is to end.
const TICK: Duration = Duration::from_millis(200);
/// The first attempt after the start.
const FIRST: Duration = Duration::from_secs(1);
/// Later ones wait twice as long each, up to this.
const LONGEST: Duration = Duration::from_secs(60);

/// A source that works now: its status, its program's name and file descriptor.
pub struct Attached {
    /// What to show.
    pub status: SourceStatus,
    /// As in the eBPF object.
    pub program: &'static str,
    /// To read what the kernel says of it.
    pub fd: Option<OwnedFd>,
}

/// Starts a thread that owns the programs and tries `missing` again, by the ways that need no BTF,
/// until all are attached or `stop` is set. It gives the programs back: dropping them detaches them.
///
/// # Errors
/// The thread cannot be started.
pub fn start(
    mut ebpf: Ebpf,
    missing: Vec<&'static str>,
    how: Attach,
    stop: Arc<AtomicBool>,
    attached: impl Fn(Attached) + Send + 'static,
) -> std::io::Result<JoinHandle<Ebpf>> {
    std::thread::Builder::new()
        .name("hooks".to_owned())
        .spawn(move || {
            let mut missing: Vec<_> = HOOKS
                .iter()
                .filter(|hook| missing.contains(&hook.source))
                .collect();
            let (mut wait, mut last) = (FIRST, Instant::now());
            while !missing.is_empty() && !stop.load(Ordering::Relaxed) {
                std::thread::sleep(TICK);
                if last.elapsed() < wait {
                    continue;
                }
                missing.retain(|hook| match hooks::attach(&mut ebpf, hook, how, None) {
                    Ok(found) => {
                        attached(Attached {
                            status: hook.status(Ok(found.hook)),
                            program: found.program,
                            fd: hooks::program_fd(&ebpf, found.program),
                        });
                        false
                    }
                    Err(why) => {
                        tracing::debug!(source = hook.source, why, "still not attached");
                        true
                    }
                });
                wait = (wait * 2).min(LONGEST);
                last = Instant::now();
            }
            ebpf
        })
}
