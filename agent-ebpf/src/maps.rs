//! Every map and every global, with the reason for its size.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf};
use whydrop_ebpf::attempt::{
    Answered, ClientKey, Connect, DETAILS, EndedKey, Query, QueryKey, QueryWork, Settings, Swept,
    TALLIES, Tally, TallyKey, Tuple,
};
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

/// Set by the loader.
#[unsafe(no_mangle)]
pub static SETTINGS: Settings = Settings {
    syn_timeout_ns: 0,
    dns_timeout_ns: 0,
    dns: 0,
    connects: 0,
};

/// One field of [`SETTINGS`]; volatile as [`offset`].
macro_rules! setting {
    ($field:ident) => {
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::SETTINGS.$field) }
    };
}
pub(crate) use setting;

/// One field of [`OFFSETS`]. Volatile, because the compiler sees a constant that the loader replaces.
macro_rules! offset {
    ($field:ident) => {
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::OFFSETS.$field) }
    };
}
pub(crate) use offset;

/// One element: when a packet of this node last waited for its neighbour's address
/// (`CLOCK_MONOTONIC` in nanoseconds). Only for some seconds after it can an answer leave after its
/// drop.
#[map]
pub static NEIGHBOUR_WAIT: Array<u64> = Array::with_max_entries(1, 0);

/// One element: the switch between the two flow maps, and the limits on events.
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

/// TCP sockets in SYN_SENT, by their address. As many as `--map-memory` has room for; past it a
/// connect is not followed, which is counted. Preallocated: a tracepoint must not allocate before 6.1.
#[map]
pub static CONNECTS: HashMap<u64, Connect> = HashMap::with_max_entries(1024, 0);

/// The sockets of [`CONNECTS`] that sent a SYN, by their two ends: a drop in another namespace finds
/// its attempt by it. Twice as large as [`CONNECTS`]: where the socket's own namespace translates
/// addresses, an attempt has two pairs of them.
#[map]
pub static SYNS: HashMap<Tuple, u64> = HashMap::with_max_entries(1024, 0);

/// Connects that ended unanswered or given up, until the agent fetches them. Only what ended between
/// two looks of the agent's, so smaller than [`CONNECTS`].
#[map]
pub static ENDED: HashMap<EndedKey, Connect> = HashMap::with_max_entries(1024, 0);

/// DNS queries that wait. A hash, not an LRU: a flood of new names must not push out what waits; what
/// finds no room is counted.
#[map]
pub static QUERIES: HashMap<QueryKey, Query> = HashMap::with_max_entries(1024, 0);

/// One element: how many keys the programs put into [`QUERIES`] and did not take out again. Equal to
/// [`QUERIES_FORGOTTEN`], no query waits, and received packets are not looked at.
#[map]
pub static QUERIES_WAITING: Array<u64> = Array::with_max_entries(1, 0);

/// One element, written by the agent: how many keys it took out of [`QUERIES`].
#[map]
pub static QUERIES_FORGOTTEN: Array<u64> = Array::with_max_entries(1, 0);

/// When a socket that asks for names was last told of an error (`CLOCK_BOOTTIME` in nanoseconds). Only of
/// interest until its queries are due, so the latest 1,024 are enough; one that is pushed out is a query
/// that is called unanswered although it was refused.
#[map]
pub static CLIENTS_TOLD: LruHashMap<ClientKey, u64> = LruHashMap::with_max_entries(1024, 0);

/// DNS queries that were answered last: the same one to another server is no new query. Only of interest
/// for half a second.
#[map]
pub static ANSWERED: LruHashMap<QueryKey, Answered> = LruHashMap::with_max_entries(1024, 0);

/// What each CPU has at hand for DNS.
#[map]
pub static QUERY_WORK: PerCpuArray<QueryWork> = PerCpuArray::with_max_entries(1, 0);

/// One element, written by the agent: how far it has looked.
#[map]
pub static SWEPT: Array<Swept> = Array::with_max_entries(1, 0);

/// What became of attempts, in the two generations of [`CONTROL`]. Apart from the flows, so that a
/// flood of drops takes no room from them; and not per CPU, because connects are no flood: adding
/// atomically costs less than the memory of 128 CPUs.
#[map]
pub static TALLIES_0: HashMap<TallyKey, Tally> = HashMap::with_max_entries(1024, 0);
/// See [`TALLIES_0`].
#[map]
pub static TALLIES_1: HashMap<TallyKey, Tally> = HashMap::with_max_entries(1024, 0);

/// What found no room there, by what it was; never emptied.
#[map]
pub static TALLIES_OTHER: PerCpuArray<Tally> =
    PerCpuArray::with_max_entries((TALLIES * DETAILS) as u32, 0);

/// Conntrack entries that died unreplied, on their way to the agent: 512 of them. They die of age, which
/// the kernel's garbage collection finds in batches.
#[map]
pub static DIED: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);
