//! Flags of `whydrop tail` and `whydrop status`.

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use std::time::Duration;

use super::agents::AgentsArgs;
use super::selection::SelectionArgs;
use super::{ReportOutput, duration};
use crate::cli::format::TimeFormat;
use crate::output::query::Since;

/// Flags of `whydrop tail`.
#[derive(Debug, Args)]
#[command(
    after_help = "A selection repeated is OR, different ones are AND. --not takes out what \
                        the one selection behind it matches: --not --to-pod kube-system/coredns. \
                        Lines about losses are always shown. Of a cluster's agents each is asked \
                        through the API server, by running `whydrop tail` in its pod: you need to \
                        list and watch pods and to create pods/exec in their namespace. The exit \
                        code without --follow is 0 if every agent answered, else 1."
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

    /// Also an empty line this often, as a sign of life for a reader that is far away
    #[arg(long, value_name = "DURATION", value_parser = duration, env = "WHYDROP_HEARTBEAT",
          hide = true)]
    pub heartbeat: Option<Duration>,

    /// Which agents
    #[command(flatten)]
    pub agents: AgentsArgs,
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
#[command(
    after_help = "The exit code is 0 if every agent answered, else 1; what does not work on a node is \
                        in its row."
)]
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

    /// Only agents on these nodes; * stands for anything; may be repeated
    #[arg(
        long,
        value_name = "NODE",
        env = "WHYDROP_NODE_NAME",
        help_heading = "Agents"
    )]
    pub node_name: Vec<String>,

    /// Which agents
    #[command(flatten)]
    pub agents: AgentsArgs,
}
