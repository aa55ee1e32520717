//! A procfs of ordinary files, for tests.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The directory, with a first process in the node's own namespace, number 1.
pub struct Fake(tempfile::TempDir);

impl Fake {
    pub fn new() -> Self {
        let fake = Self(tempfile::tempdir().unwrap());
        fake.process(1, 1, "0::/init.scope\n");
        symlink("1", fake.path("self")).unwrap();
        fake
    }

    pub fn proc(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(path)
    }

    pub fn write(&self, path: impl AsRef<Path>, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub fn process(&self, pid: u32, netns: u32, cgroup: &str) {
        self.write(format!("{pid}/cgroup"), cgroup);
        self.link(format!("{pid}/ns/net"), &format!("net:[{netns}]"));
        self.link(format!("{pid}/ns/mnt"), "mnt:[1]");
        self.addresses(pid, &[]);
    }

    pub fn link(&self, path: impl AsRef<Path>, to: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(to, path).unwrap();
    }

    /// The namespace of a process has these IPv4 addresses.
    pub fn addresses(&self, pid: u32, ips: &[&str]) {
        let leaf = |ip: &&str| format!("     |-- {ip}\n        /32 host LOCAL\n");
        let text: String = ips.iter().map(leaf).collect();
        self.write(
            format!("{pid}/net/fib_trie"),
            &format!("Main:\n{text}Local:\n{text}"),
        );
        self.write(format!("{pid}/net/if_inet6"), "");
    }

    /// The counters of a process' namespace.
    pub fn netstat(&self, pid: u32, overflows: u64, drops: u64) {
        let text = format!(
            "TcpExt: ArpFilter ListenOverflows ListenDrops TCPHPHits\n\
             TcpExt: 5 {overflows} {drops} 7\nIpExt: ListenDrops\nIpExt: 9\n"
        );
        self.write(format!("{pid}/net/netstat"), &text);
    }

    pub fn end(&self, pid: u32) {
        fs::remove_dir_all(self.path(pid.to_string())).unwrap();
    }
}

/// The line of a process in a pod's cgroup. UIDs are told apart by their last digits.
pub fn pod(number: u32) -> String {
    format!("0::/kubepods/besteffort/pod{}/3c1f\n", uid(number))
}

pub fn uid(number: u32) -> String {
    format!("9f0c5a1e-2b7d-4f60-8a43-{number:012}")
}
