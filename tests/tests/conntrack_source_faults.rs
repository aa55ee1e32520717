//! The conntrack source by itself: what goes wrong around it.

use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, ensure};
use tokio::sync::mpsc;
use whydrop::event::Protocol;
use whydrop::source::conntrack::{Destroy, Lookup, Setup, Source, Tuple, stats};
use whydrop::sync::lock;
use whydrop_tests::lab::{Family, Host, Place};
use whydrop_tests::traffic::{self, Connect};
use whydrop_tests::watching::*;

/// The kernel drops events that are not read in time; that is counted, said once, and mended.
#[test]
fn lost_events_are_said_and_mended() -> Result<()> {
    let lab = deaf_lab()?;
    let said = Said::listen()?;
    let mut watch = Watch::up(&lab, |setup| {
        setup.destroy = Destroy::On;
        // The kernel's smallest, which holds a few.
        setup.destroy_buffer_bytes = 1;
    })?;
    let closed = lab.socket(Place::Of(Host::Server), Family::V4, CLOSED);
    let flood = || -> Result<()> {
        let before = watch.totals().overruns;
        lab.within(Host::Client, || {
            wait_for("events are lost", || {
                (0..500).all(|_| traffic::connect(closed) == Connect::Refused)
                    && watch.totals().overruns > before
            })
        })
    };
    flood()?;
    flood()?;
    ensure!(
        said.lines("faster than they are read") == 1,
        "{}",
        said.all()
    );
    let status = watch.source.status();
    ensure!(status.up, "{status:?}");
    // Both ways still work: what dumps show, and what dies.
    single_syn(&lab, Family::V4, 2001, DEAF)?;
    let path = "net/netfilter/nf_conntrack_tcp_timeout_syn_sent";
    lab.sysctl(Host::Router, path, "1")?;
    single_syn(&lab, Family::V4, 2002, DEAF)?;
    let mut ports: Vec<_> = watch
        .take(2)?
        .iter()
        .map(|(_, attempt)| attempt.flow.source_port)
        .collect();
    ports.sort();
    ensure!(ports == [Some(2001), Some(2002)], "{ports:?}");
    ensure!(watch.totals().errors == 0, "{:?}", watch.totals());
    watch.stop()
}

/// Nothing is asked of an empty table, and nothing at all where conntrack is not loaded.
#[test]
fn nothing_is_done_where_there_is_nothing() -> Result<()> {
    let lab = deaf_lab()?;
    let proc = tempfile::tempdir()?;
    let netfilter = proc.path().join("sys/net");
    std::fs::create_dir_all(&netfilter)?;
    let mut unloaded = Watch::start(&lab, |setup| setup.proc = proc.path().to_owned())?;
    let mut empty = Watch::up(&lab, |_| {})?;
    wait_for("it is said", || {
        let status = unloaded.source.status();
        !status.up && status.why.is_some_and(|why| why.contains("not in use"))
    })?;
    // A third one is busy at the same time, so that it is known how much they could have done.
    let busy_lab = deaf_lab()?;
    single_syn(&busy_lab, Family::V4, 2001, DEAF)?;
    let busy = Watch::up(&busy_lab, |_| {})?;
    busy.dumps(4)?;
    for watch in [&unloaded, &empty] {
        let totals = watch.totals();
        ensure!((totals.dumps, totals.errors) == (0, 0), "{totals:?}");
    }
    ensure!(!unloaded.source.status().up && empty.source.status().up);
    let mut lookup = Lookup::new(proc.path());
    let tuple = Tuple::new(Protocol::TCP, "10.0.0.1:1".parse()?, "10.0.0.2:2".parse()?);
    ensure!(lookup.destination(&tuple)?.is_none());

    // The module is loaded, the first connection comes.
    symlink("/proc/sys/net/netfilter", netfilter.join("netfilter"))?;
    wait_for("it is up", || unloaded.source.status().up)?;
    single_syn(&lab, Family::V4, 2002, DEAF)?;
    for watch in [&mut unloaded, &mut empty] {
        let found = watch.take(1)?;
        ensure!(found[0].1.flow.source_port == Some(2002), "{found:?}");
    }
    for watch in [unloaded, empty, busy] {
        watch.stop()?;
    }
    Ok(())
}

/// What cannot be read now can be read later; meanwhile it is said, and tried less and less often.
#[test]
fn it_recovers_by_itself() -> Result<()> {
    let lab = deaf_lab()?;
    let proc = tempfile::tempdir()?;
    let netfilter = proc.path().join("sys/net/netfilter");
    // A directory in place of the file.
    let count = netfilter.join("nf_conntrack_count");
    std::fs::create_dir_all(&count)?;
    let mut watch = Watch::start(&lab, |setup| setup.proc = proc.path().to_owned())?;
    wait_for("it has tried twice", || watch.totals().errors >= 2)?;
    let status = watch.source.status();
    ensure!(
        !status.up && status.why.is_some() && status.lost.is_some(),
        "{status:?}"
    );
    std::fs::remove_dir(&count)?;
    symlink("/proc/sys/net/netfilter/nf_conntrack_count", &count)?;
    wait_for("it is up", || watch.source.status().up)?;
    single_syn(&lab, Family::V4, 2001, DEAF)?;
    watch.take(1)?;
    watch.stop()
}

/// Without CAP_NET_ADMIN the kernel refuses, which is said; nothing else comes of it.
#[test]
fn a_refusal_is_said() -> Result<()> {
    let lab = deaf_lab()?;
    single_syn(&lab, Family::V4, 2001, DEAF)?;
    let output = lab.within(Host::Router, || {
        Command::new("setpriv")
            .args(["--bounding-set", "-net_admin"])
            .arg(std::env::current_exe()?)
            .args([
                "--exact",
                "without_cap_net_admin",
                "--ignored",
                "--nocapture",
            ])
            .output()
            .context("start setpriv")
    })?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && said.contains("1 passed"),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[test]
#[ignore = "run by a_refusal_is_said, in a namespace with an entry and without CAP_NET_ADMIN"]
fn without_cap_net_admin() -> Result<()> {
    for destroy in [Destroy::Off, Destroy::On] {
        let mut setup = Setup::new(SYN_TIMEOUT, DNS_TIMEOUT, Arc::default(), Box::new(|_| true));
        setup.destroy = destroy;
        let (sender, mut attempts) = mpsc::channel(1);
        let source = Source::start(setup, sender)?;
        wait_for("it has tried twice", || source.totals().errors >= 2)?;
        let status = source.status();
        let why = status.why.unwrap_or_default();
        ensure!(!status.up && why.contains("CAP_NET_ADMIN"), "{why}");
        source.stop();
        wait_for("its end", || {
            matches!(
                attempts.try_recv(),
                Err(mpsc::error::TryRecvError::Disconnected)
            )
        })?;
    }
    let tuple = Tuple::new(Protocol::TCP, "10.0.0.1:1".parse()?, "10.0.0.2:2".parse()?);
    let refused = Lookup::new("/proc").destination(&tuple);
    ensure!(
        refused.is_err_and(|error| error.to_string().contains("CAP_NET_ADMIN")),
        "it is not refused"
    );
    // These need no right.
    ensure!(stats("/proc".as_ref()).entries == Some(1));
    Ok(())
}

/// The namespace is deleted while it is watched: it stays for as long as it is.
#[test]
fn a_namespace_may_be_deleted_meanwhile() -> Result<()> {
    let lab = deaf_lab()?;
    let mut watch = Watch::up(&lab, |_| {})?;
    single_syn(&lab, Family::V4, 2001, DEAF)?;
    wait_for("it is followed", || watch.totals().entries == 1)?;
    drop(lab);
    let found = watch.take(1)?;
    ensure!(found[0].1.flow.source_port == Some(2001), "{found:?}");
    watch.dumps(2)?;
    let totals = watch.totals();
    ensure!(watch.source.status().up && totals.errors == 0, "{totals:?}");
    watch.stop()
}

/// Nothing is lost to a reader that is slow; it is only late.
#[test]
fn a_slow_reader_loses_nothing() -> Result<()> {
    let lab = deaf_lab()?;
    let mut watch = Watch::up(&lab, |_| {})?;
    for port in [2001, 2002, 2003] {
        single_syn(&lab, Family::V4, port, DEAF)?;
        // The channel holds one batch, so each is one of its own.
        let entries = watch.totals().entries;
        wait_for("it is followed", || {
            watch.totals().entries > entries || entries == 3
        })?;
    }
    wait_for("the first is handed on", || watch.totals().reported > 0)?;
    watch.dumps(6)?;
    let mut ports: Vec<_> = watch
        .take(3)?
        .iter()
        .map(|(_, attempt)| attempt.flow.source_port)
        .collect();
    ports.sort();
    ensure!(ports == [Some(2001), Some(2002), Some(2003)], "{ports:?}");
    watch.nothing_more()?;
    watch.stop()
}

/// What is logged in this process from now on.
struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    fn listen() -> Result<Self> {
        let said = Arc::new(Mutex::new(Vec::new()));
        let writer = said.clone();
        tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || Line(writer.clone()))
            .try_init()
            .map_err(|error| anyhow::anyhow!("somebody listens already: {error}"))?;
        Ok(Self(said))
    }

    fn all(&self) -> String {
        String::from_utf8_lossy(&lock(&self.0)).into_owned()
    }

    fn lines(&self, with: &str) -> usize {
        self.all()
            .lines()
            .filter(|line| line.contains(with))
            .count()
    }
}

struct Line(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Line {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
