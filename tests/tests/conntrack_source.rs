//! The conntrack source by itself, in the namespace of a router between hosts that do not answer.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jiff::{SignedDuration, Timestamp};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
use tokio::sync::mpsc;
use whydrop::decode::attempt::Attempt;
use whydrop::event::{Kind, Protocol};
use whydrop::source::conntrack::{
    Destroy, LocalTuples, Lookup, NOTED_WITHIN, Setup, Source, Totals, Tuple, stats,
};
use whydrop_tests::agent::POLL;
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::traffic::{self, Connect};
use whydrop_tests::{counters, on_both_families, packet};

/// In these tests. A SYN is sent again after 1 s, in the midst of it.
const SYN_TIMEOUT: Duration = Duration::from_millis(1_500);
const DNS_TIMEOUT: Duration = Duration::from_millis(1_000);
/// Between two dumps.
const PERIOD: Duration = Duration::from_millis(500);
/// What the other work of the machine may take.
const SLACK: Duration = Duration::from_millis(500);
/// For what must come.
const PATIENCE: Duration = Duration::from_secs(15);

/// At the server: open, closed, and deaf.
const OPEN: u16 = 80;
const CLOSED: u16 = 81;
const DEAF: u16 = 5432;
/// A UDP port that does not answer, and is not DNS.
const DEAF_UDP: u16 = 9999;
const DNS: u16 = 53;

on_both_families!(
    unanswered_is_found_in_time_and_once,
    the_real_destination_is_known,
    what_is_counted_elsewhere_is_not_reported,
    what_died_unanswered_is_reported_if_asked_for,
);

/// A lab whose router tracks connections, and whose server is deaf to some.
fn lab() -> Result<Lab> {
    let lab = Lab::new()?;
    lab.nft(
        Host::Router,
        "table inet lab { chain c { type filter hook forward priority 0;
             ct state new accept
           }
         }",
    )?;
    lab.nft(
        Host::Server,
        &format!(
            "table inet lab {{ chain c {{ type filter hook input priority 0;
                 tcp dport {DEAF} drop
                 udp dport {{ {DEAF_UDP}, {DNS} }} drop
               }}
             }}"
        ),
    )?;
    Ok(lab)
}

/// A running source and what it has found.
struct Watch {
    source: Source,
    attempts: mpsc::Receiver<Vec<Attempt>>,
    local: Arc<Mutex<LocalTuples>>,
}

impl Watch {
    /// Starts one at the router, to which every sender is foreign, unless `change` says otherwise.
    fn start(lab: &Lab, change: impl FnOnce(&mut Setup) + Send) -> Result<Self> {
        let local = Arc::new(Mutex::new(LocalTuples::new()));
        let mut setup = Setup::new(SYN_TIMEOUT, DNS_TIMEOUT, local.clone(), Box::new(|_| true));
        change(&mut setup);
        let (sender, attempts) = mpsc::channel(1);
        let source = lab
            .within(Host::Router, || Source::start(setup, sender))
            .context("start the source")?;
        Ok(Self {
            source,
            attempts,
            local,
        })
    }

    /// Starts one and waits until the kernel has answered it.
    fn up(lab: &Lab, change: impl FnOnce(&mut Setup) + Send) -> Result<Self> {
        let watch = Self::start(lab, change)?;
        wait_for("the source is up", || watch.source.status().up)?;
        Ok(watch)
    }

    /// What is found until there is so much of it, and when.
    fn take(&mut self, attempts: usize) -> Result<Vec<(Instant, Attempt)>> {
        let mut found = Vec::new();
        wait_for("attempts are found", || {
            if let Ok(batch) = self.attempts.try_recv() {
                found.extend(batch.into_iter().map(|attempt| (Instant::now(), attempt)));
            }
            found.len() >= attempts
        })
        .with_context(|| format!("{found:?}, {:?}", self.source))?;
        ensure!(found.len() == attempts, "too many: {found:?}");
        Ok(found)
    }

    /// Nothing more comes, however long it is waited.
    fn nothing_more(&mut self) -> Result<()> {
        self.dumps(5)?;
        let more = self.attempts.try_recv();
        ensure!(more.is_err(), "found as well: {more:?}");
        Ok(())
    }

    /// Waits for dumps.
    fn dumps(&self, more: u64) -> Result<()> {
        let until = self.totals().dumps + more;
        wait_for("dumps", || self.totals().dumps >= until)
    }

    fn totals(&self) -> Totals {
        self.source.totals()
    }

    /// Ends it, which takes no time.
    fn stop(mut self) -> Result<()> {
        self.source.stop();
        let asked = Instant::now();
        wait_for("its end", || {
            matches!(
                self.attempts.try_recv(),
                Err(mpsc::error::TryRecvError::Disconnected)
            )
        })?;
        ensure!(asked.elapsed() < Duration::from_secs(1), "it ends late");
        ensure!(!self.source.status().up, "it is said to be up");
        Ok(())
    }
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        ensure!(Instant::now() < deadline, "waited too long: {what}");
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Begins a TCP connection from the client and leaves it to the kernel: source and socket.
fn begin_connect(lab: &Lab, family: Family, port: u16) -> Result<(SocketAddr, OwnedFd)> {
    let to = lab.socket(Place::Of(Host::Server), family, port);
    let from = lab.address(Place::Of(Host::Client), family);
    lab.within(Host::Client, || {
        let socket = socket(
            family.pick(AddressFamily::Inet, AddressFamily::Inet6),
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        let raw = socket.as_raw_fd();
        bind(raw, &SockaddrStorage::from(SocketAddr::new(from, 0)))?;
        match connect(raw, &SockaddrStorage::from(to)) {
            Err(Errno::EINPROGRESS) => {}
            result => result.context("it is not under way")?,
        }
        let name: SockaddrStorage = nix::sys::socket::getsockname(raw)?;
        let port = name
            .as_sockaddr_in()
            .map(|name| name.port())
            .or(name.as_sockaddr_in6().map(|name| name.port()));
        Ok((SocketAddr::new(from, port.context("no port")?), socket))
    })
}

/// One SYN that is never sent again, from a port of its own.
fn single_syn(lab: &Lab, family: Family, from: u16, to: u16) -> Result<Tuple> {
    let (client, server) = (
        lab.socket(Place::Of(Host::Client), family, from),
        lab.socket(Place::Of(Host::Server), family, to),
    );
    let syn = packet::segment((client.ip(), from), (server.ip(), to), packet::flags::SYN);
    lab.within(Host::Client, || traffic::raw_ip(server.ip(), [syn]))?;
    Ok(Tuple::new(Protocol::TCP, client, server))
}

fn unanswered_is_found_in_time_and_once(family: Family) -> Result<()> {
    let lab = lab()?;
    let open = lab.socket(Place::Of(Host::Server), family, OPEN);
    let _listener = lab.within(Host::Server, || TcpListener::bind(open))?;
    let echo = lab.socket(Place::Of(Host::Server), family, 1053);
    let echo = lab.within(Host::Server, || UdpSocket::bind(echo))?;
    // Answered DNS: the router sends it to a port that answers.
    lab.nft(
        Host::Router,
        "table inet dns { chain c { type nat hook prerouting priority -100;
             udp dport 1153 redirect to :53
           }
         }",
    )?;
    // What the router itself drops was never sent on, and no entry says that it was.
    lab.nft(
        Host::Router,
        "table inet wall { chain c { type filter hook forward priority 10; tcp dport 5433 drop
           }
         }",
    )?;
    let mut watch = Watch::up(&lab, |_| {})?;

    let before = Timestamp::now();
    let sent = Instant::now();
    let (source, _connecting) = begin_connect(&lab, family, DEAF)?;
    let asks = lab.address(Place::Of(Host::Client), family);
    let query = lab.within(Host::Client, || UdpSocket::bind((asks, 0)))?;
    query.send_to(
        b"no DNS in it",
        lab.socket(Place::Of(Host::Server), family, DNS),
    )?;
    let kept: Vec<UdpSocket> = lab.within(Host::Client, || -> Result<_> {
        ensure!(traffic::connect(open) == Connect::Established);
        let closed = SocketAddr::new(open.ip(), CLOSED);
        ensure!(traffic::connect(closed) == Connect::Refused);
        ensure!(traffic::connect(SocketAddr::new(open.ip(), 5433)) == Connect::Silent);
        // UDP that nobody answers and that is no DNS; and UDP that is answered.
        let (deaf, answered) = (UdpSocket::bind((asks, 0))?, UdpSocket::bind((asks, 0))?);
        deaf.send_to(b"x", SocketAddr::new(open.ip(), DEAF_UDP))?;
        answered.send_to(b"x", echo.local_addr()?)?;
        Ok(vec![deaf, answered])
    })?;
    let (_, back) = echo.recv_from(&mut [0; 8])?;
    echo.send_to(b"y", back)?;

    let mut found = watch.take(2)?;
    found.sort_by_key(|(_, attempt)| attempt.kind == Kind::Dns);
    let server = open.ip();
    for ((at, attempt), (kind, protocol, port, source, timeout)) in found.iter().zip([
        (Kind::Syn, Protocol::TCP, DEAF, source, SYN_TIMEOUT),
        (
            Kind::Dns,
            Protocol::UDP,
            DNS,
            query.local_addr()?,
            DNS_TIMEOUT,
        ),
    ]) {
        ensure!(attempt.kind == kind, "{attempt:?}");
        let flow = &attempt.flow;
        ensure!(
            (flow.protocol, flow.source, flow.source_port)
                == (protocol, source.ip(), Some(source.port()))
                && (flow.destination, flow.destination_port) == (server, Some(port))
                && flow.original_destination.is_none(),
            "{attempt:?}"
        );
        // Known at the first dump after it was sent, decided after the timeout and the time in
        // which its socket may still be noted.
        let took = *at - sent;
        ensure!(
            attempt.waited >= timeout && took >= timeout,
            "too early: {took:?} {attempt:?}"
        );
        ensure!(
            took <= timeout + PERIOD + NOTED_WITHIN + SLACK,
            "too late: {took:?} {attempt:?}"
        );
        let late = attempt.since.duration_since(before);
        ensure!(
            !late.is_negative() && late <= SignedDuration::try_from(PERIOD + SLACK)?,
            "since {late:?}: {attempt:?}"
        );
        ensure!(attempt.sent >= 1, "{attempt:?}");
    }
    watch.nothing_more()?;
    let totals = watch.totals();
    ensure!((totals.reported, totals.errors) == (2, 0), "{totals:?}");
    drop(kept);
    watch.stop()
}

fn the_real_destination_is_known(family: Family) -> Result<()> {
    let lab = lab()?;
    let service = lab.socket(Place::Service, family, 8080);
    let real = lab.socket(Place::Of(Host::Server), family, OPEN);
    let deaf = SocketAddr::new(real.ip(), DEAF);
    let (ip, host) = family.pick(
        ("ip", format!("{}", real.ip())),
        ("ip6", format!("[{}]", real.ip())),
    );
    lab.nft(
        Host::Router,
        &format!(
            "table inet services {{ chain c {{ type nat hook prerouting priority -100;
                 {ip} daddr {} tcp dport 8080 dnat {ip} to {host}:{OPEN}
                 {ip} daddr {0} tcp dport 8081 dnat {ip} to {host}:{DEAF}
                 {ip} daddr {0} udp dport 8053 dnat {ip} to {host}:{DNS}
               }}
             }}",
            service.ip()
        ),
    )?;
    let _listener = lab.within(Host::Server, || TcpListener::bind(real))?;
    let mut watch = Watch::up(&lab, |_| {})?;
    let (established, connecting, query) = lab.within(Host::Client, || -> Result<_> {
        let established = TcpStream::connect(service)?;
        let client = lab.address(Place::Of(Host::Client), family);
        let query = UdpSocket::bind((client, 0))?;
        query.send_to(b"x", SocketAddr::new(service.ip(), 8053))?;
        let to = SocketAddr::new(service.ip(), 8081);
        let syn = packet::segment((client, 2000), (to.ip(), to.port()), packet::flags::SYN);
        traffic::raw_ip(to.ip(), [syn])?;
        Ok((established, (SocketAddr::new(client, 2000), to), query))
    })?;

    let tuple = |protocol, source, destination| Tuple::new(protocol, source, destination);
    lab.within(Host::Router, || -> Result<()> {
        let mut lookup = Lookup::new("/proc");
        let mut real_of = |tuple| lookup.destination(&tuple).context("look up");
        let source = established.local_addr()?;
        ensure!(real_of(tuple(Protocol::TCP, source, service))? == Some(real));
        let (source, to) = connecting;
        ensure!(real_of(tuple(Protocol::TCP, source, to))? == Some(deaf));
        let asked = SocketAddr::new(service.ip(), 8053);
        let dns = SocketAddr::new(real.ip(), DNS);
        ensure!(real_of(tuple(Protocol::UDP, query.local_addr()?, asked))? == Some(dns));
        // Nobody has such a connection; the kernel knows this one by its other direction alone.
        ensure!(real_of(tuple(Protocol::UDP, source, to))?.is_none());
        ensure!(real_of(tuple(Protocol::TCP, real, established.local_addr()?))?.is_none());
        // Without DNAT it is the destination itself.
        let plain = single_syn(&lab, family, 2001, DEAF)?;
        ensure!(real_of(plain)? == Some(plain.destination()));
        Ok(())
    })?;

    let found = watch.take(3)?;
    let mut ends: Vec<_> = found
        .iter()
        .map(|(_, attempt)| {
            let flow = &attempt.flow;
            (flow.destination_port, flow.original_destination)
        })
        .collect();
    ends.sort();
    ensure!(
        ends == [
            (Some(DNS), Some((service.ip(), 8053))),
            (Some(DEAF), None),
            (Some(DEAF), Some((service.ip(), 8081))),
        ],
        "{found:?}"
    );
    watch.stop()
}

fn what_is_counted_elsewhere_is_not_reported(family: Family) -> Result<()> {
    let lab = lab()?;
    let not_foreign = lab.address(Place::Of(Host::Client2), family);
    let mut watch = Watch::up(&lab, |setup| {
        setup.is_foreign = Box::new(move |source| *source != not_foreign);
    })?;
    let noted = single_syn(&lab, family, 2001, DEAF)?;
    lab.within(Host::Client2, || {
        let to = lab.address(Place::Of(Host::Server), family);
        let syn = packet::segment((not_foreign, 2002), (to, DEAF), packet::flags::SYN);
        traffic::raw_ip(to, [syn])
    })?;
    wait_for("both are followed", || watch.totals().entries == 2)?;
    // As late as it may be: the timeout has passed. (The dump that showed it was before now.)
    let seen = Instant::now();
    wait_for("the timeout", || seen.elapsed() >= SYN_TIMEOUT)?;
    lock(&watch.local).insert(noted, Instant::now());
    wait_for("both are decided", || {
        let totals = watch.totals();
        totals.local + totals.not_foreign + totals.reported == 2
    })?;
    let totals = watch.totals();
    ensure!(
        (totals.local, totals.not_foreign, totals.reported) == (1, 1, 0),
        "{totals:?}"
    );

    // Where one could not be noted, nobody can tell.
    let now = Instant::now();
    for n in 0..=60_000 {
        let somewhere = SocketAddr::new(Ipv4Addr::from_bits(n).into(), 1);
        lock(&watch.local).insert(Tuple::new(Protocol::TCP, somewhere, somewhere), now);
    }
    ensure!(lock(&watch.local).has_lost(Instant::now()));
    single_syn(&lab, family, 2003, DEAF)?;
    wait_for("it is withheld", || watch.totals().withheld == 1)?;
    watch.nothing_more()?;
    watch.stop()
}

/// An entry whose timer is shorter than the timeout, and so dies before it.
fn what_died_unanswered_is_reported_if_asked_for(family: Family) -> Result<()> {
    let lab = lab()?;
    let path = "net/netfilter/nf_conntrack_tcp_timeout_syn_sent";
    lab.sysctl(Host::Router, path, "1")?;
    let without = Watch::up(&lab, |_| {})?;
    let mut with = Watch::up(&lab, |setup| setup.destroy = Destroy::On)?;
    ensure!(
        with.source
            .status()
            .hook
            .is_some_and(|hook| hook.contains("events of destroyed")),
        "{:?}",
        with.source.status()
    );
    let sent = Instant::now();
    single_syn(&lab, family, 2001, DEAF)?;
    // Refused, which destroys the entry at once and without the mark of a reply.
    let closed = lab.socket(Place::Of(Host::Server), family, CLOSED);
    ensure!(lab.within(Host::Client, || traffic::connect(closed)) == Connect::Refused);
    let found = with.take(1)?;
    let (at, attempt) = &found[0];
    ensure!(
        attempt.flow.source_port == Some(2001) && attempt.waited >= SYN_TIMEOUT,
        "{attempt:?}"
    );
    let took = *at - sent;
    ensure!(
        took >= SYN_TIMEOUT && took <= SYN_TIMEOUT + PERIOD + NOTED_WITHIN + SLACK,
        "{took:?}"
    );
    // Its entry is gone, and so no dump is made; the next one shows that nothing comes twice.
    single_syn(&lab, family, 2002, DEAF)?;
    let again = with.take(1)?;
    ensure!(again[0].1.flow.source_port == Some(2002), "{again:?}");
    ensure!(without.totals().reported == 0, "{:?}", without.totals());
    without.stop()?;
    with.stop()
}

/// An attempt that goes on by another entry is one attempt.
#[test]
fn one_that_goes_on_by_another_entry_is_one() -> Result<()> {
    let lab = lab()?;
    let path = "net/netfilter/nf_conntrack_tcp_timeout_syn_sent";
    lab.sysctl(Host::Router, path, "1")?;
    let mut watch = Watch::up(&lab, |setup| setup.destroy = Destroy::On)?;
    // Sent again after 1, 2, 3 s: the entry dies just before, or just not.
    let (source, _connecting) = begin_connect(&lab, Family::V4, DEAF)?;
    lab.sysctl(Host::Router, path, "30")?;
    let found = watch.take(1)?;
    ensure!(
        found[0].1.flow.source_port == Some(source.port()),
        "{found:?}"
    );
    watch.nothing_more()?;
    watch.stop()
}

/// The kernel drops events that are not read in time; that is counted, said once, and mended.
#[test]
fn lost_events_are_said_and_mended() -> Result<()> {
    let lab = lab()?;
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
    let lab = lab()?;
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
    let busy_lab = self::lab()?;
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
    let lab = lab()?;
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
    let lab = lab()?;
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
    let lab = lab()?;
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

/// With the kernel's own timestamps the beginning is exact.
#[test]
fn timestamps_are_used_where_there_are_any() -> Result<()> {
    let lab = lab()?;
    lab.sysctl(Host::Router, "net/netfilter/nf_conntrack_timestamp", "1")?;
    lab.sysctl(Host::Router, "net/netfilter/nf_conntrack_acct", "1")?;
    let mut watch = Watch::up(&lab, |_| {})?;
    let (before, sent) = (Timestamp::now(), Instant::now());
    let client = lab.address(Place::Of(Host::Client), Family::V4);
    let query = lab.within(Host::Client, || UdpSocket::bind((client, 0)))?;
    for _ in 0..3 {
        query.send_to(b"x", lab.socket(Place::Of(Host::Server), Family::V4, DNS))?;
    }
    let found = watch.take(1)?;
    let (at, attempt) = &found[0];
    let since = attempt.since.duration_since(before);
    ensure!(
        since.as_millis().abs() < 100,
        "since {since:?}: {attempt:?}"
    );
    ensure!(attempt.sent == 3, "{attempt:?}");
    let took = *at - sent;
    ensure!(
        took >= DNS_TIMEOUT && took < DNS_TIMEOUT + NOTED_WITHIN + SLACK,
        "{took:?}"
    );
    watch.stop()
}

/// Nothing is lost to a reader that is slow; it is only late.
#[test]
fn a_slow_reader_loses_nothing() -> Result<()> {
    let lab = lab()?;
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

/// Who chooses the entries of a dump is said, and so it is.
#[test]
fn the_kernel_filters_where_it_can() -> Result<()> {
    const ANSWERED: u64 = 20;
    let lab = lab()?;
    let open = lab.socket(Place::Of(Host::Server), Family::V4, OPEN);
    let _listener = lab.within(Host::Server, || TcpListener::bind(open))?;
    for _ in 0..ANSWERED {
        ensure!(lab.within(Host::Client, || traffic::connect(open)) == Connect::Established);
    }
    single_syn(&lab, Family::V4, 2001, DEAF)?;
    let mut watch = Watch::up(&lab, |_| {})?;
    watch.take(1)?;
    let before = watch.totals();
    watch.dumps(2)?;
    let after = watch.totals();
    let each = (after.dumped_entries - before.dumped_entries) / (after.dumps - before.dumps);
    let hook = watch.source.status().hook.unwrap_or_default();
    let expected = if hook.contains("filtered by the kernel") {
        1
    } else {
        ensure!(hook.contains("filtered by whydrop"), "{hook}");
        ANSWERED + 1
    };
    ensure!(each == expected, "{each} entries in a dump, and: {hook}");
    ensure!(watch.totals().reported == 1);
    watch.stop()
}

/// The table's counters are those of the namespace that asks.
#[test]
fn counters_are_the_kernel_s_own() -> Result<()> {
    let lab = lab()?;
    let client = lab.address(Place::Of(Host::Client), Family::V4);
    let server = lab.address(Place::Of(Host::Server), Family::V4);
    let stray = |port| packet::segment((client, port), (server, OPEN), packet::flags::RST);
    lab.within(Host::Client, || {
        traffic::raw_ip(server, (3000..3007).map(stray))
    })?;
    single_syn(&lab, Family::V4, 2001, DEAF)?;
    let seen = lab.within(Host::Router, || stats("/proc".as_ref()));
    let column = |name| counters::conntrack(&lab, Host::Router, name).map(Some);
    ensure!(
        seen.invalid == Some(7) && seen.invalid == column("invalid")?,
        "{seen:?}"
    );
    ensure!(
        (seen.drop, seen.early_drop, seen.insert_failed)
            == (
                column("drop")?,
                column("early_drop")?,
                column("insert_failed")?
            ),
        "{seen:?}"
    );
    let limit = lab.read(Host::Router, "/proc/sys/net/netfilter/nf_conntrack_max")?;
    ensure!(
        (seen.entries, seen.limit) == (Some(1), Some(limit.trim().parse()?)),
        "{seen:?}"
    );
    // The client's own table is another one.
    let client = lab.within(Host::Client, || stats("/proc".as_ref()));
    ensure!(
        client.entries == Some(0) && client.invalid == Some(0),
        "{client:?}"
    );
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    whydrop::sync::lock(mutex)
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
