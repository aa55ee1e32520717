//! The kernel's texts about namespaces.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use crate::cluster::PodUid;

/// The inode number of a namespace's name, `net:[4026531840]`: the target of `/proc/PID/ns/net`, and the
/// root of a bind mount (fs/nsfs.c, `ns_get_name`).
pub fn inode(name: &str) -> Option<u32> {
    let number = name.strip_prefix("net:[")?.strip_suffix(']')?;
    number.parse().ok()
}

/// The pod of a process by `/proc/PID/cgroup` (cgroups(7)), whose lines are
/// `HIERARCHY:CONTROLLERS:PATH`: any hierarchy of version 1 tells, and the one of version 2.
pub fn pod(cgroup: &str) -> Option<PodUid> {
    cgroup.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (_, path) = rest.split_once(':')?;
        PodUid::of_cgroup(path)
    })
}

/// The namespace's own IPv4 addresses by `/proc/net/fib_trie` (net/ipv4/fib_trie.c,
/// `fib_trie_seq_show`): leaves with a local host route. An address is in two tables, so twice.
pub fn ipv4_addresses(fib_trie: &str) -> impl Iterator<Item = IpAddr> {
    let mut leaf: Option<Ipv4Addr> = None;
    fib_trie.lines().filter_map(move |line| {
        let line = line.trim_start();
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse().ok();
            return None;
        }
        let local = line.starts_with("/32 host LOCAL");
        leaf.filter(|_| local).map(IpAddr::from)
    })
}

/// The namespace's own IPv6 addresses by `/proc/net/if_inet6` (net/ipv6/addrconf.c,
/// `if6_seq_show`): 32 digits at the start of each line.
pub fn ipv6_addresses(if_inet6: &str) -> impl Iterator<Item = IpAddr> {
    if_inet6.lines().filter_map(|line| {
        let digits = line.split_ascii_whitespace().next()?;
        let bits = u128::from_str_radix(digits, 16).ok()?;
        (digits.len() == 32).then(|| Ipv6Addr::from_bits(bits).into())
    })
}

/// Whether an address can tell a pod: every namespace has loopback and link-local ones.
pub fn tells(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local() && !ip.is_unspecified(),
    }
}

/// The bind mounts of network namespaces in `/proc/PID/mountinfo` (proc_pid_mountinfo(5)): inode
/// number and place.
pub fn mounts(mountinfo: &str) -> impl Iterator<Item = (u32, PathBuf)> {
    mountinfo.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(3);
        let id = inode(fields.next()?)?;
        Some((id, unescape(fields.next()?).into()))
    })
}

/// Blanks, tabs, newlines and backslashes are written as `\` and three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|c| u8::from_str_radix(c, 8).ok());
        match code {
            Some(code) => {
                plain.push(char::from(code));
                plain += &part[3..];
            }
            None => {
                plain.push('\\');
                plain += part;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "9f0c5a1e-2b7d-4f60-8a43-1d2e3f405162";

    fn texts(ips: impl Iterator<Item = IpAddr>) -> Vec<String> {
        ips.map(|ip| ip.to_string()).collect()
    }

    #[test]
    fn names_of_namespaces() {
        assert_eq!(inode("net:[4026531833]"), Some(4_026_531_833));
        for other in [
            "mnt:[4026531832]",
            "net:[4026531833",
            "net:[]",
            "net:[99999999999]",
            "/",
        ] {
            assert_eq!(inode(other), None, "{other}");
        }
    }

    #[test]
    fn a_pod_by_cgroups_of_both_versions() {
        let systemd = UID.replace('-', "_");
        let v2 = format!(
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{systemd}.slice/cri-containerd-3c1f.scope\n"
        );
        let v1 = format!(
            "12:pids:/kubepods/besteffort/pod{UID}/3c1f\n11:cpu,cpuacct:/kubepods/besteffort/pod{UID}/3c1f\n\
             1:name=systemd:/kubepods/besteffort/pod{UID}/3c1f\n0::/system.slice/containerd.service\n"
        );
        for text in [v2, v1] {
            assert_eq!(pod(&text), Some(PodUid::new(UID)), "{text}");
        }
        // Recorded here: a hybrid host, no Kubernetes.
        assert_eq!(pod(include_str!("fixtures/cgroup-hybrid")), None);
        assert_eq!(pod("no cgroup\n"), None);
    }

    #[test]
    fn addresses_are_the_local_ones_of_both_tables() {
        let trie = include_str!("fixtures/fib_trie");
        assert_eq!(
            texts(ipv4_addresses(trie)),
            [
                "10.244.1.7",
                "127.0.0.1",
                "169.254.7.7",
                "10.244.1.7",
                "127.0.0.1",
                "169.254.7.7"
            ],
            "no network, no broadcast, no routed address"
        );
        let inet6 = include_str!("fixtures/if_inet6");
        assert_eq!(
            texts(ipv6_addresses(inet6)),
            ["fe80::ff:fe00:107", "::1", "fd00:10:244:1::7"]
        );
        assert_eq!(texts(ipv4_addresses("")), [""; 0]);
        assert_eq!(texts(ipv6_addresses("fd00 01\nxyz\n\n")), [""; 0]);
    }

    #[test]
    fn what_every_namespace_has_tells_nothing() {
        let all = include_str!("fixtures/fib_trie");
        let told = ipv4_addresses(all).filter(|ip| tells(*ip));
        assert_eq!(texts(told), ["10.244.1.7", "10.244.1.7"]);
        let told = ipv6_addresses(include_str!("fixtures/if_inet6")).filter(|ip| tells(*ip));
        assert_eq!(texts(told), ["fd00:10:244:1::7"]);
    }

    #[test]
    fn bind_mounts_of_namespaces_among_others() {
        let found: Vec<_> = mounts(include_str!("fixtures/mountinfo")).collect();
        let found: Vec<_> = found
            .iter()
            .map(|(id, path)| (*id, path.to_str().unwrap()))
            .collect();
        assert_eq!(
            found,
            [
                (4_026_532_177, "/run/netns/one"),
                (4_026_532_246, "/run/netns/two words"),
            ]
        );
        assert_eq!(unescape(r"a\040b\134c\9"), r"a b\c\9");
    }
}
