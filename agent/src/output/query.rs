//! What a reader of `/v1/drops` asks for, on both sides of the socket.
//!
//! | parameter | meaning |
//! |---|---|
//! | `follow=true` | go on with live lines; else the answer ends with the last line there is |
//! | `last=N` | begin with the last N events that the selection matches |
//! | `since=DURATION\|TIME` | begin with events of this time or later: `90s`, `1h30m`, RFC 3339 |
//! | any other | [`Selection`] |

use std::str::FromStr;

use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp};

use crate::output::stream::Range;
use crate::selection::{Selection, SelectionError};

/// A parsed query of `/v1/drops`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// Which lines.
    pub selection: Selection,
    /// Whether to go on with live lines.
    pub follow: bool,
    /// Begin with the last this many events.
    pub last: Option<usize>,
    /// Begin with events from then on.
    pub since: Option<Since>,
}

/// Since when: an age by the agent's clock, or a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// This long ago.
    Ago(SignedDuration),
    /// This time.
    At(Timestamp),
}

/// Why a query cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// A parameter of the range.
    #[error("{0} {1:?}: {2}")]
    Range(&'static str, String, &'static str),
    /// A parameter of the selection.
    #[error(transparent)]
    Selection(#[from] SelectionError),
}

impl FromStr for Since {
    type Err = String;

    /// `90s`, `1h30m`, `2d` (of 24 hours), or a time with its offset (RFC 3339).
    fn from_str(s: &str) -> Result<Self, String> {
        if let Ok(span) = s.parse::<Span>() {
            return span
                .to_duration(SpanRelativeTo::days_are_24_hours())
                .ok()
                .filter(|age| !age.is_negative())
                .map(Self::Ago)
                .ok_or_else(|| {
                    "expected an age that is not negative, in weeks at most".to_owned()
                });
        }
        s.parse().map(Self::At).map_err(|_| {
            "expected an age as 90s or 1h30m, or a time as 2026-11-22T12:03:00Z".to_owned()
        })
    }
}

impl Since {
    /// The time, if it is `now`.
    pub fn at(self, now: Timestamp) -> Timestamp {
        match self {
            Self::Ago(age) => now.checked_sub(age).unwrap_or(Timestamp::MIN),
            Self::At(time) => time,
        }
    }
}

impl std::fmt::Display for Since {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ago(age) => age.fmt(f),
            Self::At(time) => time.fmt(f),
        }
    }
}

impl Query {
    /// Parses what stands behind the `?`.
    ///
    /// # Errors
    /// One sentence about the first parameter that is unknown or cannot be used.
    pub fn parse(query: &str) -> Result<Self, QueryError> {
        let mut this = Self::default();
        let mut selection = Vec::new();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let wrong =
                |name, expected| QueryError::Range(name, value.clone().into_owned(), expected);
            match &*key {
                "follow" => {
                    this.follow = match &*value {
                        "" | "true" | "1" => true,
                        "false" | "0" => false,
                        _ => return Err(wrong("follow", "expected true or false")),
                    }
                }
                "last" => {
                    let last = value.parse();
                    this.last = Some(last.map_err(|_| wrong("last", "expected a number"))?);
                }
                "since" => {
                    let since = value.parse();
                    this.since = Some(since.map_err(|_| {
                        wrong("since", "expected an age as 90s, or a time (RFC 3339)")
                    })?);
                }
                _ => selection.push((key, value)),
            }
        }
        this.selection = Selection::from_query(selection)?;
        Ok(this)
    }

    /// What [`Query::parse`] makes the same of.
    pub fn to_query_string(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        if self.follow {
            query.append_pair("follow", "true");
        }
        if let Some(last) = self.last {
            query.append_pair("last", &last.to_string());
        }
        if let Some(since) = self.since {
            query.append_pair("since", &since.to_string());
        }
        query.extend_pairs(self.selection.to_query()).finish()
    }

    /// The part of the stream that is asked for, if it is `now`.
    pub fn range(&self, now: Timestamp) -> Range {
        Range {
            follow: self.follow,
            last: self.last,
            since: self.since.map(|since| since.at(now)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_string_is_read_back() {
        for query in [
            "",
            "follow=true",
            "last=0",
            "since=PT1M30S&port=80",
            "since=2026-11-22T12%3A03%3A00Z&not.pod=shop%2Fweb",
        ] {
            assert_eq!(Query::parse(query).unwrap().to_query_string(), query);
        }
        assert!(!Query::parse("follow=false").unwrap().follow);
    }

    #[test]
    fn an_age_counts_back_from_now() {
        let now: Timestamp = "2026-11-22T12:00:00Z".parse().unwrap();
        for (since, expected) in [
            ("90s", "2026-11-22T11:58:30Z"),
            ("1h30m", "2026-11-22T10:30:00Z"),
            ("2d", "2026-11-20T12:00:00Z"),
            ("0s", "2026-11-22T12:00:00Z"),
            ("2026-11-22T13:00:00+01:00", "2026-11-22T12:00:00Z"),
            ("9000w", "1854-05-28T12:00:00Z"),
        ] {
            let at = since.parse::<Since>().unwrap().at(now);
            assert_eq!(at.to_string(), expected, "{since}");
        }
    }

    #[test]
    fn a_bad_parameter_is_one_sentence() {
        for (query, sentence) in [
            ("last=-1", "last \"-1\": expected a number"),
            ("follow=si", "follow \"si\": expected true or false"),
            ("pods=x", "there is no selection \"pods\""),
        ] {
            assert_eq!(Query::parse(query).unwrap_err().to_string(), sentence);
        }
        for since in ["-5s", "5", "", "yesterday", "1y", "12:00"] {
            assert!(since.parse::<Since>().is_err(), "{since}");
        }
    }
}
