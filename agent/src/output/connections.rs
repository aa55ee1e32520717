//! `/v1/connections`: one line for each flow that conntrack has connections of and for each pair of the
//! counters, and a summary at the end.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use jiff::Timestamp;

use crate::connections::{Line, Summary, named, of_series};
use crate::record::Series;
use crate::source::conntrack::{self, Connected};
use crate::state::State;
use crate::sync::lock;

/// Lines that are named and written in one step: some 100 kB, and 0.2 ms in which the index is read.
const LINES_AT_ONCE: usize = 256;

/// What is told, before it has names.
pub struct Told {
    state: Arc<State>,
    flows: std::vec::IntoIter<(Connected, u64)>,
    series: std::vec::IntoIter<(Series, u64)>,
    summary: Option<Summary>,
}

/// Whether conntrack may be asked.
///
/// # Errors
/// It is not; says so.
pub fn may_ask(state: &State) -> Result<(), String> {
    let status = lock(&state.status);
    let is_on = status.sources.iter().any(|s| s.source == conntrack::SOURCE);
    match is_on {
        true => Ok(()),
        false => Err("not looked at, because of --conntrack off or not yet".to_owned()),
    }
}

/// Reads conntrack and the counters. Takes up to seconds: not for a task of the runtime.
pub fn read(state: Arc<State>) -> Told {
    let mut summary = Summary {
        node: state.node.clone(),
        time: Timestamp::now(),
        conntrack: Summary::READ.to_owned(),
        connections: 0,
        left_out: 0,
    };
    let mut flows = Vec::new();
    let looked = may_ask(&state).and_then(|()| {
        let found = conntrack::connections(Path::new("/proc"));
        found
            .map_err(|error| error.to_string())?
            .ok_or_else(|| "not in use on this node".to_owned())
    });
    match looked {
        Ok(found) => {
            summary.connections = found.count() + found.unreadable;
            summary.left_out = found.left_out + found.unreadable;
            flows = found.flows.into_iter().collect();
        }
        Err(why) => summary.conntrack = why,
    }
    let series = lock(&state.record).snapshot().series;
    Told {
        state,
        flows: flows.into_iter(),
        series: series.into_iter(),
        summary: Some(summary),
    }
}

/// The lines, in chunks; the next one is made when the client has taken the last.
pub fn lines(told: Told) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    stream::unfold(told, async |mut told| {
        let chunk = told.chunk();
        (!chunk.is_empty()).then_some((Ok(chunk.into()), told))
    })
}

impl Told {
    fn chunk(&mut self) -> Vec<u8> {
        let (mut chunk, now) = (Vec::new(), Timestamp::now());
        let node = &self.state.node;
        {
            let index = self.state.index();
            for (flow, count) in self.flows.by_ref().take(LINES_AT_ONCE) {
                let connection = named(&flow, count, &index, node, now);
                write(&mut chunk, &Line::Connection(connection));
            }
        }
        if !chunk.is_empty() {
            return chunk;
        }
        for (series, count) in self.series.by_ref() {
            if let Some(connection) = of_series(&series, count, node) {
                write(&mut chunk, &Line::Connection(connection));
            }
            if chunk.len() > LINES_AT_ONCE * 400 {
                return chunk;
            }
        }
        if chunk.is_empty()
            && let Some(summary) = self.summary.take()
        {
            write(&mut chunk, &Line::Summary(summary));
        }
        chunk
    }
}

fn write(chunk: &mut Vec<u8>, line: &Line) {
    // Fails only for maps whose keys are no strings; a line has no map.
    if let Err(error) = serde_json::to_writer(&mut *chunk, line) {
        tracing::error!(%error, "a connection could not be written as JSON");
    }
    chunk.push(b'\n');
}
