//! What all agents keep, in the order of time: `whydrop tail` without `--follow`, and what it begins with.

use std::collections::HashMap;
use std::sync::Mutex;

use futures_util::stream::{self, StreamExt as _};
use jiff::Timestamp;
use tokio::time::{Duration, timeout};

use super::agents::Agent;
use super::arguments::{self, Part};
use super::exec::{Exec, ExecError, within};
use super::merge::{COLLECTED, Item, Newest};
use super::node::{NodeLines, lost};
use super::{Agents, OPENING};
use crate::sync::lock;

/// What the agents had.
pub struct History {
    /// In the order of time; what had no room comes first, as losses.
    pub items: Vec<Item>,
    /// Where each agent's lines go on, by its pod's UID; `true` if all of them were read.
    pub read: HashMap<String, (NodeLines, bool)>,
    /// Those that did not answer, or not wholly.
    pub failures: Vec<(Agent, ExecError)>,
}

/// Asks all agents, some at once, for what they keep; one that says nothing for longer than `patience`, or has
/// no end, is left out.
///
/// # Errors
/// If the account is refused.
pub async fn collect(
    agents: &Agents,
    all: &[Agent],
    part: Part,
    patience: Duration,
) -> Result<History, ExecError> {
    let newest = Mutex::new(Newest::new(COLLECTED, part.last));
    let arguments = arguments::tail(&agents.selection, part);
    let asked = all.iter().map(|agent| {
        let (newest, arguments) = (&newest, &arguments);
        async move {
            let mut lines = NodeLines::new(&agent.node);
            let opened = timeout(patience, agents.exec(agent, arguments)).await;
            let result = match opened {
                Ok(Ok(exec)) => {
                    let read = read(exec, patience, &mut lines, newest);
                    within(patience, read).await
                }
                Ok(Err(error)) => Err(error),
                Err(_) => Err(ExecError::Silent(patience)),
            };
            (agent, lines, result)
        }
    });
    let mut asked = stream::iter(asked).buffer_unordered(OPENING);
    let (mut read, mut failures) = (HashMap::new(), Vec::new());
    while let Some((agent, lines, result)) = asked.next().await {
        read.insert(agent.uid.clone(), (lines, result.is_ok()));
        match result {
            Err(error) if error.is_refused() => return Err(error),
            Err(error) => failures.push((agent.clone(), error)),
            Ok(()) => {}
        }
    }
    drop(asked);
    failures.sort_by(|(a, _), (b, _)| a.node.cmp(&b.node));
    let newest = newest.into_inner().unwrap_or_else(|e| e.into_inner());
    let (kept, discarded) = newest.finish();
    let oldest = kept.first().map_or_else(Timestamp::now, |item| item.time);
    let mut items: Vec<Item> = discarded
        .iter()
        .filter_map(|(node, packets)| lost(node, *packets, oldest))
        .collect();
    items.extend(kept);
    Ok(History {
        items,
        read,
        failures,
    })
}

async fn read(
    mut exec: Exec,
    patience: Duration,
    lines: &mut NodeLines,
    newest: &Mutex<Newest>,
) -> Result<(), ExecError> {
    loop {
        let read = timeout(patience, exec.lines()).await;
        let read = read.map_err(|_| ExecError::Silent(patience))??;
        let Some(read) = read else {
            return Ok(());
        };
        let mut newest = lock(newest);
        for item in lines.items(read) {
            newest.push(item);
        }
    }
}
