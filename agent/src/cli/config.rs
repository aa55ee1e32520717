//! Every flag of every command. Each has an environment variable `WHYDROP_<FLAG>`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::error::ErrorKind;
use clap::{
    Arg, ArgAction, ArgMatches, Args, CommandFactory as _, FromArgMatches, Parser, Subcommand,
    ValueEnum,
};

pub use self::explain::{ConnectionsArgs, ExplainArgs, ExplainOutput, From};
use crate::cli::format::TimeFormat;
use crate::cli::units::{Size, duration};
use crate::cluster::watch::Reach;
use crate::output::query::Since;
use crate::selection::{Flag, Selection};
use crate::source::load::Attach;

mod explain;

/// Where the agent's local API is, unless `--socket` says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/whydrop/agent.sock";

/// Why does this connection hang? Sees every packet that this node's kernel drops, and names the
/// pods.
#[derive(Debug, Parser)]
#[command(name = "whydrop", version, max_term_width = 100)]
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
    /// Show the drops of a running agent, as they happen or afterwards
    Tail(TailArgs),
    /// Explain what the NetworkPolicies say of a connection, and mend what is missing
    Explain(ExplainArgs),
    /// Show the connections of an agent's node, one JSON object a line, for explain --connections
    Connections(ConnectionsArgs),
    /// Show what a running agent says of itself: sources, sizes, losses
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

/// Flags of `whydrop tail`.
#[derive(Debug, Args)]
#[command(
    after_help = "A selection repeated is OR, different ones are AND. --not takes out what \
                        the one selection behind it matches: --not --to-pod kube-system/coredns. \
                        Lines about losses are always shown."
)]
pub struct TailArgs {
    /// Which events
    #[command(flatten)]
    pub selection: SelectionArgs,

    /// Begin with the last N events [default: on a terminal 10, else all that the agent keeps, or
    /// none with --follow]
    #[arg(long, value_name = "N", env = "WHYDROP_LAST", help_heading = "Range")]
    pub last: Option<usize>,

    /// Begin with events of this age or time: 90s, 1h30m, 2026-11-22T12:03:00Z
    #[arg(
        long,
        value_name = "DURATION|TIME",
        env = "WHYDROP_SINCE",
        help_heading = "Range"
    )]
    pub since: Option<Since>,

    /// Go on with events as they happen [default: on a terminal without --last]
    #[arg(short, long, env = "WHYDROP_FOLLOW", value_parser = BoolishValueParser::new(),
          help_heading = "Range")]
    pub follow: bool,

    /// How an event looks: one line, one line with all that is known, JSON or YAML
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        default_value = "compact",
        env = "WHYDROP_OUTPUT",
        help_heading = "Output"
    )]
    pub output: Output,

    /// Colours; `auto` is on a terminal without $NO_COLOR
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "auto",
        env = "WHYDROP_COLOR",
        help_heading = "Output"
    )]
    pub color: Color,

    /// Times of compact and wide: `short` (12:03:10.512 local), `local` (with date and offset),
    /// `rfc3339` (UTC, nanoseconds), `relative`, or a strftime format as `%H:%M:%S%.6f`
    /// [default: short, wide: rfc3339]
    #[arg(
        long,
        value_name = "FORMAT",
        env = "WHYDROP_TIME_FORMAT",
        help_heading = "Output"
    )]
    pub time_format: Option<TimeFormat>,

    /// The agent's local API
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, env = "WHYDROP_SOCKET",
          help_heading = "Agent")]
    pub socket: PathBuf,
}

/// How `whydrop tail` shows an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// One line.
    Compact,
    /// One line with all that is known.
    Wide,
    /// One JSON object a line.
    Json,
    /// One YAML document an event.
    Yaml,
}

/// When there are colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless `NO_COLOR` is set.
    Auto,
    /// Also into files.
    Always,
    /// Nowhere.
    Never,
}

/// Flags of `whydrop status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// How it is shown
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        default_value = "text",
        env = "WHYDROP_OUTPUT"
    )]
    pub output: ReportOutput,

    /// The agent's local API
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, env = "WHYDROP_SOCKET")]
    pub socket: PathBuf,
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

/// The flags of [`Flag::ALL`] and `--not`, whose meaning hangs on their order.
#[derive(Debug, Default)]
pub struct SelectionArgs(pub Selection);

impl Args for SelectionArgs {
    fn augment_args(cmd: clap::Command) -> clap::Command {
        let heading = "Selection";
        let not = Arg::new("not")
            .long("not")
            .help("Negates the selection behind it")
            .action(ArgAction::Append)
            .num_args(0)
            .default_missing_value("true")
            .help_heading(heading);
        Flag::ALL
            .into_iter()
            .map(|flag| {
                let name = flag.name();
                let arg = Arg::new(name)
                    .long(name)
                    .value_name(flag.value_name())
                    .help(flag.help())
                    .action(ArgAction::Append)
                    .env(format!("WHYDROP_{}", name.replace('-', "_").to_uppercase()))
                    .help_heading(heading);
                if flag == Flag::Namespace {
                    arg.short('n')
                } else {
                    arg
                }
            })
            .fold(cmd, clap::Command::arg)
            .arg(not)
    }

    fn augment_args_for_update(cmd: clap::Command) -> clap::Command {
        Self::augment_args(cmd)
    }
}

impl FromArgMatches for SelectionArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let wrong = |what: String| clap::Error::raw(ErrorKind::ValueValidation, what + "\n");
        // clap counts a flag and its value as two indices.
        let mut nots: Vec<usize> = matches.indices_of("not").into_iter().flatten().collect();
        let mut flags = Vec::new();
        for flag in Flag::ALL {
            let values = matches
                .get_many::<String>(flag.name())
                .into_iter()
                .flatten();
            let typed =
                matches.value_source(flag.name()) == Some(clap::parser::ValueSource::CommandLine);
            let indices = matches.indices_of(flag.name()).into_iter().flatten();
            for (value, index) in values.zip(indices) {
                let not = nots.iter().position(|not| typed && not + 2 == index);
                flags.push((
                    index,
                    not.map(|i| nots.swap_remove(i)).is_some(),
                    flag,
                    value,
                ));
            }
        }
        if !nots.is_empty() {
            return Err(wrong(
                "--not negates the selection behind it, and there is none".into(),
            ));
        }
        flags.sort_by_key(|(index, ..)| *index);
        Selection::new(
            flags
                .into_iter()
                .map(|(_, not, flag, value)| (not, flag, value)),
        )
        .map(Self)
        .map_err(|e| wrong(format!("--{e}")))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Parses the command line, its program name first. As `kubectl-whydrop` the binary is a plugin
/// of kubectl and calls itself so.
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
    let matches = command.try_get_matches_from_mut(args)?;
    Cli::from_arg_matches(&matches).map_err(|e| e.format(&mut command))
}

#[cfg(test)]
mod tests;
