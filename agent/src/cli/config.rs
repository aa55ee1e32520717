//! Every flag of every command; those of `tail`, `status` and `explain` are in `config/`. Each has an
//! environment variable `WHYDROP_<FLAG>`; of two flags of one name and different meaning, kubectl's has
//! `WHYDROP_KUBE_<FLAG>`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{
    ArgAction, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum,
};

pub use self::agents::{AgentsArgs, KubeArgs};
pub use self::explain::{ConnectionsArgs, ExplainArgs, ExplainOutput, From};
pub use self::selection::SelectionArgs;
pub use self::tail::{Color, Output, StatusArgs, TailArgs};
use crate::cli::units::{Size, duration};
use crate::cluster::watch::Reach;
use crate::source::load::Attach;

pub mod agents;
mod before;
mod explain;
mod selection;
mod tail;

/// Where the agent's local API is, unless `--socket` says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/whydrop/agent.sock";

/// Why does this connection hang? Sees every packet that this node's kernel drops, and names the
/// pods.
#[derive(Debug, Parser)]
#[command(
    name = "whydrop",
    version,
    max_term_width = 100,
    after_help = "A command's flags, as kubectl's --context, may also stand before the command."
)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,

    /// Log more (-v debug, -vv trace); the log goes to stderr
    #[arg(short, long, global = true, action = ArgAction::Count, env = "WHYDROP_VERBOSE",
          help_heading = "Log")]
    pub verbose: u8,

    /// How the log looks [default: text on a terminal, else json]
    #[arg(
        long,
        global = true,
        value_name = "FORMAT",
        env = "WHYDROP_LOG_FORMAT",
        help_heading = "Log"
    )]
    pub log_format: Option<LogFormat>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Observe this node: the agent that counts and names its drops
    Agent(AgentArgs),
    /// Show the drops of a running agent or of all agents of a cluster, as they happen or afterwards
    Tail(TailArgs),
    /// Explain what the NetworkPolicies say of a connection, and mend what is missing
    Explain(ExplainArgs),
    /// Show the connections of an agent's node, one JSON object a line, for explain --connections
    Connections(ConnectionsArgs),
    /// Show what a running agent, or each of a cluster, says of itself: sources, sizes, losses
    Status(StatusArgs),
    /// Show what this kernel and these privileges allow to observe
    Check(CheckArgs),
}

/// How the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Flags of `whydrop agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Name of this node [default: $NODE_NAME, else the host name]
    #[arg(
        long,
        value_name = "NAME",
        env = "WHYDROP_NODE_NAME",
        help_heading = "Names"
    )]
    pub node_name: Option<String>,

    /// Whether names come from the API server: `kube` (by $KUBECONFIG, ~/.kube/config or a pod's
    /// ServiceAccount; tried until it works), `none`, or `auto`: `kube` where one of them is there
    /// and no --objects is given
    #[arg(
        long,
        value_name = "auto|kube|none",
        default_value = "auto",
        env = "WHYDROP_CLUSTER",
        help_heading = "Names"
    )]
    pub cluster: Cluster,

    /// Pods that are watched: all of the cluster, or those of this node with look-ups of others as
    /// something concerns them; auto: of this node in a cluster of more than 20,000 pods
    #[arg(
        long,
        value_name = "WHICH",
        default_value = "auto",
        env = "WHYDROP_WATCH",
        help_heading = "Names"
    )]
    pub watch: Reach,

    /// File or folder of Kubernetes objects, YAML or JSON, as `kubectl get
    /// pods,svc,endpointslices,ns,nodes -A -o yaml` prints them, in place of a cluster; may be
    /// repeated; read again when it changes
    #[arg(
        long,
        value_name = "PATH",
        env = "WHYDROP_OBJECTS",
        help_heading = "Names"
    )]
    pub objects: Vec<PathBuf>,

    /// Address and port of /metrics, /healthz and /readyz
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:9742", value_parser = listen,
          env = "WHYDROP_LISTEN", help_heading = "Outputs")]
    pub listen: SocketAddr,

    /// Unix socket of the local API (mode 0600)
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, env = "WHYDROP_SOCKET",
          help_heading = "Outputs")]
    pub socket: PathBuf,

    /// How finely series name the two ends
    #[arg(
        long,
        value_name = "LEVEL",
        default_value = "pod",
        env = "WHYDROP_LABELS",
        help_heading = "Outputs"
    )]
    pub labels: Labels,

    /// Series per metric; further pairs are added up in one with every pair label `__other__`
    #[arg(long, value_name = "N", default_value = "10000", env = "WHYDROP_MAX_SERIES",
          value_parser = clap::value_parser!(u64).range(1..), help_heading = "Limits")]
    pub max_series: u64,

    /// How long the series of a pair stay after one of its pods is gone or, without pods, after
    /// the last packet
    #[arg(long, value_name = "DURATION", default_value = "15m", value_parser = duration,
          env = "WHYDROP_SERIES_TTL", help_heading = "Limits")]
    pub series_ttl: Duration,

    /// Memory of all kernel maps together, on any number of CPUs
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "32MiB",
        env = "WHYDROP_MAP_MEMORY",
        help_heading = "Limits"
    )]
    pub map_memory: Size,

    /// When a connection attempt without an answer counts as unanswered
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = timeout,
          env = "WHYDROP_SYN_TIMEOUT", help_heading = "Unanswered")]
    pub syn_timeout: Duration,

    /// When a DNS query without an answer counts as unanswered
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = timeout,
          env = "WHYDROP_DNS_TIMEOUT", help_heading = "Unanswered")]
    pub dns_timeout: Duration,

    /// Whether DNS queries and answers are watched
    #[arg(
        long,
        value_name = "on|off",
        default_value = "on",
        env = "WHYDROP_DNS",
        help_heading = "Unanswered"
    )]
    pub dns: OnOff,

    /// Whether conntrack is asked for Services and for unanswered connections of senders that are no
    /// sockets of this kernel
    #[arg(
        long,
        value_name = "auto|off",
        default_value = "auto",
        env = "WHYDROP_CONNTRACK",
        help_heading = "Unanswered"
    )]
    pub conntrack: AutoOff,

    /// Whether silent drops are written on their pods as Kubernetes Events
    #[arg(
        long,
        value_name = "on|off",
        default_value = "off",
        env = "WHYDROP_KUBE_EVENTS",
        help_heading = "Names"
    )]
    pub kube_events: OnOff,

    /// How programs are attached: `raw_tp` avoids the trampolines of `tp_btf`, at a higher cost
    #[arg(
        long,
        value_name = "HOW",
        default_value = "auto",
        env = "WHYDROP_ATTACH",
        help_heading = "Kernel"
    )]
    pub attach: Attach,
}

impl AgentArgs {
    /// `--node-name`, else `$NODE_NAME`, else the host name.
    ///
    /// # Errors
    /// If there is none of them.
    pub fn node_name(&self) -> anyhow::Result<String> {
        let given = self.node_name.clone().into_iter();
        let name = given
            .chain(std::env::var("NODE_NAME").ok())
            .chain(
                nix::unistd::gethostname()
                    .ok()
                    .and_then(|n| n.into_string().ok()),
            )
            .find(|name| !name.is_empty());
        name.ok_or_else(|| anyhow::anyhow!("this host has no name; give the agent --node-name"))
    }
}

/// Whether something is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// It is.
    On,
    /// It is not.
    Off,
}

/// Whether something is watched where it can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AutoOff {
    /// Where it can be.
    Auto,
    /// Nowhere.
    Off,
}

/// A duration that attempts can wait for: with less than 10 ms, answers from across a network come
/// too late; with more than an hour, the kernel has given up before (tcp_syn_retries).
fn timeout(s: &str) -> Result<Duration, String> {
    let limits = Duration::from_millis(10)..=Duration::from_secs(3600);
    let timeout = duration(s)?;
    if limits.contains(&timeout) {
        Ok(timeout)
    } else {
        Err("expected 10ms to 1h".to_owned())
    }
}

/// Where names come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cluster {
    /// A cluster if there is one and no files stand for it.
    Auto,
    /// The API server.
    Kube,
    /// No cluster.
    None,
}

fn listen(s: &str) -> Result<SocketAddr, &'static str> {
    s.parse()
        .map_err(|_| "expected an address and a port, as 127.0.0.1:9742 or [::1]:9742")
}

/// How finely series name the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Labels {
    /// Each pod.
    Pod,
    /// Only what runs the pods.
    Workload,
    /// Only their namespaces.
    Namespace,
}

/// Flags of `whydrop check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// How it is shown
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        default_value = "text",
        env = "WHYDROP_OUTPUT"
    )]
    pub output: ReportOutput,
}

/// How a report is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReportOutput {
    /// For people.
    Text,
    /// For scripts.
    Json,
}

/// Parses the command line, its program name first; flags may stand before the command. As
/// `kubectl-whydrop` the binary is a plugin of kubectl and calls itself so.
///
/// # Errors
/// What clap says, also for `--help`; its exit code is 2 for wrong usage.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let args: Vec<_> = args.into_iter().collect();
    let program = args.first().map(PathBuf::from);
    let name = program.as_deref().and_then(|p| p.file_name()?.to_str());
    let mut command = Cli::command();
    if name.is_some_and(|n| n.starts_with("kubectl-whydrop")) {
        command = command.bin_name("kubectl whydrop");
    }
    let args = before::put_behind(&command, args);
    let matches = command.try_get_matches_from_mut(args)?;
    Cli::from_arg_matches(&matches).map_err(|e| e.format(&mut command))
}

#[cfg(test)]
mod tests;
