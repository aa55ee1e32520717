//! `--kube-events`: silent drops as Kubernetes Events on the pod that suffers, so that `kubectl describe
//! pod` says why it hangs. `events.k8s.io/v1`, reason `SilentDrop`.
//!
//! It reads the stream of events as `whydrop tail` does: nothing waits for the API server, and what comes
//! faster than it can be told of is counted (`series.rs` says what that is). It needs `create` and `patch`
//! of `events.k8s.io/events`, and `list` of pods, which the agent has: only an Event with the pod's UID is
//! shown by `kubectl describe`.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::api::events::v1::Event as KubeEvent;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, Config};
use serde_json::json;

use self::series::{AllSeries, Answer, Post, Subject};
use crate::cluster::watch::causes;
use crate::event::{Line, LostStage};
use crate::output::stream::{Range, Reader};
use crate::selection::Selection;
use crate::source::hooks::SourceStatus;
use crate::state::State;

pub use self::series::Times;

mod series;

/// The source's name.
pub const SOURCE: &str = "kube_events";
/// Who reports, as the Events say.
const CONTROLLER: &str = "whydrop";
/// Why, as the Events say.
pub const REASON: &str = "SilentDrop";
/// Between two looks at what is due.
const TICK: Duration = Duration::from_millis(500);
/// A request that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Between two attempts to read the stream.
const RETRY: Duration = Duration::from_secs(30);

/// What came of telling drops.
#[derive(Debug, Default)]
pub struct Totals {
    created: AtomicU64,
    updated: AtomicU64,
    failed: AtomicU64,
    /// Stream events that no Event tells of, because there were too many series, or they came too fast.
    limited: AtomicU64,
}

impl Totals {
    /// All of them, by result.
    pub fn counts(&self) -> [(&'static str, u64); 4] {
        [
            ("created", &self.created),
            ("updated", &self.updated),
            ("failed", &self.failed),
            ("limited", &self.limited),
        ]
        .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}

/// Tells drops until `shutdown`. `configuration` is asked again where the credentials are refused.
pub async fn run<F>(
    state: Arc<State>,
    times: Times,
    configuration: impl Fn() -> F,
    shutdown: impl Future<Output = ()>,
) where
    F: Future<Output = Result<Config, String>>,
{
    let report = async {
        // Both outlive a client: what is to be told waits for the next one.
        let mut reader = reader(&state).await;
        let mut series = AllSeries::new(state.node.clone(), times, Instant::now());
        let mut is_refused = false;
        loop {
            let client = match configuration().await {
                Ok(config) => Client::try_from(config).map_err(|error| causes(&error)),
                Err(why) => Err(why),
            };
            let why = match client {
                Ok(client) => {
                    // Until a request shows that it does not work. One that was refused is not believed again.
                    if !is_refused {
                        say(&state, None);
                    }
                    is_refused = true;
                    report(&state, &client, &mut reader, &mut series).await
                }
                Err(why) => {
                    is_refused = false;
                    why
                }
            };
            say(&state, Some(why));
            tokio::time::sleep(times.client).await;
        }
    };
    tokio::select! {
        () = report => {}
        () = shutdown => {}
    }
}

/// Reads the stream from now on. While it has too many readers that is tried again.
async fn reader(state: &State) -> Reader {
    let range = Range {
        follow: true,
        last: None,
        since: None,
    };
    loop {
        match state.stream.read(range, Selection::default()) {
            Ok(reader) => return reader,
            Err(error) => say(state, Some(error.to_string())),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Until a client with other credentials is needed, and why.
async fn report(
    state: &State,
    client: &Client,
    reader: &mut Reader,
    series: &mut AllSeries,
) -> String {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let totals = &state.kube_events;
    loop {
        tokio::select! {
            lines = reader.next() => {
                let Some(lines) = lines else {
                    return "the stream of events ended".to_owned();
                };
                let now = Instant::now();
                for line in lines {
                    let limited = match &*line {
                        Line::Event(event) => u64::from(!series.note(event, now)),
                        // What this reader was too slow for: it tells packets and not lines, one at least.
                        // Other stages never had lines of it.
                        Line::Lost(lost) => u64::from(lost.stage == LostStage::Reader),
                    };
                    totals.limited.fetch_add(limited, Ordering::Relaxed);
                }
            }
            _ = tick.tick() => {
                let post = series.next(Instant::now());
                totals.limited.fetch_add(series.take_untold(), Ordering::Relaxed);
                let Some(post) = post else {
                    continue;
                };
                let (subject, is_new) = match &post {
                    Post::Create { subject, .. } => (subject.clone(), true),
                    Post::Update { subject, .. } => (subject.clone(), false),
                };
                let result = tokio::time::timeout(TIMEOUT, make(state, client, post)).await;
                let is_refused = matches!(
                    &result,
                    Ok(Err(kube::Error::Api(status))) if status.code == 401
                );
                let answer = match result {
                    Ok(Ok(answer)) => {
                        say(state, None);
                        answer
                    }
                    Ok(Err(error)) => {
                        let (answer, why) = failure(&subject, is_new, &error);
                        if let Some(why) = why {
                            say(state, Some(why));
                        }
                        answer
                    }
                    Err(_) => {
                        say(state, Some("the API server does not answer".to_owned()));
                        Answer::Failed
                    }
                };
                let total = match &answer {
                    Answer::Created(_) => Some(&totals.created),
                    Answer::Updated => Some(&totals.updated),
                    Answer::Failed => Some(&totals.failed),
                    Answer::Gone | Answer::Expired => None,
                };
                if let Some(total) = total {
                    total.fetch_add(1, Ordering::Relaxed);
                }
                series.answered(&subject, answer, Instant::now());
                if is_refused {
                    return "the API server does not accept the credentials".to_owned();
                }
            }
        }
    }
}

/// What follows from an error, and what is to be said of it.
fn failure(subject: &Subject, is_new: bool, error: &kube::Error) -> (Answer, Option<String>) {
    let kube::Error::Api(status) = error else {
        return (Answer::Failed, Some(causes(error)));
    };
    let verb = match is_new {
        true => "create",
        false => "patch",
    };
    match status.code {
        404 if !is_new => (Answer::Expired, None),
        404 => (Answer::Gone, None),
        403 if status.message.contains("being terminated") => (Answer::Gone, None),
        403 => {
            let why = format!(
                "the agent may not {verb} events.k8s.io/events in namespace {}; apply \
                 deploy/overlays/kube-events, which adds a ClusterRole with the verbs create and patch of it",
                subject.namespace
            );
            (Answer::Failed, Some(why))
        }
        _ => (Answer::Failed, Some(causes(error))),
    }
}

async fn make(state: &State, client: &Client, post: Post) -> Result<Answer, kube::Error> {
    match post {
        Post::Create {
            subject,
            related,
            note,
            first,
        } => {
            let Some(uid) = uid(client, &subject).await? else {
                return Ok(Answer::Gone);
            };
            let name = name(&subject, first);
            let pod = |namespace: &str, name: &str, uid| ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                namespace: Some(namespace.to_owned()),
                name: Some(name.to_owned()),
                uid,
                ..ObjectReference::default()
            };
            let event = KubeEvent {
                metadata: ObjectMeta {
                    name: Some(name.clone()),
                    namespace: Some(subject.namespace.to_string()),
                    ..ObjectMeta::default()
                },
                event_time: Some(MicroTime(first)),
                action: Some("Drop".to_owned()),
                reason: Some(REASON.to_owned()),
                type_: Some("Warning".to_owned()),
                note: Some(note),
                regarding: Some(pod(&subject.namespace, &subject.pod, Some(uid))),
                related: related.map(|(namespace, name)| pod(&namespace, &name, None)),
                reporting_controller: Some(CONTROLLER.to_owned()),
                reporting_instance: Some(instance(&state.node)),
                ..KubeEvent::default()
            };
            let events = Api::<KubeEvent>::namespaced(client.clone(), &subject.namespace);
            match events.create(&PostParams::default(), &event).await {
                Ok(_) => Ok(Answer::Created(name)),
                // Another request for the same one came through, whose answer was lost.
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(Answer::Created(name)),
                Err(error) => Err(error),
            }
        }
        Post::Update {
            subject,
            name,
            count,
            last,
        } => {
            let events = Api::<KubeEvent>::namespaced(client.clone(), &subject.namespace);
            // The API's count has 32 bits.
            let count = i32::try_from(count).unwrap_or(i32::MAX);
            let series = json!({"count": count, "lastObservedTime": MicroTime(last)});
            let patch = Patch::Merge(json!({ "series": series }));
            let params = PatchParams::default();
            events.patch(&name, &params, &patch).await?;
            Ok(Answer::Updated)
        }
    }
}

/// The pod's UID; none if it is gone. A list of one: the agent may list pods, and not get them.
async fn uid(client: &Client, subject: &Subject) -> Result<Option<String>, kube::Error> {
    let pods = Api::<Pod>::namespaced(client.clone(), &subject.namespace);
    let params = ListParams::default()
        .fields(&format!("metadata.name={}", subject.pod))
        .match_any();
    let found = pods.list_metadata(&params).await?.items;
    Ok(found.into_iter().find_map(|pod| pod.metadata.uid))
}

/// As client-go names its Events: the object's name and a time, which no two Events share.
fn name(subject: &Subject, first: Timestamp) -> String {
    let nanoseconds = first.as_nanosecond();
    // 253 characters are allowed, and a pod's name may have as many.
    let pod: String = subject.pod.chars().take(230).collect();
    format!("{pod}.{nanoseconds:x}")
}

/// `reportingInstance` has 128 characters at most.
fn instance(node: &str) -> String {
    node.chars().take(128).collect()
}

fn say(state: &State, why: Option<String>) {
    state.set_source(SourceStatus {
        source: SOURCE,
        up: why.is_none(),
        hook: None,
        lost: why
            .is_some()
            .then_some("silent drops are not written on their pods as Kubernetes Events"),
        why,
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Detail, Record};
    use crate::senders::Senders;

    /// Nothing was told yet, so nothing failed.
    #[tokio::test]
    async fn with_a_configuration_that_comes_late_it_works() {
        let hour = Duration::from_secs(3_600);
        let record = Record::new(Detail::Pod, 100, hour);
        let senders = Senders::new(Detail::Pod, 100, hour);
        let state = Arc::new(State::new("node-a".into(), record, senders));
        let times = Times {
            client: Duration::from_millis(10),
            ..Times::default()
        };
        let asked = AtomicU64::new(0);
        let configuration = || {
            std::future::ready(match asked.fetch_add(1, Ordering::Relaxed) {
                0 => Err("there is none".to_owned()),
                _ => Ok(Config::new("http://127.0.0.1:1".parse().unwrap())),
            })
        };
        let is_up = || {
            let status = state.status();
            let mut sources = status["sources"].as_array().unwrap().iter();
            sources.any(|source| source["source"] == SOURCE && source["up"] == true)
        };
        let up = async {
            while asked.load(Ordering::Relaxed) < 2 || !is_up() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let run = run(state.clone(), times, configuration, up);
        let up = tokio::time::timeout(Duration::from_secs(60), run).await;
        assert!(up.is_ok(), "{}", state.status());
    }
}
