//! From what the kernel counted and sent to owned values, without names yet.
//!
//! | file | what |
//! |---|---|
//! | `classify.rs` | silent, rejected or benign: the table to extend |
//! | `packet.rs` | a packet's bytes to its innermost flow |
//! | `dns.rs` | the question of a query |
//! | `late.rs` | answers that left after their drop |
//! | `attempt.rs` | an attempt that nobody answered |

pub mod attempt;
pub mod classify;
pub mod dns;
pub mod late;
pub mod packet;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use jiff::Timestamp;
use whydrop_ebpf::{DropEvent, FlowKey, KIND_DNS, KIND_SYN, UNTOLD};

use self::classify::{Class, classify};
use crate::event::{DnsQuestion, DropSite, Kind, Outcome, Protocol};

/// Device names kept for flows that come without detail; a node has some hundred devices, and past
/// this the oldest knowledge is not worth more than none.
const MAX_INTERFACES: usize = 4096;

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

/// What this kernel calls things.
#[derive(Debug)]
pub struct Names {
    /// Drop reasons by number.
    pub reasons: HashMap<u32, Arc<str>>,
    /// Whether the tracepoint passes a reason at all.
    pub has_reasons: bool,
}

impl Names {
    /// The reason's name, `#123` for a number without one, `None` on kernels without reasons.
    pub fn reason(&self, number: u32) -> Option<Arc<str>> {
        self.has_reasons.then(|| {
            self.reasons
                .get(&number)
                .cloned()
                .unwrap_or_else(|| Arc::from(format!("#{number}")))
        })
    }
}

/// From the low half of an address in the kernel to the function that it is in.
pub type Locate = Box<dyn FnMut(u32) -> Option<Arc<str>> + Send>;

/// Decodes counts and events; remembers names of places and devices.
pub struct Decoder {
    names: Names,
    locate: Locate,
    locations: HashMap<u32, Option<Arc<str>>>,
    interfaces: HashMap<(u32, u32), Arc<str>>,
}

impl Decoder {
    /// A decoder that has seen nothing yet.
    pub fn new(names: Names, locate: Locate) -> Self {
        Self {
            names,
            locate,
            locations: HashMap::new(),
            interfaces: HashMap::new(),
        }
    }

    /// The kernel's name of a reason.
    pub fn reason(&self, number: u32) -> Option<Arc<str>> {
        self.names.reason(number)
    }

    /// The function at an address. The kernel has some hundred places that free packets.
    pub fn location(&mut self, address: u32) -> Option<Arc<str>> {
        self.locations
            .entry(address)
            .or_insert_with(|| (self.locate)(address))
            .clone()
    }

    /// Forgets what it knows of places: a module that is loaded anew puts other functions there.
    pub fn forget_locations(&mut self) {
        self.locations.clear();
    }

    /// What reason and place say about packets of a flow.
    pub fn class(&mut self, key: &FlowKey) -> Class {
        let reason = self.names.reason(key.reason);
        let location = self.location(key.location);
        classify(reason.as_deref(), location.as_deref(), key)
    }

    /// `packets` of a flow as one drop; what only an event knows is absent.
    pub fn counted(
        &mut self,
        key: &FlowKey,
        outcome: Outcome,
        packets: u64,
        time: Timestamp,
    ) -> Drop {
        Drop {
            time,
            kind: kind(key.kind),
            outcome,
            packets,
            flow: flow(key),
            tcp_flags: None,
            dns: None,
            site: self.site(key.reason, key.location, key.netns, key.ifindex),
        }
    }

    /// Where and why, by the kernel's names.
    pub(crate) fn site(
        &mut self,
        reason: u32,
        location: u32,
        netns: u32,
        ifindex: u32,
    ) -> DropSite {
        DropSite {
            reason: self.names.reason(reason),
            location: self.location(location),
            interface: self.interfaces.get(&(netns, ifindex)).cloned(),
            netns: (netns != 0).then_some(netns),
        }
    }

    /// One event in full; `None` if its packet was no loss to anyone.
    ///
    /// `wall` turns the event's clock (boot time) into the time of day.
    pub fn event(&mut self, event: &DropEvent, wall: impl Fn(u64) -> Timestamp) -> Option<Drop> {
        let outcome = match self.class(&event.key) {
            Class::Benign => return None,
            Class::Rejected => Outcome::Rejected,
            Class::Silent if event.told != UNTOLD => Outcome::Rejected,
            Class::Silent => Outcome::Dropped,
        };
        self.learn_interface(event);
        let mut drop = self.counted(&event.key, outcome, 1, wall(event.boot_ns));
        if let Some(flow) = &mut drop.flow {
            flow.source_port =
                (flow.protocol.has_ports() && event.source_port != 0).then_some(event.source_port);
            if flow.protocol == Protocol::TCP && event.tcp_flags != 0 {
                drop.tcp_flags = Some(event.tcp_flags);
            }
            drop.dns = question(event, flow);
        }
        Some(drop)
    }

    fn learn_interface(&mut self, event: &DropEvent) {
        let name = event.device.split(|b| *b == 0).next().unwrap_or_default();
        let Ok(name) = std::str::from_utf8(name) else {
            return;
        };
        if name.is_empty() {
            return;
        }
        if self.interfaces.len() >= MAX_INTERFACES {
            self.interfaces.clear();
        }
        let known = self.interfaces.entry((event.key.netns, event.key.ifindex));
        let known = known.or_insert_with(|| Arc::from(name));
        if **known != *name {
            *known = Arc::from(name);
        }
    }
}

/// The question that a dropped packet asked, over UDP or TCP.
fn question(event: &DropEvent, flow: &Flow) -> Option<DnsQuestion> {
    let asks = event.key.kind == KIND_DNS
        || (flow.protocol == Protocol::TCP && flow.destination_port == Some(53));
    let len = usize::from(event.snap_len).min(event.snap.len());
    let packet = asks.then(|| packet::parse(&event.snap[..len]))??;
    // The programs and this parser must have found the same packet.
    (packet.source == flow.source && packet.destination == flow.destination)
        .then_some(packet.dns)?
}

pub(crate) fn kind(kind: u8) -> Kind {
    match kind {
        KIND_SYN => Kind::Syn,
        KIND_DNS => Kind::Dns,
        _ => Kind::Packet,
    }
}

pub(crate) fn address(bytes: &[u8; 16], version: u8) -> IpAddr {
    match version {
        4 => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
        _ => Ipv6Addr::from(*bytes).into(),
    }
}

/// The flow of a key; `None` where the programs found no IP header.
pub fn flow(key: &FlowKey) -> Option<Flow> {
    if key.ip_version == 0 {
        return None;
    }
    let protocol = Protocol(key.protocol);
    let port = key.destination_port;
    let is_icmp = matches!(protocol, Protocol::ICMP | Protocol::ICMPV6);
    Some(Flow {
        source: address(&key.source, key.ip_version),
        source_port: None,
        destination: address(&key.destination, key.ip_version),
        destination_port: (protocol.has_ports() && port != 0).then_some(port),
        protocol,
        original_destination: (key.original_destination != [0; 16]).then(|| {
            (
                address(&key.original_destination, key.ip_version),
                key.original_destination_port,
            )
        }),
        icmp: is_icmp.then(|| {
            let [icmp_type, code] = port.to_be_bytes();
            (icmp_type, code)
        }),
    })
}

#[cfg(test)]
mod recorded_tests;

#[cfg(test)]
mod tests {
    use whydrop_ebpf::{KIND_PACKET, SNAP_LEN, TOLD};

    use super::*;

    fn decoder() -> Decoder {
        let reasons = [
            (2, "NOT_SPECIFIED"),
            (12, "NETFILTER_DROP"),
            (3, "NO_SOCKET"),
        ];
        let names = Names {
            reasons: reasons
                .into_iter()
                .map(|(n, s)| (n, Arc::from(s)))
                .collect(),
            has_reasons: true,
        };
        Decoder::new(
            names,
            Box::new(|address| (address == 1).then(|| Arc::from("nft_do_chain"))),
        )
    }

    fn event() -> DropEvent {
        let mut key = FlowKey {
            ip_version: 4,
            protocol: 6,
            kind: KIND_SYN,
            destination_port: 5432,
            reason: 12,
            location: 1,
            ifindex: 7,
            netns: 4_026_531_840,
            ..FlowKey::default()
        };
        key.source[..4].copy_from_slice(&[10, 0, 0, 1]);
        key.destination[..4].copy_from_slice(&[10, 0, 0, 2]);
        let mut device = [0; 16];
        device[..5].copy_from_slice(b"veth0");
        DropEvent {
            key,
            boot_ns: 0,
            generation: 0,
            source_port: 41612,
            tcp_flags: 2,
            told: UNTOLD,
            snap_len: 0,
            ethertype: 0x800,
            device,
            snap: [0; SNAP_LEN],
        }
    }

    #[test]
    fn an_event_in_full() {
        let mut decoder = decoder();
        let drop = decoder
            .event(&event(), |_| Timestamp::UNIX_EPOCH)
            .expect("a loss");
        assert_eq!(drop.outcome, Outcome::Dropped);
        assert_eq!(drop.kind, Kind::Syn);
        assert_eq!(drop.tcp_flags, Some(2));
        let flow = drop.flow.expect("IP");
        assert_eq!(flow.source, IpAddr::from([10, 0, 0, 1]));
        assert_eq!(
            (flow.source_port, flow.destination_port),
            (Some(41612), Some(5432))
        );
        assert_eq!(drop.site.reason.as_deref(), Some("NETFILTER_DROP"));
        assert_eq!(drop.site.location.as_deref(), Some("nft_do_chain"));
        assert_eq!(drop.site.interface.as_deref(), Some("veth0"));
        // Counts of the same device are named by what the event taught.
        let counted = decoder.counted(&event().key, Outcome::Dropped, 3, Timestamp::UNIX_EPOCH);
        assert_eq!(counted.site.interface.as_deref(), Some("veth0"));
        assert_eq!(counted.flow.expect("IP").source_port, None);
    }

    #[test]
    fn told_is_rejected_and_benign_is_no_event() {
        let mut decoder = decoder();
        let told = DropEvent {
            told: TOLD,
            ..event()
        };
        let drop = decoder
            .event(&told, |_| Timestamp::UNIX_EPOCH)
            .expect("a loss");
        assert_eq!(drop.outcome, Outcome::Rejected);
        let mut benign = event();
        benign.key.reason = 3;
        benign.key.kind = KIND_PACKET;
        assert_eq!(decoder.event(&benign, |_| Timestamp::UNIX_EPOCH), None);
    }

    #[test]
    fn an_unknown_number_is_shown_as_a_number() {
        assert_eq!(decoder().reason(0x5_0001).as_deref(), Some("#327681"));
        let old = Names {
            reasons: HashMap::new(),
            has_reasons: false,
        };
        assert_eq!(old.reason(0), None);
    }

    #[test]
    fn what_is_no_ip_packet_has_no_flow() {
        let mut arp = event();
        arp.key = FlowKey {
            reason: 2,
            ip_version: 0,
            ..FlowKey::default()
        };
        let drop = decoder()
            .event(&arp, |_| Timestamp::UNIX_EPOCH)
            .expect("counted");
        assert_eq!(drop.flow, None);
        assert_eq!(drop.site.netns, None);
    }
}
