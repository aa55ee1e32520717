//! TCP ports for programs that a test starts.

use std::net::{Ipv4Addr, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};

/// Below what the kernel gives to who names no port (`net.ipv4.ip_local_port_range`, from 32,768)
/// and the NodePorts (from 30,000).
const PORTS: Range<u16> = 12_000..28_000;
/// More than the programs of one test binary.
const OF_A_PROCESS: u32 = 500;
/// Ports at which somebody listens, before that is not believed.
const TRIES: u32 = 100;

static TAKEN: AtomicU32 = AtomicU32::new(0);

/// A port of the loopback device at which nobody listens and nobody will: each call has another
/// one, and the kernel gives them to nobody. One that the kernel gave a moment ago can be taken by
/// the time the program listens, by another test or by a copy of the socket in a process that is
/// just being started.
///
/// # Errors
/// Somebody listens at all that were tried.
pub fn free_port() -> Result<u16> {
    let next = || of(std::process::id(), TAKEN.fetch_add(1, Ordering::Relaxed));
    first_free((0..TRIES).map(|_| next()))
        .with_context(|| format!("somebody listens at {TRIES} ports of {PORTS:?}"))
}

fn first_free(mut ports: impl Iterator<Item = u16>) -> Option<u16> {
    ports.find(|port| TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).is_err())
}

/// Processes that run at once begin at different places.
fn of(process: u32, taken: u32) -> u16 {
    let count = u32::from(PORTS.end - PORTS.start);
    let first = process % (count / OF_A_PROCESS) * OF_A_PROCESS;
    PORTS.start + ((first + taken) % count) as u16
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn each_call_has_another() {
        let mut ports: Vec<u16> = (0..200).map(|_| free_port().unwrap()).collect();
        assert!(ports.iter().all(|port| PORTS.contains(port)));
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 200);
    }

    #[test]
    fn one_at_which_somebody_listens_is_left_out() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let taken = listener.local_addr().unwrap().port();
        let free = free_port().unwrap();
        assert_eq!(first_free([taken, free].into_iter()), Some(free));
        assert_eq!(first_free([taken].into_iter()), None);
    }

    #[test]
    fn all_are_used() {
        assert_eq!(of(0, 0), PORTS.start);
        assert_eq!(of(31, OF_A_PROCESS - 1), PORTS.end - 1);
        assert_eq!(of(31, OF_A_PROCESS), PORTS.start);
    }
}
