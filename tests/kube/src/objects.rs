//! Objects in a real API server. No controller and no kubelet runs, so their status is written too.

use anyhow::{Context as _, Result};
use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};

/// The API of an object's kind, in its namespace.
///
/// # Errors
/// The object has no kind.
pub fn api(client: &Client, object: &Value) -> Result<Api<DynamicObject>> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let (group, version) = version.split_once('/').unwrap_or(("", &version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &kind));
    Ok(match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    })
}

/// Makes an object, and writes its status if it has one. Answers what the server made of it.
///
/// # Errors
/// The server refuses it.
pub async fn create(client: &Client, object: &Value) -> Result<Value> {
    let name = object["metadata"]["name"].as_str().context("a name")?;
    let api = api(client, object)?;
    let mut spec = object.clone();
    // The server gives its own.
    if let Some(metadata) = spec["metadata"].as_object_mut() {
        metadata.remove("uid");
    }
    let status = spec.as_object_mut().and_then(|spec| spec.remove("status"));
    let spec: DynamicObject = serde_json::from_value(spec)?;
    let what = || format!("create {} {name}", object["kind"]);
    let mut made = api
        .create(&PostParams::default(), &spec)
        .await
        .with_context(what)?;
    if let Some(status) = status {
        let patch = Patch::Merge(json!({ "status": status }));
        let params = PatchParams::default();
        made = api
            .patch_status(name, &params, &patch)
            .await
            .with_context(what)?;
    }
    Ok(serde_json::to_value(made)?)
}

/// Makes all objects of a `List`, in its order.
///
/// # Errors
/// As [`create`].
pub async fn create_all(client: &Client, list: &Value) -> Result<()> {
    for object in list["items"].as_array().into_iter().flatten() {
        create(client, object).await?;
    }
    Ok(())
}

/// Removes an object at once, as a kubelet that confirms its end does.
///
/// # Errors
/// There is none.
pub async fn delete(client: &Client, object: &Value) -> Result<()> {
    let name = object["metadata"]["name"].as_str().context("a name")?;
    let params = kube::api::DeleteParams::default().grace_period(0);
    let deleted = api(client, object)?.delete(name, &params).await;
    deleted.map(drop).with_context(|| format!("delete {name}"))
}

/// A namespace.
pub fn namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
}

/// A running pod of a Deployment, on a node.
pub fn pod(namespace: &str, name: &str, node: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": {"app": name}},
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": "example.invalid/main"}],
        },
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
    })
}
