//! The API server's objects.

use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use kube::Client;

use crate::answer::Ground;
use crate::answer::missing::Missing;
use crate::answer::origin::Origin;
use crate::cli::cluster::kubeconfig;
use crate::cli::config::KubeArgs;
use crate::cluster::ObjectKind;
use crate::cluster::list::{Listed, list};
use crate::policy::world::World;

/// A client of the cluster that kubectl would ask, and the cluster's address.
async fn client(args: &KubeArgs) -> Result<(Client, String)> {
    let config = kubeconfig::cluster(args).await?;
    let url = config.cluster_url.to_string();
    let client = Client::try_from(config)
        .map_err(|error| anyhow!(error).context(format!("no client for {url}")))?;
    Ok((client, url.trim_end_matches('/').to_owned()))
}

/// All objects that count.
///
/// # Errors
/// There is no cluster, it does not answer, or pods may not be listed.
pub fn ground(args: &KubeArgs) -> Result<Ground> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (client, url) = client(args).await?;
        let listed = list(&client)
            .await
            .map_err(|error| anyhow!(error).context(format!("asking {url}")))?;
        from(listed, url)
    })
}

fn from(listed: Listed, url: String) -> Result<Ground> {
    let mut missing = Missing::default();
    for (kind, why) in listed.missing {
        if kind == ObjectKind::Pod {
            bail!("{why}; without pods nothing can be told");
        }
        missing.add(kind, why);
    }
    Ok(Ground {
        world: Arc::new(World::new(&listed.objects)),
        origin: Origin::Cluster {
            url,
            time: listed.time,
        },
        missing,
        skipped: listed.malformed,
    })
}
