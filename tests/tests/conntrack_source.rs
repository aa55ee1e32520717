//! The conntrack source by itself: what it finds, when, and what it leaves to others.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use jiff::{SignedDuration, Timestamp};
use whydrop::event::{Kind, Protocol};
use whydrop::source::conntrack::{Destroy, Lookup, NOTED_WITHIN, Tuple, stats};
use whydrop::sync::lock;
use whydrop_tests::lab::{Family, Host, Place};
use whydrop_tests::traffic::{self, Connect};
use whydrop_tests::watching::*;
use whydrop_tests::{counters, on_both_families, packet};

on_both_families!(
    unanswered_is_found_in_time_and_once,
    the_real_destination_is_known,
    what_is_counted_elsewhere_is_not_reported,
    what_died_unanswered_is_reported_if_asked_for,
);

fn unanswered_is_found_in_time_and_once(family: Family) -> Result<()> {
    let lab = deaf_lab()?;
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
            took <= timeout + PERIOD + NOTED_WITHIN + slack(),
            "too late: {took:?} {attempt:?}"
        );
        let late = attempt.since.duration_since(before);
        ensure!(
            !late.is_negative() && late <= SignedDuration::try_from(PERIOD + slack())?,
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
    let lab = deaf_lab()?;
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
    let lab = deaf_lab()?;
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
    // Where this thread stood still, it came too late.
    let in_time = seen.elapsed() < SYN_TIMEOUT + NOTED_WITHIN / 2;
    wait_for("both are decided", || {
        let totals = watch.totals();
        totals.local + totals.not_foreign + totals.reported == 2
    })?;
    let totals = watch.totals();
    let decided = (totals.local, totals.not_foreign, totals.reported);
    ensure!(
        decided == (1, 1, 0) || (!in_time && decided == (0, 1, 1)),
        "{totals:?}"
    );
    watch.take(usize::from(decided.2 == 1))?;

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
    let lab = deaf_lab()?;
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
        took >= SYN_TIMEOUT && took <= SYN_TIMEOUT + PERIOD + NOTED_WITHIN + slack(),
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
    let lab = deaf_lab()?;
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

/// With the kernel's own timestamps the beginning is exact.
#[test]
fn timestamps_are_used_where_there_are_any() -> Result<()> {
    let lab = deaf_lab()?;
    lab.sysctl(Host::Router, "net/netfilter/nf_conntrack_timestamp", "1")?;
    lab.sysctl(Host::Router, "net/netfilter/nf_conntrack_acct", "1")?;
    let mut watch = Watch::up(&lab, |_| {})?;
    let client = lab.address(Place::Of(Host::Client), Family::V4);
    let query = lab.within(Host::Client, || UdpSocket::bind((client, 0)))?;
    let (before, sent) = (Timestamp::now(), Instant::now());
    for _ in 0..3 {
        query.send_to(b"x", lab.socket(Place::Of(Host::Server), Family::V4, DNS))?;
    }
    let after = Timestamp::now();
    let found = watch.take(1)?;
    let (at, attempt) = &found[0];
    // Both clocks are read one after the other.
    let apart = SignedDuration::from_millis(100);
    ensure!(
        (before - apart..=after + apart).contains(&attempt.since),
        "{before} to {after}: {attempt:?}"
    );
    ensure!(attempt.sent == 3, "{attempt:?}");
    let took = *at - sent;
    let period = watch.totals().period.max(PERIOD);
    ensure!(
        took >= DNS_TIMEOUT && took < DNS_TIMEOUT + period + NOTED_WITHIN + slack(),
        "{took:?}"
    );
    watch.stop()
}

/// Who chooses the entries of a dump is said, and so it is; what is found is the same.
#[test]
fn the_kernel_filters_where_it_can() -> Result<()> {
    const ANSWERED: u64 = 20;
    let lab = deaf_lab()?;
    let open = lab.socket(Place::Of(Host::Server), Family::V4, OPEN);
    let _listener = lab.within(Host::Server, || TcpListener::bind(open))?;
    for _ in 0..ANSWERED {
        ensure!(lab.within(Host::Client, || traffic::connect(open)) == Connect::Established);
    }
    single_syn(&lab, Family::V4, 2001, DEAF)?;
    for kernel_filter in [true, false] {
        let mut watch = Watch::up(&lab, |setup| setup.kernel_filter = kernel_filter)?;
        let found = watch.take(1)?;
        ensure!(found[0].1.flow.source_port == Some(2001), "{found:?}");
        let before = watch.totals();
        watch.dumps(2)?;
        let after = watch.totals();
        let each = (after.dumped_entries - before.dumped_entries) / (after.dumps - before.dumps);
        let hook = watch.source.status().hook.unwrap_or_default();
        let expected = if kernel_filter && hook.contains("filtered by the kernel") {
            1
        } else {
            ensure!(hook.contains("filtered by whydrop"), "{hook}");
            ANSWERED + 1
        };
        ensure!(each == expected, "{each} entries in a dump, and: {hook}");
        ensure!(watch.totals().reported == 1 && watch.totals().entries == 1);
        watch.stop()?;
    }
    Ok(())
}

/// The table's counters are those of the namespace that asks.
#[test]
fn counters_are_the_kernel_s_own() -> Result<()> {
    let lab = deaf_lab()?;
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
