//! `whydrop status`: what a running agent says of itself.

use std::process::ExitCode;

use anyhow::Context as _;
use http_body_util::BodyExt as _;
use serde_json::Value;

use crate::cli::client;
use crate::cli::config::{ReportOutput, StatusArgs};
use crate::cli::tail::{Stdout, Written};

/// Prints the agent's `/v1/status`.
///
/// # Errors
/// If no agent answers, or stdout cannot be written.
pub fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let body = runtime.block_on(async {
        let response = client::get(&args.socket, "/v1/status").await?;
        anyhow::Ok(response.into_body().collect().await?.to_bytes())
    })?;
    let status: Value = serde_json::from_slice(&body).context("the agent's answer is no JSON")?;
    let text = match args.output {
        ReportOutput::Json => serde_json::to_string_pretty(&status)? + "\n",
        ReportOutput::Text => serde_saphyr::to_string(&status)?,
    };
    match Stdout.write(text.as_bytes())? {
        Written::All | Written::Closed => Ok(ExitCode::SUCCESS),
    }
}
