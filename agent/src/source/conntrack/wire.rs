//! Messages of ctnetlink (include/uapi/linux/netfilter/nfnetlink_conntrack.h, Linux 6.18), by the
//! library where it knows the attribute.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use whydrop_ebpf::TupleEnd;
use whydrop_ebpf::attempt::Died;

use netlink_packet_core::{
    DecodeError, DefaultNla, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_ALIGNTO, NetlinkBuffer,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, Nla, NlasIterator,
};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Status,
    Tuple as TupleNla,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};

use super::tuple::{Key, Tuple, Zone};
use crate::decode::address;
use crate::event::Protocol;

// Attributes that netlink-packet-netfilter 0.4 does not name.
const CTA_STATUS: u16 = 3;
const CTA_COUNTERS_ORIG: u16 = 9;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TIMESTAMP: u16 = 20;
/// Linux 6.1 has it; a kernel that has not ignores it.
const CTA_STATUS_MASK: u16 = 26;
/// In `CTA_TUPLE_ORIG`.
const CTA_TUPLE_ZONE: u16 = 3;
/// In `CTA_COUNTERS_ORIG`.
const CTA_COUNTERS_PACKETS: u16 = 1;
/// In `CTA_TIMESTAMP`.
const CTA_TIMESTAMP_START: u16 = 1;
/// Of a message's type: subsystem and message (include/uapi/linux/netfilter/nfnetlink.h).
const NFNL_SUBSYS_CTNETLINK: u16 = 1;
/// Of nfgenmsg, before the attributes.
const NFGENMSG_LEN: usize = 4;

/// `TCP_CONNTRACK_SYN_SENT`: a SYN was seen and nothing else
/// (include/uapi/linux/netfilter/nf_conntrack_tcp.h).
const SYN_SENT: u8 = 1;

/// The status bits that tell an entry that nobody answered, and what they are then.
const STATUS_MASK: Status = Status::Confirmed.union(Status::SeenReply);
const UNREPLIED: Status = Status::Confirmed;

/// An entry, as far as it is of interest here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// What names it.
    pub key: Key,
    /// `CTA_ID`: a hash of what the entry is in the kernel; a later one of the same tuple has another,
    /// unless it lies at the same address.
    pub id: u32,
    /// Where its packets really go: whom the answer would come from.
    pub real_destination: SocketAddr,
    /// Whether it is confirmed and nobody answered.
    pub unreplied: bool,
    /// A TCP entry of which only SYNs were seen; false where the kernel does not say.
    pub syn_sent: bool,
    /// Whole seconds until it expires, rounded down; absent in events of older kernels.
    pub expires_in_s: Option<u32>,
    /// Packets of the sender, where `nf_conntrack_acct` is 1.
    pub packets: Option<u64>,
    /// When its first packet was seen, in nanoseconds of Unix time, where `nf_conntrack_timestamp`
    /// is 1.
    pub start_ns: Option<u64>,
}

impl Entry {
    /// One that died unreplied, as the programs saw it; `None` if its family is neither IPv4 nor IPv6.
    /// Its zone is not known, so it is taken for the default one.
    pub fn died(died: &Died) -> Option<Self> {
        let [original, reply] = &died.tuples;
        let version = match u16::from_ne_bytes(original.source.rest) {
            2 => 4,
            10 => 6,
            _ => return None,
        };
        let end = |end: &TupleEnd| {
            let ip = address(&end.address, version);
            SocketAddr::new(ip, u16::from_be(end.port_be))
        };
        let [protocol, _] = original.destination.rest;
        let (source, destination) = (end(&original.source), end(&original.destination));
        Some(Self {
            key: Key {
                tuple: Tuple::new(Protocol(protocol), source, destination),
                zone: Zone::default(),
            },
            id: 0,
            real_destination: end(&reply.source),
            unreplied: true,
            syn_sent: true,
            expires_in_s: None,
            packets: None,
            start_ns: None,
        })
    }
}

/// What a message from the kernel says.
#[derive(Debug)]
pub(super) enum Answer {
    /// An entry: of a dump, a look-up, or an event.
    Entry(Entry),
    /// An entry that was answered, where those are not wanted; not read any further.
    Replied,
    /// An entry that makes no sense.
    Unreadable,
    /// An entry of another protocol than TCP, UDP and SCTP, or no entry at all.
    Other,
    /// The end of a dump; 0, or the error that ended it.
    Done(i32),
    /// The refusal of a request, or its acknowledgement, which is 0.
    Error(i32),
}

/// A message and what it answers.
#[derive(Debug)]
pub(super) struct Received {
    /// The number of the request; 0 for an event.
    pub sequence: u32,
    /// What it says.
    pub answer: Answer,
}

/// The request for one entry by its original tuple.
pub(super) fn get(tuple: &Tuple, zone: Zone, sequence: u32) -> Vec<u8> {
    let family = match tuple.source() {
        SocketAddr::V4(_) => NetfilterProtoFamily::IPv4,
        SocketAddr::V6(_) => NetfilterProtoFamily::IPv6,
    };
    let mut original = tuple_attributes(tuple);
    let mut attributes = Vec::new();
    let zone_value = zone.id.to_be_bytes().to_vec();
    if zone.id != 0 && zone.of_tuple {
        original.push(TupleNla::Other(DefaultNla::new(CTA_TUPLE_ZONE, zone_value)));
    } else if zone.id != 0 {
        attributes.push(ConntrackAttribute::Other(DefaultNla::new(
            CTA_ZONE, zone_value,
        )));
    }
    attributes.push(ConntrackAttribute::CtaTupleOrig(original));
    request(family, attributes, 0, sequence)
}

/// Which entries a dump asks for; older kernels send all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// All.
    All,
    /// Those that nobody answered.
    Unreplied,
    /// Those that were answered.
    Replied,
}

/// The request for entries.
pub(super) fn dump(choice: Choice, sequence: u32) -> Vec<u8> {
    let status = match choice {
        Choice::All => None,
        Choice::Unreplied => Some(UNREPLIED),
        Choice::Replied => Some(STATUS_MASK),
    };
    let attributes = status.map_or_else(Vec::new, |status| {
        vec![
            ConntrackAttribute::CtaStatus(status),
            ConntrackAttribute::Other(DefaultNla::new(
                CTA_STATUS_MASK,
                STATUS_MASK.bits().to_be_bytes().to_vec(),
            )),
        ]
    });
    request(
        NetfilterProtoFamily::Unspec,
        attributes,
        NLM_F_DUMP,
        sequence,
    )
}

fn request(
    family: NetfilterProtoFamily,
    attributes: Vec<ConntrackAttribute>,
    flags: u16,
    sequence: u32,
) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(
        header,
        NetlinkPayload::from(NetfilterMessage::new(
            NetfilterHeader::new(family, 0, 0),
            ConntrackMessage::Get(attributes),
        )),
    );
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn tuple_attributes(tuple: &Tuple) -> Vec<TupleNla> {
    let (source, destination) = (tuple.source(), tuple.destination());
    vec![
        TupleNla::Ip(vec![
            IPTuple::SourceAddress(source.ip()),
            IPTuple::DestinationAddress(destination.ip()),
        ]),
        TupleNla::Proto(vec![
            ProtoTuple::Protocol(tuple.protocol().0.into()),
            ProtoTuple::SourcePort(source.port()),
            ProtoTuple::DestinationPort(destination.port()),
        ]),
    ]
}

/// Reads every message of a datagram. `wants_replied` reads entries in full also where they were
/// answered.
///
/// # Errors
/// What is no netlink message; `found` has had those before it. An entry that cannot be read is
/// [`Answer::Unreadable`] and ends nothing.
pub(super) fn read(
    mut bytes: &[u8],
    wants_replied: bool,
    mut found: impl FnMut(Received),
) -> Result<(), DecodeError> {
    while !bytes.is_empty() {
        let message = NetlinkBuffer::new_checked(bytes)?;
        let length = message.length() as usize;
        found(Received {
            sequence: message.sequence_number(),
            answer: answer(&message, &bytes[..length], wants_replied)?,
        });
        let aligned = length.next_multiple_of(usize::from(NLMSG_ALIGNTO));
        bytes = bytes.get(aligned..).unwrap_or_default();
    }
    Ok(())
}

fn answer(
    message: &NetlinkBuffer<&[u8]>,
    bytes: &[u8],
    wants_replied: bool,
) -> Result<Answer, DecodeError> {
    // The library reads a message into a tree of vectors; of a table of answered connections most
    // are not worth that.
    let is_entry = message.message_type() >> 8 == NFNL_SUBSYS_CTNETLINK;
    if is_entry && !wants_replied && !is_unreplied(message.payload()) {
        return Ok(Answer::Replied);
    }
    let message = match NetlinkMessage::<NetfilterMessage>::deserialize(bytes) {
        // The others do not suffer from one.
        Err(_) if is_entry => return Ok(Answer::Unreadable),
        result => result?,
    };
    Ok(match message.payload {
        NetlinkPayload::Done(done) => Answer::Done(done.code),
        NetlinkPayload::Error(error) => Answer::Error(error.raw_code()),
        NetlinkPayload::InnerMessage(message) => match message.inner {
            NetfilterMessageInner::Conntrack(
                ConntrackMessage::New(attributes) | ConntrackMessage::Delete(attributes),
            ) => match entry(&attributes) {
                Ok(entry) => entry.map_or(Answer::Other, Answer::Entry),
                Err(_) => Answer::Unreadable,
            },
            _ => Answer::Other,
        },
        _ => Answer::Other,
    })
}

/// Whether an entry's status says that nobody answered, without reading the rest of it.
fn is_unreplied(payload: &[u8]) -> bool {
    let attributes = payload.get(NFGENMSG_LEN..).unwrap_or_default();
    let status = NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == CTA_STATUS);
    let Some(bits) = status.and_then(|status| status.value().try_into().ok()) else {
        return false;
    };
    Status::from_bits_retain(u32::from_be_bytes(bits)) & STATUS_MASK == UNREPLIED
}

/// An entry from its attributes; `None` if it is of another protocol than TCP, UDP and SCTP.
fn entry(attributes: &[ConntrackAttribute]) -> Result<Option<Entry>, DecodeError> {
    let mut original = None;
    let mut reply = None;
    let mut zone = Zone::default();
    let mut entry = Entry {
        key: Key {
            tuple: Tuple::new(Protocol(0), NOWHERE, NOWHERE),
            zone,
        },
        id: 0,
        real_destination: NOWHERE,
        unreplied: false,
        syn_sent: false,
        expires_in_s: None,
        packets: None,
        start_ns: None,
    };
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(parts) => {
                original = ends(parts);
                if let Some(id) = tuple_zone(parts) {
                    zone = Zone { id, of_tuple: true };
                }
            }
            ConntrackAttribute::CtaTupleReply(parts) => reply = ends(parts),
            ConntrackAttribute::CtaStatus(status) => {
                entry.unreplied = *status & STATUS_MASK == UNREPLIED;
            }
            ConntrackAttribute::CtaTimeout(seconds) => entry.expires_in_s = Some(*seconds),
            ConntrackAttribute::CtaProtoInfo(infos) => entry.syn_sent = is_syn_sent(infos),
            ConntrackAttribute::Other(nla) => match nla.kind() & KIND {
                CTA_ID => entry.id = u32::from_be_bytes(value(nla)?),
                CTA_ZONE => {
                    zone = Zone {
                        id: u16::from_be_bytes(value(nla)?),
                        of_tuple: false,
                    };
                }
                CTA_COUNTERS_ORIG => entry.packets = number(nla, CTA_COUNTERS_PACKETS)?,
                CTA_TIMESTAMP => entry.start_ns = number(nla, CTA_TIMESTAMP_START)?,
                _ => {}
            },
            _ => {}
        }
    }
    let (Some(original), Some(reply)) = (original, reply) else {
        return Ok(None);
    };
    entry.key = Key {
        tuple: original,
        zone,
    };
    entry.real_destination = reply.source();
    Ok(Some(entry))
}

/// Filled in while an entry is read.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
/// A kind without its flags, which a [`DefaultNla`] keeps.
const KIND: u16 = netlink_packet_core::NLA_TYPE_MASK;

/// A tuple; `None` if it lacks a part, as one of a protocol without ports does.
fn ends(parts: &[TupleNla]) -> Option<Tuple> {
    let (mut source, mut destination) = (None, None);
    let (mut protocol, mut source_port, mut destination_port) = (None, None, None);
    for part in parts {
        match part {
            TupleNla::Ip(addresses) => {
                for address in addresses {
                    match address {
                        IPTuple::SourceAddress(ip) => source = Some(*ip),
                        IPTuple::DestinationAddress(ip) => destination = Some(*ip),
                        _ => {}
                    }
                }
            }
            TupleNla::Proto(parts) => {
                for part in parts {
                    match part {
                        ProtoTuple::Protocol(number) => protocol = Some(Protocol((*number).into())),
                        ProtoTuple::SourcePort(port) => source_port = Some(*port),
                        ProtoTuple::DestinationPort(port) => destination_port = Some(*port),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let protocol = protocol.filter(|p| p.has_ports())?;
    Some(Tuple::new(
        protocol,
        SocketAddr::new(source?, source_port?),
        SocketAddr::new(destination?, destination_port?),
    ))
}

fn tuple_zone(parts: &[TupleNla]) -> Option<u16> {
    parts.iter().find_map(|part| match part {
        TupleNla::Other(nla) if nla.kind() & KIND == CTA_TUPLE_ZONE => {
            value(nla).ok().map(u16::from_be_bytes)
        }
        _ => None,
    })
}

fn is_syn_sent(infos: &[ProtoInfo]) -> bool {
    infos.iter().any(|info| match info {
        ProtoInfo::TCP(parts) => parts.contains(&ProtoInfoTCP::State(SYN_SENT)),
        _ => false,
    })
}

/// The bytes of an attribute that the library does not know.
fn value<const N: usize>(nla: &DefaultNla) -> Result<[u8; N], DecodeError> {
    let mut bytes = [0; N];
    if nla.value_len() != N {
        return Err(DecodeError::from(format!(
            "attribute {} has {} bytes instead of {N}",
            nla.kind() & KIND,
            nla.value_len()
        )));
    }
    nla.emit_value(&mut bytes);
    Ok(bytes)
}

/// A number of 64 bits in a nested attribute.
fn number(nested: &DefaultNla, kind: u16) -> Result<Option<u64>, DecodeError> {
    let mut bytes = vec![0; nested.value_len()];
    nested.emit_value(&mut bytes);
    for attribute in NlasIterator::new(&bytes[..]) {
        let attribute = attribute?;
        if attribute.kind() == kind {
            return netlink_packet_core::parse_u64_be(attribute.value()).map(Some);
        }
    }
    Ok(None)
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
