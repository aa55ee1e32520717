//! A netlink socket that asks for entries.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::DecodeError;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket as Netlink, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};

use super::tuple::{Tuple, Zone};
use super::wire::{self, Answer, Choice, Entry, Received};

/// The most that the kernel puts into one datagram of a dump (netlink_recvmsg, Linux 3.16 on); it
/// follows the reader's buffer, and larger ones take fewer calls.
const DATAGRAM_BYTES: usize = 32 * 1024;

/// Why conntrack did not answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No right to ask.
    #[error("CAP_NET_ADMIN is missing in this network namespace")]
    Refused,
    /// The kernel has no ctnetlink.
    #[error("this kernel has no ctnetlink (module nf_conntrack_netlink)")]
    Unsupported,
    /// Events were lost because they were not read in time.
    #[error("the kernel dropped events because they were not read in time")]
    Overrun,
    /// Anything else that the kernel answers.
    #[error("ctnetlink: {0}")]
    Kernel(#[source] io::Error),
    /// What cannot be read.
    #[error("a message of ctnetlink cannot be read: {0}")]
    Malformed(String),
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EPERM | Errno::EACCES) => Self::Refused,
            Some(Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT) => Self::Unsupported,
            Some(Errno::ENOBUFS) => Self::Overrun,
            _ => Self::Kernel(error),
        }
    }
}

impl From<DecodeError> for Error {
    fn from(error: DecodeError) -> Self {
        Self::Malformed(error.to_string())
    }
}

/// What a dump found besides its entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Dumped {
    /// Entries that the kernel sent.
    pub entries: u64,
    /// Those of them that were answered: the kernel did not heed the filter.
    pub replied: u64,
    /// Those of them that could not be read.
    pub unreadable: u64,
}

/// A socket of the network namespace in which it was opened.
pub(super) struct Socket {
    netlink: Netlink,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens one.
    pub fn open() -> Result<Self, Error> {
        let mut netlink = Netlink::new(NETLINK_NETFILTER)?;
        netlink.bind_auto()?;
        netlink.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            netlink,
            sequence: 0,
            buffer: Vec::with_capacity(DATAGRAM_BYTES),
        })
    }

    /// Has the kernel send events of a group, of which `buffer_bytes` may wait to be read. The limit
    /// `net.core.rmem_max` does not hold for who may ask at all.
    pub fn subscribe(&self, group: u32, buffer_bytes: usize) -> Result<(), Error> {
        setsockopt(&self.netlink, sockopt::RcvBufForce, &buffer_bytes).map_err(io::Error::from)?;
        Ok(self.netlink.add_membership(group)?)
    }

    /// The entry of a tuple.
    pub fn get(&mut self, tuple: &Tuple, zone: Zone) -> Result<Option<Entry>, Error> {
        let sequence = self.send(|sequence| wire::get(tuple, zone, sequence))?;
        let mut answer = None;
        while answer.is_none() {
            self.answers(sequence, true, |found| answer = Some(found))?;
        }
        match answer {
            Some(Answer::Entry(entry)) => Ok(Some(entry)),
            Some(Answer::Unreadable) => Err(Error::Malformed("an entry".to_owned())),
            Some(Answer::Error(code)) => match errno(code) {
                Errno::ENOENT => Ok(None),
                errno => Err(refusal(errno)),
            },
            _ => Ok(None),
        }
    }

    /// Hands every entry to `found` that nobody answered; `filtered` leaves the choice to the kernel
    /// where that can choose.
    pub fn dump(&mut self, filtered: bool, found: impl FnMut(Entry)) -> Result<Dumped, Error> {
        let choice = match filtered {
            true => Choice::Unreplied,
            false => Choice::All,
        };
        self.dump_of(choice, false, found)
    }

    /// Hands every entry to `found`, of which the kernel may leave out those that nobody answered.
    pub fn dump_replied(&mut self, mut found: impl FnMut(Entry)) -> Result<Dumped, Error> {
        match self.dump_of(Choice::Replied, true, &mut found) {
            // No kernel is known that refuses the filter, and none is worth failing for.
            Err(Error::Unsupported) => self.dump_of(Choice::All, true, found),
            result => result,
        }
    }

    fn dump_of(
        &mut self,
        choice: Choice,
        wants_replied: bool,
        mut found: impl FnMut(Entry),
    ) -> Result<Dumped, Error> {
        let sequence = self.send(|sequence| wire::dump(choice, sequence))?;
        let mut dumped = Dumped::default();
        let mut end = None;
        while end.is_none() {
            self.answers(sequence, wants_replied, |answer| match answer {
                Answer::Done(code) | Answer::Error(code) => end = Some(code),
                Answer::Entry(entry) => {
                    dumped.entries += 1;
                    found(entry);
                }
                Answer::Replied => {
                    dumped.entries += 1;
                    dumped.replied += 1;
                }
                Answer::Unreadable => {
                    dumped.entries += 1;
                    dumped.unreadable += 1;
                }
                Answer::Other => dumped.entries += 1,
            })?;
        }
        match end {
            None | Some(0) => Ok(dumped),
            Some(code) => Err(refusal(errno(code))),
        }
    }

    fn send(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> Result<u32, Error> {
        // 0 is the number of events.
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.netlink.send(&request(self.sequence), 0)?;
        Ok(self.sequence)
    }

    /// Reads one datagram of the answer to a request. The kernel has it ready: it answers before it
    /// returns from the request, and continues a dump before it returns from reading.
    fn answers(
        &mut self,
        sequence: u32,
        wants_replied: bool,
        mut found: impl FnMut(Answer),
    ) -> Result<(), Error> {
        let has_answered = self.receive(wants_replied, |received| {
            if received.sequence == sequence {
                found(received.answer);
            }
        })?;
        if has_answered {
            Ok(())
        } else {
            Err(Error::Kernel(Errno::EAGAIN.into()))
        }
    }

    /// Reads one datagram, if there is one. `wants_replied` reads entries in full also where they
    /// were answered.
    pub fn receive(
        &mut self,
        wants_replied: bool,
        found: impl FnMut(Received),
    ) -> Result<bool, Error> {
        self.buffer.clear();
        let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
        let length = match self.netlink.recv(&mut self.buffer, flags) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            result => result?,
        };
        if length > self.buffer.len() {
            return Err(Error::Malformed(format!(
                "{length} bytes, of which {} were read",
                self.buffer.len()
            )));
        }
        wire::read(&self.buffer, wants_replied, found)?;
        Ok(true)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.netlink.as_fd()
    }
}

/// The code of an error message, which is negative.
fn errno(code: i32) -> Errno {
    Errno::from_raw(code.wrapping_abs())
}

/// An error that a message carries.
fn refusal(errno: Errno) -> Error {
    match errno {
        // nfnetlink's answer where the subsystem is neither there nor can be loaded.
        Errno::EINVAL | Errno::EOPNOTSUPP => Error::Unsupported,
        errno => io::Error::from(errno).into(),
    }
}
