//! `cargo xtask bench [NAME]`: the benchmarks; see `whydrop_tests::bench`.
//!
//! Ends with 1 if a count is wrong. A speed that is not reached is printed as `MISSED`: what a
//! machine reaches is its own.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use whydrop_tests::agent;
use whydrop_tests::bench::report::{Report, Verdict};
use whydrop_tests::bench::{ALL, Benchmark};

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("bench: a count is wrong");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs what was asked for; `false` if a count is wrong.
fn run() -> Result<bool> {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let wanted: Vec<&Benchmark> = match names.as_slice() {
        [] => ALL.iter().collect(),
        [name] => {
            let known: Vec<&str> = ALL.iter().map(|benchmark| benchmark.name).collect();
            let found = ALL.iter().find(|benchmark| benchmark.name == name);
            vec![found.with_context(|| format!("no benchmark {name}: {}", known.join(", ")))?]
        }
        _ => bail!("give one name, or none for all"),
    };
    agent::binary()?;
    if cfg!(debug_assertions) {
        eprintln!("bench: this is a debug build; its speeds mean nothing");
    }
    let directory = directory()?;
    let mut reports = Vec::new();
    let mut failed = Vec::new();
    for benchmark in wanted {
        let mut report = Report::new(benchmark.name, benchmark.about);
        let result = (benchmark.run)(&mut report);
        println!("{}", report.table());
        let path = report.write(&directory)?;
        println!("  {}", path.display());
        if let Err(error) = result {
            eprintln!("bench: {}: {error:#}", benchmark.name);
            failed.push(benchmark.name);
        }
        reports.push(report);
    }
    if reports.len() > 1 {
        println!("{}", Report::summary(&reports));
    }
    if !failed.is_empty() {
        bail!("could not be measured: {}", failed.join(", "));
    }
    let mut figures = reports.iter().flat_map(Report::figures);
    Ok(!figures.any(|figure| figure.verdict() == Verdict::Wrong))
}

/// `target/bench`, beside the directory of this program.
fn directory() -> Result<PathBuf> {
    let here = std::env::current_exe().context("find this program's own path")?;
    let target = here
        .ancestors()
        .nth(2)
        .context("this program is in no target directory")?;
    Ok(target.join("bench"))
}
