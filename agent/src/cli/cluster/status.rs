//! `whydrop status` over all agents of a cluster: a row for each node.

use std::process::ExitCode;

use futures_util::stream::{self, StreamExt as _};
use serde_json::{Value, json};

use super::agents::Agent;
use super::exec::ExecError;
use super::{Agents, OPENING, arguments};
use crate::cli::config::ReportOutput;
use crate::cli::format::{clean, clean_json_lines, clean_lines};
use crate::cli::printer::Stdout;

/// Prints what the agents say of themselves; one that does not answer has a row that says why.
///
/// # Errors
/// If nothing can be asked, or stdout cannot be written.
pub async fn status(agents: Agents, output: ReportOutput) -> anyhow::Result<ExitCode> {
    let all = agents.list().await?;
    let asked = all.iter().map(|agent| ask(&agents, agent));
    let mut asked = stream::iter(asked).buffered(OPENING);
    let (mut rows, mut failed) = (Vec::new(), false);
    while let Some((agent, answer)) = asked.next().await {
        failed |= answer.is_err();
        rows.push(match answer {
            Err(error) if error.is_refused() => return Err(error.into()),
            answer => row(agent, answer),
        });
    }
    let text = match output {
        ReportOutput::Json => clean_json_lines(&serde_json::to_string_pretty(&rows)?),
        ReportOutput::Text => clean_lines(&table(&rows)),
    };
    Stdout.write(text.as_bytes())?;
    Ok(match failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

async fn ask<'a>(agents: &Agents, agent: &'a Agent) -> (&'a Agent, Result<Value, ExecError>) {
    let answer = agents.run(agent, &arguments::status()).await;
    let answer = answer.and_then(|text| {
        let status = serde_json::from_str(&text).ok().filter(Value::is_object);
        status.ok_or_else(|| ExecError::Failed("its answer is no status".to_owned()))
    });
    (agent, answer)
}

/// The agent's status and its pod, or why there is none.
fn row(agent: &Agent, answer: Result<Value, ExecError>) -> Value {
    let mut row = match answer {
        Ok(status) => status,
        Err(error) => json!({"node": agent.node, "error": error.to_string()}),
    };
    row["pod"] = agent.pod.clone().into();
    row
}

const HEAD: [&str; 6] = ["NODE", "VERSION", "SINCE", "READY", "LOST", "SOURCES DOWN"];

fn table(rows: &[Value]) -> String {
    let mut cells = vec![HEAD.map(str::to_owned)];
    cells.extend(rows.iter().map(cells_of));
    let widths: Vec<usize> = (0..HEAD.len())
        .map(|column| cells.iter().map(|row| row[column].chars().count()).max())
        .map(Option::unwrap_or_default)
        .collect();
    let mut text = String::new();
    for row in cells {
        let padded = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        text += padded.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// What is not known is `-`.
fn cells_of(row: &Value) -> [String; 6] {
    let text = |name: &str| match row[name].as_str() {
        Some(text) if !text.is_empty() => clean(text).into_owned(),
        _ => "-".to_owned(),
    };
    if let Some(error) = row["error"].as_str() {
        let none = || "-".to_owned();
        return [
            text("node"),
            none(),
            none(),
            "no".to_owned(),
            none(),
            clean(error).into_owned(),
        ];
    }
    let ready = match row["ready"].as_bool() {
        Some(true) => "yes",
        Some(false) => "no",
        None => "-",
    };
    let lost = row["lost"].as_object().map(|lost| {
        let lost: u64 = lost.values().filter_map(Value::as_u64).sum();
        lost.to_string()
    });
    let sources = row["sources"].as_array().into_iter().flatten();
    let down: Vec<_> = sources
        .filter(|source| source["up"] == false)
        .filter_map(|source| source["source"].as_str().map(clean))
        .collect();
    let down = match &down[..] {
        [] => "none".to_owned(),
        down => down.join(", "),
    };
    [
        text("node"),
        text("version"),
        text("since"),
        ready.to_owned(),
        lost.unwrap_or_else(|| "-".to_owned()),
        down,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_for_each_node_also_for_one_that_does_not_answer() {
        let agent = |node: &str| Agent {
            node: node.to_owned(),
            pod: format!("whydrop-{node}"),
            uid: String::new(),
            container: None,
            problem: None,
            is_leaving: false,
        };
        let status = json!({"node": "node-a", "version": "0.1.0", "since": "2026-11-22T12:03:10Z",
            "ready": true, "lost": {"ring": 3, "queue": 4}, "sources": [
                {"source": "drops", "up": true}, {"source": "dns", "up": false},
                {"source": "told", "up": false}]});
        let rows = [
            row(&agent("node-a"), Ok(status)),
            row(&agent("b"), Err(ExecError::Failed("\u{1b}[2J".to_owned()))),
            // Of a version that says less.
            row(&agent("c"), Ok(json!({"node": "c", "ready": false}))),
        ];
        assert_eq!(
            table(&rows),
            "NODE    VERSION  SINCE                 READY  LOST  SOURCES DOWN\n\
             node-a  0.1.0    2026-11-22T12:03:10Z  yes    7     dns, told\n\
             b       -        -                     no     -     \\u{1b}[2J\n\
             c       -        -                     no     -     none\n"
        );
        assert_eq!(rows[0]["pod"], "whydrop-node-a");
        assert_eq!(rows[1]["node"], "b");
    }
}
