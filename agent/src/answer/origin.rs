//! Where the objects of an answer are from.

use std::fmt;
use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

/// Where the objects are from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "lowercase")]
pub enum Origin {
    /// A running agent's index.
    Agent {
        /// The agent's node.
        node: Arc<str>,
        /// As of when.
        time: Timestamp,
    },
    /// The API server, listed for this answer.
    Cluster {
        /// Its address.
        url: String,
        /// As of when.
        time: Timestamp,
    },
    /// Files.
    Files,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent { node, time } => {
                write!(f, "from the agent on node {node}, as of {}", clock(*time))
            }
            Self::Cluster { url, time } => {
                write!(f, "from the API server at {url}, as of {}", clock(*time))
            }
            Self::Files => f.write_str("from files"),
        }
    }
}

/// The time of day, as the reader's clock shows it.
pub fn clock(time: Timestamp) -> impl fmt::Display {
    time.to_zoned(TimeZone::system()).strftime("%H:%M:%S")
}
