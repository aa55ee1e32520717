//! The real Prometheus, by the configuration that `deploy/` has.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use whydrop_kube_tests::cluster::{Cluster, until};
use whydrop_kube_tests::server::User;
use whydrop_tests::free_port::free_port;
use whydrop_tests::scrape;

use crate::workloads::Pods;
use whydrop_kube_tests::made;

/// Whom the API server takes Prometheus for.
const USER: &str = "prometheus";
/// Prometheus' answers come at once.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A running Prometheus, on the node's network. Dropping it ends it.
struct Prometheus {
    child: Child,
    at: SocketAddr,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The shipped configuration, of a Prometheus that has a kubeconfig, because it runs in no pod, and little
/// time.
fn configuration(cluster: &Cluster) -> Result<String> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/prometheus");
    let mut text = fs::read_to_string(deploy.join("prometheus.yaml"))?;
    let rules = deploy.join("rules.yaml").canonicalize()?;
    let kubeconfig = format!(
        "- role: pod\n        kubeconfig_file: {}",
        cluster.server.kubeconfig(User::Named(USER))?.display()
    );
    let changes = [
        ("- role: pod", kubeconfig.as_str()),
        (
            "scrape_interval: 30s",
            "scrape_interval: 2s\n  evaluation_interval: 2s",
        ),
        ("- rules.yaml", &format!("- {}", rules.display())),
    ];
    for (shipped, here) in changes {
        ensure!(
            text.contains(shipped),
            "the configuration has no {shipped:?}"
        );
        text = text.replace(shipped, here);
    }
    Ok(text)
}

/// What the configuration says that Prometheus needs, and no more.
fn may_list_pods(cluster: &Cluster) -> Result<()> {
    let user = format!("--user={USER}");
    for grant in [
        &["role", USER, "--verb=get,list,watch", "--resource=pods"][..],
        &["rolebinding", USER, "--role", USER, &user],
    ] {
        let create = [&["create", "--namespace=whydrop"], grant].concat();
        cluster.kubectl(&create)?;
    }
    Ok(())
}

impl Prometheus {
    fn start(cluster: &Cluster) -> Result<Self> {
        let folder = cluster.server.folder().join("prometheus");
        fs::create_dir(&folder)?;
        let config = folder.join("prometheus.yaml");
        fs::write(&config, configuration(cluster)?)?;
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let log = folder.join("log");
        let output = File::create(&log)?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(made("WHYDROP_PROMETHEUS")?)
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.join("data").display()
            ))
            .arg(format!("--web.listen-address={at}"))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("start Prometheus")?;
        let prometheus = Self { child, at };
        until("Prometheus answers", || {
            prometheus.query("vector(1)").map(drop)
        })
        .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
        Ok(prometheus)
    }

    /// What an instant query finds, each with its labels.
    fn query(&self, query: &str) -> Result<Vec<Value>> {
        let escaped: String = form_urlencoded::byte_serialize(query.as_bytes()).collect();
        let stream = TcpStream::connect_timeout(&self.at, TIMEOUT)?;
        let (status, body) = scrape::get(stream, &format!("/api/v1/query?query={escaped}"))?;
        ensure!(status == 200, "Prometheus answers {status}: {body}");
        let answer: Value = serde_json::from_str(&body)?;
        let result = answer["data"]["result"].as_array().cloned();
        result.with_context(|| format!("an answer: {body}"))
    }

    /// Waits until a query has one result of a value.
    fn until(&self, query: &str, value: f64) -> Result<Value> {
        let mut found = Value::Null;
        until(&format!("Prometheus has {value} for {query}"), || {
            let result = self.query(query)?;
            let text = result
                .first()
                .and_then(|series| series["value"][1].as_str());
            let number: Option<f64> = text.and_then(|text| text.parse().ok());
            ensure!(result.len() == 1 && number == Some(value), "{result:?}");
            found = result[0]["metric"].clone();
            Ok(())
        })?;
        Ok(found)
    }
}

/// Prometheus' own judgement of what the agent serves.
fn is_clean(cluster: &Cluster) -> Result<()> {
    let mut check = Command::new(made("WHYDROP_PROMTOOL")?)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start promtool")?;
    let text = cluster.scrape("text/plain")?;
    let mut stdin = check.stdin.take().context("promtool's input")?;
    stdin.write_all(text.as_bytes())?;
    drop(stdin);
    let output = check.wait_with_output()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    ensure!(
        output.status.success() && said.is_empty(),
        "promtool check metrics:\n{said}"
    );
    Ok(())
}

/// It finds the agent, has its counters and their names, evaluates the rules, and forgets a pod that is gone.
///
/// # Errors
/// It does not.
pub fn scrapes(pods: &Pods<'_>) -> Result<()> {
    let cluster = pods.cluster;
    is_clean(cluster)?;
    may_list_pods(cluster)?;
    let prometheus = Prometheus::start(cluster)?;
    let target = prometheus.until("up{job=\"whydrop\"}", 1.0)?;
    ensure!(
        target["node"] == cluster.lab.node(),
        "the target's labels: {target}"
    );
    let selected = |pod: &str| format!("whydrop_silent_drops_total{{source_pod=\"{pod}\"}}");
    let batch = selected(pods.job_pod());
    let metrics = cluster.metrics()?;
    let is_batch = |s: &&scrape::Sample| {
        s.name == "whydrop_silent_drops_total" && s.label("source_pod") == pods.job_pod()
    };
    let count: f64 = metrics.iter().filter(is_batch).map(|s| s.value).sum();
    let labels = prometheus.until(&batch, count)?;
    let names = [
        ("source_namespace", "shop"),
        ("source_workload", "batch"),
        ("destination_workload", "db"),
        ("destination_port", "7002"),
    ];
    for (label, value) in names {
        ensure!(labels[label] == value, "{label} is not {value}: {labels}");
    }
    // A recording rule, on what was scraped.
    prometheus.until("count(node:whydrop_conntrack_entries:ratio)", 1.0)?;
    pods.delete_job()?;
    // Only those, which one question tells: of a scrape that failed there are none at all.
    let others = "count(whydrop_silent_drops_total{source_workload=\"web\"})";
    let rest = format!("{others} unless on() {batch}");
    until("the series of the pod that is gone are gone", || {
        let rest = prometheus.query(&rest)?;
        ensure!(!rest.is_empty(), "they are there, or no others are");
        Ok(())
    })
}
