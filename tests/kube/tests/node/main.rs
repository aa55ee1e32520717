//! The agent as `deploy/` runs it, on a real node, beside real pods that lose packets.
//!
//! One cluster for all of it, as a start takes ten seconds: the manifests, then drops and their names, then a
//! scrape by the real Prometheus, then a restart.

mod manifests;
mod prometheus;
mod restart;
mod workloads;

use std::time::Instant;

use anyhow::Result;
use whydrop_kube_tests::cluster::Cluster;
use whydrop_kube_tests::made;

#[test]
fn on_a_real_node() -> Result<()> {
    let images = [made("WHYDROP_IMAGE")?, made("WHYDROP_BUSYBOX_IMAGE")?];
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let started = Instant::now();
    runtime.block_on(async {
        let step = |what: &str| println!("{:6.1} s  {what}", started.elapsed().as_secs_f64());
        let cluster = Cluster::start(&images).await?;
        step("the node is ready");
        manifests::are_accepted(&cluster)?;
        step("the API server accepts every manifest");
        manifests::apply(&cluster)?;
        manifests::has_its_rights_and_no_more(&cluster)?;
        step("the agent's pod is ready");
        let pods = workloads::Pods::start(&cluster).await?;
        step("the workloads run");
        pods.lose_packets()?;
        step("drops have their names");
        prometheus::scrapes(&pods)?;
        step("Prometheus has them");
        restart::loses_nothing_that_it_saw(&pods)?;
        step("the agent was restarted");
        Ok(())
    })
}
