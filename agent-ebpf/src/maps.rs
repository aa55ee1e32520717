//! Every map and every global, with the reason for its size.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray, PerCpuHashMap, RingBuf};
use whydrop_ebpf::{
    Control, FlowCount, FlowKey, Offsets, OverflowCount, OverflowKey, PerCpu, REASONS,
};

/// Set by the loader from the running kernel's BTF.
#[unsafe(no_mangle)]
pub static OFFSETS: Offsets = Offsets::NONE;

/// 1 where a drop reason is benign whatever the packet was; set by the loader.
///
/// Such frees are part of ordinary traffic (some 900 for 400 HTTP connections), so they are
/// counted by reason before anything else of the packet is read.
#[unsafe(no_mangle)]
pub static BENIGN: [u8; REASONS] = [0; REASONS];

/// One field of [`OFFSETS`]. Volatile, because the compiler sees a constant that the loader replaces.
macro_rules! offset {
    ($field:ident) => {
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::OFFSETS.$field) }
    };
}
pub(crate) use offset;

/// One element: the switch between the two flow maps, and the event budget.
#[map]
pub static CONTROL: Array<Control> = Array::with_max_entries(1, 0);

/// The two generations: programs write to the one that [`CONTROL`] names while the agent drains
/// the other. Sizes are set by the loader from `--map-memory` and the number of possible CPUs.
/// Preallocated: deleting from a map that is not was 20 times slower.
#[map]
pub static FLOWS_0: PerCpuHashMap<FlowKey, FlowCount> = PerCpuHashMap::with_max_entries(1024, 0);
/// See [`FLOWS_0`].
#[map]
pub static FLOWS_1: PerCpuHashMap<FlowKey, FlowCount> = PerCpuHashMap::with_max_entries(1024, 0);

/// What found no room in a flow map; never emptied. A kernel has some hundred places that free a
/// packet, and each has few reasons, protocols and kinds.
#[map]
pub static OVERFLOW: PerCpuHashMap<OverflowKey, OverflowCount> =
    PerCpuHashMap::with_max_entries(1024, 0);

/// Packets by a reason that is benign whatever the packet was; never emptied.
#[map]
pub static BENIGN_COUNT: PerCpuArray<u64> = PerCpuArray::with_max_entries(REASONS as u32, 0);

/// What each CPU keeps for itself.
#[map]
pub static CPU: PerCpuArray<PerCpu> = PerCpuArray::with_max_entries(1, 0);

/// Detail of drops on its way to the agent. Its size is set by the loader.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(4096, 0);
