//! The commands.
//!
//! | module | is |
//! |---|---|
//! | [`config`] | every flag of every command |
//! | [`units`] | sizes and durations as flags take them |
//! | [`telemetry`] | the program's own log |
//! | [`agent`] | the node agent |
//! | [`tail`] | the drop stream, with [`mod@format`] for how a line looks |
//! | [`status`] | what agents say of themselves |
//! | [`check`] | what this kernel allows |
//! | [`explain`] | what NetworkPolicies say of a connection |
//! | [`connections`] | the connections of an agent's node |
//! | [`client`] | the local API as a client sees it |
//! | [`cluster`] | all agents of a cluster |
//! | [`printer`] | standard output, until nobody reads it |

pub mod agent;
pub mod check;
pub mod client;
pub mod cluster;
pub mod config;
pub mod connections;
pub mod explain;
pub mod format;
pub mod printer;
pub mod sources;
pub mod status;
pub mod tail;
pub mod telemetry;
pub mod units;

use std::fmt;
use std::io::{self, Write as _};

/// Tells whoever runs a command, on stderr. Where that cannot be written, as on a full disk, the command goes
/// on: `eprintln!` would end it.
pub fn say(sentence: impl fmt::Display) {
    let _ = writeln!(io::stderr(), "whydrop: {sentence}");
}

/// An error with its causes as one sentence. Many errors repeat their cause's text in their own, so
/// what was said already is left out.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let inner = std::io::Error::from(std::io::ErrorKind::NotFound);
        let text = inner.to_string();
        let error =
            anyhow::Error::new(inner).context(format!("cannot read x: {text}; look for it"));
        assert_eq!(
            sentence(&error),
            format!("cannot read x: {text}; look for it")
        );
        let error: anyhow::Result<()> = Err(anyhow::anyhow!("the cause"));
        let error = error.context("what failed").expect_err("an error");
        assert_eq!(sentence(&error), "what failed: the cause");
    }
}
