//! Two nodes whose pods are network namespaces, their objects in a real API server, their Services by a
//! real kube-proxy, and an agent that finds everything out by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kube::Client;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use whydrop::event::{EndpointKind, Line};
use whydrop_kube_tests::objects::{api, create, create_all, delete};
use whydrop_kube_tests::proxy::{Mode, Proxy};
use whydrop_kube_tests::server::{Server, User};
use whydrop_tests::agent::{Agent, POLL};
use whydrop_tests::counters;
use whydrop_tests::expect::{Row, expect};
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::scene::{TCP_PORT, UDP_PORT};
use whydrop_tests::traffic::{self, Connect};
use whydrop_tests::{objects, on_both_families};

on_both_families!(by_nftables, by_iptables);

/// A watch that failed is tried again at most 30 s later.
const DEADLINE: Duration = Duration::from_secs(60);

/// Waits until something is so.
fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        ensure!(Instant::now() < deadline, "waited too long: {what}");
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// A lab whose router is a node with an API server.
struct Cluster {
    agent: Agent,
    _proxy: Proxy,
    server: Server,
    client: Client,
    lab: Lab,
    family: Family,
}

/// The lab's objects: the server's pod is another node's, and the client's is a Deployment's.
fn cluster_objects(lab: &Lab) -> Value {
    let mut list = objects::list(lab);
    let items = list["items"].as_array_mut().expect("items");
    items.push(json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-b"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.2"}]},
    }));
    for item in items {
        let name = item["metadata"]["name"].clone();
        if item["kind"] == "Service" {
            item["spec"]["ipFamilyPolicy"] = "RequireDualStack".into();
        }
        if item["kind"] != "Pod" {
            continue;
        }
        // As a kubelet writes it before the pod has its addresses.
        item["status"]["startTime"] = "2026-01-01T00:00:00Z".into();
        if name == "server" {
            item["spec"]["nodeName"] = "node-b".into();
        }
        if name == "client" {
            item["metadata"]["labels"]["pod-template-hash"] = "7d9f8c6b5".into();
            item["metadata"]["ownerReferences"] = json!([{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "shop-7d9f8c6b5",
                "uid": "b3f4", "controller": true,
            }]);
        }
    }
    list
}

fn list_of<'a>(list: &'a Value, kind: &str, name: &str) -> &'a Value {
    let mut items = list["items"].as_array().into_iter().flatten();
    items
        .find(|item| item["kind"] == kind && item["metadata"]["name"] == name)
        .expect("an object of the lab")
}

impl Cluster {
    /// In the router's namespace.
    async fn start(lab: Lab, family: Family, mode: Mode, arguments: &[&str]) -> Result<Self> {
        let [high, low] = lab.id().to_be_bytes();
        // Of the lab's own ranges, the parts with its Service.
        let ranges = [
            format!("10.{}.{low}.112/28", 64 + high),
            format!("fd77:d0b:{:x}:7::/108", lab.id()),
        ];
        let server = Server::start_with(&ranges.join(",")).await?;
        let client = server.client(User::Admin).await?;
        create_all(&client, &cluster_objects(&lab)).await?;
        let kubeconfig = server.kubeconfig(User::Admin)?;
        let service = lab.address(Place::Service, family).to_string();
        let proxy = Proxy::start(&lab, &kubeconfig, mode, &service)?;
        let netns = lab.netns(Host::Router);
        let agent = Agent::start_in_cluster(&netns, &lab.node(), &kubeconfig, arguments)?;
        Ok(Self {
            agent,
            _proxy: proxy,
            server,
            client,
            lab,
            family,
        })
    }

    /// Waits until the agent knows so many objects of a kind.
    fn knows(&self, kind: &str, count: usize) -> Result<()> {
        wait_for(&format!("{count} {kind} are known"), || {
            let metrics = self.agent.metrics().unwrap_or_default();
            metrics.iter().any(|sample| {
                sample.name == "whydrop_index_objects"
                    && sample.label("kind") == kind
                    && sample.value == count as f64
            })
        })
        .with_context(|| self.agent.log())
    }

    /// Waits until a source works.
    fn lists(&self, source: &str) -> Result<()> {
        wait_for(&format!("{source} is up"), || {
            let metrics = self.agent.metrics().unwrap_or_default();
            metrics.iter().any(|sample| {
                sample.name == "whydrop_source_up"
                    && sample.label("source") == source
                    && sample.value == 1.0
            })
        })
    }

    fn connect(&self, to: Place) -> Connect {
        let to = self.lab.socket(to, self.family, TCP_PORT);
        self.lab.within(Host::Client, || traffic::connect(to))
    }

    fn datagrams(&self, packets: u64) -> Result<()> {
        let to = self.lab.socket(Place::Service, self.family, UDP_PORT);
        let send = || traffic::udp_burst(to, packets, 3, b"datagram");
        let sent = self.lab.within(Host::Client, send)?;
        ensure!(sent.accepted == packets, "sent {sent:?}");
        Ok(())
    }

    fn counted(&self, name: &str) -> Result<u64> {
        counters::nft(&self.lab, Host::Router, name)
    }
}

/// Drops what the client sends to the server's own address, which is where Services lead.
fn drops(lab: &Lab, family: Family) -> Result<()> {
    let (ip, server) = (family.nft(), lab.address(Place::Of(Host::Server), family));
    lab.nft(
        Host::Router,
        &format!(
            "table inet lab {{
               counter datagrams {{ }}
               counter syns {{ }}
               chain c {{ type filter hook forward priority 0;
                 {ip} daddr {server} udp dport {UDP_PORT} counter name datagrams drop
                 {ip} daddr {server} tcp dport {TCP_PORT} counter name syns drop
               }}
             }}"
        ),
    )
}

fn by_nftables(family: Family) -> Result<()> {
    in_cluster(family, Mode::Nftables)
}

fn by_iptables(family: Family) -> Result<()> {
    in_cluster(family, Mode::Iptables)
}

fn in_cluster(family: Family, mode: Mode) -> Result<()> {
    let lab = Lab::new()?;
    drops(&lab, family)?;
    let node = lab.netns(Host::Router);
    // Sockets and processes of this thread are the node's.
    whydrop_tests::lab::enter(&node)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut cluster = Cluster::start(lab, family, mode, &["--watch", "cluster"]).await?;
        names_and_services(&mut cluster).await?;
        an_address_that_comes_late(&cluster).await?;
        // What kube-proxy does has no part in it.
        match mode {
            Mode::Nftables => while_pods_change(&cluster).await,
            Mode::Iptables => Ok(()),
        }
    })
}

async fn names_and_services(cluster: &mut Cluster) -> Result<()> {
    let list = cluster_objects(&cluster.lab);
    cluster.knows("pods", objects::PODS.len())?;
    cluster.knows("endpointslices", 2)?;
    // Each kind has a watch of its own.
    cluster.lists("cluster-services")?;
    cluster.lists("cluster-nodes")?;
    let service = format!("{}/server", cluster.lab.namespace());
    for _ in 0..3 {
        ensure!(cluster.connect(Place::Service) == Connect::Silent);
    }
    // One SYN each, and another one where this thread was late to give up.
    let to_service = cluster.counted("syns")?;
    ensure!(cluster.connect(Place::Of(Host::Server)) == Connect::Silent);
    let direct = cluster.counted("syns")? - to_service;
    cluster.datagrams(30)?;
    let datagrams = cluster.counted("datagrams")?;
    ensure!(
        to_service >= 3 && direct >= 1 && datagrams == 30,
        "nft counted {to_service}, {direct} and {datagrams}"
    );
    let mut rows = vec![
        Row::dropped("client", "server", to_service)
            .syn()
            .service(&service),
        Row::dropped("client", "server", direct).syn(),
        Row::dropped("client", "server", 30)
            .protocol("UDP")
            .service(&service),
    ];
    expect(&cluster.lab, &cluster.agent, &rows)?;
    let metrics = cluster.agent.metrics()?;
    // The agent sees the drops of other labs as well.
    let syns = metrics.iter().find(|sample| {
        sample.name == "whydrop_silent_drops_total"
            && sample.label("kind") == "syn"
            && sample.label("source_namespace") == cluster.lab.namespace()
            && sample.label("source_pod") == "client"
    });
    let workload = syns.map(|sample| sample.label("source_workload"));
    ensure!(
        workload == Some("shop"),
        "the Deployment through its ReplicaSet: {workload:?}"
    );
    // Without the API server everything goes on, with the names of before.
    cluster.server.kill_api();
    wait_for("the outage is seen", || {
        let metrics = cluster.agent.metrics().unwrap_or_default();
        let is_down = |s: &whydrop_tests::agent::Sample| {
            s.name == "whydrop_source_up" && s.label("source") == "cluster" && s.value == 0.0
        };
        metrics.iter().any(is_down)
    })?;
    cluster.datagrams(6)?;
    rows[2] = Row::dropped("client", "server", 36)
        .protocol("UDP")
        .service(&service);
    expect(&cluster.lab, &cluster.agent, &rows)?;
    cluster.server.start_api().await?;
    // The address changes hands, from one second to the next.
    let old = list_of(&list, "Pod", "server").clone();
    delete(&cluster.client, &old).await?;
    let mut new = old;
    new["metadata"]["name"] = "server-new".into();
    new["status"]["startTime"] = jiff::Timestamp::now().to_string().into();
    create(&cluster.client, &new).await?;
    // Named as soon as the watch has told: each of these is one pod's or the other's, and none nobody's.
    let deadline = Instant::now() + DEADLINE;
    let mut sent = 36;
    loop {
        cluster.datagrams(3)?;
        sent += 3;
        // Those whose name is awaited come a little later.
        let mut by_new = 0.0;
        wait_for("all that was sent to be one pod's or the other's", || {
            let metrics = cluster.agent.metrics().unwrap_or_default();
            let of = |pod: &str| -> f64 {
                let samples = metrics.iter().filter(|sample| {
                    sample.name == "whydrop_silent_drops_total"
                        && sample.label("destination_pod") == pod
                        && sample.label("protocol") == "UDP"
                        && sample.label("destination_service") == service
                });
                samples.map(|sample| sample.value).sum()
            };
            by_new = of("server-new");
            of("server") + by_new == f64::from(sent)
        })?;
        if by_new > 0.0 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "server-new gets no drop");
    }
}

/// The client's pod sends before the API server knows its address.
async fn an_address_that_comes_late(cluster: &Cluster) -> Result<()> {
    let list = cluster_objects(&cluster.lab);
    let mut pod = list_of(&list, "Pod", "client").clone();
    // A name is awaited for two seconds. Where the test itself was as slow as that, it says nothing.
    for _ in 0..5 {
        delete(&cluster.client, &pod).await?;
        if an_address_came_late(cluster, &mut pod).await? {
            return Ok(());
        }
    }
    anyhow::bail!("this machine is too slow to tell an address within a second")
}

/// Whether it came as late as the test wants.
async fn an_address_came_late(cluster: &Cluster, pod: &mut Value) -> Result<bool> {
    let list = cluster_objects(&cluster.lab);
    let status = list_of(&list, "Pod", "client")["status"].clone();
    pod["status"] = status;
    cluster.knows("pods", objects::PODS.len() - 1)?;
    pod["metadata"]["name"] = "late".into();
    // The API has whole seconds: it begins before what it sends.
    let started = jiff::Timestamp::now().as_second();
    pod["status"]["startTime"] = jiff::Timestamp::from_second(started)?.to_string().into();
    let status = pod["status"].clone();
    pod["status"] = json!({"phase": "Pending", "startTime": status["startTime"]});
    create(&cluster.client, pod).await?;
    cluster.knows("pods", objects::PODS.len())?;
    let late = || -> Result<f64> {
        let metrics = cluster.agent.metrics()?;
        let of_late = metrics
            .iter()
            .filter(|s| s.name == "whydrop_silent_drops_total" && s.label("source_pod") == "late");
        Ok(of_late.map(|s| s.value).sum())
    };
    let (counted, before) = (late()?, cluster.agent.lines().len());
    let sent = Instant::now();
    cluster.datagrams(3)?;
    let patch = Patch::Merge(json!({ "status": status }));
    let pods = api(&cluster.client, pod)?;
    pods.patch_status("late", &PatchParams::default(), &patch)
        .await?;
    if sent.elapsed() > Duration::from_secs(1) {
        // What is counted late shall not be counted of the next one.
        std::thread::sleep(Duration::from_secs(5));
        return Ok(false);
    }
    wait_for("the drops have the late pod's name", || {
        let lines = cluster.agent.lines();
        let named = lines[before..].iter().filter(|line| match line {
            Line::Event(event) => event.source.pod.as_deref() == Some("late"),
            Line::Lost(_) => false,
        });
        named.count() >= 3
    })
    .with_context(|| cluster.agent.log())?;
    let nameless = cluster.agent.lines()[before..]
        .iter()
        .any(|line| match line {
            Line::Event(event) => event.source.kind == Some(EndpointKind::Unknown),
            Line::Lost(_) => false,
        });
    ensure!(!nameless, "a drop was told before its name was known");
    let counted = late()? - counted;
    ensure!(
        counted == 3.0,
        "the counters have {counted} of the late pod"
    );
    Ok(true)
}

/// Pods of another node that change all the time, how often in a second, and the least of it all.
const CHANGING: usize = 20;
const CHANGES_A_SECOND: u32 = 200;
const CHANGES: u32 = 250;

/// Drops while 200 times a second a pod has another address: each has its right name.
async fn while_pods_change(cluster: &Cluster) -> Result<()> {
    let list = cluster_objects(&cluster.lab);
    let mut pod = list_of(&list, "Pod", "server").clone();
    for n in 0..CHANGING {
        pod["metadata"]["name"] = format!("changing-{n}").into();
        pod["status"]["podIP"] = format!("198.18.0.{n}").into();
        pod["status"]["podIPs"] = json!([{"ip": format!("198.18.0.{n}")}]);
        create(&cluster.client, &pod).await?;
    }
    cluster.knows("pods", objects::PODS.len() + CHANGING)?;
    let config = cluster.server.config(User::Admin).await?;
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let done = Arc::new(AtomicU32::new(0));
    let changed = done.clone();
    // What is sent below holds up this thread.
    let changes = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        // A client is of the runtime in which it is made.
        runtime.block_on(async {
            change_pods(Client::try_from(config)?, pod, &changed, stopped).await
        })
    });
    let (before, started, mut sent) = (cluster.agent.lines().len(), Instant::now(), 0);
    let counted = |metrics: &[whydrop_tests::agent::Sample]| -> f64 {
        let drops = metrics.iter().filter(|sample| {
            sample.name == "whydrop_silent_drops_total"
                && sample.label("protocol") == "UDP"
                && sample.label("source_pod") == "late"
                && sample.label("destination_pod") == "server-new"
                && sample.label("source_namespace") == cluster.lab.namespace()
        });
        drops.map(|sample| sample.value).sum()
    };
    let known = counted(&cluster.agent.metrics()?);
    while started.elapsed() < Duration::from_secs(5) || done.load(Ordering::Relaxed) < CHANGES {
        let changes = done.load(Ordering::Relaxed);
        ensure!(started.elapsed() < DEADLINE, "{changes} changes");
        cluster.datagrams(10)?;
        sent += 10;
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(stop);
    changes
        .join()
        .map_err(|_| anyhow::anyhow!("the changes panicked"))??;
    whydrop_tests::expect::barrier(&cluster.lab, &cluster.agent)?;
    let named = counted(&cluster.agent.metrics()?) - known;
    ensure!(
        named == f64::from(sent),
        "of {sent} drops {named} are named right"
    );
    // Not the marker's of the barrier.
    let client = cluster.lab.address(Place::Of(Host::Client), cluster.family);
    for line in &cluster.agent.lines()[before..] {
        if let Line::Event(event) = line
            && event.source.ip == Some(client)
        {
            let names = (
                event.source.pod.as_deref(),
                event.destination.pod.as_deref(),
            );
            ensure!(names == (Some("late"), Some("server-new")), "{event:?}");
        }
    }
    Ok(())
}

/// Gives one pod after the other another address, until it is told to stop, and counts.
async fn change_pods(
    client: Client,
    mut pod: Value,
    done: &AtomicU32,
    mut stopped: tokio::sync::oneshot::Receiver<()>,
) -> Result<()> {
    let mut tick = tokio::time::interval(Duration::from_secs(1) / CHANGES_A_SECOND);
    let (mut begun, mut tasks) = (0, tokio::task::JoinSet::new());
    loop {
        tokio::select! {
            _ = tick.tick(), if tasks.len() < 16 => {}
            Some(result) = tasks.join_next() => {
                result??;
                done.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            _ = &mut stopped => break,
        }
        begun += 1;
        let n = begun as usize % CHANGING;
        let name = format!("changing-{n}");
        pod["metadata"]["name"] = name.as_str().into();
        let ip = format!("198.18.{}.{n}", begun / 256 % 256);
        let status = json!({"podIP": ip, "podIPs": [{"ip": ip}]});
        let pods = api(&client, &pod)?;
        tasks.spawn(async move {
            let patch = Patch::Merge(json!({ "status": status }));
            let params = PatchParams::default();
            pods.patch_status(&name, &params, &patch).await.map(drop)
        });
    }
    Ok(())
}
