//! Conntrack entries that die without ever having seen a reply, where kprobes are allowed: also those
//! that live too short for the agent to find them in the table.

use aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::kprobe;
use aya_ebpf::programs::ProbeContext;
use whydrop_ebpf::attempt::Died;
use whydrop_ebpf::{MISSING, TupleHash};

use crate::access::copy;
use crate::maps::{CPU, DIED, offset};
use crate::packet::{TCP, UDP};

/// include/uapi/linux/netfilter/nf_conntrack_common.h
const IPS_SEEN_REPLY: u32 = 1 << 1;
const IPS_CONFIRMED: u32 = 1 << 3;
/// include/uapi/linux/netfilter/nf_conntrack_tcp.h
const TCP_CONNTRACK_SYN_SENT: u8 = 1;
const PORT_DNS_BE: u16 = 53u16.to_be();

/// `nf_conntrack_free(ct)`: every entry, whatever it died of (net/netfilter/nf_conntrack_core.c, 5.10
/// to 7.2).
#[kprobe(function = "nf_conntrack_free")]
pub fn conntrack_free(ctx: ProbeContext) -> u32 {
    if let Some(entry) = ctx.arg::<*const u8>(0) {
        unsafe { died(entry as u64) };
    }
    0
}

#[inline(always)]
unsafe fn died(entry: u64) {
    let mut status = 0u32;
    let mut tuples = [TupleHash::default(); 2];
    if offset!(ct_tuplehash) == MISSING
        || offset!(ct_status) == MISSING
        || !unsafe { copy(&mut status, entry + u64::from(offset!(ct_status))) }
        || status & (IPS_CONFIRMED | IPS_SEEN_REPLY) != IPS_CONFIRMED
        || !unsafe { copy(&mut tuples, entry + u64::from(offset!(ct_tuplehash))) }
    {
        return;
    }
    // Only what is an attempt: a TCP connection, a DNS query before or after DNAT.
    let [protocol, _] = tuples[0].destination.rest;
    let asks =
        tuples[0].destination.port_be == PORT_DNS_BE || tuples[1].source.port_be == PORT_DNS_BE;
    // A reset destroys an entry before it is noted as a reply, but not before it changes the state.
    let mut state = 0u8;
    let is_connect = protocol == TCP
        && offset!(ct_tcp_state) != MISSING
        && unsafe { copy(&mut state, entry + u64::from(offset!(ct_tcp_state))) }
        && state == TCP_CONNTRACK_SYN_SENT;
    let is_query = protocol == UDP && asks;
    if !is_connect && !is_query {
        return;
    }
    let Some(mut event) = DIED.reserve::<Died>(0) else {
        if let Some(own) = CPU.get_ptr_mut(0) {
            unsafe { (*own).cpu.attempts.died_lost += 1 };
        }
        return;
    };
    let (mut net, mut netns) = (0u64, 0u32);
    unsafe {
        if offset!(ct_net) != MISSING && copy(&mut net, entry + u64::from(offset!(ct_net))) {
            copy(&mut netns, net + u64::from(offset!(net_inum)));
        }
        event.as_mut_ptr().write(Died {
            boot_ns: bpf_ktime_get_boot_ns(),
            tuples,
            netns,
            status,
        });
    }
    event.submit(0);
}
