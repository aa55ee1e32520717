//! Running other programs: their output goes straight through, a failure names the command.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// A command that ran and did not succeed.
#[derive(Debug)]
pub struct Failed {
    what: String,
    /// Its exit code; none if a signal ended it.
    pub code: Option<u8>,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(f, "`{}` failed with exit code {code}", self.what),
            None => write!(f, "`{}` was ended by a signal", self.what),
        }
    }
}

impl std::error::Error for Failed {}

/// The root of the workspace.
pub fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// A command in the workspace's root, without stdin: nothing here ever asks.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root()).stdin(Stdio::null());
    // An entry of PATH that cannot be joined came from outside; PATH is passed on as it is then.
    if let Ok(path) = env::join_paths(search_path()) {
        command.env("PATH", path);
    }
    command
}

/// PATH, then the folders that it may lack: cargo's own, and those of system tools.
fn search_path() -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo = cargo.or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let mut folders: Vec<_> = env::split_paths(&path).collect();
    folders.extend(cargo.map(|cargo| cargo.join("bin")));
    folders.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.into_iter()
}

/// `cargo SUBCOMMAND --locked`, by the cargo that runs us.
pub fn cargo(subcommand: &str) -> Command {
    let mut command = command(cargo_path());
    command.args([subcommand, "--locked"]);
    command
}

/// The cargo that runs us.
pub fn cargo_path() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Says what it runs and runs it.
pub fn run(command: &mut Command) -> Result<()> {
    eprintln!("+ {}", describe(command));
    quietly(command)
}

/// Runs it with its output going straight through.
pub fn quietly(command: &mut Command) -> Result<()> {
    let what = describe(command);
    let status = command
        .status()
        .with_context(|| format!("could not start `{what}`"))?;
    if !status.success() {
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        return Err(Failed { what, code }.into());
    }
    Ok(())
}

/// Runs it and returns its stdout; stderr goes straight through.
pub fn output(command: &mut Command) -> Result<String> {
    let what = describe(command);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("could not start `{what}`"))?;
    if !output.status.success() {
        let code = output
            .status
            .code()
            .and_then(|code| u8::try_from(code).ok());
        return Err(Failed { what, code }.into());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{what}` did not print UTF-8"))
}

/// Where a program is that [`command`] would start.
pub fn find(program: &str) -> Option<PathBuf> {
    search_path()
        .map(|folder| folder.join(program))
        .find(|file| fs::metadata(file).is_ok_and(|data| data.is_file()))
}

/// The host's target triple.
pub fn host() -> Result<String> {
    field(&output(command("rustc").arg("-vV"))?, "host")
}

/// The value of a `name: value` line of `rustc -vV`.
pub fn field(text: &str, name: &str) -> Result<String> {
    for line in text.lines() {
        if let Some((key, value)) = line.split_once(": ")
            && key == name
        {
            return Ok(value.to_owned());
        }
    }
    bail!("`rustc -vV` has no line `{name}:`")
}

fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words = std::iter::once(name).chain(command.get_args());
    words
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command_and_keeps_its_code() {
        let error = run(command("sh").args(["-c", "exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "`sh -c exit 3` failed with exit code 3");
        assert_eq!(error.downcast_ref::<Failed>().unwrap().code, Some(3));
        let error = run(&mut command("no-such-program")).unwrap_err();
        assert_eq!(error.to_string(), "could not start `no-such-program`");
    }

    #[test]
    fn reads_rustc_fields() {
        let text = "rustc 1.95.0\nrelease: 1.95.0\nhost: x86_64-unknown-linux-gnu\n";
        assert_eq!(field(text, "host").unwrap(), "x86_64-unknown-linux-gnu");
        assert!(field(text, "os").is_err());
    }

    #[test]
    fn finds_programs() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program").is_none());
    }
}
