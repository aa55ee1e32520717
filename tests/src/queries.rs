//! DNS queries of each sort: their ids say which of the lab's rules loses them, and where.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::dns_client::{Client, Heard};
use crate::dns_server::{A, AAAA};
use crate::kernel;
use crate::lab::{Host, Lab};
use crate::patience;
use crate::unanswered::Unanswered;

/// The port of DNS.
pub const DNS: u16 = 53;
/// Queries of each sort.
pub const EACH: u16 = 4;
/// Until an answer that comes must be there.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The timeout of agents beside servers that answer: where the machine stands still now and then long enough
/// that their answers are in time.
pub fn timeout() -> Duration {
    match patience::is_strict() {
        true => Duration::from_millis(800),
        false => Duration::from_secs(3),
    }
}

/// The same as an argument.
pub fn timeout_argument() -> &'static str {
    match patience::is_strict() {
        true => "800ms",
        false => "3s",
    }
}

/// Ids of queries, by what becomes of them: a thousand from each of these.
pub mod id {
    /// Nothing: only the name decides.
    pub const FREE: u16 = 0;
    /// The query is dropped by the router.
    pub const FORWARD: u16 = 1000;
    /// The query is dropped by the server.
    pub const INPUT: u16 = 2000;
    /// The query is dropped by the client behind OUTPUT, which its call does not tell.
    pub const EGRESS: u16 = 3000;
    /// The answer is dropped by the router.
    pub const BACK_FORWARD: u16 = 4000;
    /// The answer is dropped by the client.
    pub const BACK_INPUT: u16 = 5000;
    /// The query is dropped by the client at OUTPUT, which its call tells.
    pub const OUTPUT: u16 = 6000;
    /// The router answers with an ICMP error.
    pub const REJECT: u16 = 7000;
}

/// nft's words for the ids of a thousand: they lie behind the eight bytes of the UDP header.
fn ids(first: u16) -> String {
    format!("@th,64,16 {first}-{}", first + 999)
}

/// nft at the client, the router and the server, for a server at this port.
///
/// # Errors
/// nft is missing or fails.
pub fn rules(lab: &Lab, port: u16) -> Result<()> {
    let chain = |hook: &str, rules: &[(&str, u16, &str)]| {
        let rules: String = rules
            .iter()
            .map(|(end, first, verdict)| format!("udp {end} {port} {} {verdict}\n", ids(*first)))
            .collect();
        format!("chain {hook} {{ type filter hook {hook} priority 0;\n{rules}}}\n")
    };
    let client = chain("output", &[("dport", id::OUTPUT, "drop")])
        + &chain("input", &[("sport", id::BACK_INPUT, "drop")]);
    lab.nft(Host::Client, &format!("table inet lab {{ {client} }}"))?;
    if kernel::has_nft_egress()? {
        lab.nft(
            Host::Client,
            &format!(
                "table netdev lab {{ chain c {{ type filter hook egress device eth0 priority 0;
                   udp dport {port} {} drop
                 }}
                 }}",
                ids(id::EGRESS)
            ),
        )?;
    }
    let router = chain(
        "forward",
        &[
            ("dport", id::FORWARD, "drop"),
            ("sport", id::BACK_FORWARD, "drop"),
            ("dport", id::REJECT, "reject"),
        ],
    );
    lab.nft(Host::Router, &format!("table inet lab {{ {router} }}"))?;
    let server = chain("input", &[("dport", id::INPUT, "drop")]);
    lab.nft(Host::Server, &format!("table inet lab {{ {server} }}"))?;
    lab.unlimited_icmp(Host::Router)
}

/// A query that was sent.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The client's end.
    pub from: SocketAddr,
    /// Its id.
    pub id: u16,
    /// What it asks for, without the final dot.
    pub name: String,
    /// When it was sent.
    pub since: Instant,
}

impl Asked {
    /// It must be called unanswered at a port of the server.
    pub fn unanswered(&self, port: u16) -> Unanswered {
        Unanswered::query(self.from, self.id, &self.name, port)
    }
}

/// The client's sockets: one connected to a server, one that sends to anyone.
pub struct Sockets {
    /// The server.
    pub to: SocketAddr,
    /// The connected one, and the other.
    pub sockets: [Client; 2],
}

impl Sockets {
    /// Opens them at the client.
    ///
    /// # Errors
    /// The address is not the client's.
    pub fn open(lab: &Lab, from: SocketAddr, to: SocketAddr) -> Result<Self> {
        lab.within(Host::Client, || {
            let sockets = [Client::connected(from, to)?, Client::unconnected(from)?];
            Ok(Self { to, sockets })
        })
    }

    /// Asks for [`EACH`] names that begin so, with ids from `first`, for A and AAAA in turn on either
    /// socket.
    ///
    /// # Errors
    /// The kernel refuses to send one.
    pub fn ask(&self, first: u16, habit: &str) -> Result<Vec<Asked>> {
        let mut asked = Vec::new();
        for id in first..first + EACH {
            let [connected, unconnected] = &self.sockets;
            let (client, to) = if id % 4 < 2 {
                (connected, None)
            } else {
                (unconnected, Some(self.to))
            };
            let name = format!("{habit}-{id}.lab.test");
            let since = Instant::now();
            client
                .ask(to, id, &name, if id % 2 == 0 { A } else { AAAA })
                .with_context(|| format!("ask for {name}"))?;
            asked.push(Asked {
                from: client.from,
                id,
                name,
                since,
            });
        }
        Ok(asked)
    }

    /// Waits for so many answers and errors on both sockets together.
    ///
    /// # Errors
    /// Something came that is no DNS message.
    pub fn hear(&self, most: usize) -> Result<Vec<Heard>> {
        let deadline = Instant::now() + PATIENCE;
        let mut heard = Vec::new();
        while heard.len() < most && Instant::now() < deadline {
            for socket in &self.sockets {
                heard.extend(socket.hear(most, Instant::now())?);
            }
        }
        Ok(heard)
    }
}

/// Checks that each of these queries got one answer with this code.
///
/// # Errors
/// Says which did not.
pub fn all_answered(heard: &[Heard], asked: &[Asked], rcode: u8) -> Result<()> {
    for one in asked {
        let answers = heard.iter().filter(|heard| {
            matches!(heard, Heard::Answer { id, rcode: found, .. }
                if (*id, *found) == (one.id, rcode))
        });
        ensure!(answers.count() == 1, "{}: of {heard:?}", one.name);
    }
    Ok(())
}
