//! What went wrong with a watch, in one sentence that says what to do, and whether the server is there.

use std::time::Instant;

use kube::core::Status;
use kube::runtime::watcher;

use crate::cluster::objects::ObjectKind;

/// Why a list or a watch failed.
#[derive(Debug)]
pub struct Failure {
    /// One sentence.
    pub why: String,
    /// The place from which the watch should go on is too old, and kube would ask for it again.
    pub is_too_old: bool,
    /// The server knows no streaming lists, or has them switched off.
    pub refuses_streams: bool,
    /// The server does not accept the credentials.
    pub is_unauthorized: bool,
    /// The API server itself said so.
    is_answer: bool,
}

impl Failure {
    /// Of one kind.
    pub fn of(kind: ObjectKind, error: &watcher::Error) -> Self {
        use watcher::Error;
        let (verb, cause) = match error {
            Error::InitialListFailed(cause) => ("list", Some(cause)),
            Error::WatchStartFailed(cause) => ("watch", Some(cause)),
            Error::WatchFailed(cause) => ("watch", Some(cause)),
            Error::WatchError(_) | Error::NoResourceVersion => ("watch", None),
        };
        let status: Option<&Status> = match (error, cause) {
            (Error::WatchError(status), _) | (_, Some(kube::Error::Api(status))) => Some(status),
            _ => None,
        };
        let code = status.map(|status| status.code);
        let is_start = matches!(error, Error::WatchStartFailed(_));
        let plural = kind.plural();
        let why = match (code, status) {
            (Some(403), _) => format!(
                "not allowed to {verb} {plural}: add the rule {{apiGroups: [\"{}\"], resources: \
                 [{plural}], verbs: [list, watch]}} to the agent's ClusterRole",
                kind.group(),
            ),
            (Some(code), Some(status)) => {
                format!(
                    "cannot {verb} {plural}: the API server answers {code}: {}",
                    status.message
                )
            }
            _ => format!(
                "cannot {verb} {plural}: {}",
                cause.map_or_else(|| error.to_string(), |c| causes(c))
            ),
        };
        Self {
            why,
            is_too_old: is_start && code == Some(410),
            refuses_streams: is_start && matches!(code, Some(400 | 422)),
            is_unauthorized: code == Some(401),
            is_answer: status.is_some(),
        }
    }
}

/// Whether the server is there, as one kind's watch sees it.
#[derive(Debug, Default)]
pub struct Health {
    answered: bool,
    lost: Option<Instant>,
}

impl Health {
    /// The server gave a good answer.
    pub fn answered(&mut self) {
        (self.answered, self.lost) = (true, None);
    }

    /// A list or watch failed.
    pub fn failed(&mut self, failure: &Failure) {
        match failure.is_answer {
            true => self.answered(),
            false => _ = self.lost.get_or_insert_with(Instant::now),
        }
    }

    /// Whether its last word was an answer, of whatever kind.
    pub fn is_reached(&self) -> bool {
        self.answered && self.lost.is_none()
    }

    /// Since when nothing answers.
    pub fn lost_since(&self) -> Option<Instant> {
        self.lost
    }
}

/// The source that stands for a kind's watch, and what is lost without it.
pub fn source(kind: ObjectKind) -> (&'static str, &'static str) {
    match kind {
        ObjectKind::Pod => ("cluster-pods", "pods are not named as they are now"),
        ObjectKind::Service => ("cluster-services", "Services are not named as they are now"),
        ObjectKind::EndpointSlice => (
            "cluster-endpointslices",
            "ports that only endpoints name are no label",
        ),
        ObjectKind::Node => (
            "cluster-nodes",
            "nodes are not named, and pod ranges are not known",
        ),
        ObjectKind::Namespace => ("cluster-namespaces", "namespaces are not counted"),
        ObjectKind::NetworkPolicy => ("cluster-networkpolicies", "policies are not known"),
        ObjectKind::ClusterNetworkPolicy => (
            "cluster-clusternetworkpolicies",
            "policies of the Admin and Baseline tiers are not known",
        ),
        ObjectKind::AdminNetworkPolicy => (
            "cluster-adminnetworkpolicies",
            "policies of the Admin tier are not known",
        ),
        ObjectKind::BaselineAdminNetworkPolicy => (
            "cluster-baselineadminnetworkpolicies",
            "the policy of the Baseline tier is not known",
        ),
        ObjectKind::Endpoints | ObjectKind::ReplicaSet | ObjectKind::Job => ("cluster-others", ""),
    }
}

/// An error and its causes as one sentence. Many repeat their cause's text in their own, so what was
/// said already is left out.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let says = next.to_string();
        if !text.contains(&says) {
            text = format!("{text}: {says}");
        }
        cause = next.source();
    }
    text
}
