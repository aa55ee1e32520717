//! `whydrop check`: what this kernel and these privileges allow, in plain words.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::cli::config::{CheckArgs, ReportOutput};
use crate::cli::sentence;
use crate::source::accept_queues;
use crate::source::cgroups::{self, Cgroups};
use crate::source::hooks::{self, Attach, DROPS, SourceStatus};
use crate::source::symbols::Locator;
use crate::source::{load, lockdown};

/// Maps large enough for every program to load; nothing is counted for longer than the check takes.
const OPTIONS: load::Options = load::Options {
    map_memory_bytes: 4 << 20,
    attach: Attach::Auto,
    log: false,
    syn_timeout: Duration::from_secs(3),
    dns_timeout: Duration::from_secs(2),
    dns: true,
    conntrack: true,
};

/// Loads and attaches every program, takes them off again, and prints what could be done. The exit
/// code is 0 if drops can be observed, else 1.
///
/// # Errors
/// If the report cannot be written.
pub fn run(args: CheckArgs) -> Result<ExitCode> {
    let (sources, problem) = match load::load(OPTIONS) {
        Ok(loaded) => {
            let drops = loaded.sources.iter().find(|s| s.source == DROPS && !s.up);
            (loaded.sources.clone(), drops.and_then(|s| s.why.clone()))
        }
        Err(error) => (Vec::new(), Some(sentence(&error))),
    };
    let mut sources = sources;
    sources.push(Locator::new().status());
    sources.push(accept_queues::probe());
    sources.push(Cgroups::open().status());
    let report = match args.output {
        ReportOutput::Text => text(&sources, problem.as_deref()),
        ReportOutput::Json => {
            let report = json!({
                "observable": problem.is_none(),
                "why": problem,
                "kernel": kernel(),
                "lockdown": lockdown::mode(),
                "sources": sources,
            });
            serde_json::to_string_pretty(&report).context("cannot write the report")? + "\n"
        }
    };
    std::io::stdout()
        .write_all(report.as_bytes())
        .context("cannot write the report")?;
    Ok(if problem.is_none() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What each source is, for someone who has not read the design.
fn meaning(source: &str) -> &'static str {
    match source {
        DROPS => "see every packet that the kernel drops",
        "told" => "see which dropped packets were answered by a TCP reset or ICMP",
        "neighbour" => "know at once that an answer will come late",
        hooks::CONNECTS => "see TCP connects that hang",
        hooks::CONNECT_ERRORS => "see connects that ICMP refused",
        hooks::CONNTRACK_DEATHS => "see at once that a forwarded connection ended unanswered",
        hooks::DNS => "see DNS queries that nobody answers",
        load::SERVICES => "name the Service of a packet that DNAT changed",
        load::REASONS_SOURCE => "say the kernel's own reason for a drop",
        "locations" => "say in which kernel function a packet was dropped",
        accept_queues::SOURCE => "count connections lost to a full accept queue",
        cgroups::SOURCE => "tell host-network pods apart by their cgroups",
        _ => "",
    }
}

fn text(sources: &[SourceStatus], problem: Option<&str>) -> String {
    let mut text = match problem {
        None => "Drops can be observed on this node.\n".to_owned(),
        Some(problem) => format!("Drops CANNOT be observed on this node: {problem}\n"),
    };
    text += &format!("kernel {}", kernel());
    if let Some(lockdown) = lockdown::mode().filter(|mode| mode != "none") {
        text += &format!(", lockdown={lockdown}");
    }
    text += "\n\n";
    for source in sources {
        let mark = if source.up { "ok " } else { "NO " };
        text += &format!(
            "  {mark} {:<22} {}\n",
            source.source,
            meaning(source.source)
        );
        if let Some(hook) = &source.hook {
            text += &format!("      {:<22} by {hook}\n", "");
        }
        if let Some(why) = &source.why {
            let word = if source.up { "but" } else { "why not" };
            text += &format!("      {:<22} {word}: {why}\n", "");
        }
        if let Some(lost) = source.lost {
            text += &format!("      {:<22} without it: {lost}\n", "");
        }
    }
    text
}

fn kernel() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_is_explained_and_a_loss_is_said() {
        let source = |source, up: bool| SourceStatus {
            source,
            up,
            hook: up.then(|| "tp_btf/kfree_skb".to_owned()),
            why: (!up).then(|| "not permitted".to_owned()),
            lost: (!up).then_some("no drop is observed"),
        };
        let good = text(&[source(DROPS, true)], None);
        assert!(good.starts_with("Drops can be observed"), "{good}");
        assert!(good.contains("by tp_btf/kfree_skb"));
        let bad = text(&[source(DROPS, false)], Some("no BTF"));
        assert!(bad.contains("CANNOT") && bad.contains("no BTF"), "{bad}");
        assert!(bad.contains("without it: no drop is observed"));
        for name in [
            DROPS,
            "told",
            "neighbour",
            load::SERVICES,
            load::REASONS_SOURCE,
            "locations",
            hooks::CONNECTS,
            hooks::CONNECT_ERRORS,
            hooks::DNS,
            hooks::CONNTRACK_DEATHS,
            accept_queues::SOURCE,
            cgroups::SOURCE,
        ] {
            assert!(!meaning(name).is_empty(), "{name}");
        }
    }
}
