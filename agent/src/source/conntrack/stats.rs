//! What the kernel says of its conntrack table as a whole.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// Use, limit and counters of the conntrack table, of the network namespace of the thread that reads
/// them. What this kernel does not show is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConntrackStats {
    /// Entries of this namespace.
    pub entries: Option<u64>,
    /// How many it may have.
    pub limit: Option<u64>,
    /// Packets dropped because the table was full, or no memory was left.
    pub drop: Option<u64>,
    /// Entries evicted to make room.
    pub early_drop: Option<u64>,
    /// Entries that could not be inserted, as when another packet of the same tuple was first; their
    /// packets are dropped.
    pub insert_failed: Option<u64>,
    /// Packets that fit no connection and begin none.
    pub invalid: Option<u64>,
}

/// Reads them; `proc` is where procfs is mounted.
///
/// The counters are those of `/proc/net/stat/nf_conntrack` (nf_conntrack_standalone.c), whose columns
/// differ between kernels, as hexadecimal numbers of 32 bits for each CPU.
pub fn stats(proc: &Path) -> ConntrackStats {
    // /proc/net is that of the process' first thread; this is that of the one that asks, as
    // /proc/sys is.
    let text = fs::read_to_string(proc.join("thread-self/net/stat/nf_conntrack"));
    let text = text.unwrap_or_default();
    let sums = sums(&text);
    let sum = |column| sums.get(column).copied();
    ConntrackStats {
        entries: entries(proc),
        limit: sysctl(proc, "nf_conntrack_max"),
        drop: sum("drop"),
        early_drop: sum("early_drop"),
        insert_failed: sum("insert_failed"),
        invalid: sum("invalid"),
    }
}

/// Entries of the thread's network namespace; `None` where conntrack is not loaded.
pub(super) fn entries(proc: &Path) -> Option<u64> {
    sysctl(proc, "nf_conntrack_count")
}

/// A number of `/proc/sys/net/netfilter`; `None` where this kernel has none of that name.
pub(super) fn sysctl(proc: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(proc.join("sys/net/netfilter").join(name)).ok()?;
    text.trim().parse().ok()
}

/// Each column's sum over the CPUs. A column with anything else than numbers in it is left out.
fn sums(text: &str) -> HashMap<&str, u64> {
    let mut lines = text.lines();
    let names: Vec<&str> = lines
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let cpus: Vec<Vec<&str>> = lines
        .map(|line| line.split_whitespace().collect())
        .collect();
    if cpus.is_empty() {
        return HashMap::new();
    }
    let sum = |column: usize| -> Option<u64> {
        let values = cpus
            .iter()
            .map(|cpu| u64::from_str_radix(cpu.get(column)?, 16).ok());
        values.sum()
    };
    let columns = names.into_iter().enumerate();
    columns
        .filter_map(|(column, name)| Some((name, sum(column)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two CPUs of Linux 6.18, with numbers put in.
    const LINUX_6_18: &str = "\
entries  clashres found new invalid ignore delete chainlength insert insert_failed drop early_drop icmp_error  expect_new expect_create expect_delete search_restart
00000008  00000000 00000000 00000000 0000000a 00000000 00000000 00000000 00000000 00000001 0000001f 00000002 00000000  00000000 00000000 00000000 00000000
00000008  00000000 00000000 00000000 000000f0 00000000 00000000 00000000 00000000 00000002 ffffffff 00000000 00000000  00000000 00000000 00000000 00000000
";
    /// Linux 5.4 and before: other columns, in another order.
    const LINUX_5_4: &str = "\
entries  searched found new invalid ignore delete delete_list insert insert_failed drop early_drop icmp_error  expect_new expect_create expect_delete search_restart
00000008  00000000 00000000 00000000 00000003 00000000 00000000 00000000 00000000 00000004 00000005 00000006 00000000  00000000 00000000 00000000 00000000
";

    fn proc(files: &[(&str, &str)]) -> tempfile::TempDir {
        let proc = tempfile::tempdir().expect("a directory");
        for (path, text) in files {
            let path = proc.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
            fs::write(path, text).expect("a file");
        }
        proc
    }

    #[test]
    fn counters_are_summed_over_the_cpus() {
        let proc = proc(&[
            ("thread-self/net/stat/nf_conntrack", LINUX_6_18),
            ("sys/net/netfilter/nf_conntrack_count", "8\n"),
            ("sys/net/netfilter/nf_conntrack_max", "262144\n"),
        ]);
        let expected = ConntrackStats {
            entries: Some(8),
            limit: Some(262_144),
            drop: Some(0x1f + 0xffff_ffff),
            early_drop: Some(2),
            insert_failed: Some(3),
            invalid: Some(0xfa),
        };
        assert_eq!(stats(proc.path()), expected);
    }

    #[test]
    fn columns_go_by_their_names() {
        let sums = sums(LINUX_5_4);
        assert_eq!(sums["searched"], 0);
        assert_eq!(
            ["invalid", "insert_failed", "drop", "early_drop"].map(|name| sums[name]),
            [3, 4, 5, 6]
        );
    }

    #[test]
    fn what_is_not_there_is_not_zero() {
        assert_eq!(stats(proc(&[]).path()), ConntrackStats::default());
        // A header without CPUs, a line that ends early, and what is no number.
        assert_eq!(sums("entries drop\n"), HashMap::new());
        assert_eq!(
            sums("entries drop\n00000001 00000002\n00000001\n"),
            [("entries", 2)].into()
        );
        assert_eq!(sums("entries drop\n00000001 -\n"), [("entries", 1)].into());
        assert_eq!(sums(""), HashMap::new());
    }

    #[test]
    fn this_kernel_shows_what_it_has() {
        let here = Path::new("/proc");
        let stats = stats(here);
        let is_loaded = here.join("sys/net/netfilter/nf_conntrack_count").exists();
        assert_eq!(stats.entries.is_some(), is_loaded);
        assert_eq!(stats.limit.is_some(), is_loaded);
        let has_file = here.join("thread-self/net/stat/nf_conntrack").exists();
        assert_eq!(stats.drop.is_some(), has_file);
        assert_eq!(stats.early_drop.is_some(), has_file);
    }
}
