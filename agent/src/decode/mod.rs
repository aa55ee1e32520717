//! Stub.

use std::net::IpAddr;

use jiff::Timestamp;

use crate::event::{DnsQuestion, DropSite, Kind, Outcome, Protocol};

/// A drop as decoded: everything known of it before names.
#[derive(Clone, Debug, PartialEq)]
pub struct Drop {
    /// When the (last) packet was dropped.
    pub time: Timestamp,
    /// What kind of packet it was.
    pub kind: Kind,
    /// What became of it.
    pub outcome: Outcome,
    /// How many packets this stands for.
    pub packets: u64,
    /// The two ends; `None` where the headers could not be read.
    pub flow: Option<Flow>,
    /// The TCP header's flag byte.
    pub tcp_flags: Option<u8>,
    /// The question of a DNS query.
    pub dns: Option<DnsQuestion>,
    /// Where and why.
    pub site: DropSite,
}

/// The two ends of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Who sent it.
    pub source: IpAddr,
    /// Its port.
    pub source_port: Option<u16>,
    /// Who should have received it, after DNAT.
    pub destination: IpAddr,
    /// Its port, after DNAT.
    pub destination_port: Option<u16>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The destination before DNAT, from conntrack.
    pub original_destination: Option<(IpAddr, u16)>,
    /// ICMP type and code.
    pub icmp: Option<(u8, u8)>,
}
