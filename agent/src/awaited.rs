//! Addresses that have no name yet: a pod whose address the API server tells a moment after the pod
//! sent its first packet, and with `--watch node` the pods of other nodes, which are asked for one by
//! one.
//!
//! What concerns such an address waits for a moment ([`PATIENCE`]) and is then told with or without
//! a name. An address that was awaited in vain is not awaited again for a while, so that a stranger
//! delays nothing twice.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::event::{Endpoint, EndpointKind};
use crate::sync::lock;

/// How long a name is awaited. The kubelet writes a pod's addresses a second or so after the pod's
/// network is there (`syncLoop` and its status manager's 10 s at worst).
pub const PATIENCE: Duration = Duration::from_secs(2);
/// How long an address that was awaited is not awaited again.
const AGAIN: Duration = Duration::from_secs(10);
/// Addresses that are remembered; past it none is awaited more. 4,096 are 0.3 MB, and more than look-ups
/// are answered within [`AGAIN`].
const MAX: usize = 4_096;

/// What is awaited, and what came of it.
#[derive(Debug, Default)]
pub struct Awaited {
    /// Names come from a cluster that is followed and was listed once; before that nobody waits.
    follows: AtomicBool,
    /// Addresses are asked for one by one.
    asks: AtomicBool,
    questions: OnceLock<mpsc::Sender<IpAddr>>,
    /// Since when, and whether an answer came that it is nobody's.
    addresses: Mutex<HashMap<IpAddr, (Instant, bool)>>,
    /// What came of it.
    pub totals: Totals,
}

/// Counts of what was awaited.
#[derive(Debug, Default)]
pub struct Totals {
    /// Told late, with every name that was awaited.
    pub named: AtomicU64,
    /// Told late, and still without one.
    pub unnamed: AtomicU64,
    /// Told at once without a name, because there was no room to wait.
    pub full: AtomicU64,
    /// Not asked for, because too many were; not a result, for it may have its name all the same.
    pub unasked: AtomicU64,
}

impl Totals {
    /// All of them, by result.
    pub fn counts(&self) -> [(&'static str, u64); 3] {
        [
            ("named", &self.named),
            ("unnamed", &self.unnamed),
            ("full", &self.full),
        ]
        .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}

impl Awaited {
    /// Whether a cluster is followed whose objects come later than packets; and whether pods of other
    /// nodes are asked for one by one.
    pub fn follow(&self, follows: bool, asks: bool) {
        self.asks.store(asks, Ordering::Relaxed);
        self.follows.store(follows, Ordering::Relaxed);
    }

    /// Whether anything may be awaited.
    pub fn follows(&self) -> bool {
        self.follows.load(Ordering::Relaxed)
    }

    /// Whether pods of other nodes are asked for one by one.
    pub fn asks(&self) -> bool {
        self.asks.load(Ordering::Relaxed)
    }

    /// Who answers questions; once.
    pub fn answer_by(&self, questions: mpsc::Sender<IpAddr>) {
        // Set by the one thread that follows the cluster.
        let _ = self.questions.set(questions);
    }

    /// The address is no pod's, says the API server.
    pub fn is_nobodys(&self, ip: IpAddr) {
        if let Some((_, in_vain)) = lock(&self.addresses).get_mut(&ip.to_canonical()) {
            *in_vain = true;
        }
    }

    /// Whether an end without a name has an address that a pod may have. `knows_ranges`: the nodes tell
    /// which addresses are pods'.
    pub fn may_be_a_pods(&self, end: &Endpoint, knows_ranges: bool) -> bool {
        let Some(ip) = end.ip.map(|ip| ip.to_canonical()) else {
            return false;
        };
        let may_be = match end.kind {
            Some(EndpointKind::Unknown) => true,
            // Many CNIs give addresses that no node's `podCIDR` tells of.
            Some(EndpointKind::External) => {
                !knows_ranges && (self.asks.load(Ordering::Relaxed) || is_private(ip))
            }
            _ => false,
        };
        may_be && !ip.is_loopback() && !ip.is_multicast() && !ip.is_unspecified()
    }

    /// Whether an end may get a name in a moment; asks for it if that is the way. `knows_ranges`: the
    /// nodes tell which addresses are pods', so that others need not be asked for.
    pub fn awaits(&self, end: &Endpoint, knows_ranges: bool, now: Instant) -> bool {
        let Some(ip) = end
            .ip
            .filter(|_| self.follows() && self.may_be_a_pods(end, knows_ranges))
        else {
            return false;
        };
        let ip = ip.to_canonical();
        let mut addresses = lock(&self.addresses);
        if let Some((since, in_vain)) = addresses.get(&ip)
            && now.duration_since(*since) < AGAIN
        {
            return !in_vain && now.duration_since(*since) < PATIENCE;
        }
        if addresses.len() >= MAX {
            addresses.retain(|_, (since, _)| now.duration_since(*since) < AGAIN);
        }
        if addresses.len() >= MAX {
            self.totals.full.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        addresses.insert(ip, (now, false));
        drop(addresses);
        if self.asks.load(Ordering::Relaxed)
            && let Some(questions) = self.questions.get()
        {
            // It is awaited all the same: its watch may tell.
            let is_asked = questions.try_send(ip).is_ok();
            self.totals
                .unasked
                .fetch_add(u64::from(!is_asked), Ordering::Relaxed);
        }
        true
    }
}

/// Whether an address is of a network of somebody's own: RFC 1918, RFC 6598, RFC 4193.
fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [first, second, ..] = ip.octets();
            ip.is_private() || (first == 100 && second & 0xc0 == 64)
        }
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(ip: &str, kind: EndpointKind) -> Endpoint {
        Endpoint {
            ip: ip.parse().ok(),
            kind: Some(kind),
            ..Endpoint::default()
        }
    }

    #[test]
    fn an_address_is_awaited_once_in_a_while() {
        let awaited = Awaited::default();
        let unknown = end("10.1.0.7", EndpointKind::Unknown);
        let start = Instant::now();
        assert!(!awaited.awaits(&unknown, true, start), "no cluster");
        awaited.follow(true, false);
        for (after, expected) in [(0, true), (1_900, true), (2_000, false), (9_900, false)] {
            let now = start + Duration::from_millis(after);
            assert_eq!(awaited.awaits(&unknown, true, now), expected, "{after} ms");
        }
        assert!(awaited.awaits(&unknown, true, start + AGAIN));
        awaited.is_nobodys("10.1.0.7".parse().unwrap());
        assert!(!awaited.awaits(&unknown, true, start + AGAIN));
        for kind in [EndpointKind::Pod, EndpointKind::Node, EndpointKind::Service] {
            assert!(!awaited.awaits(&end("10.1.0.8", kind), true, start));
        }
    }

    /// So the other end of a drop that waited is not counted as one without a name.
    #[test]
    fn a_stranger_is_no_pod_where_nodes_tell_which_addresses_are() {
        let awaited = Awaited::default();
        let stranger = end("192.0.2.1", EndpointKind::External);
        for (asks, knows_ranges, may_be) in [
            (false, true, false),
            (false, false, false),
            (true, true, false),
            (true, false, true),
        ] {
            awaited.follow(true, asks);
            assert_eq!(awaited.may_be_a_pods(&stranger, knows_ranges), may_be);
        }
        awaited.follow(true, false);
        for (ip, may_be) in [
            ("10.1.0.7", true),
            ("100.64.0.1", true),
            ("100.128.0.1", false),
            ("fd00::7", true),
            ("2001:db8::1", false),
        ] {
            let end = end(ip, EndpointKind::External);
            assert_eq!(awaited.may_be_a_pods(&end, false), may_be, "{ip}");
            assert!(!awaited.may_be_a_pods(&end, true), "nodes tell");
        }
        assert!(awaited.may_be_a_pods(&end("10.1.0.7", EndpointKind::Unknown), true));
        assert!(!awaited.may_be_a_pods(&end("127.0.0.1", EndpointKind::Unknown), true));
    }

    #[test]
    fn an_external_address_is_asked_for_only_where_pods_have_no_known_ranges() {
        let awaited = Awaited::default();
        let (sender, mut questions) = mpsc::channel(1);
        awaited.answer_by(sender);
        let stranger = end("192.0.2.7", EndpointKind::External);
        let now = Instant::now();
        awaited.follow(true, false);
        assert!(
            !awaited.awaits(&stranger, false, now),
            "all pods are watched"
        );
        awaited.follow(true, true);
        assert!(!awaited.awaits(&stranger, true, now));
        assert!(!awaited.awaits(&end("127.0.0.1", EndpointKind::External), false, now));
        assert!(awaited.awaits(&stranger, false, now));
        assert!(awaited.awaits(&stranger, false, now), "and not asked twice");
        // There is no room for one more question, which is awaited all the same.
        assert!(awaited.awaits(&end("192.0.2.8", EndpointKind::External), false, now));
        assert_eq!(awaited.totals.unasked.load(Ordering::Relaxed), 1);
        assert_eq!(questions.try_recv().ok(), stranger.ip);
        assert!(questions.try_recv().is_err());
    }

    #[test]
    fn a_flood_of_strangers_is_bounded() {
        let awaited = Awaited::default();
        awaited.follow(true, false);
        let now = Instant::now();
        let flood = |from: u32, to: u32, now| {
            let ips = (from..to).map(std::net::Ipv4Addr::from);
            ips.filter(|ip| {
                let end = end(&ip.to_string(), EndpointKind::Unknown);
                awaited.awaits(&end, true, now)
            })
            .count()
        };
        assert_eq!(flood(0x0a00_0000, 0x0a00_2000, now), MAX);
        assert_eq!(awaited.totals.full.load(Ordering::Relaxed), 8192 - 4096);
        assert_eq!(
            flood(0x0b00_0000, 0x0b00_0010, now + AGAIN),
            16,
            "room again"
        );
    }
}
