//! Thousands of connects and DNS queries of both families, a tenth of each unanswered for six
//! reasons: each must be told by its own port and id.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;

use crate::connects::{Connects, Fate, Options};
use crate::dns_client::Client;
use crate::dns_server::{A, AAAA, Server};
use crate::lab::{Family, Host, Lab, Place};
use crate::listeners::{Acceptor, FullListener};
use crate::port;
use crate::queries::{self, DNS, id};
use crate::tallies::{Dns, Results};
use crate::unanswered::Unanswered;

/// Connects.
pub const CONNECTS: usize = 2_000;
/// DNS queries.
pub const QUERIES: usize = 5_000;
/// Of all that many, one is unanswered.
const ONE_IN: usize = 10;
/// Sockets for the queries.
const SOCKETS: usize = 50;
/// Queries that wait for their answers at once on a socket: fewer than its server's buffer holds.
const AT_ONCE: usize = 20;
/// Until an answer that comes must be there.
const PATIENCE: Duration = Duration::from_secs(10);
const REASON: &[&str] = &["NETFILTER_DROP"];

/// The ports at which a connect is unanswered, one for each reason.
const LOST_CONNECTS: [u16; 6] = [
    port::OUTPUT,
    port::FORWARD,
    port::INPUT,
    port::BACK_FORWARD,
    port::FULL,
    port::GONE,
];
/// The ids with which a query is, one thousand for each reason; the last by its name.
const LOST_QUERIES: [u16; 6] = [
    id::FORWARD,
    id::INPUT,
    id::EGRESS,
    id::BACK_FORWARD,
    id::BACK_INPUT,
    id::FREE,
];
/// The first id of queries that are answered, behind those that a rule knows.
const ANSWERED: u16 = 10_000;

/// The traffic, which hangs until this is dropped.
pub struct Traffic {
    /// What must be called unanswered.
    pub unanswered: Vec<Unanswered>,
    /// How the client's connects ended.
    pub results: Results,
    /// What the client's DNS was.
    pub dns: Dns,
    _connects: Connects,
    _clients: Vec<Client>,
    _listeners: Listeners,
}

/// Who answers, and who does not; both families.
struct Listeners {
    _acceptor: Acceptor,
    _full: Vec<FullListener>,
    _dns: Vec<Server>,
}

impl Listeners {
    fn start(lab: &Lab) -> Result<Self> {
        let server = |family, port| lab.socket(Place::Of(Host::Server), family, port);
        let at = Family::BOTH
            .into_iter()
            .flat_map(|family| [port::OPEN, port::BACK_FORWARD].map(|port| server(family, port)));
        Ok(Self {
            _acceptor: Acceptor::start(lab, Host::Server, at)?,
            _full: Family::BOTH
                .into_iter()
                .map(|family| FullListener::start(lab, Host::Server, server(family, port::FULL)))
                .collect::<Result<_>>()?,
            _dns: Family::BOTH
                .into_iter()
                .map(|family| Server::start(lab, Host::Server, server(family, DNS)))
                .collect::<Result<_>>()?,
        })
    }
}

/// The rules that lose a part of the traffic, at the client, the router and the server.
///
/// # Errors
/// A tool is missing or fails.
pub fn rules(lab: &Lab) -> Result<()> {
    port::rules(lab)?;
    queries::rules(lab, DNS)
}

impl Traffic {
    /// Makes all of it, and waits for what is answered.
    ///
    /// # Errors
    /// Something is not answered that should be.
    pub fn start(lab: &Lab) -> Result<Self> {
        let listeners = Listeners::start(lab)?;
        let mut unanswered = Vec::new();
        let connects = connects(lab)?;
        let mut results = Results::default();
        for attempt in connects.iter() {
            let port = attempt.to.port();
            match attempt.fate() {
                Fate::Established => results.established += 1,
                Fate::Refused(Errno::ECONNREFUSED) => results.refused += 1,
                Fate::Waiting if LOST_CONNECTS.contains(&port) => {
                    results.unanswered += 1;
                    let one = Unanswered::connect(attempt.from, port);
                    unanswered.push(match port {
                        port::GONE => one,
                        port::FULL => one.dropped_here(),
                        _ => one.reason(REASON),
                    });
                }
                fate => anyhow::bail!("a connect to port {port}: {fate:?}"),
            }
        }
        let mut dns = Dns::default();
        let clients = Family::BOTH
            .into_iter()
            .map(|family| ask(lab, family, &mut unanswered, &mut dns))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            unanswered,
            results,
            dns,
            _connects: connects,
            _clients: clients.into_iter().flatten().collect(),
            _listeners: listeners,
        })
    }
}

/// The connects: of ten one unanswered, one refused, eight established; the family changes with each
/// ten, the reason with each twenty.
fn connects(lab: &Lab) -> Result<Connects> {
    let to = (0..CONNECTS).map(|n| {
        let family = Family::BOTH[n / ONE_IN % 2];
        let port = match n % ONE_IN {
            0 => LOST_CONNECTS[n / ONE_IN / 2 % LOST_CONNECTS.len()],
            1 => port::CLOSED,
            _ => port::OPEN,
        };
        lab.socket(Place::Of(Host::Server), family, port)
    });
    let mut connects = lab.within(Host::Client, || Connects::open(to, Options::default()))?;
    // What hangs hangs on: only the others are waited for.
    let deadline = Instant::now() + PATIENCE;
    let lost = CONNECTS / ONE_IN;
    loop {
        connects.wait(Instant::now() + Duration::from_millis(20))?;
        let waiting = connects
            .iter()
            .filter(|attempt| attempt.fate() == Fate::Waiting)
            .count();
        if waiting == lost {
            return Ok(connects);
        }
        ensure!(
            waiting > lost && Instant::now() < deadline,
            "{waiting} connects hang, not {lost}"
        );
    }
}

/// The queries of one family, half of them all, over half of the sockets: every second is connected.
fn ask(
    lab: &Lab,
    family: Family,
    unanswered: &mut Vec<Unanswered>,
    dns: &mut Dns,
) -> Result<Vec<Client>> {
    let from = lab.socket(Place::Of(Host::Client), family, 0);
    let to = lab.socket(Place::Of(Host::Server), family, DNS);
    let clients = lab.within(Host::Client, || {
        (0..SOCKETS / 2)
            .map(|n| match n % 2 {
                0 => Client::connected(from, to),
                _ => Client::unconnected(from),
            })
            .collect::<Result<Vec<_>>>()
    })?;
    let each = QUERIES / SOCKETS;
    for (index, client) in clients.iter().enumerate() {
        let named = if index % 2 == 0 { None } else { Some(to) };
        let mut open = 0;
        for n in (index * each)..((index + 1) * each) {
            let round = n / ONE_IN;
            let (id, habit) = match n % ONE_IN {
                0 => {
                    let first = LOST_QUERIES[round % LOST_QUERIES.len()];
                    let habit = if first == id::FREE { "ignore" } else { "lost" };
                    (first + u16::try_from(round / LOST_QUERIES.len())?, habit)
                }
                1 | 2 => (ANSWERED + u16::try_from(n)?, "rcode3"),
                _ => (ANSWERED + u16::try_from(n)?, "good"),
            };
            let name = format!("{habit}-{n}.silence.test");
            client
                .ask(named, id, &name, if n % 2 == 0 { A } else { AAAA })
                .with_context(|| format!("ask for {name}"))?;
            dns.queries += 1;
            let rcode = match habit {
                "rcode3" => "NXDOMAIN",
                "good" => "NOERROR",
                _ => {
                    let one = Unanswered::query(client.from, id, &name, DNS).packets(1..=1);
                    unanswered.push(if habit == "ignore" {
                        one
                    } else {
                        one.reason(REASON)
                    });
                    continue;
                }
            };
            *dns.responses.entry(rcode.to_owned()).or_default() += 1;
            dns.latencies += 1;
            open += 1;
            if open == AT_ONCE {
                hear(client, open)?;
                open = 0;
            }
        }
        hear(client, open)?;
    }
    Ok(clients)
}

/// Waits for so many answers.
fn hear(client: &Client, count: usize) -> Result<()> {
    let heard = client.hear(count, Instant::now() + PATIENCE)?;
    ensure!(heard.len() == count, "{} of {count} answers", heard.len());
    let mut ids: Vec<_> = heard.iter().map(|heard| heard.id()).collect();
    ids.sort_unstable();
    ids.dedup();
    ensure!(
        ids.len() == count && ids.iter().all(Option::is_some),
        "not every answer is of one query: {heard:?}"
    );
    Ok(())
}
