//! What is asked: of `--flows` a line, of `/v1/explain` a query.
//!
//! | parameter | meaning |
//! |---|---|
//! | `src` | `ns/pod` or an address |
//! | `dst` | as `src`, or `svc/ns/name` |
//! | `protocol` | a name or a number; TCP where it is not given |
//! | `port` | 1 to 65535; the only one that is declared, or every port, where it is not given |
//! | `brief=true` | no fixes, and nothing is fetched from the kernel for it: for many questions |
//! | `text=true` | the answer for people as well, in the field `text` |

use serde::Deserialize;

use crate::event::Protocol;

/// One question.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Asked {
    /// Who connects.
    pub src: String,
    /// To whom.
    pub dst: String,
    /// By which protocol.
    #[serde(default = "tcp")]
    pub protocol: Protocol,
    /// To which port.
    pub port: Option<u16>,
    /// What the answer should be.
    pub expect: Option<Expect>,
}

const fn tcp() -> Protocol {
    Protocol::TCP
}

/// What an answer should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expect {
    /// Allowed.
    Allow,
    /// Denied.
    Deny,
}

impl Expect {
    /// Whether the answer is so.
    pub fn is_met(self, allowed: Option<bool>) -> bool {
        allowed == Some(self == Self::Allow)
    }
}

/// A question to an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// The question.
    pub asked: Asked,
    /// One of many.
    pub brief: bool,
    /// With the answer for people.
    pub text: bool,
}

impl Query {
    /// Parses what stands behind the `?`.
    ///
    /// # Errors
    /// One sentence about the first parameter that is missing, unknown or cannot be used.
    pub fn parse(query: &str) -> Result<Self, String> {
        let (mut src, mut dst, mut port) = (None, None, None);
        let (mut protocol, mut brief, mut text) = (Protocol::TCP, false, false);
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let flag = || match &*value {
                "" | "true" | "1" => Ok(true),
                "false" | "0" => Ok(false),
                _ => Err(format!("{key} {value:?}: expected true or false")),
            };
            match &*key {
                "src" => src = Some(value.into_owned()),
                "dst" => dst = Some(value.into_owned()),
                "protocol" => protocol = value.parse()?,
                "port" => {
                    let number = value.parse().ok().filter(|port| *port > 0);
                    let expected = || format!("port {value:?}: expected a port from 1 to 65535");
                    port = Some(number.ok_or_else(expected)?);
                }
                "brief" => brief = flag()?,
                "text" => text = flag()?,
                _ => return Err(format!("there is no parameter {key:?}")),
            }
        }
        let missing = |name, what| format!("{name} is missing: {what}");
        Ok(Self {
            asked: Asked {
                src: src.ok_or_else(|| missing("src", "who connects, as ns/pod or an address"))?,
                dst: dst.ok_or_else(|| {
                    missing("dst", "to whom, as ns/pod, svc/ns/name or an address")
                })?,
                protocol,
                port,
                expect: None,
            },
            brief,
            text,
        })
    }

    /// What [`Query::parse`] makes the same of.
    pub fn to_query_string(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query
            .append_pair("src", &self.asked.src)
            .append_pair("dst", &self.asked.dst)
            .append_pair("protocol", &self.asked.protocol.to_string());
        if let Some(port) = self.asked.port {
            query.append_pair("port", &port.to_string());
        }
        for (name, is_set) in [("brief", self.brief), ("text", self.text)] {
            if is_set {
                query.append_pair(name, "true");
            }
        }
        query.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_string_is_read_back() {
        for query in [
            "src=shop%2Fweb&dst=svc%2Fdb%2Fpg&protocol=UDP&port=53",
            "src=10.0.0.1&dst=fd00%3A%3A1&protocol=TCP&brief=true&text=true",
        ] {
            assert_eq!(Query::parse(query).unwrap().to_query_string(), query);
        }
        let short = Query::parse("src=a/b&dst=c/d").unwrap();
        assert_eq!((short.asked.protocol, short.brief), (Protocol::TCP, false));
    }

    #[test]
    fn a_bad_parameter_is_one_sentence() {
        for (query, sentence) in [
            ("", "src is missing: who connects, as ns/pod or an address"),
            (
                "src=a/b",
                "dst is missing: to whom, as ns/pod, svc/ns/name or an address",
            ),
            (
                "src=a/b&dst=c/d&port=0",
                "port \"0\": expected a port from 1 to 65535",
            ),
            (
                "src=a/b&dst=c/d&port=65536",
                "port \"65536\": expected a port from 1 to 65535",
            ),
            (
                "src=a/b&dst=c/d&text=si",
                "text \"si\": expected true or false",
            ),
            ("source=a/b", "there is no parameter \"source\""),
        ] {
            assert_eq!(Query::parse(query).unwrap_err(), sentence);
        }
        assert!(
            Query::parse("src=a/b&dst=c/d&protocol=QUIC")
                .unwrap_err()
                .contains("QUIC")
        );
    }
}
