//! What an agent serves over TCP, read as any other program would.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result};

/// No answer takes this long, on a machine where other tests run.
const TIMEOUT: Duration = Duration::from_secs(20);

/// One line of `/metrics`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The metric's name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

impl Sample {
    /// A label's value, empty where there is none.
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// GET of a path: status and body.
///
/// # Errors
/// Nobody answers, or not in HTTP.
pub fn get(stream: TcpStream, path: &str) -> Result<(u16, String)> {
    get_as(stream, path, "*/*")
}

/// As [`get`], of these media types.
///
/// # Errors
/// As [`get`].
pub fn get_as(mut stream: TcpStream, path: &str, accept: &str) -> Result<(u16, String)> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nHost: localhost\r\nAccept: {accept}\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("{path} answers {answer:?}"))?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .with_context(|| format!("{path} answers {head:?}"))?;
    Ok((status, body.to_owned()))
}

/// The samples of `/metrics`.
///
/// # Errors
/// It is no OpenMetrics text.
pub fn samples(body: &str) -> Result<Vec<Sample>> {
    body.lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| parse(line).with_context(|| format!("a line of /metrics: {line:?}")))
        .collect()
}

/// One sample line of the OpenMetrics text format.
fn parse(line: &str) -> Result<Sample> {
    let name_end = line.find(['{', ' ']).context("no value")?;
    let (name, mut rest) = line.split_at(name_end);
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            rest = rest.trim_start_matches(',');
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (label, value) = rest.split_once("=\"").context("a label without a value")?;
            let mut text = String::new();
            let mut characters = value.char_indices();
            let end = loop {
                match characters.next().context("an open quotation mark")? {
                    (index, '"') => break index,
                    (_, '\\') => match characters.next().context("an open escape")?.1 {
                        'n' => text.push('\n'),
                        other => text.push(other),
                    },
                    (_, other) => text.push(other),
                }
            };
            labels.insert(label.to_owned(), text);
            rest = &value[end + 1..];
        }
    }
    let value = rest
        .split_whitespace()
        .next()
        .context("no value")?
        .parse()?;
    Ok(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_samples() {
        let sample = parse(r#"m_total{a="x",b="q\"\\\n, }",c=""} 12.5 1700000000"#).unwrap();
        assert_eq!((sample.name.as_str(), sample.value), ("m_total", 12.5));
        assert_eq!(sample.label("a"), "x");
        assert_eq!(sample.label("b"), "q\"\\\n, }");
        assert_eq!(sample.label("c"), "");
        assert_eq!(parse("plain 3").unwrap().value, 3.0);
        assert!(parse(r#"m{a="x} 1"#).is_err());
    }
}
