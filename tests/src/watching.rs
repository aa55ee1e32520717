//! The conntrack source by itself: running in the namespace of a router between hosts of which one
//! is deaf.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
use tokio::sync::mpsc;
use whydrop::decode::attempt::Attempt;
use whydrop::event::Protocol;
use whydrop::source::conntrack::{LocalTuples, Setup, Source, Totals, Tuple};

use crate::agent::POLL;
use crate::lab::{Family, Host, Lab, Place};
use crate::patience::within;
use crate::{packet, traffic};

/// Of the source. A SYN is sent again after 1 s, in the midst of it.
pub const SYN_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Of the source, for DNS queries.
pub const DNS_TIMEOUT: Duration = Duration::from_millis(1_000);
/// Between two dumps.
pub const PERIOD: Duration = Duration::from_millis(500);
/// What the other work of the machine may take.
pub fn slack() -> Duration {
    within(Duration::from_millis(500))
}
/// For what must come.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// At the server: for a listener.
pub const OPEN: u16 = 80;
/// Refuses by a reset.
pub const CLOSED: u16 = 81;
/// Drops what comes.
pub const DEAF: u16 = 5432;
/// A UDP port that does not answer, and is not DNS.
pub const DEAF_UDP: u16 = 9999;
/// Deaf as well.
pub const DNS: u16 = 53;

/// A lab whose router tracks connections, and whose server is deaf to some.
///
/// # Errors
/// The lab cannot be made.
pub fn deaf_lab() -> Result<Lab> {
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
pub struct Watch {
    /// Its handle.
    pub source: Source,
    /// What it hands on, one batch at a time.
    pub attempts: mpsc::Receiver<Vec<Attempt>>,
    /// What it takes for counted elsewhere.
    pub local: Arc<Mutex<LocalTuples>>,
}

impl Watch {
    /// Starts one at the router, to which every sender is foreign, unless `change` says otherwise.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(lab: &Lab, change: impl FnOnce(&mut Setup) + Send) -> Result<Self> {
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
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn up(lab: &Lab, change: impl FnOnce(&mut Setup) + Send) -> Result<Self> {
        let watch = Self::start(lab, change)?;
        wait_for("the source is up", || watch.source.status().up)?;
        Ok(watch)
    }

    /// What is found until there is so much of it, and when.
    ///
    /// # Errors
    /// So much is not found in time, or more.
    pub fn take(&mut self, attempts: usize) -> Result<Vec<(Instant, Attempt)>> {
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
    ///
    /// # Errors
    /// Something comes.
    pub fn nothing_more(&mut self) -> Result<()> {
        self.dumps(5)?;
        let more = self.attempts.try_recv();
        ensure!(more.is_err(), "found as well: {more:?}");
        Ok(())
    }

    /// Waits for dumps.
    ///
    /// # Errors
    /// There are none.
    pub fn dumps(&self, more: u64) -> Result<()> {
        let until = self.totals().dumps + more;
        wait_for("dumps", || self.totals().dumps >= until)
    }

    /// What it has done so far.
    pub fn totals(&self) -> Totals {
        self.source.totals()
    }

    /// Ends it, which takes no time.
    ///
    /// # Errors
    /// It does not end at once.
    pub fn stop(mut self) -> Result<()> {
        self.source.stop();
        let asked = Instant::now();
        wait_for("its end", || {
            matches!(
                self.attempts.try_recv(),
                Err(mpsc::error::TryRecvError::Disconnected)
            )
        })?;
        let late = within(Duration::from_secs(1));
        ensure!(asked.elapsed() < late, "it ends late");
        ensure!(!self.source.status().up, "it is said to be up");
        Ok(())
    }
}

/// Waits until something is so.
///
/// # Errors
/// It is not so in time; says what was waited for.
pub fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        ensure!(Instant::now() < deadline, "waited too long: {what}");
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Begins a TCP connection from the client and leaves it to the kernel: source and socket.
///
/// # Errors
/// The kernel refuses, or has connected already.
pub fn begin_connect(lab: &Lab, family: Family, port: u16) -> Result<(SocketAddr, OwnedFd)> {
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
///
/// # Errors
/// The kernel refuses the packet.
pub fn single_syn(lab: &Lab, family: Family, from: u16, to: u16) -> Result<Tuple> {
    let (client, server) = (
        lab.socket(Place::Of(Host::Client), family, from),
        lab.socket(Place::Of(Host::Server), family, to),
    );
    let syn = packet::segment((client.ip(), from), (server.ip(), to), packet::flags::SYN);
    lab.within(Host::Client, || traffic::raw_ip(server.ip(), [syn]))?;
    Ok(Tuple::new(Protocol::TCP, client, server))
}
