//! TCP servers: one that accepts everyone, and one that accepts nobody.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{Backlog, listen};

use crate::agent::POLL;
use crate::lab::{Host, Lab};
use crate::sockets::{LISTEN, sockets};

/// Until something that nobody holds up must have happened.
const PATIENCE: Duration = Duration::from_secs(30);

/// A listener whose accept queue is full: whoever connects gets no answer, and no drop shows it.
pub struct FullListener {
    _listener: TcpListener,
    _fillers: Vec<TcpStream>,
}

impl FullListener {
    /// Listens at an address of a host, and connects from the host itself until the queue is full.
    ///
    /// # Errors
    /// The address is taken, or the queue does not fill.
    pub fn start(lab: &Lab, host: Host, at: SocketAddr) -> Result<Self> {
        lab.within(host, || {
            let listener = TcpListener::bind(at).with_context(|| format!("listen at {at}"))?;
            // The kernel lets in one more than it is told.
            let backlog = Backlog::new(0).context("a backlog of 0")?;
            listen(&listener, backlog).context("make the accept queue shorter")?;
            let filler = TcpStream::connect_timeout(&at, PATIENCE)
                .with_context(|| format!("fill the accept queue of {at}"))?;
            Ok((listener, filler))
        })
        .and_then(|(listener, filler)| {
            let deadline = Instant::now() + PATIENCE;
            while !sockets(lab, host)?
                .iter()
                .any(|socket| socket.state == LISTEN && socket.local == at && socket.received > 0)
            {
                ensure!(Instant::now() < deadline, "the accept queue does not fill");
                std::thread::sleep(POLL);
            }
            Ok(Self {
                _listener: listener,
                _fillers: vec![filler],
            })
        })
    }
}

/// A server that accepts everyone and closes at once.
pub struct Acceptor {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    /// Listens at addresses of a host.
    ///
    /// # Errors
    /// One is taken.
    pub fn start(lab: &Lab, host: Host, at: impl IntoIterator<Item = SocketAddr>) -> Result<Self> {
        let at: Vec<SocketAddr> = at.into_iter().collect();
        let listeners = lab.within(host, || {
            at.into_iter()
                .map(|at| {
                    let listener =
                        TcpListener::bind(at).with_context(|| format!("listen at {at}"))?;
                    // Longer than std's, so that no burst of a test fills it.
                    listen(&listener, Backlog::new(4_096)?)?;
                    listener.set_nonblocking(true)?;
                    Ok(listener)
                })
                .collect::<Result<Vec<_>>>()
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || accept(&listeners, &stop)
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept(listeners: &[TcpListener], stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut fds: Vec<PollFd<'_>> = listeners
            .iter()
            .map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN))
            .collect();
        // Ends now and then without anyone, to see whether to stop.
        if !poll(&mut fds, 50_u16).is_ok_and(|ready| ready > 0) {
            continue;
        }
        for listener in listeners {
            while listener.accept().is_ok() {}
        }
    }
}
