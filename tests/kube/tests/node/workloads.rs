//! Real pods that lose packets to rules of the node, and what the agent makes of it.

use std::ops::RangeInclusive;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use whydrop::event::Line;
use whydrop_kube_tests::cluster::{Cluster, until};
use whydrop_kube_tests::node::BUSYBOX;
use whydrop_kube_tests::objects::{create, namespace};
use whydrop_tests::agent::Sample;
use whydrop_tests::counters;
use whydrop_tests::lab::{Family, Host, Place};

const NAMESPACE: &str = "shop";
/// Of the Service `db`.
const SERVICE_PORT: u16 = 7000;
/// What the Service leads to; dropped by nft on its way through the node.
const NFT_PORT: u16 = 7001;
/// Dropped by iptables.
const IPTABLES_PORT: u16 = 7002;
/// Dropped by nft on its way out of the node itself.
const OUTPUT_PORT: u16 = 7003;
/// Dropped by nft, and sent to from outside the cluster. Below those that the kernel chooses from.
pub const OUTSIDE_PORTS: RangeInclusive<u16> = 20_000..=29_999;
/// Connects of each sender.
const CONNECTS: usize = 5;

/// The pods, running.
pub struct Pods<'a> {
    /// Where they run.
    pub cluster: &'a Cluster,
    /// The Deployment's pod.
    web: String,
    /// The Job's pod.
    batch: String,
    /// The address of the StatefulSet's pod.
    pub db: String,
    /// The address of its Service.
    service: String,
}

/// A pair, as metrics and events must name it.
struct Pair<'a> {
    /// For a message.
    name: &'a str,
    /// The port that only this pair uses.
    port: u16,
    /// Labels, among others.
    labels: Vec<(&'a str, &'a str)>,
    /// Fields of an event's two ends, among others.
    ends: [Value; 2],
}

fn pod_spec(command: &[&str], host_network: bool) -> Value {
    json!({
        "hostNetwork": host_network, "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "main", "image": BUSYBOX, "command": command}],
    })
}

fn workload(kind: &str, name: &str, rest: &Value, pod: Value) -> Value {
    let version = match kind {
        "Job" => "batch/v1",
        _ => "apps/v1",
    };
    let mut spec = rest.clone();
    spec["template"] = json!({"metadata": {"labels": {"app": name}}, "spec": pod});
    if kind != "Job" {
        spec["selector"] = json!({"matchLabels": {"app": name}});
    }
    json!({
        "apiVersion": version, "kind": kind,
        "metadata": {"namespace": NAMESPACE, "name": name}, "spec": spec,
    })
}

/// Connects that nobody answers, all at once; each gives up after some seconds.
fn connects(to: &str, port: u16, seconds: u8) -> String {
    let numbers: Vec<_> = (0..CONNECTS).map(|n| n.to_string()).collect();
    format!(
        "for i in {}; do busybox nc -w {seconds} {to} {port} & done; wait",
        numbers.join(" ")
    )
}

impl<'a> Pods<'a> {
    /// Makes the rules and the workloads, and waits until they run.
    ///
    /// # Errors
    /// They do not.
    pub async fn start(cluster: &'a Cluster) -> Result<Self> {
        cluster.lab.nft(
            Host::Router,
            &format!(
                "table inet lab {{
                   counter forwarded {{ }}
                   counter sent {{ }}
                   counter outside {{ }}
                   chain f {{ type filter hook forward priority 0;
                     tcp dport {NFT_PORT} counter name forwarded drop
                     udp dport {}-{} counter name outside drop
                   }}
                   chain o {{ type filter hook output priority 0;
                     tcp dport {OUTPUT_PORT} counter name sent drop
                   }}
                 }}",
                OUTSIDE_PORTS.start(),
                OUTSIDE_PORTS.end(),
            ),
        )?;
        let rule = format!("-A FORWARD -p tcp --dport {IPTABLES_PORT} -j DROP");
        cluster
            .lab
            .run(Host::Router, &format!("iptables-legacy -w {rule}"))?;

        let client = &cluster.client;
        create(client, &namespace(NAMESPACE)).await?;
        let idle = ["busybox", "sleep", "100000"];
        let one = json!({"replicas": 1});
        create(
            client,
            &workload("Deployment", "web", &one, pod_spec(&idle, false)),
        )
        .await?;
        let one = json!({"replicas": 1, "serviceName": "db"});
        create(
            client,
            &workload("StatefulSet", "db", &one, pod_spec(&idle, false)),
        )
        .await?;
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": NAMESPACE, "name": "db"},
            "spec": {
                "selector": {"app": "db"},
                "ports": [{"port": SERVICE_PORT, "targetPort": NFT_PORT, "protocol": "TCP"}],
            },
        });
        let service = create(client, &service).await?["spec"]["clusterIP"].clone();
        // Ends, and is started again, when a file is there.
        // A little later: who tells it is a process of the container too.
        let until_told = "until [ -e /end ]; do busybox sleep 0.1; done; busybox sleep 1";
        let host = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": NAMESPACE, "name": "host"},
            "spec": pod_spec(&["busybox", "sh", "-c", until_told], true),
        });
        create(client, &host).await?;
        for what in ["deployment/web", "statefulset/db"] {
            let status = ["rollout", "status", what, "--timeout=120s"];
            cluster.kubectl(&[&["--namespace", NAMESPACE], &status[..]].concat())?;
        }
        let db = cluster.get(NAMESPACE, "pod/db-0")?["status"]["podIP"].clone();
        let db = db.as_str().context("db-0 has no address")?.to_owned();
        // Its first request is seconds after its start; what is dropped before has no names.
        until("the agent knows the pods", || {
            let metrics = cluster.metrics()?;
            let known = metrics.iter().find(|sample| {
                sample.name == "whydrop_index_objects" && sample.label("kind") == "pods"
            });
            let known = known.map_or(0.0, |sample| sample.value);
            ensure!(known >= 4.0, "it knows {known}");
            Ok(())
        })?;
        // A Job's pod does its work and ends. Not before its kubelet has told its address: what is dropped long
        // before that has no name.
        let work = connects(&db, IPTABLES_PORT, 1);
        let work = format!("until [ -e /go ]; do busybox sleep 0.1; done; {work}; busybox sleep 2");
        let job = pod_spec(&["busybox", "sh", "-c", &work], false);
        let once = json!({"backoffLimit": 0});
        let mut job = workload("Job", "batch", &once, job);
        job["spec"]["template"]["spec"]["restartPolicy"] = "Never".into();
        create(client, &job).await?;
        let mut pods = Self {
            cluster,
            web: String::new(),
            batch: String::new(),
            db,
            service: service.as_str().context("a ClusterIP")?.to_owned(),
        };
        pods.is_in("pod/host", "condition=Ready")?;
        pods.web = pods.pod_of("web")?;
        until("the Job has its pod, and that its address", || {
            pods.batch = pods.pod_of("batch")?;
            let pod = cluster.get(NAMESPACE, &format!("pod/{}", pods.batch))?;
            ensure!(pod["status"]["podIP"].is_string(), "{}", pod["status"]);
            pods.shell(&pods.batch, "busybox touch /go").map(drop)
        })?;
        Ok(pods)
    }

    fn is_in(&self, what: &str, condition: &str) -> Result<()> {
        let condition = format!("--for={condition}");
        let wait = [
            "--namespace",
            NAMESPACE,
            "wait",
            what,
            &condition,
            "--timeout=120s",
        ];
        self.cluster.kubectl(&wait).map(drop)
    }

    /// The name of a workload's one pod.
    fn pod_of(&self, app: &str) -> Result<String> {
        let selector = format!("--selector=app={app}");
        let get = [
            "--namespace",
            NAMESPACE,
            "get",
            "pods",
            &selector,
            "--output=name",
        ];
        let names = self.cluster.kubectl(&get)?;
        let name = names.trim().strip_prefix("pod/").map(str::to_owned);
        name.filter(|name| !name.contains('\n'))
            .with_context(|| format!("one pod of {app}: {names:?}"))
    }

    fn counted(&self, name: &str) -> Result<u64> {
        counters::nft(&self.cluster.lab, Host::Router, name)
    }

    /// Every sender, what the rule counted of it, what the metrics and the events say.
    ///
    /// # Errors
    /// They differ, or a name is wrong.
    pub fn lose_packets(&self) -> Result<()> {
        let cluster = self.cluster;
        let service = &self.service;
        let leads_to = format!("{}:{NFT_PORT}", self.db);
        until("kube-proxy knows where the Service leads to", || {
            let rules = cluster.lab.run(Host::Router, "nft list ruleset")?;
            ensure!(rules.contains(&leads_to), "no {leads_to} in {rules}");
            Ok(())
        })?;
        self.shell(&self.web, &connects(service, SERVICE_PORT, 1))?;
        let forwarded = self.counted("forwarded")?;
        self.agrees(
            &self.pair("Deployment", "web", &self.web, NFT_PORT),
            forwarded,
        )?;
        self.is_in("job/batch", "condition=Complete")?;
        let tool = "iptables-legacy";
        let dropped = counters::iptables(&cluster.lab, Host::Router, tool, "FORWARD", "DROP")?;
        self.agrees(
            &self.pair("Job", "batch", &self.batch, IPTABLES_PORT),
            dropped,
        )?;
        self.a_host_network_pod_is_told_apart()
    }

    /// A pair of a pod of a workload, and the StatefulSet's.
    fn pair(&'a self, kind: &str, workload: &'a str, pod: &'a str, port: u16) -> Pair<'a> {
        let service = match port {
            NFT_PORT => "shop/db",
            _ => "",
        };
        let service_of_event = match port {
            NFT_PORT => {
                json!({"namespace": NAMESPACE, "name": "db", "ip": self.service, "port": SERVICE_PORT})
            }
            _ => Value::Null,
        };
        let node = self.cluster.lab.node();
        Pair {
            name: workload,
            port,
            labels: vec![
                ("source_kind", "pod"),
                ("source_namespace", NAMESPACE),
                ("source_pod", pod),
                ("source_workload", workload),
                ("source_node", ""),
                ("destination_kind", "pod"),
                ("destination_namespace", NAMESPACE),
                ("destination_pod", "db-0"),
                ("destination_workload", "db"),
                ("destination_node", ""),
                ("destination_service", service),
            ],
            ends: [
                json!({"kind": "pod", "namespace": NAMESPACE, "pod": pod, "node": node,
                       "workload": {"kind": kind, "name": workload}}),
                json!({"kind": "pod", "namespace": NAMESPACE, "pod": "db-0", "node": node,
                       "workload": {"kind": "StatefulSet", "name": "db"}, "service": service_of_event}),
            ],
        }
    }

    /// A packet of a pod on the host's network has the node's address, so its drops are the node's. Its
    /// socket's cgroup tells whose an attempt was, also after the container was started again.
    fn a_host_network_pod_is_told_apart(&self) -> Result<()> {
        let cluster = self.cluster;
        let outside = cluster.lab.address(Place::Of(Host::Client), Family::V4);
        let node = cluster.lab.node();
        let connect = || {
            // Longer than an attempt waits until it counts as unanswered.
            let script = connects(&outside.to_string(), OUTPUT_PORT, 5);
            self.shell("host", &script)
        };
        let pair = Pair {
            name: "host",
            port: OUTPUT_PORT,
            labels: vec![
                ("source_kind", "node"),
                ("source_node", &node),
                ("destination_kind", "external"),
            ],
            ends: [
                json!({"kind": "node", "node": node}),
                json!({"kind": "external"}),
            ],
        };
        connect()?;
        self.agrees(&pair, self.counted("sent")?)?;
        self.attempts_of_host(CONNECTS)?;
        // Another container, in a cgroup of its own, of the same pod.
        self.shell("host", "busybox touch /end")?;
        until("the container was started again", || {
            let pod = cluster.get(NAMESPACE, "pod/host")?;
            let container = &pod["status"]["containerStatuses"][0];
            let is_new = container["restartCount"] == 1 && container["ready"] == true;
            ensure!(is_new, "{container}");
            Ok(())
        })?;
        connect()?;
        self.agrees(&pair, self.counted("sent")?)?;
        self.attempts_of_host(2 * CONNECTS)
    }

    /// The attempts of the pod on the host's network, by its name.
    fn attempts_of_host(&self, count: usize) -> Result<()> {
        until("the attempts have the name of their pod", || {
            let metrics = self.cluster.metrics()?;
            let named = [
                ("source_kind", "node"),
                ("source_namespace", NAMESPACE),
                ("source_pod", "host"),
                ("cause", "dropped_here"),
            ];
            let port = OUTPUT_PORT.to_string();
            let samples = metrics.iter().filter(|s| {
                s.name == "whydrop_unanswered_total" && s.label("destination_port") == port
            });
            let samples: Vec<_> = samples.collect();
            let has_names = |s: &&&Sample| named.iter().all(|(l, v)| s.label(l) == *v);
            let sum: f64 = samples.iter().filter(has_names).map(|s| s.value).sum();
            ensure!(sum == count as f64, "{sum} of {count} in {samples:?}");
            Ok(())
        })
    }

    fn shell(&self, pod: &str, script: &str) -> Result<String> {
        let shell = ["busybox", "sh", "-c", script];
        self.cluster.exec(NAMESPACE, pod, &shell)
    }

    /// Metrics and events of a pair agree with the rule's own counter.
    fn agrees(&self, pair: &Pair<'_>, counted: u64) -> Result<()> {
        let Pair {
            name, port, labels, ..
        } = pair;
        ensure!(
            counted >= CONNECTS as u64,
            "the rule of {name} counted {counted}"
        );
        let port = port.to_string();
        until(&format!("{name} is counted to the packet"), || {
            let metrics = self.cluster.metrics()?;
            let samples = metrics
                .iter()
                .filter(|s| s.name == "whydrop_silent_drops_total");
            let of_port: Vec<_> = samples
                .filter(|s| s.label("destination_port") == port)
                .collect();
            let what = [
                ("protocol", "TCP"),
                ("kind", "syn"),
                ("reason", "NETFILTER_DROP"),
            ];
            let has_all = |s: &&&Sample| labels.iter().chain(&what).all(|(l, v)| s.label(l) == *v);
            let sum: f64 = of_port.iter().filter(has_all).map(|s| s.value).sum();
            let all: f64 = of_port.iter().map(|s| s.value).sum();
            let counted = counted as f64;
            ensure!(
                sum == counted && all == counted,
                "{sum} of {counted} in {of_port:?}"
            );
            Ok(())
        })?;
        // What a flow drops beyond some in a moment has one line a second.
        until(&format!("{name} has its lines"), || {
            let packets = self.packets_in_the_stream(pair)?;
            ensure!(packets == counted, "the stream has {packets} of {counted}");
            Ok(())
        })
    }

    /// How many packets the lines of a pair stand for, each of which has the right names. By the real way: the
    /// API server, the kubelet, the agent's own binary.
    fn packets_in_the_stream(&self, pair: &Pair<'_>) -> Result<u64> {
        let port = pair.port.to_string();
        let tail = ["whydrop", "tail", "--last=8192", "--output=json"];
        let selected = ["--outcome=dropped", "--port", &port];
        let command = [&tail[..], &selected].concat();
        let text = self
            .cluster
            .exec("whydrop", "daemonset/whydrop", &command)?;
        let mut packets = 0;
        for line in text.lines() {
            let Line::Event(event) = serde_json::from_str(line).with_context(|| line.to_owned())?
            else {
                anyhow::bail!("the stream lost something: {line}");
            };
            let event_json: Value = serde_json::from_str(line)?;
            let ends = [&event_json["source"], &event_json["destination"]];
            for (end, expected) in ends.iter().zip(&pair.ends) {
                let fields = expected.as_object().into_iter().flatten();
                let differs = fields.filter(|(field, value)| end[field] != **value);
                let differs: Vec<_> = differs.map(|(field, _)| field).collect();
                ensure!(
                    differs.is_empty(),
                    "{differs:?} is not as in {expected}: {line}"
                );
            }
            packets += event.packets;
        }
        Ok(packets)
    }

    /// Removes the Job, and its pod with it.
    ///
    /// # Errors
    /// kubectl fails.
    pub fn delete_job(&self) -> Result<()> {
        let delete = [
            "--namespace",
            NAMESPACE,
            "delete",
            "job/batch",
            "--cascade=foreground",
        ];
        self.cluster.kubectl(&delete).map(drop)
    }

    /// The name of the Job's pod.
    pub fn job_pod(&self) -> &str {
        &self.batch
    }
}
