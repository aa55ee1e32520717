//! As whom the API server is asked, read anew when it does not accept that any more.
//!
//! A token file and a plugin that says when its token expires are refreshed in time by kube. This is for all
//! else: somebody logged in again, a certificate was renewed, a token was revoked.

use std::sync::Mutex;

use anyhow::{Context as _, anyhow};
use k8s_openapi::api::core::v1::Pod;
use kube::client::{AuthError, ClientBuilder};
use kube::{Api, Client, Config};
use tokio::time::{Duration, Instant, sleep_until};

use super::kubeconfig::Account;
use crate::cli::format::clean;
use crate::cli::sentence;
use crate::cluster::watch::causes;
use crate::sync::lock;

/// Between two readings: each may run a credential plugin, and that may ask somebody.
const PAUSE: Duration = Duration::from_secs(10);

/// Why the credentials could not be read anew.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the API server does not accept the credentials (401), and they cannot be read anew: {0}")]
pub struct NotRenewed(String);

/// The agents' pods as one account sees them.
pub struct Login {
    account: Account,
    namespace: String,
    current: Mutex<Current>,
    /// When the credentials were last read anew. Held by the one who does.
    renewed: tokio::sync::Mutex<Option<Instant>>,
}

struct Current {
    pods: Api<Pod>,
    /// How often it was tried to read them anew.
    generation: u64,
}

impl Login {
    /// Must be called on a tokio runtime.
    ///
    /// # Errors
    /// If certificates, keys or a credential plugin cannot be used.
    pub fn new(account: Account, namespace: &str) -> anyhow::Result<Self> {
        let client = client(account.config.clone())?;
        Ok(Self {
            account,
            namespace: namespace.to_owned(),
            current: Mutex::new(Current {
                pods: Api::namespaced(client, namespace),
                generation: 0,
            }),
            renewed: tokio::sync::Mutex::default(),
        })
    }

    /// The pods, as whoever is logged in now sees them.
    pub fn pods(&self) -> Api<Pod> {
        lock(&self.current).pods.clone()
    }

    /// Which login that is.
    pub fn generation(&self) -> u64 {
        lock(&self.current).generation
    }

    /// Reads the credentials anew, unless somebody did since `refused`; waits where that was a moment ago.
    ///
    /// # Errors
    /// They cannot be read. Those that there are stay.
    pub async fn renew(&self, refused: u64) -> Result<(), NotRenewed> {
        let mut renewed = self.renewed.lock().await;
        if self.generation() != refused {
            return Ok(());
        }
        if let Some(last) = *renewed {
            sleep_until(last + PAUSE).await;
        }
        let client = self.read().await;
        *renewed = Some(Instant::now());
        let mut current = lock(&self.current);
        current.generation += 1;
        let client = client.map_err(|error| NotRenewed(sentence(&error)))?;
        current.pods = Api::namespaced(client, &self.namespace);
        Ok(())
    }

    async fn read(&self) -> anyhow::Result<Client> {
        let config = self.account.read_again().await?;
        // A plugin that waits for somebody must not hold up the agents that are followed.
        let client = tokio::task::spawn_blocking(move || client(config));
        client.await.context("reading was broken off")?
    }
}

fn client(mut config: Config) -> anyhow::Result<Client> {
    // Each failure is to be said with its own reason, so it is tried again by whoever asks.
    config.default_retry = false;
    let url = config.cluster_url.to_string();
    let plugin = config.auth_info.exec.as_ref();
    let plugin = plugin.and_then(|exec| exec.command.clone());
    let builder = ClientBuilder::try_from(config)
        .map_err(|error| said(error, &plugin.unwrap_or_default()))
        .with_context(|| format!("no client for {url}"))?;
    Ok(builder.build())
}

/// kube's error; one of a credential plugin with the plugin's name and what it said last.
fn said(error: kube::Error, plugin: &str) -> anyhow::Error {
    match error {
        kube::Error::Auth(AuthError::AuthExecStart(error)) => {
            anyhow!("the credential plugin {plugin:?} cannot be run: {error}; is it installed?")
        }
        kube::Error::Auth(AuthError::AuthExecRun { out, .. }) => {
            let said = String::from_utf8_lossy(&out.stderr);
            let last = said.lines().rev().find(|line| !line.trim().is_empty());
            let last = clean(last.unwrap_or("it says nothing")).into_owned();
            anyhow!(
                "the credential plugin {plugin:?} failed ({}): {last}",
                out.status
            )
        }
        // Of what cannot be parsed, the text itself is behind the first line.
        error => {
            let said = causes(&error);
            let first = said.lines().next().unwrap_or_default();
            match plugin {
                "" => anyhow!("{}", clean(first)),
                plugin => anyhow!("{}, of the credential plugin {plugin:?}", clean(first)),
            }
        }
    }
}
