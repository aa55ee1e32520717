//! What `deploy/` says, judged by the API server and by the kubelet.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use whydrop_kube_tests::cluster::{Cluster, until};

/// The source that works by kprobes, which not every kernel allows.
const NEEDS_KPROBES: &str = "conntrack_deaths";
/// How long the series of a pod stay after it, and those of an address without a name, which are compared.
pub const SERIES_TTL_SECONDS: u64 = 20;
/// The bits of linux/capability.h.
const CAPABILITIES: [(&str, u32); 5] = [
    ("NET_ADMIN", 12),
    ("SYS_PTRACE", 19),
    ("SYSLOG", 34),
    ("PERFMON", 38),
    ("BPF", 39),
];

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../deploy")
        .join(name)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

/// A field of a CRD's schema.
fn object(fields: Value) -> Value {
    json!({"type": "object", "properties": fields})
}

/// The two kinds of the Prometheus Operator, with those fields of monitoring.coreos.com/v1 that are used
/// here: any other is refused.
fn operator_kinds() -> Value {
    let text = || json!({"type": "string"});
    let texts = || json!({"type": "array", "items": text()});
    let map = || json!({"type": "object", "additionalProperties": text()});
    let list = |fields| json!({"type": "array", "items": object(fields)});
    let kind = |kind: &str, plural: &str, spec: Value| {
        json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.monitoring.coreos.com")},
            "spec": {
                "group": "monitoring.coreos.com", "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural},
                "versions": [{
                    "name": "v1", "served": true, "storage": true,
                    "schema": {"openAPIV3Schema": object(json!({ "spec": spec }))},
                }],
            },
        })
    };
    let monitor = object(json!({
        "selector": object(json!({"matchLabels": map()})),
        "jobLabel": text(),
        "podMetricsEndpoints": list(json!({
            "port": text(),
            "relabelings": list(json!({
                "sourceLabels": texts(), "targetLabel": text(), "action": text(), "regex": text(),
            })),
        })),
    }));
    let rules = object(json!({
        "groups": list(json!({
            "name": text(),
            "rules": list(json!({
                "record": text(), "alert": text(), "for": text(), "labels": map(), "annotations": map(),
                "expr": {"x-kubernetes-int-or-string": true},
            })),
        })),
    }));
    json!({"apiVersion": "v1", "kind": "List", "items": [
        kind("PodMonitor", "podmonitors", monitor),
        kind("PrometheusRule", "prometheusrules", rules),
    ]})
}

/// Strictly, and without applying them: the base and every overlay.
pub fn are_accepted(cluster: &Cluster) -> Result<()> {
    let file = cluster.server.folder().join("operator.json");
    fs::write(&file, operator_kinds().to_string())?;
    let namespace = deploy("base/namespace.yaml");
    for file in [&file, &namespace] {
        cluster.kubectl(&["apply", "--server-side", "--filename", text(file)])?;
    }
    let kinds = [
        "crd/podmonitors.monitoring.coreos.com",
        "crd/prometheusrules.monitoring.coreos.com",
    ];
    cluster.kubectl(&[&["wait", "--for=condition=Established"], &kinds[..]].concat())?;
    let mut folders = vec![deploy("base")];
    for overlay in fs::read_dir(deploy("overlays"))? {
        folders.push(overlay?.path());
    }
    ensure!(folders.len() > 1, "there are no overlays");
    for folder in folders {
        let dry_run = [
            "apply",
            "--server-side",
            "--dry-run=server",
            "--validate=strict",
        ];
        // A kind that has just been defined may not be served yet.
        until("the API server accepts the manifests", || {
            cluster
                .kubectl(&[&dry_run[..], &["--kustomize", text(&folder)]].concat())
                .map(drop)
        })?;
    }
    let folder = cluster.server.folder();
    // A field that nobody knows is refused: the validation is there.
    let bad = folder.join("bad.yaml");
    let daemonset = fs::read_to_string(deploy("base/daemonset.yaml"))?;
    fs::write(&bad, daemonset.replace("hostPID:", "hostPid:"))?;
    let refused = cluster.kubectl(&[
        "apply",
        "--server-side",
        "--dry-run=server",
        "--filename",
        text(&bad),
    ]);
    ensure!(
        refused.is_err_and(|error| error.to_string().contains("hostPid")),
        "a field with a typing error was accepted"
    );
    Ok(())
}

/// The base with one more argument, and waits until the pod is ready.
pub fn apply(cluster: &Cluster) -> Result<()> {
    let overlay = cluster.server.folder().join("overlay");
    fs::create_dir(&overlay)?;
    // kustomize takes no absolute path.
    let up = "../".repeat(overlay.components().count() - 1);
    let base = deploy("base").canonicalize()?;
    let argument = format!("--series-ttl={SERIES_TTL_SECONDS}s");
    let path = "/spec/template/spec/containers/0/args/-";
    let patch = json!([{"op": "add", "path": path, "value": argument}]);
    let kustomization = json!({
        "resources": [format!("{up}{}", text(&base).trim_start_matches('/'))],
        "patches": [{"target": {"kind": "DaemonSet"}, "patch": patch.to_string()}],
    });
    fs::write(
        overlay.join("kustomization.yaml"),
        kustomization.to_string(),
    )?;
    cluster.kubectl(&[
        "apply",
        "--server-side",
        "--validate=strict",
        "--kustomize",
        text(&overlay),
    ])?;
    is_rolled_out(cluster)
}

/// Waits until the DaemonSet's pod is ready, as the kubelet's probe finds it.
pub fn is_rolled_out(cluster: &Cluster) -> Result<()> {
    let status = ["rollout", "status", "daemonset/whydrop", "--timeout=90s"];
    cluster.kubectl(&[&["--namespace=whydrop"], &status[..]].concat())?;
    Ok(())
}

/// The process has the manifest's capabilities, no other, and what else the manifest takes away.
pub fn has_its_rights_and_no_more(cluster: &Cluster) -> Result<()> {
    let daemonset = cluster.get("whydrop", "daemonset/whydrop")?;
    let security = &daemonset["spec"]["template"]["spec"]["containers"][0]["securityContext"];
    let added = security["capabilities"]["add"]
        .as_array()
        .context("capabilities")?;
    let mut bits = 0_u64;
    for name in added {
        let known = CAPABILITIES.iter().find(|(known, _)| name == known);
        bits |= 1 << known.with_context(|| format!("the bit of {name}"))?.1;
    }
    let pid = agent_pid(cluster)?;
    let status = on_node(cluster, &format!("cat /proc/{pid}/status"))?;
    let bits = format!("{bits:016x}");
    let expected = [
        ("Uid", "0 0 0 0"),
        ("CapPrm", &bits),
        ("CapEff", &bits),
        ("CapBnd", &bits),
        ("CapInh", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        // A filter.
        ("Seccomp", "2"),
    ];
    for (name, value) in expected {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let words: Vec<_> = line.unwrap_or_default().split_whitespace().collect();
        ensure!(words.join(" ") == value, "{name} is not {value}:\n{status}");
    }
    let mounts = on_node(cluster, &format!("cat /proc/{pid}/mounts"))?;
    let root = mounts
        .lines()
        .find(|line| line.split(' ').nth(1) == Some("/"));
    let is_read_only = root.is_some_and(|line| {
        let options = line.split(' ').nth(3).unwrap_or_default();
        options.split(',').any(|option| option == "ro")
    });
    ensure!(is_read_only, "the root can be written: {root:?}");
    // And with them everything is there that does not need more.
    until("every source works", || {
        let metrics = cluster.metrics()?;
        let sources = metrics
            .iter()
            .filter(|sample| sample.name == "whydrop_source_up");
        let down = sources.filter(|s| s.value != 1.0 && s.label("source") != NEEDS_KPROBES);
        let down: Vec<_> = down.map(|s| s.label("source")).collect();
        ensure!(down.is_empty(), "down: {down:?}");
        Ok(())
    })
}

/// The agent's process, as the node numbers it.
pub fn agent_pid(cluster: &Cluster) -> Result<u32> {
    // A `whydrop tail` is called so too.
    let find = "for p in /proc/[0-9]*; do \
                read -r name < $p/comm && [ \"$name\" = whydrop ] \
                && tr '\\0' ' ' < $p/cmdline | grep -q '^[^ ]* agent ' && echo ${p#/proc/}; done; true";
    let pids = on_node(cluster, find)?;
    let pid = pids.lines().next().context("no process is the agent")?;
    pid.parse()
        .with_context(|| format!("a process id: {pids:?}"))
}

/// What a shell on the node prints.
pub fn on_node(cluster: &Cluster, script: &str) -> Result<String> {
    let output = cluster.node.command("sh").args(["-c", script]).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "on the node, {script}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
