//! The lines of one node: read, put into their place, and gone on with after a break.

use std::ops::RangeInclusive;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::mpsc::Sender;
use tokio::time::{Duration, Instant, timeout};

use super::Agents;
use super::agents::Agent;
use super::arguments::{self, Part};
use super::exec::ExecError;
use super::merge::Item;
use super::resume::Seen;
use crate::cli::format::clean;
use crate::cli::say;
use crate::event::{Line, Lost, LostStage};
use crate::output::query::Since;

/// How often an agent's whydrop gives a sign of life, so that a connection that is dead is noticed.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How long a node may keep others from being opened. Those that are off would hold them up.
const OPENED: Duration = Duration::from_secs(10);
/// How long nothing may come: three signs of life.
const SILENCE: Duration = Duration::from_secs(30);
/// Between two tries: doubling. A restart takes a moment; a node that is off, hours.
const RETRY: RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(30);

/// The lines of one node, whatever connection they come by.
#[derive(Debug)]
pub struct NodeLines {
    node: Arc<str>,
    seen: Seen,
    latest: Option<Timestamp>,
    /// A line that could not be read was told of.
    told: bool,
}

/// The fields that a line's place follows from.
#[derive(serde::Deserialize)]
struct Head {
    time: Option<Timestamp>,
    packets: Option<u64>,
    lost: Option<u64>,
}

impl NodeLines {
    /// Nothing came yet.
    pub fn new(node: &str) -> Self {
        Self {
            node: node.into(),
            seen: Seen::default(),
            latest: None,
            told: false,
        }
    }

    /// The lines with their places, without those that were seen before. What cannot be read is a loss.
    pub fn items(&mut self, lines: Vec<String>) -> Vec<Item> {
        let mut items = Vec::new();
        let mut unread = 0;
        for line in lines {
            // A sign of life.
            if line.is_empty() {
                continue;
            }
            let head = serde_json::from_str(&line);
            let (time, packets, is_event) = match head {
                Ok(Head {
                    time: Some(time),
                    packets,
                    ..
                }) => {
                    if !self.seen.is_new(time, &line) {
                        continue;
                    }
                    self.latest = self.latest.max(Some(time));
                    (time, packets.unwrap_or(1), true)
                }
                Ok(Head {
                    lost: Some(lost), ..
                }) => (self.now(), lost, false),
                Ok(_) | Err(_) => {
                    unread += 1;
                    continue;
                }
            };
            items.push(Item {
                time,
                packets,
                is_event,
                node: self.node.clone(),
                line,
            });
        }
        if unread > 0 {
            if !self.told {
                self.told = true;
                say(format_args!(
                    "the agent on {} sent a line that this whydrop cannot read; are both \
                     of the same version? Such lines are counted as lost",
                    clean(&self.node)
                ));
            }
            items.extend(lost(&self.node, unread, self.now()));
        }
        items
    }

    /// The place of what has no time.
    fn now(&self) -> Timestamp {
        self.latest.unwrap_or_else(Timestamp::now)
    }
}

/// A line about packets that this reader does not show, as the agent itself would say it.
pub fn lost(node: &Arc<str>, packets: u64, time: Timestamp) -> Option<Item> {
    let line = Line::Lost(Lost {
        lost: packets,
        stage: LostStage::Reader,
        node: node.clone(),
    });
    Some(Item {
        time,
        packets,
        is_event: false,
        node: node.clone(),
        line: serde_json::to_string(&line).ok()?,
    })
}

/// With what a node's lines begin if none came yet.
#[derive(Clone, Copy, Debug)]
pub enum Begin {
    /// With the next one.
    Now,
    /// With those since a moment of this clock, told to the agent as an age, since its clock may differ.
    At(Instant),
    /// As it was asked for.
    Since(Since),
}

/// What there is to say of a node.
#[derive(Debug)]
pub enum Update {
    /// It answers.
    Connected,
    /// Its lines.
    Items(Vec<Item>),
    /// It does not answer, or no more. After a final error nothing comes.
    Away(ExecError),
}

/// Follows one agent for as long as somebody takes the updates, each with the pod's UID.
pub async fn follow(
    agents: Arc<Agents>,
    agent: Agent,
    mut lines: NodeLines,
    begin: Begin,
    updates: Sender<(String, Update)>,
) {
    let mut begin = begin;
    let mut pause = *RETRY.start();
    let mut was_unauthorized = false;
    loop {
        let since = match (lines.seen.resume(), begin) {
            (Some(seen), _) => Some(Since::At(seen)),
            (None, Begin::Now) => None,
            (None, Begin::Since(since)) => Some(since),
            (None, Begin::At(moment)) => SignedDuration::try_from(moment.elapsed())
                .ok()
                .map(Since::Ago),
        };
        let part = Part {
            heartbeat: Some(HEARTBEAT),
            last: None,
            since,
        };
        let arguments = arguments::tail(&agents.selection, part);
        let began = Instant::now();
        let generation = agents.login.generation();
        let mut session = Session {
            agents: &agents,
            agent: &agent,
            updates: &updates,
            is_connected: false,
        };
        let Err(mut error) = session.read(&arguments, &mut lines).await;
        if session.is_connected {
            pause = *RETRY.start();
            if matches!(begin, Begin::Now) {
                begin = Begin::At(began);
            }
        }
        let is_unauthorized = error == ExecError::Unauthorized;
        let is_first = !std::mem::replace(&mut was_unauthorized, is_unauthorized);
        if is_unauthorized {
            match agents.login.renew(generation).await {
                // Only if that is not accepted either there is something to say.
                Ok(()) if is_first => continue,
                Ok(()) => {}
                Err(not_renewed) => error = not_renewed.into(),
            }
        }
        let is_final = error.is_final();
        let update = (agent.uid.clone(), Update::Away(error));
        if updates.send(update).await.is_err() || is_final {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(*RETRY.end());
    }
}

/// One connection to an agent.
struct Session<'a> {
    agents: &'a Agents,
    agent: &'a Agent,
    updates: &'a Sender<(String, Update)>,
    is_connected: bool,
}

impl Session<'_> {
    /// Until it breaks.
    async fn read(
        &mut self,
        arguments: &[String],
        lines: &mut NodeLines,
    ) -> Result<std::convert::Infallible, ExecError> {
        // Until the first sign of life; never closed.
        let opening = self.agents.opening.acquire().await.ok();
        let first = async {
            let mut exec = self.agents.exec(self.agent, arguments).await?;
            let read = exec.lines().await?;
            Ok::<_, ExecError>((exec, read))
        };
        let patience = self.agents.timeout.min(OPENED);
        let (mut exec, mut read) = timeout(patience, first)
            .await
            .map_err(|_| ExecError::Silent(patience))??;
        drop(opening);
        self.is_connected = true;
        self.tell(Update::Connected).await;
        loop {
            let items = lines.items(read.ok_or(ExecError::Ended)?);
            if !items.is_empty() {
                self.tell(Update::Items(items)).await;
            }
            read = timeout(SILENCE, exec.lines())
                .await
                .map_err(|_| ExecError::Silent(SILENCE))??;
        }
    }

    /// Waits for room. If nobody takes it any more, the whole task is about to end.
    async fn tell(&self, update: Update) {
        drop(self.updates.send((self.agent.uid.clone(), update)).await);
    }
}
