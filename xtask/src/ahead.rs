//! What later groups need and what takes long to build, built while the first ones run, in what they leave of the
//! machine.

use std::{
    env,
    fs::File,
    path::PathBuf,
    process::{Child, Stdio},
};

use anyhow::{Context as _, Result};

use crate::{
    architecture::Architecture,
    build,
    command::{command, find},
    kube, prometheus, vm,
};

#[derive(clap::Args)]
pub struct Args {
    /// What the group vm needs
    #[arg(long)]
    vm: bool,
    /// What the group kube needs
    #[arg(long)]
    kube: bool,
}

impl Args {
    /// For these groups.
    pub fn new(vm: bool, kube: bool) -> Self {
        Self { vm, kube }
    }

    fn words(&self) -> impl Iterator<Item = &'static str> {
        let words = [(self.vm, "--vm"), (self.kube, "--kube")];
        words
            .into_iter()
            .filter_map(|(wanted, word)| wanted.then_some(word))
    }
}

/// Builds it. What fails here is built again by the group that needs it, which says why.
pub fn run(args: &Args) -> Result<()> {
    if args.vm {
        vm::matrix::programs(Architecture::own()?)?;
    }
    if args.kube {
        kube::programs()?;
        prometheus::with_discovery()?;
    }
    Ok(())
}

/// A build that goes on by itself. It ends with who started it.
pub struct Started(Option<Child>);

/// Starts [`run`] as a process that takes only what CPU time nobody else wants; what it says goes into a file.
pub fn start(args: &Args) -> Started {
    let is_asked = args.words().next().is_some();
    let started = is_asked.then(|| spawn(args)).transpose();
    Started(started.unwrap_or_else(|error| {
        eprintln!("xtask: nothing is built ahead: {error:#}");
        None
    }))
}

fn spawn(args: &Args) -> Result<Child> {
    for tool in ["nice", "setpriv"] {
        find(tool).with_context(|| format!("there is no {tool}"))?;
    }
    let path = log();
    let log = File::create(&path).with_context(|| format!("write {}", path.display()))?;
    eprintln!("building ahead what later groups need: {}", path.display());
    let mut ahead = command("setpriv");
    ahead
        .args(["--pdeathsig", "TERM", "nice", "-n", "19"])
        .arg(env::current_exe()?)
        .arg("ahead")
        .args(args.words())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    ahead.spawn().context("start setpriv")
}

fn log() -> PathBuf {
    build::target().join("ahead.log")
}

impl Started {
    /// Waits until it is built.
    pub fn wait(mut self) {
        let Some(mut child) = self.0.take() else {
            return;
        };
        if !child.wait().is_ok_and(|status| status.success()) {
            eprintln!("xtask: not all was built ahead: {}", log().display());
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
