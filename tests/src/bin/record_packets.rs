//! Records what the programs see of packets that this kernel drops, for the tests of the decoder.
//!
//! Each packet of the list is sent through the lab's router, dropped there, and taken from the ring
//! buffer. Beside the bytes stands what was sent, by whoever made the packet: so the programs, the
//! decoder and this list are three opinions on one packet.

use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use whydrop::source::load::{self, Attach, Loaded};
use whydrop::source::sys::{self, Plain};
use whydrop_ebpf::{Control, DropEvent, FlowCount, FlowKey, SNAP_LEN};
use whydrop_tests::agent::POLL;
use whydrop_tests::lab::{Family, Host, Lab, Place, TC_SHOT, mac_bytes};
use whydrop_tests::packet::{self, IpOptions, ether_type, flags, protocol};
use whydrop_tests::traffic;

/// Until a dropped packet must be in the ring buffer.
const DEADLINE: Duration = Duration::from_secs(5);
/// UDP-Lite (RFC 3828) and the authentication header (RFC 4302).
const UDP_LITE: u8 = 136;
const AH: u8 = 51;
/// IPv6 routing header (RFC 8200, section 4.4).
const ROUTING: u8 = 43;
const NAME: &str = "pg.db.svc.cluster.local";

/// A packet with its name, and what must be read from it.
struct Sent {
    name: String,
    bytes: Vec<u8>,
    expected: Value,
}

/// The two ends of a flow.
#[derive(Clone, Copy)]
struct Ends {
    from: IpAddr,
    to: IpAddr,
}

impl Ends {
    fn ip(self, number: u8, payload: &[u8]) -> Vec<u8> {
        packet::ip(self.from, self.to, number, payload)
    }

    fn udp(self, port: u16, payload: &[u8]) -> Vec<u8> {
        packet::udp((self.from, 40_000), (self.to, port), payload)
    }

    fn tcp(self, port: u16, flags: u8) -> Vec<u8> {
        packet::tcp((self.from, 40_000), (self.to, port), flags)
    }

    /// What must be read: these ends, a protocol, and what `more` adds or changes.
    fn expected(self, number: u8, more: Value) -> Value {
        let mut expected = json!({
            "source": self.from, "destination": self.to, "protocol": number, "kind": "packet",
            "ports": null, "tcp_flags": null, "icmp": null, "dns": null,
            "encapsulated": false, "fragment": false,
        });
        if let (Value::Object(expected), Value::Object(more)) = (&mut expected, more) {
            expected.extend(more);
        }
        expected
    }
}

fn ports(port: u16) -> Value {
    json!([40_000, port])
}

fn main() -> Result<()> {
    let directory = PathBuf::from(
        std::env::args_os()
            .nth(1)
            .context("usage: record-packets DIRECTORY")?,
    );
    let lab = Lab::new()?;
    let mut loaded = load::load(load::Options {
        map_memory_bytes: 32 << 20,
        attach: Attach::Auto,
        log: false,
        syn_timeout: Duration::from_secs(3),
        dns_timeout: Duration::from_secs(2),
        dns: false,
        conntrack: false,
    })?;
    loaded.maps.control.set(
        0,
        Plain(Control {
            events_per_cpu: 1_000,
            ..Control::default()
        }),
        0,
    )?;
    let mut index = Vec::new();
    for family in Family::BOTH {
        let (ip, server) = (family.nft(), lab.address(Place::Of(Host::Server), family));
        lab.nft(
            Host::Router,
            &format!(
                "table {ip} lab {{ chain c {{ type filter hook forward priority 0;
                   {ip} daddr {server} drop
                 }}
                 }}"
            ),
        )?;
        for sent in packets(&lab, family) {
            lab.within(Host::Client, || traffic::raw_ip(server, [&sent.bytes]))
                .with_context(|| format!("send {}", sent.name))?;
            index.push(record(&mut loaded, &directory, &sent)?);
        }
        let device = Host::Client.device();
        lab.tc(Host::Router, &device, "ingress", TC_SHOT)?;
        for (sent, frame) in frames(&lab, family) {
            lab.within(Host::Client, || traffic::raw_frames("eth0", [&frame]))?;
            index.push(record(&mut loaded, &directory, &sent)?);
        }
        lab.run(Host::Router, &format!("tc qdisc del dev {device} clsact"))?;
    }
    // One line a packet, so that a change of one is a change of one line.
    let index: Vec<String> = index.iter().map(Value::to_string).collect();
    let kernel = nix::sys::utsname::uname()?;
    let release = kernel.release().to_string_lossy();
    let version = release.split('-').next().unwrap_or_default();
    let text = format!(
        "{{\"kernel\":\"{version}\",\"packets\":[\n{}\n]}}\n",
        index.join(",\n")
    );
    std::fs::write(directory.join("index.json"), text).context("write the index")
}

/// Waits for the packet's event, and writes it up to the packet's end.
fn record(loaded: &mut Loaded, directory: &std::path::Path, sent: &Sent) -> Result<Value> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        // A flow shows no more than its first packets.
        let flows = loaded.maps.flows[0].as_fd();
        let cpus = loaded.budget.cpus;
        let forget = |_: FlowKey, _: &mut dyn Iterator<Item = FlowCount>| ();
        sys::batch(flows, sys::Batch::Take, cpus, 64, forget).context("empty the flow map")?;
        while let Some(item) = loaded.events.next() {
            let bytes = item.to_vec();
            drop(item);
            let event = sys::read::<DropEvent>(&bytes).context("an entry that is no event")?;
            if !is_of(&event, &sent.bytes) {
                continue;
            }
            let end = bytes.len() - SNAP_LEN + usize::from(event.snap_len);
            std::fs::write(
                directory.join(format!("events/{}.bin", sent.name)),
                &bytes[..end],
            )
            .with_context(|| format!("write {}", sent.name))?;
            return Ok(json!({"name": sent.name, "expected": sent.expected}));
        }
        ensure!(Instant::now() < deadline, "no event of {} came", sent.name);
        std::thread::sleep(POLL);
    }
}

/// Whether an event is about the packet: the same bytes but for what a router changes.
fn is_of(event: &DropEvent, sent: &[u8]) -> bool {
    let seen = &event.snap[..usize::from(event.snap_len)];
    let masked = |bytes: &[u8]| {
        let mut bytes = bytes[..bytes.len().min(SNAP_LEN)].to_vec();
        let changed: &[usize] = if bytes.first().is_some_and(|b| b >> 4 == 4) {
            &[8, 10, 11]
        } else {
            &[7]
        };
        for at in changed {
            if let Some(byte) = bytes.get_mut(*at) {
                *byte = 0;
            }
        }
        bytes
    };
    masked(seen) == masked(sent)
}

/// Every kind of packet of one family, from the client to the server.
fn packets(lab: &Lab, family: Family) -> Vec<Sent> {
    let ends = Ends {
        from: lab.address(Place::Of(Host::Client), family),
        to: lab.address(Place::Of(Host::Server), family),
    };
    let mut all = Vec::new();
    let mut add = |name: &str, bytes: Vec<u8>, expected: Value| {
        let name = format!("{}-{name}", family.pick("ipv4", "ipv6"));
        all.push(Sent {
            name,
            bytes,
            expected,
        });
    };
    plain(ends, family, &mut add);
    headers(ends, family, &mut add);
    dns(ends, &mut add);
    tunnels(lab, ends, &mut add);
    all
}

fn plain(ends: Ends, family: Family, add: &mut impl FnMut(&str, Vec<u8>, Value)) {
    for (name, bits, kind) in [
        ("tcp-syn", flags::SYN, "syn"),
        ("tcp-syn-ack", flags::SYN | flags::ACK, "packet"),
        ("tcp-rst", flags::RST, "packet"),
    ] {
        let segment = ends.tcp(5432, bits);
        let more = json!({"ports": ports(5432), "tcp_flags": bits, "kind": kind});
        add(
            name,
            ends.ip(protocol::TCP, &segment),
            ends.expected(protocol::TCP, more),
        );
    }
    let segment = ends.tcp(5432, flags::SYN);
    // Ports, then neither flags nor a kind; then not even ports.
    add(
        "tcp-cut-at-ports",
        ends.ip(protocol::TCP, &segment[..10]),
        ends.expected(protocol::TCP, json!({"ports": ports(5432)})),
    );
    add(
        "tcp-cut",
        ends.ip(protocol::TCP, &segment[..3]),
        ends.expected(protocol::TCP, json!({})),
    );
    let datagram = ends.udp(8080, b"datagram");
    for (name, number, payload) in [
        ("udp", protocol::UDP, datagram.clone()),
        ("sctp", protocol::SCTP, packet::sctp(40_000, 8080)),
    ] {
        add(
            name,
            ends.ip(number, &payload),
            ends.expected(number, json!({"ports": ports(8080)})),
        );
    }
    // The event shows no ports for UDP-Lite; parser and programs read them.
    add(
        "udp-lite",
        ends.ip(UDP_LITE, &datagram),
        ends.expected(UDP_LITE, json!({"ports": ports(8080)})),
    );
    let icmp = family.pick(protocol::ICMP, protocol::ICMPV6);
    add(
        "echo-request",
        ends.ip(icmp, &packet::echo_request(ends.from, ends.to, 1)),
        ends.expected(icmp, json!({"icmp": [family.pick(8, 128), 0]})),
    );
    // Port unreachable (RFC 792; RFC 4443, section 3.1) about a datagram of the other direction.
    let back = Ends {
        from: ends.to,
        to: ends.from,
    };
    let (kind, code) = family.pick((3, 3), (1, 4));
    let mut error = vec![kind, code, 0, 0, 0, 0, 0, 0];
    error.extend(back.ip(protocol::UDP, &back.udp(53, b"quoted")));
    add(
        "port-unreachable",
        ends.ip(icmp, &error),
        ends.expected(icmp, json!({"icmp": [kind, code]})),
    );
    add(
        "experiment",
        ends.ip(253, b"an experiment (RFC 3692)"),
        ends.expected(253, json!({})),
    );
}

/// Fragments, options, extension headers.
fn headers(ends: Ends, family: Family, add: &mut impl FnMut(&str, Vec<u8>, Value)) {
    let datagram = ends.udp(8080, &[7; 64]);
    let (first, rest) = datagram.split_at(40);
    let udp = |more| ends.expected(protocol::UDP, more);
    let whole = || udp(json!({"ports": ports(8080)}));
    let later = || udp(json!({"fragment": true}));
    // AH (RFC 4302, section 2): next, length, reserved, SPI, sequence number, 12 bytes of ICV.
    let ah = |next: u8, payload: &[u8]| {
        let mut bytes = vec![next, 4, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1];
        bytes.extend([0xaa; 12]);
        bytes.extend(payload);
        bytes
    };
    if family == Family::V4 {
        let with = |options: IpOptions, payload: &[u8]| {
            packet::ip_with(ends.from, ends.to, protocol::UDP, &options, payload)
        };
        let fragment = |at| IpOptions {
            fragment: at,
            ..IpOptions::default()
        };
        let options = |options| IpOptions {
            options,
            ..IpOptions::default()
        };
        add("fragment-first", with(fragment((0, true)), first), whole());
        add("fragment-later", with(fragment((40, false)), rest), later());
        // Router alert (RFC 2113), then padding.
        add(
            "options",
            with(options(vec![148, 4, 0, 0]), &datagram),
            whole(),
        );
        add(
            "options-all",
            with(options(vec![1; 40]), &datagram),
            whole(),
        );
        add(
            "authentication",
            ends.ip(AH, &ah(protocol::UDP, &datagram)),
            ends.expected(AH, json!({})),
        );
        return;
    }
    let fragment = |at, more, payload: &[u8]| packet::fragment(protocol::UDP, at, more, payload);
    add(
        "fragment-first",
        ends.ip(protocol::FRAGMENT, &fragment(0, true, first)),
        whole(),
    );
    add(
        "fragment-later",
        ends.ip(protocol::FRAGMENT, &fragment(40, false, rest)),
        later(),
    );
    for (name, number) in [
        ("hop-by-hop", protocol::HOP_BY_HOP),
        ("destination-options", protocol::DESTINATION_OPTIONS),
    ] {
        let payload = packet::extension(protocol::UDP, &datagram);
        add(name, ends.ip(number, &payload), whole());
    }
    // Type 253 is for experiments (RFC 4727) and has no segments left.
    let routing = |next: u8, payload: &[u8]| {
        let mut bytes = vec![next, 0, 253, 0, 0, 0, 0, 0];
        bytes.extend(payload);
        bytes
    };
    add(
        "routing",
        ends.ip(ROUTING, &routing(protocol::UDP, &datagram)),
        whole(),
    );
    add(
        "authentication",
        ends.ip(AH, &ah(protocol::UDP, &datagram)),
        whole(),
    );
    // The order of RFC 8200, section 4.1.
    let chain = |payload: Vec<u8>| {
        let payload = packet::extension(ROUTING, &routing(protocol::FRAGMENT, &payload));
        packet::extension(protocol::DESTINATION_OPTIONS, &payload)
    };
    let behind = ah(
        protocol::DESTINATION_OPTIONS,
        &packet::extension(protocol::UDP, &datagram),
    );
    add(
        "all-extensions",
        ends.ip(
            protocol::HOP_BY_HOP,
            &chain(packet::fragment(AH, 0, true, &behind)),
        ),
        whole(),
    );
    add(
        "all-extensions-later",
        ends.ip(protocol::HOP_BY_HOP, &chain(fragment(40, false, rest))),
        later(),
    );
}

fn question(name: &str, kind: &str) -> Value {
    json!({"name": format!("{name}."), "type": kind, "id": 4711})
}

fn dns(ends: Ends, add: &mut impl FnMut(&str, Vec<u8>, Value)) {
    let long = format!("{0}.{0}.{0}.{1}", "a".repeat(63), "b".repeat(61));
    for (name, of, number, kind) in [
        ("dns-a", NAME, 1, "A"),
        ("dns-aaaa", NAME, 28, "AAAA"),
        ("dns-longest-name", &long, 1, "A"),
    ] {
        let query = packet::dns_query(4711, of, number);
        let more = json!({"ports": ports(53), "kind": "dns", "dns": question(of, kind)});
        add(
            name,
            ends.ip(protocol::UDP, &ends.udp(53, &query)),
            ends.expected(protocol::UDP, more),
        );
    }
    // The header of an answer, and too little for a query.
    let mut answer = packet::dns_query(4711, NAME, 1);
    answer[2] |= 0x80;
    for (name, payload) in [("dns-answer", &answer[..]), ("dns-cut", &answer[..11])] {
        add(
            name,
            ends.ip(protocol::UDP, &ends.udp(53, payload)),
            ends.expected(protocol::UDP, json!({"ports": ports(53)})),
        );
    }
    let bits = 0x08 | flags::ACK;
    let mut segment = ends.tcp(53, bits);
    let query = packet::dns_query(4711, NAME, 1);
    segment.extend((query.len() as u16).to_be_bytes());
    segment.extend(query);
    let more = json!({"ports": ports(53), "tcp_flags": bits, "dns": question(NAME, "A")});
    add(
        "dns-tcp",
        ends.ip(protocol::TCP, &segment),
        ends.expected(protocol::TCP, more),
    );
}

/// Tunnels between the ends, with pods of both families inside.
fn tunnels(lab: &Lab, ends: Ends, add: &mut impl FnMut(&str, Vec<u8>, Value)) {
    for family in Family::BOTH {
        let inside = Ends {
            from: lab.address(Place::InnerClient, family),
            to: lab.address(Place::InnerServer, family),
        };
        let kind = ether_type(inside.from);
        let frame =
            |vlans: &[u16], payload: &[u8]| packet::ethernet([2; 6], [4; 6], vlans, kind, payload);
        let packet = inside.ip(protocol::TCP, &inside.tcp(5432, flags::SYN));
        let syn = || {
            inside.expected(
                protocol::TCP,
                json!({"ports": ports(5432), "tcp_flags": flags::SYN, "kind": "syn", "encapsulated": true}),
            )
        };
        let tail = family.pick("of-ipv4", "of-ipv6");
        let gre_full = {
            // Checksum, key and sequence number (RFC 2784 and 2890).
            let mut bytes = vec![0xb0, 0];
            bytes.extend(kind.to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend(42_u32.to_be_bytes());
            bytes.extend(7_u32.to_be_bytes());
            bytes.extend(&packet);
            bytes
        };
        let vxlan = |frame: &[u8]| packet::vxlan(42, frame);
        let ipip = family.pick(protocol::IPIP, protocol::IPV6);
        for (name, number, payload) in [
            ("gre", protocol::GRE, packet::gre(kind, &packet)),
            ("gre-checksum-key-sequence", protocol::GRE, gre_full),
            (
                "gre-ethernet",
                protocol::GRE,
                packet::gre(0x6558, &frame(&[], &packet)),
            ),
            ("ip-in-ip", ipip, packet.clone()),
            (
                "vxlan",
                protocol::UDP,
                ends.udp(4789, &vxlan(&frame(&[], &packet))),
            ),
            (
                "vxlan-8472",
                protocol::UDP,
                ends.udp(8472, &vxlan(&frame(&[], &packet))),
            ),
            (
                "vxlan-vlan",
                protocol::UDP,
                ends.udp(4789, &vxlan(&frame(&[5], &packet))),
            ),
            (
                "vxlan-two-vlans",
                protocol::UDP,
                ends.udp(4789, &vxlan(&frame(&[5, 6], &packet))),
            ),
            (
                "geneve",
                protocol::UDP,
                ends.udp(6081, &packet::geneve(42, &frame(&[], &packet))),
            ),
            // Two tunnels, one in the other.
            (
                "ip-in-ip-in-vxlan",
                protocol::UDP,
                ends.udp(4789, &vxlan(&frame(&[], &inside.ip(ipip, &packet)))),
            ),
        ] {
            add(&format!("{name}-{tail}"), ends.ip(number, &payload), syn());
        }
        // The third is not looked into.
        let third = inside.ip(ipip, &inside.ip(ipip, &packet));
        add(
            &format!("three-tunnels-{tail}"),
            ends.ip(protocol::UDP, &ends.udp(4789, &vxlan(&frame(&[], &third)))),
            inside.expected(ipip, json!({"encapsulated": true})),
        );
        // A tunnel whose port is right and whose content is no packet.
        let more = json!({"ports": ports(4789)});
        add(
            &format!("no-vxlan-{tail}"),
            ends.ip(protocol::UDP, &ends.udp(4789, &[0; 40])),
            ends.expected(protocol::UDP, more),
        );
        let query = packet::dns_query(4711, NAME, 28);
        let query = inside.ip(protocol::UDP, &inside.udp(53, &query));
        let more = json!({
            "ports": ports(53), "kind": "dns", "dns": question(NAME, "AAAA"), "encapsulated": true,
        });
        add(
            &format!("dns-in-vxlan-{tail}"),
            ends.ip(protocol::UDP, &ends.udp(4789, &vxlan(&frame(&[], &query)))),
            inside.expected(protocol::UDP, more),
        );
        let later = match family {
            Family::V4 => packet::ip_with(
                inside.from,
                inside.to,
                protocol::UDP,
                &IpOptions {
                    fragment: (40, false),
                    ..IpOptions::default()
                },
                &[9; 24],
            ),
            Family::V6 => inside.ip(
                protocol::FRAGMENT,
                &packet::fragment(protocol::UDP, 40, false, &[9; 24]),
            ),
        };
        add(
            &format!("fragment-in-gre-{tail}"),
            ends.ip(protocol::GRE, &packet::gre(kind, &later)),
            inside.expected(
                protocol::UDP,
                json!({"fragment": true, "encapsulated": true}),
            ),
        );
    }
}

/// Frames that tc drops before the IP layer: no network header is set yet, and VLAN tags are on.
fn frames(lab: &Lab, family: Family) -> Vec<(Sent, Vec<u8>)> {
    let ends = Ends {
        from: lab.address(Place::Of(Host::Client), family),
        to: lab.address(Place::Of(Host::Server), family),
    };
    let more = json!({"ports": ports(80), "tcp_flags": flags::SYN, "kind": "syn"});
    [
        ("frame", &[][..]),
        ("frame-vlan", &[5]),
        ("frame-two-vlans", &[5, 6]),
    ]
    .map(|(name, vlans)| {
        let bytes = ends.ip(protocol::TCP, &ends.tcp(80, flags::SYN));
        let frame = packet::ethernet(
            mac_bytes(Host::Client, false),
            mac_bytes(Host::Client, true),
            vlans,
            ether_type(ends.from),
            &bytes,
        );
        let name = format!("{}-{name}", family.pick("ipv4", "ipv6"));
        let expected = ends.expected(protocol::TCP, more.clone());
        (
            Sent {
                name,
                bytes,
                expected,
            },
            frame,
        )
    })
    .into()
}
