//! Counting what became of attempts, by who made them.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::maps::HashMap;
use whydrop_ebpf::attempt::{DETAILS, Tally, TallyKey};

use crate::access::atomic_add;
use crate::maps::{CONTROL, CPU, TALLIES_0, TALLIES_1, TALLIES_OTHER};

/// Adds `count` (1, or -1 as it wraps, to take one back) and its latency.
#[inline(never)]
pub fn add(key: &TallyKey, count: u64, latency_ns: u64) -> u32 {
    let (Some(own), Some(control)) = (CPU.get_ptr_mut(0), CONTROL.get_ptr(0)) else {
        return 0; // These elements always exist.
    };
    unsafe { (*own).cpu.attempts.tallied += 1 };
    let generation = unsafe { (&raw const (*control).generation).read_volatile() };
    let found = if generation & 1 == 0 {
        find(&TALLIES_0, key)
    } else {
        find(&TALLIES_1, key)
    };
    let index = u32::from(key.what) * DETAILS as u32 + u32::from(key.detail);
    let Some(tally) = found.or_else(|| TALLIES_OTHER.get_ptr_mut(index)) else {
        return 0;
    };
    unsafe {
        atomic_add(&raw mut (*tally).count, count);
        if latency_ns != 0 {
            atomic_add(&raw mut (*tally).sum_ns, latency_ns);
        }
    }
    1
}

#[inline(always)]
fn find(tallies: &HashMap<TallyKey, Tally>, key: &TallyKey) -> Option<*mut Tally> {
    tallies.get_ptr_mut(key).or_else(|| {
        // Another CPU may be first, or the map be full.
        let _ = tallies.insert(key, Tally::default(), BPF_NOEXIST.into());
        tallies.get_ptr_mut(key)
    })
}
