//! The agent as a process.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use whydrop::event::Line;

use crate::free_port::free_port;
use crate::lab::{Lab, enter};
use crate::objects;
use crate::patience::within;
use crate::scrape;
pub use crate::scrape::Sample;

/// Until the agent must be ready: it reads the kernel's BTF and has its programs verified, on a
/// machine where other tests do the same.
const START: Duration = Duration::from_secs(60);
/// Within which it must end on SIGTERM. The kernel detaches its programs, and waits for every task that was
/// running meanwhile.
const STOP: Duration = Duration::from_secs(2);
/// How often something is asked again until its deadline.
pub const POLL: Duration = Duration::from_millis(20);

/// A line of the stream of events, as it came.
#[derive(Clone, Debug)]
pub struct Received {
    /// When.
    pub at: Instant,
    /// As a program of this repository reads it.
    pub line: Line,
    /// As any other reads it.
    pub json: Value,
}

/// A running agent. Dropping it kills it.
pub struct Agent {
    child: Child,
    listen: SocketAddr,
    /// The network namespace that it runs in, if that is not the test's.
    netns: Option<String>,
    socket: PathBuf,
    received: Arc<Mutex<Vec<Received>>>,
    /// Objects, socket and log; removed with the agent.
    directory: tempfile::TempDir,
}

impl Agent {
    /// Starts an agent that knows the lab's objects, waits until it is ready, and follows its
    /// events.
    ///
    /// # Errors
    /// The binary is missing, or it does not get ready; shows its log.
    pub fn start(lab: &Lab) -> Result<Self> {
        Self::start_with(&lab.node(), &objects::list(lab), &[])
    }

    /// As [`Agent::start`], with a node name, objects and further arguments.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_with(node: &str, objects: &Value, arguments: &[&str]) -> Result<Self> {
        Self::start_by(&[], node, objects, arguments)
    }

    /// As [`Agent::start_with`], through a command that changes what the process may do and then
    /// becomes the agent, as `setpriv` does.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_by(
        wrapper: &[&str],
        node: &str,
        objects: &Value,
        arguments: &[&str],
    ) -> Result<Self> {
        let agent = Self::spawn(directory(objects)?, wrapper, node, arguments)?;
        agent.follow()?;
        Ok(agent)
    }

    /// As [`Agent::start_with`], inside a network namespace, as the agent of a node is in the node's:
    /// then conntrack can tell it where its pods' connections go.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_in(netns: &str, node: &str, objects: &Value, arguments: &[&str]) -> Result<Self> {
        let path = format!("--net=/run/netns/{netns}");
        let wrapper = ["nsenter", &path];
        let agent = Self::spawn_in(Some(netns), directory(objects)?, &wrapper, node, arguments)?;
        agent.follow()?;
        Ok(agent)
    }

    /// Starts an agent inside a network namespace that learns its objects from the cluster of a
    /// kubeconfig; ready does not mean that it knows them.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_in_cluster(
        netns: &str,
        node: &str,
        kubeconfig: &Path,
        arguments: &[&str],
    ) -> Result<Self> {
        let empty = tempfile::tempdir().context("make a temporary directory")?;
        let path = format!("--net=/run/netns/{netns}");
        let kubeconfig = format!("KUBECONFIG={}", kubeconfig.display());
        let wrapper = ["nsenter", &path, "env", &kubeconfig];
        let agent = Self::spawn_in(Some(netns), empty, &wrapper, node, arguments)?;
        agent.follow()?;
        Ok(agent)
    }

    /// As [`Agent::start_in_cluster`], in this network namespace; nobody follows its events.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_with_cluster(node: &str, kubeconfig: &Path, arguments: &[&str]) -> Result<Self> {
        let empty = tempfile::tempdir().context("make a temporary directory")?;
        let kubeconfig = format!("KUBECONFIG={}", kubeconfig.display());
        Self::spawn(empty, &["env", &kubeconfig], node, arguments)
    }

    /// As [`Agent::start_with`], but nobody follows its events: for what is measured.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_unfollowed(node: &str, objects: &Value, arguments: &[&str]) -> Result<Self> {
        Self::spawn(directory(objects)?, &[], node, arguments)
    }

    /// Starts an agent where this one was: the same objects and the same socket.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_again(mut self, node: &str) -> Result<Self> {
        let empty = tempfile::tempdir().context("make a temporary directory")?;
        let directory = std::mem::replace(&mut self.directory, empty);
        drop(self);
        let agent = Self::spawn(directory, &[], node, &[])?;
        agent.follow()?;
        Ok(agent)
    }

    fn spawn(
        directory: tempfile::TempDir,
        wrapper: &[&str],
        node: &str,
        arguments: &[&str],
    ) -> Result<Self> {
        Self::spawn_in(None, directory, wrapper, node, arguments)
    }

    fn spawn_in(
        netns: Option<&str>,
        directory: tempfile::TempDir,
        wrapper: &[&str],
        node: &str,
        arguments: &[&str],
    ) -> Result<Self> {
        let path = |name: &str| directory.path().join(name);
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let log = File::create(path("log")).context("create the agent's log")?;
        let binary = binary()?;
        let mut command = match wrapper.split_first() {
            None => Command::new(&binary),
            Some((program, rest)) => {
                let mut command = Command::new(program);
                command.args(rest).arg(&binary);
                command
            }
        };
        command.args(["agent", "--node-name", node]);
        match path("objects.yaml").exists() {
            true => command
                .args(["--cluster", "none", "--objects"])
                .arg(path("objects.yaml")),
            false => command.args(["--cluster", "kube"]),
        };
        let child = command
            .args(["--listen", &listen.to_string()])
            .arg("--socket")
            .arg(path("agent.sock"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start the agent")?;
        let mut agent = Self {
            child,
            listen,
            netns: netns.map(str::to_owned),
            socket: path("agent.sock"),
            received: Arc::default(),
            directory,
        };
        agent
            .wait_ready()
            .with_context(|| format!("the agent's log:\n{}", agent.log()))?;
        Ok(agent)
    }

    /// Kills the agent, which cannot clean up, and waits for its end.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("kill the agent")?;
        self.child.wait().context("wait for the agent").map(drop)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            if let Some(status) = self.child.try_wait().context("wait for the agent")? {
                bail!("the agent ended at once: {status}");
            }
            let answer = self.get("/readyz");
            if matches!(&answer, Ok((200, _))) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the agent is not ready after {START:?}; /readyz says {answer:?}"
            );
            std::thread::sleep(POLL);
        }
    }

    /// A new reader of the stream of events, at its first line. It reads when its owner does.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn reader(&self) -> Result<BufReader<UnixStream>> {
        let mut stream = UnixStream::connect(&self.socket)
            .with_context(|| format!("connect to {}", self.socket.display()))?;
        // HTTP/1.0: the body is the rest of the stream, not chunks.
        stream.write_all(b"GET /v1/drops?follow=true HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut reader = BufReader::new(stream);
        let mut status = String::new();
        reader
            .read_line(&mut status)
            .context("read the answer of /v1/drops")?;
        ensure!(status.contains(" 200 "), "/v1/drops answers {status:?}");
        let mut header = String::new();
        while reader.read_line(&mut header)? > 2 {
            header.clear();
        }
        Ok(reader)
    }

    /// Reads the stream of events on a thread that ends with the agent.
    fn follow(&self) -> Result<()> {
        let reader = self.reader()?;
        let received = Arc::clone(&self.received);
        std::thread::spawn(move || {
            for text in reader.lines() {
                let Ok(text) = text else { return };
                let at = Instant::now();
                match read(&text) {
                    Ok((line, json)) => received
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(Received { at, line, json }),
                    Err(error) => eprintln!("a line that is no event ({error}): {text}"),
                }
            }
        });
        Ok(())
    }

    /// What came by the stream after the first so many lines.
    pub fn received(&self, after: usize) -> Vec<Received> {
        let received = self.received.lock();
        let received = received.unwrap_or_else(PoisonError::into_inner);
        received.get(after..).unwrap_or_default().to_vec()
    }

    /// The lines of the stream so far.
    pub fn lines(&self) -> Vec<Line> {
        let received = self.received.lock();
        let received = received.unwrap_or_else(PoisonError::into_inner);
        received
            .iter()
            .map(|received| received.line.clone())
            .collect()
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where `/metrics` is.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// The local API's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The file that `--objects` names, for tests that change it.
    pub fn objects(&self) -> PathBuf {
        self.directory.path().join("objects.yaml")
    }

    /// What the agent logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// GET of a path: status and body.
    ///
    /// # Errors
    /// Nobody answers, or not in HTTP.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        let stream = self
            .connect()
            .with_context(|| format!("connect to the agent at {}", self.listen))?;
        scrape::get(stream, path)
    }

    /// A connection from the agent's own namespace.
    fn connect(&self) -> Result<TcpStream> {
        let connect = || TcpStream::connect_timeout(&self.listen, START);
        let Some(netns) = &self.netns else {
            return Ok(connect()?);
        };
        std::thread::scope(|scope| {
            let entered = scope.spawn(|| {
                enter(netns)?;
                Ok(connect()?)
            });
            entered
                .join()
                .unwrap_or_else(|_| bail!("the thread in {netns} panicked"))
        })
    }

    /// All of `/metrics`.
    ///
    /// # Errors
    /// The agent does not answer, or with what is no OpenMetrics text.
    pub fn metrics(&self) -> Result<Vec<Sample>> {
        let (status, body) = self.get("/metrics")?;
        ensure!(status == 200, "/metrics answers {status}: {body}");
        scrape::samples(&body)
    }

    /// Asks the agent to end and waits for it.
    ///
    /// # Errors
    /// It is still there after [`STOP`].
    pub fn stop(self) -> Result<ExitStatus> {
        self.stop_by(Signal::SIGTERM)
    }

    /// Sends the agent a signal and waits for its end.
    ///
    /// # Errors
    /// It is still there after [`STOP`].
    pub fn stop_by(self, signal: Signal) -> Result<ExitStatus> {
        self.stop_by_and(signal, || Ok(()))
    }

    /// As [`Agent::stop_by`], and looks at what it left before its directory is removed.
    ///
    /// # Errors
    /// It is still there after [`STOP`], or `look` fails.
    pub fn stop_by_and(
        mut self,
        signal: Signal,
        look: impl FnOnce() -> Result<()>,
    ) -> Result<ExitStatus> {
        kill(Pid::from_raw(self.child.id().try_into()?), signal)
            .with_context(|| format!("send {signal} to the agent"))?;
        let stop = within(STOP);
        let deadline = Instant::now() + stop;
        loop {
            if let Some(status) = self.child.try_wait()? {
                look()?;
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "the agent still runs {stop:?} after {signal}; its log:\n{}",
                self.log()
            );
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the agent's log:\n{}", self.log());
        }
    }
}

/// A temporary directory with the objects in a file.
fn directory(objects: &Value) -> Result<tempfile::TempDir> {
    let directory = tempfile::Builder::new()
        .prefix("whydrop-lab-")
        .tempdir()
        .context("make a temporary directory")?;
    let text = serde_json::to_string_pretty(objects)?;
    fs::write(directory.path().join("objects.yaml"), text).context("write the objects")?;
    Ok(directory)
}

/// The `whydrop` binary: `$WHYDROP_BIN`, else the one that cargo built beside this test.
///
/// # Errors
/// There is none; says how to build it.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("WHYDROP_BIN") {
        return Ok(path.into());
    }
    let here = std::env::current_exe().context("find this program's own path")?;
    here.ancestors()
        .skip(1)
        // target/debug/deps for tests, target/debug for binaries.
        .take(2)
        .map(|directory| directory.join("whydrop"))
        .find(|path| path.is_file())
        .context(
            "the whydrop binary is not built: run `cargo build -p whydrop` with the same profile, \
             or set WHYDROP_BIN",
        )
}

fn read(text: &str) -> serde_json::Result<(Line, Value)> {
    Ok((serde_json::from_str(text)?, serde_json::from_str(text)?))
}
