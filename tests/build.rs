//! Says where the agent's build left the eBPF object of the benchmarks' peers.

use std::path::Path;

fn main() {
    let programs = std::env::var("DEP_WHYDROP_PROGRAMS_PROGRAMS")
        .expect("agent/build.rs says where the programs are");
    let peers = Path::new(&programs).join("whydrop-peers");
    println!("cargo::rustc-env=WHYDROP_PEERS={}", peers.display());
    println!("cargo::rerun-if-changed={}", peers.display());
}
