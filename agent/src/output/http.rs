//! The HTTP servers: `/metrics` and the probes over TCP, the local API over the unix socket.
//!
//! Each connection is a task of its server's set. When the agent ends, the streams of followers
//! end, and what does not end with them (a client that reads nothing) is dropped after
//! [`GRACE`].

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{RawQuery, State as Shared};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use futures_util::stream;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use jiff::Timestamp;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::answer::question;
use crate::output::classic;
use crate::output::explain::Refusal;
use crate::output::query::Query;
use crate::output::socket::LocalSocket;
use crate::output::stream::{MAX_READERS, Reader};
use crate::output::{connections, explain};
use crate::state::State;

/// What OpenMetrics 1.0 calls itself; Prometheus chooses its parser by it.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// NDJSON: one JSON object a line.
pub const NDJSON: &str = "application/x-ndjson";

/// How long the last bytes may take when the agent ends (it has 2 s in all).
const GRACE: Duration = Duration::from_millis(300);

/// How long a request's head may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a scrape or a probe may take altogether, so that clients that stall do not use up
/// the connections.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(30);

/// Scrapes and probes at once: a few Prometheus servers and the kubelet, each one or two.
const MAX_SCRAPES: usize = 32;

/// Connections to the local API at once: all readers, and some short requests beside them, one of
/// which can still be told that there are too many readers.
const MAX_LOCAL: usize = MAX_READERS + 16;

/// How long to wait when the system cannot accept (out of file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Says when the agent ends: `true`, or its sender dropped.
pub type Stop = watch::Receiver<bool>;

/// Listens for scrapes and probes.
///
/// # Errors
/// One sentence that says what to do.
pub async fn listen(addr: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr).await.map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse => anyhow::anyhow!(
            "another program listens on {addr}; stop it or give this agent another --listen"
        ),
        _ => anyhow::anyhow!("could not listen on {addr}: {e}; give the agent another --listen"),
    })
}

/// Serves `/metrics`, `/healthz` and `/readyz` until `stop`.
pub async fn serve_metrics(listener: TcpListener, state: Arc<State>, stop: Stop) {
    let app = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .with_state(state);
    let accept = async || listener.accept().await.map(|(stream, _)| stream);
    serve(accept, app, MAX_SCRAPES, Some(SCRAPE_TIMEOUT), stop).await;
}

/// Serves `/v1/...` until `stop`, then removes the socket.
pub async fn serve_local(socket: LocalSocket, state: Arc<State>, stop: Stop) {
    let app = Router::new()
        .route("/v1/drops", get(drops))
        .route("/v1/explain", get(explained))
        .route("/v1/connections", get(connected))
        .route("/v1/pairs", get(pairs))
        .route("/v1/status", get(status))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .with_state(Local {
            state,
            stop: stop.clone(),
            explaining: Arc::new(Semaphore::new(explain::AT_ONCE)),
            dumping: Arc::new(Semaphore::new(1)),
        });
    let accept = async || socket.listener().accept().await.map(|(stream, _)| stream);
    serve(accept, app, MAX_LOCAL, None, stop).await;
}

/// Accepts until `stop`, at most `limit` connections at once; more wait in the backlog.
async fn serve<I, A>(
    mut accept: impl FnMut() -> A,
    app: Router,
    limit: usize,
    timeout: Option<Duration>,
    mut stop: Stop,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Future<Output = io::Result<I>>,
{
    let free = Arc::new(Semaphore::new(limit));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stopped(&mut stop) => break,
            Some(_) = connections.join_next() => continue,
            accepted = async {
                let permit = Arc::clone(&free).acquire_owned().await;
                (permit, accept().await)
            } => accepted,
        };
        let (permit, stream) = match accepted {
            (Ok(permit), Ok(stream)) => (permit, stream),
            (_, Err(error)) => {
                tracing::warn!(%error, "could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
            // Nobody closes the semaphore.
            (Err(_), _) => break,
        };
        let connection = connection(stream, app.clone(), stop.clone());
        connections.spawn(async move {
            match timeout {
                Some(limit) => drop(tokio::time::timeout(limit, connection).await),
                None => connection.await,
            }
            drop(permit);
        });
    }
    let _ = tokio::time::timeout(GRACE, async {
        while connections.join_next().await.is_some() {}
    })
    .await;
    // Dropping the set ends the rest.
}

/// One request and its answer.
async fn connection<I>(stream: I, app: Router, mut stop: Stop)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        // The client went away, or spoke no HTTP.
        tracing::debug!(%error, "a connection ended");
    }
}

async fn stopped(stop: &mut Stop) {
    // An error is a sender that is gone: the agent ends.
    let _ = stop.wait_for(|stop| *stop).await;
}

#[derive(Clone)]
struct Local {
    state: Arc<State>,
    stop: Stop,
    /// Answers that are worked out.
    explaining: Arc<Semaphore>,
    /// One look at conntrack at a time: it walks the kernel's table.
    dumping: Arc<Semaphore>,
}

async fn metrics(Shared(state): Shared<Arc<State>>, headers: HeaderMap) -> Response {
    state.flush().await;
    let text = crate::output::metrics::encode(&state);
    let accept = headers.get(header::ACCEPT).and_then(|a| a.to_str().ok());
    let (kind, text) = match classic::is_asked_for(accept.unwrap_or_default()) {
        true => (classic::CONTENT_TYPE, classic::from_openmetrics(&text)),
        false => (OPENMETRICS, text),
    };
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn ready(Shared(state): Shared<Arc<State>>) -> Response {
    match state.ready() {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn pairs(Shared(local): Shared<Local>) -> Response {
    axum::Json(local.state.pairs().await).into_response()
}

async fn status(Shared(local): Shared<Local>) -> Response {
    axum::Json(local.state.status()).into_response()
}

async fn explained(Shared(local): Shared<Local>, RawQuery(query): RawQuery) -> Response {
    let query = match question::Query::parse(query.as_deref().unwrap_or_default()) {
        Ok(query) => query,
        Err(why) => return error(StatusCode::BAD_REQUEST, &why),
    };
    if !query.brief {
        local.state.flush().await;
    }
    let state = local.state.clone();
    let work = move || explain::explain(&state, &query);
    match blocking(&local.explaining, work).await {
        Ok(Ok(answer)) => axum::Json(answer).into_response(),
        Ok(Err(why @ Refusal::Bad(_))) => error(StatusCode::BAD_REQUEST, &why.to_string()),
        Ok(Err(why @ Refusal::NotYet(_))) => {
            error(StatusCode::SERVICE_UNAVAILABLE, &why.to_string())
        }
        Err(why) => error(StatusCode::INTERNAL_SERVER_ERROR, &why),
    }
}

async fn connected(Shared(local): Shared<Local>, RawQuery(query): RawQuery) -> Response {
    if query.is_some_and(|query| !query.is_empty()) {
        return error(StatusCode::BAD_REQUEST, "/v1/connections has no parameters");
    }
    local.state.flush().await;
    let state = local.state.clone();
    match blocking(&local.dumping, move || connections::read(state)).await {
        Ok(told) => {
            let body = Body::from_stream(connections::lines(told));
            ([(header::CONTENT_TYPE, NDJSON)], body).into_response()
        }
        Err(why) => error(StatusCode::INTERNAL_SERVER_ERROR, &why),
    }
}

/// What takes longer than a task may, on a thread of its own, a limited number at a time.
async fn blocking<T: Send + 'static>(
    free: &Arc<Semaphore>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    // Nobody closes the semaphore. The work keeps its place also when the client goes away meanwhile.
    let permit = Arc::clone(free).acquire_owned().await;
    let work = tokio::task::spawn_blocking(move || {
        let result = work();
        drop(permit);
        result
    });
    work.await
        .map_err(|error| format!("the agent could not work it out: {error}"))
}

async fn drops(Shared(local): Shared<Local>, RawQuery(query): RawQuery) -> Response {
    let query = match Query::parse(query.as_deref().unwrap_or_default()) {
        Ok(query) => query,
        Err(e) => return error(StatusCode::BAD_REQUEST, &e.to_string()),
    };
    let range = query.range(Timestamp::now());
    let reader = match local.state.stream.read(range, query.selection) {
        Ok(reader) => reader,
        Err(e) => return error(StatusCode::SERVICE_UNAVAILABLE, &e.to_string()),
    };
    let body = Body::from_stream(stream::unfold((reader, local.stop), chunk));
    ([(header::CONTENT_TYPE, NDJSON)], body).into_response()
}

/// The lines that are ready, as one chunk of the answer. It is asked for only when the client has
/// taken the last one, so a slow client makes the reader slow, and nothing else.
async fn chunk(
    (mut reader, mut stop): (Reader, Stop),
) -> Option<(Result<Bytes, Infallible>, (Reader, Stop))> {
    let lines = tokio::select! {
        biased;
        () = stopped(&mut stop) => {
            reader.finish();
            reader.next().await
        }
        lines = reader.next() => lines,
    }?;
    let mut chunk = Vec::new();
    for line in lines {
        // Fails only for maps whose keys are no strings; an event has no map.
        if let Err(error) = serde_json::to_writer(&mut chunk, &*line) {
            tracing::error!(%error, "a line could not be written as JSON");
        }
        chunk.push(b'\n');
    }
    Some((Ok(chunk.into()), (reader, stop)))
}

async fn not_found(uri: Uri) -> Response {
    let what = format!("there is no {} here", uri.path());
    error(StatusCode::NOT_FOUND, &what)
}

async fn not_allowed(method: Method, uri: Uri) -> Response {
    let what = format!("{} can be read (GET), not {method}", uri.path());
    error(StatusCode::METHOD_NOT_ALLOWED, &what)
}

fn error(status: StatusCode, what: &str) -> Response {
    (status, axum::Json(json!({ "error": what }))).into_response()
}
