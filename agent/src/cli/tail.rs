//! `whydrop tail`: the drops of a running agent or of all agents of a cluster, as they happen or afterwards.
//! Of a cluster's agents this runs in each pod; `cluster/` runs it there.

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::StatusCode;
use jiff::Timestamp;
use tokio::time::Interval;

use crate::cli::client::{self, ClientError};
use crate::cli::cluster::kubeconfig::{Target, target};
use crate::cli::cluster::lines::MAX_LINE_BYTES;
use crate::cli::cluster::{Agents, follow};
use crate::cli::config::TailArgs;
use crate::cli::printer::{Printer, Stdout, Written, closed};
use crate::cli::say;
use crate::output::query::{Query, Since};

/// How many events a terminal begins with, as tail(1) does: an empty screen helps nobody.
const TERMINAL_LAST: usize = 10;

/// Between two tries to reach an agent that went away: doubling, since a restart takes a moment
/// and an upgrade a minute.
const RETRY: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(2);

/// Prints until the agents' answers end, or until the pipe behind stdout is closed.
///
/// # Errors
/// If no agent answers, or stdout cannot be written.
pub fn run(args: TailArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        tokio::select! {
            result = tail(args) => result,
            () = closed(io::stdout()) => Ok(ExitCode::SUCCESS),
        }
    });
    // Waits for no credential plugin that waits for somebody.
    runtime.shutdown_background();
    result
}

async fn tail(mut args: TailArgs) -> anyhow::Result<ExitCode> {
    match target(&args.agents).await? {
        Target::Local(socket) => {
            local(args, &socket).await?;
            Ok(ExitCode::SUCCESS)
        }
        Target::Cluster(account) => {
            let selection = std::mem::take(&mut args.selection.0);
            let agents = Agents::new(*account, &args.agents, selection)?;
            follow::tail(agents, args).await
        }
    }
}

/// The part of the stream that the flags ask for, everything selected.
pub fn range(args: &TailArgs, terminal: bool) -> Query {
    Query {
        follow: args.follow || (terminal && args.last.is_none()),
        last: match (args.last, args.since) {
            (None, None) if terminal => Some(TERMINAL_LAST),
            (last, _) => last,
        },
        since: args.since,
        ..Query::default()
    }
}

async fn local(mut args: TailArgs, socket: &Path) -> anyhow::Result<()> {
    let mut query = Query {
        selection: std::mem::take(&mut args.selection.0),
        ..range(&args, io::stdout().is_terminal())
    };
    let mut printer = LocalPrinter::new(&args);
    let mut connected = None;
    let mut pause = *RETRY.start();
    let mut away = false;
    loop {
        let target = format!("/v1/drops?{}", query.to_query_string());
        let result = match client::get(socket, &target).await {
            Ok(answer) => {
                connected.get_or_insert_with(Timestamp::now);
                if away {
                    say(format_args!("the agent on {} is back", socket.display()));
                }
                (away, pause) = (false, *RETRY.start());
                printer.print(answer.into_body()).await
            }
            Err(error) => Err(End::Agent(error)),
        };
        match (result, connected) {
            (Err(End::Closed), _) => return Ok(()),
            (Err(End::Other(error)), _) => return Err(error),
            (Ok(()), _) if !query.follow => return Ok(()),
            (Err(End::Agent(error)), None) => return Err(error.into()),
            (Err(End::Agent(error)), _) if !query.follow || error.is_final() => {
                return Err(error.into());
            }
            (_, Some(connected)) => {
                if !away {
                    let socket = socket.display();
                    say(format_args!(
                        "the agent on {socket} went away; waiting for it"
                    ));
                }
                away = true;
                // Where this reader was, also with an agent that was only out of reach.
                query.last = None;
                let seen = printer.seen.map(|t| t + Duration::from_nanos(1));
                query.since = Some(Since::At(seen.unwrap_or(connected)));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(*RETRY.end());
            }
            // An answer that ended makes it `Some`.
            (Ok(()), None) => return Ok(()),
        }
    }
}

impl ClientError {
    /// Whether the same question will get the same answer.
    fn is_final(&self) -> bool {
        matches!(self, Self::Refused(status, _) if *status != StatusCode::SERVICE_UNAVAILABLE)
    }
}

/// Why printing ended.
enum End {
    /// The connection broke.
    Agent(ClientError),
    /// Nobody reads what we print.
    Closed,
    /// Anything else.
    Other(anyhow::Error),
}

/// The one field of an event that a reader needs to find its place again.
#[derive(serde::Deserialize)]
struct Seen {
    time: Timestamp,
}

/// Prints one agent's answers, and knows how far they came.
struct LocalPrinter {
    printer: Printer,
    /// The time of the latest event that was printed.
    seen: Option<Timestamp>,
    heartbeat: Option<Duration>,
}

impl LocalPrinter {
    fn new(args: &TailArgs) -> Self {
        Self {
            printer: Printer::new(args, false),
            seen: None,
            heartbeat: args.heartbeat,
        }
    }

    /// Prints the lines of an answer as they come, each chunk at once.
    async fn print(&mut self, mut body: hyper::body::Incoming) -> Result<(), End> {
        let mut heartbeat = self.heartbeat.map(tokio::time::interval);
        let mut pending = Vec::new();
        loop {
            let frame = tokio::select! {
                frame = body.frame() => frame,
                () = tick(&mut heartbeat) => {
                    write("\n")?;
                    continue;
                }
            };
            let Some(frame) = frame else {
                return Ok(());
            };
            let frame = frame.map_err(|e| End::Agent(e.into()))?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            pending.extend_from_slice(&data);
            let Some(end) = pending.iter().rposition(|&b| b == b'\n') else {
                if pending.len() > MAX_LINE_BYTES {
                    return Err(End::Other(anyhow::anyhow!(
                        "the agent sent a line of more than {MAX_LINE_BYTES} bytes; is it one?"
                    )));
                }
                continue;
            };
            let rest = pending.split_off(end + 1);
            let lines = std::mem::replace(&mut pending, rest);
            let lines = String::from_utf8_lossy(&lines);
            write(&self.printer.text(lines.lines()))?;
            for line in lines.lines() {
                if let Ok(event) = serde_json::from_str::<Seen>(line) {
                    self.seen = self.seen.max(Some(event.time));
                }
            }
        }
    }
}

/// The first one is at once.
async fn tick(heartbeat: &mut Option<Interval>) {
    match heartbeat {
        Some(heartbeat) => _ = heartbeat.tick().await,
        None => std::future::pending().await,
    }
}

fn write(text: &str) -> Result<(), End> {
    match Stdout.write(text.as_bytes()).map_err(End::Other)? {
        Written::All => Ok(()),
        Written::Closed => Err(End::Closed),
    }
}
