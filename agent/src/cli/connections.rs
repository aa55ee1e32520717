//! `whydrop connections`: the connections of a running agent's node, as lines of JSON.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::Bytes;

use crate::cli::client::{self, ClientError};
use crate::cli::config::ConnectionsArgs;
use crate::cli::printer::{Stdout, Written};

/// How long an agent may take to read a large table, behind others who ask for the same.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Prints the agent's `/v1/connections`.
///
/// # Errors
/// If no agent answers, or stdout cannot be written.
pub fn run(args: ConnectionsArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let write = async |bytes: Bytes| match Stdout.write(&bytes)? {
        Written::All => Ok(true),
        Written::Closed => Ok(false),
    };
    runtime.block_on(each_chunk(&args.socket, write))?;
    Ok(ExitCode::SUCCESS)
}

/// Hands the answer on as it comes, until it ends or `take` says that it is enough.
///
/// # Errors
/// If no agent answers, or `take` fails.
pub async fn each_chunk(
    socket: &Path,
    mut take: impl AsyncFnMut(Bytes) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let answer = client::get_within(socket, "/v1/connections", READ_TIMEOUT).await?;
    let mut body = answer.into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(ClientError::from)?;
        if let Ok(data) = frame.into_data()
            && !take(data).await?
        {
            break;
        }
    }
    Ok(())
}
