//! `whydrop status`: what a running agent, or each of a cluster, says of itself.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, ensure};
use http_body_util::BodyExt as _;
use serde_json::Value;

use crate::cli::client;
use crate::cli::cluster::kubeconfig::{Target, target};
use crate::cli::cluster::{self, Agents};
use crate::cli::config::{ReportOutput, StatusArgs};
use crate::cli::format::{clean, clean_json_lines, clean_lines};
use crate::cli::printer::Stdout;
use crate::selection::{Flag, Selection};

/// Prints the agents' `/v1/status`.
///
/// # Errors
/// If no agent answers, or stdout cannot be written.
pub fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = args.node_name.iter();
    let nodes = Selection::new(nodes.map(|name| (false, Flag::NodeName, name)))
        .map_err(|error| anyhow!("--{error}"))?;
    runtime.block_on(async {
        match target(&args.agents).await? {
            Target::Local(socket) => local(&socket, &nodes, args.output).await,
            Target::Cluster(account) => {
                let agents = Agents::new(*account, &args.agents, nodes)?;
                cluster::status::status(agents, args.output).await
            }
        }
    })
}

async fn local(socket: &Path, nodes: &Selection, output: ReportOutput) -> anyhow::Result<ExitCode> {
    let response = client::get(socket, "/v1/status").await?;
    let body = response.into_body().collect().await?.to_bytes();
    let status: Value = serde_json::from_slice(&body).context("the agent's answer is no JSON")?;
    let node = status["node"].as_str().unwrap_or_default();
    ensure!(
        nodes.may_be_on(node),
        "the agent on {} is on node {}, which --node-name does not select",
        socket.display(),
        clean(node)
    );
    let text = match output {
        ReportOutput::Json => clean_json_lines(&serde_json::to_string_pretty(&status)?),
        ReportOutput::Text => clean_lines(&serde_saphyr::to_string(&status)?),
    };
    Stdout.write(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
