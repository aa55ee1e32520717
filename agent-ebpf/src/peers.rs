//! What the benchmarks and labs hold the programs against: the cost of running any program at all,
//! the cost of the least that answers "which flow", and a count that somebody else keeps.
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    reason = "the program macros make public functions without their comments"
)]
#![allow(unused_unsafe, reason = "`offset!` reads a static wherever it stands")]

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{PerCpuArray, PerCpuHashMap};
use aya_ebpf::programs::BtfTracePointContext;
use whydrop_ebpf::Offsets;

/// Set by the loader, as for the real programs.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::NONE;

macro_rules! offset {
    ($field:ident) => {
        unsafe { core::ptr::read_volatile(&raw const OFFSETS.$field) as usize }
    };
}

/// A 5-tuple of either family.
#[repr(C)]
#[derive(Clone, Copy)]
struct Tuple {
    source: [u8; 16],
    destination: [u8; 16],
    ports: u32,
    protocol: u32,
}

/// As many as the benchmark's flows and then some.
#[map]
static TUPLES: PerCpuHashMap<Tuple, u64> = PerCpuHashMap::with_max_entries(20_000, 0);

/// One number.
#[map]
static RUNS: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Nothing.
#[btf_tracepoint(function = "kfree_skb")]
pub fn empty(_ctx: BtfTracePointContext) -> i32 {
    0
}

/// One number, to compare totals with.
#[btf_tracepoint(function = "kfree_skb")]
pub fn count(_ctx: BtfTracePointContext) -> i32 {
    if let Some(runs) = RUNS.get_ptr_mut(0) {
        unsafe { *runs += 1 };
    }
    0
}

/// The 5-tuple at the network header, and one added to a per-CPU hash.
#[btf_tracepoint(function = "kfree_skb")]
pub fn minimal(ctx: BtfTracePointContext) -> i32 {
    unsafe {
        let skb = ctx.arg::<*const u8>(0);
        let head = core::ptr::read_volatile(skb.add(offset!(skb_head)).cast::<u64>());
        let network = core::ptr::read_volatile(skb.add(offset!(skb_network_header)).cast::<u16>());
        let header = (head + u64::from(network)) as *const [u8; 44];
        let Ok(header) = bpf_probe_read_kernel(header) else {
            return 0;
        };
        let mut tuple = Tuple {
            source: [0; 16],
            destination: [0; 16],
            ports: 0,
            protocol: 0,
        };
        if header[0] >> 4 == 4 {
            tuple.source[..4].copy_from_slice(&header[12..16]);
            tuple.destination[..4].copy_from_slice(&header[16..20]);
            tuple.ports = u32::from_ne_bytes([header[20], header[21], header[22], header[23]]);
            tuple.protocol = u32::from(header[9]);
        } else {
            tuple.source.copy_from_slice(&header[8..24]);
            tuple.destination.copy_from_slice(&header[24..40]);
            tuple.ports = u32::from_ne_bytes([header[40], header[41], header[42], header[43]]);
            tuple.protocol = u32::from(header[6]);
        }
        if let Some(packets) = TUPLES.get_ptr_mut(tuple) {
            *packets += 1;
        } else {
            let _ = TUPLES.insert(tuple, 1, BPF_NOEXIST.into());
        }
    }
    0
}

/// As the real programs have it.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
