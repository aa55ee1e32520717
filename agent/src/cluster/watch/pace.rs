//! A layer between kube and the API server. It tells when the server answered, which a watch without
//! events does not show, and keeps an answer that ends at once from becoming a storm of requests: kube
//! begins anew without a pause when a watch ends without an error.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::{Request, Response};
use tokio::sync::Notify;
use tokio::time::Instant;
use tower::{Layer, Service};

use crate::cluster::objects::ObjectKind;
use crate::sync::lock;

/// Between two lists or watches of one kind. Pages of a list follow one another at once.
const APART: Duration = Duration::from_secs(1);

/// What the layer knows; one for each client.
#[derive(Debug, Default)]
pub struct Pace {
    /// A bit for each kind that was answered and not yet told.
    answered: AtomicU32,
    told: Notify,
    /// The last request of each kind, also one that still waits for its time.
    last: Mutex<HashMap<ObjectKind, Instant>>,
}

impl Pace {
    /// Waits until the server has given a good answer, and for which kinds.
    pub async fn answered(&self) -> Vec<ObjectKind> {
        loop {
            let bits = self.answered.swap(0, Ordering::Relaxed);
            if bits != 0 {
                let is_set = |kind: &ObjectKind| bits & bit(*kind) != 0;
                return ObjectKind::all().filter(is_set).collect();
            }
            self.told.notified().await;
        }
    }

    async fn wait(&self, kind: ObjectKind) {
        let at = {
            let (mut last, now) = (lock(&self.last), Instant::now());
            let at = last.get(&kind).map_or(now, |last| (*last + APART).max(now));
            last.insert(kind, at);
            at
        };
        tokio::time::sleep_until(at).await;
    }
}

fn bit(kind: ObjectKind) -> u32 {
    1 << kind as u32
}

/// The kind that a path lists or watches.
fn kind_of(path: &str) -> Option<ObjectKind> {
    let plural = path.rsplit('/').next()?;
    ObjectKind::all().find(|kind| kind.plural() == plural)
}

/// Puts a [`Pace`] before a client.
#[derive(Clone, Debug)]
pub struct PaceLayer(pub Arc<Pace>);

impl<S> Layer<S> for PaceLayer {
    type Service = Paced<S>;

    fn layer(&self, inner: S) -> Paced<S> {
        Paced {
            inner,
            pace: self.0.clone(),
        }
    }
}

/// The client behind a [`PaceLayer`].
#[derive(Debug)]
pub struct Paced<S> {
    inner: S,
    pace: Arc<Pace>,
}

impl<S, A, B> Service<Request<A>> for Paced<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Send,
    B: Send,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let kind = kind_of(request.uri().path());
        let query = request.uri().query().unwrap_or("");
        // A page, a pod that is asked for, or how many there are: none is a list or a watch.
        let is_page = query.split('&').any(|pair| {
            let is_asked = pair.starts_with("fieldSelector=status.podIP");
            is_asked || pair == "limit=1" || pair.starts_with("continue=")
        });
        let pace = self.pace.clone();
        // Does nothing before it is awaited.
        let response = self.inner.call(request);
        Box::pin(async move {
            if let Some(kind) = kind.filter(|_| !is_page) {
                pace.wait(kind).await;
            }
            let response = response.await?;
            if let Some(kind) = kind.filter(|_| response.status().is_success()) {
                pace.answered.fetch_or(bit(kind), Ordering::Relaxed);
                pace.told.notify_one();
            }
            Ok(response)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_its_kind() {
        for (path, kind) in [
            ("/api/v1/pods", Some(ObjectKind::Pod)),
            (
                "/apis/discovery.k8s.io/v1/endpointslices",
                Some(ObjectKind::EndpointSlice),
            ),
            ("/version", None),
            ("/", None),
        ] {
            assert_eq!(kind_of(path), kind, "{path}");
        }
    }

    #[tokio::test]
    async fn requests_of_one_kind_are_a_second_apart() {
        let pace = Pace::default();
        let start = Instant::now();
        for _ in 0..2 {
            pace.wait(ObjectKind::Pod).await;
        }
        assert!(start.elapsed() >= APART);
        // Looks at what it waits for before it looks at the clock.
        let other = tokio::time::timeout(APART / 2, pace.wait(ObjectKind::Node)).await;
        assert!(other.is_ok(), "another kind does not wait");
    }
}
