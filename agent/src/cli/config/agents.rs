//! Where the agents are: a local socket, or a cluster and the account that asks it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::BoolishValueParser;

use super::{DEFAULT_SOCKET, duration};

/// Namespace of the agents, as deploy/base has it.
pub const AGENT_NAMESPACE: &str = "whydrop";
/// Label of the agents' pods, as deploy/base has it.
pub const AGENT_SELECTOR: &str = "app.kubernetes.io/name=whydrop";

/// Which agents are asked.
#[derive(Clone, Debug, Args)]
pub struct AgentsArgs {
    /// One agent, by its local API [default: all agents of the cluster where there is a kubeconfig;
    /// else /run/whydrop/agent.sock, or in a pod without it the cluster of the pod's ServiceAccount]
    #[arg(
        long,
        value_name = "PATH",
        env = "WHYDROP_SOCKET",
        help_heading = "Agents"
    )]
    pub socket: Option<PathBuf>,

    /// Namespace of the agents' pods
    #[arg(long, value_name = "NS", default_value = AGENT_NAMESPACE,
          env = "WHYDROP_AGENT_NAMESPACE", help_heading = "Agents")]
    pub agent_namespace: String,

    /// Labels of the agents' pods
    #[arg(long, value_name = "LABELS", default_value = AGENT_SELECTOR,
          env = "WHYDROP_AGENT_SELECTOR", help_heading = "Agents")]
    pub agent_selector: String,

    /// The cluster and who asks it
    #[command(flatten)]
    pub kube: KubeArgs,
}

impl AgentsArgs {
    /// The local socket that is meant where no cluster is.
    pub fn local_socket(&self) -> PathBuf {
        let socket = self.socket.clone();
        socket.unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET))
    }
}

/// kubectl's global flags, with its names and meaning.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Cluster (as kubectl's)")]
pub struct KubeArgs {
    /// The kubeconfig [default: $KUBECONFIG, else ~/.kube/config]
    #[arg(long, value_name = "PATH", env = "WHYDROP_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,

    /// Its context [default: its current one]
    #[arg(long, value_name = "NAME", env = "WHYDROP_CONTEXT")]
    pub context: Option<String>,

    // WHYDROP_CLUSTER is the agent's `--cluster auto|kube|none`.
    /// Its cluster
    #[arg(long, value_name = "NAME", env = "WHYDROP_KUBE_CLUSTER")]
    pub cluster: Option<String>,

    /// Its user
    #[arg(long, value_name = "NAME", env = "WHYDROP_USER")]
    pub user: Option<String>,

    /// Address of the API server
    #[arg(short, long, value_name = "URL", env = "WHYDROP_SERVER")]
    pub server: Option<String>,

    /// Bearer token for the API server
    #[arg(
        long,
        value_name = "TOKEN",
        env = "WHYDROP_TOKEN",
        hide_env_values = true
    )]
    pub token: Option<String>,

    /// User to impersonate
    #[arg(long = "as", value_name = "USER", env = "WHYDROP_AS")]
    pub as_user: Option<String>,

    /// Group to impersonate; may be repeated
    #[arg(long, value_name = "GROUP", env = "WHYDROP_AS_GROUP")]
    pub as_group: Vec<String>,

    /// UID to impersonate
    #[arg(long, value_name = "UID", env = "WHYDROP_AS_UID")]
    pub as_uid: Option<String>,

    /// How long one request may take to be answered, as 5s; 0: 30 s
    #[arg(long, value_name = "DURATION", default_value = "0", value_parser = request_timeout,
          env = "WHYDROP_REQUEST_TIMEOUT")]
    pub request_timeout: Duration,

    /// Do not check the API server's certificate, which makes the connection insecure
    #[arg(long, env = "WHYDROP_INSECURE_SKIP_TLS_VERIFY", value_parser = BoolishValueParser::new())]
    pub insecure_skip_tls_verify: bool,

    /// File of the certificate authority for the API server's certificate
    #[arg(long, value_name = "PATH", env = "WHYDROP_CERTIFICATE_AUTHORITY")]
    pub certificate_authority: Option<String>,

    /// File of the client certificate
    #[arg(long, value_name = "PATH", env = "WHYDROP_CLIENT_CERTIFICATE")]
    pub client_certificate: Option<String>,

    /// File of the client certificate's key
    #[arg(long, value_name = "PATH", env = "WHYDROP_CLIENT_KEY")]
    pub client_key: Option<String>,

    /// Name that the API server's certificate must have [default: the server's host name]
    #[arg(long, value_name = "NAME", env = "WHYDROP_TLS_SERVER_NAME")]
    pub tls_server_name: Option<String>,
}

/// As kubectl reads it: a duration, a bare number of seconds, or 0 for none of one's own.
fn request_timeout(s: &str) -> Result<Duration, String> {
    match s.parse() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => duration(s),
    }
}
