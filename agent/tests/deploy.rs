//! What `deploy/` and the runbook say against what the code has: flags, ports, rights, metrics, alerts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory as _, Parser as _, ValueEnum as _};
use serde_json::Value;
use whydrop::cli::cluster::agents::Agent;
use whydrop::cli::config::agents::{AGENT_NAMESPACE, AGENT_SELECTOR};
use whydrop::cli::config::{AgentArgs, Cli, Command, DEFAULT_SOCKET, OnOff};
use whydrop::cluster::watch::KINDS;
use whydrop::output::{http, metrics};
use whydrop::record::{Detail, Record};
use whydrop::senders::Senders;
use whydrop::state::State;

const ALERTS: &str = "deploy/prometheus/rules.yaml";
const RUNBOOK: &str = "docs/runbook.md";

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The documents of a YAML file.
fn documents(name: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&text(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn document(name: &str) -> Value {
    let [document] = documents(name).try_into().expect(name);
    document
}

fn strings(value: &Value) -> Vec<&str> {
    let items = value.as_array().into_iter().flatten();
    items.map(|item| item.as_str().unwrap()).collect()
}

fn daemonset() -> Value {
    document("deploy/base/daemonset.yaml")
}

fn pod(daemonset: &Value) -> &Value {
    &daemonset["spec"]["template"]
}

fn container(daemonset: &Value) -> &Value {
    let containers = pod(daemonset)["spec"]["containers"].as_array().unwrap();
    assert_eq!(containers.len(), 1);
    &containers[0]
}

/// The flags of the manifest, as the agent understands them.
fn flags(daemonset: &Value) -> AgentArgs {
    let args = strings(&container(daemonset)["args"]);
    let cli = Cli::try_parse_from([&["whydrop"], &args[..]].concat());
    match cli.unwrap_or_else(|error| panic!("{error}")).command {
        Command::Agent(args) => args,
        other => panic!("{other:?} is no agent"),
    }
}

fn state() -> Arc<State> {
    let hour = Duration::from_secs(3600);
    let record = Record::new(Detail::Pod, 100, hour);
    let senders = Senders::new(Detail::Pod, 100, hour);
    Arc::new(State::new("node-a".into(), record, senders))
}

#[test]
fn the_agent_takes_the_flags_of_the_manifest() {
    let daemonset = daemonset();
    let flags = flags(&daemonset);
    let container = container(&daemonset);
    // Where Prometheus can reach it, by the port that the manifest names.
    assert!(flags.listen.ip().is_unspecified());
    let ports = container["ports"].as_array().unwrap();
    assert_eq!(ports.len(), 1);
    assert_eq!(ports[0]["name"], "metrics");
    assert_eq!(ports[0]["containerPort"], flags.listen.port());
    let annotations = document("deploy/overlays/scrape-annotations/annotations.yaml");
    let annotations = &pod(&annotations)["metadata"]["annotations"];
    assert_eq!(
        annotations["prometheus.io/port"],
        flags.listen.port().to_string()
    );
    assert_eq!(annotations["prometheus.io/path"], "/metrics");
    // `kubectl exec POD -- whydrop tail` finds the socket without a flag, and so does who is on the node.
    assert_eq!(flags.socket, Path::new(DEFAULT_SOCKET));
    let folder = flags.socket.parent().unwrap().to_str().unwrap();
    let mounts = container["volumeMounts"].as_array().unwrap();
    let volumes = pod(&daemonset)["spec"]["volumes"].as_array().unwrap();
    assert_eq!((mounts.len(), volumes.len()), (1, 1));
    assert_eq!(mounts[0]["mountPath"], folder);
    assert_eq!(volumes[0]["name"], mounts[0]["name"]);
    assert_eq!(volumes[0]["hostPath"]["path"], folder);
    let env = container["env"].as_array().unwrap();
    let node = env.iter().find(|entry| entry["name"] == "NODE_NAME");
    assert_eq!(
        node.unwrap()["valueFrom"]["fieldRef"]["fieldPath"],
        "spec.nodeName"
    );
}

#[test]
fn the_agent_answers_what_is_asked_of_it() {
    let daemonset = daemonset();
    let container = container(&daemonset);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let listener = runtime.block_on(http::listen("127.0.0.1:0".parse().unwrap()));
    let listener = listener.unwrap();
    let address = listener.local_addr().unwrap();
    let server = runtime.spawn(http::serve_metrics(listener, state(), stopped));
    let status = |path: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().to_owned()
    };
    assert_eq!(status("/nothing"), "404");
    // An agent that sees no drops lives, and is not ready.
    for (probe, code) in [("livenessProbe", "200"), ("readinessProbe", "503")] {
        let get = &container[probe]["httpGet"];
        assert_eq!(get["port"], "metrics");
        assert_eq!(status(get["path"].as_str().unwrap()), code, "{probe}");
    }
    assert_eq!(status("/metrics"), "200");
    stop.send(true).unwrap();
    runtime.block_on(server).unwrap();
}

/// The rights of rules: API group, resource, verb.
fn rights(rules: &Value) -> BTreeSet<(String, String, String)> {
    let mut rights = BTreeSet::new();
    for rule in rules.as_array().unwrap() {
        let keys: BTreeSet<_> = rule.as_object().unwrap().keys().map(|k| &**k).collect();
        assert_eq!(keys, ["apiGroups", "resources", "verbs"].into());
        for group in strings(&rule["apiGroups"]) {
            for resource in strings(&rule["resources"]) {
                for verb in strings(&rule["verbs"]) {
                    let right = (group.to_owned(), resource.to_owned(), verb.to_owned());
                    assert!(rights.insert(right), "{resource} {verb} twice");
                }
            }
        }
    }
    rights
}

#[test]
fn the_rights_are_those_that_the_watches_use() {
    let needed = KINDS.into_iter().flat_map(|kind| {
        let right = move |verb: &str| {
            (
                kind.group().to_owned(),
                kind.plural().to_owned(),
                verb.to_owned(),
            )
        };
        ["list", "watch"].map(right)
    });
    let needed: BTreeSet<_> = needed.collect();
    let objects = documents("deploy/base/rbac.yaml");
    let of = |kind: &str| {
        let mut found = objects.iter().filter(|object| object["kind"] == kind);
        let object = found.next().unwrap_or_else(|| panic!("no {kind}"));
        assert!(found.next().is_none(), "two of {kind}");
        object
    };
    assert_eq!(objects.len(), 3);
    assert_eq!(rights(&of("ClusterRole")["rules"]), needed);

    // The README shows the same rule.
    let readme = text("README.md");
    let shown = readme
        .split("```yaml\n")
        .skip(1)
        .filter_map(|block| block.split("```").next())
        .find(|block| block.contains("kind: ClusterRole"));
    let shown: Value =
        serde_saphyr::from_str(shown.expect("README.md has the ClusterRole")).unwrap();
    assert_eq!(rights(&shown["rules"]), needed);

    // And the pod gets them.
    let (account, binding) = (of("ServiceAccount"), of("ClusterRoleBinding"));
    assert_eq!(
        binding["roleRef"]["name"],
        of("ClusterRole")["metadata"]["name"]
    );
    let subject = &binding["subjects"][0];
    assert_eq!(subject["name"], account["metadata"]["name"]);
    assert_eq!(subject["namespace"], account["metadata"]["namespace"]);
    let daemonset = daemonset();
    let spec = &pod(&daemonset)["spec"];
    assert_eq!(spec["serviceAccountName"], account["metadata"]["name"]);
    assert_eq!(
        daemonset["metadata"]["namespace"],
        account["metadata"]["namespace"]
    );
    assert_eq!(spec["automountServiceAccountToken"], true);
}

#[test]
fn kubernetes_events_are_a_choice_with_rights_of_its_own() {
    let base = flags(&daemonset());
    assert_eq!(base.kube_events, OnOff::Off);
    let patch = document("deploy/overlays/kube-events/agent.yaml");
    let env = &container(&patch)["env"][0];
    let mut command = Cli::command();
    let agent = command.find_subcommand_mut("agent").unwrap();
    let flag = agent
        .get_arguments()
        .find(|arg| arg.get_id() == "kube_events");
    let name = flag.unwrap().get_env().unwrap().to_str().unwrap();
    assert_eq!(env["name"], name);
    let value = env["value"].as_str().unwrap();
    assert_eq!(OnOff::from_str(value, true), Ok(OnOff::On));

    let [role, binding] = documents("deploy/overlays/kube-events/rbac.yaml")
        .try_into()
        .unwrap();
    let right = |verb: &str| ("events.k8s.io".into(), "events".into(), verb.into());
    // What agent/src/kube_events.rs asks, beside the list of pods that every agent may.
    assert_eq!(
        rights(&role["rules"]),
        ["create", "patch"].map(right).into()
    );
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
    let subject = &binding["subjects"][0];
    let daemonset = daemonset();
    let account = &pod(&daemonset)["spec"]["serviceAccountName"];
    assert_eq!(subject["name"], *account);
    assert_eq!(subject["namespace"], daemonset["metadata"]["namespace"]);
}

#[test]
fn people_find_the_agents_and_may_be_given_what_it_takes() {
    let daemonset = daemonset();
    assert_eq!(daemonset["metadata"]["namespace"], AGENT_NAMESPACE);
    let (key, value) = AGENT_SELECTOR.split_once('=').unwrap();
    assert_eq!(pod(&daemonset)["metadata"]["labels"][key], value);
    let agent = Agent::of(&serde_json::from_value(pod(&daemonset).clone()).unwrap());
    assert_eq!(agent.container.unwrap(), container(&daemonset)["name"]);

    let role = document("deploy/base/reader.yaml");
    assert_eq!(role["kind"], "Role");
    assert_eq!(role["metadata"]["namespace"], AGENT_NAMESPACE);
    let right = |(resource, verb): (&str, &str)| (String::new(), resource.into(), verb.into());
    let needed = [
        ("pods", "list"),
        ("pods", "watch"),
        ("pods/exec", "create"),
        ("pods/exec", "get"),
    ];
    assert_eq!(rights(&role["rules"]), needed.map(right).into());
    // Whoever deploys says who gets it.
    for file in fs::read_dir(path("deploy/base")).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        assert!(!text.contains("kind: RoleBinding"));
    }
}

/// A right that is added needs a reason, here and in the manifest.
#[test]
fn the_agent_has_no_privilege_beside_its_capabilities() {
    let daemonset = daemonset();
    let security = &container(&daemonset)["securityContext"];
    assert_eq!(security["privileged"], false);
    assert_eq!(security["allowPrivilegeEscalation"], false);
    assert_eq!(security["readOnlyRootFilesystem"], true);
    assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
    let capabilities = &security["capabilities"];
    assert_eq!(strings(&capabilities["drop"]), ["ALL"]);
    let added: BTreeSet<_> = strings(&capabilities["add"]).into_iter().collect();
    let needed = ["BPF", "NET_ADMIN", "PERFMON", "SYSLOG", "SYS_PTRACE"];
    assert_eq!(added, needed.into());
    let lines = text("deploy/base/daemonset.yaml");
    let lines: Vec<_> = lines.lines().map(str::trim).collect();
    for capability in added {
        let line = format!("- {capability}");
        let at = lines.iter().position(|l| *l == line).unwrap();
        assert!(lines[at - 1].starts_with('#'), "{capability} has no reason");
    }
}

#[test]
fn each_folder_lists_its_files() {
    for folder in [
        "deploy/base",
        "deploy/overlays/kube-events",
        "deploy/overlays/linux-5.10",
        "deploy/overlays/prometheus-operator",
        "deploy/overlays/scrape-annotations",
    ] {
        let kustomization = document(&format!("{folder}/kustomization.yaml"));
        let patches = kustomization["patches"].as_array().into_iter().flatten();
        let mut listed: BTreeSet<_> = patches.filter_map(|p| p["path"].as_str()).collect();
        listed.extend(strings(&kustomization["resources"]));
        for name in &listed {
            assert!(
                path(&format!("{folder}/{name}")).exists(),
                "{folder}/{name}"
            );
        }
        for file in fs::read_dir(path(folder)).unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            assert!(
                name == "kustomization.yaml" || listed.contains(&*name),
                "{folder}/{name} is not listed"
            );
        }
    }
}

#[test]
fn prometheus_finds_the_agents() {
    let daemonset = daemonset();
    let labels = &pod(&daemonset)["metadata"]["labels"];
    assert_eq!(*labels, daemonset["spec"]["selector"]["matchLabels"]);
    let name = labels["app.kubernetes.io/name"].as_str().unwrap();

    let monitor = document("deploy/overlays/prometheus-operator/podmonitor.yaml");
    assert_eq!(monitor["spec"]["selector"]["matchLabels"], *labels);
    assert_eq!(monitor["spec"]["jobLabel"], "app.kubernetes.io/name");
    assert_eq!(
        monitor["spec"]["podMetricsEndpoints"][0]["port"],
        container(&daemonset)["ports"][0]["name"]
    );
    assert_eq!(
        monitor["metadata"]["namespace"],
        daemonset["metadata"]["namespace"]
    );

    let prometheus = document("deploy/prometheus/prometheus.yaml");
    let scrape = &prometheus["scrape_configs"][0];
    assert_eq!(scrape["job_name"], name);
    assert_eq!(
        scrape["kubernetes_sd_configs"][0]["namespaces"]["names"][0],
        daemonset["metadata"]["namespace"]
    );
    let keep = &scrape["relabel_configs"][0];
    assert_eq!(keep["action"], "keep");
    assert_eq!(keep["regex"], format!("{name};metrics"));
    // The rules name this job.
    assert!(text(ALERTS).contains(&format!("up{{job=\"{name}\"}}")));
    assert_eq!(strings(&prometheus["rule_files"]), ["rules.yaml"]);
}

/// Words of letters, digits, `_` and `:` that begin with a letter.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':')
        .filter(|word| word.starts_with(|c: char| c.is_ascii_alphabetic()))
}

/// Names of metrics in a text, those that rules record left out.
fn metrics_in(text: &str) -> BTreeSet<&str> {
    let words = words(text).map(|word| word.trim_end_matches([':', '_']));
    words.filter(|word| word.starts_with("whydrop_")).collect()
}

/// Every name that a scrape can have, whether or not there is anything to count.
fn exported() -> BTreeSet<String> {
    let text = metrics::encode(&state());
    let mut names = BTreeSet::new();
    for line in text.lines() {
        let Some((name, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|line| line.split_once(' '))
        else {
            continue;
        };
        let suffixes: &[&str] = match kind {
            "counter" => &["_total"],
            "gauge" => &[""],
            "info" => &["_info"],
            "histogram" => &["_bucket", "_sum", "_count"],
            other => panic!("{name} is a {other}"),
        };
        names.extend(suffixes.iter().map(|suffix| format!("{name}{suffix}")));
    }
    names
}

#[test]
fn every_metric_that_is_named_exists() {
    let exported = exported();
    assert!(exported.contains("whydrop_silent_drops_total"));
    for file in [ALERTS, RUNBOOK, "deploy/prometheus/tests.yaml"] {
        let text = text(file);
        let named = metrics_in(&text);
        assert!(!named.is_empty(), "{file} names no metric");
        for name in named {
            assert!(exported.contains(name), "{file}: there is no {name}");
        }
    }
}

struct Rules {
    /// Expressions of alerts and records, by name.
    expressions: BTreeMap<String, String>,
    alerts: Vec<Value>,
}

fn rules() -> Rules {
    let (mut expressions, mut alerts) = (BTreeMap::new(), Vec::new());
    for group in document(ALERTS)["groups"].as_array().unwrap() {
        for rule in group["rules"].as_array().unwrap() {
            let name = rule["alert"].as_str().or(rule["record"].as_str()).unwrap();
            let expression = rule["expr"].as_str().unwrap();
            let before = expressions.insert(name.to_owned(), expression.to_owned());
            assert!(before.is_none(), "{name} twice");
            if !rule["alert"].is_null() {
                alerts.push(rule.clone());
            }
        }
    }
    Rules {
        expressions,
        alerts,
    }
}

#[test]
fn rules_use_labels_and_records_that_exist() {
    let rules = rules();
    let metrics = concat!(
        include_str!("../src/output/metrics.rs"),
        include_str!("../src/output/metrics/own.rs"),
        include_str!("../src/output/metrics/policies.rs"),
    );
    // What Prometheus itself, and the shipped configuration, set.
    let of_target = ["instance", "job", "node"];
    for (name, expression) in &rules.expressions {
        for record in words(expression).filter(|word| word.contains(':')) {
            assert!(rules.expressions.contains_key(record), "{name}: {record}");
        }
        let lists = ["by (", "without (", "on ("].into_iter().flat_map(|word| {
            let lists = expression.split(word).skip(1);
            lists.flat_map(|rest| words(rest.split(')').next().unwrap()))
        });
        let matchers = expression.split('{').skip(1).flat_map(|rest| {
            let inside = rest.split('}').next().unwrap();
            inside.split(',').map(|m| words(m).next().unwrap())
        });
        for label in lists.chain(matchers) {
            assert!(
                of_target.contains(&label) || metrics.contains(&format!("\"{label}\"")),
                "{name}: no metric has the label {label}"
            );
        }
    }
}

#[test]
fn every_alert_has_a_section_in_the_runbook_and_a_test_that_fires_it() {
    let runbook = text(RUNBOOK);
    let sections: BTreeSet<_> = runbook
        .lines()
        .filter_map(|line| line.strip_prefix("## "))
        .collect();
    let rules = rules();
    let alerts = rules.alerts.iter().map(|a| a["alert"].as_str().unwrap());
    let alerts: BTreeSet<_> = alerts.collect();
    assert_eq!(sections, alerts);
    for alert in &rules.alerts {
        let name = alert["alert"].as_str().unwrap();
        let anchor = format!("{RUNBOOK}#{}", name.to_lowercase());
        assert_eq!(alert["annotations"]["runbook"], anchor);
        assert!(alert["annotations"]["summary"].is_string(), "{name}");
        let severity = alert["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning", "info"].contains(&severity));
    }
    let anchors = runbook.split("](#").skip(1);
    for anchor in anchors.map(|rest| rest.split(')').next().unwrap()) {
        let found = alerts.iter().any(|alert| alert.to_lowercase() == anchor);
        assert!(found, "{RUNBOOK}: #{anchor} leads nowhere");
    }

    let tests = document("deploy/prometheus/tests.yaml");
    let cases = tests["tests"].as_array().unwrap().iter();
    let cases = cases.flat_map(|test| test["alert_rule_test"].as_array().into_iter().flatten());
    let fires = cases.filter(|case| !case["exp_alerts"].as_array().unwrap().is_empty());
    let tested: BTreeSet<_> = fires.map(|c| c["alertname"].as_str().unwrap()).collect();
    assert_eq!(tested, alerts);
}

#[test]
fn the_operator_gets_the_same_rules() {
    let rule = document("deploy/overlays/prometheus-operator/rules.yaml");
    assert_eq!(
        rule["spec"]["groups"],
        document(ALERTS)["groups"],
        "copy the groups of {ALERTS} into deploy/overlays/prometheus-operator/rules.yaml"
    );
}
