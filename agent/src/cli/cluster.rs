//! All agents of a cluster, asked through the API server: `exec` of an agent's own binary in its pod, so
//! Kubernetes' RBAC decides who may see drops, and every selection is made on the node.
//!
//! | module | is |
//! |---|---|
//! | [`kubeconfig`] | which cluster, and as whom |
//! | [`login`] | the same when it is not accepted any more |
//! | [`agents`] | the agents' pods, listed and watched |
//! | [`arguments`] | what the whydrop in a pod is asked |
//! | [`exec`] | one command in a pod, [`lines`] what it prints |
//! | [`node`] | the lines of one node, through breaks by [`resume`] |
//! | [`merge`] | lines of many nodes in the order of time |
//! | [`history`], [`follow`] | `whydrop tail`: what there is, and what comes |
//! | [`status`] | `whydrop status`: a row for each node |

use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::sync::Semaphore;

use self::kubeconfig::Account;
use self::login::Login;
use crate::cli::config::AgentsArgs;
use crate::selection::Selection;

pub mod agents;
pub mod arguments;
pub mod exec;
pub mod follow;
pub mod history;
pub mod kubeconfig;
pub mod lines;
pub mod login;
pub mod merge;
pub mod node;
pub mod resume;
pub mod status;

/// Execs that are being opened at once: each costs the API server and a kubelet a connection and a process.
/// With 500 nodes and 0.1 s for each it takes less than 2 s until all are open.
pub const OPENING: usize = 32;
/// How long a request may take, unless `--request-timeout` says otherwise.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The agents of a cluster, as one account sees them.
pub struct Agents {
    login: Login,
    namespace: String,
    selector: String,
    /// Which lines are wanted, and by `--node-name` which agents are asked.
    selection: Selection,
    /// How long a request may take.
    pub timeout: Duration,
    opening: Arc<Semaphore>,
}

impl Agents {
    /// Asks nobody yet. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// If certificates, keys or a credential plugin cannot be used.
    pub fn new(account: Account, args: &AgentsArgs, selection: Selection) -> anyhow::Result<Self> {
        let login = Login::new(account, &args.agent_namespace)?;
        allow_connections();
        Ok(Self {
            login,
            namespace: args.agent_namespace.clone(),
            selector: args.agent_selector.clone(),
            selection,
            timeout: match args.kube.request_timeout {
                Duration::ZERO => TIMEOUT,
                given => given,
            },
            opening: Arc::new(Semaphore::new(OPENING)),
        })
    }
}

/// Each followed node is a connection, and the usual soft limit is 1024 files.
fn allow_connections() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // Where it is refused, the nodes beyond it are told of.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
