//! A real node: containerd and a kubelet, in the network namespace of the thread that starts them.
//!
//! They have PID and mount namespaces of their own. So with the first process there the kernel ends every
//! container and forgets every mount, in whatever way the test ends; and what they write to the machine's
//! usual folders (`/run/whydrop` of the agent's pod among them) lies in memory and goes with them. What
//! remains are the cgroups below `kubepods`, removed when the node is dropped, or by the next one.
//!
//! That name is the machine's own, so one node at a time: the next one waits, and it does not start beside a
//! kubelet that is in use.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::fcntl::Flock;
use serde_json::json;
use whydrop_tests::lab;

use crate::server::{Running, program, start};

/// The image of pods, and of what holds a pod's namespaces; xtask/src/kube.rs makes it.
pub const BUSYBOX: &str = "localhost/busybox:1";
/// Nothing of a node takes this long to start or to end.
const DEADLINE: Duration = Duration::from_secs(60);
/// What a kubelet and containerd write to.
const FOLDERS: [&str; 4] = ["/run", "/var/lib", "/var/log", "/opt"];
/// What a kubelet sets, and to what. They are the machine's: it gets files of its own in their place.
const SYSCTLS: [(&str, u32); 6] = [
    ("vm/overcommit_memory", 1),
    ("vm/panic_on_oom", 0),
    ("kernel/panic", 10),
    ("kernel/panic_on_oops", 1),
    ("kernel/keys/root_maxkeys", 1_000_000),
    ("kernel/keys/root_maxbytes", 25_000_000),
];

/// A running node. Dropping it ends it and removes what it left.
pub struct Node {
    /// In this order: who serves the kubelet outlives it.
    _kubelet: Running,
    _containerd: Running,
    first: First,
    folder: PathBuf,
    _lock: Flock<File>,
}

/// What a node is called, and where.
pub struct Place<'a> {
    /// The node's name.
    pub name: &'a str,
    /// Its address, of this namespace.
    pub address: &'a str,
    /// Its pods' addresses.
    pub pod_range: &'a str,
    /// Image archives that its containerd has from the start.
    pub images: &'a [PathBuf],
}

impl Node {
    /// Starts both; that the node becomes ready, the API server tells. Their logs lie in a folder.
    ///
    /// # Errors
    /// A program is missing, does not start, or the machine has a kubelet of its own.
    pub fn start(folder: &Path, kubeconfig: &Path, place: &Place<'_>) -> Result<Self> {
        let lock = lab::only_one("node")?;
        ensure!(
            !is_used()?,
            "this machine has a kubelet of its own: processes run in a cgroup `kubepods`"
        );
        remove_cgroups()?;
        let first = First::start()?;
        let config = folder.join("containerd.toml");
        let cni = folder.join("cni");
        fs::create_dir_all(&cni)?;
        fs::write(cni.join("10-lab.conflist"), pod_network(place.pod_range))?;
        fs::write(&config, containerd_config(&cni))?;
        let mut command = first.command("containerd");
        command.arg("--config").arg(config);
        let containerd = start(command, &folder.join("containerd.log"))?;
        let deadline = Instant::now() + DEADLINE;
        while output(first.command("ctr").arg("version")).is_err() {
            ensure!(
                Instant::now() < deadline,
                "containerd does not answer:\n{}",
                end_of(&folder.join("containerd.log"))
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        for image in place.images {
            let import = ["--namespace=k8s.io", "images", "import"];
            output(first.command("ctr").args(import).arg(image))?;
        }
        let config = folder.join("kubelet.yaml");
        fs::write(&config, kubelet_config(&folder.join("ca.crt")))?;
        let mut command = first.within(program("kubelet")?);
        command
            .arg("--config")
            .arg(config)
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args(["--hostname-override", place.name])
            .args(["--node-ip", place.address]);
        let kubelet = start(command, &folder.join("kubelet.log"))?;
        Ok(Self {
            _kubelet: kubelet,
            _containerd: containerd,
            first,
            folder: folder.to_owned(),
            _lock: lock,
        })
    }

    /// A command on the node: it sees its processes and files.
    pub fn command(&self, program: &str) -> Command {
        self.first.command(program)
    }

    /// The ends of the logs, for a test that fails.
    pub fn logs(&self) -> String {
        ["containerd.log", "kubelet.log"]
            .map(|name| format!("{name}:\n{}", end_of(&self.folder.join(name))))
            .join("\n")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.first.end().and_then(|()| remove_cgroups()) {
            eprintln!("the node leaves something: {error:#}");
        }
    }
}

/// The first process of the node's PID namespace, which takes all others with it.
struct First(Child);

impl First {
    fn start() -> Result<Self> {
        let mut script = "set -e\n".to_owned();
        for folder in FOLDERS {
            script += &format!("mount -t tmpfs node {folder}\n");
        }
        script += "mkdir /run/sysctls\n";
        for (number, (key, value)) in SYSCTLS.iter().enumerate() {
            let file = format!("/run/sysctls/{number}");
            script += &format!("echo {value} > {file}; mount --bind {file} /proc/sys/{key}\n");
        }
        // A shell waits for whatever child ends; the last command must not take its place.
        script += "touch /run/node-is-there; sleep infinity; true";
        let first = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid"])
            .args(["--fork", "--kill-child", "--mount-proc", "sh", "-c"])
            .arg(script)
            .stdin(Stdio::null())
            .spawn()
            .context("start the node's first process: is util-linux installed?")?;
        let mut first = Self(first);
        let deadline = Instant::now() + DEADLINE;
        while output(first.command("test").args(["-e", "/run/node-is-there"])).is_err() {
            if let Some(status) = first.0.try_wait()? {
                bail!("the node's first process ended ({status}): may root mount here?");
            }
            ensure!(
                Instant::now() < deadline,
                "the node's namespaces are not there"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(first)
    }

    fn command(&self, program: &str) -> Command {
        self.within(Command::new(program))
    }

    /// A command, inside the node's namespaces.
    fn within(&self, command: Command) -> Command {
        let namespaces = format!("/proc/{}/ns", self.0.id());
        let mut within = Command::new("nsenter");
        within
            .arg(format!("--mount={namespaces}/mnt"))
            .arg(format!("--pid={namespaces}/pid_for_children"))
            .arg("--")
            .arg(command.get_program())
            .args(command.get_args());
        within
    }

    fn end(&mut self) -> Result<()> {
        // `unshare` takes the first process with it, and that one all others.
        self.0.kill().context("end the node's first process")?;
        self.0.wait().context("wait for the node's first process")?;
        Ok(())
    }
}

fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn end_of(log: &Path) -> String {
    let log = fs::read_to_string(log).unwrap_or_default();
    let from = log.len().saturating_sub(3000);
    log.get(from..).unwrap_or(&log).to_owned()
}

/// Pods behind a veth each, whose addresses the node routes.
fn pod_network(range: &str) -> String {
    json!({"cniVersion": "0.4.0", "name": "lab", "plugins": [
        {"type": "ptp", "ipMasq": false, "ipam": {
            "type": "host-local", "ranges": [[{"subnet": range}]], "routes": [{"dst": "0.0.0.0/0"}],
        }},
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]})
    .to_string()
}

fn containerd_config(cni: &Path) -> String {
    format!(
        r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{BUSYBOX}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{}"
"#,
        cni.display()
    )
}

fn kubelet_config(ca: &Path) -> String {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "failSwapOn": false,
        "failCgroupV1": false,
        "enforceNodeAllocatable": [],
        "localStorageCapacityIsolation": false,
        // A full disk of the machine is none of the node's.
        "evictionHard": {"nodefs.available": "0%", "imagefs.available": "0%", "nodefs.inodesFree": "0%"},
        "imageGCHighThresholdPercent": 100,
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "resolvConf": "",
        "readOnlyPort": 0,
        "healthzPort": 0,
        "authentication": {
            "anonymous": {"enabled": false}, "webhook": {"enabled": false},
            "x509": {"clientCAFile": ca},
        },
        "authorization": {"mode": "AlwaysAllow"},
    })
    .to_string()
}

/// The cgroups of pods, one in each hierarchy of this machine.
fn pod_cgroups() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
    let hierarchies = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let (path, kind) = (words.nth(1)?, words.next()?);
        matches!(kind, "cgroup" | "cgroup2").then(|| Path::new(path).join("kubepods"))
    });
    Ok(hierarchies.filter(|path| path.is_dir()).collect())
}

/// Whether a process is in one.
fn is_used() -> Result<bool> {
    fn has_process(cgroup: &Path) -> bool {
        let processes = fs::read_to_string(cgroup.join("cgroup.procs"));
        processes.is_ok_and(|text| !text.is_empty()) || below(cgroup).iter().any(|c| has_process(c))
    }
    Ok(pod_cgroups()?.iter().any(|cgroup| has_process(cgroup)))
}

fn below(cgroup: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| p.is_dir()).collect()
}

/// Removes them; what has just ended in one may still be on its way out.
fn remove_cgroups() -> Result<()> {
    fn remove(cgroup: &Path) -> std::io::Result<()> {
        for child in below(cgroup) {
            remove(&child)?;
        }
        fs::remove_dir(cgroup)
    }
    let deadline = Instant::now() + DEADLINE;
    for cgroup in pod_cgroups()? {
        while let Err(error) = remove(&cgroup) {
            ensure!(
                Instant::now() < deadline,
                "remove the cgroup {}: {error}",
                cgroup.display()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}
