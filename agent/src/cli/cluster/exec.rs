//! One command in an agent's pod: its lines as they come, and how it ended.

use std::pin::Pin;

use bytes::BytesMut;
use futures_util::FutureExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::api::{AttachParams, AttachedProcess};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::time::{Duration, timeout};

use super::Agents;
use super::agents::{Agent, does_not_answer};
use super::lines::Lines;
use super::login::NotRenewed;
use crate::cli::format::clean;
use crate::cluster::watch::causes;

/// The binary in the agent's container. Its image has `/` in PATH, and so has one that packs it elsewhere
/// its own.
const PROGRAM: &str = "whydrop";
/// What lies between the connection and whoever takes the lines. With a slow reader it fills, the
/// connection is not read any more, and the agent loses lines, which it says itself.
const PIPE_BYTES: usize = 16 << 10;
/// Of what the command says on stderr; its first line has the reason.
const STDERR_BYTES: usize = 4 << 10;
/// Of an answer that is taken whole, as that of `whydrop status`, some 10 kB.
const MAX_OUTPUT_BYTES: usize = 4 << 20;
/// An API server that is busy is asked again this often.
const TRIES: u32 = 3;
const BUSY_PAUSE: Duration = Duration::from_millis(500);
/// An answer that has an end is there within this many times what a request may take: what an agent keeps are
/// some MB. Else one that says a little now and then would be waited for without end.
const WHOLE: u32 = 4;
/// clap's exit code for what it does not know.
const USAGE: i32 = 2;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What is said of a 401.
pub const UNAUTHORIZED: &str = "the API server does not accept the credentials (401): log in again, or \
                                choose others with --context, --user or --token";

/// Why a command in an agent's pod did not do what it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExecError {
    /// The account may not. A websocket asks by GET, so `get` is needed too, and before 1.35 is enough.
    #[error(
        "not allowed to create pods/exec in namespace {0}: add the rule {{apiGroups: [\"\"], \
         resources: [pods/exec], verbs: [create, get]}} to a Role of yours there, as \
         deploy/base/reader.yaml has it"
    )]
    Forbidden(String),
    /// The account is none, or its token expired.
    #[error("{UNAUTHORIZED}")]
    Unauthorized,
    /// The same, and there is nothing newer.
    #[error(transparent)]
    NotRenewed(#[from] NotRenewed),
    /// The server does not run it.
    #[error("{0}")]
    NotRun(String),
    /// Nothing comes.
    #[error("{}", does_not_answer(*.0))]
    Silent(Duration),
    /// It goes on and on.
    #[error("its answer did not end within {} s", .0.as_secs())]
    Endless(Duration),
    /// The whydrop there does not understand the whydrop here.
    #[error(
        "its whydrop does not know what it is asked ({0}): is it of another version than {VERSION}?"
    )]
    Version(String),
    /// The command failed, and said why.
    #[error("{0}")]
    Failed(String),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// It ended well, though it should go on.
    #[error("it ended")]
    Ended,
}

impl ExecError {
    fn of(error: &kube::Error, namespace: &str) -> Self {
        match error {
            // A policy of admission forbids it in its own words.
            kube::Error::Api(status)
                if status.code == 403 && !status.message.contains("denied") =>
            {
                Self::Forbidden(namespace.to_owned())
            }
            error if is_unauthorized(error) => Self::Unauthorized,
            error => Self::NotRun(why(error)),
        }
    }

    /// Whether the account is refused, for every agent alike.
    pub fn is_refused(&self) -> bool {
        matches!(
            self,
            Self::Forbidden(_) | Self::Unauthorized | Self::NotRenewed(_)
        )
    }

    /// Whether the same question gets the same answer from that pod.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Version(_))
    }
}

type Output = Pin<Box<dyn AsyncRead + Send>>;

/// A running command.
pub struct Exec {
    process: Option<AttachedProcess>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    status: Pin<Box<dyn Future<Output = Option<Status>> + Send>>,
    /// What became of the command; `Some(None)` if the connection broke first.
    ended: Option<Option<Status>>,
    lines: Lines,
    said: BytesMut,
}

impl Agents {
    /// Starts a command, `arguments` without the program's name.
    ///
    /// # Errors
    /// The server refuses or does not answer.
    pub async fn exec(&self, agent: &Agent, arguments: &[String]) -> Result<Exec, ExecError> {
        if let Some(problem) = &agent.problem {
            return Err(ExecError::NotRun(problem.clone()));
        }
        let params = AttachParams {
            container: agent.container.clone(),
            max_stdout_buf_size: Some(PIPE_BYTES),
            ..AttachParams::default()
        };
        let command = std::iter::once(PROGRAM).chain(arguments.iter().map(|a| &**a));
        let command: Vec<&str> = command.collect();
        let pods = self.login.pods();
        let mut tries = 1;
        loop {
            let started = pods.exec(&agent.pod, command.clone(), &params);
            let error = match timeout(self.timeout, started).await {
                Ok(Ok(process)) => return Ok(Exec::of(process)),
                Ok(Err(error)) => error,
                Err(_) => return Err(ExecError::Silent(self.timeout)),
            };
            if tries >= TRIES || !is_busy(&error) {
                return Err(ExecError::of(&error, &self.namespace));
            }
            tokio::time::sleep(BUSY_PAUSE * tries).await;
            tries += 1;
        }
    }

    /// The next lines of a command, which says something within the time of a request.
    ///
    /// # Errors
    /// It fails, or says nothing for too long.
    pub async fn lines(&self, exec: &mut Exec) -> Result<Option<Vec<String>>, ExecError> {
        let lines = timeout(self.timeout, exec.lines()).await;
        lines.map_err(|_| ExecError::Silent(self.timeout))?
    }

    /// Runs a command to its end, and gives what it printed.
    ///
    /// # Errors
    /// It fails, says nothing for too long, or too much.
    pub async fn run(&self, agent: &Agent, arguments: &[String]) -> Result<String, ExecError> {
        let mut exec = self.exec(agent, arguments).await?;
        let mut all = String::new();
        let whole = async {
            while let Some(lines) = self.lines(&mut exec).await? {
                all.extend(lines.into_iter().map(|line| line + "\n"));
                if all.len() > MAX_OUTPUT_BYTES {
                    let why =
                        format!("it printed more than {MAX_OUTPUT_BYTES} bytes; is it whydrop?");
                    return Err(ExecError::Failed(why));
                }
            }
            Ok(())
        };
        within(self.timeout, whole).await?;
        Ok(all)
    }
}

/// An answer as a whole, of which each piece comes within `patience`.
///
/// # Errors
/// Its own, or it takes [`WHOLE`] times as long.
pub async fn within(
    patience: Duration,
    answer: impl Future<Output = Result<(), ExecError>>,
) -> Result<(), ExecError> {
    let limit = patience.saturating_mul(WHOLE);
    timeout(limit, answer)
        .await
        .unwrap_or(Err(ExecError::Endless(limit)))
}

fn is_busy(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 429 | 503 | 504))
}

/// Whether the server does not accept the credentials.
pub fn is_unauthorized(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 401)
}

/// kube's error as one sentence.
pub fn why(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => {
            let said = clean(&status.message);
            format!("the API server answers {}: {said}", status.code)
        }
        error => clean(&causes(error)).into_owned(),
    }
}

impl Exec {
    fn of(mut process: AttachedProcess) -> Self {
        let boxed = |output| Box::pin(output) as Output;
        let stdout = process.stdout().map(boxed);
        let stderr = process.stderr().map(boxed);
        let status: Pin<Box<dyn Future<Output = Option<Status>> + Send>> =
            match process.take_status() {
                Some(status) => Box::pin(status),
                None => Box::pin(std::future::ready(None)),
            };
        Self {
            process: Some(process),
            stdout,
            stderr,
            status,
            ended: None,
            lines: Lines::default(),
            said: BytesMut::new(),
        }
    }

    /// The next lines, as soon as there are any; `None` when the command ended well. Cancelling it
    /// loses nothing.
    ///
    /// # Errors
    /// The command failed, or the connection broke.
    pub async fn lines(&mut self) -> Result<Option<Vec<String>>, ExecError> {
        let mut piece = BytesMut::with_capacity(PIPE_BYTES);
        let mut words = BytesMut::with_capacity(STDERR_BYTES);
        loop {
            // kube closes both pipes behind the status. Where the connection breaks it does not: then
            // what is in them is all.
            let is_cut = matches!(self.ended, Some(None));
            tokio::select! {
                biased;
                () = read(&mut self.stdout, &mut piece), if self.stdout.is_some() => {
                    let lines = self.lines.push(&piece);
                    piece.clear();
                    if !lines.is_empty() {
                        return Ok(Some(lines));
                    }
                }
                () = read(&mut self.stderr, &mut words), if self.stderr.is_some() => {
                    let room = STDERR_BYTES.saturating_sub(self.said.len());
                    self.said.extend_from_slice(&words[..words.len().min(room)]);
                    words.clear();
                }
                status = &mut self.status, if self.ended.is_none() => self.ended = Some(status),
                () = std::future::ready(()), if is_cut => break,
                else => break,
            }
        }
        match self.ended.take().flatten() {
            Some(status) => self.outcome(&status),
            None => Err(self.broken().await),
        }
    }

    fn outcome(&self, status: &Status) -> Result<Option<Vec<String>>, ExecError> {
        if status.status.as_deref() == Some("Success") {
            return Ok(None);
        }
        let causes = status
            .details
            .iter()
            .flat_map(|d| d.causes.iter().flatten());
        let code = causes
            .filter(|cause| cause.reason.as_deref() == Some("ExitCode"))
            .find_map(|cause| cause.message.as_ref()?.parse::<i32>().ok());
        let Some(code) = code else {
            // It was not even started.
            let message = status.message.as_deref().unwrap_or("it could not be run");
            return Err(ExecError::NotRun(clean(message).into_owned()));
        };
        let said = reason(&String::from_utf8_lossy(&self.said));
        Err(match (code, said) {
            (USAGE, Some(said)) => ExecError::Version(said),
            (_, Some(said)) => ExecError::Failed(said),
            (code, None) => ExecError::Failed(format!("its whydrop ended with exit code {code}")),
        })
    }

    async fn broken(&mut self) -> ExecError {
        let process = self.process.take().map(AttachedProcess::join);
        let error = match process {
            // The task has ended.
            Some(join) => join.now_or_never().and_then(Result::err),
            None => None,
        };
        let why = error.map(|error| clean(&causes(&error)).into_owned());
        ExecError::Broken(why.unwrap_or_else(|| "it was closed".to_owned()))
    }
}

/// Reads what there is, and forgets an output that has ended.
async fn read(output: &mut Option<Output>, into: &mut BytesMut) {
    let is_open = match output {
        Some(open) => matches!(open.read_buf(into).await, Ok(1..)),
        None => false,
    };
    if !is_open {
        *output = None;
    }
}

/// The sentence of what a command said on stderr, without its log.
fn reason(stderr: &str) -> Option<String> {
    let lines = stderr.lines().map(str::trim);
    let mut lines = lines.filter(|line| !line.is_empty() && !line.starts_with('{'));
    let line = lines.next()?;
    let line = ["whydrop: ", "error: "]
        .iter()
        .find_map(|prefix| line.strip_prefix(prefix))
        .unwrap_or(line);
    Some(clean(line).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_right_is_told_from_a_policy_of_admission() {
        let error = |code: u16, message: &str| {
            let status = serde_json::json!({"code": code, "message": message});
            let error = kube::Error::Api(serde_json::from_value(status).unwrap());
            ExecError::of(&error, "whydrop").to_string()
        };
        let right = error(
            403,
            "pods \"x\" is forbidden: User \"u\" cannot create resource \"pods/exec\" in API group \
             \"\" in the namespace \"whydrop\"",
        );
        assert!(right.starts_with("not allowed to create pods/exec in namespace whydrop"));
        let policy = "admission webhook \"w\" denied the request: no exec on Fridays";
        let told = error(403, policy);
        assert_eq!(told, format!("the API server answers 403: {policy}"));
        assert_eq!(error(401, "Unauthorized"), UNAUTHORIZED);
        let told = error(404, "pods \"\u{1b}x\" not found");
        assert_eq!(
            told,
            "the API server answers 404: pods \"\\u{1b}x\" not found"
        );
    }

    #[test]
    fn the_reason_is_the_sentence_of_the_other_whydrop() {
        for (stderr, expected) in [
            (
                "whydrop: no whydrop agent answers\n",
                Some("no whydrop agent answers"),
            ),
            (
                "error: unexpected argument '--x' found\n\n  tip: y\n\nUsage: whydrop tail\n",
                Some("unexpected argument '--x' found"),
            ),
            ("{\"level\":\"WARN\"}\nwhydrop: so\n", Some("so")),
            ("\u{1b}[2J\n", Some("\\u{1b}[2J")),
            ("\n", None),
        ] {
            assert_eq!(reason(stderr).as_deref(), expected);
        }
    }
}
