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
    /// The latest event's line, and how many losses were told behind it.
    behind: (String, u32),
    /// A line that could not be read was told of.
    told: bool,
}

/// The fields that a line's place follows from.
#[derive(serde::Deserialize)]
struct Head {
    time: Option<Timestamp>,
    packets: Option<u64>,
    lost: Option<u64>,
    stage: Option<LostStage>,
}

impl NodeLines {
    /// Nothing came yet.
    pub fn new(node: &str) -> Self {
        Self {
            node: node.into(),
            seen: Seen::default(),
            latest: None,
            behind: <_>::default(),
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
                    self.behind = (line.clone(), 0);
                    if !self.seen.is_new(time, &line) {
                        continue;
                    }
                    self.latest = self.latest.max(Some(time));
                    (time, packets.unwrap_or(1), true)
                }
                Ok(Head {
                    lost: Some(lost),
                    stage,
                    ..
                }) => {
                    // What a reader lost is told to this one alone, all else is kept with the events.
                    if stage != Some(LostStage::Reader) && !self.is_new_loss(&line) {
                        continue;
                    }
                    (self.now(), lost, false)
                }
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

    /// A loss has no time; it is known by its place behind an event, with which each stream begins.
    fn is_new_loss(&mut self, line: &str) -> bool {
        let (event, told) = &mut self.behind;
        *told += 1;
        let Some(time) = self.latest else {
            return true;
        };
        self.seen.is_new(time, &format!("{event}\n{told}\n{line}"))
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
    /// As it was asked for, at a moment that an age counts from.
    Since(Since, Instant),
}

/// Since when lines are asked for, of which these were the latest; `None` for those that come.
fn since(latest: Option<Timestamp>, begin: Begin) -> Option<Since> {
    let elapsed = |moment: Instant| SignedDuration::try_from(moment.elapsed()).unwrap_or_default();
    match (latest, begin) {
        (Some(latest), _) => Some(Since::At(latest)),
        (None, Begin::Now) => None,
        (None, Begin::Since(Since::Ago(age), asked)) => {
            Some(Since::Ago(age.saturating_add(elapsed(asked))))
        }
        (None, Begin::Since(since, _)) => Some(since),
        (None, Begin::At(moment)) => Some(Since::Ago(elapsed(moment))),
    }
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
        let began = Instant::now();
        let generation = agents.login.generation();
        let mut session = Session {
            agents: &agents,
            agent: &agent,
            updates: &updates,
            is_connected: false,
        };
        let Err(mut error) = session.read(begin, &mut lines).await;
        if session.is_connected {
            pause = *RETRY.start();
        }
        if matches!(begin, Begin::Now) {
            begin = Begin::At(began);
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
        begin: Begin,
        lines: &mut NodeLines,
    ) -> Result<std::convert::Infallible, ExecError> {
        // Until the first sign of life; never closed.
        let opening = self.agents.opening.acquire().await.ok();
        let part = Part {
            heartbeat: Some(HEARTBEAT),
            last: None,
            // Only now, for the place was waited for.
            since: since(lines.seen.resume(), begin),
        };
        let arguments = arguments::tail(&self.agents.selection, part);
        let first = async {
            let mut exec = self.agents.exec(self.agent, &arguments).await?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn event(second: u64) -> String {
        format!(r#"{{"time": "2026-11-22T12:03:0{second}Z", "packets": {second}}}"#)
    }

    fn lost(stage: &str, packets: u64) -> String {
        format!(r#"{{"lost": {packets}, "stage": "{stage}", "node": "a"}}"#)
    }

    fn shown(lines: &mut NodeLines, of: &[String]) -> Vec<String> {
        let items = lines.items(of.to_vec());
        items.into_iter().map(|item| item.line).collect()
    }

    #[test]
    fn a_loss_is_shown_once_however_often_the_stream_breaks() {
        let mut lines = NodeLines::new("a");
        // Before any event there is no place to know it by.
        assert_eq!(shown(&mut lines, &[lost("ring", 1)]).len(), 1);
        let kept = [event(1), lost("ring", 7), lost("ring", 7), event(2)];
        assert_eq!(shown(&mut lines, &kept[..2]), kept[..2]);
        lines.seen.resume();
        assert_eq!(shown(&mut lines, &kept), kept[2..]);
        lines.seen.resume();
        assert!(shown(&mut lines, &kept).is_empty());
        // One behind the newest event, and what this reader alone lost.
        let more = [lost("ring", 7), lost("reader", 7), lost("reader", 7)];
        assert_eq!(shown(&mut lines, &more), more);
    }

    #[test]
    fn an_age_is_that_of_the_moment_that_it_was_asked_for() {
        let second = Duration::from_secs(1);
        let Some(asked) = Instant::now().checked_sub(30 * second) else {
            return;
        };
        let age = |begin| match since(None, begin) {
            Some(Since::Ago(age)) => age.as_secs(),
            other => panic!("{other:?}"),
        };
        let minute = Since::Ago(SignedDuration::from_secs(60));
        assert_eq!(age(Begin::Since(minute, asked)), 90);
        assert_eq!(age(Begin::At(asked)), 30);
        let at = Since::At(Timestamp::UNIX_EPOCH);
        assert_eq!(since(None, Begin::Since(at, asked)), Some(at));
        assert_eq!(since(None, Begin::Now), None);
        let seen = Some(Timestamp::UNIX_EPOCH);
        assert_eq!(since(seen, Begin::Since(minute, asked)), Some(at));
    }
}
