//! `/v1/explain`: what the policies of this agent's objects say of a connection, and what was observed of it.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::answer::missing::Missing;
use crate::answer::observed::{Observed, Wanted};
use crate::answer::origin::Origin;
use crate::answer::question::Query;
use crate::answer::{Answer, Ground, answer, json, text};
use crate::cluster::ObjectKind;
use crate::cluster::watch;
use crate::source::conntrack;
use crate::state::State;
use crate::sync::lock;

/// Questions that are worked out at once: each is up to some tenths of a second of a core, and the agent is to
/// leave its node alone. More wait; they are connections to the local API, which are bounded.
pub const AT_ONCE: usize = 2;

/// Entries of a conntrack table that is looked through for one answer, at some microseconds each. Of a larger
/// one the count of connections is left out.
const MOST_ENTRIES: u64 = 50_000;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The question names what is not there.
    #[error("{0}")]
    Bad(String),
    /// There is nothing to answer it with.
    #[error("{0}")]
    NotYet(String),
}

/// Works out the answer. Takes milliseconds: not for a task of the runtime.
///
/// # Errors
/// See [`Refusal`].
pub fn explain(state: &State, query: &Query) -> Result<Value, Refusal> {
    let ground = ground(state)?;
    let mut answer = answer(&ground, &query.asked, !query.brief).map_err(|why| {
        Refusal::Bad(match watches_its_node(state) {
            true => format!(
                "{why}; this agent knows the pods of its node, and of others those that it met \
                 lately: ask the API server"
            ),
            false => why,
        })
    })?;
    if watches_its_node(state) {
        answer.notes.push(
            "this agent knows the pods of its node, and of others those that it met lately: what a \
             fix admits beside may be more than is listed"
                .to_owned(),
        );
    }
    answer.observed = Some(observe(state, &answer, query));
    let mut value = json::of(&answer);
    if query.text {
        value["text"] = json!(text::of(&answer));
    }
    Ok(value)
}

/// The objects, and which kinds of them are not known.
fn ground(state: &State) -> Result<Ground, Refusal> {
    let missing = missing(state);
    if let Some(why) = missing.why(ObjectKind::Pod) {
        return Err(Refusal::NotYet(format!("this agent knows no pods: {why}")));
    }
    let (world, time) = {
        let index = state.index();
        if index.objects().next().is_none() {
            return Err(Refusal::NotYet(
                "this agent knows no objects yet: it has neither a cluster nor --objects, or has \
                 not read them"
                    .to_owned(),
            ));
        }
        state.worlds.latest(&index, Instant::now())
    };
    let node = state.node.clone();
    Ok(Ground {
        world,
        origin: Origin::Agent { node, time },
        missing,
        skipped: Vec::new(),
    })
}

/// Kinds that were never read whole: refused, or not listed yet.
fn missing(state: &State) -> Missing {
    let mut missing = Missing::default();
    let counts: Vec<usize> = state.index().counts().map(|(_, count)| count).collect();
    let status = lock(&state.status);
    // Without a cluster the objects are files', and whole.
    if !status.sources.iter().any(|s| s.source == watch::SOURCE) {
        return missing;
    }
    for kind in watch::KINDS {
        let is_empty = counts.get(kind as usize).is_none_or(|count| *count == 0);
        let source = watch::source_of(kind);
        let source = status.sources.iter().find(|s| s.source == source);
        let why = match source {
            // What was listed once is as it was then.
            Some(source) if source.up || !is_empty => continue,
            Some(source) => source.why.clone().unwrap_or_default(),
            // Not in every cluster, and not with `--watch node`.
            None if watch::OPTIONAL.contains(&kind) || kind == ObjectKind::EndpointSlice => {
                continue;
            }
            None => format!("{} are not listed yet", kind.plural()),
        };
        missing.add(kind, why);
    }
    missing
}

fn watches_its_node(state: &State) -> bool {
    state.awaited.asks()
}

fn observe(state: &State, answer: &Answer, query: &Query) -> Observed {
    let wanted = Wanted::of(answer, query.asked.port);
    let lines = state.stream.kept();
    let mut observed = wanted.look(&state.node, &lock(&state.record), &lines);
    if query.brief {
        return observed;
    }
    match connections(state, &wanted) {
        Ok(count) => observed.connections = Some(count),
        Err(why) => observed.connections_unknown = Some(why),
    }
    observed
}

/// How many connections of this kind conntrack has now, or why that is not known.
fn connections(state: &State, wanted: &Wanted) -> Result<u64, String> {
    super::connections::may_ask(state)?;
    let proc = Path::new("/proc");
    let entries = conntrack::stats(proc).entries.unwrap_or(0);
    if entries > MOST_ENTRIES {
        return Err(format!(
            "conntrack has {entries} entries: too many to look at for one answer"
        ));
    }
    match conntrack::connections(proc) {
        Ok(None) => Err("conntrack is not in use".to_owned()),
        Ok(Some(all)) => {
            let own = all.flows.iter().filter(|(flow, _)| {
                wanted.has_addresses(flow.protocol, flow.source, flow.destination)
            });
            Ok(own.map(|(_, count)| count).sum())
        }
        Err(error) => Err(error.to_string()),
    }
}
