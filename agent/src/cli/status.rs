//! `whydrop status`: what a running agent, or each of a cluster, says of itself.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use http_body_util::BodyExt as _;
use serde_json::Value;

use crate::cli::client;
use crate::cli::cluster::kubeconfig::{Target, target};
use crate::cli::cluster::{self, Agents};
use crate::cli::config::{ReportOutput, StatusArgs};
use crate::cli::printer::Stdout;
use crate::selection::Selection;

/// Prints the agents' `/v1/status`.
///
/// # Errors
/// If no agent answers, or stdout cannot be written.
pub fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match target(&args.agents).await? {
            Target::Local(socket) => local(&socket, args.output).await,
            Target::Cluster(config) => {
                let agents = Agents::new(*config, &args.agents, Selection::default())?;
                cluster::status::status(agents, args.output).await
            }
        }
    })
}

async fn local(socket: &Path, output: ReportOutput) -> anyhow::Result<ExitCode> {
    let response = client::get(socket, "/v1/status").await?;
    let body = response.into_body().collect().await?.to_bytes();
    let status: Value = serde_json::from_slice(&body).context("the agent's answer is no JSON")?;
    let text = match output {
        ReportOutput::Json => serde_json::to_string_pretty(&status)? + "\n",
        ReportOutput::Text => serde_saphyr::to_string(&status)?,
    };
    Stdout.write(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
