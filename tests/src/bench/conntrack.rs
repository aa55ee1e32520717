//! `conntrack`: what it takes to ask the conntrack table, and what listening to it would cost others.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use whydrop::event::Protocol;
use whydrop::source::conntrack::{Destroy, Lookup, Tuple};

use super::ends::{Ends, Traffic};
use super::report::{Must, Report, median};
use crate::lab::{Family, Host, Lab, Place, TC_STOLEN};
use crate::traffic::{self, Connect};
use crate::watching::{Watch, wait_for};
use crate::{packet, tracked};

/// Entries of the table; few of them are without an answer.
const TABLES: [u64; 3] = [1_000, 20_000, 100_000];
const UNANSWERED: u16 = 50;
/// Of each kind.
const DUMPS: usize = 3;
const LOOK_UPS: u32 = 20_000;
/// Rounds, each with and without the listener; which comes first alternates.
const ROUNDS: usize = 21;
const TIME: Duration = Duration::from_millis(500);

/// Dumps and look-ups of tables of several sizes; connects with and without a listener for destroyed
/// entries.
///
/// # Errors
/// The lab cannot be made, or the kernel does not answer.
pub fn conntrack(report: &mut Report) -> Result<()> {
    tables(report)?;
    listeners(report)
}

fn tables(report: &mut Report) -> Result<()> {
    let lab = tracking_lab()?;
    let liberal = "net/netfilter/nf_conntrack_tcp_be_liberal";
    lab.sysctl(Host::Router, liberal, "1")?;
    // Neither end sees what fills the table.
    for host in [Host::Client, Host::Server] {
        lab.tc(host, "eth0", "ingress", TC_STOLEN)?;
    }
    let client = lab.address(Place::Of(Host::Client), Family::V4);
    let server = lab.address(Place::Of(Host::Server), Family::V4);
    let syns = (0..UNANSWERED)
        .map(|port| packet::segment((client, 500 + port), (server, 80), packet::flags::SYN));
    lab.within(Host::Client, || traffic::raw_ip(server, syns))?;
    for entries in TABLES {
        tracked::fill(&lab, Family::V4, entries)?;
        for (kernel_filter, by) in [(true, "the kernel"), (false, "whydrop")] {
            let dumps = dumps(&lab, kernel_filter)?;
            report.figure(
                format!("dump of {entries} entries, filtered by {by}"),
                median(&dumps),
                "ms",
                Must::Shown,
            );
            report.round(json!({"entries": entries, "filtered_by": by, "ms": dumps}));
        }
        let known = Tuple::new(Protocol::TCP, (client, 500).into(), (server, 80).into());
        report.figure(
            format!("look-up in {entries} entries"),
            look_up(&lab, &known)?,
            "us",
            Must::Below(20.0),
        );
    }
    Ok(())
}

/// A lab of its own, in which the router tracks connections.
fn tracking_lab() -> Result<Lab> {
    let lab = Lab::alone()?;
    lab.nft(
        Host::Router,
        "table inet lab { chain c { type filter hook forward priority 0;
             ct state new accept
           }
         }",
    )?;
    Ok(lab)
}

/// Milliseconds of CPU time that each of some dumps takes.
fn dumps(lab: &Lab, kernel_filter: bool) -> Result<Vec<f64>> {
    let watch = Watch::up(lab, |setup| setup.kernel_filter = kernel_filter)?;
    let mut dumps = Vec::new();
    let mut seen = 0;
    wait_for("dumps", || {
        let totals = watch.totals();
        if totals.dumps > seen {
            seen = totals.dumps;
            dumps.push(totals.last_dump.as_secs_f64() * 1000.0);
        }
        dumps.len() >= DUMPS
    })?;
    watch.stop()?;
    Ok(dumps)
}

/// Microseconds of a look-up.
fn look_up(lab: &Lab, known: &Tuple) -> Result<f64> {
    lab.within(Host::Router, || {
        let mut lookup = Lookup::new("/proc");
        let started = Instant::now();
        for _ in 0..LOOK_UPS {
            let found = lookup.destination(known)?;
            ensure!(found == Some(known.destination()), "not found: {known:?}");
        }
        Ok(started.elapsed().as_secs_f64() * 1e6 / f64::from(LOOK_UPS))
    })
}

/// What is left of the rate of connects when someone listens to the end of each.
fn listeners(report: &mut Report) -> Result<()> {
    let lab = tracking_lab()?;
    // So that as many end as begin.
    let close = "net/netfilter/nf_conntrack_tcp_timeout_close";
    lab.sysctl(Host::Router, close, "1")?;
    let mut ends = Ends::new(&lab)?;
    let closed = lab.socket(Place::Of(Host::Server), Family::V4, 81);
    // By kind of connect: without and with a listener.
    let mut rates: [[Vec<f64>; 2]; 2] = Default::default();
    for round in 0..ROUNDS {
        for turn in 0..2 {
            let with = (round + turn) % 2;
            let listener = Watch::up(&lab, |setup| {
                setup.destroy = [Destroy::Off, Destroy::On][with];
            })?;
            lab.within(Host::Client, || -> Result<()> {
                let rate = |work: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
                    let mut measured = 0.0;
                    // What is measured is preceded by as much that is not.
                    for _ in 0..2 {
                        let (started, mut done) = (Instant::now(), 0u32);
                        while started.elapsed() < TIME {
                            work()?;
                            done += 1;
                        }
                        measured = f64::from(done) / started.elapsed().as_secs_f64();
                    }
                    Ok(measured)
                };
                rates[0][with].push(rate(&mut || ends.work(Traffic::TcpConnects, 1))?);
                rates[1][with].push(rate(&mut || {
                    ensure!(traffic::connect(closed) == Connect::Refused, "not refused");
                    Ok(())
                })?);
                Ok(())
            })?;
            listener.stop()?;
        }
    }
    for (kind, [without, with]) in ["made and reset", "refused"].iter().zip(&rates) {
        let ratios: Vec<f64> = with
            .iter()
            .zip(without)
            .map(|(with, without)| with / without)
            .collect();
        let name = |who| format!("connects, {kind}: {who}");
        report.figure(
            name("no listener"),
            median(without).round(),
            "1/s",
            Must::Shown,
        );
        report.figure(
            name("with a listener"),
            median(with).round(),
            "1/s",
            Must::Shown,
        );
        report.figure(name("with / without"), median(&ratios), "", Must::Shown);
        report.round(json!({"connects": kind, "without": without, "with": with}));
    }
    Ok(())
}
