//! How a line of the stream looks.
//!
//! Names, and above all DNS names, can hold what an attacker chose: nothing reaches a terminal
//! before [`clean`] or its JSON sibling took out what a terminal would obey.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::str::FromStr;

use anstyle::{AnsiColor, Style};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, fmt::strtime};

use crate::cli::config::Output;
use crate::event::{
    Cause, Confidence, Endpoint, EndpointKind, Event, Line, Lost, LostStage, Outcome,
};

/// How times look in compact and wide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TimeFormat {
    /// `12:03:10.512`, local.
    Short,
    /// `2026-11-22T13:03:10.512+01:00`, local.
    Local,
    /// `2026-11-22T12:03:10.512345678Z`, as in JSON.
    Rfc3339,
    /// `3.2s ago`.
    Relative,
    /// strftime, local.
    Strftime(String),
}

impl FromStr for TimeFormat {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "short" => Ok(Self::Short),
            "local" => Ok(Self::Local),
            "rfc3339" => Ok(Self::Rfc3339),
            "relative" => Ok(Self::Relative),
            _ if s.contains('%') => {
                let sample = Timestamp::UNIX_EPOCH.to_zoned(TimeZone::UTC);
                strtime::format(s, &sample).map_err(|e| format!("no strftime format: {e}"))?;
                Ok(Self::Strftime(s.to_owned()))
            }
            _ => Err("expected short, local, rfc3339, relative, or a strftime format".to_owned()),
        }
    }
}

/// What the lines of one command look like.
#[derive(Clone, Debug)]
pub struct Format {
    /// Which of the four.
    pub output: Output,
    /// With colours (compact and wide).
    pub color: bool,
    /// Of compact and wide.
    pub time: TimeFormat,
    /// Where `local` is.
    pub zone: TimeZone,
    /// Compact lines name the node too, as wide ones do.
    pub node: bool,
}

const DIM: Style = Style::new().dimmed();
const LOSS: Style = AnsiColor::Red.on_default().invert();

impl Format {
    /// The text for one line of the API, with its final newline.
    ///
    /// # Errors
    /// If the line is none that this version knows (JSON is passed on as it is).
    pub fn line(&self, json: &str, now: Timestamp) -> anyhow::Result<String> {
        if self.output == Output::Json {
            return Ok(clean_json(json).into_owned() + "\n");
        }
        let line: Line = serde_json::from_str(json)?;
        Ok(match (&line, self.output) {
            (_, Output::Yaml) => yaml(&line)?,
            (Line::Lost(lost), _) => self.lost(lost),
            (Line::Event(event), Output::Wide) => self.event(event, now, true),
            (Line::Event(event), _) => self.event(event, now, false),
        })
    }

    fn lost(&self, lost: &Lost) -> String {
        let why = match lost.stage {
            LostStage::Ring => "the kernel's buffer was full",
            LostStage::Queue => "the agent was too busy",
            LostStage::Reader => "this reader was too slow",
        };
        let node = clean(&lost.node);
        let text = format!("{} packets are not shown: {why} (node {node})", lost.lost);
        self.paint(LOSS, &text) + "\n"
    }

    fn event(&self, event: &Event, now: Timestamp, wide: bool) -> String {
        let mut parts = vec![self.paint(DIM, &self.time(event.time, now))];
        if wide || self.node {
            parts.push(clean(&event.node).into_owned());
        }
        parts.push(self.outcome(event.outcome));
        let (from, to) = (&event.source, &event.destination);
        let mut ends = format!("{} → {}", end(from, wide, wide), end(to, true, wide));
        if let Some(s) = to
            .service
            .as_ref()
            .filter(|_| to.kind != Some(EndpointKind::Service))
        {
            let _ = write!(ends, " (svc {}/{}", clean(&s.namespace), clean(&s.name));
            if wide {
                let _ = write!(ends, " {}", with_port(&s.ip.to_string(), s.port));
            }
            ends.push(')');
        }
        parts.push(ends);
        parts.extend(packet(event));
        if let Some(dns) = &event.dns {
            let mut question = format!("DNS {} {}", clean(&dns.qtype), clean(&dns.name));
            if wide {
                let _ = write!(question, " id {}", dns.id);
            }
            parts.push(question);
        }
        parts.push(format!("×{}", event.packets));
        parts.extend(event.waited_seconds.map(|s| format!("after {s:.1}s")));
        let site = site(event, wide);
        parts.extend(match event.cause {
            None if event.outcome == Outcome::Unanswered => {
                Some("whether this node dropped it is not known".to_owned())
            }
            None => site,
            Some(Cause::DroppedHere) => Some(match site {
                Some(site) => format!("dropped here: {site}"),
                // Which the kernel counts, but not by connection.
                None => "probably dropped here: its listener's accept queue was full".to_owned(),
            }),
            Some(Cause::Elsewhere) => Some("not dropped on this node".to_owned()),
        });
        let mut text = parts.join("  ") + "\n";
        if let Some(explanation) = &event.explanation {
            let summary = match explanation.confidence {
                Confidence::None => None,
                _ => Some(&explanation.summary).filter(|s| !s.is_empty()),
            };
            let findings = explanation.findings.iter().filter(|_| wide);
            for line in summary.into_iter().chain(findings.map(|f| &f.message)) {
                text += &self.paint(DIM, &format!("    ↳ {}", clean(line)));
                text.push('\n');
            }
        }
        text
    }

    fn outcome(&self, outcome: Outcome) -> String {
        let color = match outcome {
            Outcome::Dropped => AnsiColor::Red,
            Outcome::Rejected => AnsiColor::Yellow,
            Outcome::Unanswered => AnsiColor::Magenta,
        };
        let name = outcome.as_str().to_uppercase();
        // As wide as the longest of the three.
        self.paint(color.on_default().bold(), &format!("{name:10}"))
    }

    fn paint(&self, style: Style, text: &str) -> String {
        if self.color {
            format!("{style}{text}{style:#}")
        } else {
            text.to_owned()
        }
    }

    fn time(&self, time: Timestamp, now: Timestamp) -> String {
        let local = || time.to_zoned(self.zone.clone());
        let text = match &self.time {
            TimeFormat::Rfc3339 => return format!("{time:.9}"),
            TimeFormat::Relative => {
                let age = now.duration_since(time);
                let tenths = SignedDuration::from_millis((age.as_millis() / 100 * 100) as i64);
                return format!("{tenths:#}");
            }
            TimeFormat::Short => strtime::format("%H:%M:%S%.3f", &local()),
            TimeFormat::Local => strtime::format("%Y-%m-%dT%H:%M:%S%.3f%:z", &local()),
            TimeFormat::Strftime(format) => strtime::format(format, &local()),
        };
        // A format that was tried at start fails for no time; RFC 3339 is right in any case.
        text.map_or_else(|_| time.to_string(), |text| clean(&text).into_owned())
    }
}

/// One end: the name that it has, or its address; nothing that is not known.
fn end(end: &Endpoint, port: bool, wide: bool) -> String {
    let ip = end.ip.map(|ip| ip.to_string());
    let pod = end.pod.as_ref().map(|pod| match &end.namespace {
        Some(namespace) => format!("{}/{}", clean(namespace), clean(pod)),
        None => clean(pod).into_owned(),
    });
    let service = end
        .service
        .as_ref()
        .filter(|_| end.kind == Some(EndpointKind::Service));
    let node = end
        .node
        .as_ref()
        .filter(|_| end.kind == Some(EndpointKind::Node));
    let name = pod
        .or_else(|| service.map(|s| format!("svc {}/{}", clean(&s.namespace), clean(&s.name))))
        .or_else(|| node.map(|node| format!("node {}", clean(node))));
    let port = end.port.filter(|_| port);
    let named = name.is_some();
    let mut text = match (name, &ip) {
        (Some(name), _) => with_port_plain(&name, port),
        (None, Some(ip)) => with_port(ip, port),
        (None, None) => with_port_plain("?", port),
    };
    let mut notes = Vec::new();
    match end.kind {
        Some(EndpointKind::External) => notes.push("external".to_owned()),
        Some(EndpointKind::Unknown) => notes.push("no such pod".to_owned()),
        Some(EndpointKind::Node) if !named => notes.push("node".to_owned()),
        _ => {}
    }
    if end.host_network {
        notes.push("host network".to_owned());
    }
    if wide {
        notes.extend(ip.filter(|_| named));
        let workload = end.workload.as_ref();
        notes.extend(workload.map(|w| format!("{} {}", clean(&w.kind), clean(&w.name))));
        let shown = end.pod.is_none() && named;
        notes.extend(
            end.node
                .as_ref()
                .filter(|_| !shown)
                .map(|node| format!("on {}", clean(node))),
        );
    }
    if !notes.is_empty() {
        let _ = write!(text, " ({})", notes.join(", "));
    }
    text
}

fn with_port_plain(name: &str, port: Option<u16>) -> String {
    port.map_or_else(|| name.to_owned(), |port| format!("{name}:{port}"))
}

/// An address with its port; IPv6 in brackets (RFC 5952, section 6).
fn with_port(ip: &str, port: Option<u16>) -> String {
    match port {
        Some(port) if ip.contains(':') => format!("[{ip}]:{port}"),
        _ => with_port_plain(ip, port),
    }
}

/// `TCP SYN`, `UDP`, or what is known.
fn packet(event: &Event) -> Option<String> {
    let protocol = match (event.protocol, event.ip_version) {
        (Some(protocol), _) if protocol.to_string().parse::<u8>().is_ok() => {
            format!("protocol {protocol}")
        }
        (Some(protocol), _) => protocol.to_string(),
        (None, Some(version)) => format!("IPv{version}"),
        (None, None) => return None,
    };
    Some(match &event.tcp_flags {
        Some(flags) => format!("{protocol} {}", clean(flags)),
        None => protocol,
    })
}

/// `NETFILTER_DROP at nft_do_chain on veth12ab`, or what is known.
fn site(event: &Event, wide: bool) -> Option<String> {
    let drop = event.drop.as_ref()?;
    let mut words = Vec::new();
    words.extend(drop.reason.as_ref().map(|r| clean(r).into_owned()));
    words.extend(drop.location.as_ref().map(|l| format!("at {}", clean(l))));
    words.extend(drop.interface.as_ref().map(|i| format!("on {}", clean(i))));
    words.extend(drop.netns.filter(|_| wide).map(|n| format!("in netns {n}")));
    (!words.is_empty()).then(|| words.join(" "))
}

/// Whether a terminal might obey the character: control characters (C0, DEL, C1), and those that
/// change the direction of text or cannot be seen.
fn is_hostile(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// The text with every character that a terminal might obey written as `\u{1b}`.
pub fn clean(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hostile) {
        return text.into();
    }
    let mut out = String::new();
    for c in text.chars() {
        if is_hostile(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out.into()
}

/// [`clean`] for text of several lines.
pub fn clean_lines(text: &str) -> String {
    text.lines()
        .map(|line| clean(line).into_owned() + "\n")
        .collect()
}

/// [`clean_json`] for text of several lines.
pub fn clean_json_lines(text: &str) -> String {
    text.lines()
        .map(|line| clean_json(line).into_owned() + "\n")
        .collect()
}

/// One YAML document. Where the YAML would hold hostile characters as they are, it is JSON (which
/// is YAML, and has an escape for each).
fn yaml(line: &Line) -> anyhow::Result<String> {
    let yaml = serde_saphyr::to_string(line)?;
    if !yaml.lines().any(|line| line.contains(is_hostile)) {
        return Ok(format!("---\n{yaml}"));
    }
    let json = serde_json::to_string_pretty(line)?;
    Ok("---\n".to_owned() + &clean_json_lines(&json))
}

/// [`clean`] for a JSON text of one line: the same value, since such characters only stand in its
/// strings, and all of them are in the Basic Multilingual Plane.
pub(super) fn clean_json(json: &str) -> Cow<'_, str> {
    if !json.contains(is_hostile) {
        return json.into();
    }
    let mut out = String::new();
    for c in json.chars() {
        if is_hostile(c) {
            let _ = write!(out, "\\u{:04x}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    out.into()
}

#[cfg(test)]
mod tests;
