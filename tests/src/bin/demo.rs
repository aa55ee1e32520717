//! `cargo xtask demo`: a small cluster on this machine's kernel, five connections that fail, and
//! what whydrop says about each.
//!
//! Network namespaces stand for the pods. Nothing is simulated: the kernel drops the packets, and
//! the agent is the one that runs on a node.

use std::io::IsTerminal as _;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use whydrop::event::{Event, Line};
use whydrop_tests::agent::{self, Agent, POLL, Sample};
use whydrop_tests::lab::{Family, Host, Lab, Place};
use whydrop_tests::packet;
use whydrop_tests::traffic::{self, Connect};

/// The node's name in the story.
const NODE: &str = "node-a";
/// The pods: host of the lab, namespace, name.
const PODS: [(Host, &str, &str); 4] = [
    (Host::Client, "shop", "web"),
    (Host::Client2, "shop", "cart"),
    (Host::Server, "db", "pg-0"),
    (Host::Server2, "kube-system", "coredns"),
];
/// Until every drop must have been seen.
const DEADLINE: Duration = Duration::from_secs(8);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// One thing that goes wrong, and how whydrop must name it.
struct Failure {
    /// What was done, and what the application saw of it.
    told: String,
    from: (&'static str, &'static str),
    to: (&'static str, &'static str),
    metric: &'static str,
    kind: &'static str,
    reason: &'static str,
    /// The Service that was asked for, as `namespace/name`.
    service: &'static str,
    packets: u64,
}

fn main() -> ExitCode {
    match watch_signals().and_then(|()| demo()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the story; `false` if a drop was not seen or not named.
fn demo() -> Result<bool> {
    agent::binary()?;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!("{}", bold("whydrop: why does this connection hang?"));
    println!(
        "Real packets, dropped by this machine's kernel ({}), between network namespaces\n\
         that stand for pods. No cluster is needed.\n",
        kernel.trim()
    );
    println!("  shop/web  ──┐               ┌── db/pg-0 (Service db/pg)");
    println!("              ├── {NODE} ────┤");
    println!("  shop/cart ──┘  (whydrop)    └── kube-system/coredns\n");

    let lab = Lab::new()?;
    break_things(&lab)?;
    let agent = Agent::start_with(NODE, &objects(&lab), &[])?;
    still_wanted()?;

    println!("{}", bold("What the applications see"));
    let failures = fail(&lab)?;
    still_wanted()?;

    let samples = wait_until_seen(&agent, &failures)?;
    println!("\n{}", bold("What `whydrop tail` says"));
    print!("{}", tail(&agent)?);

    println!("\n{}", bold("What Prometheus scrapes"));
    for failure in &failures {
        for sample in samples.iter().filter(|sample| failure.fits(sample)) {
            println!("  {}", short(sample));
        }
    }

    println!("\n{}", bold("Seen and named"));
    let lines = agent.lines();
    let mut all = true;
    for failure in &failures {
        let counted = failure.counted(&samples);
        let shown = lines
            .iter()
            .any(|line| matches!(line, Line::Event(e) if failure.shown_by(e)));
        let good = counted == failure.packets && shown;
        all &= good;
        let ((from_namespace, from), (to_namespace, to)) = (failure.from, failure.to);
        println!(
            "  {} {from_namespace}/{from} to {to_namespace}/{to}: {counted} of {} counted as {}{}",
            if good {
                colour("✓", "32")
            } else {
                colour("✗", "31")
            },
            failure.packets,
            failure.reason,
            if shown { "" } else { ", but not in the stream" },
        );
    }
    if !all {
        eprintln!("\nthe agent's log:\n{}", agent.log());
    }
    agent.stop().context("stop the agent")?;
    Ok(all)
}

/// The rules and faults of the story. The first is what a policy enforcer installs for a
/// NetworkPolicy that isolates db/pg-0, with the translation that kube-proxy makes for a Service.
fn break_things(lab: &Lab) -> Result<()> {
    let of = |host| lab.address(Place::Of(host), Family::V4);
    let (web, pg, dns) = (of(Host::Client), of(Host::Server), of(Host::Server2));
    let service = lab.address(Place::Service, Family::V4);
    lab.nft(
        Host::Router,
        &format!(
            "table ip nat {{
               chain services {{ type nat hook prerouting priority -100;
                 ip daddr {service} tcp dport 5432 dnat to {pg}
               }}
             }}
             table ip policies {{
               chain forward {{ type filter hook forward priority 0;
                 ip saddr {web} ip daddr {pg} tcp dport 5432 drop
                 ip saddr {web} ip daddr {pg} tcp dport 9187 reject with tcp reset
                 ip saddr {web} ip daddr {dns} udp dport 53 drop
               }}
             }}"
        ),
    )
}

/// Makes every connection that fails, and tells each as it happens.
fn fail(lab: &Lab) -> Result<Vec<Failure>> {
    let (web, cart) = (("shop", "web"), ("shop", "cart"));
    let (pg, dns) = (("db", "pg-0"), ("kube-system", "coredns"));
    let (silent, rejected) = (
        "whydrop_silent_drops_total",
        "whydrop_rejected_packets_total",
    );
    let mut failures = Vec::new();
    let mut add = |failure: Failure| {
        println!("  {}. {}", failures.len() + 1, failure.told);
        failures.push(failure);
    };
    let connect = |host, to| lab.within(host, || traffic::connect(to));

    let outcome = connect(Host::Client, lab.socket(Place::Service, Family::V4, 5432));
    ensure!(
        outcome == Connect::Silent,
        "the first connect ended with {outcome:?}"
    );
    add(Failure {
        told: "shop/web connects to Service db/pg:5432. It hangs.".to_owned(),
        from: web,
        to: pg,
        metric: silent,
        kind: "syn",
        reason: "NETFILTER_DROP",
        service: "db/pg",
        packets: 1,
    });

    let outcome = connect(
        Host::Client,
        lab.socket(Place::Of(Host::Server), Family::V4, 9187),
    );
    ensure!(
        outcome == Connect::Refused,
        "the second connect ended with {outcome:?}"
    );
    add(Failure {
        told: "shop/web connects to db/pg-0:9187. Connection refused, but not by db/pg-0."
            .to_owned(),
        from: web,
        to: pg,
        metric: rejected,
        kind: "syn",
        reason: "NETFILTER_DROP",
        service: "",
        packets: 1,
    });

    let query = packet::dns_query(4711, "pg.db.svc.cluster.local", 1);
    let to = lab.socket(Place::Of(Host::Server2), Family::V4, 53);
    lab.within(Host::Client, || traffic::udp_burst(to, 1, 1, &query))?;
    add(Failure {
        told: "shop/web asks kube-system/coredns for pg.db.svc.cluster.local. No answer."
            .to_owned(),
        from: web,
        to: dns,
        metric: silent,
        kind: "dns",
        reason: "NETFILTER_DROP",
        service: "",
        packets: 1,
    });

    let at = lab.socket(Place::Of(Host::Server), Family::V4, 8125);
    let deaf = lab.within(Host::Server, || traffic::deaf_udp_socket(at))?;
    let errors = || whydrop_tests::counters::Snmp::read(lab, Host::Server);
    let before = errors()?;
    let burst = lab.within(Host::Client2, || {
        traffic::udp_burst(at, 40, 1, b"orders:1|c")
    })?;
    let full = errors()?.since(&before, "UdpRcvbufErrors");
    drop(deaf);
    add(Failure {
        told: format!(
            "shop/cart sends {} datagrams to db/pg-0:8125. All are sent, {} arrive.",
            burst.accepted,
            burst.accepted - full
        ),
        from: cart,
        to: pg,
        metric: silent,
        kind: "packet",
        reason: "SOCKET_RCVBUFF",
        service: "",
        packets: full,
    });

    let outcome = connect(
        Host::Client2,
        lab.socket(Place::Of(Host::Server), Family::V6, 8080),
    );
    ensure!(
        outcome == Connect::Refused,
        "the last connect ended with {outcome:?}"
    );
    add(Failure {
        told: "shop/cart connects to db/pg-0:8080 by IPv6. Connection refused.".to_owned(),
        from: cart,
        to: pg,
        metric: rejected,
        kind: "syn",
        reason: "NO_SOCKET",
        service: "",
        packets: 1,
    });
    Ok(failures)
}

impl Failure {
    fn fits(&self, sample: &Sample) -> bool {
        sample.name == self.metric
            && (sample.label("source_namespace"), sample.label("source_pod")) == self.from
            && (
                sample.label("destination_namespace"),
                sample.label("destination_pod"),
            ) == self.to
            && sample.label("kind") == self.kind
            && sample.label("reason") == self.reason
            && sample.label("destination_service") == self.service
    }

    fn counted(&self, samples: &[Sample]) -> u64 {
        samples
            .iter()
            .filter(|sample| self.fits(sample))
            .map(|sample| sample.value as u64)
            .sum()
    }

    fn shown_by(&self, event: &Event) -> bool {
        let named = |end: &whydrop::event::Endpoint, (namespace, pod)| {
            end.namespace.as_deref() == Some(namespace) && end.pod.as_deref() == Some(pod)
        };
        event.kind.as_str() == self.kind
            && named(&event.source, self.from)
            && named(&event.destination, self.to)
            && event
                .drop
                .as_ref()
                .and_then(|drop| drop.reason.as_deref())
                .is_some_and(|reason| reason == self.reason)
    }
}

/// Waits until every failure is on `/metrics`, or for as long as it may take.
fn wait_until_seen(agent: &Agent, failures: &[Failure]) -> Result<Vec<Sample>> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        still_wanted()?;
        let samples = agent.metrics()?;
        let lines = agent.lines();
        let seen = failures.iter().all(|failure| {
            failure.counted(&samples) >= failure.packets
                && lines
                    .iter()
                    .any(|l| matches!(l, Line::Event(e) if failure.shown_by(e)))
        });
        if seen || Instant::now() > deadline {
            return Ok(samples);
        }
        std::thread::sleep(POLL);
    }
}

/// What a person sees who runs `whydrop tail`.
fn tail(agent: &Agent) -> Result<String> {
    let colour = if std::io::stdout().is_terminal() {
        "always"
    } else {
        "never"
    };
    let output = Command::new(agent::binary()?)
        .args([
            "tail",
            "--last",
            "50",
            "--namespace",
            "shop",
            "--color",
            colour,
            "--socket",
        ])
        .arg(agent.socket())
        .output()
        .context("run whydrop tail")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "whydrop tail failed: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A sample with the labels that say something here.
fn short(sample: &Sample) -> String {
    let labels: Vec<String> = sample
        .labels
        .iter()
        .filter(|(name, value)| {
            !value.is_empty()
                && !name.ends_with("_kind")
                && !name.ends_with("_node")
                && !name.ends_with("_workload")
        })
        .map(|(name, value)| format!("{name}=\"{value}\""))
        .collect();
    format!("{}{{{}}} {}", sample.name, labels.join(","), sample.value)
}

/// What `kubectl get nodes,pods,svc,networkpolicies -A -o json` would print for this cluster.
fn objects(lab: &Lab) -> Value {
    let addresses = |place| Family::BOTH.map(|family| lab.address(place, family).to_string());
    let mut items = vec![
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE},
            "spec": {"podCIDRs": Family::BOTH.map(|family| lab.range(family))},
            "status": {"addresses": Host::PODS.iter()
                .flat_map(|pod| addresses(Place::RouterTowards(*pod)))
                .map(|address| json!({"type": "InternalIP", "address": address}))
                .collect::<Vec<_>>()},
        }),
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": "db", "name": "pg"},
            "spec": {
                "clusterIP": addresses(Place::Service)[0],
                "clusterIPs": [addresses(Place::Service)[0]],
                "selector": {"app": "pg-0"},
                "ports": [{"port": 5432, "protocol": "TCP", "targetPort": 5432}],
            },
        }),
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": "db", "name": "default-deny"},
            "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
        }),
    ];
    for namespace in ["shop", "db", "kube-system"] {
        items.push(json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace},
        }));
    }
    for (host, namespace, name) in PODS {
        let ports: &[(&str, u16, &str)] = match name {
            "pg-0" => &[
                ("pg", 5432, "TCP"),
                ("metrics", 9187, "TCP"),
                ("statsd", 8125, "UDP"),
            ],
            "coredns" => &[("dns", 53, "UDP")],
            _ => &[],
        };
        let ips = addresses(Place::Of(host));
        items.push(whydrop_tests::objects::pod(
            namespace, name, NODE, &ips, ports,
        ));
    }
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

/// From now on SIGINT and SIGTERM end the demo at its next step, so that everything is removed.
fn watch_signals() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (ready, wait) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut terminate = signal(SignalKind::terminate())?;
            // The receiver waits for exactly this.
            let _ = ready.send(());
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            INTERRUPTED.store(true, Ordering::Relaxed);
            std::io::Result::Ok(())
        })
    });
    wait.recv().context("watch for SIGINT and SIGTERM")
}

fn still_wanted() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted; everything is removed again");
    }
    Ok(())
}

fn bold(text: &str) -> String {
    colour(text, "1")
}

/// Text in an ANSI style, where standard output is a terminal.
fn colour(text: &str, style: &str) -> String {
    if std::io::stdout().is_terminal() {
        format!("\x1b[{style}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}
