//! What an agent has in the kernel: its programs, maps and links, by the kernel's own ids.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::agent::POLL;

/// The kernel frees maps and programs after a grace period, on a machine with other work.
const DEADLINE: Duration = Duration::from_secs(5);

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
