//! The eBPF programs of whydrop. They only observe: no program here can change or delay a packet.
//!
//! | file | hook | what |
//! |---|---|---|
//! | `drop.rs` | `kfree_skb` | count each drop by flow, send detail |
//! | `sent.rs` | `net_dev_queue` | which of the packets that are sent are of interest |
//! | `told.rs` | `neigh_event_send_done` | was the sender told? |
//! | `connect.rs` | `inet_sock_set_state`, `inet_sk_error_report` | TCP connects that wait |
//! | `dns.rs` | `netif_receive_skb` or `__udp_enqueue_schedule_skb` | DNS queries that wait |
//! | `died.rs` | `nf_conntrack_free` | conntrack entries that die unreplied |
//! | `tally.rs` | | what became of connects and queries |
//! | `packet.rs` | | find and read a packet's headers |
//! | `conntrack.rs` | | the destination before DNAT |
//! | `access.rs` | | the two ways to read kernel memory |
//! | `maps.rs` | | every map and global, with its size's reason |
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(
    internal_features,
    reason = "the eBPF target needs an unstable compiler anyway"
)]
#![allow(
    missing_docs,
    reason = "the program macros make public functions without their comments"
)]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a key or value that is passed by value is one more copy on a stack of 512 bytes"
)]
#![allow(unused_unsafe, reason = "`offset!` reads a static wherever it stands")]

mod access;
mod connect;
mod conntrack;
mod died;
mod dns;
mod drop;
mod maps;
mod packet;
mod sent;
mod tally;
mod told;

/// So that the kernel lends the helpers that only GPL-compatible programs may call.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
