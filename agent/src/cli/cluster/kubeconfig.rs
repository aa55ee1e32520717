//! Which cluster is meant, and as whom: kubectl's flags over a kubeconfig, or a pod's ServiceAccount.
//!
//! | there is | then it is |
//! |---|---|
//! | `--socket` | that one agent |
//! | a flag that names a cluster, `$KUBECONFIG` or `~/.kube/config` | that cluster, and an error if it cannot be used |
//! | an agent's socket at its usual place | that one agent: so in an agent's own pod |
//! | a pod's ServiceAccount | the pod's cluster |
//! | none of these | the agent that may come to its usual place |

use std::path::PathBuf;

use anyhow::{Context as _, anyhow, ensure};
use kube::Config;
use kube::config::{
    AuthInfo, Cluster, Context, KubeConfigOptions, Kubeconfig, KubeconfigError, NamedAuthInfo,
    NamedCluster, NamedContext,
};

use crate::cli::config::{AgentsArgs, KubeArgs};

/// What context, cluster and user are called that only flags describe.
const FROM_FLAGS: &str = "whydrop-flags";

/// Who is asked.
#[derive(Debug)]
pub enum Target {
    /// One agent, by its socket.
    Local(PathBuf),
    /// All agents of a cluster.
    Cluster(Box<Account>),
}

/// A cluster and who asks it.
#[derive(Debug)]
pub struct Account {
    /// What a client is made of.
    pub config: Config,
    /// By which the same is found again, the context by its name: the current one may be another by then.
    /// `None`: a pod's ServiceAccount.
    flags: Option<KubeArgs>,
}

impl Account {
    fn of_pod() -> Option<Self> {
        let config = Config::incluster().ok()?;
        Some(Self {
            config,
            flags: None,
        })
    }

    /// Its configuration as it is now.
    ///
    /// # Errors
    /// It is not there any more, or cannot be used.
    pub async fn read_again(&self) -> anyhow::Result<Config> {
        match &self.flags {
            Some(flags) => Ok(account(flags).await?.config),
            None => Config::incluster().context("the pod's ServiceAccount"),
        }
    }
}

/// Finds out who is asked.
///
/// # Errors
/// A kubeconfig that is there, or is named by a flag, and cannot be used.
pub async fn target(args: &AgentsArgs) -> anyhow::Result<Target> {
    let local = || Ok(Target::Local(args.local_socket()));
    if args.socket.is_some() {
        return local();
    }
    if args.kube.names_a_cluster() || has_kubeconfig() {
        let account = account(&args.kube).await.context(
            "the kubeconfig cannot be used; mend it, or ask one agent on its node with --socket",
        )?;
        return Ok(Target::Cluster(Box::new(account)));
    }
    if args.local_socket().exists() {
        return local();
    }
    match Account::of_pod() {
        Some(account) => Ok(Target::Cluster(Box::new(account))),
        None => local(),
    }
}

/// The configuration of a cluster, where no agent is meant: that of a kubeconfig, else of a pod's
/// ServiceAccount.
///
/// # Errors
/// There is neither, or it cannot be used.
pub async fn cluster(args: &KubeArgs) -> anyhow::Result<Config> {
    if args.names_a_cluster() || has_kubeconfig() {
        let account = account(args).await.context("the kubeconfig cannot be used");
        return Ok(account?.config);
    }
    let account = Account::of_pod().context(
        "no configuration of a cluster: set KUBECONFIG, give --kubeconfig, or run in a pod with a \
         ServiceAccount",
    );
    Ok(account?.config)
}

impl KubeArgs {
    /// Whether a cluster is asked for by a flag; those about the account alone need one beside them.
    fn names_a_cluster(&self) -> bool {
        self.kubeconfig.is_some()
            || [&self.context, &self.cluster, &self.user, &self.server]
                .iter()
                .any(|flag| flag.is_some())
    }
}

/// Whether there is a kubeconfig at the places that kubectl looks at.
fn has_kubeconfig() -> bool {
    let given = std::env::var_os("KUBECONFIG").filter(|paths| !paths.is_empty());
    let home = || std::env::home_dir().map(|home| home.join(".kube/config"));
    given.is_some() || home().is_some_and(|path| path.exists())
}

async fn account(flags: &KubeArgs) -> anyhow::Result<Account> {
    let kubeconfig = match &flags.kubeconfig {
        Some(path) => Kubeconfig::read_from(path).map_err(|error| said(error, flags))?,
        // A server alone needs no file.
        None if flags.server.is_some() && !has_kubeconfig() => Kubeconfig::default(),
        None => Kubeconfig::read().map_err(|error| said(error, flags))?,
    };
    let (kubeconfig, options) = with_flags(kubeconfig, flags)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
    let mut flags = flags.clone();
    let config = config.map_err(|error| said(error, &flags))?;
    flags.context = options.context.filter(|name| name != FROM_FLAGS);
    Ok(Account {
        config,
        flags: Some(flags),
    })
}

/// kube's errors as one line, with what to do and, where they do not name it, the file.
fn said(error: KubeconfigError, flags: &KubeArgs) -> anyhow::Error {
    let what = match &error {
        KubeconfigError::ReadConfig(..) => return anyhow!("{error}"),
        KubeconfigError::CurrentContextNotSet => {
            "no current context is set; choose one with --context".to_owned()
        }
        KubeconfigError::LoadContext(name) => format!("there is no context {name:?}"),
        KubeconfigError::LoadClusterOfContext(name) => format!("there is no cluster {name:?}"),
        // The file's own text is behind its first line.
        error => error
            .to_string()
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned(),
    };
    let usual = || std::env::var_os("KUBECONFIG").filter(|paths| !paths.is_empty());
    let file = flags
        .kubeconfig
        .clone()
        .or_else(|| usual().map(PathBuf::from));
    let file = file.unwrap_or_else(|| PathBuf::from("~/.kube/config"));
    anyhow!("{}: {what}", file.display())
}

/// The kubeconfig with the flags in place of what it says itself, and which of its entries are meant.
fn with_flags(
    mut kubeconfig: Kubeconfig,
    flags: &KubeArgs,
) -> anyhow::Result<(Kubeconfig, KubeConfigOptions)> {
    let name = flags.context.clone().or(kubeconfig.current_context.clone());
    let name = match name.filter(|name| !name.is_empty()) {
        Some(name) => name,
        None => {
            kubeconfig.contexts.push(NamedContext {
                name: FROM_FLAGS.to_owned(),
                context: Some(Context::default()),
                ..NamedContext::default()
            });
            // Without a server there is still nobody to ask.
            let Some(_) = flags.server.as_ref().or(flags.cluster.as_ref()) else {
                return Err(said(KubeconfigError::CurrentContextNotSet, flags));
            };
            FROM_FLAGS.to_owned()
        }
    };
    let known = kubeconfig.contexts.iter().find(|known| known.name == name);
    let context = known
        .and_then(|known| known.context.clone())
        .ok_or_else(|| said(KubeconfigError::LoadContext(name.clone()), flags))?;
    let chosen = |flag: &Option<String>, known: Option<String>| {
        let name = flag.clone().or(known).filter(|name| !name.is_empty());
        name.unwrap_or_else(|| FROM_FLAGS.to_owned())
    };
    let cluster = chosen(&flags.cluster, Some(context.cluster));
    let user = chosen(&flags.user, context.user);
    if let Some(named) = &flags.user {
        let is_known = kubeconfig.auth_infos.iter().any(|u| u.name == *named);
        ensure!(is_known, "there is no user {named:?}");
    }
    override_cluster(&mut kubeconfig, &cluster, flags)?;
    override_user(&mut kubeconfig, &user, flags);
    let options = KubeConfigOptions {
        context: Some(name),
        cluster: Some(cluster),
        user: Some(user),
    };
    Ok((kubeconfig, options))
}

fn override_cluster(
    kubeconfig: &mut Kubeconfig,
    name: &str,
    flags: &KubeArgs,
) -> anyhow::Result<()> {
    let at = kubeconfig.clusters.iter().position(|c| c.name == name);
    let cluster: &mut Cluster = match (at, &flags.server) {
        (Some(at), _) => kubeconfig.clusters[at].cluster.get_or_insert_default(),
        // kube says that it is not there.
        (None, None) => return Ok(()),
        (None, Some(_)) => {
            kubeconfig.clusters.push(NamedCluster {
                name: name.to_owned(),
                ..NamedCluster::default()
            });
            let last = kubeconfig.clusters.len() - 1;
            kubeconfig.clusters[last].cluster.get_or_insert_default()
        }
    };
    if let Some(server) = &flags.server {
        let has_scheme = server.starts_with("https://") || server.starts_with("http://");
        ensure!(
            has_scheme,
            "--server {server:?}: expected a URL, as https://10.0.0.1:6443"
        );
        cluster.server = Some(server.clone());
    }
    if let Some(file) = &flags.certificate_authority {
        cluster.certificate_authority = Some(file.clone());
        cluster.certificate_authority_data = None;
    }
    if let Some(name) = &flags.tls_server_name {
        cluster.tls_server_name = Some(name.clone());
    }
    if flags.insecure_skip_tls_verify {
        cluster.insecure_skip_tls_verify = Some(true);
    }
    Ok(())
}

fn override_user(kubeconfig: &mut Kubeconfig, name: &str, flags: &KubeArgs) {
    let at = kubeconfig.auth_infos.iter().position(|u| u.name == name);
    let at = at.unwrap_or_else(|| {
        kubeconfig.auth_infos.push(NamedAuthInfo {
            name: name.to_owned(),
            ..NamedAuthInfo::default()
        });
        kubeconfig.auth_infos.len() - 1
    });
    let user: &mut AuthInfo = kubeconfig.auth_infos[at].auth_info.get_or_insert_default();
    if let Some(token) = &flags.token {
        // In place of every other way to get one.
        user.token = Some(token.clone().into());
        (user.token_file, user.exec, user.auth_provider) = (None, None, None);
        (user.username, user.password) = (None, None);
    }
    if let Some(file) = &flags.client_certificate {
        user.client_certificate = Some(file.clone());
        user.client_certificate_data = None;
    }
    if let Some(file) = &flags.client_key {
        user.client_key = Some(file.clone());
        user.client_key_data = None;
    }
    if let Some(name) = &flags.as_user {
        user.impersonate = Some(name.clone());
    }
    if !flags.as_group.is_empty() {
        user.impersonate_groups = Some(flags.as_group.clone());
    }
    if let Some(uid) = &flags.as_uid {
        user.impersonate_uid = Some(uid.clone());
    }
}

#[cfg(test)]
mod tests;
