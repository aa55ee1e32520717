//! Drops by rules of netfilter: nft, both iptables, ipset, REJECT.

use anyhow::{Result, ensure};
use whydrop_tests::counters;
use whydrop_tests::expect::Row;
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::on_both_families;
use whydrop_tests::scene::{Scene, TCP_PORT, UDP_PORT};
use whydrop_tests::traffic::{Burst, Connect};

/// Where the kernel frees a packet by verdict of a rule: in nft's chain or in the hook, by version.
const NFT: [&str; 2] = ["nft_do_chain", "nf_hook_slow"];
const LEGACY: [&str; 1] = ["nf_hook_slow"];
const REASON: [&str; 1] = ["NETFILTER_DROP"];

on_both_families!(
    nft_forward,
    nft_input,
    nft_output,
    nft_policy,
    nft_reject_told_to_all,
    nft_reject_rate_limited,
    nft_reset,
    nft_reject_input,
    legacy_drop,
    legacy_reject,
    legacy_reset,
    iptables_nft_drop,
    iptables_nft_reject,
    iptables_nft_reset,
    ipset_legacy,
    ipset_nft,
);

/// nft rules at a hook for what the client sends to the server: UDP and TCP, each with a counter.
fn nft(lab: &Lab, host: Host, hook: &str, family: Family, udp: &str, tcp: &str) -> Result<()> {
    let (ip, server) = (family.nft(), lab.address(Place::Of(Host::Server), family));
    lab.nft(
        host,
        &format!(
            "table inet lab {{
               counter datagrams {{ }}
               counter syns {{ }}
               chain c {{ type filter hook {hook} priority 0;
                 {ip} daddr {server} udp dport {UDP_PORT} counter name datagrams {udp}
                 {ip} daddr {server} tcp dport {TCP_PORT} counter name syns {tcp}
               }}
             }}"
        ),
    )
}

/// Drops datagrams and SYNs by nft at a host's hook, and expects both silent.
fn nft_drop(family: Family, host: Host, hook: &str) -> Result<()> {
    let scene = Scene::new(family, |lab| nft(lab, host, hook, family, "drop", "drop"))?;
    scene.udp(30)?;
    for _ in 0..3 {
        ensure!(scene.connect() == Connect::Silent);
    }
    let udp = counters::nft(&scene.lab, host, "datagrams")?;
    let tcp = counters::nft(&scene.lab, host, "syns")?;
    // Another SYN where the test was late to give up.
    ensure!(udp == 30 && tcp >= 3, "nft counted {udp} and {tcp}");
    scene.expect(&[
        Row::dropped("client", "server", udp)
            .protocol("UDP")
            .reason(&REASON)
            .at(&NFT),
        Row::dropped("client", "server", tcp)
            .syn()
            .reason(&REASON)
            .at(&NFT),
    ])
}

fn nft_forward(family: Family) -> Result<()> {
    nft_drop(family, Host::Router, "forward")
}

fn nft_input(family: Family) -> Result<()> {
    nft_drop(family, Host::Server, "input")
}

/// At OUTPUT the sender of a datagram is told by EPERM; a SYN is silent, its connect hangs.
fn nft_output(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        nft(lab, Host::Client, "output", family, "drop", "drop")
    })?;
    let burst = scene.udp(30)?;
    ensure!(
        burst
            == Burst {
                accepted: 0,
                refused: 30
            },
        "{burst:?}"
    );
    ensure!(scene.connect() == Connect::Silent);
    let udp = counters::nft(&scene.lab, Host::Client, "datagrams")?;
    let tcp = counters::nft(&scene.lab, Host::Client, "syns")?;
    ensure!(udp == 30 && tcp >= 1, "nft counted {udp} and {tcp}");
    scene.expect(&[
        Row::rejected("client", "server", udp)
            .protocol("UDP")
            .reason(&REASON)
            .at(&NFT),
        Row::dropped("client", "server", tcp)
            .syn()
            .reason(&REASON)
            .at(&NFT),
    ])
}

/// A chain's policy drops what no rule accepts.
fn nft_policy(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        let ip = family.nft();
        let client2 = lab.address(Place::Of(Host::Client2), family);
        let server2 = lab.address(Place::Of(Host::Server2), family);
        lab.nft(
            Host::Router,
            &format!(
                "table inet lab {{
                   counter others {{ }}
                   chain c {{ type filter hook forward priority 0; policy drop;
                     {ip} saddr {client2} accept
                     {ip} saddr {server2} accept
                     counter name others
                   }}
                 }}"
            ),
        )
    })?;
    scene.udp(30)?;
    let all = counters::nft(&scene.lab, Host::Router, "others")?;
    ensure!(all == 30, "nft counted {all}");
    scene.expect(&[Row::dropped("client", "server", all)
        .protocol("UDP")
        .reason(&REASON)
        .at(&NFT)])
}

/// With the kernel's limits on ICMP out of the way, every sender is told.
fn nft_reject_told_to_all(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        nft(lab, Host::Router, "forward", family, "reject", "reject")?;
        lab.unlimited_icmp(Host::Router)
    })?;
    scene.udp(30)?;
    let udp = counters::nft(&scene.lab, Host::Router, "datagrams")?;
    let told = scene.unreachables(Host::Router)?;
    ensure!(
        (udp, told) == (30, 30),
        "nft counted {udp}, {told} were told"
    );
    scene.expect(&[Row::rejected("client", "server", udp)
        .protocol("UDP")
        .reason(&REASON)
        .at(&NFT)])
}

/// The kernel limits how many ICMP errors it sends: who got none was dropped silently.
fn nft_reject_rate_limited(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        nft(lab, Host::Router, "forward", family, "reject", "reject")
    })?;
    scene.udp(30)?;
    let udp = counters::nft(&scene.lab, Host::Router, "datagrams")?;
    let told = scene.unreachables(Host::Router)?;
    ensure!(
        udp == 30 && told > 0 && told < 30,
        "nft counted {udp}, {told} were told"
    );
    scene.expect(&[
        Row::rejected("client", "server", told)
            .protocol("UDP")
            .reason(&REASON)
            .at(&NFT),
        Row::dropped("client", "server", udp - told)
            .protocol("UDP")
            .reason(&REASON)
            .at(&NFT),
    ])
}

fn nft_reset(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        nft(
            lab,
            Host::Router,
            "forward",
            family,
            "drop",
            "reject with tcp reset",
        )
    })?;
    for _ in 0..20 {
        ensure!(scene.connect() == Connect::Refused);
    }
    let tcp = counters::nft(&scene.lab, Host::Router, "syns")?;
    ensure!(tcp == 20, "nft counted {tcp}");
    scene.expect(&[Row::rejected("client", "server", tcp)
        .syn()
        .reason(&REASON)
        .at(&NFT)])
}

/// At the receiver itself, both ways of telling.
fn nft_reject_input(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        nft(
            lab,
            Host::Server,
            "input",
            family,
            "reject",
            "reject with tcp reset",
        )?;
        lab.unlimited_icmp(Host::Server)
    })?;
    scene.udp(30)?;
    for _ in 0..5 {
        ensure!(scene.connect() == Connect::Refused);
    }
    let udp = counters::nft(&scene.lab, Host::Server, "datagrams")?;
    let tcp = counters::nft(&scene.lab, Host::Server, "syns")?;
    let told = scene.unreachables(Host::Server)?;
    ensure!(
        (udp, tcp, told) == (30, 5, 30),
        "nft counted {udp} and {tcp}, {told} were told"
    );
    scene.expect(&[
        Row::rejected("client", "server", udp)
            .protocol("UDP")
            .reason(&REASON)
            .at(&NFT),
        Row::rejected("client", "server", tcp)
            .syn()
            .reason(&REASON)
            .at(&NFT),
    ])
}

/// `iptables` or `ip6tables` of a kind (`legacy`, `nft`).
fn tool(kind: &str, family: Family) -> String {
    format!("{}-{kind}", family.pick("iptables", "ip6tables"))
}

/// A rule at FORWARD for what the client sends to the server.
fn iptables(lab: &Lab, kind: &str, family: Family, protocol: &str, target: &str) -> Result<()> {
    let (tool, server) = (
        tool(kind, family),
        lab.address(Place::Of(Host::Server), family),
    );
    lab.run(
        Host::Router,
        &format!("{tool} -w -A FORWARD -d {server} -p {protocol} -j {target}"),
    )
    .map(drop)
}

fn iptables_drop(family: Family, kind: &str, places: &[&'static str]) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        iptables(lab, kind, family, "udp", "DROP")?;
        iptables(lab, kind, family, "tcp", "DROP")
    })?;
    scene.udp(30)?;
    ensure!(scene.connect() == Connect::Silent);
    let all = counters::iptables(
        &scene.lab,
        Host::Router,
        &tool(kind, family),
        "FORWARD",
        "DROP",
    )?;
    ensure!(all >= 31, "{} counted {all}", tool(kind, family));
    scene.expect(&[
        Row::dropped("client", "server", 30)
            .protocol("UDP")
            .reason(&REASON)
            .at(places),
        Row::dropped("client", "server", all - 30)
            .syn()
            .reason(&REASON)
            .at(places),
    ])
}

fn iptables_reject(family: Family, kind: &str, places: &[&'static str]) -> Result<()> {
    let scene = Scene::new(family, |lab| iptables(lab, kind, family, "udp", "REJECT"))?;
    scene.udp(30)?;
    let all = counters::iptables(
        &scene.lab,
        Host::Router,
        &tool(kind, family),
        "FORWARD",
        "REJECT",
    )?;
    let told = scene.unreachables(Host::Router)?;
    ensure!(
        all == 30 && told > 0,
        "{} counted {all}, {told} were told",
        tool(kind, family)
    );
    scene.expect(&[
        Row::rejected("client", "server", told)
            .protocol("UDP")
            .reason(&REASON)
            .at(places),
        Row::dropped("client", "server", all - told)
            .protocol("UDP")
            .reason(&REASON)
            .at(places),
    ])
}

fn iptables_reset(family: Family, kind: &str, places: &[&'static str]) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        iptables(lab, kind, family, "tcp", "REJECT --reject-with tcp-reset")
    })?;
    for _ in 0..20 {
        ensure!(scene.connect() == Connect::Refused);
    }
    let all = counters::iptables(
        &scene.lab,
        Host::Router,
        &tool(kind, family),
        "FORWARD",
        "REJECT",
    )?;
    ensure!(all == 20, "{} counted {all}", tool(kind, family));
    scene.expect(&[Row::rejected("client", "server", all)
        .syn()
        .reason(&REASON)
        .at(places)])
}

fn legacy_drop(family: Family) -> Result<()> {
    iptables_drop(family, "legacy", &LEGACY)
}

fn legacy_reject(family: Family) -> Result<()> {
    iptables_reject(family, "legacy", &LEGACY)
}

fn legacy_reset(family: Family) -> Result<()> {
    iptables_reset(family, "legacy", &LEGACY)
}

fn iptables_nft_drop(family: Family) -> Result<()> {
    iptables_drop(family, "nft", &NFT)
}

fn iptables_nft_reject(family: Family) -> Result<()> {
    iptables_reject(family, "nft", &NFT)
}

fn iptables_nft_reset(family: Family) -> Result<()> {
    iptables_reset(family, "nft", &NFT)
}

/// A set of addresses, as a policy enforcer that uses ipset keeps it; the set counts as well.
fn ipset(family: Family, kind: &str, places: &[&'static str]) -> Result<()> {
    let tool = tool(kind, family);
    let scene = Scene::new(family, |lab| {
        let server = lab.address(Place::Of(Host::Server), family);
        let inet = family.pick("inet", "inet6");
        for line in [
            format!("ipset create denied hash:ip family {inet} counters"),
            format!("ipset add denied {server}"),
            format!("{tool} -w -A FORWARD -m set --match-set denied dst -j DROP"),
        ] {
            lab.run(Host::Router, &line)?;
        }
        Ok(())
    })?;
    scene.udp(30)?;
    let all = counters::iptables(&scene.lab, Host::Router, &tool, "FORWARD", "DROP")?;
    let set = scene.lab.run(Host::Router, "ipset list denied")?;
    ensure!(
        all == 30 && set.contains(" packets 30 "),
        "{tool} counted {all}; {set}"
    );
    scene.expect(&[Row::dropped("client", "server", all)
        .protocol("UDP")
        .reason(&REASON)
        .at(places)])
}

fn ipset_legacy(family: Family) -> Result<()> {
    ipset(family, "legacy", &LEGACY)
}

fn ipset_nft(family: Family) -> Result<()> {
    ipset(family, "nft", &NFT)
}
