//! kube-proxy as a process, in the network namespace of the thread that starts it.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use whydrop_tests::lab::{Host, Lab};

use crate::server::program;

/// How a kube-proxy programs the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Tables of its own.
    Nftables,
    /// The default of nearly every cluster.
    Iptables,
}

/// A running kube-proxy. Dropping it kills it; its rules go with the namespace.
pub struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Proxy {
    /// Starts it at the lab's router, which is the node, and waits until its rules have an address.
    ///
    /// # Errors
    /// It is missing, or does not get to it; shows its log.
    pub fn start(lab: &Lab, kubeconfig: &Path, mode: Mode, address: &str) -> Result<Self> {
        let path = kubeconfig.with_file_name("kube-proxy.log");
        let log = File::create(&path).context("create the log")?;
        let (mode, rules) = match mode {
            Mode::Nftables => ("nftables", "nft list ruleset"),
            Mode::Iptables => ("iptables", "iptables-save"),
        };
        let rules = match address.contains(':') && mode == "iptables" {
            true => "ip6tables-save",
            false => rules,
        };
        let child = program("kube-proxy")?
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args(["--hostname-override", &lab.node(), "--proxy-mode", mode])
            // The limits of conntrack are the machine's, not the namespace's.
            .args([
                "--conntrack-max-per-core=0",
                "--conntrack-tcp-timeout-established=0s",
            ])
            .args(["--conntrack-tcp-timeout-close-wait=0s"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start kube-proxy")?;
        let mut proxy = Self(child);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !lab.run(Host::Router, rules)?.contains(address) {
            ensure!(
                Instant::now() < deadline && proxy.0.try_wait()?.is_none(),
                "kube-proxy has no rule for {address}:\n{}",
                std::fs::read_to_string(&path).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(proxy)
    }
}
