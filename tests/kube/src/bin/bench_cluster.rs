//! `cargo xtask bench cluster`: what an agent takes that follows a cluster, and what it costs the API
//! server. Called by itself it takes the parts to measure: `lookup`, `large`, `real`, or `churn`, which is
//! `real` without the calm minutes.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use whydrop_kube_tests::bench::{large, lookup, real};
use whydrop_tests::bench::report::{Report, Verdict};

fn main() -> ExitCode {
    let mut report = Report::new(
        "cluster",
        "an agent in a cluster: memory, CPU, look-ups, and what it asks of the API server",
    );
    let result = run(&mut report);
    println!("{}", report.table());
    let written = directory().and_then(|directory| report.write(&directory));
    if let Some(error) = result.err().or(written.err()) {
        eprintln!("bench: {error:#}");
        return ExitCode::FAILURE;
    }
    let is_wrong =
        |figure: &whydrop_tests::bench::report::Figure| figure.verdict() == Verdict::Wrong;
    match report.figures().iter().any(is_wrong) {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

fn run(report: &mut Report) -> Result<()> {
    let parts: Vec<String> = std::env::args().skip(1).collect();
    let is_asked = |part: &str| parts.is_empty() || parts.iter().any(|asked| asked == part);
    if is_asked("lookup") {
        lookup::measure(report);
    }
    if is_asked("large") {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        runtime.block_on(large::measure(report)).context("large")?;
    }
    let calm = match (is_asked("real"), is_asked("churn")) {
        (true, _) => Some(real::CALM),
        (false, true) => None,
        (false, false) => return Ok(()),
    };
    // Children end with the thread that started them, and here that is this one.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime
        .block_on(real::measure(report, calm))
        .context("real")
}

/// `target/bench`, beside the directory of this program.
fn directory() -> Result<std::path::PathBuf> {
    let here = std::env::current_exe().context("find this program's own path")?;
    let target = here.ancestors().nth(2).map(Path::to_owned);
    Ok(target
        .context("this program is in no target directory")?
        .join("bench"))
}
