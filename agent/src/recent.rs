//! Where this node dropped first packets lately, by their two ends.
//!
//! The programs lay a drop to the attempt of a socket by the ends that its own namespace knows. Two kinds
//! of attempts they cannot find: one that the node's namespace sent on to another address (a Service's
//! backend in another pod's namespace), and one whose sender is no socket of this kernel. For those, each
//! dropped SYN, SYN-ACK, DNS query and answer that has an event is kept here for a while.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::decode::{Drop, Flow};
use crate::event::{DropSite, Kind, Outcome, Protocol};

/// Drops that are kept: three seconds of as many events as a node sends at most (5,000/s), some 150 bytes
/// each.
const MAX_DROPS: usize = 16_384;
/// Attempts are told of at their timeout, of a few seconds; one that is slower is rare.
const KEEP: Duration = Duration::from_secs(30);

/// Client and server of an attempt, where its packets really go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ends {
    protocol: Protocol,
    client: (IpAddr, u16),
    server: (IpAddr, u16),
}

/// What this node is known to have done with the packets of an attempt.
#[derive(Clone, Debug, PartialEq)]
pub enum Known {
    /// It dropped one.
    Dropped(DropSite),
    /// Nothing.
    Nothing,
    /// Drops of that time were forgotten because there were too many.
    Forgotten,
}

/// Drops of first packets and their answers of the last seconds.
#[derive(Debug)]
pub struct RecentDrops {
    drops: HashMap<Ends, (Instant, DropSite)>,
    most: usize,
    /// Drops before this time are not known any more.
    forgotten_until: Option<Instant>,
}

impl Default for RecentDrops {
    fn default() -> Self {
        Self::new(MAX_DROPS)
    }
}

impl RecentDrops {
    fn new(most: usize) -> Self {
        Self {
            drops: HashMap::new(),
            most,
            forgotten_until: None,
        }
    }

    /// Keeps a drop, if it is one of a first packet or of an answer to one, and nobody was told.
    pub fn note(&mut self, drop: &Drop, now: Instant) {
        let Some(ends) = ends(drop) else {
            return;
        };
        if self.drops.len() >= self.most && !self.drops.contains_key(&ends) {
            self.make_room(now);
        }
        self.drops.insert(ends, (now, drop.site.clone()));
    }

    /// Forgets what is too old, and if that is not enough the older half.
    fn make_room(&mut self, now: Instant) {
        self.drops
            .retain(|_, (at, _)| now.saturating_duration_since(*at) < KEEP);
        if self.drops.len() < self.most {
            return;
        }
        let mut times: Vec<Instant> = self.drops.values().map(|(at, _)| *at).collect();
        let middle = times.len() / 2;
        let (_, middle, _) = times.select_nth_unstable(middle);
        let middle = *middle;
        self.drops.retain(|_, (at, _)| *at > middle);
        self.forgotten_until = Some(middle);
    }

    /// What is known of an attempt that began at a time.
    pub fn of(&self, flow: &Flow, began: Instant) -> Known {
        let (Some(client_port), Some(server_port)) = (flow.source_port, flow.destination_port)
        else {
            return Known::Nothing;
        };
        let client = (flow.source.to_canonical(), client_port);
        // After a DNAT, or before it.
        let servers = [(flow.destination, server_port)]
            .into_iter()
            .chain(flow.original_destination);
        for (ip, port) in servers {
            let ends = Ends {
                protocol: flow.protocol,
                client,
                server: (ip.to_canonical(), port),
            };
            if let Some((at, site)) = self.drops.get(&ends)
                && *at >= began
            {
                return Known::Dropped(site.clone());
            }
        }
        match self.forgotten_until {
            Some(until) if until >= began => Known::Forgotten,
            _ => Known::Nothing,
        }
    }
}

/// The ends of the attempt to which a dropped packet belongs; `None` if it is of none.
fn ends(drop: &Drop) -> Option<Ends> {
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    if drop.outcome != Outcome::Dropped {
        return None;
    }
    let flow = drop.flow.as_ref()?;
    let source = (flow.source.to_canonical(), flow.source_port?);
    let destination = (flow.destination.to_canonical(), flow.destination_port?);
    let is_syn_ack = drop
        .tcp_flags
        .is_some_and(|flags| flags & (SYN | ACK) == SYN | ACK);
    let is_dns_answer = flow.protocol == Protocol::UDP && source.1 == DNS;
    let (client, server) = match drop.kind {
        Kind::Syn | Kind::Dns => (source, destination),
        Kind::Packet if is_syn_ack || is_dns_answer => (destination, source),
        Kind::Packet => return None,
    };
    Some(Ends {
        protocol: flow.protocol,
        client,
        server,
    })
}

/// RFC 1035, section 4.2.
const DNS: u16 = 53;

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;

    fn flow(source: &str, destination: &str) -> Flow {
        let (source, destination): (std::net::SocketAddr, std::net::SocketAddr) =
            (source.parse().unwrap(), destination.parse().unwrap());
        Flow {
            source: source.ip(),
            source_port: Some(source.port()),
            destination: destination.ip(),
            destination_port: Some(destination.port()),
            protocol: Protocol::TCP,
            original_destination: None,
            icmp: None,
        }
    }

    fn drop(kind: Kind, tcp_flags: u8, flow: Flow) -> Drop {
        Drop {
            time: Timestamp::UNIX_EPOCH,
            kind,
            outcome: Outcome::Dropped,
            packets: 1,
            flow: Some(flow),
            tcp_flags: Some(tcp_flags),
            dns: None,
            site: DropSite {
                reason: Some("NETFILTER_DROP".into()),
                ..DropSite::default()
            },
        }
    }

    fn is_dropped(known: &Known) -> bool {
        matches!(known, Known::Dropped(_))
    }

    #[test]
    fn a_drop_behind_a_dnat_is_found_by_where_the_attempt_really_went() {
        let began = Instant::now();
        let mut recent = RecentDrops::default();
        recent.note(
            &drop(Kind::Syn, 0x02, flow("10.0.0.1:4000", "10.0.1.9:5432")),
            began,
        );
        let mut attempt = flow("10.0.0.1:4000", "10.0.1.9:5432");
        attempt.original_destination = Some(("10.96.0.1".parse().unwrap(), 80));
        assert!(is_dropped(&recent.of(&attempt, began)));
        // Another port, another protocol, another server, or an attempt that began later.
        attempt.source_port = Some(4001);
        assert_eq!(recent.of(&attempt, began), Known::Nothing);
        let mut attempt = flow("10.0.0.1:4000", "10.0.1.9:5432");
        attempt.protocol = Protocol::UDP;
        assert_eq!(recent.of(&attempt, began), Known::Nothing);
        let attempt = flow("10.0.0.1:4000", "10.0.1.8:5432");
        assert_eq!(recent.of(&attempt, began), Known::Nothing);
        let attempt = flow("10.0.0.1:4000", "10.0.1.9:5432");
        let later = began + Duration::from_millis(1);
        assert_eq!(recent.of(&attempt, later), Known::Nothing);
    }

    #[test]
    fn an_answer_belongs_to_who_asked() {
        let began = Instant::now();
        let mut recent = RecentDrops::default();
        let answer = flow("[fd00::9]:5432", "[fd00::1]:4000");
        recent.note(&drop(Kind::Packet, 0x10, answer), began);
        let attempt = flow("[fd00::1]:4000", "[fd00::9]:5432");
        assert_eq!(recent.of(&attempt, began), Known::Nothing, "no SYN-ACK");
        recent.note(&drop(Kind::Packet, 0x12, answer), began);
        assert!(is_dropped(&recent.of(&attempt, began)));
    }

    #[test]
    fn what_was_answered_with_an_error_is_no_silence() {
        let began = Instant::now();
        let mut recent = RecentDrops::default();
        let mut told = drop(Kind::Syn, 0x02, flow("10.0.0.1:4000", "10.0.1.9:1"));
        told.outcome = Outcome::Rejected;
        recent.note(&told, began);
        let attempt = flow("10.0.0.1:4000", "10.0.1.9:1");
        assert_eq!(recent.of(&attempt, began), Known::Nothing);
    }

    #[test]
    fn too_many_drops_are_forgotten_and_that_is_known() {
        let began = Instant::now();
        let mut recent = RecentDrops::new(4);
        let at = |n: u64| began + Duration::from_millis(n);
        for n in 0..5 {
            let from = format!("10.0.0.1:{}", 4000 + n);
            recent.note(&drop(Kind::Syn, 0x02, flow(&from, "10.0.1.9:1")), at(n));
        }
        assert!(recent.drops.len() <= 4);
        let first = flow("10.0.0.1:4000", "10.0.1.9:1");
        assert_eq!(recent.of(&first, began), Known::Forgotten);
        let last = flow("10.0.0.1:4004", "10.0.1.9:1");
        assert!(is_dropped(&recent.of(&last, at(4))));
        // What began after all that was forgotten is not touched by it.
        let other = flow("10.0.0.2:1", "10.0.1.9:1");
        assert_eq!(recent.of(&other, at(4)), Known::Nothing);
    }
}
