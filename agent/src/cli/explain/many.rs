//! `--flows`: many connections, one answer a line; a test of policies.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::source::{Failure, Source};
use super::{ALLOWED, DENIED, ERROR, yaml};
use crate::answer::question::Asked;
use crate::cli::config::ExplainOutput;
use crate::cli::format::{clean, clean_json};

/// Judges each line of a file. 1 if an `expect` is not met, else 2 if a line is broken.
pub fn run(
    source: &Source,
    flows: &Path,
    output: ExplainOutput,
    out: &mut impl Write,
) -> Result<u8> {
    let cannot = || format!("cannot read {}", flows.display());
    let mut file = BufReader::new(File::open(flows).with_context(cannot)?);
    let (mut line, mut number) = (Vec::new(), 0);
    let (mut unmet, mut broken) = (false, false);
    source.say();
    loop {
        line.clear();
        if file.read_until(b'\n', &mut line).with_context(cannot)? == 0 {
            break;
        }
        number += 1;
        if line.trim_ascii().is_empty() {
            continue;
        }
        let asked = serde_json::from_slice::<Asked>(&line).map_err(|e| e.to_string());
        let answered = match asked {
            Err(error) => Err(error),
            Ok(asked) => match source.answer(&asked, false) {
                Ok(answer) => Ok((asked, answer)),
                Err(Failure::Question(error)) => Err(error),
                // The next line would fare no better.
                Err(Failure::Source(error)) => return Err(error),
            },
        };
        let value = match answered {
            Ok((asked, mut answer)) => {
                answer["line"] = json!(number);
                answer["src"] = json!(asked.src);
                answer["dst"] = json!(asked.dst);
                if let Some(expect) = asked.expect {
                    let met = expect.is_met(answer["allowed"].as_bool());
                    answer["met"] = json!(met);
                    unmet |= !met;
                }
                answer
            }
            Err(error) => {
                broken = true;
                json!({"line": number, "error": error})
            }
        };
        let text = match output {
            ExplainOutput::Json => clean_json(&value.to_string()).into_owned() + "\n",
            ExplainOutput::Yaml => yaml(&value)?,
            ExplainOutput::Text => short(&value),
        };
        out.write_all(text.as_bytes())
            .context("cannot write the answers")?;
    }
    Ok(match (unmet, broken) {
        (true, _) => DENIED,
        (false, true) => ERROR,
        (false, false) => ALLOWED,
    })
}

/// One line of text for one of many.
fn short(value: &Value) -> String {
    let text = |name: &str| value[name].as_str().unwrap_or("").to_owned();
    let line = match value.get("error").and_then(Value::as_str) {
        Some(error) => format!("ERROR      line {}: {error}", value["line"]),
        None => {
            let verdict = match value["allowed"].as_bool() {
                Some(true) => "ALLOWED",
                Some(false) => "DENIED",
                None => "UNDEFINED",
            };
            let unmet = match value.get("met") == Some(&json!(false)) {
                true => "  (expected otherwise)",
                false => "",
            };
            let port = match &value["port"] {
                Value::Null => String::new(),
                port => format!(" {port}"),
            };
            let (src, dst, protocol) = (text("src"), text("dst"), text("protocol"));
            format!("{verdict:9}  {src} → {dst}  {protocol}{port}{unmet}")
        }
    };
    clean(&line).into_owned() + "\n"
}
