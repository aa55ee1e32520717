//! The connections that there are now: every entry whose first packet was answered.
//!
//! The table is that of the calling thread's network namespace. What a pod's own namespace tracks (a
//! service mesh's redirects) is not in it, nor what a rule exempts from tracking.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use super::Error;
use super::socket::Socket;
use super::stats;
use crate::event::Protocol;

/// Flows that are kept: 100,000 are some 20 MB while they are read. Past it connections are counted as left
/// out; connections that differ in the sender's port alone are one flow.
pub const MAX_FLOWS: usize = 100_000;

/// Who is connected to whom, without the sender's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Connected {
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// Who sent the first packet.
    pub source: IpAddr,
    /// Whom it was sent to, before DNAT.
    pub asked: (IpAddr, u16),
    /// Where it went, after DNAT.
    pub destination: (IpAddr, u16),
}

/// What a look at the table found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// How many connections each flow has.
    pub flows: HashMap<Connected, u64>,
    /// Connections that found no room.
    pub left_out: u64,
    /// Entries that could not be read.
    pub unreadable: u64,
}

impl Connections {
    fn add(&mut self, flow: Connected, most: usize) {
        let flows = self.flows.len();
        match self.flows.get_mut(&flow) {
            Some(count) => *count += 1,
            None if flows >= most => self.left_out += 1,
            None => _ = self.flows.insert(flow, 1),
        }
    }

    /// All of them.
    pub fn count(&self) -> u64 {
        self.flows.values().sum::<u64>() + self.left_out
    }
}

/// Reads the table once; `None` if conntrack is not loaded. `proc` is where procfs is mounted.
///
/// # Errors
/// The kernel refuses to answer.
pub fn connections(proc: &Path) -> Result<Option<Connections>, Error> {
    // Asking would load it, and nobody wants that of an observer.
    let Some(entries) = stats::entries(proc)? else {
        return Ok(None);
    };
    let mut connections = Connections::default();
    if entries == 0 {
        return Ok(Some(connections));
    }
    let end = |address: SocketAddr| (address.ip(), address.port());
    let dumped = Socket::open()?.dump_replied(|entry| {
        let tuple = &entry.key.tuple;
        if !entry.unreplied {
            let flow = Connected {
                protocol: tuple.protocol(),
                source: tuple.source().ip(),
                asked: end(tuple.destination()),
                destination: end(entry.real_destination),
            };
            connections.add(flow, MAX_FLOWS);
        }
    })?;
    connections.unreadable = dumped.unreadable;
    Ok(Some(connections))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(source: &str) -> Connected {
        let server = ("10.0.0.9".parse().unwrap(), 80);
        Connected {
            protocol: Protocol::TCP,
            source: source.parse().unwrap(),
            asked: server,
            destination: server,
        }
    }

    #[test]
    fn what_finds_no_room_is_counted() {
        let mut all = Connections::default();
        for source in ["10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.3", "10.0.0.2"] {
            all.add(flow(source), 2);
        }
        assert_eq!((all.flows[&flow("10.0.0.1")], all.flows.len()), (2, 2));
        assert_eq!((all.left_out, all.count()), (1, 5));
    }

    #[test]
    fn without_conntrack_there_is_nothing_to_ask() {
        let proc = tempfile::tempdir().unwrap();
        assert_eq!(connections(proc.path()).unwrap(), None);
        // And of an empty table nobody is asked.
        let path = proc.path().join("sys/net/netfilter");
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("nf_conntrack_count"), "0\n").unwrap();
        let none = Some(Connections::default());
        assert_eq!(connections(proc.path()).unwrap(), none);
    }
}
