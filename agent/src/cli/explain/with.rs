//! `--with`: which of the connections that are there now would proposed policies deny?
//!
//! | file | what |
//! |---|---|
//! | `proposal.rs` | the proposed policies out of files |
//! | `seen.rs` | the connections that agents see |
//! | `agents.rs` | those of all agents of a cluster |
//! | `report.rs` | what becomes of them, by pair of workloads |
//! | `show.rs` | how that looks |

use std::io::Write;

use anyhow::{Context as _, Result, bail};

use self::report::Report;
use super::{ALLOWED, DENIED, ERROR, pretty, source, yaml};
use crate::cli::config::{ExplainArgs, ExplainOutput};
use crate::cli::format::clean_lines;
use crate::cluster::ObjectKind;
use crate::cluster::watch::KINDS;

mod agents;
mod proposal;
mod report;
mod seen;
mod show;

/// 1 if a connection would be denied or would depend on the CNI, 2 if nobody could look at connections.
pub fn run(args: &ExplainArgs, out: &mut impl Write) -> Result<u8> {
    // What is cheap to refuse comes first.
    let proposed = proposal::read(&args.with)?;
    let ground = source::ground(args)?;
    if let Some(kind) = KINDS.into_iter().find(|kind| hangs_on(*kind, &ground)) {
        let why = ground.missing.why(kind).unwrap_or_default();
        bail!("{why}; without them proposed policies cannot be judged");
    }
    let proposed = proposed.without(&args.without, &ground.world)?;
    let seen = seen::collect(args, &ground.world)?;
    let report = Report::of(&ground, &proposed, &seen);
    let text = match args.output {
        ExplainOutput::Text => clean_lines(&show::text(&report)),
        ExplainOutput::Json => pretty(&show::json(&report))?,
        ExplainOutput::Yaml => yaml(&show::json(&report))?,
    };
    out.write_all(text.as_bytes())
        .context("cannot write the report")?;
    Ok(match (report.groups.is_empty(), report.is_blind()) {
        (false, _) => DENIED,
        (true, true) => ERROR,
        (true, false) => ALLOWED,
    })
}

/// Whether a kind is missing without which every verdict is open.
fn hangs_on(kind: ObjectKind, ground: &crate::answer::Ground) -> bool {
    let decides = !matches!(kind, ObjectKind::Service | ObjectKind::EndpointSlice);
    decides && ground.missing.why(kind).is_some()
}
