//! The names of a lab's hosts and addresses.

use std::fmt;

/// A host of the lab: one network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// Sends what is dropped.
    Client,
    /// Forwards between all others: the node.
    Router,
    /// Receives it.
    Server,
    /// Sends what is allowed.
    Client2,
    /// Receives what is allowed.
    Server2,
}

impl Host {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Client,
        Self::Router,
        Self::Server,
        Self::Client2,
        Self::Server2,
    ];
    /// Those with one link to the router.
    pub const PODS: [Self; 4] = [Self::Client, Self::Server, Self::Client2, Self::Server2];

    /// Its name, also the name of its pod.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Router => "router",
            Self::Server => "server",
            Self::Client2 => "client2",
            Self::Server2 => "server2",
        }
    }

    /// The router's device towards it (`to-client`).
    pub fn device(self) -> String {
        format!("to-{}", self.name())
    }
}

/// An address of the lab that is no host: it has an object, or none, but nobody who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The pod of a host (of the router: its address towards the client).
    Of(Host),
    /// The router's address towards a pod.
    RouterTowards(Host),
    /// A pod in the server's subnet that does not answer to neighbour discovery.
    Absent,
    /// A pod whose packets the router always drops; see [`crate::expect`].
    Marker,
    /// A pod that sends inside a tunnel.
    InnerClient,
    /// A pod that receives inside a tunnel.
    InnerServer,
    /// The virtual address of the Service `server`.
    Service,
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// One of two values by family.
    pub fn pick<T>(self, v4: T, v6: T) -> T {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }

    /// nft's word in a rule, `ip` or `ip6`.
    pub fn nft(self) -> &'static str {
        self.pick("ip", "ip6")
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.pick("IPv4", "IPv6"))
    }
}
