//! Drops by connection tracking: packets that fit no connection, and a table that is full.

use anyhow::{Result, ensure};
use whydrop_tests::bystander::Habit;
use whydrop_tests::counters::{self, conntrack};
use whydrop_tests::expect::Row;
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::on_both_families;
use whydrop_tests::packet::{self, flags};
use whydrop_tests::scene::{Scene, TCP_PORT};
use whydrop_tests::tracked;
use whydrop_tests::traffic::Connect;

const NFT: [&str; 2] = ["nft_do_chain", "nf_hook_slow"];
const LEGACY: [&str; 1] = ["nf_hook_slow"];
const REASON: [&str; 1] = ["NETFILTER_DROP"];

on_both_families!(ct_invalid_nft, ct_invalid_legacy, conntrack_full);

/// Resets of connections that the router never saw: conntrack calls them INVALID.
fn stray_resets(scene: &Scene) -> Result<u64> {
    let client = scene.address(Place::Of(Host::Client));
    let server = scene.address(Place::Of(Host::Server));
    scene.raw(
        (0..30)
            .map(|port| packet::segment((client, 40_000 + port), (server, TCP_PORT), flags::RST)),
    )
}

fn ct_invalid_nft(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        lab.nft(
            Host::Router,
            "table inet lab { counter strays { }
               chain c { type filter hook forward priority 0; ct state invalid counter name strays drop
             }
             }",
        )
    })?;
    stray_resets(&scene)?;
    let all = counters::nft(&scene.lab, Host::Router, "strays")?;
    ensure!(all == 30, "nft counted {all}");
    scene.expect(&[Row::dropped("client", "server", all)
        .protocol("TCP")
        .reason(&REASON)
        .at(&NFT)])
}

fn ct_invalid_legacy(family: Family) -> Result<()> {
    let tool = family.pick("iptables-legacy", "ip6tables-legacy");
    let scene = Scene::new(family, |lab| {
        lab.run(
            Host::Router,
            &format!("{tool} -w -A FORWARD -m conntrack --ctstate INVALID -j DROP"),
        )
        .map(drop)
    })?;
    stray_resets(&scene)?;
    let all = counters::iptables(&scene.lab, Host::Router, tool, "FORWARD", "DROP")?;
    ensure!(all == 30, "{tool} counted {all}");
    scene.expect(&[Row::dropped("client", "server", all)
        .protocol("TCP")
        .reason(&REASON)
        .at(&LEGACY)])
}

/// The conntrack table of the router's namespace is full: nothing new passes.
///
/// The limit is one for the whole machine and may not be touched, but entries are counted for each
/// namespace. So the table is really filled: with connections that both sides have used, which the
/// kernel does not evict early. They go with the namespace.
fn conntrack_full(family: Family) -> Result<()> {
    let limit: u64 = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max")?
        .trim()
        .parse()?;
    ensure!(
        limit <= 600_000,
        "nf_conntrack_max is {limit}: so many entries take more memory than a test may"
    );
    let scene = Scene::with(Lab::new()?, family, Habit::Lasting, |lab| {
        lab.nft(
            Host::Router,
            "table inet lab {
               chain c { type filter hook forward priority 0;
                 ct state new accept
               }
             }",
        )?;
        tracked::prepare(lab)
    })?;
    tracked::fill(&scene.lab, family, limit)?;
    scene.udp(30)?;
    ensure!(scene.connect() == Connect::Silent);
    let all = conntrack(&scene.lab, Host::Router, "drop")?;
    let evicted = conntrack(&scene.lab, Host::Router, "early_drop")?;
    ensure!(
        all >= 31 && evicted == 0,
        "conntrack dropped {all}, evicted {evicted}"
    );
    scene.expect(&[
        Row::dropped("client", "server", 30)
            .protocol("UDP")
            .reason(&REASON)
            .at(&LEGACY),
        Row::dropped("client", "server", all - 30)
            .syn()
            .reason(&REASON)
            .at(&LEGACY),
    ])
}
