//! Every fix that the unit tests of `explain` produce, as a real API server takes it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kube::Client;
use kube::api::{DynamicObject, Patch, PatchParams, ValidationDirective};
use serde_json::{Value, json};
use whydrop::cluster::objects::{Interner, Object};
use whydrop::cluster::parse::parse;
use whydrop::cluster::{ObjectKind, document};
use whydrop::policy::evaluate::{End, Flow, Verdict, Who};
use whydrop::policy::model::Direction;
use whydrop::policy::world::{Change, World};
use whydrop_kube_tests::follower::DEADLINE;
use whydrop_kube_tests::objects::{api, create, namespace};
use whydrop_kube_tests::server::{Server, User};

/// Kinds that an API server has only where somebody defines them, with the version that is asked for. Their own
/// schemas are not here, so of these only the form of an object is judged.
const DEFINED: [(ObjectKind, &str); 3] = [
    (ObjectKind::ClusterNetworkPolicy, "v1alpha2"),
    (ObjectKind::AdminNetworkPolicy, "v1alpha1"),
    (ObjectKind::BaselineAdminNetworkPolicy, "v1alpha1"),
];

#[tokio::test]
async fn every_fix_is_accepted_and_works() -> Result<()> {
    let folder = std::env::var_os("WHYDROP_TEST_FIXES").map(PathBuf::from);
    let folder =
        folder.context("run by `cargo xtask test kube`, which writes the fixes down first")?;
    let server = Server::start().await?;
    let client = server.client(User::Admin).await?;
    for name in ["shop", "db"] {
        create(&client, &namespace(name)).await?;
    }
    for (kind, version) in DEFINED {
        define(&client, kind, version).await?;
    }
    let mut taken: BTreeMap<String, usize> = BTreeMap::new();
    for file in std::fs::read_dir(&folder)? {
        let case: Value = serde_json::from_slice(&std::fs::read(file?.path())?)?;
        let text = |name: &str| case[name].as_str().unwrap_or_default();
        let fix: Value = serde_saphyr::from_str(text("fix"))?;
        let kind = fix["kind"].as_str().unwrap_or_default().to_owned();
        let made = apply(&client, &fix)
            .await
            .with_context(|| text("fix").to_owned())?;
        let (world, changed) = worlds(text("objects"), &made)?;
        let side = match text("side") {
            "ingress" => Direction::Ingress,
            _ => Direction::Egress,
        };
        let before = world.verdict(&flow(&world, text("flow"))?, side);
        let after = changed.verdict(&flow(&changed, text("flow"))?, side);
        ensure!(
            before != Verdict::Allow && after == Verdict::Allow,
            "{}: {before:?}, then {after:?}: {made}",
            text("flow")
        );
        *taken.entry(kind).or_default() += 1;
    }
    println!("fixes by kind: {taken:?}");
    let known = taken.get("NetworkPolicy").zip(taken.get("Namespace"));
    ensure!(
        known.is_some_and(|(policies, _)| *policies >= 15),
        "too few: {taken:?}"
    );
    Ok(())
}

/// Defines a kind, and waits until it counts.
async fn define(client: &Client, kind: ObjectKind, version: &str) -> Result<()> {
    let (name, plural) = (kind.as_str(), kind.plural());
    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{plural}.{}", kind.group()),
            "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/network-policy-api/pull/300"},
        },
        "spec": {
            "group": kind.group(), "scope": "Cluster",
            "names": {"kind": name, "plural": plural},
            "versions": [{"name": version, "served": true, "storage": true, "schema": {
                "openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            }}],
        },
    });
    create(client, &definition).await?;
    let some = json!({"apiVersion": format!("{}/{version}", kind.group()), "kind": name,
        "metadata": {"name": "default"}});
    let deadline = Instant::now() + DEADLINE;
    while let Err(error) = apply(client, &some).await {
        ensure!(Instant::now() < deadline, "{name} is not served: {error:#}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// What the server would make of it: `kubectl apply --server-side --dry-run=server --validate=strict`.
async fn apply(client: &Client, fix: &Value) -> Result<Value> {
    let name = fix["metadata"]["name"].as_str().context("a name")?;
    let mut params = PatchParams::apply("test").dry_run().force();
    params.field_validation = Some(ValidationDirective::Strict);
    let object: DynamicObject = serde_json::from_value(fix.clone())?;
    let made = api(client, fix)?
        .patch(name, &params, &Patch::Apply(&object))
        .await?;
    Ok(serde_json::to_value(made)?)
}

/// The objects of a text, and the same after an object is applied.
fn worlds(text: &str, applied: &Value) -> Result<(World, World)> {
    let mut strings = Interner::default();
    let read = document::read(text, false).map_err(anyhow::Error::msg)?;
    let objects: Vec<Object> = read
        .parsed
        .into_iter()
        .map(|p| p.strip(&mut strings))
        .collect();
    let world = World::new(&objects);
    let parsed = parse(applied, None).map_err(|malformed| anyhow::anyhow!("{malformed:?}"))?;
    let change = match parsed
        .context("of no kind that counts")?
        .strip(&mut strings)
    {
        Object::NetworkPolicy(_, policy) => Change::Policy(policy),
        Object::Namespace(namespace) => Change::Namespace(namespace),
        Object::TierPolicy(_, policy) => Change::Tier(policy),
        other => anyhow::bail!("{other:?} is no fix"),
    };
    let changed = world.with(&change);
    Ok((world, changed))
}

/// `"shop/web db/pg TCP 5432"`, as the unit tests write it.
fn flow(world: &World, text: &str) -> Result<Flow> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let [source, destination, protocol, port @ ..] = &words[..] else {
        anyhow::bail!("{text:?} is no flow");
    };
    let end = |text: &str| -> Result<End> {
        if let Some((namespace, name)) = text.split_once('/') {
            return Ok(End::pod(world.pod_named(namespace, name).context("a pod")?));
        }
        let ip = text.parse()?;
        let who = match (world.pods_at(ip).first(), world.node_at(ip)) {
            (Some(pod), _) => Who::Pod(*pod),
            (None, Some(node)) => Who::Node(node),
            (None, None) => Who::Outside,
        };
        Ok(End { who, ip: Some(ip) })
    };
    Ok(Flow {
        source: end(source)?,
        destination: end(destination)?,
        protocol: protocol
            .parse()
            .map_err(|error| anyhow::anyhow!("{error}"))?,
        port: port.first().map(|port| port.parse()).transpose()?,
    })
}
