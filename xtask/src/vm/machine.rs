//! One QEMU, without hardware help, so that it runs wherever programs run.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    architecture::Architecture,
    command::{command, quietly},
};

/// Twice the initramfs, which is unpacked beside its archive, and what the labs take.
const MEMORY_MIB: &str = "1536";
/// How much of the console is shown when something goes wrong.
const TAIL: usize = 30;

/// How the machine's time passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// A nanosecond for each instruction, and none while it waits: the machine does not notice how
    /// busy ours is, and sleeping costs nothing. One CPU: before QEMU 8.1 a second one starves.
    Counted,
    /// As ours, on two CPUs.
    Real,
}

/// A machine that is described and not yet started.
pub struct Machine<'a> {
    /// What it is.
    pub architecture: Architecture,
    /// The kernel's image.
    pub image: PathBuf,
    /// What it boots into.
    pub initramfs: &'a Path,
    /// Further words of the kernel's command line.
    pub parameters: &'a str,
    /// How its time passes.
    pub clock: Clock,
    /// Where its console goes.
    pub console: &'a Path,
}

/// What differs between the architectures.
struct Hardware {
    qemu: &'static str,
    arguments: &'static [&'static str],
    /// The device that the steps write to; the first serial port is the console.
    second_port: &'static str,
    /// Words of the kernel's command line. Of `steps` it makes a variable for `init.sh`.
    parameters: &'static str,
}

impl Hardware {
    fn of(architecture: Architecture) -> Self {
        match architecture {
            Architecture::Amd64 => Self {
                qemu: "qemu-system-x86_64",
                arguments: &["-cpu", "qemu64,+rdrand"],
                second_port: "isa-serial",
                // The emulated interrupt controller loses the timer's interrupts on some kernels.
                parameters: "console=ttyS0 steps=ttyS1 noapic random.trust_cpu=on",
            },
            Architecture::Arm64 => Self {
                qemu: "qemu-system-aarch64",
                arguments: &["-machine", "virt", "-cpu", "cortex-a72"],
                second_port: "pci-serial",
                parameters: "console=ttyAMA0 steps=ttyS0 random.trust_bootloader=on",
            },
        }
    }
}

impl Machine<'_> {
    fn start(&self, stdin: Stdio, stdout: Stdio) -> Result<Running> {
        let hardware = Hardware::of(self.architecture);
        // A machine that outlives who started it would run for ever.
        let mut qemu = command("setpriv");
        qemu.args(["--pdeathsig", "KILL", hardware.qemu]);
        match self.clock {
            Clock::Counted => qemu
                .args(["-accel", "tcg,thread=single", "-smp", "1"])
                .args(["-icount", "shift=0,sleep=off"]),
            Clock::Real => qemu.args(["-accel", "tcg,thread=multi", "-smp", "2"]),
        };
        qemu.args(hardware.arguments)
            .args(["-m", MEMORY_MIB])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .arg("-serial")
            .arg(format!("file:{}", self.console.display()))
            .args(["-chardev", "stdio,id=steps", "-device"])
            .arg(format!("{},chardev=steps", hardware.second_port))
            .arg("-kernel")
            .arg(&self.image)
            .arg("-initrd")
            .arg(self.initramfs)
            // With a panic the machine ends.
            .arg("-append")
            .arg(format!(
                "{} panic=-1 {}",
                hardware.parameters, self.parameters
            ))
            .stdin(stdin)
            .stdout(stdout);
        let child = qemu
            .spawn()
            .with_context(|| format!("could not start {}", hardware.qemu))?;
        Ok(Running(child))
    }

    /// Runs it and hands on each line that the steps write. Errors if it is not off by itself within
    /// the limit, or falls silent.
    pub fn run(
        &self,
        limit: Duration,
        silence: Duration,
        mut line: impl FnMut(&str),
    ) -> Result<()> {
        let mut running = self.start(Stdio::null(), Stdio::piped())?;
        let stdout = running.0.stdout.take().context("QEMU has no output")?;
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut lines = BufReader::new(stdout);
            let mut bytes = Vec::new();
            while matches!(lines.read_until(b'\n', &mut bytes), Ok(1..)) {
                let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                if sender.send(text).is_err() {
                    return;
                }
                bytes.clear();
            }
        });
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match receiver.recv_timeout(left.min(silence)) {
                Ok(text) => line(&text),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!(
                    "switched off: the machine wrote nothing for {} s, or was not done after {} s",
                    silence.as_secs(),
                    limit.as_secs()
                ),
            }
        }
        let status = running.0.wait()?;
        ensure!(status.success(), "QEMU ended with {status}");
        Ok(())
    }

    /// Runs it with this terminal as its second serial port, until it is off.
    pub fn interactive(&self) -> Result<()> {
        let mut running = self.start(Stdio::inherit(), Stdio::inherit())?;
        let status = running.0.wait()?;
        // QEMU leaves the terminal raw if it is killed.
        let _ = quietly(command("stty").arg("sane").stdin(Stdio::inherit()));
        ensure!(status.success(), "QEMU ended with {status}");
        Ok(())
    }

    /// The end of its console.
    pub fn tail(&self) -> String {
        let bytes = fs::read(self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        lines[lines.len().saturating_sub(TAIL)..].join("\n")
    }
}

/// A QEMU that runs; it does not outlive its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}
