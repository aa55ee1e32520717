//! What programs and agent share about attempts: connects and DNS queries that wait for an answer.
//!
//! An attempt is one TCP socket in SYN_SENT, or one DNS id of one client address and port, however
//! often it is resent. While it waits it is in a map of the kernel's; what ends in time is counted
//! and gone, and the agent looks for those that do not.

/// Bytes of a DNS message that are kept: the header (12), the longest name (255, RFC 1035, 2.3.4),
/// type and class (4), rounded up.
pub const MESSAGE_LEN: usize = 272;

/// Where a packet of an attempt was dropped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastDrop {
    /// As in [`crate::FlowKey`].
    pub location: u32,
    /// As in [`crate::FlowKey`].
    pub reason: u32,
    /// As in [`crate::FlowKey`].
    pub ifindex: u32,
    /// As in [`crate::FlowKey`].
    pub netns: u32,
    /// How many packets of the attempt this kernel dropped, either way; 0: the rest means nothing.
    pub packets: u32,
    /// Port of `destination`.
    pub destination_port: u16,
    /// 1 if it was the answer that was dropped.
    pub is_answer: u8,
    /// How many of the dropped packets the sender was told of; stays at 255.
    pub told: u8,
    /// The end that was asked, as the dropped packet had it: behind the DNAT, unless it was dropped before
    /// that, or an answer after it was translated back.
    pub destination: [u8; 16],
}

/// A TCP socket in SYN_SENT; its key is the socket's address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connect {
    /// When it entered SYN_SENT, `CLOCK_BOOTTIME` in nanoseconds.
    pub start_ns: u64,
    /// When its last SYN was handed to a device, same clock.
    pub sent_ns: u64,
    /// The cgroup of the task that called `connect`.
    pub cgroup: u64,
    /// When its sender was first told that it was refused, same clock; 0 if it was not. Only what was
    /// told before the timeout counts.
    pub told_ns: u64,
    /// The two ends as the socket sees them.
    pub tuple: Tuple,
    /// The two ends as they leave the socket's namespace, where its conntrack translates them; zero
    /// where it does not.
    pub wire: Tuple,
    /// Inode number of the socket's network namespace.
    pub netns: u32,
    /// SYNs that were handed to a device.
    pub sent: u32,
    /// 4 or 6.
    pub ip_version: u8,
    /// How it ended: `END_*`; only in the map of ended ones.
    pub end: u8,
    /// Zero.
    pub pad: [u8; 6],
    /// Its last packet that this kernel dropped.
    pub drop: LastDrop,
}

/// The two ends as the socket sees them; also the key by which drops elsewhere in this kernel find
/// their attempt.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// As in [`crate::FlowKey`].
    pub source: [u8; 16],
    /// Before any DNAT.
    pub destination: [u8; 16],
    /// Host order; 0 while no SYN was seen.
    pub source_port: u16,
    /// Host order.
    pub destination_port: u16,
}

/// [`Connect::end`]: the socket left SYN_SENT after the timeout, and before the agent had looked.
pub const END_LATE: u8 = 1;
/// [`Connect::end`]: it ended in ETIMEDOUT before the timeout.
pub const END_TIMED_OUT: u8 = 2;
/// [`Connect::end`]: it was given up before the timeout.
pub const END_ABANDONED: u8 = 3;

/// Key of the map of ended connects. A socket's address is used again at once, so its time as well.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EndedKey {
    /// Address of the socket.
    pub socket: u64,
    /// [`Connect::start_ns`].
    pub start_ns: u64,
}

/// A DNS query that waits. Neither the server (who asks several at once is answered if one answers)
/// nor the namespace (a drop in another one must find it) is part of the key.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct QueryKey {
    /// As in [`crate::FlowKey`].
    pub client: [u8; 16],
    /// Host order.
    pub port: u16,
    /// Host order.
    pub id: u16,
}

/// A DNS query that was answered.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    /// When, `CLOCK_BOOTTIME` in nanoseconds.
    pub answered_ns: u64,
    /// Of its message.
    pub hash: u64,
    /// Who was asked last, as in [`Query`].
    pub server: [u8; 16],
}

/// A socket that asks for names; the key of those that were told of an error.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClientKey {
    /// As in [`crate::FlowKey`].
    pub client: [u8; 16],
    /// Host order.
    pub port: u16,
    /// Zero.
    pub pad: u16,
}

/// What is known of a DNS query.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// When it was first sent, `CLOCK_BOOTTIME` in nanoseconds.
    pub start_ns: u64,
    /// When it was last sent, same clock.
    pub sent_ns: u64,
    /// When it was answered, same clock; only set if that was after the timeout and before the agent
    /// had looked.
    pub answered_ns: u64,
    /// Address of the last `sk_buff`, to know it again on the next device of a stack.
    pub skb: u64,
    /// The cgroup of the sender's socket.
    pub cgroup: u64,
    /// Who was asked, last; before any DNAT.
    pub server: [u8; 16],
    /// Who it was after a DNAT of the client's own namespace; zero if there was none.
    pub real_server: [u8; 16],
    /// Port of `server`, host order.
    pub server_port: u16,
    /// Port of `real_server`, host order.
    pub real_server_port: u16,
    /// How many bytes of `message` are the packet's.
    pub message_len: u16,
    /// Zero.
    pub pad: u16,
    /// Inode number of the client's network namespace.
    pub netns: u32,
    /// Packets sent.
    pub sent: u32,
    /// 4 or 6.
    pub ip_version: u8,
    /// 6 or 17.
    pub protocol: u8,
    /// Zero.
    pub pad2: [u8; 6],
    /// Its last packet that this kernel dropped.
    pub drop: LastDrop,
    /// The message from its header on.
    pub message: [u8; MESSAGE_LEN],
}

/// What one CPU needs at hand for DNS.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryWork {
    /// The query that is being noted.
    pub query: Query,
    /// The answer that was just received: whoever drops it afterwards finds it here.
    pub answered: Query,
    /// Its query's key.
    pub answered_key: QueryKey,
    /// Zero.
    pub pad: u32,
    /// Its response code and latency, as counted.
    pub answered_tally: TallyKey,
    /// Its latency in nanoseconds.
    pub answered_latency_ns: u64,
    /// Its `sk_buff`; 0 if there is none.
    pub answered_skb: u64,
}

/// [`TallyKey::what`]: a connect ended; `detail` is one of `RESULT_*`.
pub const TALLY_CONNECT: u8 = 0;
/// [`TallyKey::what`]: a DNS query was sent.
pub const TALLY_QUERY: u8 = 1;
/// [`TallyKey::what`]: a DNS answer came; `detail` is its response code.
pub const TALLY_RESPONSE: u8 = 2;
/// Values of [`TallyKey::what`].
pub const TALLIES: usize = 3;
/// Values of [`TallyKey::detail`]: the four bits of a response code.
pub const DETAILS: usize = 16;

/// The connect was answered.
pub const RESULT_ESTABLISHED: u8 = 0;
/// The connect was refused: by RST, by ICMP, or before a packet was sent.
pub const RESULT_REFUSED: u8 = 1;
/// The connect was given up before the timeout.
pub const RESULT_ABANDONED: u8 = 2;

/// Upper bounds of the latency histogram's buckets but the last, which has none.
pub const LATENCY_BUCKETS_NS: [u64; 13] = [
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
];

/// What attempts are counted by: who made them, and what became of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TallyKey {
    /// The sender's address, as in [`crate::FlowKey`].
    pub source: [u8; 16],
    /// The cgroup of the sender, which tells pods of the node's own network apart.
    pub cgroup: u64,
    /// Inode number of the sender's network namespace.
    pub netns: u32,
    /// One of `TALLY_*`.
    pub what: u8,
    /// Depends on `what`.
    pub detail: u8,
    /// For [`TALLY_RESPONSE`] the index into [`LATENCY_BUCKETS_NS`], or its length.
    pub bucket: u8,
    /// 4 or 6.
    pub ip_version: u8,
}

/// What is counted for a [`TallyKey`] in one generation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many. Wraps below zero where what was counted in another generation is taken back.
    pub count: u64,
    /// The sum of their latencies in nanoseconds; wraps likewise.
    pub sum_ns: u64,
}

/// A confirmed conntrack entry that died without ever having seen a reply.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Died {
    /// `CLOCK_BOOTTIME` in nanoseconds.
    pub boot_ns: u64,
    /// What its first packet was, and what its replies would have been.
    pub tuples: [crate::TupleHash; 2],
    /// Inode number of its network namespace.
    pub netns: u32,
    /// `nf_conn.status`
    pub status: u32,
}

/// Timeouts and what is switched on; set by the loader.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// When a connect counts as unanswered, nanoseconds.
    pub syn_timeout_ns: u64,
    /// When a DNS query counts as unanswered, nanoseconds.
    pub dns_timeout_ns: u64,
    /// 1 if DNS is watched.
    pub dns: u32,
    /// 1 if connects are watched.
    pub connects: u32,
}

/// How far the agent has looked: what was due by then is known to it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// `CLOCK_BOOTTIME` in nanoseconds at the start of the last look at the connects.
    pub connects_ns: u64,
    /// The same for DNS queries.
    pub queries_ns: u64,
    /// 1 once answers to DNS queries are seen, so that queries may be noted.
    pub is_dns_watched: u64,
}

/// What each CPU counts about attempts; only ever grows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttemptCpu {
    /// Connects that were noted.
    pub connects: u64,
    /// Of them, those that left SYN_SENT.
    pub connects_ended: u64,
    /// Connects that found no room: not followed.
    pub connects_lost: u64,
    /// Connects put into the map of ended ones.
    pub ended: u64,
    /// Connects that found no room there, so that an unanswered or abandoned one is not told.
    pub ended_lost: u64,
    /// DNS queries that were noted.
    pub queries: u64,
    /// DNS queries that found no room: not followed.
    pub queries_lost: u64,
    /// Counts made by [`TallyKey`].
    pub tallied: u64,
    /// Conntrack entries that died unreplied and found no room in the ring buffer.
    pub died_lost: u64,
}

const _: () = assert!(size_of::<LastDrop>() == 40);
const _: () = assert!(size_of::<Tuple>() == 36);
const _: () = assert!(size_of::<Connect>() == 32 + 2 * 36 + 8 + 8 + 40);
const _: () = assert!(size_of::<EndedKey>() == 16);
const _: () = assert!(size_of::<QueryKey>() == 20);
const _: () = assert!(size_of::<Query>() == 40 + 32 + 8 + 16 + 40 + MESSAGE_LEN);
const _: () = assert!(size_of::<QueryWork>() == 2 * size_of::<Query>() + 20 + 32 + 4 + 16);
const _: () = assert!(size_of::<Answered>() == 32);
const _: () = assert!(size_of::<TallyKey>() == 32);
const _: () = assert!(size_of::<Tally>() == 16);
const _: () = assert!(size_of::<Died>() == 8 + 112 + 8);
const _: () = assert!(size_of::<Settings>() == 24);
const _: () = assert!(size_of::<AttemptCpu>() == 72);
