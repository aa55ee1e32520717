//! Counters that someone else keeps: what the agent's are compared with.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::{Family, Host, Lab};

/// Packets of the named nft counter, summed over all tables of a host.
///
/// # Errors
/// nft fails, or no counter has that name.
pub fn nft(lab: &Lab, host: Host, name: &str) -> Result<u64> {
    let listing: Value =
        serde_json::from_str(&lab.run(host, "nft -j list counters")?).context("read nft's JSON")?;
    let counts: Vec<u64> = listing["nftables"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|entry| entry["counter"]["name"] == name)
        .filter_map(|entry| entry["counter"]["packets"].as_u64())
        .collect();
    ensure!(
        !counts.is_empty(),
        "no nft counter {name} at {}",
        host.name()
    );
    Ok(counts.iter().sum())
}

/// Packets of all rules of a chain with a target, as `iptables -vnxL` shows them; `tool` is
/// `iptables-legacy`, `ip6tables-nft` and so on.
///
/// # Errors
/// The tool fails, or the chain has no rule with that target.
pub fn iptables(lab: &Lab, host: Host, tool: &str, chain: &str, target: &str) -> Result<u64> {
    let listing = lab.run(host, &format!("{tool} -w -vnxL {chain}"))?;
    let counts: Vec<u64> = listing
        .lines()
        .skip(2)
        .map(|line| line.split_whitespace())
        .filter_map(|mut words| {
            let packets = words.next()?.parse().ok()?;
            (words.nth(1)? == target).then_some(packets)
        })
        .collect();
    ensure!(
        !counts.is_empty(),
        "{tool} has no rule {target} in {chain}:\n{listing}"
    );
    Ok(counts.iter().sum())
}

/// The packets that a clsact qdisc of a device dropped, both directions.
///
/// # Errors
/// tc fails, or the device has no clsact qdisc.
pub fn tc_drops(lab: &Lab, host: Host, device: &str) -> Result<u64> {
    let listing: Value =
        serde_json::from_str(&lab.run(host, &format!("tc -s -j qdisc show dev {device}"))?)
            .context("read tc's JSON")?;
    listing
        .as_array()
        .into_iter()
        .flatten()
        .find(|qdisc| qdisc["kind"] == "clsact")
        .and_then(|qdisc| qdisc["drops"].as_u64())
        .with_context(|| format!("no clsact qdisc on {device}"))
}

/// The kernel's SNMP counters of one network namespace, by `nstat`'s names: `UdpRcvbufErrors`,
/// `TcpExtIPReversePathFilter`, `Icmp6OutDestUnreachs`.
#[derive(Clone, Debug, Default)]
pub struct Snmp(HashMap<String, u64>);

impl Snmp {
    /// Reads them now.
    ///
    /// # Errors
    /// /proc is not there.
    pub fn read(lab: &Lab, host: Host) -> Result<Self> {
        lab.within(host, Self::here)
    }

    /// Reads those of the calling thread's namespace now.
    ///
    /// # Errors
    /// As [`Snmp::read`].
    pub fn here() -> Result<Self> {
        let read = |file: &str| {
            let path = format!("/proc/thread-self/net/{file}");
            std::fs::read_to_string(&path).with_context(|| format!("read {path}"))
        };
        let mut counters = HashMap::new();
        for file in ["snmp", "netstat"] {
            let text = read(file)?;
            let lines: Vec<&str> = text.lines().collect();
            for pair in lines.chunks(2) {
                let [names, values] = pair else { continue };
                let mut names = names.split_whitespace();
                let group = names
                    .next()
                    .unwrap_or_default()
                    .trim_end_matches(':')
                    .to_owned();
                for (name, value) in names.zip(values.split_whitespace().skip(1)) {
                    // Some are signed (MaxConn is -1): those are no counters.
                    if let Ok(value) = value.parse() {
                        counters.insert(format!("{group}{name}"), value);
                    }
                }
            }
        }
        for line in read("snmp6")?.lines() {
            if let Some((name, value)) = line.split_once(char::is_whitespace)
                && let Ok(value) = value.trim().parse()
            {
                counters.insert(name.to_owned(), value);
            }
        }
        Ok(Self(counters))
    }

    /// One counter; zero where the kernel does not show it.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// By how much one counter is ahead of an earlier reading.
    pub fn since(&self, before: &Self, name: &str) -> u64 {
        self.get(name) - before.get(name)
    }
}

/// The SNMP counters of client, router and server at one moment.
pub struct Snapshot {
    client: Snmp,
    router: Snmp,
    server: Snmp,
}

impl Snapshot {
    /// Reads them now.
    ///
    /// # Errors
    /// As [`Snmp::read`].
    pub fn take(lab: &Lab) -> Result<Self> {
        Ok(Self {
            client: Snmp::read(lab, Host::Client)?,
            router: Snmp::read(lab, Host::Router)?,
            server: Snmp::read(lab, Host::Server)?,
        })
    }

    /// By how much a counter of a host grew since then.
    ///
    /// # Errors
    /// As [`Snmp::read`].
    pub fn grown(&self, lab: &Lab, host: Host, name: &str) -> Result<u64> {
        let before = match host {
            Host::Client => &self.client,
            Host::Router => &self.router,
            Host::Server => &self.server,
            _ => anyhow::bail!("no snapshot of {}", host.name()),
        };
        Ok(Snmp::read(lab, host)?.since(before, name))
    }

    /// UDP datagrams that the client's kernel sent and the server's never saw.
    ///
    /// # Errors
    /// As [`Snmp::read`].
    pub fn lost_udp(&self, lab: &Lab, family: Family) -> Result<u64> {
        let udp = family.pick("Udp", "Udp6");
        let sent = self.grown(lab, Host::Client, &format!("{udp}OutDatagrams"))?;
        let mut arrived = 0;
        for name in ["InDatagrams", "NoPorts", "InErrors"] {
            arrived += self.grown(lab, Host::Server, &format!("{udp}{name}"))?;
        }
        Ok(sent - arrived)
    }

    /// The unreachable messages that a host sent: how many senders were told.
    ///
    /// # Errors
    /// As [`Snmp::read`].
    pub fn unreachables(&self, lab: &Lab, host: Host, family: Family) -> Result<u64> {
        self.grown(
            lab,
            host,
            family.pick("IcmpOutDestUnreachs", "Icmp6OutDestUnreachs"),
        )
    }
}

/// A column of `/proc/net/stat/nf_conntrack` of a host, summed over CPUs (the first, `entries`, is
/// the same on every CPU and is not summed).
///
/// # Errors
/// The kernel has no connection tracking, or no such column.
pub fn conntrack(lab: &Lab, host: Host, column: &str) -> Result<u64> {
    let text = lab.read(host, "/proc/thread-self/net/stat/nf_conntrack")?;
    let mut lines = text.lines();
    let index = lines
        .next()
        .and_then(|header| header.split_whitespace().position(|name| name == column))
        .with_context(|| format!("nf_conntrack shows no {column}"))?;
    let values: Vec<u64> = lines
        .filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(index)?, 16).ok())
        .collect();
    Ok(if index == 0 {
        values.first().copied().unwrap_or(0)
    } else {
        values.iter().sum()
    })
}
