//! etcd and kube-apiserver as processes, on an address of this namespace and on a unix socket, in a folder
//! that goes with them.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use whydrop_tests::free_port::free_port;

use crate::certificates::Authority;

/// Ready in 4 s on an idle machine.
const START: Duration = Duration::from_secs(90);
/// The cluster's Service addresses, where no lab has its own.
const SERVICE_RANGE: &str = "10.96.0.0/16";

/// A user by its client certificate.
#[derive(Clone, Copy, Debug)]
pub enum User {
    /// May do everything.
    Admin,
    /// Of this name, with the rights that somebody grants it.
    Named(&'static str),
}

/// A program that ends with who started it.
pub(crate) struct Running(pub(crate) Child);

/// How a server differs from one that only keeps objects.
pub struct Options {
    /// The cluster's Service addresses.
    pub service_ranges: String,
    /// Where the API server listens.
    pub address: IpAddr,
    /// Whose requests are written down.
    pub audited: Option<&'static str>,
    /// The first of the Service addresses, at which pods find the API server. Their ServiceAccounts are then
    /// asked for, which a controller must make.
    pub serves_pods_at: Option<IpAddr>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            service_ranges: SERVICE_RANGE.to_owned(),
            address: Ipv4Addr::LOCALHOST.into(),
            audited: None,
            serves_pods_at: None,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// etcd with one or more API servers.
pub struct Server {
    authority: Authority,
    /// Of the API server that can be killed; a kubeconfig names it.
    port: u16,
    options: Options,
    api: Option<Running>,
    _etcd: Running,
    folder: TempDir,
}

impl Server {
    /// Starts both and waits until the API server is ready. No controller runs: what is written stays
    /// as it is.
    ///
    /// # Errors
    /// A program is missing, or does not get ready; shows its log.
    pub async fn start() -> Result<Self> {
        Self::start_with(SERVICE_RANGE).await
    }

    /// As [`Server::start`], with other ranges of Service addresses.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_with(service_ranges: &str) -> Result<Self> {
        let service_ranges = service_ranges.to_owned();
        Self::start_as(Options {
            service_ranges,
            ..Options::default()
        })
        .await
    }

    /// As [`Server::start`]; each request of a user is written down.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_audited(user: &'static str) -> Result<Self> {
        Self::start_as(Options {
            audited: Some(user),
            ..Options::default()
        })
        .await
    }

    /// As [`Server::start`], with all options.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_as(options: Options) -> Result<Self> {
        let folder = tempfile::tempdir().context("make a temporary folder")?;
        let authority = Authority::new(folder.path())?;
        let mut names = ["127.0.0.1", "localhost"].map(str::to_owned).to_vec();
        names.push(options.address.to_string());
        names.extend(options.serves_pods_at.map(|ip| ip.to_string()));
        authority.server(folder.path(), names)?;
        let socket = folder.path().join("etcd.sock");
        let mut etcd = program("etcd")?;
        etcd.args(["--unsafe-no-fsync", "--logger=zap", "--log-level=warn"])
            .arg("--data-dir")
            .arg(folder.path().join("etcd"))
            .arg("--listen-client-urls")
            .arg(format!("unix://{}", socket.display()))
            .args(["--advertise-client-urls", "unix://client:0"])
            .args(["--listen-peer-urls", "unix://peer:0"])
            .args(["--initial-advertise-peer-urls", "unix://peer:0"])
            .args(["--initial-cluster", "default=unix://peer:0"])
            .current_dir(folder.path());
        let etcd = start(etcd, &folder.path().join("etcd.log"))?;
        let mut server = Self {
            authority,
            port: free_port()?,
            options,
            api: None,
            _etcd: etcd,
            folder,
        };
        server.start_api().await?;
        Ok(server)
    }

    /// Starts the API server, again where it was killed.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_api(&mut self) -> Result<()> {
        let mut api = self.spawn_api(self.port, "apiserver.log")?;
        self.ready(&mut api, self.port, "apiserver.log").await?;
        self.api = Some(api);
        Ok(())
    }

    /// A second API server on the same etcd, which changes objects while the first one is away.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn second(&self) -> Result<Second> {
        let port = free_port()?;
        let mut api = self.spawn_api(port, "second.log")?;
        self.ready(&mut api, port, "second.log").await?;
        let client = self.client_at(port, User::Admin).await?;
        Ok(Second { client, _api: api })
    }

    fn spawn_api(&self, port: u16, log: &str) -> Result<Running> {
        let folder = self.folder.path();
        let mut api = program("kube-apiserver")?;
        let file = |name: &str| folder.join(name).into_os_string();
        api.arg("--etcd-servers")
            .arg(format!("unix://{}", folder.join("etcd.sock").display()))
            .arg(format!("--bind-address={}", self.options.address))
            .arg(format!("--advertise-address={}", self.options.address))
            .arg(format!("--secure-port={port}"))
            .arg("--tls-cert-file")
            .arg(file("server.crt"))
            .arg("--tls-private-key-file")
            .arg(file("server.key"))
            .arg("--client-ca-file")
            .arg(file("ca.crt"))
            .args(["--service-account-issuer=https://kubernetes.default.svc"])
            // Tokens are signed by the server's key: its certificate is the public one.
            .arg("--service-account-key-file")
            .arg(file("server.crt"))
            .arg("--service-account-signing-key-file")
            .arg(file("server.key"))
            .arg(format!(
                "--service-cluster-ip-range={}",
                self.options.service_ranges
            ))
            .args(["--authorization-mode=RBAC", "--profiling=false"]);
        if self.options.serves_pods_at.is_none() {
            // Nobody makes the ServiceAccounts that pods would get.
            api.arg("--disable-admission-plugins=ServiceAccount");
        } else {
            let name = "kubelets-client";
            let pair = self.authority.user(folder, name, Some("system:masters"))?;
            api.arg("--allow-privileged")
                .arg("--kubelet-preferred-address-types=InternalIP")
                .arg("--kubelet-client-certificate")
                .arg(pair.certificate)
                .arg("--kubelet-client-key")
                .arg(pair.key);
        }
        if let Some(user) = self.options.audited {
            let policy = json!({
                "apiVersion": "audit.k8s.io/v1", "kind": "Policy",
                "omitStages": ["ResponseStarted", "ResponseComplete", "Panic"],
                "rules": [{"level": "Metadata", "users": [user]}, {"level": "None"}],
            });
            fs::write(folder.join("audit.yaml"), policy.to_string())?;
            api.arg("--audit-policy-file")
                .arg(file("audit.yaml"))
                .arg("--audit-log-path")
                .arg(file("audit.log"));
        }
        start(api, &folder.join(log))
    }

    /// The requests of the audited user so far: verb and path with its query.
    ///
    /// # Errors
    /// They are not written down.
    pub fn audited(&self) -> Result<Vec<String>> {
        let request = |entry: &Value| {
            let text = |name: &str| entry[name].as_str().unwrap_or_default();
            format!("{} {}", text("verb"), text("requestURI"))
        };
        Ok(self.audit()?.iter().map(request).collect())
    }

    /// The same as the API server wrote them: entries of `audit.k8s.io/v1`.
    ///
    /// # Errors
    /// As [`Server::audited`].
    pub fn audit(&self) -> Result<Vec<Value>> {
        let log = fs::read_to_string(self.folder.path().join("audit.log"))?;
        let entries = log.lines().map(serde_json::from_str);
        Ok(entries.collect::<serde_json::Result<_>>()?)
    }

    /// As [`Server::kubeconfig`], but through another port of this machine.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn kubeconfig_through(&self, port: u16, user: User) -> Result<PathBuf> {
        let path = self
            .folder
            .path()
            .join(format!("through-{port}.kubeconfig"));
        fs::write(&path, self.kubeconfig_at(port, user)?)?;
        Ok(path)
    }

    async fn ready(&self, api: &mut Running, port: u16, log: &str) -> Result<()> {
        let client = self.client_at(port, User::Admin).await?;
        let deadline = Instant::now() + START;
        loop {
            let request = hyper::Request::get("/readyz").body(Vec::new())?;
            let answer = client.request_text(request).await;
            if answer.is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline || api.0.try_wait()?.is_some() {
                let log = fs::read_to_string(self.folder.path().join(log)).unwrap_or_default();
                let from = log.len().saturating_sub(3000);
                bail!(
                    "the API server ended, or is not ready after {START:?}: {answer:?}\n{}",
                    log.get(from..).unwrap_or(&log)
                );
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Kills the API server; etcd keeps what it had.
    pub fn kill_api(&mut self) {
        self.api = None;
    }

    /// Stops the API server's process without ending it, or lets it go on: it accepts connections and
    /// says nothing.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&self, is_frozen: bool) -> Result<()> {
        let api = self.api.as_ref().context("the API server does not run")?;
        let signal = match is_frozen {
            true => Signal::SIGSTOP,
            false => Signal::SIGCONT,
        };
        let pid = i32::try_from(api.0.id())?;
        kill(Pid::from_raw(pid), signal).context("signal the API server")
    }

    /// A client of a user.
    ///
    /// # Errors
    /// The configuration is not one.
    pub async fn client(&self, user: User) -> Result<Client> {
        self.client_at(self.port, user).await
    }

    async fn client_at(&self, port: u16, user: User) -> Result<Client> {
        Client::try_from(self.config_at(port, user).await?).context("make a client")
    }

    /// The configuration of a user.
    ///
    /// # Errors
    /// The configuration is not one.
    pub async fn config(&self, user: User) -> Result<Config> {
        self.config_at(self.port, user).await
    }

    async fn config_at(&self, port: u16, user: User) -> Result<Config> {
        let text = self.kubeconfig_at(port, user)?;
        let parsed = Kubeconfig::from_yaml(&text).context("read the kubeconfig")?;
        Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default())
            .await
            .context("use the kubeconfig")
    }

    /// A kubeconfig of a user, as a file that goes with the server.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn kubeconfig(&self, user: User) -> Result<PathBuf> {
        let name = match user {
            User::Admin => "admin",
            User::Named(name) => name,
        };
        let path = self.folder.path().join(format!("{name}.kubeconfig"));
        fs::write(&path, self.kubeconfig_at(self.port, user)?)?;
        Ok(path)
    }

    /// A configuration that reads a token from a file each time that it must.
    ///
    /// # Errors
    /// The configuration is not one.
    pub async fn config_by_token(&self, file: &Path) -> Result<Config> {
        self.config_of(self.port, &json!({"tokenFile": file})).await
    }

    async fn config_of(&self, port: u16, user: &Value) -> Result<Config> {
        let text = self.kubeconfig_text(port, user).to_string();
        let parsed = Kubeconfig::from_yaml(&text).context("read the kubeconfig")?;
        Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default())
            .await
            .context("use the kubeconfig")
    }

    fn kubeconfig_at(&self, port: u16, user: User) -> Result<String> {
        let (name, group) = match user {
            User::Admin => ("admin", Some("system:masters")),
            User::Named(name) => (name, None),
        };
        let pair = self.authority.user(self.folder.path(), name, group)?;
        let user = json!({"client-certificate": pair.certificate, "client-key": pair.key});
        // JSON is YAML.
        Ok(self.kubeconfig_text(port, &user).to_string())
    }

    fn kubeconfig_text(&self, port: u16, user: &Value) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {
                "server": format!("https://{}", SocketAddr::new(self.options.address, port)),
                "certificate-authority": self.folder.path().join("ca.crt"),
            }}],
            "users": [{"name": "user", "user": user}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "user"}}],
        })
    }

    /// Where the API server listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What all files of the cluster lie in.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// A second API server on the same etcd.
pub struct Second {
    /// Its client, of the admin.
    pub client: Client,
    _api: Running,
}

/// A program of Kubernetes: ends when the thread ends that started it, in whatever way.
///
/// # Errors
/// It is not there.
pub fn program(name: &str) -> Result<Command> {
    let folder = ["WHYDROP_KUBE_PROGRAMS", "KUBEBUILDER_ASSETS"]
        .iter()
        .find_map(std::env::var_os)
        .map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/kube/bin"),
            PathBuf::from,
        );
    let path = folder.join(name);
    ensure!(
        path.is_file(),
        "{} is not there: `cargo xtask test kube` builds it, or KUBEBUILDER_ASSETS names its folder",
        path.display()
    );
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(path);
    Ok(command)
}

/// Starts a program whose output goes to a file.
pub(crate) fn start(mut command: Command, log: &Path) -> Result<Running> {
    let file = File::create(log).with_context(|| format!("create {}", log.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    let child = command.spawn();
    Ok(Running(
        child.with_context(|| format!("start {command:?}"))?,
    ))
}
