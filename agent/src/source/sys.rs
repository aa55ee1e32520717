//! The only `unsafe` of the agent: what aya 0.14 has no call for.
//!
//! - plain-old-data wrappers for the types shared with the programs,
//! - `BPF_MAP_LOOKUP_AND_DELETE_BATCH`, which drains a map 12 times faster than one call a key,
//! - `membarrier`, to know that no program still writes to the drained map,
//! - `mallopt` and `malloc_trim`, because reading BTF leaves a large heap behind.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use whydrop_ebpf::{
    Control, Cpu, DropEvent, FlowCount, FlowKey, Offsets, OverflowCount, OverflowKey, REASONS,
};

/// A type that the kernel's bytes can be read as.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct Plain<T>(pub T);

// SAFETY: these types are repr(C) of integers and byte arrays without padding (their sizes are
// asserted in whydrop-ebpf), so any bytes are a value.
unsafe impl aya::Pod for Plain<Control> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Cpu> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<DropEvent> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<FlowCount> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<FlowKey> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Offsets> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<OverflowCount> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<OverflowKey> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<[u8; REASONS]> {}

/// Copies a value out of bytes that need not be aligned; `None` if there are too few.
pub fn read<T>(bytes: &[u8]) -> Option<T>
where
    Plain<T>: aya::Pod,
{
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: there are enough bytes, any bytes are a value of a Pod type, and the read is unaligned.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

const BPF_MAP_LOOKUP_AND_DELETE_BATCH: libc::c_long = 25;

/// `union bpf_attr`, the part for batches (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Reads and deletes every key of a per-CPU flow map, in calls of up to `chunk` keys; `found` gets
/// the key and its counts summed over `cpus`, the number of possible CPUs.
///
/// Errors: what the kernel says; what had been read by then has been handed to `found`.
pub fn drain_flows(
    map: BorrowedFd<'_>,
    cpus: usize,
    chunk: usize,
    mut found: impl FnMut(FlowKey, FlowCount),
) -> io::Result<()> {
    const KEY: usize = size_of::<FlowKey>();
    const VALUE: usize = size_of::<FlowCount>();
    let mut keys = vec![0u8; chunk * KEY];
    let mut values = vec![0u8; chunk * VALUE * cpus];
    let mut position = 0u32;
    let mut started = false;
    loop {
        let mut next = 0u32;
        let mut attr = BatchAttr {
            in_batch: if started {
                &raw const position as u64
            } else {
                0
            },
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(chunk).unwrap_or(u32::MAX),
            map_fd: map.as_raw_fd().cast_unsigned(),
            ..BatchAttr::default()
        };
        // SAFETY: the attribute is the kernel's layout; keys and values have room for `count`
        // elements (a per-CPU value is rounded up to 8 bytes, FlowCount is 16, times the possible
        // CPUs); the positions of a hash map are 4 bytes.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_LOOKUP_AND_DELETE_BATCH,
                &raw mut attr,
                size_of::<BatchAttr>(),
            )
        };
        let error = (result < 0).then(io::Error::last_os_error);
        let ended = error.as_ref().and_then(io::Error::raw_os_error) == Some(libc::ENOENT);
        if let Some(error) = error.filter(|_| !ended) {
            return Err(error);
        }
        for i in 0..(attr.count as usize).min(chunk) {
            let Some(key) = read::<FlowKey>(&keys[i * KEY..]) else {
                continue;
            };
            let mut sum = FlowCount::default();
            for cpu in 0..cpus {
                if let Some(count) = read::<FlowCount>(&values[(i * cpus + cpu) * VALUE..]) {
                    sum.packets += count.packets;
                    sum.told_named += count.told_named;
                    sum.told_seen += count.told_seen;
                }
            }
            found(key, sum);
        }
        if ended {
            return Ok(());
        }
        position = next;
        started = true;
    }
}

/// Waits until every CPU has passed a point where no program of before the call is running.
pub fn wait_for_programs() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_long = 1;
    // SAFETY: the call takes no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Makes the allocator give large blocks back as soon as they are freed; to be called first.
///
/// Reading BTF takes some 25 MB for a moment. glibc raises its threshold for separate mappings with
/// each large block that is freed, keeps later ones on the heap, and small blocks between them then
/// hold the pages: 28 MB resident instead of 18. A fixed threshold stays where it is.
pub fn keep_heap_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers, and may be called at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
    }
}

/// Gives memory that is free back to the system.
pub fn release_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers, and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
