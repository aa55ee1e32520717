//! Flags of `whydrop explain`, and of what collects connections for it.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{AgentsArgs, DEFAULT_SOCKET};
use crate::event::Protocol;

/// Flags of `whydrop explain`.
#[derive(Debug, Args)]
#[command(
    after_help = "The exit code is 0 if the connection is allowed (of a Service: to every backend), \
                  1 if it is denied or the specification leaves it open, 2 if that cannot be told. \
                  With --flows it is 1 if an \"expect\" is not met, else 2 if a line is broken. \
                  With --with it is 1 if a connection would be denied or would depend on the CNI, 0 \
                  if none, 2 if that cannot be told."
)]
pub struct ExplainArgs {
    /// Who connects: namespace/pod or an IP address
    #[arg(value_name = "SRC")]
    pub source: Option<String>,

    /// To whom: namespace/pod, svc/namespace/name or an IP address
    #[arg(value_name = "DST", requires = "source")]
    pub destination: Option<String>,

    /// The destination's port (of a Service: the Service's) [default: the only one that it declares,
    /// else every port is asked for]
    #[arg(long, value_name = "PORT", env = "WHYDROP_PORT",
          value_parser = clap::value_parser!(u16).range(1..), help_heading = "Connection")]
    pub port: Option<u16>,

    /// TCP, UDP, SCTP, ICMP, ICMPv6 or a number
    #[arg(
        long,
        value_name = "PROTOCOL",
        default_value = "TCP",
        env = "WHYDROP_PROTOCOL",
        help_heading = "Connection"
    )]
    pub protocol: Protocol,

    /// Judge many connections instead: a file with one JSON object a line, as {"src":"ns/pod",
    /// "dst":"ns/pod","protocol":"TCP","port":80,"expect":"allow"}; one answer a line
    #[arg(
        long,
        value_name = "FILE",
        env = "WHYDROP_FLOWS",
        conflicts_with = "source",
        help_heading = "Connection"
    )]
    pub flows: Option<PathBuf>,

    /// Policies that are not applied yet: which of the connections that the agents see now would they
    /// deny? Files or folders of NetworkPolicies, of policies of the Admin and Baseline tiers and of
    /// namespaces with their labels; - for standard input
    #[arg(
        long,
        value_name = "FILE",
        num_args = 1..,
        env = "WHYDROP_WITH",
        conflicts_with_all = ["source", "flows"],
        help_heading = "Proposal"
    )]
    pub with: Vec<PathBuf>,

    /// A NetworkPolicy that is to be taken away, alone or beside --with; may be repeated
    #[arg(
        long,
        value_name = "NS/NAME",
        env = "WHYDROP_WITHOUT",
        conflicts_with_all = ["source", "flows"],
        help_heading = "Proposal"
    )]
    pub without: Vec<String>,

    /// Connections that `whydrop connections` printed, of any number of nodes, in place of those that
    /// all agents of the cluster, or with --socket one, see; - for standard input; may be repeated
    #[arg(
        long,
        value_name = "FILE",
        env = "WHYDROP_CONNECTIONS",
        help_heading = "Proposal"
    )]
    pub connections: Vec<PathBuf>,

    /// File or folder of Kubernetes objects, YAML or JSON, as `kubectl get
    /// pods,svc,endpointslices,ns,nodes,netpol -A -o yaml` prints them, in place of --from; may be
    /// repeated
    #[arg(
        long,
        value_name = "PATH",
        env = "WHYDROP_OBJECTS",
        help_heading = "Cluster"
    )]
    pub objects: Vec<PathBuf>,

    /// Who is asked: `agent`, which also tells what it has seen, `cluster` (the API server), or `auto`:
    /// an agent with --socket or where one answers on /run/whydrop/agent.sock, else the cluster. --with
    /// asks the cluster for objects and its agents for connections
    #[arg(
        long,
        value_name = "WHO",
        default_value = "auto",
        env = "WHYDROP_FROM",
        help_heading = "Cluster"
    )]
    pub from: From,

    /// Whom that is
    #[command(flatten)]
    pub agents: AgentsArgs,

    /// How the answer looks
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        default_value = "text",
        env = "WHYDROP_OUTPUT",
        help_heading = "Output"
    )]
    pub output: ExplainOutput,
}

/// How an explanation looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExplainOutput {
    /// For people.
    Text,
    /// For scripts.
    Json,
    /// The same as YAML.
    Yaml,
}

impl ExplainArgs {
    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.agents.local_socket()
    }
}

/// Who is asked about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum From {
    /// An agent where one answers, else the cluster.
    Auto,
    /// An agent.
    Agent,
    /// The API server.
    Cluster,
}

/// Flags of `whydrop connections`.
#[derive(Debug, Args)]
pub struct ConnectionsArgs {
    /// The agent's local API
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, env = "WHYDROP_SOCKET")]
    pub socket: PathBuf,
}
