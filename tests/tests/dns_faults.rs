//! What is no DNS, no answer, or no query that a resolver would send: nothing else suffers from it.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use whydrop_tests::agent::POLL;
use whydrop_tests::dns_client::{Client, TcpClient};
use whydrop_tests::dns_server::{A, NOERROR, Server, framed};
use whydrop_tests::lab::{Family, Host, Place};
use whydrop_tests::on_both_families;
use whydrop_tests::packet::dns_query;
use whydrop_tests::queries::{DNS, PATIENCE, Sockets, all_answered, timeout, timeout_argument};
use whydrop_tests::scene::Scene;
use whydrop_tests::tallies::{self, Dns};
use whydrop_tests::unanswered::{self, Unanswered, timeouts};

on_both_families!(
    garbage,
    garbage_by_tcp,
    no_answers,
    odd_queries,
    from_port_53
);

/// A scene with a DNS server at the server.
fn scene(family: Family) -> Result<(Scene, Server)> {
    let scene = Scene::with_arguments(family, &timeouts(timeout_argument()), |_| Ok(()))?;
    let at = scene.lab.socket(Place::Of(Host::Server), family, DNS);
    let server = Server::start(&scene.lab, Host::Server, at)?;
    Ok((scene, server))
}

/// The end of a host, at any port.
fn end(scene: &Scene, host: Host) -> SocketAddr {
    scene.lab.socket(Place::Of(host), scene.family, 0)
}

fn server_end(scene: &Scene) -> SocketAddr {
    scene.lab.socket(Place::Of(Host::Server), scene.family, DNS)
}

/// A header: id, flags, and how many questions it says there are.
fn header(id: u16, flags: u16, questions: u16) -> Vec<u8> {
    let mut bytes = [id, flags, questions].map(u16::to_be_bytes).concat();
    bytes.extend([0; 6]);
    bytes
}

/// A query with any bytes as its question.
fn asking(id: u16, question: &[u8]) -> Vec<u8> {
    [&header(id, 0x0100, 1)[..], question].concat()
}

/// What no resolver sends to port 53.
fn nonsense() -> Vec<Vec<u8>> {
    let good = dns_query(7, "db.lab.test", A);
    let mut all: Vec<Vec<u8>> = (0..good.len())
        .map(|length| good[..length].to_vec())
        .collect();
    // Questions that are none.
    all.extend([
        header(8, 0x0100, 0),
        header(8, 0x0100, 1),
        header(8, 0x0100, 0xffff),
        [&header(8, 0x0100, 0xffff)[..], &[1, b'a'].repeat(200)].concat(),
    ]);
    // An answer that asks; other opcodes.
    let mut answer = good.clone();
    answer[2] |= 0x80;
    all.push(answer);
    for opcode in 1..16_u8 {
        let mut other = good.clone();
        other[2] = opcode << 3;
        all.push(other);
    }
    // Names that point to themselves, to each other, behind their end, into the header.
    for pointer in [
        [0xc0, 12],
        [0xc0, 14],
        [0xc0, 0xff],
        [0xff, 0xff],
        [0xc0, 0],
    ] {
        all.push(asking(9, &[&pointer[..], &[0, 1, 0, 1]].concat()));
        all.push(asking(
            9,
            &[&[1, b'a'][..], &pointer, &[0, 1, 0, 1]].concat(),
        ));
    }
    // Lengths of labels that are reserved, and a name that does not end.
    for length in [0x40, 0x7f, 0x80, 0xbf] {
        all.push(asking(10, &[&[length][..], &[b'a'; 300]].concat()));
    }
    all.push(asking(11, &[&[63][..], &[b'a'; 63]].concat().repeat(8)));
    all.push(asking(11, &[1, b'a'].repeat(128)));
    all.push(asking(11, &[1, b'a'].repeat(600)));
    // As long as a datagram may be: in fragments.
    all.push(vec![0; 60_000]);
    all.push(asking(12, &[0x3f; 30_000]));
    // Bytes without any meaning, the same in each run (a multiplier of Knuth's).
    let mut state = 1_u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    for length in 0..300 {
        all.push((0..length).map(|_| random()).collect());
    }
    all
}

/// Queries of the client beside the nonsense of another: answered, and not.
struct Beside {
    sockets: Sockets,
    wanted: Vec<Unanswered>,
    answered: u64,
}

impl Beside {
    fn new(scene: &Scene) -> Result<Self> {
        let from = end(scene, Host::Client);
        Ok(Self {
            sockets: Sockets::open(&scene.lab, from, server_end(scene))?,
            wanted: Vec::new(),
            answered: 0,
        })
    }

    fn round(&mut self) -> Result<()> {
        let first = 20 * (self.answered as u16);
        let good = self.sockets.ask(first, "good")?;
        all_answered(&self.sockets.hear(good.len())?, &good, NOERROR)?;
        self.answered += good.len() as u64;
        for one in self.sockets.ask(first + 10, "ignore")? {
            let unanswered = one.unanswered(DNS).packets(1..=1);
            self.wanted.push(unanswered.hangs(one.since, timeout()));
        }
        Ok(())
    }

    /// Checks that these were all told right; client2's are not looked at.
    fn finish(self, scene: Scene) -> Result<()> {
        let (lab, agent) = (&scene.lab, scene.agent());
        let other = Host::Client2.name();
        unanswered::expect_beside(lab, agent, other, &self.wanted)?;
        let queries = self.answered + self.wanted.len() as u64;
        let counted = Dns::of(queries, &[("NOERROR", self.answered)]);
        tallies::dns(lab, agent, "client", &counted)?;
        let (status, _) = agent.get("/healthz")?;
        ensure!(status == 200, "/healthz answers {status}");
        scene.finish()
    }
}

/// Nonsense to port 53, from a connected and an unconnected socket, beside what makes sense.
fn garbage(family: Family) -> Result<()> {
    let (scene, _server) = scene(family)?;
    let mut beside = Beside::new(&scene)?;
    let (from, to) = (end(&scene, Host::Client2), server_end(&scene));
    let (connected, unconnected) = scene.lab.within(Host::Client2, || -> Result<_> {
        Ok((Client::connected(from, to)?, Client::unconnected(from)?))
    })?;
    for chunk in nonsense().chunks(60) {
        for bytes in chunk {
            connected.socket().send(bytes).context("send nonsense")?;
            unconnected
                .socket()
                .send_to(bytes, to)
                .context("send nonsense")?;
        }
        beside.round()?;
    }
    beside.finish(scene)
}

/// Nonsense on connections to port 53: lengths that lie, other protocols, bytes one by one.
fn garbage_by_tcp(family: Family) -> Result<()> {
    let (scene, _server) = scene(family)?;
    let mut beside = Beside::new(&scene)?;
    let to = server_end(&scene);
    let connect = || scene.lab.within(Host::Client2, || TcpClient::connect(to));
    let mut streams = Vec::new();
    for bytes in [
        vec![],
        vec![0],
        vec![0, 0],
        vec![0, 0, 0, 0],
        vec![0xff, 0xff, 1],
        b"GET / HTTP/1.1\r\nHost: lab.test\r\n\r\n".to_vec(),
        vec![0xff; 4_000],
        framed(&[]),
        framed(&header(1, 0x0100, 0)),
        // Shorter and longer than what it says.
        [&[0, 5][..], &dns_query(2, "a.lab.test", A)].concat(),
        [&[1, 0][..], &dns_query(2, "a.lab.test", A)].concat(),
    ] {
        let mut stream = connect()?;
        stream.send(&bytes)?;
        streams.push(stream);
    }
    for bytes in nonsense().iter().filter(|bytes| bytes.len() < 1_000) {
        streams[0].send(&framed(bytes))?;
    }
    beside.round()?;
    // A query in pieces is one all the same, for its server.
    let mut slow = connect()?;
    for byte in framed(&dns_query(3, "slow.lab.test", A)) {
        slow.send(&[byte])?;
    }
    let heard = slow.hear(1, Instant::now() + PATIENCE)?;
    ensure!(heard.len() == 1, "{heard:?}");
    beside.round()?;
    drop(streams);
    beside.finish(scene)
}

/// Serves by a function until it is dropped, from a port of its own and from another.
struct Impostor<'a> {
    stop: &'a AtomicBool,
}

impl Drop for Impostor<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What looks like an answer and is none: another id, from another port, the query itself.
fn no_answers(family: Family) -> Result<()> {
    let scene = Scene::with_arguments(family, &timeouts(timeout_argument()), |_| Ok(()))?;
    let (lab, agent) = (&scene.lab, scene.agent());
    let to = server_end(&scene);
    let (real, other) = lab.within(Host::Server, || -> Result<_> {
        let real = UdpSocket::bind(to)?;
        real.set_read_timeout(Some(POLL))?;
        Ok((real, UdpSocket::bind((to.ip(), DNS + 1))?))
    })?;
    let from = end(&scene, Host::Client);
    let client = lab.within(Host::Client, || Client::unconnected(from))?;
    let stop = AtomicBool::new(false);
    let wanted = std::thread::scope(|scope| -> Result<Vec<Unanswered>> {
        let _impostor = Impostor { stop: &stop };
        scope.spawn(|| {
            let mut buffer = [0; 512];
            while !stop.load(Ordering::Relaxed) {
                let Ok((length, client)) = real.recv_from(&mut buffer) else {
                    continue;
                };
                let query = buffer[..length].to_vec();
                let mut answer = query.clone();
                answer[2] |= 0x80;
                let socket = match query[1] {
                    0 => {
                        answer[0] ^= 0xff;
                        &real
                    }
                    1 => &other,
                    2 => {
                        answer = query;
                        &real
                    }
                    // Cut behind the id, and in the middle of the flags.
                    3 => {
                        answer.truncate(2);
                        &real
                    }
                    _ => {
                        answer.truncate(3);
                        &real
                    }
                };
                let _ = socket.send_to(&answer, client);
            }
        });
        let mut wanted = Vec::new();
        for id in 256..261 {
            let since = Instant::now();
            client.ask(Some(to), id, "who.lab.test", A)?;
            let one = Unanswered::query(client.from, id, "who.lab.test", DNS);
            wanted.push(one.packets(1..=1).hangs(since, timeout()));
        }
        let heard = client.socket();
        heard.set_read_timeout(Some(PATIENCE))?;
        for _ in &wanted {
            heard
                .recv(&mut [0; 512])
                .context("the impostor is silent")?;
        }
        unanswered::wait(lab, agent, &wanted)?;
        Ok(wanted)
    })?;
    unanswered::expect(lab, agent, &wanted)?;
    tallies::dns(lab, agent, "client", &Dns::of(wanted.len() as u64, &[]))?;
    scene.finish()
}

/// Queries that are rare and right: each is shown with its name as zone files write it.
fn odd_queries(family: Family) -> Result<()> {
    let (scene, _server) = scene(family)?;
    let (lab, agent) = (&scene.lab, scene.agent());
    let from = end(&scene, Host::Client);
    let to = server_end(&scene);
    let client = lab.within(Host::Client, || Client::connected(from, to))?;
    let label = |byte: u8, length: usize| String::from_utf8_lossy(&vec![byte; length]).into_owned();
    // 255 bytes with all lengths, which is the longest.
    let longest = format!(
        "ignore-{}.{}.{}.{}",
        label(b'a', 56),
        label(b'b', 63),
        label(b'c', 63),
        label(b'd', 61)
    );
    let deepest = "ignore.".to_owned() + &vec!["x"; 120].join(".");
    let mut wanted = Vec::new();
    for (id, name, kind) in [
        (1, longest.as_str(), A),
        (2, deepest.as_str(), A),
        (3, "IGNORE.Lab.Test", 33),
        (4, "ignore._tcp.lab.test", 65_280),
        (5, "ignore", 255),
    ] {
        let since = Instant::now();
        client.ask(None, id, name, kind)?;
        wanted.push(Unanswered::query(client.from, id, name, DNS).hangs(since, timeout()));
    }
    // Bytes that a terminal would obey, in a name that the server does not know.
    let mut bytes = dns_query(6, "ignore.x[31m.lab.test", A);
    let at = bytes
        .iter()
        .position(|byte| *byte == b'[')
        .context("no bracket")?
        - 1;
    bytes[at] = 0x1b;
    let since = Instant::now();
    client.socket().send(&bytes)?;
    let shown = "ignore.\\027[31m.lab.test";
    wanted.push(Unanswered::query(client.from, 6, shown, DNS).hangs(since, timeout()));
    // An additional record (EDNS) behind the question.
    let mut bytes = dns_query(7, "ignore.lab.test", A);
    bytes[11] = 1;
    bytes.extend([0, 0, 41, 0x04, 0xd0, 0, 0, 0, 0, 0, 0]);
    let since = Instant::now();
    client.socket().send(&bytes)?;
    wanted.push(Unanswered::query(client.from, 7, "ignore.lab.test", DNS).hangs(since, timeout()));
    unanswered::expect(lab, agent, &wanted)?;
    tallies::dns(lab, agent, "client", &Dns::of(wanted.len() as u64, &[]))?;
    scene.finish()
}

/// A client at port 53 itself, as old servers ask others.
fn from_port_53(family: Family) -> Result<()> {
    let (scene, _server) = scene(family)?;
    let (lab, agent) = (&scene.lab, scene.agent());
    let from = SocketAddr::new(end(&scene, Host::Client).ip(), DNS);
    let to = server_end(&scene);
    let client = lab.within(Host::Client, || Client::unconnected(from))?;
    client.ask(Some(to), 1, "good.lab.test", A)?;
    let heard = client.hear(1, Instant::now() + PATIENCE)?;
    ensure!(heard.len() == 1, "{heard:?}");
    let since = Instant::now();
    client.ask(Some(to), 2, "ignore.lab.test", A)?;
    let one = Unanswered::query(from, 2, "ignore.lab.test", DNS);
    unanswered::expect(lab, agent, &[one.packets(1..=1).hangs(since, timeout())])?;
    tallies::dns(lab, agent, "client", &Dns::of(2, &[("NOERROR", 1)]))?;
    scene.finish()
}
