//! Answers that leave after their drop, because a neighbour had to be found first.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use whydrop_tests::agent::{Agent, POLL};
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::packet::{self, flags};
use whydrop_tests::{counters, expect, on_both_families, traffic};

on_both_families!(resets_leave_late);

/// How long the client does not say where it is.
const UNREACHABLE: Duration = Duration::from_millis(400);
/// Between two questions of the router, and how many it asks before it drops what waits: three seconds, as by
/// default.
const ASK_EVERY_MS: u32 = 200;
const QUESTIONS: u32 = 15;
/// Until a drop must be counted: waiting for an answer takes the agent 3.2 s.
const DEADLINE: Duration = Duration::from_secs(60);
/// Fewer than may wait for one neighbour (`unres_qlen_bytes`).
const SYNS: u16 = 50;

/// REJECT with a TCP reset, while the router does not know the client's link address: all resets
/// leave after their drops.
fn resets_leave_late(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let client = lab.address(Place::Of(Host::Client), family);
    let server = lab.address(Place::Of(Host::Server), family);
    let ip = family.nft();
    lab.nft(
        Host::Router,
        &format!(
            "table {ip} lab {{
               counter rejects {{ }}
               chain c {{ type filter hook forward priority 0;
                 {ip} daddr {server} tcp dport 80 counter name rejects reject with tcp reset
               }}
             }}"
        ),
    )?;
    // What arrives at the client: neighbour discovery is silenced for a while, resets are counted.
    let silenced = family.pick(
        "table arp silence { chain c { type filter hook input priority 0; drop; } }",
        "table ip6 silence { chain c { type filter hook input priority 0; icmpv6 type nd-neighbor-solicit drop; } }",
    );
    lab.nft(
        Host::Client,
        &silenced
            .replace(';', "\n")
            .replace('{', "{\n")
            .replace('}', "\n}"),
    )?;
    lab.nft(
        Host::Client,
        &format!(
            "table {ip} lab {{
               counter resets {{ }}
               chain c {{ type filter hook prerouting priority -300;
                 {ip} saddr {server} tcp flags & rst == rst counter name resets
               }}
             }}"
        ),
    )?;
    if family == Family::V6 {
        // Without a link-local address the router has none to ask from: the reset's own is another's.
        for (host, address, device) in [
            (Host::Router, "fe80::1", Host::Client.device()),
            (Host::Client, "fe80::2", "eth0".to_owned()),
        ] {
            lab.run(
                host,
                &format!("ip addr add {address}/64 dev {device} nodad"),
            )?;
        }
    }
    let agent = Agent::start(&lab)?;
    let device = Host::Client.device();
    let directory = format!("net/{}/neigh/{device}", family.pick("ipv4", "ipv6"));
    for (name, value) in [
        ("retrans_time_ms", ASK_EVERY_MS),
        ("mcast_solicit", QUESTIONS),
    ] {
        lab.sysctl(
            Host::Router,
            &format!("{directory}/{name}"),
            &value.to_string(),
        )?;
    }
    lab.run(Host::Router, &format!("ip neigh del {client} dev {device}"))?;

    let packets =
        (0..SYNS).map(|port| packet::segment((client, 40_000 + port), (server, 80), flags::SYN));
    let sent = lab.within(Host::Client, || traffic::raw_ip(server, packets))?;
    ensure!(counters::nft(&lab, Host::Router, "rejects")? == sent);
    // Not before the first question was lost.
    std::thread::sleep(UNREACHABLE);
    ensure!(
        counters::nft(&lab, Host::Client, "resets")? == 0,
        "the resets did not have to wait"
    );
    let table = family.pick("arp", "ip6");
    lab.run(Host::Client, &format!("nft delete table {table} silence"))?;

    let count = |outcome: &str| -> Result<u64> {
        Ok(agent
            .metrics()?
            .iter()
            .filter(|sample| sample.name == outcome)
            .filter(|sample| sample.label("source_namespace") == lab.namespace())
            .filter(|sample| sample.label("source_pod") == "client")
            .filter(|sample| sample.label("destination_pod") == "server")
            .map(|sample| sample.value as u64)
            .sum())
    };
    let deadline = Instant::now() + DEADLINE;
    let (silent, rejected) = loop {
        let counts = (
            count("whydrop_silent_drops_total")?,
            count("whydrop_rejected_packets_total")?,
        );
        if counts.0 + counts.1 >= sent {
            break counts;
        }
        ensure!(
            Instant::now() < deadline,
            "of {sent} drops {counts:?} are counted as silent and as rejected"
        );
        std::thread::sleep(POLL);
    };
    let resets = counters::nft(&lab, Host::Client, "resets")?;
    ensure!(resets == sent, "{resets} of {sent} resets arrived");
    ensure!(
        (silent, rejected) == (0, sent),
        "{silent} silent and {rejected} rejected, though all {sent} senders were told"
    );
    expect::barrier(&lab, &agent)?;
    ensure!(agent.stop()?.success());
    Ok(())
}
