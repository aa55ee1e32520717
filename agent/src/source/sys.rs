//! The only `unsafe` of the agent: what aya 0.14 has no call for.
//!
//! - plain-old-data wrappers for the types shared with the programs,
//! - batch map calls, which read a map 12 times faster than one call a key,
//! - `membarrier`, to know that no program still writes to the drained map,
//! - `mallopt` and `malloc_trim`, because reading BTF leaves a large heap behind.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use whydrop_ebpf::attempt::{
    ClientKey, Connect, Died, EndedKey, Query, QueryKey, Settings, Swept, Tally, TallyKey,
};
use whydrop_ebpf::{
    Control, DropEvent, FlowCount, FlowKey, Offsets, OverflowCount, OverflowKey, PerCpu, REASONS,
};

/// A type that the kernel's bytes can be read as.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct Plain<T>(pub T);

// SAFETY: these types are repr(C) of integers and byte arrays without padding (their sizes are
// asserted in whydrop-ebpf), so any bytes are a value.
unsafe impl aya::Pod for Plain<Control> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<PerCpu> {}
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
// SAFETY: a number.
unsafe impl aya::Pod for Plain<u64> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<ClientKey> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Connect> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Died> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<EndedKey> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Query> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<QueryKey> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Settings> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Swept> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Tally> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<TallyKey> {}

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

/// `enum bpf_cmd` (include/uapi/linux/bpf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// `BPF_MAP_LOOKUP_BATCH`.
    Read = 24,
    /// `BPF_MAP_LOOKUP_AND_DELETE_BATCH`.
    Take = 25,
}

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

/// Reads every key of a hash map, and deletes it if `how` says so, in calls of up to `chunk` keys.
/// `found` gets the key and its values: one, or for a per-CPU map one for each of `cpus`, the number
/// of possible CPUs. The sizes of `K` and `V` must be those of the map, `V`'s a multiple of 8.
///
/// Errors: what the kernel says; what had been read by then has been handed to `found`.
pub fn batch<K, V>(
    map: BorrowedFd<'_>,
    how: Batch,
    cpus: usize,
    chunk: usize,
    mut found: impl FnMut(K, &mut dyn Iterator<Item = V>),
) -> io::Result<()>
where
    Plain<K>: aya::Pod,
    Plain<V>: aya::Pod,
{
    const { assert!(size_of::<V>().is_multiple_of(8)) };
    let (key_len, value_len) = (size_of::<K>(), size_of::<V>());
    let mut keys = vec![0u8; chunk * key_len];
    let mut values = vec![0u8; chunk * value_len * cpus];
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
        // elements (a per-CPU value is rounded up to 8 bytes, which V's size is a multiple of); the
        // positions of a hash map are 4 bytes.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                how as libc::c_long,
                &raw mut attr,
                size_of::<BatchAttr>(),
            )
        };
        let error = (result < 0).then(io::Error::last_os_error);
        // Whatever went wrong after the first key was deleted, `count` says how many there were.
        let refused = [libc::EFAULT, libc::EINVAL, libc::EPERM, libc::EBADF];
        let error = match error.as_ref().and_then(io::Error::raw_os_error) {
            Some(code) if refused.contains(&code) => {
                return Err(io::Error::from_raw_os_error(code));
            }
            Some(libc::ENOENT) => None,
            _ => error,
        };
        let ended = result < 0 && error.is_none();
        for i in 0..(attr.count as usize).min(chunk) {
            let Some(key) = read::<K>(&keys[i * key_len..]) else {
                continue;
            };
            let of_key = &values[i * cpus * value_len..][..cpus * value_len];
            found(key, &mut of_key.chunks_exact(value_len).filter_map(read));
        }
        if let Some(error) = error {
            return Err(error);
        }
        if ended {
            return Ok(());
        }
        position = next;
        started = true;
    }
}

/// Deletes a key of a map. The size of `K` must be that of the map's keys.
///
/// # Errors
/// What the kernel says; `ENOENT` if it is not there.
pub fn delete<K>(map: BorrowedFd<'_>, key: &K) -> io::Result<()>
where
    Plain<K>: aya::Pod,
{
    const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
    /// `union bpf_attr`, the part for single elements.
    #[repr(C)]
    struct Attr {
        map_fd: u32,
        pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let mut attr = Attr {
        map_fd: map.as_raw_fd().cast_unsigned(),
        pad: 0,
        key: std::ptr::from_ref(key) as u64,
        value: 0,
        flags: 0,
    };
    // SAFETY: the attribute is the kernel's layout, and the key is as long as the map's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_MAP_DELETE_ELEM,
            &raw mut attr,
            size_of::<Attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// `CLOCK_BOOTTIME` in nanoseconds, as the programs read it.
pub fn boot_ns() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    let time = time.map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
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

/// Gives memory back to the system that is free, and the pages of the program that only the start
/// needed: half of it. Those that are used come back by themselves.
pub fn release_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers, and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
    let own = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (start, end) in read_only(&maps, &own.to_string_lossy()) {
        // SAFETY: a hint that changes no content, for a mapping of this process; memory that is no
        // more mapped is refused. Before Linux 5.4 it is not known, and refused as well.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_PAGEOUT);
        }
    }
}

/// The mappings of a file that are not written to, in `/proc/PID/maps`.
fn read_only<'a>(maps: &'a str, file: &'a str) -> impl Iterator<Item = (usize, usize)> + 'a {
    maps.lines().filter_map(move |line| {
        let mut words = line.split_ascii_whitespace();
        let (range, rights) = (words.next()?, words.next()?);
        let is_own = words.nth(3)? == file && !file.is_empty();
        if !is_own || rights.contains('w') {
            return None;
        }
        let (start, end) = range.split_once('-')?;
        let address = |text| usize::from_str_radix(text, 16).ok();
        Some((address(start)?, address(end)?)).filter(|(start, end)| start < end)
    })
}
