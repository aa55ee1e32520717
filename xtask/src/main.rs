//! `cargo xtask`: the project's own commands. Each is one file.

mod ahead;
mod apt;
mod architecture;
mod bench;
mod build;
mod command;
mod cross;
mod demo;
mod dependencies;
mod fuzz;
mod go;
mod image;
mod kube;
mod oci;
mod prometheus;
mod rust_src;
mod setup;
mod test;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The project's own commands
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building, testing and the labs need, without asking
    Setup,
    /// Build the `whydrop` binary with its eBPF object inside
    Build(build::Args),
    /// Make an OCI image archive of the static binary, target/whydrop.oci.tar
    Image(image::Args),
    /// Make real drops between network namespaces and show what whydrop says about them (root)
    Demo,
    /// Run every test that this machine can run, or one group
    Test(test::Args),
    #[command(hide = true)]
    Ahead(ahead::Args),
    /// Run the benchmarks, or one; tables on stdout, JSON in target/bench/ (root)
    Bench(bench::Args),
    /// Run the fuzz targets for a bounded time
    Fuzz(fuzz::Args),
    /// Run a command, or a shell, in a virtual machine of one of Debian's kernels
    Vm(vm::Args),
}

fn main() -> ExitCode {
    match run(&Cli::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            // The exit code of a program that failed goes through.
            error
                .downcast_ref::<command::Failed>()
                .and_then(|failed| failed.code)
                .map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}

fn run(task: &Task) -> Result<ExitCode> {
    match task {
        Task::Setup => setup::run()?
            .with_vm()
            .with_kube()
            .with_prometheus()
            .report()?,
        Task::Build(args) => build::run(args)?,
        Task::Image(args) => image::run(args)?,
        Task::Demo => demo::run()?,
        Task::Test(args) => return test::run(args),
        Task::Ahead(args) => ahead::run(args)?,
        Task::Bench(args) => bench::run(args)?,
        Task::Fuzz(args) => fuzz::run(args)?,
        Task::Vm(args) => return vm::run(args),
    }
    Ok(ExitCode::SUCCESS)
}
