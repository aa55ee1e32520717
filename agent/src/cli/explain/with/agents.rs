//! The connections that all agents of a cluster see.

use futures_util::stream::{self, StreamExt as _};
use jiff::Timestamp;
use tokio::sync::mpsc;

use super::seen::SeenBy;
use crate::cli::cluster::agents::Agent;
use crate::cli::cluster::exec::{ExecError, within};
use crate::cli::cluster::{Agents, OPENING, arguments};
use crate::connections::Summary;

/// Batches of lines that wait to be read; while it is full, connections are not read.
const WAITING: usize = 64;

/// Asks all agents, some at once. One that does not answer is a node of which nothing is known.
///
/// # Errors
/// The account is refused, there are no agents, or one answers something else.
pub async fn collect(agents: &Agents, seen: &mut SeenBy<'_>) -> anyhow::Result<()> {
    let all = agents.list().await?;
    let (sender, mut batches) = mpsc::channel::<(String, Vec<String>)>(WAITING);
    let asked = all.iter().zip(std::iter::repeat(sender));
    let asked = asked.map(|(agent, sender)| async move {
        let answer = ask(agents, agent, sender).await;
        (agent, answer)
    });
    let mut answers = stream::iter(asked).buffer_unordered(OPENING);
    let mut failures = Vec::new();
    let mut take = |(node, lines): (String, Vec<String>)| {
        let taken = seen.take(lines.join("\n").as_bytes());
        taken.map_err(|error| error.context(format!("the agent of {node}")))
    };
    loop {
        tokio::select! {
            Some(batch) = batches.recv() => take(batch)?,
            answer = answers.next() => match answer {
                Some((_, Ok(()))) => {}
                Some((_, Err(error))) if error.is_refused() => return Err(error.into()),
                Some((agent, Err(error))) => failures.push((agent, error)),
                None => break,
            },
        }
    }
    // What was sent last, before its agent had answered.
    while let Ok(batch) = batches.try_recv() {
        take(batch)?;
    }
    for (agent, error) in failures {
        seen.nodes.push(Summary {
            node: agent.node.as_str().into(),
            time: Timestamp::now(),
            conntrack: format!("its agent does not tell: {error}"),
            connections: 0,
            left_out: 0,
        });
    }
    seen.nodes.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(())
}

async fn ask(
    agents: &Agents,
    agent: &Agent,
    sender: mpsc::Sender<(String, Vec<String>)>,
) -> Result<(), ExecError> {
    let mut exec = agents.exec(agent, &arguments::connections()).await?;
    let whole = async {
        while let Some(lines) = agents.lines(&mut exec).await? {
            // Nobody takes them any more: the reason is told there.
            if sender.send((agent.node.clone(), lines)).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    within(agents.timeout, whole).await
}
