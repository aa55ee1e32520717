//! What the kernel says of a process' eBPF programs and maps, in `/proc/PID/fdinfo`.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::MapInfo;
use aya::programs::loaded_programs;
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use whydrop::source::load::fd_info;

/// A program of a process.
#[derive(Clone, Debug)]
pub struct Program {
    /// The kernel's number for it.
    pub id: u32,
    /// As the kernel knows it: the first 15 characters.
    pub name: String,
    /// The maps that it uses.
    pub maps: Vec<u32>,
    /// Runs while statistics were on.
    pub runs: u64,
    /// Time in it meanwhile.
    pub run_ns: u64,
}

/// The programs that a process holds open.
///
/// # Errors
/// There is no such process.
pub fn programs(pid: u32) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    for info in fdinfo(pid)? {
        let (Some(id), Some(runs), Some(run_ns)) = (
            info.get("prog_id"),
            info.get("run_cnt"),
            info.get("run_time_ns"),
        ) else {
            continue;
        };
        let id = u32::try_from(*id)?;
        if programs.iter().any(|program: &Program| program.id == id) {
            continue;
        }
        let known = loaded_programs()
            .filter_map(Result::ok)
            .find(|program| program.id() == id);
        programs.push(Program {
            id,
            name: known
                .as_ref()
                .and_then(|program| program.name_as_str())
                .unwrap_or_default()
                .to_owned(),
            maps: known
                .and_then(|program| program.map_ids().ok()?)
                .unwrap_or_default(),
            runs: *runs,
            run_ns: *run_ns,
        });
    }
    Ok(programs)
}

/// A map of a process.
#[derive(Clone, Debug)]
pub struct MapMemory {
    /// The first 15 characters of its name.
    pub name: String,
    /// How many elements it has room for; for a ring buffer its bytes.
    pub max_entries: u32,
    /// What it takes, as the kernel reports it.
    pub bytes: u64,
}

/// The maps of a process: those that it holds open and those that its programs use.
///
/// # Errors
/// There is no such process, or the kernel does not let this one look.
pub fn maps(pid: u32) -> Result<Vec<MapMemory>> {
    let mut ids: Vec<u32> = fdinfo(pid)?
        .iter()
        .filter_map(|info| u32::try_from(*info.get("map_id")?).ok())
        .chain(programs(pid)?.into_iter().flat_map(|program| program.maps))
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids.into_iter()
        .map(|id| {
            let info = MapInfo::from_id(id).with_context(|| format!("read of map {id}"))?;
            let fd = info.fd().with_context(|| format!("open map {id}"))?;
            Ok(MapMemory {
                name: info.name_as_str().unwrap_or_default().to_owned(),
                max_entries: info.max_entries(),
                bytes: fd_info(&fd, "memlock").context("the kernel reports no memlock of a map")?,
            })
        })
        .collect()
}

/// The numbers of every `/proc/PID/fdinfo` file.
fn fdinfo(pid: u32) -> Result<Vec<BTreeMap<String, u64>>> {
    let directory = format!("/proc/{pid}/fdinfo");
    Ok(fs::read_dir(&directory)
        .with_context(|| format!("read {directory}"))?
        .flatten()
        // One may be closed meanwhile.
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .map(|text| {
            text.lines()
                .filter_map(|line| {
                    let (name, value) = line.split_once(':')?;
                    Some((name.to_owned(), value.trim().parse().ok()?))
                })
                .collect()
        })
        .collect())
}

/// Time that a process has been on a CPU, with threads that have ended.
///
/// # Errors
/// There is no such process.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let clock =
        clock_getcpuclockid(Pid::from_raw(pid.try_into()?)).context("find the process' clock")?;
    Ok(clock.now().context("read the process' clock")?.into())
}

/// A line of `/proc/PID/status` in kB, as bytes.
///
/// # Errors
/// There is no such process or line.
pub fn status_bytes(pid: u32, field: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let kib: u64 = text
        .lines()
        .find_map(|line| {
            line.strip_prefix(field)?
                .strip_prefix(':')?
                .trim()
                .strip_suffix("kB")
        })
        .with_context(|| format!("{path} has no {field}"))?
        .trim()
        .parse()?;
    Ok(kib * 1024)
}
