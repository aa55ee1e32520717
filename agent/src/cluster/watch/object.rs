//! One object as the API server sends it, stripped while it is read, so that no list is ever held
//! whole: of a pod of 10 kB some hundred bytes stay.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::sync::Arc;
use std::task::Poll;

use futures_util::stream::{self, BoxStream, StreamExt as _};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::DynamicResourceScope;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use serde::de::{Deserialize, Deserializer};

use crate::cluster::objects::ObjectKind;
use crate::cluster::parse::pruned::Pruned;
use crate::cluster::parse::{Malformed, Parsed, parse_pruned, used};

/// What was read of an object. `None` is of a kind that is not used.
pub type Item = Result<Option<Parsed>, Malformed>;

/// One step of a watch.
#[derive(Debug)]
pub enum Step {
    /// All objects are told anew from here on.
    Restart,
    /// One of them.
    Listed(Item),
    /// These were all.
    Complete,
    /// An object is new or changed.
    Changed(Item),
    /// An object is gone: its namespace and name.
    Gone(String, String),
}

/// The steps of one kind, for ever; after an error, what kube does next comes after a pause that grows
/// from one to thirty seconds and is never the same on two nodes.
type Steps = BoxStream<'static, Result<Step, watcher::Error>>;

/// Steps of one kind, while it has more, before the others are asked. To ask them all after each step would
/// cost more than to take it; without a bound a list would hold up the others.
const IN_A_ROW: usize = 64;

/// The watches of all kinds. They are asked in turn, so that no kind waits for another's list.
#[derive(Default)]
pub struct Watches {
    /// The first one is asked next.
    streams: VecDeque<(ObjectKind, Steps)>,
    /// How many steps of the first one were taken.
    in_a_row: usize,
}

impl Watches {
    /// Watches a kind from now on, in place of how it was watched before.
    pub fn open(&mut self, kind: ObjectKind, client: Client, config: watcher::Config) {
        self.close(kind);
        self.streams
            .extend(steps(kind, client, config).map(|steps| (kind, steps)));
    }

    /// Watches a kind no longer.
    pub fn close(&mut self, kind: ObjectKind) {
        self.streams.retain(|(known, _)| *known != kind);
        self.in_a_row = 0;
    }

    /// The next step of any of them.
    pub async fn next(&mut self) -> (ObjectKind, Result<Step, watcher::Error>) {
        poll_fn(|context| {
            for _ in 0..self.streams.len() {
                if self.in_a_row >= IN_A_ROW {
                    self.turn();
                }
                if let Some((kind, steps)) = self.streams.front_mut()
                    && let Poll::Ready(Some(step)) = steps.poll_next_unpin(context)
                {
                    self.in_a_row += 1;
                    return Poll::Ready((*kind, step));
                }
                self.turn();
            }
            Poll::Pending
        })
        .await
    }

    fn turn(&mut self) {
        self.streams.rotate_left(1);
        self.in_a_row = 0;
    }
}

/// Watches one kind; `None` for kinds that are not watched.
fn steps(kind: ObjectKind, client: Client, config: watcher::Config) -> Option<Steps> {
    Some(match kind {
        ObjectKind::Pod => open::<Pod>(client, config),
        ObjectKind::Service => open::<Service>(client, config),
        ObjectKind::EndpointSlice => open::<EndpointSlice>(client, config),
        ObjectKind::Node => open::<Node>(client, config),
        ObjectKind::Namespace => open::<Namespace>(client, config),
        ObjectKind::NetworkPolicy => open::<NetworkPolicy>(client, config),
        ObjectKind::ClusterNetworkPolicy => open::<ClusterNetworkPolicy>(client, config),
        ObjectKind::AdminNetworkPolicy => open::<AdminNetworkPolicy>(client, config),
        ObjectKind::BaselineAdminNetworkPolicy => {
            open::<BaselineAdminNetworkPolicy>(client, config)
        }
        _ => return None,
    })
}

fn open<K: Kind>(client: Client, config: watcher::Config) -> Steps {
    let mut begun = false;
    watcher(Api::<Watched<K>>::all(client), config)
        // kube says that a list begins before it asks for it. Told on, that would stand for a list that never
        // comes, and a good word between two failures would keep the pauses short.
        .flat_map(move |event| {
            let begins = matches!(event, Ok(watcher::Event::Init));
            let began = std::mem::replace(&mut begun, begins) && event.is_ok();
            let told = (!begins).then_some(event);
            let init = began.then_some(Ok(watcher::Event::Init));
            stream::iter([init, told].into_iter().flatten())
        })
        .default_backoff()
        .map(|event| {
            Ok(match event? {
                watcher::Event::Init => Step::Restart,
                watcher::Event::InitApply(object) => Step::Listed(object.item()),
                watcher::Event::InitDone => Step::Complete,
                watcher::Event::Apply(object) => Step::Changed(object.item()),
                watcher::Event::Delete(object) => {
                    let ObjectMeta {
                        namespace, name, ..
                    } = object.meta;
                    Step::Gone(namespace.unwrap_or_default(), name.unwrap_or_default())
                }
            })
        })
        .boxed()
}

/// A kind as a type, because the items of a list do not say what they are.
trait Kind: Clone + fmt::Debug + Send + Sync + 'static {
    const KIND: ObjectKind;
}

macro_rules! kinds {
    ($($kind:ident),*) => {$(
        #[derive(Clone, Debug)]
        struct $kind;

        impl Kind for $kind {
            const KIND: ObjectKind = ObjectKind::$kind;
        }
    )*};
}

kinds!(
    Pod,
    Service,
    EndpointSlice,
    Node,
    Namespace,
    NetworkPolicy,
    ClusterNetworkPolicy,
    AdminNetworkPolicy,
    BaselineAdminNetworkPolicy
);

/// An object of a kind.
#[derive(Clone, Debug)]
struct Watched<K> {
    /// Name, namespace and version: what kube looks at.
    meta: ObjectMeta,
    /// Shared because kube asks for [`Clone`], which it does not use.
    item: Arc<Item>,
    kind: PhantomData<K>,
}

impl<K> Watched<K> {
    fn item(self) -> Item {
        Arc::into_inner(self.item).unwrap_or(Ok(None))
    }
}

impl<'de, K: Kind> Deserialize<'de> for Watched<K> {
    /// Never fails on a JSON object: one that is malformed must not end the watch of all others.
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let object = used::read(K::KIND, d)?;
        let field = |name: &str| {
            let field = object.get("metadata").and_then(|meta| meta.get(name));
            field.and_then(Pruned::as_str).map(str::to_owned)
        };
        Ok(Self {
            meta: ObjectMeta {
                name: field("name"),
                namespace: field("namespace"),
                resource_version: field("resourceVersion"),
                ..ObjectMeta::default()
            },
            item: Arc::new(parse_pruned(K::KIND, object)),
            kind: PhantomData,
        })
    }
}

impl<K: Kind> Resource for Watched<K> {
    type DynamicType = ();
    type Scope = DynamicResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        K::KIND.as_str().into()
    }

    fn group((): &()) -> Cow<'_, str> {
        K::KIND.group().into()
    }

    fn version((): &()) -> Cow<'_, str> {
        K::KIND.version().into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::KIND.plural().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::FutureExt as _;

    use super::*;

    fn endless() -> Steps {
        stream::repeat_with(|| Ok(Step::Restart)).boxed()
    }

    fn next(watches: &mut Watches) -> Option<ObjectKind> {
        watches.next().now_or_never().map(|(kind, _)| kind)
    }

    #[tokio::test]
    async fn an_endless_list_holds_up_no_other() {
        let kinds = [ObjectKind::Pod, ObjectKind::Node];
        let mut watches = Watches {
            streams: kinds.map(|kind| (kind, endless())).into(),
            in_a_row: 0,
        };
        let told: Vec<_> = (0..4 * IN_A_ROW)
            .filter_map(|_| next(&mut watches))
            .collect();
        for kind in kinds {
            let times = told.iter().filter(|told| **told == kind).count();
            assert_eq!(times, 2 * IN_A_ROW, "{kind:?}");
        }
    }

    /// One that was not asked would wake nobody later.
    #[tokio::test]
    async fn all_are_asked_before_it_waits() {
        let asked = Arc::new(AtomicUsize::new(0));
        let silent = || {
            let asked = asked.clone();
            let steps = stream::poll_fn(move |_| {
                asked.fetch_add(1, Ordering::Relaxed);
                Poll::Pending
            });
            steps.boxed()
        };
        let some = stream::iter([Ok(Step::Restart), Ok(Step::Complete)]);
        let mut watches = Watches {
            streams: [
                (ObjectKind::Node, silent()),
                (ObjectKind::Pod, some.chain(stream::pending()).boxed()),
                (ObjectKind::Service, silent()),
            ]
            .into(),
            in_a_row: 0,
        };
        assert_eq!(next(&mut watches), Some(ObjectKind::Pod));
        assert_eq!(next(&mut watches), Some(ObjectKind::Pod));
        assert_eq!(asked.swap(0, Ordering::Relaxed), 1);
        assert_eq!(next(&mut watches), None);
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }
}
