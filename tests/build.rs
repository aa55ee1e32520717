//! Says where the agent's build left the eBPF objects of the benchmarks.

use std::path::Path;

fn main() {
    let programs = std::env::var("DEP_WHYDROP_PROGRAMS_PROGRAMS")
        .expect("agent/build.rs says where the programs are");
    for (variable, name) in [
        ("WHYDROP_PEERS", "whydrop-peers"),
        ("WHYDROP_CANDIDATES", "whydrop-candidates"),
    ] {
        let object = Path::new(&programs).join(name);
        println!("cargo::rustc-env={variable}={}", object.display());
        println!("cargo::rerun-if-changed={}", object.display());
    }
}
