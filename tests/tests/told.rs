//! Who was told of a drop, where that is easily taken for something else: answers to answers, the
//! kernel's own messages, answers that never leave or that leave through several devices.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use whydrop_tests::expect::Row;
use whydrop_tests::lab::{Family, Host, Lab, Place, mac_bytes};
use whydrop_tests::packet::{self, IpOptions, flags, protocol};
use whydrop_tests::scene::{Scene, TCP_PORT, UDP_PORT};
use whydrop_tests::traffic::{self, Burst};
use whydrop_tests::{counters, kernel, on_both_families};

const REASON: [&str; 1] = ["NETFILTER_DROP"];
/// The TCP port at the server whose RSTs are answered.
const RESET_PORT: u16 = 81;
/// Fewer than the ICMP errors that a host may send at once (`icmp_msgs_burst`).
const PACKETS: u64 = 20;

on_both_families!(
    answered_reset,
    echo_reply_at_output,
    echo_request_at_output,
    error_that_never_leaves,
    answers_while_resolving,
    datagram_at_egress,
);

fn icmp(family: Family) -> &'static str {
    family.pick("ICMP", "ICMPv6")
}

/// A RST that a rule answers with an ICMP error tells nobody of anything: neither is the RST
/// rejected, nor the SYN of the same pair that comes next.
fn answered_reset(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        let (ip, client) = (family.nft(), lab.address(Place::Of(Host::Client), family));
        lab.unlimited_icmp(Host::Server)?;
        lab.nft(
            Host::Server,
            &format!(
                "table inet lab {{
                   counter resets {{ }}
                   counter syns {{ }}
                   chain c {{ type filter hook input priority 0;
                     {ip} saddr {client} tcp dport {RESET_PORT} counter name resets reject
                     {ip} saddr {client} tcp dport {TCP_PORT} counter name syns drop
                   }}
                 }}"
            ),
        )
    })?;
    resets_and_syns(&scene)?;
    let resets = counters::nft(&scene.lab, Host::Server, "resets")?;
    let syns = counters::nft(&scene.lab, Host::Server, "syns")?;
    let answers = scene.unreachables(Host::Server)?;
    ensure!(
        (resets, syns, answers) == (PACKETS, PACKETS, PACKETS),
        "nft counted {resets} and {syns}, {answers} were answered"
    );
    scene.expect(&[
        Row::dropped("client", "server", resets)
            .protocol("TCP")
            .reason(&REASON),
        Row::dropped("client", "server", syns).syn().reason(&REASON),
    ])
}

/// Sends RSTs and SYNs of different flows from the client to the server, in turn.
fn resets_and_syns(scene: &Scene) -> Result<u64> {
    let client = scene.address(Place::Of(Host::Client));
    let server = scene.address(Place::Of(Host::Server));
    scene.raw((0..PACKETS as u16).flat_map(|port| {
        [(RESET_PORT, flags::RST), (TCP_PORT, flags::SYN)]
            .map(|(to, flags)| packet::segment((client, 40_000 + port), (server, to), flags))
    }))
}

/// Drops what a host sends to the client with an ICMP type, and counts it.
fn drop_icmp_at_output(lab: &Lab, host: Host, family: Family, kind: &str) -> Result<()> {
    let (ip, client) = (family.nft(), lab.address(Place::Of(Host::Client), family));
    let icmp = family.pick("icmp", "icmpv6");
    lab.nft(
        host,
        &format!(
            "table inet lab {{
               counter messages {{ }}
               chain c {{ type filter hook output priority 0;
                 {ip} daddr {client} {icmp} type {kind} counter name messages drop
               }}
             }}"
        ),
    )
}

/// The kernel's own messages are sent by a socket, but by no call of an application: nobody learns
/// of an echo reply (and in IPv6, of a neighbour advertisement) that is dropped at OUTPUT.
fn echo_reply_at_output(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        let kinds = family.pick("echo-reply", "{ echo-reply, nd-neighbor-advert }");
        drop_icmp_at_output(lab, Host::Server, family, kinds)
    })?;
    let client = scene.address(Place::Of(Host::Client));
    let server = scene.address(Place::Of(Host::Server));
    scene.raw((0..PACKETS as u16).map(|sequence| {
        let message = packet::echo_request(client, server, sequence);
        let next = family.pick(protocol::ICMP, protocol::ICMPV6);
        packet::ip(client, server, next, &message)
    }))?;
    let mut expected = PACKETS;
    if family == Family::V6 {
        let frames = (0..PACKETS).map(|_| solicitation(client, server));
        expected += scene.lab.within(Host::Router, || {
            traffic::raw_frames(&Host::Server.device(), frames)
        })?;
    }
    let replies = counters::nft(&scene.lab, Host::Server, "messages")?;
    ensure!(replies == expected, "nft counted {replies}, not {expected}");
    scene.expect(&[Row::dropped("server", "client", replies)
        .protocol(icmp(family))
        .reason(&REASON)])
}

/// The frame by which the router would ask the server's link address for the client (RFC 4861, 4.3).
fn solicitation(client: IpAddr, server: IpAddr) -> Vec<u8> {
    let IpAddr::V6(target) = server else {
        panic!("neighbour solicitations are of IPv6")
    };
    let (ours, theirs) = (
        mac_bytes(Host::Server, true),
        mac_bytes(Host::Server, false),
    );
    let mut body = vec![0; 4];
    body.extend(target.octets());
    // The sender's link address, in units of 8 bytes.
    body.extend([1, 1]);
    body.extend(ours);
    let message = packet::icmp(client, server, 135, &body);
    let options = IpOptions {
        ttl: 255,
        ..IpOptions::default()
    };
    let packet = packet::ip_with(client, server, protocol::ICMPV6, &options, &message);
    packet::ethernet(ours, theirs, &[], packet::ether_type(server), &packet)
}

/// An application's own echo requests fail with EPERM, by a raw socket as by a ping socket; but that
/// of IPv6 keeps the error from its caller, whose request is silent then.
fn echo_request_at_output(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        let (ip, server) = (family.nft(), lab.address(Place::Of(Host::Server), family));
        lab.sysctl(Host::Client, "net/ipv4/ping_group_range", "0 0")?;
        lab.nft(
            Host::Client,
            &format!(
                "table inet lab {{
                   counter requests {{ }}
                   chain c {{ type filter hook output priority 0;
                     {ip} daddr {server} meta l4proto {{ icmp, ipv6-icmp }} counter name requests drop
                   }}
                 }}"
            ),
        )
    })?;
    let raw = scene
        .lab
        .within(Host::Client, || echo_requests(&scene, SockType::Raw))?;
    let ping = scene
        .lab
        .within(Host::Client, || echo_requests(&scene, SockType::Datagram))?;
    let told = Burst {
        accepted: 0,
        refused: PACKETS,
    };
    let untold = Burst {
        accepted: PACKETS,
        refused: 0,
    };
    ensure!(
        (raw, ping) == (told, family.pick(told, untold)),
        "{raw:?} by a raw socket, {ping:?} by a ping socket"
    );
    let requests = counters::nft(&scene.lab, Host::Client, "requests")?;
    ensure!(requests == 2 * PACKETS, "nft counted {requests}");
    let row = |row: Row| row.protocol(icmp(family)).reason(&REASON);
    scene.expect(&[
        row(Row::rejected(
            "client",
            "server",
            raw.refused + ping.refused,
        )),
        row(Row::dropped(
            "client",
            "server",
            raw.accepted + ping.accepted,
        )),
    ])
}

fn echo_requests(scene: &Scene, kind: SockType) -> Result<Burst> {
    let client = scene.address(Place::Of(Host::Client));
    let server = scene.address(Place::Of(Host::Server));
    let socket = socket(
        scene.family.pick(AddressFamily::Inet, AddressFamily::Inet6),
        kind,
        SockFlag::SOCK_CLOEXEC,
        scene.family.pick(SockProtocol::Icmp, SockProtocol::IcmpV6),
    )
    .with_context(|| format!("open an ICMP socket: {kind:?}"))?;
    let message = packet::echo_request(client, server, 1);
    let to = SockaddrStorage::from(SocketAddr::new(server, 0));
    let mut burst = Burst::default();
    for _ in 0..PACKETS {
        match sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty()) {
            Ok(_) => burst.accepted += 1,
            Err(Errno::EPERM) => burst.refused += 1,
            Err(error) => return Err(error).context("send an echo request"),
        }
    }
    Ok(burst)
}

/// A port unreachable that the server's own rule drops reaches nobody: both the datagram and the
/// error are lost in silence.
fn error_that_never_leaves(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        lab.unlimited_icmp(Host::Server)?;
        drop_icmp_at_output(lab, Host::Server, family, "destination-unreachable")
    })?;
    scene.udp(PACKETS)?;
    let errors = counters::nft(&scene.lab, Host::Server, "messages")?;
    let closed = scene.grown(Host::Server, "UdpNoPorts", "Udp6NoPorts")?;
    ensure!(
        (errors, closed) == (PACKETS, PACKETS),
        "nft counted {errors}, {closed} found no socket"
    );
    scene.expect(&[
        Row::dropped("client", "server", closed).protocol("UDP"),
        Row::dropped("server", "client", errors)
            .protocol(icmp(family))
            .reason(&REASON),
    ])
}

/// Where answers are also counted by flow, because some neighbour is awaited, they are counted once,
/// though they leave by a bridge and then by its port, and those to RSTs are not: every second SYN is
/// refused, all else is silent.
fn answers_while_resolving(family: Family) -> Result<()> {
    let scene = Scene::new(family, |lab| {
        bridge(lab, family)?;
        lab.unlimited_icmp(Host::Server)?;
        let (ip, client) = (family.nft(), lab.address(Place::Of(Host::Client), family));
        lab.nft(
            Host::Server,
            &format!(
                "table inet lab {{
                   counter resets {{ }}
                   counter refused {{ }}
                   counter silent {{ }}
                   chain c {{ type filter hook input priority 0;
                     {ip} saddr != {client} accept
                     tcp dport {RESET_PORT} counter name resets reject
                     tcp dport {TCP_PORT} numgen inc mod 2 0 counter name refused reject with tcp reset
                     tcp dport {TCP_PORT} counter name silent drop
                   }}
                 }}"
            ),
        )
    })?;
    let resolving = Resolving::start(&scene.lab)?;
    resets_and_syns(&scene)?;
    drop(resolving);
    let resets = counters::nft(&scene.lab, Host::Server, "resets")?;
    let refused = counters::nft(&scene.lab, Host::Server, "refused")?;
    let silent = counters::nft(&scene.lab, Host::Server, "silent")?;
    let answers = scene.unreachables(Host::Server)?;
    ensure!(
        (resets, answers) == (PACKETS, PACKETS) && (refused, silent) == (PACKETS / 2, PACKETS / 2),
        "nft counted {resets}, {refused} and {silent}, {answers} were answered by ICMP"
    );
    scene.expect(&[
        Row::dropped("client", "server", resets)
            .protocol("TCP")
            .reason(&REASON),
        Row::rejected("client", "server", refused)
            .syn()
            .reason(&REASON),
        Row::dropped("client", "server", silent)
            .syn()
            .reason(&REASON),
    ])
}

/// Puts a bridge between the server and its link, which keeps the link's address.
fn bridge(lab: &Lab, family: Family) -> Result<()> {
    let address = lab.address(Place::Of(Host::Server), family);
    let router = lab.address(Place::RouterTowards(Host::Server), family);
    let (length, option) = family.pick((28, ""), (64, "nodad"));
    let mac = |at_router| {
        mac_bytes(Host::Server, at_router)
            .map(|byte| format!("{byte:02x}"))
            .join(":")
    };
    let (ours, theirs) = (mac(false), mac(true));
    for line in [
        format!("ip link add br0 address {ours} type bridge forward_delay 0 mcast_snooping 0"),
        format!("ip addr del {address}/{length} dev eth0"),
        "ip link set eth0 master br0".to_owned(),
        "ip link set br0 up".to_owned(),
        format!("ip addr add {address}/{length} dev br0 {option}"),
        format!("ip neigh add {router} lladdr {theirs} dev br0 nud permanent"),
        format!("ip route replace default via {router} dev br0"),
    ] {
        lab.run(Host::Server, &line)?;
    }
    Ok(())
}

/// After OUTPUT, UDP hides from its caller what happens to a datagram.
fn datagram_at_egress(family: Family) -> Result<()> {
    if !kernel::has_nft_egress()? {
        return kernel::left_out(kernel::NO_NFT_EGRESS);
    }
    let scene = Scene::new(family, |lab| {
        let (ip, server) = (family.nft(), lab.address(Place::Of(Host::Server), family));
        lab.nft(
            Host::Client,
            &format!(
                "table netdev lab {{
                   counter datagrams {{ }}
                   chain c {{ type filter hook egress device eth0 priority 0;
                     {ip} daddr {server} udp dport {UDP_PORT} counter name datagrams drop
                   }}
                 }}"
            ),
        )
    })?;
    let burst = scene.udp(PACKETS)?;
    ensure!(
        burst
            == Burst {
                accepted: PACKETS,
                refused: 0
            },
        "{burst:?}"
    );
    let datagrams = counters::nft(&scene.lab, Host::Client, "datagrams")?;
    ensure!(datagrams == PACKETS, "nft counted {datagrams}");
    scene.expect(&[Row::dropped("client", "server", datagrams)
        .protocol("UDP")
        .reason(&REASON)])
}

/// Somebody who asks again and again for a neighbour that is not there, so that the programs count
/// answers by flow. Dropping it ends that.
struct Resolving {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Resolving {
    /// Between two datagrams: often enough that there is one in each second.
    const PAUSE: Duration = Duration::from_millis(500);
    /// Addresses for benchmarks (RFC 2544), so of no pod or node of the lab.
    const OWN: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
    const ABSENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

    /// Begins; the first datagram waits for its neighbour when this returns.
    fn start(lab: &Lab) -> Result<Self> {
        lab.run(
            Host::Server2,
            &format!("ip addr add {}/30 dev eth0", Self::OWN),
        )?;
        let socket = lab.within(Host::Server2, || -> Result<_> {
            let socket = UdpSocket::bind((Self::OWN, 0))?;
            socket.send_to(b"where?", (Self::ABSENT, 9))?;
            Ok(socket)
        })?;
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(Self::PAUSE) == Err(RecvTimeoutError::Timeout) {
                // A call can fail with what became of an earlier one: no such neighbour.
                let _ = socket.send_to(b"where?", (Self::ABSENT, 9));
            }
        });
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Resolving {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
