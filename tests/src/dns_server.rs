//! A DNS server whose answer the name decides.
//!
//! The first label of a name, up to a hyphen, says what becomes of a query: `ignore-7.test`.
//!
//! | begins with | the server |
//! |---|---|
//! | `ignore` | says nothing |
//! | `rcodeN` | answers with response code N and no record |
//! | `delayN` | answers after N ms |
//! | `cut` | over UDP, answers with the truncation bit and no record |
//! | `long` | answers with some 3,000 bytes: UDP in fragments |
//! | anything else | answers with one record |

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};

use crate::lab::{Host, Lab};

/// Type of an IPv4 address.
pub const A: u16 = 1;
/// Type of an IPv6 address.
pub const AAAA: u16 = 28;
/// Response code: nothing wrong.
pub const NOERROR: u8 = 0;
/// More than any message here.
pub(crate) const BUFFER_BYTES: usize = 4_096;
/// Thousands of queries, and some of the longest datagrams.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;
/// RFC 1035, section 4.1.1.
const HEADER_BYTES: usize = 12;
/// How often a server sees whether to stop.
const LOOK: Duration = Duration::from_millis(50);
/// The record of a `long` answer: so many strings of 249 bytes, each behind its length.
const LONG_STRINGS: usize = 12;

/// A server, over UDP and TCP. Dropping it ends it, and its ports are closed then.
pub struct Server {
    udp: UdpSocket,
    tcp: TcpListener,
    at: SocketAddr,
    stop: Arc<AtomicBool>,
    heard: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Serves at an address of a host.
    ///
    /// # Errors
    /// The address is taken.
    pub fn start(lab: &Lab, host: Host, at: SocketAddr) -> Result<Self> {
        let (udp, tcp) = lab
            .within(host, || -> io::Result<_> {
                Ok((UdpSocket::bind(at)?, TcpListener::bind(at)?))
            })
            .with_context(|| format!("serve DNS at {at}"))?;
        udp.set_read_timeout(Some(LOOK))?;
        // On a machine with other work it may not run for a while: what waits then must not be dropped.
        setsockopt(&udp, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES)
            .context("set SO_RCVBUFFORCE")?;
        tcp.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let heard = Arc::new(AtomicU64::new(0));
        let threads = vec![
            std::thread::spawn({
                let (stop, heard) = (Arc::clone(&stop), Arc::clone(&heard));
                let udp = udp.try_clone()?;
                move || serve_udp(&udp, &stop, &heard)
            }),
            std::thread::spawn({
                let (stop, heard) = (Arc::clone(&stop), Arc::clone(&heard));
                let tcp = tcp.try_clone()?;
                move || serve_tcp(&tcp, &stop, &heard)
            }),
        ];
        Ok(Self {
            udp,
            tcp,
            at,
            stop,
            heard,
            threads,
        })
    }

    #[cfg(test)]
    pub(crate) fn copies(&self) -> io::Result<(UdpSocket, TcpListener)> {
        Ok((self.udp.try_clone()?, self.tcp.try_clone()?))
    }

    /// Queries that arrived so far, resent ones as well.
    pub fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // A process that another thread starts has copies of these sockets until its exec, so that
        // closing them need not close the ports. These two do: connected to itself, UDP hears nobody
        // else, and a listener that is shut down is none.
        let _ = self.udp.connect(self.at);
        let _ = shutdown(self.tcp.as_raw_fd(), Shutdown::Read);
    }
}

/// An answer that waits.
struct Late {
    due: Instant,
    to: SocketAddr,
    bytes: Vec<u8>,
}

fn serve_udp(socket: &UdpSocket, stop: &AtomicBool, heard: &AtomicU64) {
    let mut late: Vec<Late> = Vec::new();
    let mut buffer = [0; BUFFER_BYTES];
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        for answer in late.extract_if(.., |answer| answer.due <= now) {
            let _ = socket.send_to(&answer.bytes, answer.to);
        }
        if let Some(next) = late.iter().map(|answer| answer.due).min() {
            // Never zero, which would be no timeout at all.
            let wait = next.saturating_duration_since(now).min(LOOK);
            let _ = socket.set_read_timeout(Some(wait.max(Duration::from_millis(1))));
        }
        let Ok((length, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let Some(query) = buffer.get(..length) else {
            continue;
        };
        heard.fetch_add(1, Ordering::Relaxed);
        match answer(query, true) {
            Some((Duration::ZERO, bytes)) => {
                let _ = socket.send_to(&bytes, from);
            }
            Some((delay, bytes)) => late.push(Late {
                due: Instant::now() + delay,
                to: from,
                bytes,
            }),
            None => {}
        }
    }
}

fn serve_tcp(listener: &TcpListener, stop: &AtomicBool, heard: &AtomicU64) {
    std::thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((stream, _)) => {
                    scope.spawn(move || serve_stream(stream, stop, heard));
                }
                Err(_) => std::thread::sleep(LOOK / 10),
            }
        }
    });
}

/// One connection, until its client ends it. A delay holds up what comes after it.
fn serve_stream(mut stream: TcpStream, stop: &AtomicBool, heard: &AtomicU64) {
    if stream.set_read_timeout(Some(LOOK)).is_err() {
        return;
    }
    let mut bytes = Vec::new();
    let mut buffer = [0; BUFFER_BYTES];
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => bytes.extend(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return,
        }
        while let Some(query) = message(&mut bytes) {
            heard.fetch_add(1, Ordering::Relaxed);
            if let Some((delay, bytes)) = answer(&query, false) {
                std::thread::sleep(delay);
                if stream.write_all(&framed(&bytes)).is_err() {
                    return;
                }
            }
        }
    }
}

/// A message as TCP carries it: behind its length (RFC 1035, section 4.2.2).
///
/// # Panics
/// If it is longer than 65,535 bytes.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).expect("a message of at most 65,535 bytes");
    [&length.to_be_bytes(), message].concat()
}

/// Takes the first whole message off a stream's bytes.
pub(crate) fn message(bytes: &mut Vec<u8>) -> Option<Vec<u8>> {
    let end = 2 + usize::from(u16::from_be_bytes([*bytes.first()?, *bytes.get(1)?]));
    (bytes.len() >= end).then(|| bytes.drain(..end).skip(2).collect())
}

/// What a server does with a query: answer with these bytes after a delay, or nothing.
fn answer(query: &[u8], udp: bool) -> Option<(Duration, Vec<u8>)> {
    let (name, question) = first_question(query)?;
    let habit = name.split(['-', '.']).next().unwrap_or_default();
    let number = |prefix: &str| habit.strip_prefix(prefix)?.parse::<u64>().ok();
    if habit == "ignore" {
        return None;
    }
    let delay = Duration::from_millis(number("delay").unwrap_or(0));
    let rcode = number("rcode").unwrap_or(0) as u8;
    let cut = udp && habit == "cut";
    let has_record = rcode == NOERROR && !cut;
    let kind = u16::from_be_bytes([
        *question.get(question.len() - 4)?,
        question[question.len() - 3],
    ]);

    let mut bytes = query.get(..2)?.to_vec();
    // QR, and RD as asked; then RA and the code.
    bytes.push(0x80 | (query[2] & 1) | if cut { 2 } else { 0 });
    bytes.push(0x80 | (rcode & 0x0f));
    bytes.extend([0, 1, 0, u8::from(has_record), 0, 0, 0, 0]);
    bytes.extend(question);
    if has_record {
        // The name is the question's.
        bytes.extend([0xc0, HEADER_BYTES as u8]);
        let data: Vec<u8> = match kind {
            _ if habit == "long" => vec![[249; 250]; LONG_STRINGS].concat(),
            AAAA => [&[0xfd][..], &[0; 14], &[1]].concat(),
            _ => vec![192, 0, 2, 1],
        };
        let kind = if habit == "long" { 16 } else { kind };
        bytes.extend(u16::to_be_bytes(kind));
        // Class IN, and a time to live of a minute.
        bytes.extend([0, 1, 0, 0, 0, 60]);
        bytes.extend(u16::try_from(data.len()).ok()?.to_be_bytes());
        bytes.extend(data);
    }
    Some((delay, bytes))
}

/// The name of the first question in lower case, without its final dot, and the question's bytes;
/// `None` of what is no well-formed query.
fn first_question(query: &[u8]) -> Option<(String, &[u8])> {
    let is_answer = query.get(2)? & 0x80 != 0;
    if is_answer || query.get(4..6)? == [0, 0] {
        return None;
    }
    let mut labels = Vec::new();
    let mut at = HEADER_BYTES;
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        match length {
            0 => break,
            1..64 => labels.push(String::from_utf8_lossy(query.get(at..at + length)?)),
            _ => return None,
        }
        at += length;
    }
    let name = labels.join(".").to_ascii_lowercase();
    Some((name, query.get(HEADER_BYTES..at + 4)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::dns_query;

    #[test]
    fn answers_as_the_name_says() {
        let of = |name, udp| answer(&dns_query(7, name, A), udp);
        let (delay, bytes) = of("db.shop", true).unwrap();
        assert_eq!(delay, Duration::ZERO);
        assert_eq!(
            bytes,
            b"\0\x07\x81\x80\0\x01\0\x01\0\0\0\0\x02db\x04shop\0\0\x01\0\x01\
              \xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\xc0\0\x02\x01"
        );
        assert_eq!(of("ignore-1.test", true), None);
        assert_eq!(
            of("ignored.test", true).map(|(delay, _)| delay),
            Some(delay)
        );
        assert_eq!(
            of("rcode3-1.test", true).unwrap().1[2..8],
            *b"\x81\x83\0\x01\0\0"
        );
        assert_eq!(
            of("cut-1.test", true).unwrap().1[2..8],
            *b"\x83\x80\0\x01\0\0"
        );
        assert_eq!(
            of("cut-1.test", false).unwrap().1[2..8],
            *b"\x81\x80\0\x01\0\x01"
        );
        assert_eq!(of("delay250-1.test", true).unwrap().0.as_millis(), 250);
        assert!(of("long-1.test", true).unwrap().1.len() > 3_000);
        let mut answer_to = bytes;
        assert_eq!(answer(&answer_to, true), None, "an answer is no query");
        answer_to.truncate(15);
        assert_eq!(answer(&answer_to, true), None);
    }
}
