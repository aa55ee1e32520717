//! `whydrop tail`: the drops of a running agent, as they happen or afterwards.

use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use http_body_util::BodyExt as _;
use hyper::StatusCode;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::io::Interest;
use tokio::net::unix::pipe;

use crate::cli::client::{self, ClientError};
use crate::cli::config::{Color, Output, TailArgs};
use crate::cli::format::{Format, TimeFormat};
use crate::output::query::{Query, Since};

/// How many events a terminal begins with, as tail(1) does: an empty screen helps nobody.
const TERMINAL_LAST: usize = 10;

/// Between two tries to reach an agent that went away: doubling, since a restart takes a moment
/// and an upgrade a minute.
const RETRY: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(2);

/// No line is longer, DNS name, policies and fixes included; what sends more is no agent.
const MAX_LINE_BYTES: usize = 1 << 20;

/// Prints until the agent's answer ends, or until the pipe behind stdout is closed.
///
/// # Errors
/// If no agent answers, or stdout cannot be written.
pub fn run(args: TailArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        tokio::select! {
            result = tail(args) => result,
            () = closed(io::stdout()) => Ok(()),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn tail(args: TailArgs) -> anyhow::Result<()> {
    let terminal = io::stdout().is_terminal();
    let mut query = Query {
        follow: args.follow || (terminal && args.last.is_none()),
        last: match (args.last, args.since) {
            (None, None) if terminal => Some(TERMINAL_LAST),
            (last, _) => last,
        },
        since: args.since,
        selection: args.selection.0,
    };
    let mut printer = Printer::new(args.output, args.color, args.time_format);
    let mut connected = None;
    let mut pause = *RETRY.start();
    let mut away = false;
    loop {
        let target = format!("/v1/drops?{}", query.to_query_string());
        let result = match client::get(&args.socket, &target).await {
            Ok(answer) => {
                connected.get_or_insert_with(Timestamp::now);
                if away {
                    eprintln!("whydrop: the agent on {} is back", args.socket.display());
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
                    let socket = args.socket.display();
                    eprintln!("whydrop: the agent on {socket} went away; waiting for it");
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

struct Printer {
    format: Format,
    /// The time of the latest event that was printed.
    seen: Option<Timestamp>,
    /// A line that could not be read was told of.
    told: bool,
}

impl Printer {
    fn new(output: Output, color: Color, time: Option<TimeFormat>) -> Self {
        let color = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                let unset = |name| std::env::var_os(name).is_none_or(|v| v.is_empty());
                let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
                io::stdout().is_terminal() && unset("NO_COLOR") && !dumb
            }
        };
        let default = match output {
            Output::Wide => TimeFormat::Rfc3339,
            _ => TimeFormat::Short,
        };
        let format = Format {
            output,
            color,
            time: time.unwrap_or(default),
            zone: TimeZone::system(),
        };
        Self {
            format,
            seen: None,
            told: false,
        }
    }

    /// Prints the lines of an answer as they come, each chunk at once.
    async fn print(&mut self, mut body: hyper::body::Incoming) -> Result<(), End> {
        let mut pending = Vec::new();
        while let Some(frame) = body.frame().await {
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
            let text = self.text(&String::from_utf8_lossy(&lines));
            match Stdout.write(text.as_bytes()).map_err(End::Other)? {
                Written::All => {}
                Written::Closed => return Err(End::Closed),
            }
        }
        Ok(())
    }

    fn text(&mut self, lines: &str) -> String {
        let now = Timestamp::now();
        let mut text = String::new();
        for line in lines.lines() {
            match self.format.line(line, now) {
                Ok(shown) => text += &shown,
                Err(error) if !self.told => {
                    self.told = true;
                    eprintln!(
                        "whydrop: the agent sent a line that this whydrop cannot read ({error}); \
                         are both of the same version? Such lines are left out"
                    );
                }
                Err(_) => {}
            }
            if let Ok(event) = serde_json::from_str::<Seen>(line) {
                self.seen = self.seen.max(Some(event.time));
            }
        }
        text
    }
}

/// Standard output, written and flushed at once.
pub struct Stdout;

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It was written.
    All,
    /// Nobody reads any more (`tail | head`): no error, and a reason to end.
    Closed,
}

impl Stdout {
    /// Writes all of it.
    ///
    /// # Errors
    /// A full disk and the like, in one sentence.
    pub fn write(&self, bytes: &[u8]) -> anyhow::Result<Written> {
        let mut stdout = io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            Ok(()) => Ok(Written::All),
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(Written::Closed),
            Err(e) => Err(e).context("could not write to standard output"),
        }
    }
}

/// Returns when nobody reads the pipe or socket any more; for files, and terminals that stay,
/// never. So `tail -f | head -1` ends at once, not with the next drop.
async fn closed(output: impl AsFd) {
    // A descriptor of its own, which is only waited on and never written: so the mode of the
    // shared pipe stays as it is. A file cannot be waited on, and is never closed by a reader.
    let output = output.as_fd().try_clone_to_owned();
    if let Ok(pipe) = output.and_then(|fd| pipe::Sender::from_file_unchecked(fd.into()))
        && pipe.ready(Interest::ERROR).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
