//! Every packet that is handed to a device: a few loads turn away all but answers that tell a sender
//! of a loss, first packets of connections, and DNS queries.

use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};

use crate::access::field;
use crate::maps::{offset, setting};
use crate::packet::{ICMP, ICMPV6, TCP, UDP};
use crate::{connect, dns, told};

/// `net_dev_queue(skb)`.
#[btf_tracepoint(function = "net_dev_queue")]
pub fn net_dev_queue(ctx: BtfTracePointContext) -> i32 {
    unsafe { sent::<true>(ctx.arg(0)) };
    0
}

/// The same where the kernel refuses `tp_btf`.
#[raw_tracepoint(tracepoint = "net_dev_queue")]
pub fn net_dev_queue_raw(ctx: RawTracePointContext) -> i32 {
    unsafe { sent::<false>(ctx.arg(0)) };
    0
}

#[inline(always)]
unsafe fn sent<const TYPED: bool>(skb: *const u8) {
    let sk = unsafe { field::<*const u8, TYPED>(skb, offset!(skb_sk)) };
    if sk.is_null() {
        // A forwarded packet was received; a RST of REJECT was not, and has no socket.
        if unsafe { field::<u32, TYPED>(skb, offset!(skb_iif)) } == 0 {
            unsafe { told::answer::<TYPED>(skb) };
        }
        return;
    }
    // Not a full socket for a SYN-ACK: then this is some other byte of a slab, and the state or the
    // packet's own header decides.
    let protocol = unsafe { field::<u16, TYPED>(sk, offset!(sock_protocol)) };
    if protocol == TCP.into() {
        if setting!(connects) != 0
            && unsafe { field::<u8, TYPED>(sk, offset!(sock_state)) } == connect::SYN_SENT
        {
            unsafe { connect::syn_sent::<TYPED>(skb, sk) };
        }
    } else if protocol == UDP.into() {
        if setting!(dns) != 0 {
            unsafe { dns::sent::<TYPED>(skb, sk) };
        }
    } else if protocol == ICMP.into() || protocol == ICMPV6.into() {
        // The kernel's ICMP sockets.
        unsafe { told::answer::<TYPED>(skb) };
    }
}
