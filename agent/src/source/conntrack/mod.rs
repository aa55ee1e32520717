//! Conntrack by ctnetlink: connections that nobody answered, and where a connection really goes.
//!
//! | file | what |
//! |---|---|
//! | `handle.rs` | starting and stopping it, and what it tells of itself |
//! | `thread.rs` | the thread: dumps, events, what is due; its errors and its budget |
//! | `waiting.rs` | how long an entry has waited, and when that is reported; no I/O |
//! | `local.rs` | attempts that the source of this kernel's sockets counts |
//! | `lookup.rs` | the destination after DNAT of a single connection |
//! | `connections.rs` | what was answered: the connections that there are now |
//! | `stats.rs` | use, limit and counters of the table |
//! | `socket.rs` | asking the kernel |
//! | `wire.rs` | messages to entries |
//! | `tuple.rs` | what names a connection |
//!
//! All of it is about one network namespace, that of the thread which starts or asks; for an agent
//! with `hostNetwork` it is the node's, through which the traffic of its pods passes.
//!
//! What conntrack shows is silence beyond this node: a first packet that is dropped here is never
//! confirmed, and so is no entry. It does not show ICMP errors, nor SYNs that are sent again: an
//! attempt that another host rejected by ICMP, or that its sender gave up, looks unanswered as well.

mod connections;
mod handle;
mod local;
mod lookup;
mod socket;
mod stats;
mod thread;
mod tuple;
mod waiting;
mod wire;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use connections::{Connected, Connections, MAX_FLOWS, connections};
pub use handle::{Source, Totals};
pub use local::{LocalTuples, REMEMBERED};
pub use lookup::Lookup;
pub use socket::Error;
pub use stats::{ConntrackStats, stats};
pub use tuple::Tuple;
use whydrop_ebpf::attempt::Died;

/// As in `whydrop_source_up{source}`.
pub const SOURCE: &str = "conntrack";

/// How long after its timeout an attempt of a socket of this kernel may still be noted in
/// [`LocalTuples`] without being counted twice: the decision about an entry waits for so long.
pub const NOTED_WITHIN: Duration = Duration::from_millis(250);

/// Tells of an address whether attempts from there are counted by nobody else.
pub type IsForeign = Box<dyn Fn(&IpAddr) -> bool + Send>;

/// Whether destroyed entries are followed as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destroy {
    /// Dumps alone. Entries that die between two of them or before their timeout are not seen.
    Off,
    /// The kernel tells of every entry that ends, which costs every connection of the node: connects
    /// a second fall by a fifth to a third (benchmark `conntrack`).
    On,
}

/// The next entry that died unreplied, as the programs saw it; `None` if there is none now.
pub type NextDied = Box<dyn FnMut() -> Option<Died> + Send>;

/// What the source is started with.
pub struct Setup {
    /// When a TCP connection attempt counts as unanswered.
    pub syn_timeout: Duration,
    /// When a DNS query over UDP does.
    pub dns_timeout: Duration,
    /// Attempts that another source counts. Read when an attempt is decided, [`NOTED_WITHIN`] after
    /// its timeout at the earliest.
    pub local: Arc<Mutex<LocalTuples>>,
    /// Whether a sender is neither a pod of another node nor an address of a socket of this kernel:
    /// attempts of others are not reported. Asked when an attempt is decided, by the source's thread.
    pub is_foreign: IsForeign,
    /// Entries of this namespace that died unreplied, where the programs see them: also those that the
    /// dumps miss, and at no cost to others.
    pub died: Option<NextDied>,
    /// The kernel is asked to choose the entries of a dump. They are checked in any case; this saves
    /// most of what a dump takes.
    pub kernel_filter: bool,
    /// Whether destroyed entries are followed as well.
    pub destroy: Destroy,
    /// Receive buffer for events of destroyed entries, in bytes.
    pub destroy_buffer_bytes: usize,
    /// Where procfs is mounted.
    pub proc: PathBuf,
}

impl Setup {
    /// With these timeouts, dumps alone and `/proc`; the public fields change that.
    pub fn new(
        syn_timeout: Duration,
        dns_timeout: Duration,
        local: Arc<Mutex<LocalTuples>>,
        is_foreign: IsForeign,
    ) -> Self {
        Self {
            syn_timeout,
            dns_timeout,
            local,
            is_foreign,
            died: None,
            kernel_filter: true,
            destroy: Destroy::Off,
            // Some 1,500 events: 50 ms of the fastest node, and the thread reads at once.
            destroy_buffer_bytes: 2 << 20,
            proc: PathBuf::from("/proc"),
        }
    }
}
