//! Reading kernel memory: the only two ways that exist; and adding to what all CPUs write.

use core::intrinsics::{AtomicOrdering, atomic_xadd};
use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;

/// Reads a field of a kernel struct.
///
/// `TYPED`: the verifier knows what `base` points to (`tp_btf`), so a plain load does, and the
/// kernel handles a fault. Otherwise (`raw_tp`) a helper is called. A field that cannot be read is
/// zero either way.
///
/// # Safety
/// `base` comes from the program's context or from another `field`; `offset` from BTF.
#[inline(always)]
pub unsafe fn field<T: Copy, const TYPED: bool>(base: *const u8, offset: u32) -> T {
    unsafe {
        let address = base.add(offset as usize).cast::<T>();
        if TYPED {
            core::ptr::read_volatile(address)
        } else {
            let mut value = MaybeUninit::<T>::uninit();
            bpf_probe_read_kernel(
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
                address.cast(),
            );
            value.assume_init()
        }
    }
}

/// Copies bytes from anywhere in kernel memory; false (and zeroes) if they cannot be read.
///
/// # Safety
/// None for the kernel: the helper survives any address. `T` must be valid for any bytes.
#[inline(always)]
pub unsafe fn copy<T>(to: &mut T, address: u64) -> bool {
    unsafe {
        bpf_probe_read_kernel(
            (&raw mut *to).cast(),
            size_of::<T>() as u32,
            address as *const _,
        ) == 0
    }
}

/// Copies bytes from anywhere in kernel memory to a place that nobody has zeroed: for what is large,
/// because that takes one more function, whose stack counts. `None` if they cannot be read.
///
/// # Safety
/// As [`copy`].
#[inline(always)]
pub unsafe fn copied<T: Copy>(to: &mut MaybeUninit<T>, address: u64) -> Option<&T> {
    unsafe {
        let len = size_of::<T>() as u32;
        let result = bpf_probe_read_kernel(to.as_mut_ptr().cast(), len, address as *const _);
        // The helper zeroes what it cannot read.
        (result == 0).then(|| to.assume_init_ref())
    }
}

/// Adds to a map's value that several CPUs write.
///
/// The intrinsic, because `AtomicU64` has no `fetch_add` on a target without compare-and-swap.
/// Relaxed and its result not used: so it becomes the one atomic instruction that kernels before 5.12
/// have.
///
/// # Safety
/// `to` is a map's value.
#[inline(always)]
pub unsafe fn atomic_add(to: *mut u64, change: u64) {
    let _ = unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(to, change) };
}
