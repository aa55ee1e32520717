//! Silent drops as Kubernetes Events of a real API server.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Event as CoreEvent;
use k8s_openapi::api::events::v1::Event as KubeEvent;
use kube::api::{ListParams, ObjectList};
use kube::{Api, Client, Config};
use serde_json::{Value, json};
use whydrop::event::{Event, Line};
use whydrop::kube_events;
use whydrop::record::{Detail, Record};
use whydrop::senders::Senders;
use whydrop::state::State;
use whydrop_kube_tests::follower::DEADLINE;
use whydrop_kube_tests::objects::{create, delete, namespace, pod};
use whydrop_kube_tests::server::{Server, User};

/// What tells drops, until it is dropped.
struct Teller {
    state: Arc<State>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Teller {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Teller {
    async fn start(server: &Server, user: User) -> Self {
        let config = server.config(user).await.unwrap();
        Self::with(move || config.clone()).await
    }

    /// With what the configuration is each time that it is asked for.
    async fn with(configuration: impl Fn() -> Config + Send + Sync + 'static) -> Self {
        let hour = Duration::from_secs(3_600);
        let record = Record::new(Detail::Pod, 100, hour);
        let senders = Senders::new(Detail::Pod, 100, hour);
        let state = Arc::new(State::new("node-a".into(), record, senders));
        let configuration = move || std::future::ready(Ok(configuration()));
        let times = kube_events::Times {
            first_update: Duration::from_secs(4),
            again: Duration::from_secs(2),
            client: Duration::from_millis(500),
            ..kube_events::Times::default()
        };
        let run = kube_events::run(state.clone(), times, configuration, std::future::pending());
        let task = tokio::spawn(run);
        let teller = Self { state, task };
        teller
            .until("reading", |state| state.stream.readers() == 1)
            .await;
        teller
    }

    /// What is said of the source.
    fn status(&self) -> Value {
        let status = self.state.status();
        let sources = status["sources"].as_array().unwrap().iter();
        let mut of = sources.filter(|source| source["source"] == kube_events::SOURCE);
        of.next().cloned().unwrap_or_default()
    }

    async fn until(&self, what: &str, is_so: impl Fn(&State) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(&self.state) {
            assert!(Instant::now() < deadline, "{what}: {}", self.state.status());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn count(&self, result: &str) -> u64 {
        let counts = self.state.kube_events.counts();
        counts.iter().find(|(name, _)| *name == result).unwrap().1
    }

    fn publish(&self, to: &str) {
        let text = include_str!("../../../agent/tests/fixtures/event.json");
        let mut event: Event = serde_json::from_str(text).unwrap();
        event.source.pod = Some("web".into());
        event.destination.pod = Some(to.into());
        self.state.stream.publish(Arc::new(Line::Event(event)));
    }
}

async fn events(client: &Client) -> ObjectList<KubeEvent> {
    let api = Api::<KubeEvent>::namespaced(client.clone(), "shop");
    api.list(&ListParams::default()).await.unwrap()
}

#[tokio::test]
async fn a_pod_that_suffers_gets_one_event() {
    let server = Server::start().await.unwrap();
    let client = server.client(User::Admin).await.unwrap();
    create(&client, &namespace("shop")).await.unwrap();
    let web = pod("shop", "web", "node-a", "10.1.0.7");
    let made = create(&client, &web).await.unwrap();
    let teller = Teller::start(&server, User::Admin).await;
    for _ in 0..3 {
        teller.publish("pg-0");
    }
    teller.until("told", |_| teller.count("created") == 1).await;
    let told = events(&client).await;
    let [event] = &told.items[..] else {
        panic!("not one: {told:?}");
    };
    assert_eq!(event.reason.as_deref(), Some("SilentDrop"));
    assert_eq!(event.type_.as_deref(), Some("Warning"));
    assert_eq!(event.reporting_instance.as_deref(), Some("node-a"));
    let note = event.note.as_deref().unwrap();
    assert!(note.contains("db/pg-0 port 5432"), "{note}");
    assert!(note.contains("isolated by db/default-deny"), "{note}");
    let related = event.related.as_ref().unwrap();
    assert_eq!(related.name.as_deref(), Some("pg-0"));

    // As `kubectl describe pod` asks.
    let uid = made["metadata"]["uid"].as_str().unwrap();
    let fields = format!(
        "involvedObject.name=web,involvedObject.namespace=shop,involvedObject.kind=Pod,\
         involvedObject.uid={uid}"
    );
    let api = Api::<CoreEvent>::namespaced(client.clone(), "shop");
    let described = api
        .list(&ListParams::default().fields(&fields))
        .await
        .unwrap();
    assert_eq!(described.items.len(), 1);

    // Of a pod that is gone nobody is told.
    delete(&client, &web).await.unwrap();
    teller.publish("pg-1");
    teller.publish("pg-2");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(teller.count("created"), 1);
    assert_eq!(teller.count("failed"), 0);
}

#[tokio::test]
async fn without_the_right_it_says_which() {
    let server = Server::start().await.unwrap();
    let client = server.client(User::Admin).await.unwrap();
    create(&client, &namespace("shop")).await.unwrap();
    create(&client, &pod("shop", "web", "node-a", "10.1.0.7"))
        .await
        .unwrap();
    let api = "rbac.authorization.k8s.io";
    let role = |rules| {
        json!({"apiVersion": format!("{api}/v1"), "kind": "ClusterRole", "metadata": {"name": "agent"},
            "rules": rules})
    };
    let pods = json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]});
    create(&client, &role(json!([pods]))).await.unwrap();
    let binding = json!({
        "apiVersion": format!("{api}/v1"), "kind": "ClusterRoleBinding", "metadata": {"name": "agent"},
        "roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": "agent"},
        "subjects": [{"apiGroup": api, "kind": "User", "name": "agent"}],
    });
    create(&client, &binding).await.unwrap();
    let teller = Teller::start(&server, User::Named("agent")).await;
    teller.publish("pg-0");
    teller
        .until("refused", |_| teller.count("failed") == 1)
        .await;
    let source = teller.status();
    assert_eq!(source["up"], false);
    let why = source["why"].as_str().unwrap();
    assert!(
        why.contains("may not create events.k8s.io/events in namespace shop"),
        "{why}"
    );

    // Granted, it works at the next attempt, by the rights of the overlay.
    let overlay = include_str!("../../../deploy/overlays/kube-events/rbac.yaml");
    assert!(overlay.contains("verbs: [create, patch]"));
    let events = json!({"apiGroups": ["events.k8s.io"], "resources": ["events"],
        "verbs": ["create", "patch"]});
    delete(&client, &role(json!([]))).await.unwrap();
    create(&client, &role(json!([pods, events]))).await.unwrap();
    teller.until("told", |_| teller.count("created") == 1).await;
    // And so does its series.
    teller.publish("pg-0");
    teller
        .until("updated", |_| teller.count("updated") == 1)
        .await;
    let told = events_of(&client).await;
    assert_eq!(told.series.as_ref().map(|series| series.count), Some(8));
}

/// What is to be told while no credentials are accepted is told with the next ones.
#[tokio::test]
async fn refused_credentials_lose_nothing() {
    let server = Server::start().await.unwrap();
    let client = server.client(User::Admin).await.unwrap();
    create(&client, &namespace("shop")).await.unwrap();
    let web = pod("shop", "web", "node-a", "10.1.0.7");
    create(&client, &web).await.unwrap();
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), "expired").unwrap();
    let expired = server.config_by_token(token.path()).await.unwrap();
    let config = Arc::new(Mutex::new(expired));
    let asked = config.clone();
    let teller = Teller::with(move || asked.lock().unwrap().clone()).await;
    for _ in 0..3 {
        teller.publish("pg-0");
    }
    let why = "the API server does not accept the credentials";
    teller
        .until("refused", |_| teller.status()["why"] == why)
        .await;
    assert_eq!(teller.count("failed"), 1);
    teller.publish("pg-0");
    *config.lock().unwrap() = server.config(User::Admin).await.unwrap();
    teller.until("told", |_| teller.count("updated") == 1).await;
    let told = events_of(&client).await;
    assert_eq!(told.series.map(|series| series.count), Some(16));
    assert_eq!(teller.status()["up"], true);
    assert_eq!(teller.count("limited"), 0);
}

async fn events_of(client: &Client) -> KubeEvent {
    let mut told = events(client).await.items;
    assert_eq!(told.len(), 1);
    told.remove(0)
}
