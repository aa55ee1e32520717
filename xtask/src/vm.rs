//! `cargo xtask vm`: a command in a virtual machine of another kernel. What the group `vm` of
//! `cargo xtask test` does with it is in `vm/matrix.rs`.

mod foreign;
mod initramfs;
mod kernels;
mod machine;
pub mod matrix;
mod plans;
mod steps;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{self, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;

use self::{
    kernels::Kernel,
    machine::{Clock, Machine},
    steps::{Heard, Reader, Step},
};
use crate::{
    architecture::Architecture,
    build,
    command::{find, host},
    setup::{self, Found, Need},
};

/// Where programs lie in the machine.
const PROGRAMS: &str = "/usr/bin";
/// What the labs find in their environment. Large maps take the kernel a second to make.
const ENVIRONMENT: &str = "WHYDROP_BIN=/usr/bin/whydrop WHYDROP_MAP_MEMORY=4MiB";
/// A command that takes longer than this is not waited for.
const LIMIT: Duration = Duration::from_secs(3600);

#[derive(clap::Args)]
pub struct Args {
    /// 5.10, 6.1, 6.12, newest, arm64, or any Debian suite (bookworm-backports, sid)
    kernel: String,
    /// Further words of the kernel's command line, such as `lockdown=integrity`
    #[arg(long, value_name = "WORDS", default_value = "")]
    append: String,
    /// A file to have in the machine, in its first folder
    #[arg(long, value_name = "PATH")]
    file: Vec<PathBuf>,
    /// Have the labs in the machine as well, each as `lab-NAME`
    #[arg(long)]
    labs: bool,
    /// Have the benchmarks in the machine as well, as `bench`; its nanoseconds are instructions
    #[arg(long)]
    bench: bool,
    /// The command and its arguments; a shell on this terminal if there is none
    #[arg(last = true)]
    command: Vec<String>,
}

/// Runs one command in a machine with the static `whydrop`; its exit code goes through.
pub fn run(args: &Args) -> Result<ExitCode> {
    let (suite, architecture) = kernel(&args.kernel)?;
    let mut found = setup::run()?.with_vm();
    if is_other(&args.kernel)? {
        found = found.with_other_vm();
    }
    found.ready_to_build()?;
    if let Some(reason) = cannot(&found) {
        bail!("no virtual machine: {reason}");
    }
    if architecture != Architecture::own()?
        && let Some(reason) = cannot_be_other(&found)
    {
        bail!("no virtual machine of {architecture}: {reason}");
    }
    let kernel = kernels::get(suite, architecture)?;
    let mut programs = if args.labs {
        matrix::programs(architecture)?
    } else {
        let binary = build::shipped(architecture)?;
        vec![(binary, format!("{PROGRAMS}/whydrop"))]
    };
    if args.bench {
        let bench = build::shipped_bench(architecture)?;
        programs.push((bench, format!("{PROGRAMS}/bench")));
    }
    for file in &args.file {
        let name = file.file_name().context("--file names no file")?;
        programs.push((file.clone(), format!("/root/{}", name.to_string_lossy())));
    }
    let place = Place::new()?;
    let interactive = args.command.is_empty();
    let script = if interactive {
        format!("stty -F /dev/$steps sane; cd /root; {ENVIRONMENT} setsid -c sh -i\n")
    } else {
        steps::script(&[Step {
            name: "command".to_owned(),
            command: format!("cd /root; exec env {ENVIRONMENT} {}", quoted(&args.command)),
        }])
    };
    initramfs::write(&place.initramfs, &kernel, &programs, &script)?;
    // A person's time passes while the machine waits.
    let clock = if interactive {
        Clock::Real
    } else {
        Clock::Counted
    };
    let machine = place.machine(&kernel, &args.append, clock);
    eprintln!("vm: {} starts", kernel.release);
    if interactive {
        machine.interactive()?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut reader = Reader::default();
    let ended = machine.run(LIMIT, LIMIT, |line| match reader.line(line) {
        Heard::Output(text) => println!("{text}"),
        Heard::Ended(text, _) => print!("{text}"),
        Heard::Begun | Heard::Noise => {}
    });
    let code = reader.ran().first().and_then(|ran| ran.code);
    ended
        .and_then(|()| code.context("the machine went off in the middle of it"))
        .and_then(|code| Ok(ExitCode::from(u8::try_from(code)?)))
        .with_context(|| format!("the end of the console:\n{}", machine.tail()))
}

/// The suite and architecture of a kernel's short name; any other name is a suite's own.
fn kernel(name: &str) -> Result<(&str, Architecture)> {
    let suite = match name {
        "arm64" => return Ok(("trixie", Architecture::Arm64)),
        "5.10" => "bullseye",
        "6.1" => "bookworm",
        "6.12" => "trixie",
        "newest" => "forky",
        suite => suite,
    };
    Ok((suite, Architecture::own()?))
}

/// Whether a kernel is of the other architecture.
pub fn is_other(name: &str) -> Result<bool> {
    Ok(kernel(name)?.1 != Architecture::own()?)
}

/// A shell's words for these arguments.
fn quoted(words: &[String]) -> String {
    let quote = |word: &String| format!("'{}'", word.replace('\'', r"'\''"));
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// Why this machine cannot have others inside; `None` if it can.
pub fn cannot(found: &Found) -> Option<String> {
    let host = host().ok()?;
    if !host.starts_with("x86_64-") {
        return Some(format!("there is no kernel to boot on {host} yet"));
    }
    for tool in ["apt-get", "dpkg-deb"] {
        if find(tool).is_none() {
            return Some(format!("no {tool}, and the kernels are Debian's packages"));
        }
    }
    found.lacks(Need::Vm)
}

/// Why none of the other architecture can be inside; `None` if it can.
pub fn cannot_be_other(found: &Found) -> Option<String> {
    found.lacks(Need::Cross).or(found.lacks(Need::CrossVm))
}

/// Where kernels are kept, and what the machines wrote.
fn folder() -> PathBuf {
    build::target().join("vm")
}

/// The files of one run; what is written here goes with it.
struct Place {
    initramfs: PathBuf,
    console: PathBuf,
    _work: TempDir,
}

impl Place {
    fn new() -> Result<Self> {
        let work = work()?;
        Ok(Self {
            initramfs: work.path().join("initramfs"),
            console: work.path().join("console.log"),
            _work: work,
        })
    }

    fn machine<'a>(&'a self, kernel: &Kernel, parameters: &'a str, clock: Clock) -> Machine<'a> {
        Machine {
            architecture: kernel.architecture,
            image: kernel.image(),
            initramfs: &self.initramfs,
            parameters,
            clock,
            console: &self.console,
        }
    }
}

/// A folder of this process; those of processes that were killed are removed.
fn work() -> Result<TempDir> {
    let folder = folder();
    fs::create_dir_all(&folder)?;
    for entry in fs::read_dir(&folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name
            .strip_prefix("run-")
            .and_then(|rest| rest.split('-').next());
        if process.is_some_and(|id| !Path::new("/proc").join(id).exists()) {
            // Somebody else may be at it as well.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(TempDir::with_prefix_in(
        format!("run-{}-", process::id()),
        &folder,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_keep_their_borders() {
        let words = ["echo", "a b", "it's", "$HOME"].map(str::to_owned);
        assert_eq!(quoted(&words), r"'echo' 'a b' 'it'\''s' '$HOME'");
    }
}
