//! TCP connects, many at once: opened from inside a namespace, held, and each one's fate as its
//! application sees it. Call what opens them in [`Lab::within`].

use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, setsockopt,
    socket, sockopt,
};

use crate::agent::POLL;
use crate::lab::{Host, Lab};
use crate::sockets::{SYN_SENT, sockets};

/// Until something that nobody holds up must have happened.
const PATIENCE: Duration = Duration::from_secs(30);

/// What became of a connect, as its application sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Neither an answer nor an error yet.
    Waiting,
    /// Established.
    Established,
    /// An error that somebody told: ECONNREFUSED of a reset, EHOSTUNREACH or EACCES of an ICMP error.
    Refused(Errno),
    /// ETIMEDOUT: the kernel gave up.
    TimedOut,
}

impl Fate {
    fn of(error: Option<Errno>) -> Self {
        match error {
            None => Self::Established,
            Some(Errno::EINPROGRESS) => Self::Waiting,
            Some(Errno::ETIMEDOUT) => Self::TimedOut,
            Some(errno) => Self::Refused(errno),
        }
    }
}

/// What may be set on a socket before it connects.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The address that it connects from; the port is the kernel's choice.
    pub from: Option<IpAddr>,
    /// `TCP_USER_TIMEOUT`: the kernel gives up at the first resend after this time.
    pub user_timeout: Option<Duration>,
}

/// One connect.
#[derive(Debug)]
pub struct Attempt {
    socket: TcpStream,
    /// Its own end.
    pub from: SocketAddr,
    /// What it asked for.
    pub to: SocketAddr,
    /// When it began.
    pub since: Instant,
    fate: Fate,
}

impl Attempt {
    fn open(to: SocketAddr, options: Options) -> Result<Self> {
        let socket = unconnected(to, SockFlag::SOCK_NONBLOCK)?;
        if let Some(address) = options.from {
            // The port is chosen at connect, so that one may serve towards several destinations.
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)
                .context("set IP_BIND_ADDRESS_NO_PORT")?;
            let from = SockaddrStorage::from(SocketAddr::new(address, 0));
            bind(socket.as_raw_fd(), &from).with_context(|| format!("bind {address}"))?;
        }
        if let Some(timeout) = options.user_timeout {
            let ms = timeout.as_millis().try_into()?;
            setsockopt(&socket, sockopt::TcpUserTimeout, &ms).context("set TCP_USER_TIMEOUT")?;
        }
        let since = Instant::now();
        let begun = connect(socket.as_raw_fd(), &SockaddrStorage::from(to));
        let from = socket.local_addr().context("read a socket's own address")?;
        Ok(Self {
            socket,
            from,
            to,
            since,
            fate: Fate::of(begun.err()),
        })
    }

    /// What became of it when it was last looked at.
    pub fn fate(&self) -> Fate {
        self.fate
    }

    /// Connects the same socket again, which the kernel allows after a refusal.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn again(&mut self) -> Result<()> {
        let to = SockaddrStorage::from(self.to);
        self.since = Instant::now();
        let mut begun = connect(self.socket.as_raw_fd(), &to);
        // The first call after a failure only says that there was one.
        if begun == Err(Errno::ECONNABORTED) {
            begun = connect(self.socket.as_raw_fd(), &to);
        }
        self.fate = Fate::of(begun.err());
        self.from = self
            .socket
            .local_addr()
            .context("read a socket's own address")?;
        Ok(())
    }
}

/// Connects that are held open. Dropping it closes them.
#[derive(Debug, Default)]
pub struct Connects(Vec<Attempt>);

impl Connects {
    /// Begins a connect to each of these, without waiting for any.
    ///
    /// # Errors
    /// The kernel has no socket or port left.
    pub fn open(to: impl IntoIterator<Item = SocketAddr>, options: Options) -> Result<Self> {
        to.into_iter()
            .map(|to| Attempt::open(to, options))
            .collect::<Result<_>>()
            .map(Self)
    }

    /// Waits until none of them waits any more, or until a moment.
    ///
    /// # Errors
    /// A socket cannot be looked at.
    pub fn wait(&mut self, until: Instant) -> Result<()> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let (mut waiting, mut fds) = (Vec::new(), Vec::new());
            for (index, attempt) in self.0.iter().enumerate() {
                if attempt.fate == Fate::Waiting {
                    waiting.push(index);
                    fds.push(PollFd::new(attempt.socket.as_fd(), PollFlags::POLLOUT));
                }
            }
            if waiting.is_empty() {
                return Ok(());
            }
            let ready = poll(&mut fds, PollTimeout::try_from(left)?).context("poll")?;
            if ready == 0 {
                return Ok(());
            }
            let done: Vec<usize> = waiting
                .into_iter()
                .zip(&fds)
                .filter(|(_, fd)| fd.any() == Some(true))
                .map(|(index, _)| index)
                .collect();
            drop(fds);
            for index in done {
                let attempt = &mut self.0[index];
                let error = attempt.socket.take_error().context("read SO_ERROR")?;
                let errno = error.and_then(|error| error.raw_os_error());
                attempt.fate = Fate::of(errno.map(Errno::from_raw));
            }
        }
    }

    /// Closes them and keeps their ports, so that the kernel gives none of them to a later connect.
    ///
    /// # Errors
    /// A port is taken by another.
    pub fn close_and_hold(self) -> Result<Vec<TcpStream>> {
        self.0
            .into_iter()
            .map(|Attempt { socket, from, .. }| {
                drop(socket);
                let holder = unconnected(from, SockFlag::empty())?;
                // A process that another thread starts has a copy of the socket until its exec.
                let deadline = Instant::now() + PATIENCE;
                loop {
                    match bind(holder.as_raw_fd(), &SockaddrStorage::from(from)) {
                        Err(Errno::EADDRINUSE) if Instant::now() < deadline => {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        bound => {
                            bound.with_context(|| format!("bind {from}"))?;
                            return Ok(holder);
                        }
                    }
                }
            })
            .collect()
    }

    /// All of them, in the order in which they were opened.
    pub fn iter(&self) -> impl Iterator<Item = &Attempt> {
        self.0.iter()
    }

    /// All of them, to connect again.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Attempt> {
        self.0.iter_mut()
    }

    /// How many met each fate.
    pub fn fates(&self) -> Vec<(Fate, usize)> {
        let mut fates: Vec<(Fate, usize)> = Vec::new();
        for attempt in &self.0 {
            match fates.iter_mut().find(|(fate, _)| *fate == attempt.fate) {
                Some((_, count)) => *count += 1,
                None => fates.push((attempt.fate, 1)),
            }
        }
        fates
    }

    /// Fails unless all of them met this fate.
    ///
    /// # Errors
    /// Says how many met which.
    pub fn all(&self, fate: Fate) -> Result<()> {
        ensure!(
            self.0.iter().all(|attempt| attempt.fate == fate),
            "not all are {fate:?}: {:?}",
            self.fates()
        );
        Ok(())
    }
}

impl Extend<Self> for Connects {
    fn extend<T: IntoIterator<Item = Self>>(&mut self, others: T) {
        self.0.extend(others.into_iter().flat_map(|other| other.0));
    }
}

fn unconnected(to: SocketAddr, flags: SockFlag) -> Result<TcpStream> {
    let family = if to.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    socket(family, SockType::Stream, flags, SockProtocol::Tcp)
        .map(TcpStream::from)
        .context("open a TCP socket")
}

/// A connect that blocks its thread, as those of most applications do.
pub struct Blocked {
    socket: TcpStream,
    /// Its own end.
    pub from: SocketAddr,
    thread: JoinHandle<Fate>,
}

impl Blocked {
    /// Begins it, and waits until it has a port.
    ///
    /// # Errors
    /// The kernel has no socket left.
    pub fn open(to: SocketAddr) -> Result<Self> {
        let socket = unconnected(to, SockFlag::empty())?;
        let theirs = socket.try_clone().context("duplicate a socket")?;
        let thread = std::thread::spawn(move || {
            Fate::of(connect(theirs.as_raw_fd(), &SockaddrStorage::from(to)).err())
        });
        let deadline = Instant::now() + PATIENCE;
        loop {
            let from = socket.local_addr().context("read a socket's own address")?;
            if from.port() != 0 || thread.is_finished() {
                return Ok(Self {
                    socket,
                    from,
                    thread,
                });
            }
            ensure!(Instant::now() < deadline, "a connect does not begin");
            std::thread::sleep(POLL / 20);
        }
    }

    /// What becomes of it in the end.
    pub fn wait(self) -> Fate {
        match self.thread.join() {
            Ok(fate) => fate,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Ends it from another thread, as an application with a deadline does. It goes on where the kernel
    /// refuses that while a thread waits (`tcp_disconnect`, 5.10.186 and its like: EBUSY).
    ///
    /// # Errors
    /// The kernel does not let go of it for another reason.
    pub fn give_up(self) -> Result<Option<Self>> {
        match self.socket.shutdown(Shutdown::Both) {
            Ok(()) => {
                self.wait();
                Ok(None)
            }
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => Ok(Some(self)),
            Err(error) => Err(error).context("shut a connecting socket down"),
        }
    }
}

/// A process of its own whose connect hangs, to be killed.
pub struct Hanging {
    child: Child,
    /// Its own end.
    pub from: SocketAddr,
}

impl Hanging {
    /// Starts it at a host and waits until its socket has sent a SYN.
    ///
    /// # Errors
    /// There is no bash, or the connect does not hang.
    pub fn start(lab: &Lab, host: Host, to: SocketAddr) -> Result<Self> {
        let before = sockets(lab, host)?;
        let script = format!("exec 3<>/dev/tcp/{}/{}", to.ip(), to.port());
        let child = lab
            .within(host, || {
                Command::new("bash")
                    .args(["-c", &script])
                    .stdin(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
            })
            .context("start bash")?;
        let mut hanging = Self {
            child,
            from: SocketAddr::new(to.ip(), 0),
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = sockets(lab, host)?;
            let mut new = now.iter().filter(|socket| {
                socket.state == SYN_SENT && socket.remote == to && !before.contains(socket)
            });
            if let Some(found) = new.next() {
                hanging.from = found.local;
                return Ok(hanging);
            }
            ensure!(
                Instant::now() < deadline,
                "the connect of bash does not hang"
            );
            std::thread::sleep(POLL);
        }
    }

    /// Kills it.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().context("kill bash")?;
        self.child.wait().context("wait for bash").map(drop)
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::{Family, Place};
    use crate::listeners::{Acceptor, FullListener};

    /// Every fate, on the plain kernel: what the tests tell the agent's by.
    fn fates(family: Family) -> Result<()> {
        let lab = Lab::new()?;
        let at = |port| lab.socket(Place::Of(Host::Server), family, port);
        lab.nft(
            Host::Router,
            "table inet lab { chain c { type filter hook forward priority 0
               tcp dport 82 drop
               tcp dport 83 reject with tcp reset
               tcp dport 84 reject with icmpx admin-prohibited
             }
             }",
        )?;
        let _acceptor = Acceptor::start(&lab, Host::Server, [at(80)])?;
        let _full = FullListener::start(&lab, Host::Server, at(85))?;
        let open = |port, options| lab.within(Host::Client, || Connects::open([at(port)], options));
        let impatient = Options {
            user_timeout: Some(Duration::from_millis(500)),
            ..Options::default()
        };
        let mine = Options {
            from: Some(lab.address(Place::Of(Host::Client), family)),
            ..Options::default()
        };
        let mut connects = open(80, mine)?;
        for (port, options) in [
            (81, Options::default()),
            (82, Options::default()),
            (82, impatient),
            (83, Options::default()),
            (84, Options::default()),
            (85, Options::default()),
        ] {
            connects.extend([open(port, options)?]);
        }
        let blocked = lab.within(Host::Client, || Blocked::open(at(82)))?;
        let blocked_open = lab.within(Host::Client, || Blocked::open(at(80)))?;
        let hanging = Hanging::start(&lab, Host::Client, at(82))?;
        // An ICMPv6 error may come with the second SYN alone.
        let deadline = Instant::now() + PATIENCE;
        let waiting = |connects: &Connects| {
            let fates = connects.iter().map(Attempt::fate);
            fates.filter(|fate| *fate == Fate::Waiting).count()
        };
        while waiting(&connects) > 2 && Instant::now() < deadline {
            connects.wait(Instant::now() + Duration::from_millis(200))?;
        }
        let ports: Vec<u16> = connects.iter().map(|attempt| attempt.from.port()).collect();
        assert!(ports.iter().all(|port| *port >= 1_024), "{ports:?}");
        let fates: Vec<Fate> = connects.iter().map(Attempt::fate).collect();
        let prohibited = family.pick(Errno::EHOSTUNREACH, Errno::EACCES);
        assert_eq!(
            fates,
            [
                Fate::Established,
                Fate::Refused(Errno::ECONNREFUSED),
                Fate::Waiting,
                Fate::TimedOut,
                Fate::Refused(Errno::ECONNREFUSED),
                Fate::Refused(prohibited),
                Fate::Waiting,
            ]
        );
        assert_eq!(blocked_open.wait(), Fate::Established);
        let waiting = |port| {
            let found = sockets(&lab, Host::Client).unwrap();
            found
                .iter()
                .any(|socket| socket.state == SYN_SENT && socket.local.port() == port)
        };
        let (blocked_port, hanging_port) = (blocked.from.port(), hanging.from.port());
        assert!(waiting(blocked_port) && waiting(hanging_port));
        assert!(blocked.give_up()?.is_none());
        hanging.kill()?;
        assert!(!waiting(blocked_port) && !waiting(hanging_port));
        // A refused socket may try again.
        let refused = connects.iter_mut().nth(1).unwrap();
        refused.again()?;
        let tried = refused.from;
        assert_eq!(refused.fate(), Fate::Waiting, "{tried}");
        connects.wait(Instant::now() + PATIENCE)?;
        assert_eq!(
            connects.iter().nth(1).map(Attempt::fate),
            Some(Fate::Refused(Errno::ECONNREFUSED))
        );
        Ok(())
    }

    #[test]
    fn fates_ipv4() -> Result<()> {
        fates(Family::V4)
    }

    #[test]
    fn fates_ipv6() -> Result<()> {
        fates(Family::V6)
    }
}
