//! An API server: how it is reached, what it offers, and which kinds of it are watched.

use std::sync::Arc;
use std::time::Duration;

use kube::client::ClientBuilder;
use kube::{Client, Config};
use serde_json::Value;

use super::health::causes;
use super::pace::{Pace, PaceLayer};
use super::{OPTIONAL, Reach, Times, random};
use crate::cluster::objects::ObjectKind;

/// The first minor version of 1.x that offers streaming lists; one that has them switched off refuses.
const STREAMING_LISTS: u32 = 32;
/// A server that takes longer to say its version does not answer.
const VERSION_TIMEOUT: Duration = Duration::from_secs(30);
/// The client's own deadline comes after the server's end of a watch and before kube's.
const SILENCE_MARGIN: Duration = Duration::from_secs(3);

/// Pods of a cluster whose agents watch those of their node alone, if they may choose. Some 0.9 kB each:
/// 20,000 are 18 MB.
pub const MANY_PODS: u64 = 20_000;

/// A server that answers.
pub struct Server {
    /// Asks it.
    pub client: Client,
    /// What the layer before the client knows.
    pub pace: Arc<Pace>,
    /// What is shown of it: its address, and which pods are watched.
    pub shown: String,
    /// Its address.
    pub url: String,
    /// It offers streaming lists.
    pub streams: bool,
    /// Only the pods of this node are watched.
    pub is_of_node: bool,
    /// The optional kinds that it has; `None` while it has not said so.
    pub offered: Option<Vec<ObjectKind>>,
}

impl Server {
    /// Asks a server for its version and for what decides which kinds and pods are watched.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn connect(mut config: Config, times: Times, reach: Reach) -> Result<Self, String> {
        let url = config.cluster_url.to_string();
        config.read_timeout = Some(times.watch + SILENCE_MARGIN);
        // Each failure is to be counted and shown; kube's watchers try again.
        config.default_retry = false;
        let pace = Arc::new(Pace::default());
        let client = ClientBuilder::try_from(config)
            .map_err(|error| format!("no client for {url}: {}", causes(&error)))?
            .with_layer(&PaceLayer(pace.clone()))
            .build();
        let version = tokio::time::timeout(VERSION_TIMEOUT, client.apiserver_version()).await;
        let version = version
            .map_err(|_| {
                format!(
                    "{url} does not answer within {} s",
                    VERSION_TIMEOUT.as_secs()
                )
            })?
            .map_err(|error| format!("{url} does not answer: {}", causes(&error)))?;
        // Some write `31+`.
        let minor = version
            .minor
            .trim_end_matches(|c: char| !c.is_ascii_digit());
        let streams =
            version.major != "1" || minor.parse().is_ok_and(|m: u32| m >= STREAMING_LISTS);
        let offered = offered(&client).await;
        let pods = match reach {
            Reach::Auto => count_pods(&client).await,
            Reach::Cluster | Reach::Node => None,
        };
        let is_of_node = match reach {
            Reach::Node => true,
            Reach::Cluster => false,
            // Who may not ask for it learns that from the watch. A server that does not tell is not asked
            // for all of them.
            Reach::Auto => pods.is_none_or(|pods| pods > MANY_PODS),
        };
        let shown = match (is_of_node, pods) {
            (false, _) => url.clone(),
            (true, Some(pods)) => {
                format!("{url}, pods of this node alone, because there are {pods}")
            }
            (true, None) if reach == Reach::Auto => {
                format!(
                    "{url}, pods of this node alone, because it does not tell how many there are"
                )
            }
            (true, None) => format!("{url}, pods of this node alone"),
        };
        tracing::info!(
            url,
            version = version.git_version,
            streams,
            is_of_node,
            pods,
            "following the cluster"
        );
        Ok(Self {
            client,
            pace,
            shown,
            url,
            streams,
            is_of_node,
            offered,
        })
    }

    /// Whether a kind is watched. Optional ones only where they are; `None` while that is not known. Of all
    /// endpoints an agent that watches its node would keep more than of all pods of it.
    pub fn watches(&self, kind: ObjectKind) -> Option<bool> {
        match kind {
            ObjectKind::EndpointSlice => Some(!self.is_of_node),
            kind if OPTIONAL.contains(&kind) => Some(self.offered.as_ref()?.contains(&kind)),
            _ => Some(true),
        }
    }
}

/// The optional kinds that the server has; `None` if it does not say.
pub async fn offered(client: &Client) -> Option<Vec<ObjectKind>> {
    let mut offered = Vec::new();
    for kind in OPTIONAL {
        let path = format!("/apis/{}", kind.api_version());
        let request = hyper::Request::get(path).body(Vec::new()).ok()?;
        let answer = tokio::time::timeout(VERSION_TIMEOUT, client.request::<Value>(request));
        let resources = match answer.await.ok()? {
            Ok(answer) => answer["resources"].as_array().cloned().unwrap_or_default(),
            // The group, or this version of it.
            Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
            Err(_) => return None,
        };
        if resources.iter().any(|known| known["name"] == kind.plural()) {
            offered.push(kind);
        }
    }
    Some(offered)
}

/// The same after a while, a different one on each node.
pub async fn discover(client: Client, after: Duration) -> Option<Vec<ObjectKind>> {
    tokio::time::sleep(after / 2 + random(after)).await;
    offered(&client).await
}

/// How many pods there are; `None` if the server does not tell.
async fn count_pods(client: &Client) -> Option<u64> {
    let request = hyper::Request::get("/api/v1/pods?limit=1").body(Vec::new());
    let answer = client.request::<Value>(request.ok()?);
    let answer = tokio::time::timeout(VERSION_TIMEOUT, answer)
        .await
        .ok()?
        .ok()?;
    let first = answer["items"].as_array()?.len() as u64;
    let more = &answer["metadata"]["remainingItemCount"];
    Some(first + more.as_u64().unwrap_or(0))
}
