//! Silent, rejected or benign: the one table to edit when a drop reason is missing.
//!
//! A drop is *silent* until shown otherwise. It is *rejected* where an answer was seen for this very
//! packet (the programs find that out), or where reason and place alone say that the sender was
//! told. It is *benign* where nobody lost anything.

use whydrop_ebpf::{FLAG_ENCAPSULATED, FLAG_LOCAL_DATAGRAM, FlowKey, KIND_SYN};

/// What reason and place say about a drop, before answers are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Nobody was told, unless an answer was seen.
    Silent,
    /// The sender was told.
    Rejected,
    /// No loss to anyone.
    Benign,
}

/// For which packets a row holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Whatever the packet is.
    Always,
    /// A first or resent SYN.
    Syn,
    /// TCP, and no SYN.
    TcpNotSyn,
    /// It left a datagram socket of this node, whose call fails.
    LocalDatagram,
    /// ICMP or ICMPv6.
    Icmp,
    /// No IP packet.
    NotIp,
}

/// One row. The first row that fits decides.
struct Row {
    /// The kernel's name without `SKB_DROP_REASON_`; `""` fits any reason, also none (before 5.17).
    reason: &'static str,
    /// The function that freed the packet; a final `*` fits any ending; `""` fits any.
    location: &'static str,
    when: When,
    class: Class,
    /// Why, and the kernel version that was looked at.
    #[allow(dead_code, reason = "for the reader of the table; a test asks for it")]
    why: &'static str,
}

const fn row(
    reason: &'static str,
    location: &'static str,
    when: When,
    class: Class,
    why: &'static str,
) -> Row {
    Row {
        reason,
        location,
        when,
        class,
        why,
    }
}

use Class::{Benign, Rejected};
use When::{Always, Icmp, LocalDatagram, NotIp, Syn, TcpNotSyn};

#[rustfmt::skip]
const TABLE: &[Row] = &[
    // Told by reason and place.
    row("NO_SOCKET", "", Syn, Rejected, "no listener: TCP answers with a RST (tcp_v4_rcv, tcp_v6_rcv, 6.18); IPv4 sends it by a control socket"),
    row("NETFILTER_DROP", "", LocalDatagram, Rejected, "a drop at OUTPUT or POSTROUTING is the sendmsg call's own EPERM (nf_hook_slow, ip_send_skb, 6.18)"),

    // Benign whatever the packet was; these never reach the flow maps.
    row("OTHERHOST", "", Always, Benign, "a frame for another host on a promiscuous device (ip_rcv_core, 6.18)"),
    row("UNICAST_IN_L2_MULTICAST", "", Always, Benign, "a unicast packet in a broadcast frame (ip_rcv_finish_core, 6.18)"),
    row("QUEUE_PURGE", "", Always, Benign, "a queue of a socket or device that is being closed (skb_queue_purge_reason, 6.18)"),
    row("SOCKET_CLOSE", "", Always, Benign, "what a closed socket had not read or sent (6.19 on)"),
    row("SOCKET_DESTROYED", "", Always, Benign, "what a socket still held when it ended"),
    row("TCP_CLOSE", "", Always, Benign, "for a TCP socket in CLOSE (tcp_rcv_state_process, 6.18)"),
    row("TCP_OLD_DATA", "", Always, Benign, "data that was received already (tcp_data_queue, 6.18)"),
    row("TCP_OLD_SEQUENCE", "", Always, Benign, "sequence numbers that were received already (tcp_sequence, 6.18)"),
    row("TCP_OLD_ACK", "", Always, Benign, "an ACK that came late (tcp_ack, 6.18)"),
    row("TCP_RFC7323_PAWS_ACK", "", Always, Benign, "a pure ACK that was overtaken (tcp_validate_incoming, 6.14)"),
    row("TCP_RFC7323_TW_PAWS", "", Always, Benign, "old data for a socket in TIME_WAIT (tcp_timewait_state_process, 6.14)"),
    row("TCP_OFOMERGE", "", Always, Benign, "out-of-order data that is queued already (tcp_data_queue_ofo, 6.18)"),
    row("TCP_FASTOPEN", "", Always, Benign, "the SYN's data was taken (tcp_rcv_fastopen_synack, 6.18)"),
    row("TCP_RESET", "", Always, Benign, "a RST that was received and obeyed (tcp_reset, 6.18)"),
    row("TCP_ABORT_ON_DATA", "", Always, Benign, "data for a socket that was closed; its RST was sent (tcp_rcv_state_process, 6.18)"),
    row("DUP_FRAG", "", Always, Benign, "a fragment that was received already (ip_frag_queue, 6.18)"),
    row("SKB_GSO_SEG", "", Always, Benign, "the original of segments that were sent (6.6 on)"),
    row("PACKET_SOCK_ERROR", "", Always, Benign, "a packet socket's own copy (packet_rcv, 6.10 on)"),
    row("UNIX_DISCONNECT", "", Always, Benign, "a Unix socket's queue, no packet of the network (6.13 on)"),
    row("UNIX_INFLIGHT_FD_LIMIT", "", Always, Benign, "a Unix socket, no packet of the network (6.13 on)"),
    row("UNIX_SKIP_OOB", "", Always, Benign, "a Unix socket, no packet of the network (6.13 on)"),

    // Benign for some packets, or at some places.
    row("NO_SOCKET", "", TcpNotSyn, Benign, "the end of a connection that is gone already (tcp_v4_rcv, 6.18)"),
    row("NO_SOCKET", "ping_rcv", Icmp, Benign, "an echo reply for a raw-socket ping (ping_rcv, 6.18)"),
    row("NO_SOCKET", "", Icmp, Benign, "an ICMP message that no socket waits for; answers are never answered"),
    row("UNHANDLED_PROTO", "", NotIp, Benign, "a frame of a protocol that this node does not speak, as LLDP (__netif_receive_skb_core, 6.18)"),
    row("", "tcp_rcv_state_process", TcpNotSyn, Benign, "the ACK that ends a handshake (6.18: NOT_SPECIFIED)"),
    row("", "tcp_v4_rcv", TcpNotSyn, Benign, "a segment that was taken or belongs to a closed connection (6.18: NOT_SPECIFIED; 5.10: no reason)"),
    row("", "tcp_v6_rcv", TcpNotSyn, Benign, "as tcp_v4_rcv"),
    row("", "tcp_v4_rcv", Syn, Rejected, "no listener, on kernels without reasons (5.10); a SYN that fails IPsec or MD5 there looks the same"),
    row("", "tcp_v6_rcv", Syn, Rejected, "as tcp_v4_rcv"),
    row("", "nf_hook_slow", LocalDatagram, Rejected, "as NETFILTER_DROP, on kernels without reasons (5.10)"),
    row("", "ip6_mc_input", Always, Benign, "multicast that was delivered or that nobody joined (6.18: NOT_SPECIFIED)"),
    row("", "udp_destruct_common", Always, Benign, "what a closed UDP socket had not read (6.18: NOT_SPECIFIED)"),
    row("", "inet_sock_destruct", Always, Benign, "what a closed socket had not read (5.10)"),
    row("", "sk_stream_kill_queues", Always, Benign, "what a closed TCP socket had not sent (5.10)"),
    row("", "inet_csk_destroy_sock", Always, Benign, "a closed TCP socket"),
    row("", "__skb_queue_purge*", Always, Benign, "a queue of a socket that is being closed (5.10)"),
    row("", "skb_queue_purge*", Always, Benign, "a queue of a socket that is being closed (5.10)"),
    row("", "packet_rcv*", Always, Benign, "a packet socket's own copy (6.1: NOT_SPECIFIED)"),
    row("", "tpacket_rcv", Always, Benign, "a packet socket's own copy (6.1: NOT_SPECIFIED)"),
    row("", "ping_rcv", Icmp, Benign, "an echo reply for a raw-socket ping (5.10)"),
    row("", "icmp_rcv", Icmp, Benign, "an ICMP message that was taken, or that nobody waits for (5.10)"),
    row("", "icmpv6_rcv", Icmp, Benign, "as icmp_rcv"),
    row("", "unix_*", NotIp, Benign, "a Unix socket, no packet of the network"),
    row("", "netlink_*", NotIp, Benign, "a netlink message, no packet of the network"),
    row("", "arp_*", NotIp, Benign, "an ARP message that asks or tells nothing new (arp_process, 6.18)"),
];

/// The class of a drop, by the first row that fits.
pub fn classify(reason: Option<&str>, location: Option<&str>, key: &FlowKey) -> Class {
    TABLE
        .iter()
        .find(|row| {
            (row.reason.is_empty() || Some(row.reason) == reason)
                // A row without a reason is about frees that have none of their own. That a place
                // tells the sender is only known where the kernel has no reasons at all.
                && (!row.reason.is_empty()
                    || reason.is_none()
                    || (reason == Some("NOT_SPECIFIED") && row.class == Benign))
                && location_fits(row.location, location)
                && packet_fits(row.when, key)
        })
        .map_or(Class::Silent, |row| row.class)
}

/// Whether a reason alone makes a drop benign, so that the programs need not look at the packet.
pub fn is_always_benign(reason: &str) -> bool {
    TABLE.iter().any(|row| {
        row.reason == reason && row.location.is_empty() && row.when == Always && row.class == Benign
    })
}

fn location_fits(pattern: &str, location: Option<&str>) -> bool {
    match (pattern.strip_suffix('*'), location) {
        _ if pattern.is_empty() => true,
        (Some(prefix), Some(location)) => location.starts_with(prefix),
        (None, Some(location)) => pattern == location,
        (_, None) => false,
    }
}

fn packet_fits(when: When, key: &FlowKey) -> bool {
    let is_tcp = key.ip_version != 0 && key.protocol == 6;
    let is_icmp = matches!((key.ip_version, key.protocol), (4, 1) | (6, 58));
    match when {
        Always => true,
        Syn => key.kind == KIND_SYN,
        TcpNotSyn => is_tcp && key.kind != KIND_SYN,
        // Inside a tunnel it was the tunnel's call that failed. An ICMP error has no caller.
        LocalDatagram => {
            key.flags & FLAG_LOCAL_DATAGRAM != 0
                && key.flags & FLAG_ENCAPSULATED == 0
                && !is_icmp_error(key)
        }
        Icmp => is_icmp,
        NotIp => key.ip_version == 0,
    }
}

/// An ICMP or ICMPv6 error; the type is the port's high byte.
fn is_icmp_error(key: &FlowKey) -> bool {
    let icmp_type = key.destination_port >> 8;
    match (key.ip_version, key.protocol) {
        (4, 1) => matches!(icmp_type, 3 | 4 | 5 | 11 | 12),
        (6, 58) => (1..128).contains(&icmp_type),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use whydrop_ebpf::KIND_PACKET;

    use super::*;

    fn tcp(kind: u8) -> FlowKey {
        FlowKey {
            ip_version: 4,
            protocol: 6,
            kind,
            ..FlowKey::default()
        }
    }

    #[test]
    fn a_policy_drop_is_silent_and_a_closed_port_is_not() {
        assert_eq!(
            classify(Some("NETFILTER_DROP"), Some("nft_do_chain"), &tcp(KIND_SYN)),
            Class::Silent
        );
        assert_eq!(
            classify(Some("NO_SOCKET"), Some("tcp_v4_rcv"), &tcp(KIND_SYN)),
            Class::Rejected
        );
        assert_eq!(
            classify(Some("NO_SOCKET"), Some("tcp_v4_rcv"), &tcp(KIND_PACKET)),
            Class::Benign
        );
        assert_eq!(
            classify(None, Some("tcp_v4_rcv"), &tcp(KIND_SYN)),
            Class::Rejected
        );
    }

    #[test]
    fn an_unknown_reason_is_silent() {
        assert_eq!(
            classify(Some("SOMETHING_NEW"), Some("tcp_v4_rcv"), &tcp(KIND_PACKET)),
            Class::Silent
        );
        assert_eq!(classify(None, None, &tcp(KIND_PACKET)), Class::Silent);
        assert!(!is_always_benign("SOMETHING_NEW"));
        assert!(!is_always_benign("NO_SOCKET"));
        assert!(is_always_benign("QUEUE_PURGE"));
    }

    #[test]
    fn eperm_tells_the_caller_of_a_datagram_but_not_of_a_tunnel_or_an_icmp_error() {
        let mut key = FlowKey {
            ip_version: 4,
            protocol: 17,
            kind: KIND_PACKET,
            flags: FLAG_LOCAL_DATAGRAM,
            ..FlowKey::default()
        };
        let class = |key: &FlowKey| classify(Some("NETFILTER_DROP"), Some("nft_do_chain"), key);
        assert_eq!(class(&key), Class::Rejected);
        key.protocol = 1;
        key.destination_port = 8 << 8;
        assert_eq!(class(&key), Class::Rejected);
        key.destination_port = 3 << 8;
        assert_eq!(class(&key), Class::Silent);
        key.protocol = 17;
        key.flags |= FLAG_ENCAPSULATED;
        assert_eq!(class(&key), Class::Silent);
    }

    #[test]
    fn every_row_says_why_and_none_is_hidden_by_an_earlier_one() {
        for (i, row) in TABLE.iter().enumerate() {
            assert!(
                row.why.len() > 8,
                "{} at {} has no reason",
                row.reason,
                row.location
            );
            let hidden = TABLE[..i].iter().any(|r| {
                r.reason == row.reason
                    && (r.location.is_empty() || r.location == row.location)
                    && (r.when == Always || r.when == row.when)
            });
            // The row for ping_rcv stands before the general one, all others are distinct.
            assert!(
                !hidden,
                "{} at {} is never reached",
                row.reason, row.location
            );
        }
    }
}
