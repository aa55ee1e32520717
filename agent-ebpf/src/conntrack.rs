//! What a packet's conntrack entry tells: the destination before DNAT, and the real one of a reply.

use core::mem::MaybeUninit;

use whydrop_ebpf::attempt::Tuple;
use whydrop_ebpf::{FLAG_ENCAPSULATED, FlowKey, MISSING, TupleHash};

use crate::access::{copied, copy, field};
use crate::maps::offset;
use crate::packet::{ICMP, ICMPV6};

/// The low bits of `skb->_nfct` are `enum ip_conntrack_info`, the rest is the entry's address
/// (include/linux/skbuff.h, NFCT_PTRMASK).
const INFO: u64 = 7;
/// IP_CT_IS_REPLY (include/uapi/linux/netfilter/nf_conntrack_common.h); what is above it but not
/// above 4 is a reply too, 7 is untracked.
const IS_REPLY: u64 = 3;
/// IPS_SRC_NAT and IPS_DST_NAT, same file.
const SRC_NAT: u32 = 1 << 4;
const DST_NAT: u32 = 1 << 5;

/// `skb->_nfct`, 0 where the kernel has no conntrack.
///
/// # Safety
/// `skb` is the tracepoint's argument.
#[inline(always)]
pub unsafe fn nfct<const TYPED: bool>(skb: *const u8) -> u64 {
    if offset!(skb_nfct) == MISSING {
        return 0;
    }
    unsafe { field::<u64, TYPED>(skb, offset!(skb_nfct)) }
}

/// The address of the entry, without the packet's direction.
#[inline(always)]
pub fn entry(nfct: u64) -> u64 {
    nfct & !INFO
}

/// Fills in where the packet went before DNAT, if it is one of the original direction.
#[inline(always)]
pub fn original_destination(nfct: u64, key: &mut FlowKey) {
    // The entry of a tunnel's packet says nothing of the flow inside.
    if entry(nfct) == 0
        || nfct & INFO >= IS_REPLY
        || offset!(ct_status) == MISSING
        || key.flags & FLAG_ENCAPSULATED != 0
    {
        return;
    }
    let mut status = 0u32;
    if unsafe { copy(&mut status, entry(nfct) + u64::from(offset!(ct_status))) }
        && status & DST_NAT != 0
    {
        translated(entry(nfct), key);
    }
}

#[inline(always)]
fn translated(entry: u64, key: &mut FlowKey) {
    let at = entry + u64::from(offset!(ct_tuplehash));
    let mut original = MaybeUninit::<TupleHash>::uninit();
    let Some(original) = (unsafe { copied(&mut original, at) }) else {
        return;
    };
    let port = u16::from_be(original.destination.port_be);
    // Before its DNAT a packet still has the original destination.
    if original.destination.address != key.destination || port != key.destination_port {
        key.original_destination = original.destination.address;
        key.original_destination_port = port;
    }
}

/// The two ends of the connection as its first packet had them, before any NAT; false where there is
/// no conntrack entry. A function of its own: what it reads has room on the stack no longer than that,
/// and all that call one another have 512 bytes together.
#[inline(never)]
pub fn original(nfct: u64, tuple: &mut Tuple) -> bool {
    if entry(nfct) == 0 || offset!(ct_tuplehash) == MISSING {
        return false;
    }
    let at = entry(nfct) + u64::from(offset!(ct_tuplehash));
    let mut original = MaybeUninit::<TupleHash>::uninit();
    let Some(original) = (unsafe { copied(&mut original, at) }) else {
        return false;
    };
    tuple.source = original.source.address;
    tuple.destination = original.destination.address;
    tuple.source_port = u16::from_be(original.source.port_be);
    tuple.destination_port = u16::from_be(original.destination.port_be);
    true
}

/// The two ends of a connection's packets behind the NAT of this namespace, as its replies have them
/// reversed; false, and nothing filled in, where there is no NAT. A function of its own as
/// [`original`].
#[inline(never)]
pub fn translated_ends(nfct: u64, tuple: &mut Tuple) -> bool {
    let mut status = 0u32;
    if entry(nfct) == 0
        || offset!(ct_status) == MISSING
        || !unsafe { copy(&mut status, entry(nfct) + u64::from(offset!(ct_status))) }
        || status & (SRC_NAT | DST_NAT) == 0
    {
        return false;
    }
    let at = u64::from(offset!(ct_tuplehash)) + size_of::<TupleHash>() as u64;
    let mut reply = MaybeUninit::<TupleHash>::uninit();
    let Some(reply) = (unsafe { copied(&mut reply, entry(nfct) + at) }) else {
        return false;
    };
    tuple.source = reply.destination.address;
    tuple.destination = reply.source.address;
    tuple.source_port = u16::from_be(reply.destination.port_be);
    tuple.destination_port = u16::from_be(reply.source.port_be);
    true
}

/// Fills in the flow of the packet that is answered as it is between DNAT and SNAT, which is how it
/// looks where it is filtered: from who sent it to who should have received it. `nfct` is the
/// answer's; it goes the other way. ICMP has ids in place of ports, so its key keeps type and code.
#[inline(always)]
pub fn answered_flow(nfct: u64, key: &mut FlowKey) {
    let mut tuples = [TupleHash::default(); 2];
    if offset!(ct_tuplehash) == MISSING
        || !unsafe { copy(&mut tuples, entry(nfct) + u64::from(offset!(ct_tuplehash))) }
    {
        return;
    }
    // tuples[0] is what the connection's first packet was, [1] what its replies are.
    let (from, to) = if nfct & INFO >= IS_REPLY {
        (&tuples[0].source, &tuples[1].source)
    } else {
        (&tuples[1].source, &tuples[0].source)
    };
    key.source = from.address;
    key.destination = to.address;
    if key.protocol != ICMP && key.protocol != ICMPV6 {
        key.destination_port = u16::from_be(to.port_be);
    }
}
