//! Every fix that the unit tests of `explain` produce, as a real API server takes it, and every policy of the
//! admin and baseline tiers in these tests, by the definitions that their authors publish.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kube::Client;
use kube::api::{DynamicObject, Patch, PatchParams, ValidationDirective};
use serde_json::Value;
use whydrop::cluster::document;
use whydrop::cluster::objects::{Interner, Object};
use whydrop::cluster::parse::parse;
use whydrop::policy::evaluate::{End, Flow, Verdict, Who};
use whydrop::policy::model::Direction;
use whydrop::policy::world::{Change, World};
use whydrop_kube_tests::follower::DEADLINE;
use whydrop_kube_tests::made;
use whydrop_kube_tests::objects::{api, create, namespace};
use whydrop_kube_tests::server::{Server, User};

#[tokio::test]
async fn every_fix_is_accepted_and_works() -> Result<()> {
    let folder = made("WHYDROP_TEST_FIXES")?;
    let server = Server::start().await?;
    let client = server.client(User::Admin).await?;
    for name in ["shop", "db"] {
        create(&client, &namespace(name)).await?;
    }
    for file in fs::read_dir(made("WHYDROP_TIERS")?)? {
        define(&client, &file?.path()).await?;
    }
    let mut taken: BTreeMap<String, usize> = BTreeMap::new();
    for file in fs::read_dir(&folder)? {
        let case: Value = serde_json::from_slice(&fs::read(file?.path())?)?;
        let text = |name: &str| case[name].as_str().unwrap_or_default();
        let fix: Value = serde_saphyr::from_str(text("fix"))?;
        let kind = fix["kind"].as_str().unwrap_or_default().to_owned();
        for policy in tier_policies(text("objects"))? {
            let name = policy.to_string();
            apply(&client, &policy).await.context(name)?;
        }
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

/// Defines what a file defines, and waits until it counts.
async fn define(client: &Client, file: &Path) -> Result<()> {
    let definition: Value = serde_saphyr::from_str(&fs::read_to_string(file)?)?;
    create(client, &definition).await?;
    let spec = &definition["spec"];
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let versions = spec["versions"].as_array().context("versions")?;
    for version in versions {
        let version = format!("{}/{}", word(&spec["group"]), word(&version["name"]));
        let plural = word(&spec["names"]["plural"]);
        let path = format!("/apis/{version}/{plural}");
        let deadline = Instant::now() + DEADLINE;
        let list = || hyper::Request::get(&path).body(Vec::new());
        while let Err(error) = client.request_text(list()?).await {
            ensure!(Instant::now() < deadline, "{path} is not served: {error:#}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(())
}

/// The policies of the tiers in a text.
fn tier_policies(text: &str) -> Result<Vec<Value>> {
    let mut objects: Vec<Value> = serde_saphyr::from_multiple(text)?;
    objects.retain(|object| {
        let version = object["apiVersion"].as_str();
        version.is_some_and(|version| version.starts_with("policy.networking.k8s.io/"))
    });
    Ok(objects)
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
