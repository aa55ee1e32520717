//! The lab itself: it carries traffic, labs do not meet, and nothing of it stays.

use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use whydrop_tests::bystander::{Bystander, Habit};
use whydrop_tests::counters::Snapshot;
use whydrop_tests::lab::{Family, Host, Lab, Place, command};
use whydrop_tests::traffic::{self, Connect};

fn namespaces(lab: &Lab) -> Vec<PathBuf> {
    Host::ALL
        .map(|host| Path::new("/run/netns").join(lab.netns(host)))
        .to_vec()
}

#[test]
fn carries_traffic() -> Result<()> {
    let lab = Lab::new()?;
    for family in Family::BOTH {
        let at = lab.socket(Place::Of(Host::Server), family, 80);
        let listener = lab.within(Host::Server, || TcpListener::bind(at))?;
        let outcome = lab.within(Host::Client, || traffic::connect(at));
        ensure!(outcome == Connect::Established, "{family}: {outcome:?}");
        drop(listener);
        let before = Snapshot::take(&lab)?;
        lab.within(Host::Client, || traffic::udp_burst(at, 100, 4, b"datagram"))?;
        let lost = before.lost_udp(&lab, family)?;
        ensure!(
            lost == 0,
            "{family}: {lost} datagrams were lost without a dropper"
        );
        Bystander::start(&lab, family, Habit::Connects)?.finish()?;
    }
    Ok(())
}

#[test]
fn labs_do_not_meet() -> Result<()> {
    let (one, two) = (Lab::new()?, Lab::new()?);
    ensure!(one.id() != two.id());
    for family in Family::BOTH {
        ensure!(one.range(family) != two.range(family));
        let to = two.socket(Place::Of(Host::Server), family, 80);
        let outcome = one.within(Host::Client, || traffic::connect(to));
        ensure!(
            !matches!(outcome, Connect::Established | Connect::Refused),
            "{outcome:?}"
        );
    }
    Ok(())
}

#[test]
fn leaves_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let paths = namespaces(&lab);
    ensure!(paths.iter().all(|path| path.exists()));
    drop(lab);
    ensure!(!paths.iter().any(|path| path.exists()), "{paths:?}");
    Ok(())
}

#[test]
fn leaves_nothing_after_a_panic() -> Result<()> {
    let lab = Lab::new()?;
    let paths = namespaces(&lab);
    let panic = catch_unwind(AssertUnwindSafe(move || {
        lab.within(Host::Client, || panic!("a test that fails"));
    }));
    ensure!(
        panic.is_err() && !paths.iter().any(|path| path.exists()),
        "{paths:?}"
    );
    Ok(())
}

/// A namespace whose process was killed is removed by the next lab.
#[test]
fn removes_leftovers() -> Result<()> {
    // A number that no lab takes.
    let name = "wdlab40000-client";
    command(&["ip", "netns", "add", name], None)?;
    let _lab = Lab::new()?;
    ensure!(!Path::new("/run/netns").join(name).exists());
    Ok(())
}
