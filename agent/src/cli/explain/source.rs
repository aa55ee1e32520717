//! Who answers: files, a running agent, or the API server's objects.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use http_body_util::BodyExt as _;
use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::cluster;
use crate::answer::missing::Missing;
use crate::answer::origin::Origin;
use crate::answer::question::{Asked, Query};
use crate::answer::{Ground, answer, json, text};
use crate::cli::client::{self, ClientError};
use crate::cli::config::{ExplainArgs, From};
use crate::cli::{say, sentence};
use crate::cluster::files::Files;
use crate::policy::world::World;

/// How long an agent may take to work an answer out: of the largest clusters it first has to take the objects
/// together, and others may ask as well.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// What `kubectl` prints for `--objects`.
const OBJECTS: &str = "give the cluster's objects with --objects, as \
                       `kubectl get pods,svc,endpointslices,ns,nodes,netpol -A -o yaml` prints them";

/// Who answers.
pub enum Source {
    /// Objects that are evaluated here.
    Ground(Ground),
    /// An agent.
    Agent(Agent),
}

/// An agent that is asked.
pub struct Agent {
    socket: PathBuf,
    runtime: Runtime,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// The question names what is not there.
    Question(String),
    /// Nobody can answer it.
    Source(anyhow::Error),
}

impl Failure {
    /// As an error.
    pub fn into_error(self) -> anyhow::Error {
        match self {
            Self::Question(why) => anyhow!(why),
            Self::Source(error) => error,
        }
    }
}

impl Source {
    /// Whom the flags mean.
    ///
    /// # Errors
    /// Nobody can be asked, or files cannot be read.
    pub fn of(args: &ExplainArgs) -> Result<Self> {
        if !args.objects.is_empty() {
            return files(&args.objects).map(Self::Ground);
        }
        let is_named = args.from == From::Agent || args.agents.socket.is_some();
        match args.from {
            From::Cluster => cluster::ground(&args.agents.kube).map(Self::Ground),
            From::Agent | From::Auto if is_named => Agent::at(&args.socket()).map(Self::Agent),
            From::Agent | From::Auto => {
                let agent = Agent::at(&args.socket())?;
                let why = match agent.knows_objects() {
                    Ok(true) => return Ok(Self::Agent(agent)),
                    Ok(false) => "the agent of this node knows no objects".to_owned(),
                    Err(error) => error.to_string(),
                };
                ground_of_cluster(&why, args).map(Self::Ground)
            }
        }
    }

    /// The answer as JSON, with fixes or without.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn answer(&self, asked: &Asked, fixes: bool) -> Result<Value, Failure> {
        self.ask(asked, fixes, false)
    }

    /// The answer with fixes, and in its field `text` as people read it.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn answer_with_text(&self, asked: &Asked) -> Result<Value, Failure> {
        self.ask(asked, true, true)
    }

    fn ask(&self, asked: &Asked, fixes: bool, with_text: bool) -> Result<Value, Failure> {
        match self {
            Self::Ground(ground) => {
                let answer = answer(ground, asked, fixes).map_err(Failure::Question)?;
                let mut value = json::of(&answer);
                if with_text {
                    value["text"] = json!(text::of(&answer));
                }
                Ok(value)
            }
            Self::Agent(agent) => agent.ask(&Query {
                asked: asked.clone(),
                brief: !fixes,
                text: with_text,
            }),
        }
    }

    /// Says on stderr whose objects count, unless that was said on the command line.
    pub fn say(&self) {
        match self {
            Self::Agent(agent) => {
                say(format_args!(
                    "answers of the agent on {}",
                    agent.socket.display()
                ));
            }
            Self::Ground(ground) if ground.origin != Origin::Files => {
                say(format_args!("pods and policies {}", ground.origin));
            }
            Self::Ground(_) => {}
        }
    }
}

/// The API server's objects; `why` no agent is asked belongs to the error if there is none either.
fn ground_of_cluster(why: &str, args: &ExplainArgs) -> Result<Ground> {
    cluster::ground(&args.agents.kube)
        .map_err(|error| anyhow!("{why}; {}; or {OBJECTS}", sentence(&error)))
}

/// The objects for proposed policies: of files, else of the API server.
///
/// # Errors
/// There is neither.
pub fn ground(args: &ExplainArgs) -> Result<Ground> {
    match args.objects.is_empty() {
        false => files(&args.objects),
        true => cluster::ground(&args.agents.kube)
            .map_err(|error| anyhow!("{}; or {OBJECTS}", sentence(&error))),
    }
}

/// The objects of all files.
fn files(paths: &[PathBuf]) -> Result<Ground> {
    let (files, problems) = Files::open(paths, Arc::default())?;
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
    Ok(Ground {
        world: Arc::new(World::new(files.objects())),
        origin: Origin::Files,
        missing: Missing::default(),
        skipped: problems.iter().map(ToString::to_string).collect(),
    })
}

impl Agent {
    fn at(socket: &Path) -> Result<Self> {
        Ok(Self {
            socket: socket.to_owned(),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?,
        })
    }

    /// Whether it could answer.
    fn knows_objects(&self) -> Result<bool, ClientError> {
        let status = self.get("/v1/status")?;
        let counts = status["index"].as_object();
        Ok(counts.is_some_and(|counts| counts.values().any(|n| n.as_u64() > Some(0))))
    }

    fn ask(&self, query: &Query) -> Result<Value, Failure> {
        let target = format!("/v1/explain?{}", query.to_query_string());
        self.get(&target).map_err(|error| match error {
            ClientError::Refused(StatusCode::BAD_REQUEST, why) => Failure::Question(why),
            ClientError::Refused(StatusCode::NOT_FOUND, why) => Failure::Source(
                anyhow!("{why}").context("the agent is of a version that explains nothing"),
            ),
            error => Failure::Source(error.into()),
        })
    }

    fn get(&self, target: &str) -> Result<Value, ClientError> {
        self.runtime.block_on(async {
            let answer = client::get_within(&self.socket, target, ANSWER_TIMEOUT).await?;
            let body = answer.into_body().collect().await?.to_bytes();
            let value = serde_json::from_slice(&body).context("no JSON");
            value.map_err(|error| {
                let why = format!("what cannot be read: {}", sentence(&error));
                ClientError::Refused(StatusCode::OK, why)
            })
        })
    }
}
