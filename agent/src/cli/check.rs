//! `whydrop check`: what this kernel and these privileges allow.

use std::process::ExitCode;

use crate::cli::config::CheckArgs;

/// Prints what can be observed here. The exit code is 0 if drops can be, else 1.
///
/// # Errors
/// If the report cannot be written.
pub fn run(_args: CheckArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("the check is not in this build")
}
