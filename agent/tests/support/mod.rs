//! What several tests of servers and readers use.
#![allow(
    dead_code,
    missing_docs,
    reason = "each test is a program of its own and uses a part"
)]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use tokio::sync::watch;
use whydrop::event::{Event, Line};
use whydrop::output::http;
use whydrop::output::socket::LocalSocket;
use whydrop::record::{Detail, Record};
use whydrop::senders::Senders;
use whydrop::state::State;

pub mod api;
pub mod cluster;
pub mod command;
pub mod follower;

/// Nothing here takes this long, on any machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// An agent without a kernel: its servers, and a state to publish to.
pub struct Agent {
    pub state: Arc<State>,
    pub dir: tempfile::TempDir,
    pub metrics: SocketAddr,
    pub stop: watch::Sender<bool>,
    pub servers: Option<std::thread::JoinHandle<()>>,
}

impl Agent {
    pub fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    pub fn start_in(dir: tempfile::TempDir) -> Self {
        Self::start_as("node-a", dir)
    }

    pub fn start_as(node: &str, dir: tempfile::TempDir) -> Self {
        Self::start_with(node, dir, |_| {})
    }

    /// With something that is done before anybody can ask it.
    pub fn start_with(node: &str, dir: tempfile::TempDir, prepare: impl FnOnce(&State)) -> Self {
        let record = Record::new(Detail::Pod, 100, DEADLINE);
        let senders = Senders::new(Detail::Pod, 100, Duration::from_secs(60));
        let state = Arc::new(State::new(node.into(), record, senders));
        prepare(&state);
        let (stop, stopped) = watch::channel(false);
        let (ready, started) = std::sync::mpsc::channel();
        let path = dir.path().join("agent.sock");
        let served = Arc::clone(&state);
        let servers = std::thread::spawn(move || {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_all().build().unwrap().block_on(async {
                let tcp = http::listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
                let socket = LocalSocket::bind(&path).unwrap();
                ready.send(tcp.local_addr().unwrap()).unwrap();
                tokio::join!(
                    http::serve_metrics(tcp, Arc::clone(&served), stopped.clone()),
                    http::serve_local(socket, served, stopped),
                );
            });
        });
        Self {
            state,
            dir,
            metrics: started.recv_timeout(DEADLINE).unwrap(),
            stop,
            servers: Some(servers),
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    /// Publishes events of so many packets each.
    pub fn publish(&self, packets: impl IntoIterator<Item = u64>) {
        for packets in packets {
            let event = Event { packets, ..event() };
            self.state.stream.publish(Arc::new(Line::Event(event)));
        }
    }

    pub fn tail(&self, flags: &str) -> Tail {
        let socket = self.socket();
        let mut command = Command::new(env!("CARGO_BIN_EXE_whydrop"));
        command
            .args(["tail", "-o", "json", "--socket"])
            .arg(socket)
            .args(flags.split_whitespace());
        Tail::start(command)
    }

    pub fn wait_for_readers(&self, readers: usize) {
        until(&format!("{readers} readers"), || {
            self.state.stream.readers() == readers
        });
    }

    /// Sends one request over the socket; the answer's body can be read, or left.
    pub fn ask(&self, target: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        write!(stream, "GET {target} HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        stream
    }

    /// Status and body of an answer that ends.
    pub fn get(&self, target: &str) -> (u16, String) {
        let (head, body) = answer(self.ask(target));
        (status(&head), body)
    }

    pub fn scrape(&self, path: &str) -> (String, String) {
        let mut stream = std::net::TcpStream::connect(self.metrics).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        answer(stream)
    }

    /// Ends the servers, as SIGTERM does, and says how long that took.
    pub fn end(&mut self) -> Duration {
        let begin = Instant::now();
        self.stop.send_replace(true);
        if let Some(servers) = self.servers.take() {
            servers.join().unwrap();
        }
        begin.elapsed()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.end();
        }
    }
}

/// A running `whydrop tail`; killed at the end.
pub struct Tail {
    pub child: Child,
    pub lines: BufReader<std::process::ChildStdout>,
}

impl Tail {
    pub fn start(mut command: Command) -> Self {
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("WHYDROP_")) {
            command.env_remove(name);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The next line. whydrop writes whole ones, so what has begun ends at once.
    pub fn line(&mut self) -> Line {
        if self.lines.buffer().is_empty() {
            let mut readable = [PollFd::new(self.lines.get_ref().as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut readable, DEADLINE.as_millis() as u16).unwrap();
            assert_eq!(ready, 1, "waited for a line");
        }
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"))
    }

    /// Packets of the next events, one by one.
    pub fn packets(&mut self, lines: usize) -> Vec<u64> {
        (0..lines)
            .map(|_| match self.line() {
                Line::Event(event) => event.packets,
                Line::Lost(lost) => panic!("{lost:?}"),
            })
            .collect()
    }

    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        until("tail to end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// The first line on stderr, and what comes behind it until it is killed, now.
    pub fn first_sentence(&mut self) -> (String, String) {
        let mut stderr = BufReader::new(self.child.stderr.take().unwrap());
        let (mut first, mut rest) = (String::new(), String::new());
        stderr.read_line(&mut first).unwrap();
        self.child.kill().unwrap();
        stderr.read_to_string(&mut rest).unwrap();
        (first, rest)
    }

    pub fn stderr(&mut self) -> String {
        let mut text = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        stderr.read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn event() -> Event {
    serde_json::from_str(include_str!("../fixtures/event.json")).unwrap()
}

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < DEADLINE, "waited for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn answer(mut stream: impl std::io::Read) -> (String, String) {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.to_lowercase(), body.to_owned())
}

pub fn status(head: &str) -> u16 {
    head.split_whitespace().nth(1).unwrap().parse().unwrap()
}
