//! A whole cluster of one node, in a lab's router: API server, controllers, kube-proxy, kubelet, and the
//! agent as `deploy/` runs it. Whoever starts it moves its thread there for good.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kube::Client;
use serde_json::Value;
use whydrop_tests::lab::{self, Family, Host, Lab, Place};
use whydrop_tests::scrape::{self, Sample};

use crate::controllers::Controllers;
use crate::node::{self, Node};
use crate::proxy::{Mode, Proxy};
use crate::server::{Options, Server, User, program};

/// Nothing takes this long, on any machine.
const DEADLINE: Duration = Duration::from_secs(120);
/// How often something is asked again.
const POLL: Duration = Duration::from_millis(50);
/// Where the agent's `/metrics` is on its node.
pub const METRICS_PORT: u16 = 9742;
/// Whose requests the API server writes down: the agent's.
pub const AGENT: &str = "system:serviceaccount:whydrop:whydrop";

/// The cluster. Its parts end in this order.
pub struct Cluster {
    /// The node.
    pub node: Node,
    _proxy: Proxy,
    _controllers: Controllers,
    /// The API server.
    pub server: Server,
    /// The administrator's client.
    pub client: Client,
    kubeconfig: PathBuf,
    /// The network that it is in.
    pub lab: Lab,
}

impl Cluster {
    /// Starts it, and waits until the node is ready.
    ///
    /// # Errors
    /// A part of it is missing, or does not get ready.
    pub async fn start(images: &[PathBuf]) -> Result<Self> {
        let lab = Lab::new()?;
        lab::enter(&lab.netns(Host::Router))?;
        let [high, low] = lab.id().to_be_bytes();
        // Of the lab's own range, parts that it does not use itself.
        let part = |end: &str| format!("10.{}.{low}.{end}", 64 + high);
        let api_service = part("113");
        let pod_range = part("128/25");
        let address = lab.address(Place::Of(Host::Router), Family::V4);
        // As any node has it; an address of a Service needs a route before it becomes a pod's.
        let outside = lab.address(Place::Of(Host::Client), Family::V4);
        lab.run(Host::Router, &format!("ip route add default via {outside}"))?;
        let server = Server::start_as(Options {
            service_ranges: part("112/28"),
            address,
            audited: Some(AGENT),
            serves_pods_at: Some(api_service.parse()?),
        })
        .await?;
        let client = server.client(User::Admin).await?;
        let kubeconfig = server.kubeconfig(User::Admin)?;
        let controllers = Controllers::start(server.folder(), &kubeconfig, &pod_range)?;
        let place = node::Place {
            name: &lab.node(),
            address: &address.to_string(),
            pod_range: &pod_range,
            images,
        };
        let node = Node::start(server.folder(), &kubeconfig, &place)?;
        let proxy = Proxy::start(&lab, &kubeconfig, Mode::Nftables, &api_service)?;
        let cluster = Self {
            node,
            _proxy: proxy,
            _controllers: controllers,
            server,
            client,
            kubeconfig,
            lab,
        };
        let name = format!("node/{}", cluster.lab.node());
        cluster.kubectl(&["wait", "--for=create", &name, "--timeout=120s"])?;
        cluster.kubectl(&["wait", "--for=condition=Ready", &name, "--timeout=120s"])?;
        Ok(cluster)
    }

    /// The node's address.
    pub fn address(&self) -> IpAddr {
        self.lab.address(Place::Of(Host::Router), Family::V4)
    }

    /// Runs kubectl as the administrator. What it prints.
    ///
    /// # Errors
    /// It fails; with what it says, and what the node says.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.kubectl_command()?;
        let output = command
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("start kubectl")?;
        ensure!(
            output.status.success(),
            "kubectl {}: {}\n{}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim(),
            self.node.logs(),
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// kubectl as the administrator.
    ///
    /// # Errors
    /// It is not there.
    pub fn kubectl_command(&self) -> Result<Command> {
        let mut command = program("kubectl")?;
        command
            .env("KUBECONFIG", &self.kubeconfig)
            // What it has discovered is this cluster's.
            .env("KUBECACHEDIR", self.server.folder().join("kubectl"));
        Ok(command)
    }

    /// An object, or all of a kind, as the API server has it.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, namespace: &str, what: &str) -> Result<Value> {
        let text = self.kubectl(&["--namespace", namespace, "get", what, "--output=json"])?;
        serde_json::from_str(&text).context("kubectl's JSON")
    }

    /// Runs a command in a pod's container, which needs no shell for it.
    ///
    /// # Errors
    /// As [`Cluster::kubectl`].
    pub fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> Result<String> {
        let exec = ["--namespace", namespace, "exec", pod, "--"];
        self.kubectl(&[&exec[..], command].concat())
    }

    /// The agent's `/metrics`, in one of these media types.
    ///
    /// # Errors
    /// No agent answers with 200.
    pub fn scrape(&self, accept: &str) -> Result<String> {
        let at = SocketAddr::new(self.address(), METRICS_PORT);
        let stream = TcpStream::connect_timeout(&at, POLL * 20)
            .with_context(|| format!("connect to the agent at {at}"))?;
        let (status, body) = scrape::get_as(stream, "/metrics", accept)?;
        ensure!(status == 200, "/metrics answers {status}: {body}");
        Ok(body)
    }

    /// What is in them.
    ///
    /// # Errors
    /// No agent answers.
    pub fn metrics(&self) -> Result<Vec<Sample>> {
        scrape::samples(&self.scrape("*/*")?)
    }
}

/// Waits until something is so, of which is said what it is instead.
///
/// # Errors
/// It does not become so.
pub fn until(what: &str, mut is_so: impl FnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let Err(error) = is_so() else { return Ok(()) };
        if Instant::now() > deadline {
            return Err(error.context(format!("waited too long until {what}")));
        }
        std::thread::sleep(POLL);
    }
}
