//! Memory, CPU and requests of an agent, with a real API server and 10,000 pods in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use kube::Client;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use whydrop_tests::agent::Agent;
use whydrop_tests::bench::kernel;
use whydrop_tests::bench::report::{Must, Report};

use super::large::wait_known;
use super::objects;
use crate::objects::{api, create};
use crate::server::{Server, User};

const PODS: usize = 10_000;
const SERVICES: usize = 2_000;
const POLICIES: usize = 500;
/// Requests at one time while the cluster is filled.
const AT_ONCE: usize = 32;
/// Longer than a watch lasts, so that each is begun anew once.
pub const CALM: Duration = Duration::from_secs(330);
const CHURN: Duration = Duration::from_secs(30);
const CHANGES_A_SECOND: u32 = 200;
/// Nodes for which one agent's cost is worked out.
const NODES: f64 = 5_000.0;

/// Fills a real API server and watches an agent follow it, also while nothing happens for a while.
///
/// # Errors
/// A server or the agent does not start.
pub async fn measure(report: &mut Report, calm: Option<Duration>) -> Result<()> {
    let server = Server::start_audited("agent").await?;
    let admin = server.client(User::Admin).await?;
    create(&admin, &reader_binding()).await?;
    create(&admin, &reader()).await?;
    fill(&admin).await?;
    let bytes = Arc::new(AtomicU64::new(0));
    let proxy = TcpListener::bind("127.0.0.1:0").await?;
    let port = proxy.local_addr()?.port();
    tokio::spawn(count(proxy, server.port(), bytes.clone()));
    let kubeconfig = server.kubeconfig_through(port, User::Named("agent"))?;
    let arguments = ["--watch", "cluster"];
    let agent = tokio::task::spawn_blocking(move || {
        Agent::start_with_cluster("node-7", &kubeconfig, &arguments)
    })
    .await??;
    let agent = Arc::new(agent);
    let known = agent.clone();
    let counts = [
        ("pods", PODS),
        ("services", SERVICES + 1),
        ("networkpolicies", POLICIES),
    ];
    tokio::task::spawn_blocking(move || wait_known(&known, &counts)).await??;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mib = |field| {
        Ok::<_, anyhow::Error>(kernel::status_bytes(agent.pid(), field)? as f64 / 1048576.0)
    };
    let name = "10,000 pods, 2,000 Services, 500 policies";
    report.figure(
        format!("{name}: RSS"),
        mib("VmRSS")?,
        "MiB",
        Must::AtMost(30.0),
    );
    report.figure(
        format!("{name}: RSS at most"),
        mib("VmHWM")?,
        "MiB",
        Must::Shown,
    );
    let so_far =
        || Ok::<_, anyhow::Error>((server.audited()?.len(), bytes.load(Ordering::Relaxed)));
    let (requests, transferred) = so_far()?;
    report.count("start: requests of one agent", requests as u64, Must::Shown);
    report.figure(
        "start: bytes of one agent",
        transferred as f64 / 1e6,
        "MB",
        Must::Shown,
    );
    report.figure(
        "start: bytes of 5,000 agents, worked out",
        transferred as f64 * NODES / 1e9,
        "GB",
        Must::Shown,
    );

    let percent = |spent: Duration, of: Duration| spent.as_secs_f64() / of.as_secs_f64() * 100.0;
    if let Some(calm) = calm {
        let (cpu, before) = (kernel::cpu_time(agent.pid())?, so_far()?);
        tokio::time::sleep(calm).await;
        let (spent, after) = (kernel::cpu_time(agent.pid())? - cpu, so_far()?);
        let hour = 3_600.0 / calm.as_secs_f64();
        report.figure("calm: CPU", percent(spent, calm), "%", Must::Shown);
        let requests = (after.0 - before.0) as f64 * hour;
        report.figure(
            "a calm hour: requests of one agent",
            requests,
            "",
            Must::Shown,
        );
        let transferred = (after.1 - before.1) as f64 * hour / 1e6;
        report.figure(
            "a calm hour: bytes of one agent",
            transferred,
            "MB",
            Must::Shown,
        );
        report.figure(
            "calm: requests of 5,000 agents, worked out",
            requests * NODES / 3_600.0,
            "/s",
            Must::Shown,
        );
    }

    let (cpu, before) = (kernel::cpu_time(agent.pid())?, so_far()?);
    let started = Instant::now();
    let changes = churn(&admin).await?;
    let took = started.elapsed();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (spent, after) = (kernel::cpu_time(agent.pid())? - cpu, so_far()?);
    report.figure(
        "churn: pod changes",
        f64::from(changes) / took.as_secs_f64(),
        "/s",
        Must::Shown,
    );
    report.figure("churn: CPU", percent(spent, took), "%", Must::Below(2.0));
    let a_change = (after.1 - before.1) as f64 / f64::from(changes);
    report.figure(
        "churn: bytes a change and agent",
        a_change / 1e3,
        "kB",
        Must::Shown,
    );
    report.figure(
        "a busy hour, 10 changes a second: bytes of one agent, worked out",
        a_change * 36_000.0 / 1e6,
        "MB",
        Must::Shown,
    );
    drop(agent);
    Ok(())
}

fn reader() -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "agent"},
        "rules": [{"apiGroups": ["", "discovery.k8s.io", "networking.k8s.io"], "verbs": ["list", "watch"],
            "resources": ["namespaces", "nodes", "pods", "services", "endpointslices", "networkpolicies"]}],
    })
}

fn reader_binding() -> Value {
    let group = "rbac.authorization.k8s.io";
    json!({
        "apiVersion": format!("{group}/v1"), "kind": "ClusterRoleBinding", "metadata": {"name": "agent"},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "agent"},
        "subjects": [{"apiGroup": group, "kind": "User", "name": "agent"}],
    })
}

async fn fill(admin: &Client) -> Result<()> {
    let namespaces: Vec<Value> = (0..200).map(objects::namespace).collect();
    for namespace in namespaces {
        create(admin, &without_version(namespace)).await?;
    }
    let pods = (0..PODS).map(objects::pod);
    let services = (0..SERVICES).map(objects::service);
    let policies = (0..POLICIES).map(objects::policy);
    let all = services.chain(policies).chain(pods).map(without_version);
    stream::iter(all)
        .map(|object| async move { create(admin, &object).await.map(drop) })
        .buffer_unordered(AT_ONCE)
        .try_collect::<Vec<()>>()
        .await
        .context("fill the API server")?;
    Ok(())
}

fn without_version(mut object: Value) -> Value {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("resourceVersion");
    }
    object
}

/// Changes the status of one pod after the other, as kubelets do.
async fn churn(admin: &Client) -> Result<u32> {
    let started = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_secs(1) / CHANGES_A_SECOND);
    let mut tasks = tokio::task::JoinSet::new();
    // A server that is slow makes the changes fewer, not the connections more.
    let room = Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    let mut changes = 0;
    while started.elapsed() < CHURN {
        tick.tick().await;
        let place = room.clone().acquire_owned().await?;
        let pod = objects::pod(changes as usize % PODS);
        let pods = api(admin, &pod)?;
        tasks.spawn(async move {
            let _place = place;
            let conditions =
                json!([{"type": "Ready", "status": "False", "reason": format!("round {changes}")}]);
            let patch = Patch::Merge(json!({"status": {"conditions": conditions}}));
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            pods.patch_status(name, &PatchParams::default(), &patch)
                .await
                .map(drop)
        });
        changes += 1;
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(changes)
}

/// Carries connections to the API server, and counts their bytes both ways.
async fn count(listener: TcpListener, port: u16, bytes: Arc<AtomicU64>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    while let Ok((near, _)) = listener.accept().await {
        let Ok(far) = TcpStream::connect(("127.0.0.1", port)).await else {
            continue;
        };
        let (near, far) = (near.into_split(), far.into_split());
        for (mut from, mut to) in [(near.0, far.1), (far.0, near.1)] {
            let bytes = bytes.clone();
            tokio::spawn(async move {
                let mut buffer = vec![0; 64 << 10];
                while let Ok(read @ 1..) = from.read(&mut buffer).await {
                    bytes.fetch_add(read as u64, Ordering::Relaxed);
                    if to.write_all(&buffer[..read]).await.is_err() {
                        break;
                    }
                }
            });
        }
    }
}
