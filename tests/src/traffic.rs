//! Traffic from inside a namespace: call these in [`Lab::within`](crate::lab::Lab::within).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage,
    bind, listen, sendto, setsockopt, socket, sockopt,
};

/// Long enough for any answer in the lab, and shorter than the second after which the kernel sends
/// a SYN again: one connect is one SYN.
pub const CONNECT_TIMEOUT: Duration = Duration::from_millis(250);

/// How a connect ended, as the application sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    /// Established.
    Established,
    /// ECONNREFUSED: a reset, or a port unreachable.
    Refused,
    /// No answer within [`CONNECT_TIMEOUT`].
    Silent,
    /// Any other error of the kernel.
    Failed(Errno),
}

/// One TCP connect, closed at once.
pub fn connect(to: SocketAddr) -> Connect {
    match TcpStream::connect_timeout(&to, CONNECT_TIMEOUT) {
        Ok(_) => Connect::Established,
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Connect::Silent,
        Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            Errno::ECONNREFUSED => Connect::Refused,
            errno => Connect::Failed(errno),
        },
    }
}

/// What the kernel did with the datagrams of a burst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Burst {
    /// Accepted from the application.
    pub accepted: u64,
    /// Refused with EPERM: a rule at OUTPUT.
    pub refused: u64,
}

/// Sends `packets` datagrams round robin over `flows` source ports, as fast as one thread can.
///
/// # Errors
/// Any error of the kernel but EPERM.
pub fn udp_burst(to: SocketAddr, packets: u64, flows: usize, payload: &[u8]) -> Result<Burst> {
    let any: IpAddr = if to.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let sockets = (0..flows)
        .map(|_| UdpSocket::bind((any, 0)))
        .collect::<io::Result<Vec<_>>>()
        .context("bind UDP sockets")?;
    let mut burst = Burst::default();
    for (_, socket) in (0..packets).zip(sockets.iter().cycle()) {
        match socket.send_to(payload, to) {
            Ok(_) => burst.accepted += 1,
            Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => burst.refused += 1,
            Err(error) => bail!("send to {to}: {error}"),
        }
    }
    Ok(burst)
}

/// A UDP socket that nobody reads, with the smallest receive buffer that the kernel allows.
///
/// # Errors
/// The address is taken.
pub fn deaf_udp_socket(at: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(at).with_context(|| format!("bind {at}"))?;
    setsockopt(&socket, sockopt::RcvBuf, &1).context("set SO_RCVBUF")?;
    Ok(socket)
}

/// A TCP socket that listens and never accepts; the kernel takes one connection more than
/// `backlog` for it.
///
/// # Errors
/// The address is taken.
pub fn deaf_listener(at: SocketAddr, backlog: i32) -> Result<OwnedFd> {
    let family = if at.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .context("open a TCP socket")?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(at)).with_context(|| format!("bind {at}"))?;
    listen(&socket, Backlog::new(backlog)?).with_context(|| format!("listen at {at}"))?;
    Ok(socket)
}

/// Waits for a connection in the listener's queue, which nobody takes out.
///
/// # Errors
/// The listener cannot be polled.
pub fn has_arrived(listener: &OwnedFd, within: Duration) -> Result<bool> {
    let mut asked = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut asked, PollTimeout::try_from(within)?).context("poll a listener")?;
    Ok(ready == 1)
}

/// As many connects at once; how many were established.
pub fn connects(to: SocketAddr, count: usize) -> usize {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(|| connect(to))).collect();
        let results = threads.into_iter().map(|thread| thread.join());
        results
            .filter(|result| matches!(result, Ok(Connect::Established)))
            .count()
    })
}

/// Sends IP packets made by hand; they are routed as any other (the kernel fills in the IPv4
/// checksum and nothing else).
///
/// # Errors
/// The kernel refuses one, as when it is longer than the device's MTU.
pub fn raw_ip<P: AsRef<[u8]>>(to: IpAddr, packets: impl IntoIterator<Item = P>) -> Result<u64> {
    let family = if to.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let socket = socket(
        family,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Raw,
    )
    .context("open a raw socket")?;
    // The port of a raw IPv6 destination must be zero.
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    let mut sent = 0;
    for packet in packets {
        sendto(socket.as_raw_fd(), packet.as_ref(), &to, MsgFlags::empty())
            .context("send a raw packet")?;
        sent += 1;
    }
    Ok(sent)
}

/// Sends whole Ethernet frames by a device.
///
/// # Errors
/// There is no such device, or the kernel refuses a frame.
pub fn raw_frames<P: AsRef<[u8]>>(
    device: &str,
    frames: impl IntoIterator<Item = P>,
) -> Result<u64> {
    let to = link_address(device)?;
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        // Protocol 0: the socket sends and never receives.
        None,
    )
    .context("open a packet socket")?;
    let mut sent = 0;
    for frame in frames {
        sendto(socket.as_raw_fd(), frame.as_ref(), &to, MsgFlags::empty())
            .context("send a frame")?;
        sent += 1;
    }
    Ok(sent)
}

/// The address of a device for packet sockets; getifaddrs is where a safe program gets one.
fn link_address(device: &str) -> Result<LinkAddr> {
    nix::ifaddrs::getifaddrs()
        .context("list the devices")?
        .filter(|entry| entry.interface_name == device)
        .find_map(|entry| entry.address?.as_link_addr().copied())
        .with_context(|| format!("no device {device} in this namespace"))
}
