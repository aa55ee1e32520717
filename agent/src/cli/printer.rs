//! Standard output as `tail` uses it: lines in their format, at once, until nobody reads any more.

use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd;

use anyhow::Context as _;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::io::Interest;
use tokio::net::unix::pipe;

use crate::cli::config::{Color, Output, TailArgs};
use crate::cli::format::{Format, TimeFormat};
use crate::cli::say;

/// Lines of agents as a person or a script wants them.
pub struct Printer {
    format: Format,
    /// A line that could not be read was told of.
    told: bool,
}

impl Printer {
    /// As the flags say; `node`: lines name the node that they come from.
    pub fn new(args: &TailArgs, node: bool) -> Self {
        let color = match args.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                let unset = |name| std::env::var_os(name).is_none_or(|v| v.is_empty());
                let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
                io::stdout().is_terminal() && unset("NO_COLOR") && !dumb
            }
        };
        let default = match args.output {
            Output::Wide => TimeFormat::Rfc3339,
            _ => TimeFormat::Short,
        };
        let format = Format {
            output: args.output,
            color,
            time: args.time_format.clone().unwrap_or(default),
            zone: TimeZone::system(),
            node,
        };
        Self {
            format,
            told: false,
        }
    }

    /// The text for lines of the API.
    pub fn text<'a>(&mut self, lines: impl IntoIterator<Item = &'a str>) -> String {
        let now = Timestamp::now();
        let mut text = String::new();
        for line in lines {
            match self.format.line(line, now) {
                Ok(shown) => text += &shown,
                Err(error) if !self.told => {
                    self.told = true;
                    say(format_args!(
                        "the agent sent a line that this whydrop cannot read ({error}); \
                         are both of the same version? Such lines are left out"
                    ));
                }
                Err(_) => {}
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
pub async fn closed(output: impl AsFd) {
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
