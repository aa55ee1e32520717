//! Allowed traffic of the second pair, which must never be blamed for the drops of the first.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::{Family, Host, Lab, Place, enter};

/// TCP and UDP port of the echo server.
const PORT: u16 = 80;
/// Between two rounds, so that the machine is left to the test.
const PAUSE: Duration = Duration::from_millis(2);
/// How long an echo may take before the round has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether the pair opens connections or only uses those it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    /// A new TCP connection every round, beside the lasting ones.
    Connects,
    /// The lasting connections only: for a router that can take no new ones.
    Lasting,
}

/// The traffic, while it runs.
pub struct Bystander {
    /// The client's, and once that has ended the servers'.
    stop: [Arc<AtomicBool>; 2],
    rounds: Arc<AtomicU64>,
    client: Option<JoinHandle<Result<()>>>,
    servers: Vec<JoinHandle<()>>,
}

impl Bystander {
    /// Starts echo servers at server2 and a client at client2, and waits for the first round.
    ///
    /// # Errors
    /// The first round fails: a rule of the test reaches the wrong pair.
    pub fn start(lab: &Lab, family: Family, habit: Habit) -> Result<Self> {
        let at = lab.socket(Place::Of(Host::Server2), family, PORT);
        let (tcp, udp) = lab.within(Host::Server2, || -> Result<_> {
            Ok((TcpListener::bind(at)?, UdpSocket::bind(at)?))
        })?;
        let stop: [Arc<AtomicBool>; 2] = Default::default();
        let rounds = Arc::new(AtomicU64::new(0));
        let from = lab.socket(Place::Of(Host::Client2), family, 0);
        let netns = lab.netns(Host::Client2);
        let client = std::thread::spawn({
            let (stop, rounds) = (Arc::clone(&stop[0]), Arc::clone(&rounds));
            move || -> Result<()> {
                enter(&netns)?;
                let mut lasting = TcpStream::connect_timeout(&at, PATIENCE)
                    .with_context(|| format!("the bystander cannot connect to {at}"))?;
                let datagrams = UdpSocket::bind(from)?;
                datagrams.connect(at)?;
                datagrams.set_read_timeout(Some(PATIENCE))?;
                while !stop.load(Ordering::Relaxed) {
                    round_trip(&mut lasting)?;
                    datagrams
                        .send(b"echo")
                        .context("the bystander's datagram")?;
                    datagrams
                        .recv(&mut [0; 16])
                        .context("the bystander got no datagram back")?;
                    if habit == Habit::Connects {
                        let mut fresh = TcpStream::connect_timeout(&at, PATIENCE)
                            .context("the bystander cannot connect any more")?;
                        round_trip(&mut fresh)?;
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(PAUSE);
                }
                Ok(())
            }
        });
        let servers = vec![
            std::thread::spawn({
                let stop = Arc::clone(&stop[1]);
                move || serve_tcp(&tcp, &stop)
            }),
            std::thread::spawn({
                let stop = Arc::clone(&stop[1]);
                move || serve_udp(&udp, &stop)
            }),
        ];
        let mut bystander = Self {
            stop,
            rounds,
            client: Some(client),
            servers,
        };
        let deadline = Instant::now() + 2 * PATIENCE;
        while bystander.rounds.load(Ordering::Relaxed) == 0 {
            if bystander
                .client
                .as_ref()
                .is_none_or(JoinHandle::is_finished)
            {
                bystander.end()?;
                anyhow::bail!("the bystander ended before its first round");
            }
            ensure!(
                Instant::now() < deadline,
                "the bystander has no first round"
            );
            std::thread::sleep(PAUSE);
        }
        Ok(bystander)
    }

    /// Ends the traffic.
    ///
    /// # Errors
    /// Any of it failed.
    pub fn finish(mut self) -> Result<()> {
        self.end()
    }

    /// Ends the traffic; ending it again does nothing.
    ///
    /// # Errors
    /// As [`Bystander::finish`].
    pub fn end(&mut self) -> Result<()> {
        self.stop[0].store(true, Ordering::Relaxed);
        let result = match self.client.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(anyhow::anyhow!("the bystander's thread panicked")),
            None => Ok(()),
        };
        self.stop[1].store(true, Ordering::Relaxed);
        for server in self.servers.drain(..) {
            let _ = server.join();
        }
        result
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("{error:#}");
        }
    }
}

fn round_trip(stream: &mut TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"echo").context("the bystander's write")?;
    let mut answer = [0; 4];
    stream
        .read_exact(&mut answer)
        .context("the bystander got no answer")
}

fn serve_tcp(listener: &TcpListener, stop: &AtomicBool) {
    // Polled, so that the end needs no packet.
    if listener.set_nonblocking(true).is_err() {
        return;
    }
    let mut streams: Vec<TcpStream> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        while let Ok((stream, _)) = listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                streams.push(stream);
            }
        }
        streams.retain_mut(|stream| {
            let mut buffer = [0; 16];
            match stream.read(&mut buffer) {
                Ok(0) => false,
                Ok(length) => stream.write_all(&buffer[..length]).is_ok(),
                Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
            }
        });
        std::thread::sleep(PAUSE / 4);
    }
}

fn serve_udp(socket: &UdpSocket, stop: &AtomicBool) {
    let _ = socket.set_read_timeout(Some(Duration::from_millis(50)));
    let mut buffer = [0; 16];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}
