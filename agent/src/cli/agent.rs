//! `whydrop agent`: the node agent.

use std::process::ExitCode;

use crate::cli::config::AgentArgs;

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps the agent from starting, and what to do.
pub fn run(_args: AgentArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("the agent is not in this build")
}
