//! `whydrop explain`: what the NetworkPolicies say of a connection, which line is missing, and a fix
//! that is proven.

use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cli::config::{ExplainArgs, ExplainOutput};
use crate::cli::format::{clean, clean_json, clean_lines};
use crate::cli::sentence;
use crate::cluster::files::Files;
use crate::event::Protocol;
use crate::policy::world::World;

mod answer;
mod target;
mod text;

use answer::{Answer, answer};

/// Allowed, or every expectation met.
const ALLOWED: u8 = 0;
/// Denied or undefined, or an expectation not met.
const DENIED: u8 = 1;
/// It cannot be told.
const ERROR: u8 = 2;

/// Explains one connection, or judges a file of them. The exit code is 0 if it is allowed, 1 if not,
/// 2 if that cannot be told.
///
/// # Errors
/// None: what goes wrong is said, and ends with 2.
pub fn run(args: ExplainArgs) -> Result<ExitCode> {
    let code = explain(&args, &mut BufWriter::new(std::io::stdout().lock()));
    Ok(ExitCode::from(code.unwrap_or_else(|error| {
        eprintln!("whydrop: {}", clean(&sentence(&error)));
        ERROR
    })))
}

fn explain(args: &ExplainArgs, out: &mut impl Write) -> Result<u8> {
    if args.objects.is_empty() {
        bail!(
            "give the cluster's objects with --objects, as \
             `kubectl get pods,svc,endpointslices,ns,nodes,netpol -A -o yaml` prints them"
        );
    }
    let (world, skipped) = load(args)?;
    let code = match (&args.flows, &args.source, &args.destination) {
        (Some(flows), None, None) => many(&world, flows, args.output, out)?,
        (None, Some(source), Some(destination)) => {
            let asked = Asked {
                src: source.clone(),
                dst: destination.clone(),
                protocol: args.protocol,
                port: args.port,
                expect: None,
            };
            let mut answer = answer(&world, &asked, true).map_err(|e| anyhow!(e))?;
            answer.skipped = skipped;
            let text = match args.output {
                ExplainOutput::Text => clean_lines(&text::of(&world, &answer)),
                ExplainOutput::Json => {
                    let value = answer::json(&world, &answer);
                    let json = serde_json::to_string_pretty(&value)?;
                    json.lines()
                        .map(|l| clean_json(l).into_owned() + "\n")
                        .collect()
                }
                ExplainOutput::Yaml => yaml(&answer::json(&world, &answer))?,
            };
            out.write_all(text.as_bytes())
                .context("cannot write the answer")?;
            match answer.allowed() {
                Some(true) => ALLOWED,
                Some(false) | None => DENIED,
            }
        }
        _ => bail!("say what to explain: a source and a destination, or a file with --flows"),
    };
    out.flush().context("cannot write the answer")?;
    Ok(code)
}

/// The objects of all files, and what of them cannot be used.
fn load(args: &ExplainArgs) -> Result<(World, Vec<String>)> {
    let (files, problems) = Files::open(&args.objects, Arc::default())?;
    // An answer without a whole file would be about another cluster.
    if let Some(broken) = problems
        .iter()
        .find(|p| p.kind.is_empty() && p.name.is_empty())
    {
        bail!("{broken}");
    }
    if files.objects().next().is_none() {
        bail!("--objects holds no object that counts for NetworkPolicies");
    }
    let skipped = problems.iter().map(ToString::to_string).collect();
    Ok((World::new(files.objects()), skipped))
}

/// One question, as `--flows` writes it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Asked {
    src: String,
    dst: String,
    #[serde(default = "tcp")]
    protocol: Protocol,
    port: Option<u16>,
    expect: Option<Expect>,
}

const fn tcp() -> Protocol {
    Protocol::TCP
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Expect {
    Allow,
    Deny,
}

impl Expect {
    fn is_met(self, allowed: Option<bool>) -> bool {
        allowed == Some(self == Self::Allow)
    }
}

fn many(world: &World, flows: &Path, output: ExplainOutput, out: &mut impl Write) -> Result<u8> {
    let cannot = || format!("cannot read {}", flows.display());
    let mut file = BufReader::new(File::open(flows).with_context(cannot)?);
    let (mut line, mut number) = (Vec::new(), 0);
    let (mut unmet, mut broken) = (false, false);
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
        let answered = asked.and_then(|asked| {
            let answer = answer(world, &asked, false)?;
            Ok((asked, answer))
        });
        let value = match &answered {
            Ok((asked, answer)) => {
                let met = asked.expect.map(|expect| expect.is_met(answer.allowed()));
                unmet |= met == Some(false);
                one_of_many(world, number, asked, answer, met)
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

fn one_of_many(
    world: &World,
    number: usize,
    asked: &Asked,
    answer: &Answer,
    met: Option<bool>,
) -> Value {
    let mut value = answer::json(world, answer);
    value["line"] = json!(number);
    value["src"] = json!(asked.src);
    value["dst"] = json!(asked.dst);
    if let Some(met) = met {
        value["met"] = json!(met);
    }
    value
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

fn yaml(value: &Value) -> Result<String> {
    Ok(format!(
        "---\n{}",
        clean_lines(&serde_saphyr::to_string(value)?)
    ))
}

#[cfg(test)]
mod tests;
