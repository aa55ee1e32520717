//! What the agent must say of attempts that nobody answered: of each one line, when its time is over
//! and not later, by its own port and id; and of no other.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::agent::{Agent, POLL, Received, Sample};
use crate::connects::{Connects, Options};
use crate::dns_client::Client;
use crate::dns_server::A;
use crate::lab::{Family, Host, Lab, Place};
use crate::packet::dns_query;
use crate::patience;

/// How much later than its timeout an attempt may be reported.
pub const GRACE: Duration = Duration::from_millis(500);
/// How much longer the line of it may take on a machine with other work.
const DELIVERY: Duration = Duration::from_secs(1);
/// Until a line or counter must be there after all that.
const DEADLINE: Duration = Duration::from_secs(60);

/// The arguments of an agent that tests wait for: both timeouts, as `500ms`.
pub fn timeouts(time: &str) -> [&str; 4] {
    ["--syn-timeout", time, "--dns-timeout", time]
}

/// Which attempt: its protocol, the sender's address and port, of DNS its id, and of a connect where it
/// goes: the kernel lets one source port connect to several destinations at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    from: SocketAddr,
    /// `None` of a connect.
    id: Option<u16>,
    /// 0 of a query.
    to_port: u16,
    tcp: bool,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.id {
            Some(id) => write!(f, "query {id} from {}", self.from),
            None => write!(f, "connect from {} to port {}", self.from, self.to_port),
        }
    }
}

/// The pod that an attempt must be said to go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Pod(&'static str),
    /// Whatever the agent says: the test cannot tell.
    Any,
}

/// An attempt that must be called unanswered.
#[derive(Clone, Debug)]
pub struct Unanswered {
    key: Key,
    pod: &'static str,
    to_port: u16,
    to: To,
    service: &'static str,
    dropped_here: bool,
    /// Reasons, if a drop must be shown.
    reasons: Option<&'static [&'static str]>,
    packets: RangeInclusive<u64>,
    name: Option<String>,
    /// When it began, where the time of its line is looked at, and the timeout.
    time: Option<(Instant, Duration)>,
}

impl Unanswered {
    fn new(key: Key, to_port: u16) -> Self {
        Self {
            key,
            pod: Host::Client.name(),
            to_port,
            to: To::Pod(Host::Server.name()),
            service: "",
            dropped_here: false,
            reasons: None,
            packets: 1..=u64::MAX,
            name: None,
            time: None,
        }
    }

    /// A connect of the client to a port of the server, lost elsewhere.
    pub fn connect(from: SocketAddr, to_port: u16) -> Self {
        let key = Key {
            from,
            id: None,
            to_port,
            tcp: true,
        };
        Self::new(key, to_port)
    }

    /// A query of the client to a port of the server by UDP, lost elsewhere.
    pub fn query(from: SocketAddr, id: u16, name: &str, to_port: u16) -> Self {
        let key = Key {
            from,
            id: Some(id),
            to_port: 0,
            tcp: false,
        };
        Self {
            name: Some(format!("{name}.")),
            ..Self::new(key, to_port)
        }
    }

    /// This node dropped a packet of it; no particular place.
    #[must_use]
    pub fn dropped_here(mut self) -> Self {
        self.dropped_here = true;
        self
    }

    /// This node dropped a packet of it for one of these reasons, which the line shows.
    #[must_use]
    pub fn reason(mut self, reasons: &'static [&'static str]) -> Self {
        self.reasons = Some(reasons);
        self.dropped_here()
    }

    /// The sender asked for this Service (`name` in the lab's namespace).
    #[must_use]
    pub fn service(mut self, service: &'static str) -> Self {
        self.service = service;
        self
    }

    /// The sender's pod, if it is not the client.
    #[must_use]
    pub fn of(mut self, pod: &'static str) -> Self {
        self.pod = pod;
        self
    }

    /// The destination's pod, if it is not the server.
    #[must_use]
    pub fn to_pod(mut self, pod: &'static str) -> Self {
        self.to = To::Pod(pod);
        self
    }

    /// The destination is not looked at: it has no pod, or there are several.
    #[must_use]
    pub fn to_any(mut self) -> Self {
        self.to = To::Any;
        self
    }

    /// How many packets had been sent when it was found.
    #[must_use]
    pub fn packets(mut self, packets: RangeInclusive<u64>) -> Self {
        self.packets = packets;
        self
    }

    /// It hangs, and so is found when its time is over, by an agent with this timeout.
    #[must_use]
    pub fn hangs(mut self, since: Instant, timeout: Duration) -> Self {
        self.time = Some((since, timeout));
        self
    }

    fn kind(&self) -> &'static str {
        if self.key.id.is_some() { "dns" } else { "syn" }
    }

    fn cause(&self) -> &'static str {
        if self.dropped_here {
            "dropped_here"
        } else {
            "elsewhere"
        }
    }

    /// What is wrong with a line about it.
    fn faults(&self, lab: &Lab, received: &Received) -> Vec<String> {
        let line = &received.json;
        let mut faults = Vec::new();
        let mut must = |what: &str, found: &Value, wanted: Value| {
            if *found != wanted {
                faults.push(format!("{what} is {found}, not {wanted}"));
            }
        };
        must("kind", &line["kind"], self.kind().into());
        must("cause", &line["cause"], self.cause().into());
        must("source.pod", &line["source"]["pod"], self.pod.into());
        let destination = &line["destination"];
        if let To::Pod(pod) = self.to {
            must("destination.pod", &destination["pod"], pod.into());
        }
        must(
            "destination.port",
            &destination["port"],
            self.to_port.into(),
        );
        let service = &destination["service"];
        if self.service.is_empty() {
            must("destination.service", service, Value::Null);
        } else {
            must("service.name", &service["name"], self.service.into());
            must(
                "service.namespace",
                &service["namespace"],
                lab.namespace().into(),
            );
        }
        if let Some(name) = &self.name {
            must("dns.name", &line["dns"]["name"], name.as_str().into());
        } else {
            must("dns", &line["dns"], Value::Null);
        }
        if !self.dropped_here {
            must("drop", &line["drop"], Value::Null);
        }
        let reason = line["drop"]["reason"].as_str();
        // Kernels before 5.17 know no reasons.
        if let Some(reasons) = self.reasons
            && (line["drop"].is_null() || reason.is_some_and(|reason| !reasons.contains(&reason)))
        {
            faults.push(format!("drop is {}, not {reasons:?}", line["drop"]));
        }
        let waited = line["waited_seconds"].as_f64();
        // The kernel resends a SYN once a second at most: more were sent of one that was found late.
        let most = match self.key.id {
            None => 1 + waited.unwrap_or(0.0) as u64,
            Some(_) => 0,
        };
        let (least, most) = (*self.packets.start(), most.max(*self.packets.end()));
        match line["packets"].as_u64() {
            Some(packets) if (least..=most).contains(&packets) => {}
            _ => faults.push(format!(
                "packets is {}, not {least} to {most}",
                line["packets"]
            )),
        }
        match (waited, self.time) {
            (None, _) => faults.push(format!("waited_seconds is {}", line["waited_seconds"])),
            (Some(waited), Some((since, timeout))) => {
                let latest = timeout + patience::within(GRACE);
                let limits = timeout.as_secs_f64()..=latest.as_secs_f64();
                if !limits.contains(&waited) {
                    faults.push(format!("waited_seconds is {waited}, not in {limits:?}"));
                }
                let after = received.at.saturating_duration_since(since);
                if after < timeout || after > latest + DELIVERY {
                    faults.push(format!("the line came {after:?} after it began"));
                }
            }
            (Some(_), None) => {}
        }
        faults
    }
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pod = match self.to {
            To::Pod(pod) => pod,
            To::Any => "any",
        };
        write!(
            f,
            "{} to {pod}:{}, {}",
            self.key,
            self.to_port,
            self.cause()
        )
    }
}

/// Which attempt a line is about, if it calls one of the lab's pods' unanswered.
fn key(lab: &Lab, line: &Value) -> Option<Key> {
    let source = &line["source"];
    let ip: IpAddr = source["ip"].as_str()?.parse().ok()?;
    let ours = source["namespace"] == lab.namespace().as_str();
    let marker = line["destination"]["pod"] == "marker";
    let port = |end: &str| line[end]["port"].as_u64().unwrap_or(0) as u16;
    let tcp = line["protocol"] == "TCP";
    (line["outcome"] == "unanswered" && ours && !marker).then(|| Key {
        from: SocketAddr::new(ip, port("source")),
        id: line["dns"]["id"].as_u64().map(|id| id as u16),
        to_port: if tcp { port("destination") } else { 0 },
        tcp,
    })
}

/// What is wrong with what the agent said, each in a line.
#[derive(Clone, Debug, Default)]
pub struct Audit {
    /// Not said to be unanswered.
    pub missing: Vec<String>,
    /// Said, and wrongly: cause, place, name, time.
    pub wrong: Vec<String>,
    /// Said more than once.
    pub twice: Vec<String>,
    /// Nobody expected it.
    pub unexpected: Vec<String>,
}

impl Audit {
    fn passed(&self) -> Result<()> {
        const MOST: usize = 4;
        let mut text = String::new();
        for (what, lines) in [
            ("are not said to be unanswered", &self.missing),
            ("are said wrongly", &self.wrong),
            ("are said more than once", &self.twice),
            ("were expected by nobody", &self.unexpected),
        ] {
            if !lines.is_empty() {
                text += &format!("\n{} {what}:", lines.len());
                for line in lines.iter().take(MOST) {
                    text += &format!("\n  {line}");
                }
                if lines.len() > MOST {
                    text += &format!("\n  and {} more", lines.len() - MOST);
                }
            }
        }
        ensure!(text.is_empty(), "of the attempts{text}");
        Ok(())
    }
}

/// Waits until the agent has said so of each of these, and checks what it said. More may follow.
///
/// # Errors
/// One is missing, or a line about it is wrong.
pub fn wait(lab: &Lab, agent: &Agent, wanted: &[Unanswered]) -> Result<()> {
    waited(lab, agent, wanted)?.passed()
}

fn waited(lab: &Lab, agent: &Agent, wanted: &[Unanswered]) -> Result<Audit> {
    let mut missing: HashMap<Key, &Unanswered> = wanted.iter().map(|one| (one.key, one)).collect();
    ensure!(
        missing.len() == wanted.len(),
        "the test names one attempt twice"
    );
    let mut audit = Audit::default();
    let mut seen = 0;
    let deadline = Instant::now() + DEADLINE;
    while !missing.is_empty() && Instant::now() < deadline {
        for received in agent.received(seen) {
            seen += 1;
            if let Some(found) = key(lab, &received.json).and_then(|key| missing.remove(&key)) {
                let faults = found.faults(lab, &received);
                if !faults.is_empty() {
                    let faults = faults.join("; ");
                    let line = format!("{found}: {faults}\n    {}", received.json);
                    audit.wrong.push(line);
                }
            }
        }
        std::thread::sleep(POLL);
    }
    audit.missing = missing.values().map(ToString::to_string).collect();
    Ok(audit)
}

/// Checks that the agent said so of each of these once and of nothing else, in lines and counters.
///
/// That no further line comes is shown by two markers: a connect and a query of another pod that
/// begin afterwards. When both are said to be unanswered, so is everything that began before.
///
/// # Errors
/// Says what is missing, twice, wrong, or should not be.
pub fn expect(lab: &Lab, agent: &Agent, wanted: &[Unanswered]) -> Result<()> {
    expect_beside(lab, agent, "", wanted)
}

/// As [`expect`], where what one pod sends is not looked at.
///
/// # Errors
/// As [`expect`].
pub fn expect_beside(lab: &Lab, agent: &Agent, other: &str, wanted: &[Unanswered]) -> Result<()> {
    audit(lab, agent, other, wanted)?.passed()?;
    counters(lab, agent, other, wanted)
}

/// What is wrong with the lines, where what one pod sends is not looked at.
///
/// # Errors
/// The agent does not answer, or the markers are not reported.
pub fn audit(lab: &Lab, agent: &Agent, other: &str, wanted: &[Unanswered]) -> Result<Audit> {
    let mut audit = waited(lab, agent, wanted)?;
    markers(lab, agent)?;
    let mut times: BTreeMap<Key, usize> = BTreeMap::new();
    let mut lines = HashMap::new();
    for received in agent.received(0) {
        if received.json["source"]["pod"] != other
            && let Some(key) = key(lab, &received.json)
        {
            *times.entry(key).or_default() += 1;
            lines.insert(key, received.json);
        }
    }
    let expected: HashSet<Key> = wanted.iter().map(|one| one.key).collect();
    for (key, times) in times {
        if !expected.contains(&key) {
            audit.unexpected.push(format!("{key}: {}", lines[&key]));
        } else if times != 1 {
            let line = format!("{times} times the {key}: {}", lines[&key]);
            audit.twice.push(line);
        }
    }
    Ok(audit)
}

/// A pair as `whydrop_unanswered_total` names it: source, destination, kind, cause and Service.
type Pair = [String; 5];

/// Checks `whydrop_unanswered_total` of the lab.
fn counters(lab: &Lab, agent: &Agent, other: &str, wanted: &[Unanswered]) -> Result<()> {
    // One whose destination is not looked at is counted without one, and so are all then.
    let any = wanted.iter().any(|one| one.to == To::Any);
    let mut sums: BTreeMap<Pair, u64> = BTreeMap::new();
    for one in wanted {
        let service = match one.service {
            "" => String::new(),
            name => format!("{}/{name}", lab.namespace()),
        };
        let to = match one.to {
            To::Pod(pod) if !any => pod.to_owned(),
            _ => String::new(),
        };
        let [kind, cause] = [one.kind(), one.cause()].map(str::to_owned);
        let pair = [one.pod.to_owned(), to, kind, cause, service];
        *sums.entry(pair).or_default() += 1;
    }
    let deadline = Instant::now() + DEADLINE;
    loop {
        let mut found: BTreeMap<Pair, u64> = BTreeMap::new();
        for sample in agent.metrics()? {
            if let Some(mut pair) = pair(lab, &sample)
                && pair[0] != other
            {
                if any {
                    pair[1].clear();
                }
                *found.entry(pair).or_default() += sample.value as u64;
            }
        }
        if found == sums {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "whydrop_unanswered_total is\n  {found:?}, not\n  {sums:?}"
        );
        std::thread::sleep(POLL);
    }
}

/// The pair of a sample of `whydrop_unanswered_total`, if it is one of the lab's.
fn pair(lab: &Lab, sample: &Sample) -> Option<Pair> {
    let ours = sample.name == "whydrop_unanswered_total"
        && sample.value > 0.0
        && sample.label("source_namespace") == lab.namespace()
        && sample.label("destination_pod") != "marker";
    let labels = [
        "source_pod",
        "destination_pod",
        "kind",
        "cause",
        "destination_service",
    ];
    ours.then(|| labels.map(|label| sample.label(label).to_owned()))
}

/// A connect and a query to an address whose packets the router drops, until both are reported.
fn markers(lab: &Lab, agent: &Agent) -> Result<()> {
    let to = |port| lab.socket(Place::Marker, Family::V4, port);
    let from = lab.socket(Place::Of(Host::Client2), Family::V4, 0);
    let (connect, client) = lab.within(Host::Client2, || -> Result<_> {
        let connect = Connects::open([to(9)], Options::default())?;
        let client = Client::unconnected(from)?;
        client
            .socket()
            .send_to(&dns_query(1, "marker.test", A), to(53))?;
        Ok((connect, client))
    })?;
    let connect = connect.iter().next().context("no connect")?.from.port();
    let wanted = [("syn", connect), ("dns", client.from.port())];
    let deadline = Instant::now() + DEADLINE;
    let mut seen = 0;
    let mut reported = [false; 2];
    while reported != [true; 2] {
        for Received { json, .. } in agent.received(seen) {
            seen += 1;
            for ((kind, port), reported) in wanted.iter().zip(&mut reported) {
                *reported |= json["outcome"] == "unanswered"
                    && json["kind"] == *kind
                    && json["source"]["port"] == *port
                    && json["destination"]["pod"] == "marker";
            }
        }
        if Instant::now() > deadline {
            bail!(
                "of the markers, a connect and a query that nft drops, {reported:?} are reported"
            );
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}
