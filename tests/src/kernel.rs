//! What the running kernel can do, and what an agent has in it: programs and maps, by the kernel's own
//! ids.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::agent::POLL;
use crate::lab::command;

/// The kernel frees maps and programs after a grace period, on a machine with other work.
const DEADLINE: Duration = Duration::from_secs(30);

/// Ids of what one process holds. Each is given once: an id that is gone does not come back.
#[derive(Debug)]
pub struct Held {
    programs: BTreeSet<u32>,
    maps: BTreeSet<u32>,
}

impl Held {
    /// What a process holds by its file descriptors.
    ///
    /// # Errors
    /// There is no such process, or it holds no program and no map.
    pub fn by(pid: u32) -> Result<Self> {
        let (mut programs, mut maps) = (BTreeSet::new(), BTreeSet::new());
        let path = format!("/proc/{pid}/fdinfo");
        for entry in fs::read_dir(&path).with_context(|| format!("read {path}"))? {
            // A descriptor that was closed meanwhile.
            let Ok(text) = fs::read_to_string(entry?.path()) else {
                continue;
            };
            for line in text.lines() {
                let Some((name, value)) = line.split_once(':') else {
                    continue;
                };
                let Ok(id) = value.trim().parse() else {
                    continue;
                };
                match name {
                    "prog_id" => programs.insert(id),
                    "map_id" => maps.insert(id),
                    _ => continue,
                };
            }
        }
        ensure!(
            !programs.is_empty() && !maps.is_empty(),
            "process {pid} holds no program or no map: {programs:?} {maps:?}"
        );
        Ok(Self { programs, maps })
    }

    /// Waits until the kernel has none of it any more. What is pinned or attached elsewhere stays.
    ///
    /// # Errors
    /// Something is still there.
    pub fn wait_gone(&self) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let programs: Vec<u32> = aya::programs::loaded_programs()
                .filter_map(|program| Some(program.ok()?.id()))
                .filter(|id| self.programs.contains(id))
                .collect();
            let maps: Vec<u32> = aya::maps::loaded_maps()
                .filter_map(|map| Some(map.ok()?.id()))
                .filter(|id| self.maps.contains(id))
                .collect();
            if programs.is_empty() && maps.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the kernel still has programs {programs:?} and maps {maps:?}"
            );
            std::thread::sleep(POLL);
        }
    }
}

/// Ends a test that this kernel cannot run. Says so on standard error itself, which libtest does not
/// hide, and in the form that `cargo xtask test vm` reads.
///
/// # Errors
/// Standard error is closed.
pub fn left_out(why: &str) -> Result<()> {
    let thread = std::thread::current();
    // libtest names a test's thread after the test.
    let name = thread.name().unwrap_or_default();
    writeln!(std::io::stderr(), "left out: {name}: {why}")?;
    Ok(())
}

/// Whether the kernel says why it drops: since 5.17, where no distribution took it back to an older one.
pub fn has_drop_reasons() -> bool {
    static ANSWER: LazyLock<bool> = LazyLock::new(|| {
        let types = fs::read("/sys/kernel/btf/vmlinux").unwrap_or_default();
        let name = b"SKB_DROP_REASON_NOT_SPECIFIED\0";
        types.windows(name.len()).any(|window| window == name)
    });
    *ANSWER
}

/// Why a test of [`has_nft_egress`] is left out.
pub const NO_NFT_EGRESS: &str = "the kernel has no hook for nft at a device's egress";

/// Whether nft can have a chain at the egress of a device (since 5.16), by the kernel's own answer.
///
/// # Errors
/// nft cannot be run, or fails for another reason than that it is not supported.
pub fn has_nft_egress() -> Result<bool> {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    if let Some(known) = ANSWER.get() {
        return Ok(*known);
    }
    let answer = probe_nft_egress()?;
    Ok(*ANSWER.get_or_init(|| answer))
}

fn probe_nft_egress() -> Result<bool> {
    // In a namespace of its own, not in a lab: whoever asks may keep all other labs out.
    let chain = "table netdev probe { chain c { type filter hook egress device lo priority 0; }\n}";
    match command(&["unshare", "--net", "nft", "-f", "-"], Some(chain)) {
        Ok(_) => Ok(true),
        Err(error) if format!("{error:#}").contains("Operation not supported") => Ok(false),
        Err(error) => Err(error),
    }
}
