//! How `--map-memory` is divided. A per-CPU value costs its size times the possible CPUs, so sizes
//! follow from a budget and the number of CPUs, never from a constant.

use anyhow::{Result, bail};
use whydrop_ebpf::attempt::{
    Answered, ClientKey, Connect, DETAILS, EndedKey, Query, QueryKey, QueryWork, TALLIES, Tally,
    TallyKey, Tuple,
};
use whydrop_ebpf::{FlowCount, FlowKey, OverflowCount, OverflowKey, PerCpu, REASONS};

/// Places in the kernel that free packets, times their reasons, protocols and kinds.
pub const OVERFLOW_ENTRIES: u32 = 1024;
/// Of the two LRU maps, as in `agent-ebpf/src/maps.rs`.
const LRU_ENTRIES: u32 = 1024;
/// What the kernel keeps for an element of a preallocated per-CPU hash beside key and value:
/// `struct htab_elem` (48 bytes) and a pointer to the per-CPU value (kernel/bpf/hashtab.c, 6.18).
const HASH_ELEMENT_BYTES: u64 = 48 + 8;
/// A bucket with its lock; there are at least as many as elements, rounded up to a power of two.
const HASH_BUCKET_BYTES: u64 = 16;
const PAGE_BYTES: u64 = 4096;

/// Sizes of the kernel maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Budget {
    /// Keys in each of the two flow maps.
    pub flows: u32,
    /// Keys in the overflow map.
    pub overflow: u32,
    /// The ring buffer's size.
    pub ring_bytes: u32,
    /// TCP sockets that can be in SYN_SENT at once.
    pub connects: u32,
    /// Connects that can end unanswered or given up between two looks of the agent's.
    pub ended: u32,
    /// DNS queries that can wait at once.
    pub queries: u32,
    /// Keys in each of the two maps of what became of attempts.
    pub tallies: u32,
    /// Possible CPUs.
    pub cpus: usize,
    /// What all maps together take, as computed here.
    pub total_bytes: u64,
}

impl Budget {
    /// Divides `bytes` on a machine with `cpus` possible CPUs.
    ///
    /// Error: the budget is too small for the fixed maps and 64 flows.
    pub fn new(bytes: u64, cpus: usize) -> Result<Self> {
        // A sixteenth, so that events never take the place of counts: at most 8 MiB, which is
        // 16,000 events and over a second of what the programs may send.
        let ring = (bytes / 16).clamp(PAGE_BYTES, 8 << 20);
        let ring = 1u64 << ring.ilog2();
        let fixed = Self::fixed_bytes(cpus) + ring_bytes(ring);
        // An eighth each for what waits, whose values are not per CPU; a thirty-second for what became
        // of it. The rest is for flows, of which a flood makes most.
        let least = fixed + 2 * hash_bytes::<FlowKey, FlowCount>(64, cpus);
        let free = bytes.saturating_sub(least);
        let connects = largest(free / 8, connect_bytes);
        let queries = largest(free / 8, plain_hash_bytes::<QueryKey, Query>);
        let tallies = largest(free / 64, plain_hash_bytes::<TallyKey, Tally>);
        let attempts = connect_bytes(connects)
            + plain_hash_bytes::<QueryKey, Query>(queries)
            + 2 * plain_hash_bytes::<TallyKey, Tally>(tallies);
        let available = bytes.saturating_sub(fixed + attempts) / 2;
        let flows = largest(available, |n| hash_bytes::<FlowKey, FlowCount>(n, cpus));
        if flows < 64 || connects < 64 || queries < 64 || tallies < 16 {
            let needed = [
                connect_bytes(64) * 8,
                plain_hash_bytes::<QueryKey, Query>(64) * 8,
                plain_hash_bytes::<TallyKey, Tally>(16) * 64,
            ];
            bail!(
                "--map-memory {bytes} bytes is too small for {cpus} possible CPUs: \
                 give at least {} bytes",
                // The ring is a sixteenth of it.
                (least + needed.into_iter().max().unwrap_or(0)) * 16 / 15
            );
        }
        Ok(Self {
            flows,
            overflow: OVERFLOW_ENTRIES,
            ring_bytes: u32::try_from(ring).unwrap_or(u32::MAX),
            connects,
            ended: ended(connects),
            queries,
            tallies,
            cpus,
            total_bytes: fixed + attempts + 2 * hash_bytes::<FlowKey, FlowCount>(flows, cpus),
        })
    }

    /// Everything but flow maps and ring buffer.
    fn fixed_bytes(cpus: usize) -> u64 {
        let per_cpu = |bytes: usize| (bytes.next_multiple_of(8) * cpus) as u64;
        hash_bytes::<OverflowKey, OverflowCount>(OVERFLOW_ENTRIES, cpus)
            + per_cpu(REASONS * 8)
            + (REASONS * 8) as u64
            + per_cpu(size_of::<PerCpu>())
            + per_cpu(size_of::<QueryWork>())
            + plain_hash_bytes::<ClientKey, u64>(LRU_ENTRIES)
            + plain_hash_bytes::<QueryKey, Answered>(LRU_ENTRIES)
            + per_cpu(TALLIES * DETAILS * size_of::<Tally>())
            + ring_bytes(64 * 1024)
            // Control, read-only data, and the log's ring at its smallest: a few pages each.
            + 16 * PAGE_BYTES
    }

    /// How many events one CPU may send in a window of 100 ms: together 5,000 a second, more
    /// than anyone reads, and a hundredth of what a drop costs in a flood; never fewer than 10.
    pub fn events_per_cpu(&self) -> u32 {
        u32::try_from(500 / self.cpus.max(1)).unwrap_or(0).max(10)
    }
}

/// The largest number of entries that costs no more than `available` bytes. Buckets are a power of
/// two, so the cost is no smooth function of it, but it only grows.
fn largest(available: u64, cost: impl Fn(u32) -> u64) -> u32 {
    let (mut low, mut high) = (0u32, 1 << 24);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if cost(middle) <= available {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

/// Connects that can end between two looks of the agent's, of those that wait.
fn ended(connects: u32) -> u32 {
    connects / 2
}

/// Keys of a connect in `SYNS`: its ends before and after a NAT of its own namespace.
pub(super) const SYNS_A_CONNECT: u32 = 2;

/// The three maps of connects.
fn connect_bytes(connects: u32) -> u64 {
    plain_hash_bytes::<u64, Connect>(connects)
        + plain_hash_bytes::<Tuple, u64>(connects.saturating_mul(SYNS_A_CONNECT))
        + plain_hash_bytes::<EndedKey, Connect>(ended(connects))
}

/// A preallocated hash whose values are not per CPU: `struct htab_elem` ends in key and value.
fn plain_hash_bytes<K, V>(entries: u32) -> u64 {
    let element = size_of::<K>().next_multiple_of(8) + size_of::<V>().next_multiple_of(8);
    u64::from(entries).next_power_of_two() * HASH_BUCKET_BYTES
        + u64::from(entries) * (HASH_ELEMENT_BYTES + element as u64)
}

/// A preallocated per-CPU hash. The kernel allocates one spare element a CPU.
fn hash_bytes<K, V>(entries: u32, cpus: usize) -> u64 {
    let elements = u64::from(entries) + cpus as u64;
    let value = size_of::<V>().next_multiple_of(8) * cpus;
    u64::from(entries).next_power_of_two() * HASH_BUCKET_BYTES
        + elements * (HASH_ELEMENT_BYTES + size_of::<K>().next_multiple_of(8) as u64 + value as u64)
}

/// A ring buffer maps its data twice but allocates it once, with three pages beside.
fn ring_bytes(size: u64) -> u64 {
    size + 3 * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_within_the_budget_on_any_number_of_cpus() {
        for mib in [1u64, 2, 8, 32, 128, 1024] {
            for cpus in [1usize, 2, 3, 8, 64, 128, 512] {
                let Ok(budget) = Budget::new(mib << 20, cpus) else {
                    assert!(mib < 32, "32 MiB must do for {cpus} CPUs");
                    continue;
                };
                assert!(
                    budget.total_bytes <= mib << 20,
                    "{mib} MiB, {cpus} CPUs: {budget:?}"
                );
                assert!(budget.flows >= 64);
            }
        }
    }

    #[test]
    fn uses_the_budget() {
        let budget = Budget::new(32 << 20, 2).expect("enough");
        assert!(budget.total_bytes > 24 << 20, "{budget:?}");
        assert!(budget.flows > 40_000, "{budget:?}");
        assert!(budget.connects > 6_000, "{budget:?}");
        assert!(budget.queries > 7_000, "{budget:?}");
        let budget = Budget::new(32 << 20, 128).expect("enough");
        assert!(budget.flows > 2_000, "{budget:?}");
        assert!(budget.connects > 5_000, "{budget:?}");
    }

    #[test]
    fn too_small_says_what_is_needed() {
        let error = Budget::new(10_000, 2).expect_err("too small").to_string();
        let bytes: u64 = error
            .split_ascii_whitespace()
            .rev()
            .find_map(|word| word.parse().ok())
            .expect("names a size");
        Budget::new(bytes, 2).expect("the size that it names is enough");
    }
}
