//! What names a connection.

use std::net::{IpAddr, SocketAddr};

use crate::decode::Flow;
use crate::event::Protocol;

/// A connection as its sender's socket sees it: conntrack's original tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    protocol: Protocol,
    source: End,
    destination: End,
}

/// An address and a port. Not a [`SocketAddr`], whose equality takes scope and flow label in.
type End = (IpAddr, u16);

impl Tuple {
    /// A tuple. An IPv4 address that an IPv6 socket shows as `::ffff:a.b.c.d` is taken for what it
    /// is: packets and conntrack know it as IPv4.
    pub fn new(protocol: Protocol, source: SocketAddr, destination: SocketAddr) -> Self {
        let end = |address: SocketAddr| (address.ip().to_canonical(), address.port());
        Self {
            protocol,
            source: end(source),
            destination: end(destination),
        }
    }

    /// What the sender of a flow asked for; `None` where a port is not known.
    pub fn asked(flow: &Flow) -> Option<Self> {
        let asked = flow
            .original_destination
            .or(flow.destination_port.map(|port| (flow.destination, port)))?;
        let source = SocketAddr::new(flow.source, flow.source_port?);
        Some(Self::new(flow.protocol, source, asked.into()))
    }

    /// Transport protocol.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Who sent the first packet.
    pub fn source(&self) -> SocketAddr {
        self.source.into()
    }

    /// Whom it was sent to, before DNAT.
    pub fn destination(&self) -> SocketAddr {
        self.destination.into()
    }
}

/// The conntrack zone of an entry: equal tuples in different zones are different connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Zone {
    /// 0 is the default, which is no attribute.
    pub id: u16,
    /// It holds for the original direction alone, and is an attribute of the tuple.
    pub of_tuple: bool,
}

/// What names an entry for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    /// `CTA_ID`: a hash of what the entry is in the kernel, so that a later one of the same tuple
    /// has another.
    pub id: u32,
    /// Its original tuple.
    pub tuple: Tuple,
    /// Its zone.
    pub zone: Zone,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_of_an_ipv6_socket_is_ipv4() {
        let mapped = Tuple::new(
            Protocol::TCP,
            "[::ffff:10.0.0.1]:4000".parse().expect("an address"),
            "[::ffff:10.0.0.2]:80".parse().expect("an address"),
        );
        let plain = Tuple::new(
            Protocol::TCP,
            "10.0.0.1:4000".parse().expect("an address"),
            "10.0.0.2:80".parse().expect("an address"),
        );
        assert_eq!(mapped, plain);
        assert_eq!(mapped.destination().to_string(), "10.0.0.2:80");
    }

    #[test]
    fn a_scope_is_no_part_of_it() {
        let at = |scope| {
            let address = std::net::SocketAddrV6::new("fe80::1".parse().expect("v6"), 1, 0, scope);
            Tuple::new(Protocol::UDP, address.into(), address.into())
        };
        assert_eq!(at(1), at(2));
    }
}
