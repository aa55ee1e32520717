//! Traffic whose two ends are one thread's: a batch is sent and received in turn. Over veth the
//! kernel receives in the sender's own context, so the thread's CPU time is all that the traffic costs
//! from one application to the other, and no more.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::libc::linger;
use nix::sys::socket::{setsockopt, sockopt};

use crate::lab::{Family, Host, Lab, Place};
use crate::packet;

/// Datagrams that are sent before any is received; far fewer than a socket's buffer holds.
const BURST: usize = 64;
const PAYLOAD: [u8; 64] = [b'w'; 64];
/// Bytes of TCP that are sent before any is received.
pub const CHUNK: usize = 64 * 1024;
/// Of the sockets: more than a chunk, so that no write waits for a read.
const BUFFER: usize = 256 * 1024;
/// What is lost ends the benchmark; nothing is lost between two veth devices.
const PATIENCE: Duration = Duration::from_secs(5);
const PORT: u16 = 9_000;
const DNS_PORT: u16 = 53;
/// Of a DNS message: the byte with the flag that makes it an answer (RFC 1035, 4.1.1).
const FLAGS: usize = 2;
const IS_ANSWER: u8 = 0x80;

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Datagrams of a connected socket.
    UdpConnected,
    /// The same through the router, from pod to pod: two pairs of devices.
    UdpForwarded,
    /// Datagrams of a socket that is not connected.
    UdpUnconnected,
    /// One TCP connection, as much as it carries.
    TcpBulk,
    /// TCP connections that are made, accepted and reset.
    TcpConnects,
    /// DNS queries and their answers, 5,000 a second.
    Dns,
}

impl Traffic {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::UdpConnected,
        Self::UdpForwarded,
        Self::UdpUnconnected,
        Self::TcpBulk,
        Self::TcpConnects,
        Self::Dns,
    ];

    /// What tables call it, with what is counted.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UdpConnected => "UDP packet",
            Self::UdpForwarded => "UDP packet, pod to pod",
            Self::UdpUnconnected => "UDP packet, unconnected",
            Self::TcpBulk => "TCP bulk, 64 KiB",
            Self::TcpConnects => "TCP connect",
            Self::Dns => "DNS query",
        }
    }

    /// How many are measured at once.
    pub const fn batch(self) -> usize {
        match self {
            Self::UdpConnected | Self::UdpForwarded | Self::UdpUnconnected => 8 * BURST,
            Self::TcpBulk | Self::TcpConnects => 16,
            Self::Dns => 10,
        }
    }

    /// Batches that are measured at least.
    pub const fn batches(self) -> usize {
        if matches!(self, Self::Dns) { 50 } else { 4 }
    }

    /// The time from one batch to the next; none is waited for where it is zero.
    pub const fn pace(self) -> Duration {
        match self {
            Self::Dns => Duration::from_micros(200 * self.batch() as u64),
            _ => Duration::ZERO,
        }
    }
}

/// The sockets of both ends.
pub struct Ends {
    connected: UdpSocket,
    unconnected: UdpSocket,
    sink: UdpSocket,
    sink_at: SocketAddr,
    to_pod: UdpSocket,
    pod: UdpSocket,
    resolver: UdpSocket,
    name_server: UdpSocket,
    query: Vec<u8>,
    next_id: u16,
    writer: TcpStream,
    reader: TcpStream,
    listener: TcpListener,
    buffer: Vec<u8>,
}

impl Ends {
    /// From the client to the router, over one pair of veth devices, and by it to the server.
    ///
    /// # Errors
    /// A socket cannot be made.
    pub fn new(lab: &Lab) -> Result<Self> {
        let at = |place, port| lab.socket(place, Family::V4, port);
        let router = Place::RouterTowards(Host::Client);
        let (sink_at, resolver_at) = (at(router, PORT), at(router, DNS_PORT));
        let (sink, name_server, listener) = lab.within(Host::Router, || -> Result<_> {
            let listener = TcpListener::bind(sink_at);
            let listener = listener.with_context(|| format!("listen at {sink_at}"))?;
            Ok((udp(sink_at)?, udp(resolver_at)?, listener))
        })?;
        let pod_at = at(Place::Of(Host::Server), PORT);
        let pod = lab.within(Host::Server, || udp(pod_at))?;
        let own = at(Place::Of(Host::Client), 0);
        let (connected, to_pod, resolver, unconnected, writer) =
            lab.within(Host::Client, || -> Result<_> {
                let to = |destination| -> Result<UdpSocket> {
                    let socket = udp(own)?;
                    socket.connect(destination)?;
                    Ok(socket)
                };
                let writer = TcpStream::connect(sink_at)?;
                Ok((
                    to(sink_at)?,
                    to(pod_at)?,
                    to(resolver_at)?,
                    udp(own)?,
                    writer,
                ))
            })?;
        let (reader, _) = listener.accept().context("accept")?;
        setsockopt(&writer, sockopt::SndBuf, &BUFFER)?;
        setsockopt(&reader, sockopt::RcvBuf, &BUFFER)?;
        for stream in [&writer, &reader] {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
        }
        Ok(Self {
            connected,
            unconnected,
            sink,
            sink_at,
            to_pod,
            pod,
            resolver,
            name_server,
            query: packet::dns_query(0, "whydrop.bench.svc.cluster.local", 1),
            next_id: 0,
            writer,
            reader,
            listener,
            buffer: vec![0; CHUNK],
        })
    }

    /// Does so many of a kind; to be called in the client's namespace.
    ///
    /// # Errors
    /// The kernel refuses something, or something is lost.
    pub fn work(&mut self, traffic: Traffic, units: usize) -> Result<()> {
        match traffic {
            Traffic::UdpConnected => datagrams(units, &self.sink, || self.connected.send(&PAYLOAD)),
            Traffic::UdpForwarded => datagrams(units, &self.pod, || self.to_pod.send(&PAYLOAD)),
            Traffic::UdpUnconnected => datagrams(units, &self.sink, || {
                self.unconnected.send_to(&PAYLOAD, self.sink_at)
            }),
            Traffic::TcpBulk => (0..units).try_for_each(|_| self.chunk()),
            Traffic::TcpConnects => (0..units).try_for_each(|_| self.connect()),
            Traffic::Dns => (0..units).try_for_each(|_| self.lookup()),
        }
        .with_context(|| format!("{traffic:?}"))
    }

    fn chunk(&mut self) -> Result<()> {
        self.writer.write_all(&self.buffer).context("write")?;
        self.reader.read_exact(&mut self.buffer).context("read")
    }

    fn connect(&self) -> Result<()> {
        let stream = TcpStream::connect(self.sink_at).context("connect")?;
        self.listener.accept().context("accept")?;
        // A reset instead of TIME_WAIT, in which all ports would soon be.
        let at_once = linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&stream, sockopt::Linger, &at_once).context("set SO_LINGER")
    }

    fn lookup(&mut self) -> Result<()> {
        self.next_id = self.next_id.wrapping_add(1);
        self.query[..2].copy_from_slice(&self.next_id.to_be_bytes());
        self.resolver.send(&self.query).context("ask")?;
        let (length, from) = self
            .name_server
            .recv_from(&mut self.buffer)
            .context("hear the question")?;
        self.buffer[FLAGS] |= IS_ANSWER;
        self.name_server
            .send_to(&self.buffer[..length], from)
            .context("answer")?;
        let length = self.resolver.recv(&mut self.buffer).context("hear")?;
        ensure!(
            length == self.query.len() && self.buffer[..2] == self.query[..2],
            "the answer is to another question"
        );
        Ok(())
    }
}

fn datagrams(
    units: usize,
    sink: &UdpSocket,
    send: impl Fn() -> std::io::Result<usize>,
) -> Result<()> {
    let mut buffer = [0; PAYLOAD.len()];
    let mut left = units;
    while left > 0 {
        let burst = left.min(BURST);
        for _ in 0..burst {
            send().context("send")?;
        }
        for _ in 0..burst {
            sink.recv(&mut buffer).context("receive")?;
        }
        left -= burst;
    }
    Ok(())
}

fn udp(at: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(at).with_context(|| format!("bind {at}"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}
