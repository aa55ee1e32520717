//! What goes wrong around the agent: it is killed, refused, or lacks a right; its readers go away.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use whydrop::event::{Event, Line};
use whydrop_tests::agent::{self, Agent, POLL};
use whydrop_tests::expect::{self, Row};
use whydrop_tests::kernel::Held;
use whydrop_tests::lab::{self, Family, Host, Lab, Place, TC_SHOT, mac_bytes};
use whydrop_tests::{objects, packet, traffic};

/// Until a process that has nothing to wait for must have ended, on a machine with other work.
const END: Duration = Duration::from_secs(60);

/// Waits for a process, which is killed if it does not end: exit code and what it wrote to stderr.
fn ended(mut child: Child) -> Result<(Option<i32>, String)> {
    let deadline = Instant::now() + END;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
        }
        std::thread::sleep(POLL);
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((output.status.code(), said))
}

/// Runs a command line that must fail, and checks that it says so in one line, which it returns.
fn refused(words: &[&str]) -> Result<String> {
    let (program, arguments) = words.split_first().context("an empty command")?;
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let (code, said) = ended(child)?;
    ensure!(code == Some(1), "it ended with {code:?}: {said}");
    ensure!(
        said.lines().count() == 1 && said.starts_with("whydrop: "),
        "it must say one sentence, not: {said}"
    );
    Ok(said)
}

/// The agent on places of its own, as words of a command line.
fn agent_at<'a>(binary: &'a str, socket: &'a str) -> Vec<&'a str> {
    let places = ["--listen", "127.0.0.1:0", "--socket", socket];
    [&[binary, "agent", "--cluster", "none"][..], &places].concat()
}

fn contains(said: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(said.contains(word), "it does not say {word:?}: {said}");
    }
    Ok(())
}

/// A killed agent cleans nothing up, and still nothing of it is left in the kernel. The next one
/// starts on its socket.
#[test]
fn killed_leaves_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let mut agent = Agent::start(&lab)?;
    expect::barrier(&lab, &agent)?;
    let held = Held::by(agent.pid())?;
    agent.kill()?;
    ensure!(agent.socket().exists(), "who removed the socket?");
    held.wait_gone()?;
    let next = agent.start_again(&lab.node())?;
    expect::barrier(&lab, &next)?;
    ensure!(next.stop()?.success());
    Ok(())
}

/// SIGTERM and SIGINT under a flood: in time, and nothing is left in kernel and file system.
#[test]
fn signals_under_a_flood_leave_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let to = lab.socket(Place::Marker, Family::V4, 9);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let agent = Agent::start(&lab)?;
        let held = Held::by(agent.pid())?;
        let socket = agent.socket().to_owned();
        let lock = socket.with_extension("sock.lock");
        ensure!(socket.exists() && lock.exists());
        let status = std::thread::scope(|scope| {
            scope.spawn(|| {
                lab.within(Host::Client2, || {
                    traffic::udp_burst(to, 300_000, 50, b"marker")
                })
            });
            expect::barrier(&lab, &agent)?;
            agent.stop_by_and(signal, || {
                ensure!(!socket.exists(), "the socket is left after {signal}");
                ensure!(!lock.exists(), "the socket's lock is left after {signal}");
                Ok(())
            })
        })?;
        ensure!(status.success(), "{signal} ended it with {status}");
        held.wait_gone()?;
    }
    Ok(())
}

/// A second agent on the first one's socket is refused while drops come in, and the first counts
/// each of them; with a socket and port of its own, both do.
#[test]
fn two_agents_count_the_same() -> Result<()> {
    let lab = Lab::new()?;
    drop_for_server(&lab, "")?;
    let first = Agent::start(&lab)?;
    let to = lab.socket(Place::Of(Host::Server), Family::V4, 5000);
    let send = |packets| lab.within(Host::Client, || traffic::udp_burst(to, packets, 1, b"x"));
    send(500)?;
    let (binary, socket) = (agent::binary()?, first.socket().display().to_string());
    let binary = binary.display().to_string();
    contains(
        &refused(&agent_at(&binary, &socket))?,
        &[&socket, "another"],
    )?;
    let row = |packets| [Row::dropped("client", "server", packets).protocol("UDP")];
    expect::expect(&lab, &first, &row(500))?;

    let second = Agent::start(&lab)?;
    send(500)?;
    expect::expect(&lab, &first, &row(1000))?;
    expect::expect(&lab, &second, &row(500))
}

/// A file of somebody's in the socket's place is neither used nor removed, and a port that is in
/// use is named.
#[test]
fn places_of_others() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("agent.sock");
    fs::write(&path, "mine")?;
    let (binary, socket) = (agent::binary()?, path.display().to_string());
    let binary = binary.display().to_string();
    let said = refused(&agent_at(&binary, &socket))?;
    contains(&said, &[&socket, "--socket"])?;
    ensure!(fs::read(&path)? == b"mine");
    fs::remove_file(&path)?;

    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let listen = taken.local_addr()?.to_string();
    let mut words = agent_at(&binary, &socket);
    words[5] = &listen;
    contains(&refused(&words)?, &[&listen, "--listen"])?;
    ensure!(!path.exists(), "a refused agent left its socket");
    Ok(())
}

/// A copy of the binary in a place that everyone may reach.
fn binary_for_all(directory: &Path) -> Result<String> {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o777))?;
    let copy = directory.join("whydrop");
    let copy = copy.display().to_string();
    // By a process of its own: a file that this one writes is open as well in any process that
    // another thread starts meanwhile, and such a file cannot be executed.
    lab::command(
        &["cp", &agent::binary()?.display().to_string(), &copy],
        None,
    )?;
    Ok(copy)
}

/// Without root: what is missing, and what to do.
#[test]
fn without_root() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let binary = binary_for_all(directory.path())?;
    let nobody = [
        "setpriv",
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
    ];
    let socket = directory.path().join("agent.sock").display().to_string();
    for words in [
        agent_at(&binary, &socket),
        agent_at(&binary, "/run/whydrop-no/a.sock"),
    ] {
        contains(&refused(&[&nobody[..], &words].concat())?, &["root"])?;
    }
    ensure!(
        !Path::new(&socket).exists(),
        "a refused agent left its socket"
    );
    let output = Command::new(nobody[0])
        .args(&nobody[1..])
        .args([&binary, "check"])
        .output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    contains(&said, &["CANNOT", "root", "CAP_BPF"])
}

/// Without the kernel's type information.
#[test]
fn without_btf() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let binary = agent::binary()?.display().to_string();
    let script = "mount -t tmpfs none /sys/kernel/btf && exec \"$@\"";
    let hidden = ["unshare", "--mount", "sh", "-c", script, "sh"];
    let socket = directory.path().join("agent.sock").display().to_string();
    let said = refused(&[&hidden[..], &agent_at(&binary, &socket)].concat())?;
    contains(&said, &["/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF"])?;
    ensure!(
        said.matches("No such file").count() == 1,
        "it says things twice: {said}"
    );
    let output = Command::new(hidden[0])
        .args(&hidden[1..])
        .args([&binary, "check"])
        .output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    contains(&said, &["CANNOT", "CONFIG_DEBUG_INFO_BTF"])
}

/// Where the kernel hides its addresses drops are counted as well, without their place.
#[test]
fn without_kernel_symbols() -> Result<()> {
    let lab = Lab::new()?;
    drop_for_server(&lab, "")?;
    let hidden = ["setpriv", "--bounding-set", "-syslog"];
    let shown = Command::new(hidden[0])
        .args(&hidden[1..])
        .args(["grep", "-qv", "^0000000000000000", "/proc/kallsyms"])
        .status()?;
    if shown.success() {
        eprintln!("skipped: this kernel shows its addresses to everyone");
        return Ok(());
    }
    let agent = Agent::start_by(&hidden, &lab.node(), &objects::list(&lab), &[])?;
    let to = lab.socket(Place::Of(Host::Server), Family::V4, 5000);
    lab.within(Host::Client, || traffic::udp_burst(to, 30, 3, b"x"))?;
    expect::expect(
        &lab,
        &agent,
        &[Row::dropped("client", "server", 30).reason(&["NETFILTER_DROP"])],
    )?;
    let located = events(&agent).into_iter().find(|event| {
        event
            .drop
            .as_ref()
            .is_some_and(|drop| drop.location.is_some())
    });
    ensure!(located.is_none(), "{located:?}");
    let up = agent
        .metrics()?
        .into_iter()
        .find(|sample| sample.name == "whydrop_source_up" && sample.label("source") == "locations");
    ensure!(
        up.as_ref().is_some_and(|sample| sample.value == 0.0),
        "{up:?}"
    );
    contains(&agent.log(), &["CAP_SYSLOG"])
}

fn events(agent: &Agent) -> Vec<Event> {
    let event = |line| match line {
        Line::Event(event) => Some(event),
        Line::Lost(_) => None,
    };
    agent.lines().into_iter().filter_map(event).collect()
}

/// The router drops what is for the server; `more` are rules before that.
fn drop_for_server(lab: &Lab, more: &str) -> Result<()> {
    let server = lab.address(Place::Of(Host::Server), Family::V4);
    lab.nft(
        Host::Router,
        &format!(
            "table ip lab {{
               counter hits {{ }}
               chain c {{ type filter hook forward priority 0;
                 {more}
                 ip daddr {server} counter name hits drop
               }}
             }}"
        ),
    )
}

fn tail(agent: &Agent, arguments: &[&str], stdout: Stdio) -> Result<Child> {
    Command::new(agent::binary()?)
        .args(["tail", "--socket"])
        .arg(agent.socket())
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(Stdio::piped())
        .spawn()
        .context("start whydrop tail")
}

/// `tail -f | head -1`: when the reader of its output is gone, tail ends without a word, also
/// while nothing more is dropped.
#[test]
fn closed_pipe() -> Result<()> {
    let lab = Lab::new()?;
    let agent = Agent::start(&lab)?;
    let namespace = lab.namespace();
    let mut child = tail(
        &agent,
        &["-f", "-o", "json", "-n", &namespace],
        Stdio::piped(),
    )?;
    let output = child.stdout.take().context("no pipe")?;
    let line = std::thread::scope(|scope| -> Result<String> {
        let reader = scope.spawn(|| {
            let mut line = String::new();
            BufReader::new(output).read_line(&mut line).map(|_| line)
        });
        // tail says nowhere that it listens, so drops go on until it has shown one.
        let deadline = Instant::now() + END;
        while !reader.is_finished() && Instant::now() < deadline {
            expect::barrier(&lab, &agent)?;
        }
        if !reader.is_finished() {
            child.kill()?;
        }
        Ok(reader.join().expect("no panic")?)
    })?;
    serde_json::from_str::<Event>(&line).with_context(|| format!("no event: {line:?}"))?;
    let (code, said) = ended(child)?;
    ensure!(code == Some(0) && said.is_empty(), "{code:?}: {said}");
    Ok(())
}

/// No space left behind tail's output: one sentence, and failure.
#[test]
fn no_space_for_output() -> Result<()> {
    let lab = Lab::new()?;
    let agent = Agent::start(&lab)?;
    expect::barrier(&lab, &agent)?;
    let full = File::options().write(true).open("/dev/full")?;
    let (code, said) = ended(tail(&agent, &["--last", "1"], full.into())?)?;
    ensure!(code == Some(1), "{code:?}: {said}");
    ensure!(said.lines().count() == 1, "{said}");
    contains(&said, &["No space left"])?;
    // The agent does not notice.
    expect::barrier(&lab, &agent)
}

/// The objects change while drops go on: each drop belongs to who held the address then.
#[test]
fn names_change_under_drops() -> Result<()> {
    let lab = Lab::new()?;
    drop_for_server(&lab, "")?;
    let agent = Agent::start(&lab)?;
    let to = lab.socket(Place::Of(Host::Server), Family::V4, 5000);
    let mut changed = objects::list(&lab);
    for item in changed["items"].as_array_mut().into_iter().flatten() {
        if item["kind"] == "Pod" && item["metadata"]["name"] == "server" {
            item["metadata"]["name"] = "server-2".into();
            item["metadata"]["uid"] = "server-2".into();
        }
    }
    let counted = |pod: &str| -> Result<u64> {
        Ok(agent
            .metrics()?
            .iter()
            .filter(|sample| sample.name == "whydrop_silent_drops_total")
            .filter(|sample| sample.label("source_namespace") == lab.namespace())
            .filter(|sample| sample.label("source_pod") == "client")
            .filter(|sample| sample.label("destination_pod") == pod)
            .map(|sample| sample.value as u64)
            .sum())
    };
    let mut sent = 0;
    let deadline = Instant::now() + END;
    while counted("server-2")? == 0 {
        ensure!(Instant::now() < deadline, "the new name does not appear");
        lab.within(Host::Client, || traffic::udp_burst(to, 5, 1, b"x"))?;
        sent += 5;
        if sent == 50 {
            // A new file in the old one's place, as every careful writer does it.
            let other = agent.objects().with_extension("new");
            fs::write(&other, serde_json::to_string(&changed)?)?;
            fs::rename(&other, agent.objects())?;
        }
        std::thread::sleep(POLL);
    }
    let (old, new) = loop {
        let counts = (counted("server")?, counted("server-2")?);
        if counts.0 + counts.1 == sent {
            break counts;
        }
        ensure!(
            Instant::now() < deadline,
            "{sent} were sent, and {counts:?} counted under both names"
        );
        std::thread::sleep(POLL);
    };
    ensure!(
        old >= 50,
        "{old} under the old name, {new} under the new one"
    );
    // In the stream the names change once, when all of it is there.
    let mut events = loop {
        let mut events = events(&agent);
        events.retain(|event| event.source.pod.as_deref() == Some("client"));
        events.retain(|event| event.source.namespace.as_deref() == Some(&lab.namespace()));
        let shown: u64 = events.iter().map(|event| event.packets).sum();
        if shown == sent {
            break events;
        }
        ensure!(
            Instant::now() < deadline,
            "the stream shows {shown} of {sent}"
        );
        std::thread::sleep(POLL);
    };
    events.sort_by_key(|event| event.time);
    let mut names: Vec<_> = events
        .iter()
        .map(|e| e.destination.pod.as_deref())
        .collect();
    names.dedup();
    ensure!(names == [Some("server"), Some("server-2")], "{names:?}");
    Ok(())
}

/// With `-v` the programs' own messages are in the log; without it they are not.
#[test]
fn messages_of_the_programs() -> Result<()> {
    let lab = Lab::new()?;
    let device = Host::Client.device();
    lab.tc(Host::Router, &device, "ingress", TC_SHOT)?;
    let quiet = Agent::start(&lab)?;
    let verbose = Agent::start_with(&lab.node(), &objects::list(&lab), &["-v"])?;
    // IEEE 802's EtherType for experiments.
    let (from, to) = (
        mac_bytes(Host::Client, false),
        mac_bytes(Host::Client, true),
    );
    let frame = packet::ethernet(from, to, &[], 0x88b5, &[0; 46]);
    let deadline = Instant::now() + END;
    while !verbose.log().contains("no IP header: ethertype 88b5") {
        ensure!(Instant::now() < deadline, "the log:\n{}", verbose.log());
        lab.within(Host::Client, || traffic::raw_frames("eth0", [&frame]))?;
        std::thread::sleep(POLL);
    }
    let log = verbose.log();
    let line = log
        .lines()
        .find(|line| line.contains("88b5"))
        .context("no line")?;
    let line: Value = serde_json::from_str(line).context("a log line that is no JSON")?;
    ensure!(line["level"] == "DEBUG", "{line}");
    expect::barrier(&lab, &quiet)?;
    ensure!(!quiet.log().contains("no IP header"), "{}", quiet.log());
    Ok(())
}
