//! The agents of a cluster: pods of one namespace that have the agents' labels.

use std::collections::HashSet;

use futures_util::stream::{self, BoxStream, Stream, StreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::ListParams;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::time::{Duration, timeout};

use super::Agents;
use super::login::NotRenewed;
use crate::cli::format::clean;
use crate::cluster::watch::causes;

/// Pods in a page of a list.
const PAGE: u32 = 500;
/// kubectl's sign of which container of a pod is meant.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";
/// The container's name in deploy/base.
const CONTAINER: &str = "agent";

/// Why an agent whose pod goes away cannot be asked.
pub const DELETED: &str = "its pod is being deleted";

/// One agent's pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// The node that it is on; empty while it has none.
    pub node: String,
    /// Its pod's name.
    pub pod: String,
    /// Tells the pod from a later one of the same name.
    pub uid: String,
    /// The container that whydrop is in, where the pod has several.
    pub container: Option<String>,
    /// Why it cannot be asked; `None` if it runs.
    pub problem: Option<String>,
    /// It is being deleted: what runs in it may go on for a moment.
    pub is_leaving: bool,
}

impl Agent {
    /// What is needed of a pod.
    pub fn of(pod: &Pod) -> Self {
        let spec = pod.spec.as_ref();
        let names: Vec<&str> = spec
            .iter()
            .flat_map(|spec| &spec.containers)
            .map(|container| &*container.name)
            .collect();
        let chosen = pod.annotations().get(DEFAULT_CONTAINER);
        let container = chosen
            .map(|name| &**name)
            .into_iter()
            .chain([CONTAINER])
            .find(|name| names.contains(name))
            .or(names.first().copied());
        let is_leaving = pod.metadata.deletion_timestamp.is_some();
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        let problem = match phase {
            _ if is_leaving => Some(DELETED.to_owned()),
            Some("Running") => None,
            other => {
                let phase = clean(other.unwrap_or("in no phase"));
                Some(format!("its pod is {phase}"))
            }
        };
        Self {
            node: spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
            pod: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            container: container.map(str::to_owned),
            problem,
            is_leaving,
        }
    }
}

/// Why the agents are not known.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The account may not.
    #[error(
        "not allowed to {verb} pods in namespace {namespace}: add the rule {{apiGroups: [\"\"], \
         resources: [pods], verbs: [list, watch]}} to a Role of yours there, as \
         deploy/base/reader.yaml has it"
    )]
    Forbidden {
        /// `list` or `watch`.
        verb: &'static str,
        /// Of the agents.
        namespace: String,
    },
    /// The account is none, or its token expired.
    #[error("{}", super::exec::UNAUTHORIZED)]
    Unauthorized,
    /// The same, and there is nothing newer.
    #[error(transparent)]
    NotRenewed(#[from] NotRenewed),
    /// The server does not answer, or with another error.
    #[error("cannot {verb} pods in namespace {namespace}: {why}")]
    Other {
        /// `list` or `watch`.
        verb: &'static str,
        /// Of the agents.
        namespace: String,
        /// One sentence.
        why: String,
    },
    /// There are none.
    #[error(
        "no agent runs in namespace {namespace} (pods with {selector}): deploy them with `kubectl \
         apply -k deploy/base`, or say where they are with --agent-namespace and --agent-selector"
    )]
    None {
        /// That was looked at.
        namespace: String,
        /// Likewise.
        selector: String,
    },
    /// There are some, and none is asked for.
    #[error("no agent is on a node that --node-name selects; there are {0} on others")]
    NotSelected(usize),
}

/// What became of the agents.
#[derive(Debug)]
pub enum Change {
    /// All of them.
    All(Vec<Agent>),
    /// One is new, or not as it was.
    Changed(Agent),
    /// One is gone: its pod's UID.
    Gone(String),
}

impl Agents {
    /// All agents on selected nodes, also those that do not run, by node.
    ///
    /// # Errors
    /// The server refuses, or there are none.
    pub async fn list(&self) -> Result<Vec<Agent>, ListError> {
        let api = self.login.pods();
        let mut pods = Vec::new();
        let mut params = ListParams::default().labels(&self.selector).limit(PAGE);
        loop {
            let why = |why| ListError::Other {
                verb: "list",
                namespace: self.namespace.clone(),
                why,
            };
            let page = timeout(self.timeout, api.list(&params)).await;
            let page = page
                .map_err(|_| why(does_not_answer(self.timeout)))?
                .map_err(|error| self.failure("list", &error))?;
            pods.extend(page.items.iter().map(Agent::of));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => break,
            }
        }
        if pods.is_empty() {
            return Err(ListError::None {
                namespace: self.namespace.clone(),
                selector: self.selector.clone(),
            });
        }
        let all = pods.len();
        pods.retain(|agent| self.is_selected(agent));
        // One that is being replaced has nothing to say once the next one is there.
        let staying = pods.iter().filter(|agent| !agent.is_leaving);
        let staying: HashSet<_> = staying.map(|agent| agent.node.clone()).collect();
        pods.retain(|agent| !agent.is_leaving || !staying.contains(&agent.node));
        if pods.is_empty() {
            return Err(ListError::NotSelected(all));
        }
        pods.sort_by(|a, b| (&a.node, &a.pod).cmp(&(&b.node, &b.pod)));
        Ok(pods)
    }

    /// Follows the agents on selected nodes, for as long as it takes: errors are told, and tried again.
    pub fn watch(&self) -> impl Stream<Item = Result<Change, ListError>> + use<'_> {
        let watch = Watch {
            agents: self,
            changes: None,
            refused: None,
        };
        stream::unfold(watch, |mut watch| async {
            let change = watch.next().await;
            Some((change, watch))
        })
    }

    /// The same as one login sees it.
    fn changes(&self) -> impl Stream<Item = Result<Change, ListError>> + use<'_> {
        use watcher::Event;
        let config = watcher::Config::default()
            .labels(&self.selector)
            .page_size(PAGE);
        let mut listed = Vec::new();
        watcher(self.login.pods(), config)
            .default_backoff()
            .filter_map(move |event| {
                let change = match event {
                    Ok(Event::Init) => {
                        listed.clear();
                        None
                    }
                    Ok(Event::InitApply(pod)) => {
                        listed.push(Agent::of(&pod));
                        None
                    }
                    Ok(Event::InitDone) => {
                        listed.retain(|agent| self.is_selected(agent));
                        Some(Ok(Change::All(std::mem::take(&mut listed))))
                    }
                    Ok(Event::Apply(pod)) => {
                        let agent = Agent::of(&pod);
                        self.is_selected(&agent)
                            .then_some(Ok(Change::Changed(agent)))
                    }
                    Ok(Event::Delete(pod)) => Some(Ok(Change::Gone(pod.uid().unwrap_or_default()))),
                    Err(error) => self.watch_failure(&error).map(Err),
                };
                std::future::ready(change)
            })
    }

    fn is_selected(&self, agent: &Agent) -> bool {
        self.selection.may_be_on(&agent.node)
    }

    /// `None` for what is no failure: a place in the past that is too old.
    fn watch_failure(&self, error: &watcher::Error) -> Option<ListError> {
        use watcher::Error;
        match error {
            Error::InitialListFailed(cause) => Some(self.failure("list", cause)),
            Error::WatchStartFailed(cause) | Error::WatchFailed(cause) => {
                Some(self.failure("watch", cause))
            }
            Error::WatchError(status) if status.code == 410 => None,
            Error::WatchError(_) | Error::NoResourceVersion => Some(ListError::Other {
                verb: "watch",
                namespace: self.namespace.clone(),
                why: clean(&causes(error)).into_owned(),
            }),
        }
    }

    fn failure(&self, verb: &'static str, error: &kube::Error) -> ListError {
        let namespace = self.namespace.clone();
        match error {
            kube::Error::Api(status) if status.code == 403 => {
                ListError::Forbidden { verb, namespace }
            }
            error if super::exec::is_unauthorized(error) => ListError::Unauthorized,
            error => ListError::Other {
                verb,
                namespace,
                why: super::exec::why(error),
            },
        }
    }
}

/// A watch that goes on with another login where one is not accepted any more.
struct Watch<'a> {
    agents: &'a Agents,
    /// With the login's generation.
    changes: Option<(u64, BoxStream<'a, Result<Change, ListError>>)>,
    /// The login that was not accepted, until another is.
    refused: Option<u64>,
}

impl Watch<'_> {
    /// A login that is not accepted is told of if what was read anew is not either.
    async fn next(&mut self) -> Result<Change, ListError> {
        let login = &self.agents.login;
        loop {
            let (generation, changes) = match &mut self.changes {
                Some(changes) => changes,
                None => {
                    if let Some(refused) = self.refused {
                        login.renew(refused).await?;
                    }
                    let generation = login.generation();
                    let changes = self.agents.changes().boxed();
                    self.changes.insert((generation, changes))
                }
            };
            match changes.next().await {
                Some(Err(ListError::Unauthorized)) => {
                    let before = self.refused.replace(*generation);
                    self.changes = None;
                    if before.is_some() {
                        return Err(ListError::Unauthorized);
                    }
                }
                Some(change) => {
                    if change.is_ok() {
                        self.refused = None;
                    }
                    return change;
                }
                // A watcher does not end.
                None => std::future::pending().await,
            }
        }
    }
}

/// What is said of a server that takes too long.
pub fn does_not_answer(after: Duration) -> String {
    format!("no answer within {} s", after.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(text: &str) -> Agent {
        Agent::of(&serde_saphyr::from_str(text).unwrap())
    }

    #[test]
    fn what_is_needed_of_a_pod() {
        let running = "
            metadata: {name: whydrop-x, uid: u}
            spec: {nodeName: node-a, containers: [{name: proxy}, {name: agent}]}
            status: {phase: Running}";
        let agent = pod(running);
        assert_eq!(
            (&*agent.node, &*agent.pod, &*agent.uid),
            ("node-a", "whydrop-x", "u")
        );
        assert_eq!(agent.container.as_deref(), Some("agent"));
        assert_eq!((agent.problem, agent.is_leaving), (None, false));
        // As kubectl finds it; of a name that no container has nothing follows.
        for (annotation, found) in [("proxy", "proxy"), ("gone", "agent")] {
            let annotations = format!("annotations: {{{DEFAULT_CONTAINER}: {annotation}}}, uid");
            let agent = pod(&running.replace("uid", &annotations));
            assert_eq!(agent.container.as_deref(), Some(found));
        }
        let leaving = running.replace("uid: u", "deletionTimestamp: '2026-11-22T12:03:10Z'");
        let agent = pod(&leaving);
        assert!(agent.is_leaving);
        assert_eq!(agent.problem.as_deref(), Some("its pod is being deleted"));
        let pending = pod("{metadata: {name: x}, status: {phase: Pending}}");
        assert_eq!((&*pending.node, pending.container), ("", None));
        assert_eq!(pending.problem.as_deref(), Some("its pod is Pending"));
        assert!(pod("{metadata: {name: x}}").problem.is_some());
    }
}
