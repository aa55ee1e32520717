//! What a process may take and has taken: the manifest's limit, a cgroup that has it, and the kernel's
//! figures.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// The limit of the agent's container in deploy/base.
///
/// # Errors
/// The manifest has none.
pub fn manifest_limit_bytes() -> Result<u64> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/base/daemonset.yaml");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let limits = text.split_once("limits:").context("no limits")?.1;
    let memory = limits
        .split_once("memory:")
        .context("no limit of memory")?
        .1;
    let memory = memory.lines().next().unwrap_or_default().trim();
    let mebibytes = memory.strip_suffix("Mi").context("not in Mi")?;
    Ok(mebibytes.parse::<u64>()? << 20)
}

/// The most memory that a process had at once, without what the kernel has for it.
///
/// # Errors
/// It has ended.
pub fn peak_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next());
    Ok(kibibytes.context("no VmHWM")?.parse::<u64>()? << 10)
}

/// A cgroup with a limit of memory, as a container has one; removed when it is dropped.
pub struct Limited {
    path: PathBuf,
    version: Version,
}

#[derive(Clone, Copy)]
enum Version {
    One,
    Two,
}

impl Limited {
    /// `None` where this machine lets us make none.
    ///
    /// # Errors
    /// It can be made and not be limited.
    pub fn new(name: &str, limit_bytes: u64) -> Result<Option<Self>> {
        let unified = Path::new("/sys/fs/cgroup");
        let offers = fs::read_to_string(unified.join("cgroup.subtree_control"));
        let is_offered = offers.is_ok_and(|text| text.split_whitespace().any(|c| c == "memory"));
        let (above, version) = if is_offered {
            (unified.to_owned(), Version::Two)
        } else {
            (unified.join("memory"), Version::One)
        };
        let path = above.join(name);
        if !above.join("cgroup.procs").exists() || fs::create_dir(&path).is_err() {
            return Ok(None);
        }
        let limited = Self { path, version };
        let file = limited.pick("memory.limit_in_bytes", "memory.max");
        fs::write(limited.path.join(file), limit_bytes.to_string())
            .with_context(|| format!("limit {}", limited.path.display()))?;
        Ok(Some(limited))
    }

    /// The shell command that puts itself in and becomes another one.
    pub fn enter(&self) -> String {
        let path = self.path.display();
        format!("echo $$ > {path}/cgroup.procs && exec \"$@\"")
    }

    /// The most that was taken at once, maps and page cache with it, and how many processes were killed for
    /// taking more.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn peak_bytes_and_kills(&self) -> Result<(u64, u64)> {
        let read = |file| fs::read_to_string(self.path.join(file)).context(file);
        let peak = read(self.pick("memory.max_usage_in_bytes", "memory.peak"))?;
        let events = read(self.pick("memory.oom_control", "memory.events"))?;
        let kills = events
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "));
        let kills = kills.context("no oom_kill")?;
        Ok((peak.trim().parse()?, kills.trim().parse()?))
    }

    /// Whether a process is in it.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn ensure_has(&self, pid: u32) -> Result<()> {
        let all = fs::read_to_string(self.path.join("cgroup.procs"))?;
        let pid = pid.to_string();
        ensure!(
            all.lines().any(|line| line == pid),
            "{pid} is not in {all:?}"
        );
        Ok(())
    }

    fn pick(&self, one: &'static str, two: &'static str) -> &'static str {
        match self.version {
            Version::One => one,
            Version::Two => two,
        }
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("remove {}: {error}", self.path.display());
        }
    }
}
