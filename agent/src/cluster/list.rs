//! The API server's objects, read once: what one answer rests on.
//!
//! Lists come from the server's cache (`resourceVersion=0`), in pages where it makes pages of that, and each
//! object is stripped while its page is read. A kind that may not be listed does not keep the others from
//! being read.

use std::time::Duration;

use jiff::Timestamp;
use kube::Client;
use serde::Deserialize;

use super::document;
use super::objects::{Interner, Object, ObjectKind};
use super::watch::{KINDS, OPTIONAL, health, offered};

/// Objects in a page.
const PAGE: u32 = 500;
/// A page that takes longer does not come: the largest list of a server that makes no pages, over a slow line.
const PAGE_TIMEOUT: Duration = Duration::from_secs(120);

/// What was read.
#[derive(Debug, Default)]
pub struct Listed {
    /// The objects.
    pub objects: Vec<Object>,
    /// Kinds of which nothing could be read, and why in one sentence.
    pub missing: Vec<(ObjectKind, String)>,
    /// Objects that could not be used, each as a sentence.
    pub malformed: Vec<String>,
    /// As of when.
    pub time: Timestamp,
}

/// Why a kind could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The account may not.
    #[error(
        "the API server does not let this account list {0} (verb list, resource {0}): ask for that right"
    )]
    Forbidden(String),
    /// The list could not be continued where it was.
    #[error("the list of {0} expired while it was read; try again")]
    Expired(String),
    /// The server does not answer, or with another error.
    #[error("cannot list {resource}: {why}")]
    Failed {
        /// What was listed.
        resource: String,
        /// What the server or the connection says.
        why: String,
    },
}

impl ListError {
    /// Whether the other kinds can be read all the same.
    const fn is_of_kind(&self) -> bool {
        matches!(self, Self::Forbidden(_))
    }
}

/// Reads all objects that policies and names hang on.
///
/// # Errors
/// The server does not answer; that a kind may not be listed is no error.
pub async fn list(client: &Client) -> Result<Listed, ListError> {
    let mut listed = Listed {
        time: Timestamp::now(),
        ..Listed::default()
    };
    let mut strings = Interner::default();
    let offered = offered(client).await;
    for kind in KINDS {
        if OPTIONAL.contains(&kind) {
            match &offered {
                Some(offered) if !offered.contains(&kind) => continue,
                Some(_) => {}
                None => {
                    let why = "the API server does not say whether it has them";
                    let why = format!("{}: {why}", resource(kind));
                    listed.missing.push((kind, why));
                    continue;
                }
            }
        }
        let result = match pages(client, kind, &mut strings, &mut listed).await {
            Err(ListError::Expired(_)) => pages(client, kind, &mut strings, &mut listed).await,
            result => result,
        };
        match result {
            Err(error) if error.is_of_kind() => listed.missing.push((kind, error.to_string())),
            result => result?,
        }
    }
    Ok(listed)
}

/// As `kubectl auth can-i` takes it.
fn resource(kind: ObjectKind) -> String {
    match kind.group() {
        "" => kind.plural().to_owned(),
        group => format!("{}.{group}", kind.plural()),
    }
}

/// Where a list goes on.
#[derive(Deserialize)]
struct Page {
    metadata: PageMeta,
}

#[derive(Deserialize)]
struct PageMeta {
    #[serde(rename = "continue")]
    next: Option<String>,
}

/// All objects of a kind.
async fn pages(
    client: &Client,
    kind: ObjectKind,
    strings: &mut Interner,
    listed: &mut Listed,
) -> Result<(), ListError> {
    let failed = |why: String| ListError::Failed {
        resource: resource(kind),
        why,
    };
    let group = match kind.group() {
        "" => "/api".to_owned(),
        _ => "/apis".to_owned(),
    };
    let path = format!("{group}/{}/{}", kind.api_version(), kind.plural());
    // What was read of a list that expired is read anew.
    listed.objects.retain(|object| object.key().kind != kind);
    let mut next: Option<String> = None;
    loop {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("limit", &PAGE.to_string());
        match &next {
            None => query.append_pair("resourceVersion", "0"),
            Some(next) => query.append_pair("continue", next),
        };
        let request = hyper::Request::get(format!("{path}?{}", query.finish())).body(Vec::new());
        let request = request.map_err(|error| failed(error.to_string()))?;
        let text = tokio::time::timeout(PAGE_TIMEOUT, client.request_text(request));
        let text = match text.await {
            Ok(Ok(text)) => text,
            Ok(Err(kube::Error::Api(status))) => {
                return Err(match status.code {
                    403 => ListError::Forbidden(resource(kind)),
                    410 if next.is_some() => ListError::Expired(resource(kind)),
                    code => failed(format!("the API server answers {code}: {}", status.message)),
                });
            }
            Ok(Err(error)) => return Err(failed(health::causes(&error))),
            Err(_) => {
                let seconds = PAGE_TIMEOUT.as_secs();
                return Err(failed(format!("no answer within {seconds} s")));
            }
        };
        let page: Page = serde_json::from_str(&text)
            .map_err(|error| failed(format!("what the API server answers is no list: {error}")))?;
        let read = document::read(&text, true).map_err(failed)?;
        let objects = read.parsed.into_iter().map(|parsed| parsed.strip(strings));
        listed.objects.extend(objects);
        listed.malformed.extend(read.malformed.into_iter().map(|m| {
            let namespace = match m.namespace.as_str() {
                "" => String::new(),
                namespace => format!("{namespace}/"),
            };
            format!(
                "{} {namespace}{} is left out: {}",
                m.kind, m.name, m.message
            )
        }));
        next = page.metadata.next.filter(|next| !next.is_empty());
        if next.is_none() {
            return Ok(());
        }
    }
}
