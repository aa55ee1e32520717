//! Address ranges: is an address inside one of the nodes' pod ranges?

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

/// A set of ranges, each as often as it was added. A look-up costs one hash per prefix length in
/// use, of which a cluster has one or two a family, however many nodes it has.
#[derive(Debug, Default)]
pub struct Ranges {
    ranges: HashMap<IpNet, u32>,
    /// How many different ranges there are by family (is IPv6) and prefix length.
    lengths: BTreeMap<(bool, u8), u32>,
}

impl Ranges {
    /// Adds a range whose host bits are zero.
    pub fn add(&mut self, range: IpNet) {
        let times = self.ranges.entry(range).or_default();
        *times += 1;
        if *times == 1 {
            *self.lengths.entry(length(&range)).or_default() += 1;
        }
    }

    /// Takes a range back that was added.
    pub fn remove(&mut self, range: IpNet) {
        let Some(times) = self.ranges.get_mut(&range) else {
            return;
        };
        *times -= 1;
        if *times > 0 {
            return;
        }
        self.ranges.remove(&range);
        if let Some(ranges) = self.lengths.get_mut(&length(&range)) {
            *ranges -= 1;
            if *ranges == 0 {
                self.lengths.remove(&length(&range));
            }
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether an address is inside a range.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let lengths = self.lengths.range((ip.is_ipv6(), 0)..=(ip.is_ipv6(), 128));
        lengths.into_iter().any(|(&(_, bits), _)| {
            IpNet::new(ip, bits).is_ok_and(|net| self.ranges.contains_key(&net.trunc()))
        })
    }
}

fn length(range: &IpNet) -> (bool, u8) {
    (matches!(range, IpNet::V6(_)), range.prefix_len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_both_families_and_several_lengths() {
        let mut ranges = Ranges::default();
        for range in [
            "10.244.0.0/24",
            "10.244.1.0/24",
            "10.245.0.0/26",
            "fd00:10::/64",
        ] {
            ranges.add(range.parse().unwrap());
        }
        let inside = |ranges: &Ranges, ip: &str| ranges.contains(ip.parse().unwrap());
        for ip in ["10.244.0.0", "10.244.1.255", "10.245.0.63", "fd00:10::1"] {
            assert!(inside(&ranges, ip), "{ip}");
        }
        for ip in ["10.244.2.0", "10.245.0.64", "fd00:11::1", "::"] {
            assert!(!inside(&ranges, ip), "{ip}");
        }
    }

    #[test]
    fn a_range_of_two_nodes_stays_until_both_are_gone() {
        let mut ranges = Ranges::default();
        let range: IpNet = "10.0.0.0/16".parse().unwrap();
        ranges.add(range);
        ranges.add(range);
        ranges.remove(range);
        assert!(ranges.contains("10.0.3.4".parse().unwrap()));
        ranges.remove(range);
        assert!(!ranges.contains("10.0.3.4".parse().unwrap()));
        ranges.remove(range);
        assert!(ranges.lengths.is_empty());
    }
}
