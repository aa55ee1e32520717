//! The TCP sockets of a host, as the kernel lists them.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};

use crate::lab::{Host, Lab};

/// State of a TCP socket that has sent its SYN (include/net/tcp_states.h).
pub const SYN_SENT: u8 = 2;
/// State of a TCP socket that listens.
pub const LISTEN: u8 = 10;

/// A TCP socket of a host, as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Its own end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// As in include/net/tcp_states.h.
    pub state: u8,
    /// Bytes that nobody has read; of a listener, connections that nobody has accepted.
    pub received: u64,
}

/// The TCP sockets of a host, of both families.
///
/// # Errors
/// /proc cannot be read, or not as it is known.
pub fn sockets(lab: &Lab, host: Host) -> Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for file in ["tcp", "tcp6"] {
        let text = lab.read(host, &format!("/proc/thread-self/net/{file}"))?;
        for line in text.lines().skip(1) {
            sockets.push(parse(line).with_context(|| format!("a line of {file}: {line}"))?);
        }
    }
    Ok(sockets)
}

/// A line of /proc/net/tcp or tcp6 (`get_tcp4_sock`, net/ipv4/tcp_ipv4.c, Linux 6.18).
fn parse(line: &str) -> Option<Socket> {
    let mut words = line.split_whitespace().skip(1);
    let (local, remote) = (end(words.next()?)?, end(words.next()?)?);
    let state = u8::from_str_radix(words.next()?, 16).ok()?;
    let received = words.next()?.split_once(':')?.1;
    Some(Socket {
        local,
        remote,
        state,
        received: u64::from_str_radix(received, 16).ok()?,
    })
}

/// An address in words of 32 bits as this machine has them, a colon, and the port.
fn end(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let mut bytes = Vec::new();
    for index in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(index..index + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(four) => IpAddr::from(four),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn reads_proc_net_tcp() {
        let line =
            "   1: 1200400A:0050 0202000A:C350 02 00000001:00000003 01:00000014 00000000 0 0 1";
        let socket = parse(line).unwrap();
        assert_eq!(socket.local, "10.64.0.18:80".parse().unwrap());
        assert_eq!(socket.remote, "10.0.2.2:50000".parse().unwrap());
        assert_eq!((socket.state, socket.received), (SYN_SENT, 3));
        let six = end("0B0D77FD00000000000000000200000000:0050");
        assert_eq!(six, None, "an address that is too long");
        let six = end("0B0D77FD000000000000000002000000:0050").unwrap();
        assert_eq!(six, "[fd77:0d0b::2]:80".parse().unwrap());
    }
}
