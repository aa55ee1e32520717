//! The local API as a client sees it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// How long an agent may take to begin its answer. It does so at once, unless it hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens, or we may not ask.
    #[error("no whydrop agent answers on {}: {source}; {}", .path.display(), hint(.source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The agent says no.
    #[error("the agent says: {1}")]
    Refused(StatusCode, String),
    /// It took longer than an agent that works.
    #[error("the agent on {} does not answer", .0.display())]
    Timeout(PathBuf),
    /// The connection broke.
    #[error("the connection to the agent broke: {0}")]
    Broken(#[from] hyper::Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "run as root",
        _ => {
            "start one with `whydrop agent`, say where it is with --socket, or which cluster is \
             meant with --kubeconfig"
        }
    }
}

/// Asks the agent behind `socket` for a path and query. Must be called on a tokio runtime.
///
/// # Errors
/// Also if the answer is not 200: then with what the agent says.
pub async fn get(socket: &Path, target: &str) -> Result<Response<Incoming>, ClientError> {
    get_within(socket, target, ANSWER_TIMEOUT).await
}

/// As [`get`], where the agent has to work the answer out first.
///
/// # Errors
/// As [`get`].
pub async fn get_within(
    socket: &Path,
    target: &str,
    limit: Duration,
) -> Result<Response<Incoming>, ClientError> {
    tokio::time::timeout(limit, ask(socket, target))
        .await
        .map_err(|_| ClientError::Timeout(socket.to_owned()))?
}

async fn ask(socket: &Path, target: &str) -> Result<Response<Incoming>, ClientError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| ClientError::Connect {
            path: socket.to_owned(),
            source,
        })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the answer; its error is also the answer's.
    tokio::spawn(connection);
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = target.parse().map_err(|_| {
        let what = format!("{target:?} cannot be asked for");
        ClientError::Refused(StatusCode::BAD_REQUEST, what)
    })?;
    let host = hyper::header::HeaderValue::from_static("localhost");
    request.headers_mut().insert(hyper::header::HOST, host);
    let response = sender.send_request(request).await?;
    let status = response.status();
    if status == StatusCode::OK {
        return Ok(response);
    }
    let body = response.into_body().collect().await?.to_bytes();
    let told = serde_json::from_slice::<serde_json::Value>(&body)
        .ok()
        .and_then(|body| Some(body.get("error")?.as_str()?.to_owned()));
    Err(ClientError::Refused(
        status,
        told.unwrap_or_else(|| status.to_string()),
    ))
}
