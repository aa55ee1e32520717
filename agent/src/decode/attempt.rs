//! An attempt that got no answer, before names.

use std::time::Duration;

use jiff::Timestamp;

use super::Flow;
use crate::event::{DnsQuestion, DropSite, Kind};

/// A connection attempt or a DNS query that nobody answered in time.
///
/// One attempt is one socket, one DNS id, or one conntrack entry, however often it was resent.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    /// [`Kind::Syn`] or [`Kind::Dns`].
    pub kind: Kind,
    /// When its first packet was sent.
    pub since: Timestamp,
    /// How long it had waited when it was found.
    pub waited: Duration,
    /// Packets sent for it so far.
    pub sent: u64,
    /// The two ends; `destination` is the real one after DNAT where that is known, and
    /// `original_destination` then what the sender asked for.
    pub flow: Flow,
    /// The cgroup of the sender's socket (its directory's inode number).
    pub cgroup: Option<u64>,
    /// Inode number of the sender's network namespace.
    pub netns: Option<u32>,
    /// The question of a DNS query.
    pub dns: Option<DnsQuestion>,
    /// Where this node dropped the last packet of it, either way; `None` if it dropped none.
    pub drop: Option<DropSite>,
}
