//! `whydrop tail` over all agents of a cluster.

use std::collections::HashMap;
use std::io::{self, IsTerminal as _};
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Duration, Instant};

use super::Agents;
use super::agents::{Agent, Change, DELETED, ListError};
use super::arguments::Part;
use super::exec::ExecError;
use super::history;
use super::merge::{Item, REORDERED, Reorder, WINDOW};
use super::node::{self, Begin, NodeLines, Update};
use crate::cli::config::TailArgs;
use crate::cli::format::clean;
use crate::cli::printer::{Printer, Stdout, Written};
use crate::cli::say;
use crate::cli::tail::range;
use crate::output::query::Since;

/// Pieces of lines, of 16 KiB each, between the nodes and the output. When they wait, the nodes' connections
/// are not read.
const UPDATES: usize = 64;
/// How long a node that is asked for what was before may say nothing: what comes is not followed meanwhile. In
/// all it is some times that.
const HISTORY: Duration = Duration::from_secs(5);
/// Lines that are written in one step.
const WRITTEN: usize = 1024;

/// Prints what the agents have, and with `--follow` what comes.
///
/// # Errors
/// If nothing can be asked, or stdout cannot be written.
pub async fn tail(agents: Agents, args: TailArgs) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let agents = Arc::new(agents);
    let range = range(&args, io::stdout().is_terminal());
    let mut output = Output {
        printer: Printer::new(&args, true),
    };
    let all = agents.list().await?;
    let part = Part {
        heartbeat: None,
        last: range.last,
        since: range.since,
    };
    let begins_now = range.last.unwrap_or(0) == 0 && range.since.is_none();
    let mut read = HashMap::new();
    if !range.follow || !begins_now {
        let patience = match range.follow {
            true => agents.timeout.min(HISTORY),
            false => agents.timeout,
        };
        let history = history::collect(&agents, &all, part, patience).await?;
        if output.write(history.items).await? == Written::Closed {
            return Ok(ExitCode::SUCCESS);
        }
        if !range.follow {
            for (agent, error) in &history.failures {
                say(format_args!("the agent on {}: {error}", name(agent)));
            }
            return Ok(match history.failures.is_empty() {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            });
        }
        read = history.read;
    }
    let begin = match (begins_now, range.since) {
        (true, _) => Begin::Now,
        (false, Some(since)) => Begin::Since(since, began),
        // Nobody has the last ones any more who did not have them at first.
        (false, None) => Begin::At(began),
    };
    let (updates, mut updated) = mpsc::channel(UPDATES);
    let mut following = Following {
        agents: agents.clone(),
        began,
        updates,
        followed: HashMap::new(),
        was_connected: false,
        refused: Refused::default(),
    };
    for agent in all {
        let (lines, begin) = match (read.remove(&agent.uid), begin) {
            // Who answered and had nothing has nothing of before: whatever it has later is new.
            (Some((lines, true)), Begin::At(_)) => {
                let ever = Since::At(Timestamp::UNIX_EPOCH);
                (Some(lines), Begin::Since(ever, began))
            }
            (lines, begin) => (lines.map(|(lines, _)| lines), begin),
        };
        following.begin(agent, lines, begin);
    }
    let mut watch = pin!(agents.watch());
    let mut watch_said = None;
    let mut reorder = Reorder::new(REORDERED);
    let mut out = Vec::new();
    loop {
        let window = following.window();
        let due = reorder.next_due(window);
        tokio::select! {
            Some(change) = watch.next() => match change {
                Ok(change) => {
                    watch_said = None;
                    // A watch outlives its credentials; what begins with a list was accepted now.
                    if matches!(change, Change::All(_)) {
                        following.refused.not_any_more();
                    }
                    following.change(change);
                }
                Err(ListError::Unauthorized) => {
                    following.refused.tell(&ExecError::Unauthorized);
                }
                Err(ListError::NotRenewed(error)) => following.refused.tell(&error.into()),
                Err(error) => {
                    let error = error.to_string();
                    if watch_said.as_ref() != Some(&error) {
                        say(format_args!("{error}; agents that come or go are not noticed"));
                    }
                    watch_said = Some(error);
                }
            },
            Some((uid, update)) = updated.recv() => {
                for item in following.update(&uid, update)? {
                    reorder.push(item, Instant::now(), &mut out);
                }
            }
            () = until(due) => {}
        }
        reorder.pop_due(Instant::now(), window, &mut out);
        if output.write(std::mem::take(&mut out)).await? == Written::Closed {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// How an agent is called.
pub fn name(agent: &Agent) -> String {
    match &*agent.node {
        "" => format!("no node yet (pod {})", clean(&agent.pod)),
        node => clean(node).into_owned(),
    }
}

struct Output {
    printer: Printer,
}

impl Output {
    /// Writes on a thread of its own, so that a slow reader does not keep this one from what the
    /// connections need. Nothing else is taken in meanwhile.
    async fn write(&mut self, items: Vec<Item>) -> anyhow::Result<Written> {
        for items in items.chunks(WRITTEN) {
            let text = self.printer.text(items.iter().map(|item| &*item.line));
            let written = tokio::task::spawn_blocking(move || Stdout.write(text.as_bytes()));
            match written.await.context("writing was broken off")?? {
                Written::All => {}
                Written::Closed => return Ok(Written::Closed),
            }
        }
        Ok(Written::All)
    }
}

/// One agent that is followed.
struct Followed {
    agent: Agent,
    task: AbortHandle,
    state: State,
    /// Why it is forgotten when it breaks off: its pod is being deleted, is gone, or has ended.
    leaving: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// It did not answer yet.
    New,
    /// It came later than the others.
    Joined,
    Connected,
    /// Told of.
    Away,
}

/// What was told of an account that is refused, which all agents have in common.
#[derive(Default)]
struct Refused {
    /// The credentials are not accepted any more.
    unauthorized: bool,
    /// And those that there are now cannot be read.
    not_renewed: bool,
    /// The account may not ask agents any more.
    forbidden: bool,
}

impl Refused {
    fn tell(&mut self, error: &ExecError) {
        let told = match error {
            ExecError::NotRenewed(_) => &mut self.not_renewed,
            ExecError::Forbidden(_) => &mut self.forbidden,
            _ => &mut self.unauthorized,
        };
        if !std::mem::replace(told, true) {
            say(format_args!("{error}; trying it again"));
        }
    }

    /// The credentials are accepted.
    fn not_any_more(&mut self) {
        if self.unauthorized || self.not_renewed {
            say("the API server accepts the credentials again");
        }
        (self.unauthorized, self.not_renewed) = (false, false);
    }
}

struct Following {
    agents: Arc<Agents>,
    began: Instant,
    updates: mpsc::Sender<(String, Update)>,
    /// By the pod's UID.
    followed: HashMap<String, Followed>,
    was_connected: bool,
    refused: Refused,
}

impl Following {
    /// One node has nobody to wait for.
    fn window(&self) -> Duration {
        if self.followed.len() > 1 {
            WINDOW
        } else {
            Duration::ZERO
        }
    }

    fn begin(&mut self, agent: Agent, lines: Option<NodeLines>, begin: Begin) {
        if let Some(problem) = &agent.problem {
            let name = name(&agent);
            let next = if agent.is_leaving {
                "the next one"
            } else {
                "it"
            };
            say(format_args!(
                "the agent on {name}: {problem}; {next} is followed once it runs"
            ));
            return;
        }
        self.spawn(agent, lines, begin, State::New);
    }

    fn spawn(&mut self, agent: Agent, lines: Option<NodeLines>, begin: Begin, state: State) {
        let lines = lines.unwrap_or_else(|| NodeLines::new(&agent.node));
        let (agents, updates) = (self.agents.clone(), self.updates.clone());
        let task = tokio::spawn(node::follow(agents, agent.clone(), lines, begin, updates));
        let followed = Followed {
            task: task.abort_handle(),
            state,
            leaving: None,
            agent,
        };
        self.followed.insert(followed.agent.uid.clone(), followed);
    }

    /// Agents came, changed or went.
    fn change(&mut self, change: Change) {
        match change {
            Change::All(all) => {
                let gone: Vec<_> = self
                    .followed
                    .keys()
                    .filter(|uid| all.iter().all(|agent| agent.uid != **uid))
                    .cloned()
                    .collect();
                gone.iter().for_each(|uid| self.leave(uid, DELETED));
                all.into_iter().for_each(|agent| self.changed(agent));
            }
            Change::Changed(agent) => self.changed(agent),
            Change::Gone(uid) => self.leave(&uid, DELETED),
        }
    }

    fn changed(&mut self, agent: Agent) {
        match (&agent.problem, self.followed.get_mut(&agent.uid)) {
            (Some(problem), Some(_)) => self.leave(&agent.uid, problem),
            // As after its node's restart.
            (None, Some(followed)) => followed.leaving = None,
            (None, None) => self.spawn(agent, None, Begin::At(self.began), State::Joined),
            (Some(_), None) => {}
        }
    }

    /// A pod goes away. What its agent still says is read, until it breaks off; also if it only begins to
    /// answer.
    fn leave(&mut self, uid: &str, why: &str) {
        let Some(followed) = self.followed.get_mut(uid) else {
            return;
        };
        followed.leaving = Some(why.to_owned());
        if followed.state == State::Away {
            followed.task.abort();
            self.followed.remove(uid);
        }
    }

    /// What a node says: its lines, which are to be shown.
    fn update(&mut self, uid: &str, update: Update) -> anyhow::Result<Vec<Item>> {
        let Some(followed) = self.followed.get_mut(uid) else {
            // It was forgotten a moment ago.
            return Ok(match update {
                Update::Items(items) => items,
                Update::Connected | Update::Away(_) => Vec::new(),
            });
        };
        let name = name(&followed.agent);
        match update {
            Update::Items(items) => return Ok(items),
            Update::Connected => {
                match followed.state {
                    State::Away => say(format_args!("the agent on {name} is back")),
                    State::Joined => say(format_args!("the agent on {name} is followed too")),
                    State::New | State::Connected => {}
                }
                followed.state = State::Connected;
                self.was_connected = true;
                self.refused.forbidden = false;
                self.refused.not_any_more();
            }
            Update::Away(error) if error.is_refused() && !self.was_connected => {
                return Err(error.into());
            }
            Update::Away(_) if let Some(why) = &followed.leaving => {
                say(format_args!("the agent on {name} went away: {why}"));
                followed.task.abort();
                self.followed.remove(uid);
            }
            Update::Away(error) if error.is_refused() => self.refused.tell(&error),
            Update::Away(error) => {
                match followed.state {
                    _ if error.is_final() => {
                        say(format_args!("the agent on {name} is left out: {error}"));
                    }
                    State::Away => {}
                    State::Connected => {
                        say(format_args!(
                            "the agent on {name} went away ({error}); waiting for it"
                        ));
                    }
                    State::New | State::Joined => {
                        say(format_args!(
                            "the agent on {name} does not answer ({error}); waiting for it"
                        ));
                    }
                }
                followed.state = State::Away;
            }
        }
        Ok(Vec::new())
    }
}
