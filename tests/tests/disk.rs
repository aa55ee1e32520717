//! Disks that take nothing more: the agent writes a socket, its lock and a log, and needs none of them to
//! observe but the socket.

use std::process::Command;

use anyhow::{Result, ensure};
use whydrop_tests::agent::{self, Agent};
use whydrop_tests::lab::Lab;
use whydrop_tests::{expect, objects};

/// Runs the agent with its socket on a tmpfs of these options, where it must not start; what it says.
fn refused_on(options: &str) -> Result<String> {
    let script = format!("mount -t tmpfs -o {options} none /mnt && exec \"$@\"");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script, "sh"])
        .arg(agent::binary()?)
        .args(["agent", "--cluster", "none", "--listen", "127.0.0.1:0"])
        .args(["--socket", "/mnt/run/agent.sock"])
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{}: {said}", output.status);
    ensure!(
        said.lines().count() == 1 && said.starts_with("whydrop: "),
        "it must say one sentence, not: {said}"
    );
    Ok(said)
}

/// One sentence says what is full or cannot be written, and what to do.
#[test]
fn no_place_for_the_socket() -> Result<()> {
    for (options, words) in [
        // The root of the tmpfs is the one file that it may have.
        ("nr_inodes=1", ["No space left", "make room there"]),
        ("ro", ["Read-only file system", "let the agent write there"]),
    ] {
        let said = refused_on(options)?;
        for word in words.iter().chain(&["/mnt/run", "another --socket"]) {
            ensure!(said.contains(word), "{options}: no {word:?} in {said}");
        }
    }
    Ok(())
}

/// A log that cannot be written is lost, and nothing else.
#[test]
fn no_place_for_the_log() -> Result<()> {
    let lab = Lab::new()?;
    let full = ["sh", "-c", "exec \"$@\" 2>/dev/full", "sh"];
    let agent = Agent::start_by(&full, &lab.node(), &objects::list(&lab), &["-v"])?;
    expect::barrier(&lab, &agent)?;
    ensure!(agent.log().is_empty(), "the log: {}", agent.log());
    ensure!(agent.stop()?.success());
    Ok(())
}
