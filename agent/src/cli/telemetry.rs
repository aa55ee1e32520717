//! The program's own log: to stderr, as text on a terminal and as JSON elsewhere.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::cli::config::{Command, LogFormat};

/// Starts logging. `verbose` is how often `-v` was given; `RUST_LOG`, where it is set, wins.
pub fn start(verbose: u8, format: Option<LogFormat>, command: &Command) {
    let level = match (command, verbose) {
        (Command::Agent(_), 0) => "info",
        // What a person reads is on stdout; the log is for what goes wrong.
        // Requests that fail are said by who made them.
        (_, 0) => "warn,kube_client=off,kube_runtime=off",
        (_, 1) => "whydrop=debug,info",
        (_, 2) => "whydrop=trace,debug",
        (_, _) => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let terminal = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Of a log that cannot be written (a full disk) nothing can be said, and trying it would panic.
        .log_internal_errors(false)
        .with_ansi(terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()));
    let started = match format {
        Some(LogFormat::Text) => log.try_init(),
        Some(LogFormat::Json) => log.json().try_init(),
        None if terminal => log.try_init(),
        None => log.json().try_init(),
    };
    // Fails only if there is a logger already, which then serves.
    drop(started);
}
