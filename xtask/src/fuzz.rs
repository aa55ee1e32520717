//! `cargo xtask fuzz`: each target of fuzz/ for a bounded time, by cargo-fuzz.

use std::fs;

use anyhow::{Context as _, Result, bail};

use crate::{
    command::{cargo, command, find, root, run as execute},
    setup::{self, Need},
};

#[derive(clap::Args)]
pub struct Args {
    /// Seconds for each target
    #[arg(default_value_t = 60)]
    seconds: u32,
}

/// Sets up and runs every target with optimisation.
pub fn run(args: &Args) -> Result<()> {
    let found = setup::run()?;
    found.ready_to_build()?;
    if let Some(reason) = found.lacks(Need::Fuzz) {
        bail!("cannot fuzz here: {reason}");
    }
    targets(args.seconds, &["--release", "--debug-assertions"])
}

/// Runs every target without optimisation, which is built sooner: the short run of the tests.
pub fn quick(seconds: u32) -> Result<()> {
    targets(seconds, &["--dev"])
}

fn targets(seconds: u32, profile: &[&str]) -> Result<()> {
    if find("cargo-fuzz").is_none() {
        // Only a launcher: that it is not optimised costs nothing.
        execute(cargo("install").args(["cargo-fuzz", "--debug"]))?;
    }
    let folder = root().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
        names.extend(entry?.path().file_stem().map(ToOwned::to_owned));
    }
    names.sort();
    for name in names {
        // What is found goes into the corpus, the seeds are only read. The corpus is made first,
        // because libFuzzer writes into the first folder that it is given.
        let corpus = root().join("fuzz/corpus").join(&name);
        fs::create_dir_all(&corpus).with_context(|| format!("making {}", corpus.display()))?;
        let seeds = root().join("fuzz/seeds").join(&name);
        execute(
            // What is fuzzed is safe code: a panic is what to look for, and without a sanitizer no
            // nightly compiler is needed.
            command("cargo")
                .args(["fuzz", "run", "--sanitizer=none", "--features=libfuzzer"])
                .args(profile)
                .arg(&name)
                .arg(&corpus)
                .args(seeds.is_dir().then_some(&seeds))
                .args(["--", "-timeout=5", &format!("-max_total_time={seconds}")]),
        )?;
    }
    Ok(())
}
