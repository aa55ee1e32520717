//! DNS clients: sockets whose queries have ids that a test chooses, and what they hear.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::dns_server::{BUFFER_BYTES, framed, message};
use crate::packet::dns_query;

/// What a client heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// An answer.
    Answer {
        /// Who sent it.
        from: SocketAddr,
        /// The query's id.
        id: u16,
        /// The response code.
        rcode: u8,
        /// The truncation bit.
        cut: bool,
    },
    /// An error of the socket, as ECONNREFUSED of a connected one.
    Error(Errno),
}

impl Heard {
    fn answer(bytes: &[u8], from: SocketAddr) -> Option<Self> {
        Some(Self::Answer {
            from,
            id: u16::from_be_bytes([*bytes.first()?, *bytes.get(1)?]),
            rcode: bytes.get(3)? & 0x0f,
            cut: bytes.get(2)? & 2 != 0,
        })
    }

    /// The id of an answer.
    pub fn id(&self) -> Option<u16> {
        match self {
            Self::Answer { id, .. } => Some(*id),
            Self::Error(_) => None,
        }
    }
}

/// A client's UDP socket.
pub struct Client {
    socket: UdpSocket,
    /// Its own end.
    pub from: SocketAddr,
}

impl Client {
    /// A socket that sends to anyone. Call it in [`Lab::within`](crate::lab::Lab::within).
    ///
    /// # Errors
    /// The address is not the host's.
    pub fn unconnected(from: SocketAddr) -> Result<Self> {
        let socket = UdpSocket::bind(from).with_context(|| format!("bind {from}"))?;
        let from = socket.local_addr()?;
        Ok(Self { socket, from })
    }

    /// A socket that is connected to a server, and so hears its errors. Call it in [`Lab::within`](crate::lab::Lab::within).
    ///
    /// # Errors
    /// As [`Client::unconnected`], or there is no route.
    pub fn connected(from: SocketAddr, to: SocketAddr) -> Result<Self> {
        let client = Self::unconnected(from)?;
        client
            .socket
            .connect(to)
            .with_context(|| format!("connect to {to}"))?;
        let from = client.socket.local_addr()?;
        Ok(Self { from, ..client })
    }

    /// The socket, to send what is no query or to set its buffer.
    pub fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    /// Asks, on a connected socket if no server is named.
    ///
    /// # Errors
    /// The kernel's own, as EPERM of a rule at OUTPUT.
    pub fn ask(&self, to: Option<SocketAddr>, id: u16, name: &str, kind: u16) -> io::Result<()> {
        let query = dns_query(id, name, kind);
        match to {
            Some(to) => self.socket.send_to(&query, to),
            None => self.socket.send(&query),
        }
        .map(drop)
    }

    /// What it hears until so many came or a moment is there.
    ///
    /// # Errors
    /// Something came that is no DNS message.
    pub fn hear(&self, most: usize, until: Instant) -> Result<Vec<Heard>> {
        let mut heard = Vec::new();
        let mut buffer = [0; BUFFER_BYTES];
        while heard.len() < most {
            let left = until.saturating_duration_since(Instant::now());
            // At the moment itself, what is there already is still taken.
            let wait = left.max(Duration::from_millis(1));
            self.socket.set_read_timeout(Some(wait))?;
            match self.socket.recv_from(&mut buffer) {
                Ok((length, from)) => {
                    let answer = buffer.get(..length).and_then(|b| Heard::answer(b, from));
                    heard.push(answer.context("an answer without a header")?);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if left.is_zero() {
                        break;
                    }
                }
                Err(error) => {
                    let errno = error.raw_os_error().context("an error without a number")?;
                    heard.push(Heard::Error(Errno::from_raw(errno)));
                }
            }
        }
        Ok(heard)
    }
}

/// A client's TCP connection to a server.
pub struct TcpClient {
    stream: TcpStream,
    /// Its own end.
    pub from: SocketAddr,
    bytes: Vec<u8>,
}

impl TcpClient {
    /// Connects. Call it in [`Lab::within`](crate::lab::Lab::within).
    ///
    /// # Errors
    /// Nobody answers.
    pub fn connect(to: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))
            .with_context(|| format!("connect to {to}"))?;
        // Each write is a segment.
        stream.set_nodelay(true)?;
        let from = stream.local_addr()?;
        Ok(Self {
            stream,
            from,
            bytes: Vec::new(),
        })
    }

    /// Asks.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn ask(&mut self, id: u16, name: &str, kind: u16) -> Result<()> {
        self.send(&framed(&dns_query(id, name, kind)))
    }

    /// Sends bytes as they are, in a segment of their own.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("write a query")
    }

    /// What it hears until so many answers came or a moment is there.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn hear(&mut self, most: usize, until: Instant) -> Result<Vec<Heard>> {
        let from = self.stream.peer_addr()?;
        let mut heard = Vec::new();
        let mut buffer = [0; BUFFER_BYTES];
        loop {
            while heard.len() < most
                && let Some(bytes) = message(&mut self.bytes)
            {
                heard.push(Heard::answer(&bytes, from).context("an answer without a header")?);
            }
            let left = until.saturating_duration_since(Instant::now());
            if heard.len() == most || left.is_zero() {
                return Ok(heard);
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(heard),
                Ok(length) => self.bytes.extend(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("read an answer"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns_server::{A, AAAA, Server};
    use crate::lab::{Family, Host, Lab, Place};

    /// A process that another thread starts just now has copies of the server's sockets.
    fn closed(family: Family) -> Result<()> {
        let lab = Lab::new()?;
        let at = lab.socket(Place::Of(Host::Server), family, 53);
        let from = lab.socket(Place::Of(Host::Client), family, 0);
        let server = Server::start(&lab, Host::Server, at)?;
        let _copies = server.copies()?;
        drop(server);
        let client = lab.within(Host::Client, || Client::connected(from, at))?;
        client.ask(None, 1, "a.test", A)?;
        assert_eq!(
            client.hear(1, Instant::now() + Duration::from_secs(30))?,
            [Heard::Error(Errno::ECONNREFUSED)]
        );
        let error = lab.within(Host::Client, || TcpStream::connect(at));
        let error = error.expect_err("nobody listens");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        Ok(())
    }

    #[test]
    fn closed_ipv4() -> Result<()> {
        closed(Family::V4)
    }

    #[test]
    fn closed_ipv6() -> Result<()> {
        closed(Family::V6)
    }

    fn conversation(family: Family) -> Result<()> {
        let lab = Lab::new()?;
        let at = lab.socket(Place::Of(Host::Server), family, 53);
        let from = lab.socket(Place::Of(Host::Client), family, 0);
        let server = Server::start(&lab, Host::Server, at)?;
        let (connected, unconnected) = lab.within(Host::Client, || -> Result<_> {
            Ok((Client::connected(from, at)?, Client::unconnected(from)?))
        })?;
        let until = Instant::now() + Duration::from_secs(30);
        connected.ask(None, 1, "delay2000-a.test", A)?;
        connected.ask(None, 2, "rcode3-b.test", AAAA)?;
        connected.ask(None, 3, "ignore-c.test", A)?;
        let answer = |id, rcode, cut| Heard::Answer {
            from: at,
            id,
            rcode,
            cut,
        };
        assert_eq!(
            connected.hear(2, until)?,
            [answer(2, 3, false), answer(1, 0, false)]
        );
        assert_eq!(connected.hear(1, Instant::now())?, []);
        unconnected.ask(Some(at), 4, "cut-d.test", A)?;
        assert_eq!(unconnected.hear(1, until)?, [answer(4, 0, true)]);
        let mut stream = lab.within(Host::Client, || TcpClient::connect(at))?;
        stream.ask(5, "cut-d.test", A)?;
        stream.ask(6, "rcode2-e.test", A)?;
        assert_eq!(
            stream.hear(2, until)?,
            [answer(5, 0, false), answer(6, 2, false)]
        );
        assert_eq!(server.heard(), 6);
        drop(server);
        // Its port is closed now.
        connected.ask(None, 7, "f.test", A)?;
        assert_eq!(
            connected.hear(1, until)?,
            [Heard::Error(Errno::ECONNREFUSED)]
        );
        Ok(())
    }

    #[test]
    fn conversation_ipv4() -> Result<()> {
        conversation(Family::V4)
    }

    #[test]
    fn conversation_ipv6() -> Result<()> {
        conversation(Family::V6)
    }
}
