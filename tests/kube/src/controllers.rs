//! kube-controller-manager and kube-scheduler as processes: pods of workloads, their places, ServiceAccounts.

use std::path::Path;

use anyhow::Result;

use crate::server::{Running, program, start};

/// Both of them. Dropping them kills them.
pub struct Controllers {
    _manager: Running,
    _scheduler: Running,
}

impl Controllers {
    /// Starts both; their logs and files lie in a folder, which has the cluster's `ca.crt`. Nodes get the
    /// pods' range, an IPv4 /25: so there is one node.
    ///
    /// # Errors
    /// A program is missing.
    pub fn start(folder: &Path, kubeconfig: &Path, pod_range: &str) -> Result<Self> {
        let spawn = |name: &str, arguments: &[&str]| {
            let mut command = program(name)?;
            command
                .arg("--kubeconfig")
                .arg(kubeconfig)
                .args(["--leader-elect=false", "--secure-port=0"])
                .args(arguments)
                .current_dir(folder);
            start(command, &folder.join(format!("{name}.log")))
        };
        let range = format!("--cluster-cidr={pod_range}");
        let ranges = ["--allocate-node-cidrs", &range, "--node-cidr-mask-size=25"];
        let tokens = ["--root-ca-file=ca.crt"];
        Ok(Self {
            _manager: spawn(
                "kube-controller-manager",
                &[&ranges[..], &tokens[..]].concat(),
            )?,
            _scheduler: spawn("kube-scheduler", &[])?,
        })
    }
}
