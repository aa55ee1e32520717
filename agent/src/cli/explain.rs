//! `whydrop explain`: what the NetworkPolicies say of a connection, which line is missing, and a fix
//! that is proven.
//!
//! | file | what |
//! |---|---|
//! | `source.rs` | who answers: files, an agent, or the API server's objects |
//! | `cluster.rs` | the API server's objects |
//! | `many.rs` | `--flows` |
//! | `with.rs` | `--with`: which connections proposed policies would deny |

use std::io::{BufWriter, Write};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use self::source::Source;
use crate::answer::question::Asked;
use crate::cli::config::{ExplainArgs, ExplainOutput};
use crate::cli::format::{clean, clean_json, clean_lines};
use crate::cli::{say, sentence};

mod cluster;
mod many;
mod source;
mod with;

/// Allowed, or every expectation met, or nothing that would be denied.
const ALLOWED: u8 = 0;
/// Denied or undefined, or an expectation not met.
const DENIED: u8 = 1;
/// It cannot be told.
const ERROR: u8 = 2;

/// Explains one connection, judges a file of them, or lays proposed policies against those that are
/// there. The exit code is 0 if it is allowed, 1 if not, 2 if that cannot be told.
///
/// # Errors
/// None: what goes wrong is said, and ends with 2.
pub fn run(args: ExplainArgs) -> Result<ExitCode> {
    let code = explain(&args, &mut BufWriter::new(std::io::stdout().lock()));
    Ok(ExitCode::from(code.unwrap_or_else(|error| {
        say(clean(&sentence(&error)));
        ERROR
    })))
}

fn explain(args: &ExplainArgs, out: &mut impl Write) -> Result<u8> {
    let is_proposal = !args.with.is_empty() || !args.without.is_empty();
    let code = match (&args.flows, &args.source, &args.destination) {
        (None, None, None) if is_proposal => with::run(args, out)?,
        (Some(flows), None, None) => many::run(&Source::of(args)?, flows, args.output, out)?,
        (None, Some(source), Some(destination)) => {
            let asked = Asked {
                src: source.clone(),
                dst: destination.clone(),
                protocol: args.protocol,
                port: args.port,
                expect: None,
            };
            one(&Source::of(args)?, &asked, args.output, out)?
        }
        _ => bail!(
            "say what to explain: a source and a destination, a file with --flows, or proposed \
             policies with --with"
        ),
    };
    out.flush().context("cannot write the answer")?;
    Ok(code)
}

fn one(source: &Source, asked: &Asked, output: ExplainOutput, out: &mut impl Write) -> Result<u8> {
    let answer = match output {
        ExplainOutput::Text => source.answer_with_text(asked),
        ExplainOutput::Json | ExplainOutput::Yaml => source.answer(asked, true),
    };
    let answer = answer.map_err(source::Failure::into_error)?;
    let text = match output {
        ExplainOutput::Text => clean_lines(answer["text"].as_str().unwrap_or_default()),
        ExplainOutput::Json => pretty(&answer)?,
        ExplainOutput::Yaml => yaml(&answer)?,
    };
    out.write_all(text.as_bytes())
        .context("cannot write the answer")?;
    Ok(match answer["allowed"].as_bool() {
        Some(true) => ALLOWED,
        Some(false) | None => DENIED,
    })
}

fn pretty(value: &Value) -> Result<String> {
    let json = serde_json::to_string_pretty(value)?;
    let lines = json.lines();
    Ok(lines.map(|l| clean_json(l).into_owned() + "\n").collect())
}

fn yaml(value: &Value) -> Result<String> {
    Ok(format!(
        "---\n{}",
        clean_lines(&serde_saphyr::to_string(value)?)
    ))
}

#[cfg(test)]
mod tests;
