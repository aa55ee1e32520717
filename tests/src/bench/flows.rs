//! Datagrams over many flows: addresses of the client's times destinations, sent as fast as all CPUs
//! can, and what nft keeps of them.

use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::counters;
use crate::lab::{Family, Host, Lab, Place, command};
use crate::objects;

/// The first destination port.
pub const FIRST_PORT: u16 = 10_000;
/// Destination ports that nft drops.
pub const PORTS: u16 = 1_000;

/// The client's addresses beside its own, each a pod, and the destinations.
pub struct Flows {
    family: Family,
    sources: Vec<IpAddr>,
    destinations: Vec<SocketAddr>,
}

/// How much is sent.
#[derive(Clone, Copy, Debug)]
pub enum Amount {
    /// This many packets in each flow.
    Each(u64),
    /// For this long.
    For(Duration),
}

/// What was sent.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Datagrams that the client's kernel sent, by its own count.
    pub packets: u64,
    /// From the first to the last.
    pub elapsed: Duration,
}

impl Sent {
    /// Packets a second.
    pub fn rate(&self) -> f64 {
        self.packets as f64 / self.elapsed.as_secs_f64()
    }
}

impl Flows {
    /// Flows from `sources` addresses to `ports` ports of the server. The addresses are given to the
    /// client's device; at most 100 and [`PORTS`].
    ///
    /// # Errors
    /// The addresses cannot be set.
    pub fn to_ports(lab: &Lab, family: Family, sources: u16, ports: u16) -> Result<Self> {
        let server = lab.address(Place::Of(Host::Server), family);
        let destinations = (0..ports)
            .map(|port| SocketAddr::new(server, FIRST_PORT + port))
            .collect();
        Self::new(lab, family, sources, destinations)
    }

    /// IPv6 flows from `sources` addresses to one port of `destinations` addresses that nobody
    /// holds: as many pairs of pods.
    ///
    /// # Errors
    /// As [`Flows::to_ports`].
    pub fn to_pods(lab: &Lab, sources: u16, destinations: u16) -> Result<Self> {
        let destinations = (0..destinations)
            .map(|n| SocketAddr::new(destination(lab, n), FIRST_PORT))
            .collect();
        Self::new(lab, Family::V6, sources, destinations)
    }

    fn new(lab: &Lab, family: Family, sources: u16, destinations: Vec<SocketAddr>) -> Result<Self> {
        let sources: Vec<IpAddr> = (0..sources).map(|n| source(lab, family, n)).collect();
        let script: String = sources
            .iter()
            .map(|address| {
                let (length, option) = family.pick((32, ""), (128, " nodad"));
                format!("addr replace {address}/{length} dev eth0{option}\n")
            })
            .collect();
        command(
            &["ip", "-n", &lab.netns(Host::Client), "-batch", "-"],
            Some(&script),
        )?;
        Ok(Self {
            family,
            sources,
            destinations,
        })
    }

    /// How many flows.
    pub fn len(&self) -> u64 {
        (self.sources.len() * self.destinations.len()) as u64
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sends from all CPUs, round robin over the flows.
    ///
    /// # Errors
    /// The kernel refuses to send.
    pub fn send(&self, lab: &Lab, amount: Amount) -> Result<Sent> {
        let name = self.family.pick("UdpOutDatagrams", "Udp6OutDatagrams");
        let threads = super::report::cpus().min(self.sources.len());
        let start = Barrier::new(threads);
        let before = counters::Snmp::read(lab, Host::Client)?;
        let elapsed = lab.within(Host::Client, || -> Result<Duration> {
            std::thread::scope(|scope| {
                let workers: Vec<_> = (0..threads)
                    .map(|thread| {
                        let mine = self.sources.iter().skip(thread).step_by(threads);
                        let start = &start;
                        scope.spawn(move || {
                            let sockets = mine.map(|at| UdpSocket::bind((*at, 0))).collect();
                            start.wait();
                            // Checked after the barrier, at which the others wait as well.
                            let sockets: Vec<_> =
                                Result::<_, std::io::Error>::context(sockets, "bind UDP sockets")?;
                            self.work(thread, &sockets, amount)
                        })
                    })
                    .collect();
                let mut longest = Duration::ZERO;
                for worker in workers {
                    match worker.join() {
                        Ok(elapsed) => longest = longest.max(elapsed?),
                        Err(panic) => std::panic::resume_unwind(panic),
                    }
                }
                Ok(longest)
            })
        })?;
        let packets = counters::Snmp::read(lab, Host::Client)?.since(&before, name);
        Ok(Sent { packets, elapsed })
    }

    /// One thread's part.
    fn work(&self, thread: usize, sockets: &[UdpSocket], amount: Amount) -> Result<Duration> {
        let mut set = CpuSet::new();
        // Where the CPUs are not numbered from 0 the scheduler places the threads.
        if set.set(thread).is_ok() {
            let _ = sched_setaffinity(Pid::from_raw(0), &set);
        }
        let to: Vec<Option<SockaddrStorage>> = self
            .destinations
            .iter()
            .map(|to| Some(SockaddrStorage::from(*to)))
            .collect();
        let payload = [[IoSlice::new(b"whydrop bench")]];
        let no_control: [ControlMessage<'_>; 0] = [];
        let mut headers = MultiHeaders::preallocate(to.len(), None);
        let started = Instant::now();
        let mut round = 0;
        loop {
            for socket in sockets {
                sendmmsg(
                    socket.as_raw_fd(),
                    &mut headers,
                    payload.iter().cycle().take(to.len()),
                    &to,
                    no_control,
                    MsgFlags::empty(),
                )
                .context("send datagrams")?;
                if matches!(amount, Amount::For(time) if started.elapsed() >= time) {
                    return Ok(started.elapsed());
                }
            }
            round += 1;
            if matches!(amount, Amount::Each(rounds) if round >= rounds) {
                return Ok(started.elapsed());
            }
        }
    }
}

/// Drops the flows of both families at the router, before routing and connection tracking, each
/// counted: `hits4` and `hits6`.
///
/// # Errors
/// nft is missing or fails.
pub fn drop_at_router(lab: &Lab) -> Result<()> {
    let last = FIRST_PORT + PORTS - 1;
    lab.nft(
        Host::Router,
        &format!(
            "table inet bench {{
               counter hits4 {{ }}
               counter hits6 {{ }}
               chain c {{ type filter hook prerouting priority -300;
                 meta nfproto ipv4 udp dport {FIRST_PORT}-{last} counter name hits4 drop
                 meta nfproto ipv6 udp dport {FIRST_PORT}-{last} counter name hits6 drop
               }}
             }}"
        ),
    )
}

/// What nft dropped in a family.
///
/// # Errors
/// nft fails.
pub fn dropped(lab: &Lab, family: Family) -> Result<u64> {
    counters::nft(lab, Host::Router, family.pick("hits4", "hits6"))
}

/// The lab's objects and a pod for each source and destination.
pub fn objects(lab: &Lab) -> Value {
    let mut list = objects::list(lab);
    let namespace = lab.namespace();
    let mut pods: Vec<Value> = (0..100)
        .map(|n| {
            let addresses = Family::BOTH.map(|family| source(lab, family, n).to_string());
            objects::pod(
                &namespace,
                &format!("source-{n}"),
                &lab.node(),
                &addresses,
                &[],
            )
        })
        .collect();
    pods.extend((0..100).map(|n| {
        let address = destination(lab, n).to_string();
        objects::pod(
            &namespace,
            &format!("destination-{n}"),
            &lab.node(),
            &[address],
            &[],
        )
    }));
    if let Some(items) = list["items"].as_array_mut() {
        items.append(&mut pods);
    } else {
        list["items"] = json!(pods);
    }
    list
}

/// One of the client's further addresses: the upper half of the lab's range, in which it has no
/// subnets.
pub(super) fn source(lab: &Lab, family: Family, n: u16) -> IpAddr {
    let [high, low] = lab.id().to_be_bytes();
    family.pick(
        Ipv4Addr::new(10, 64 + high, low, 128 + n as u8).into(),
        Ipv6Addr::new(0xfd77, 0x0d0b, lab.id(), 8, 0, 0, 0, n + 1).into(),
    )
}

/// The address of a pod that does not exist.
fn destination(lab: &Lab, n: u16) -> IpAddr {
    Ipv6Addr::new(0xfd77, 0x0d0b, lab.id(), 9, 0, 0, 0, n + 1).into()
}
