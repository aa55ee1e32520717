//! `cargo xtask test`: every test that this machine can run, in groups, and at the end which groups
//! ran, which were skipped, and why.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use nix::unistd::geteuid;

use crate::{
    ahead, build,
    command::{cargo, command, root, run as execute},
    dependencies, fuzz,
    image::{self, Selection},
    kube, prometheus,
    setup::{self, Found, Need},
    vm::{self, matrix::Matrix},
};

/// Seconds of the short run of each fuzz target.
const FUZZ_SECONDS: u32 = 20;

/// Its programs take ten minutes to build, which all groups together have not left of an hour.
const ASK_FOR_OTHER: &str = "`cargo xtask test vm --kernel arm64`";

#[derive(clap::Args)]
pub struct Args {
    /// The group to run; all of them if it is left out
    group: Option<Group>,
    /// Of the group vm only this kernel: 5.10, 6.1, 6.12, newest, arm64
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Format, lints, dependencies, unit tests, a short run of the fuzz targets
    Unit,
    /// Real drops between network namespaces, on this machine's kernel (root)
    Netns,
    /// The same in virtual machines, on other kernels
    Vm,
    /// Against a real API server, kube-proxy and kubelet, built once if there are none (root)
    Kube,
    /// The manifests, rules and dashboards
    Deploy,
}

enum Outcome {
    Passed(String),
    Failed(String),
    Skipped(String),
}

/// A group that was run, or not.
struct Ended {
    group: String,
    outcome: Outcome,
    /// With what was built for it, and of the first one behind the labs with the rest of what was built ahead.
    took: Duration,
}

/// Sets up, runs the groups and prints the table; fails if a group does.
pub fn run(args: &Args) -> Result<ExitCode> {
    let groups = args
        .group
        .map_or_else(|| Group::value_variants().to_vec(), |group| vec![group]);
    let mut found = setup::run()?;
    if groups.contains(&Group::Vm) {
        found = found.with_vm();
        if args.kernel.as_deref().is_some_and(is_other) {
            found = found.with_other_vm();
        }
    }
    if groups.contains(&Group::Kube) {
        found = found.with_kube();
    }
    if groups.contains(&Group::Deploy) || groups.contains(&Group::Kube) {
        found = found.with_prometheus();
    }
    found.ready_to_build()?;
    // Compilers wait for one another at times, tests and labs mostly: the groups behind them need half an hour of
    // compiling.
    let mut ahead = (groups.len() > 1).then(|| ahead::start(&needs(&groups, &found)));
    let outcomes: Vec<_> = groups
        .iter()
        .map(|group| {
            let began = Instant::now();
            if !matches!(group, Group::Unit | Group::Netns)
                && let Some(ahead) = ahead.take()
            {
                ahead.wait();
            }
            let outcome = outcome(*group, args, &found);
            Ended {
                group: name(*group),
                outcome,
                took: began.elapsed(),
            }
        })
        .collect();
    print!("\n{}", table(&outcomes));
    let failed = outcomes
        .iter()
        .any(|ended| matches!(ended.outcome, Outcome::Failed(_)));
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// What these groups need that can be built ahead.
fn needs(groups: &[Group], found: &Found) -> ahead::Args {
    let may = |group| groups.contains(&group) && found.lacks(Need::Lab).is_none();
    let vm = may(Group::Vm) && vm::cannot(found).is_none();
    let kube = may(Group::Kube) && found.lacks(Need::Kube).is_none();
    ahead::Args::new(vm, kube)
}

fn is_other(kernel: &str) -> bool {
    vm::is_other(kernel).unwrap_or(false)
}

fn name(group: Group) -> String {
    let value = group.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

fn outcome(group: Group, args: &Args, found: &Found) -> Outcome {
    match group {
        Group::Unit => unit(found),
        Group::Netns => netns(found),
        Group::Vm => machines(args.kernel.as_deref(), found),
        Group::Kube => kubernetes(found),
        Group::Deploy => deploy(found),
    }
}

fn unit(found: &Found) -> Outcome {
    let steps: [Step; 6] = [
        ("format", Some(Need::Format), format),
        ("clippy", Some(Need::Clippy), clippy),
        (
            "clippy of the programs",
            Some(Need::Clippy),
            clippy_programs,
        ),
        ("dependencies", None, dependencies::check),
        ("tests", None, tests),
        ("fuzz", Some(Need::Fuzz), || fuzz::quick(FUZZ_SECONDS)),
    ];
    run_steps(&steps, found)
}

/// A part of a group: its name, what it needs, and what it does.
type Step = (&'static str, Option<Need>, fn() -> Result<()>);

fn run_steps(steps: &[Step], found: &Found) -> Outcome {
    let (mut passed, mut failed, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
    for &(name, need, step) in steps {
        if let Some(reason) = need.and_then(|need| found.lacks(need)) {
            skipped.push(format!("without {name}: {reason}"));
            continue;
        }
        let began = Instant::now();
        match step() {
            Ok(()) => passed.push(format!("{name} {} s", began.elapsed().as_secs())),
            Err(error) => {
                eprintln!("xtask: {name}: {error:#}");
                failed.push(name);
            }
        }
    }
    if !failed.is_empty() {
        return Outcome::Failed(failed.join(", "));
    }
    skipped.insert(0, passed.join(", "));
    Outcome::Passed(skipped.join("; "))
}

fn deploy(found: &Found) -> Outcome {
    let steps: [Step; 2] = [
        ("manifests", None, manifests),
        ("rules", Some(Need::Prometheus), rules),
    ];
    run_steps(&steps, found)
}

/// What the manifests and the runbook say against the code.
fn manifests() -> Result<()> {
    execute(own_tests().arg("--test=deploy"))?;
    execute(own_tests().args(["--bin=xtask", "--", "image::", "oci::"]))
}

/// Prometheus' own judgement of the rules, and its run of their tests.
fn rules() -> Result<()> {
    let promtool = prometheus::program("promtool").context("there is no promtool")?;
    let folder = root().join("deploy/prometheus");
    let promtool = |arguments: &[&str], file: &str| {
        execute(command(&promtool).args(arguments).arg(folder.join(file)))
    };
    promtool(
        &["check", "rules", "--lint=all", "--lint-fatal"],
        "rules.yaml",
    )?;
    promtool(&["test", "rules"], "tests.yaml")
}

fn format() -> Result<()> {
    execute(command("cargo").args(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<()> {
    execute(cargo("clippy").args(["--workspace", "--all-targets", "--", "--deny=warnings"]))
}

fn clippy_programs() -> Result<()> {
    execute(
        cargo("clippy")
            .args([
                "--package=whydrop-ebpf",
                "--features=programs",
                "--bins",
                "--lib",
            ])
            .args(["--target=bpfel-unknown-none", "-Zbuild-std=core"])
            // A folder of its own: build scripts look at RUSTC_BOOTSTRAP, so that in a shared one
            // each change of it would build most dependencies again.
            .arg("--target-dir")
            .arg(root().join("target/programs"))
            .args(["--", "--deny=warnings"])
            .env("RUSTC_BOOTSTRAP", "1"),
    )
}

fn tests() -> Result<()> {
    execute(&mut own_tests())
}

/// The tests of these packages. Always of all of them: with fewer, cargo builds most dependencies again
/// with other features.
fn own_tests() -> Command {
    let mut test = cargo("test");
    test.args([
        "--package=whydrop",
        "--package=whydrop-ebpf",
        "--package=xtask",
    ]);
    test
}

fn netns(found: &Found) -> Outcome {
    if let Some(reason) = found.lacks(Need::Lab).or_else(no_netns) {
        return Outcome::Skipped(reason);
    }
    match labs() {
        Ok(()) => Outcome::Passed("real drops on this machine's kernel".to_owned()),
        Err(error) => Outcome::Failed(format!("{error:#}")),
    }
}

/// The agent, which the labs start as a program.
fn agent() -> Result<()> {
    execute(&mut build::whydrop())
}

fn labs() -> Result<()> {
    agent()?;
    let labs = || {
        let mut test = cargo("test");
        test.args(["--package=whydrop-tests", "--no-fail-fast"]);
        test
    };
    execute(&mut labs())?;
    // Once more by what kernels without working trampolines get; that is the same for both families.
    execute(
        labs()
            .args(["--test=netfilter", "--test=packets", "--", "--skip=::ipv6"])
            .env("WHYDROP_ATTACH", "raw_tp"),
    )
}

fn machines(kernel: Option<&str>, found: &Found) -> Outcome {
    if let Some(reason) = vm::cannot(found).or_else(|| found.lacks(Need::Lab)) {
        return Outcome::Skipped(reason);
    }
    let no_other = match kernel {
        None => Some(format!("{ASK_FOR_OTHER} builds and runs it")),
        Some(_) => vm::cannot_be_other(found),
    };
    match vm::matrix::run(kernel, no_other.as_deref()) {
        Ok(Matrix::Good(what)) => Outcome::Passed(what),
        Ok(Matrix::Bad(what)) => Outcome::Failed(what),
        Ok(Matrix::NoKernel(why)) => Outcome::Skipped(why),
        Err(error) => Outcome::Failed(format!("{error:#}")),
    }
}

fn kubernetes(found: &Found) -> Outcome {
    if let Some(reason) = found.lacks(Need::Lab).or_else(no_netns) {
        return Outcome::Skipped(reason);
    }
    // Go is needed beside `KUBEBUILDER_ASSETS` too, for the tiers and a Prometheus that finds pods.
    if let Some(reason) = found
        .lacks(Need::Kube)
        .or_else(|| found.lacks(Need::Node))
        .or_else(|| found.lacks(Need::Prometheus))
    {
        return Outcome::Skipped(reason);
    }
    let tests = || {
        let programs = kube::programs()?;
        let fixes = fixes()?;
        let prometheus = prometheus::with_discovery()?;
        let promtool = prometheus::program("promtool").context("there is no promtool")?;
        agent()?;
        execute(
            cargo("test")
                .args(["--package=whydrop-kube-tests", "--no-fail-fast"])
                .env("WHYDROP_KUBE_PROGRAMS", programs)
                .env("WHYDROP_TEST_FIXES", fixes)
                .env("WHYDROP_TIERS", kube::tiers()?)
                .env("WHYDROP_IMAGE", image::made_twice(&Selection::own()?)?)
                .env("WHYDROP_BUSYBOX_IMAGE", kube::busybox()?)
                .env("WHYDROP_PROMETHEUS", prometheus)
                .env("WHYDROP_PROMTOOL", promtool),
        )
    };
    match tests() {
        Ok(()) => Outcome::Passed("a real API server, kube-proxy, kubelet, and drops".to_owned()),
        Err(error) => Outcome::Failed(format!("{error:#}")),
    }
}

/// The fixes that the unit tests produce, in a folder, for a real API server to take.
fn fixes() -> Result<PathBuf> {
    let folder = build::target().join("fixes");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    execute(
        own_tests()
            .args(["--lib", "findings"])
            .env("WHYDROP_TEST_FIXES", &folder),
    )?;
    Ok(folder)
}

/// Why the lab cannot run on this machine.
fn no_netns() -> Option<String> {
    let btf = "/sys/kernel/btf/vmlinux";
    if !geteuid().is_root() {
        return Some("not root".to_owned());
    }
    if !Path::new(btf).exists() {
        return Some(format!("the kernel has no BTF ({btf})"));
    }
    let probe = command("unshare")
        .args(["--net", "true"])
        .stderr(Stdio::null())
        .status();
    if !probe.is_ok_and(|status| status.success()) {
        return Some(
            "root may not create network namespaces here (`unshare --net true` fails)".to_owned(),
        );
    }
    None
}

/// The table of groups. Its last line is alone and counts them.
fn table(outcomes: &[Ended]) -> String {
    let mut text = String::new();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for Ended {
        group,
        outcome,
        took,
    } in outcomes
    {
        let (word, why) = match outcome {
            Outcome::Passed(why) => {
                passed += 1;
                ("passed", why)
            }
            Outcome::Failed(why) => {
                failed += 1;
                ("FAILED", why)
            }
            Outcome::Skipped(why) => {
                skipped += 1;
                ("skipped", why)
            }
        };
        text += &format!("{group:<8}{word:<9}{:>4} s  {why}\n", took.as_secs());
    }
    text + &format!("\n{passed} passed, {failed} failed, {skipped} skipped\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_ends_with_the_counts() {
        let ended = |group: &str, outcome, seconds| Ended {
            group: group.to_owned(),
            outcome,
            took: Duration::from_secs(seconds),
        };
        let outcomes = [
            ended("unit", Outcome::Passed("tests".to_owned()), 1_234),
            ended(
                "netns",
                Outcome::Failed("`cargo test` failed".to_owned()),
                60,
            ),
            ended("vm", Outcome::Skipped("not root".to_owned()), 0),
        ];
        assert_eq!(
            table(&outcomes),
            "unit    passed   1234 s  tests\n\
             netns   FAILED     60 s  `cargo test` failed\n\
             vm      skipped     0 s  not root\n\
             \n\
             1 passed, 1 failed, 1 skipped\n"
        );
    }
}
