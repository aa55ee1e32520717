//! The group `vm`: which kernels, and what runs on each.

use std::{
    collections::VecDeque,
    fs,
    path::PathBuf,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    ENVIRONMENT, PROGRAMS, Place, initramfs,
    kernels::{self, Kernel},
    machine::Clock,
    steps::{self, Heard, Ran, Reader, Step},
};
use crate::build;

/// All labs that run in machines: files of `tests/tests/`. A lab more is a word more, here and in a row
/// of [`MATRIX`].
const LABS: [&str; 3] = ["netfilter", "connects", "dns"];
/// Which tests of a lab run. A machine without KVM takes five to ten seconds for each, for the agent's
/// start; what differs between kernels differs in the hooks, which both families share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tests {
    /// Of IPv4.
    Ipv4,
    /// Of IPv4, one for each way in which a rule can drop or refuse.
    Few,
    /// Of IPv4, what is lost and how it is told, also behind a Service.
    Lost,
}

impl Tests {
    /// Words for libtest.
    fn filter(self) -> &'static str {
        match self {
            Self::Ipv4 => " --skip ::ipv6",
            Self::Lost => " lost::ipv4 told::ipv4 behind_a_service::ipv4",
            Self::Few => {
                " --skip ::ipv6 nft_forward nft_output nft_reject_told_to_all legacy_reset ipset_nft"
            }
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Ipv4 => " v4",
            Self::Lost => " v4 (lost)",
            Self::Few => " v4 (few)",
        }
    }
}

type Labs = &'static [(&'static str, Tests)];

/// The oldest and the newest kernel: what the others have lies between.
const ENDS: Labs = &[
    ("netfilter", Tests::Ipv4),
    ("connects", Tests::Ipv4),
    ("dns", Tests::Ipv4),
];
const BETWEEN: Labs = &[
    ("netfilter", Tests::Few),
    ("connects", Tests::Lost),
    ("dns", Tests::Ipv4),
];
/// What runs where a kernel of the others is locked down.
const LOCKED: Labs = &[("connects", Tests::Lost)];
/// A machine that takes longer hangs; on a host with other work the slowest takes half of it.
const LIMIT: Duration = Duration::from_secs(3600);
/// So does one that writes nothing for so long: a test takes five seconds.
const SILENCE: Duration = Duration::from_secs(180);

/// One machine.
struct Plan {
    /// Debian's suite, whose kernel it boots.
    suite: &'static str,
    /// Further words of the kernel's command line.
    parameters: &'static str,
    clock: Clock,
    /// What `whydrop check` must say there.
    check: Check,
    labs: Labs,
    /// Further commands, each a name and a line for a shell; to fail is to exit with another code than 0.
    commands: &'static [(&'static str, &'static str)],
    /// Whether a test may say that this kernel leaves it out.
    may_leave_out: bool,
}

/// What `whydrop check` must say.
struct Check {
    observable: bool,
    /// The sources that are down, and none else.
    down: &'static [&'static str],
    /// Words of the reason.
    says: &'static str,
}

const ALL_UP: Check = Check {
    observable: true,
    down: &[],
    says: "",
};

const MATRIX: &[Plan] = &[
    // Before drop reasons.
    Plan {
        suite: "bullseye",
        parameters: "",
        clock: Clock::Counted,
        check: Check {
            observable: true,
            down: &["connect_errors", "reasons"],
            says: "",
        },
        labs: ENDS,
        commands: &[],
        may_leave_out: true,
    },
    Plan {
        suite: "forky",
        parameters: "",
        clock: Clock::Counted,
        check: ALL_UP,
        labs: ENDS,
        commands: &[],
        may_leave_out: false,
    },
    Plan {
        suite: "bookworm",
        parameters: "",
        clock: Clock::Counted,
        check: ALL_UP,
        labs: BETWEEN,
        commands: &[],
        may_leave_out: false,
    },
    Plan {
        suite: "trixie",
        parameters: "",
        clock: Clock::Counted,
        check: ALL_UP,
        labs: BETWEEN,
        commands: &[],
        may_leave_out: false,
    },
    Plan {
        suite: "trixie",
        parameters: "lockdown=integrity",
        clock: Clock::Counted,
        check: ALL_UP,
        labs: LOCKED,
        commands: &[],
        may_leave_out: false,
    },
    Plan {
        suite: "trixie",
        parameters: "lockdown=confidentiality",
        clock: Clock::Counted,
        check: Check {
            observable: false,
            down: &[
                "dns",
                "connect_errors",
                "connects",
                "told",
                "neighbour",
                "conntrack_deaths",
                "drops",
            ],
            says: "CANNOT be observed on this node: lockdown=confidentiality",
        },
        labs: &[],
        commands: &[("agent", AGENT_WITHOUT_PROGRAMS)],
        may_leave_out: false,
    },
];

/// What needs no program goes on, and the agent says that it is not ready and why.
const AGENT_WITHOUT_PROGRAMS: &str = r#"set -e
whydrop agent --cluster none --log-format text --listen 127.0.0.1:9464 --socket /tmp/agent.sock &
agent=$!
get() { wget -q -O - "http://127.0.0.1:9464/$1"; }
for i in 1 2 3 4 5 6 7 8 9 10; do
  sleep 1
  get metrics > /tmp/metrics && grep -q 'source_up{source="conntrack"} 1' /tmp/metrics && break
done
grep -q '^whydrop_source_up{source="conntrack"} 1' /tmp/metrics
grep -q '^whydrop_source_up{source="accept_queues"} 1' /tmp/metrics
grep -q '^whydrop_source_up{source="drops"} 0' /tmp/metrics
get healthz
if get readyz; then exit 1; fi
kill $agent
wait $agent"#;

/// What a machine showed.
struct Shown {
    /// Its row in [`MATRIX`].
    order: Option<usize>,
    name: String,
    labs: String,
    passed: usize,
    left_out: Vec<(String, String)>,
    /// Whatever is wrong, each with what it needs to be understood.
    wrong: Vec<String>,
    took: Duration,
}

/// What the group came to.
pub enum Matrix {
    /// All is as it must be; how much that is.
    Good(String),
    /// It is not; where.
    Bad(String),
    /// Not one kernel can be had; why.
    NoKernel(String),
}

/// Runs every machine, as many at a time as there are CPUs, and prints the table.
///
/// With a kernel's name only those of that kernel.
pub fn run(kernel: Option<&str>) -> Result<Matrix> {
    let kernel = kernel.map(super::suite);
    let plans: VecDeque<&Plan> = MATRIX
        .iter()
        .filter(|plan| kernel.is_none_or(|suite| plan.suite == suite))
        .collect();
    ensure!(
        !plans.is_empty(),
        "no machine of the matrix has this kernel"
    );
    let mut suites: Vec<&str> = Vec::new();
    for plan in &plans {
        if !suites.contains(&plan.suite) {
            suites.push(plan.suite);
        }
    }
    let got: Vec<_> = suites
        .into_iter()
        .map(|suite| (suite, kernels::get(suite)))
        .collect();
    if got.iter().all(|(_, kernel)| kernel.is_err())
        && let Some((_, Err(error))) = got.first()
    {
        return Ok(Matrix::NoKernel(format!("{error:#}")));
    }
    let programs = programs()?;

    let queue = Mutex::new(plans);
    let next = || queue.lock().ok()?.pop_front();
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let mut shown: Vec<Shown> = thread::scope(|scope| {
        let run = || {
            let mut shown = Vec::new();
            while let Some(plan) = next() {
                let kernel = got.iter().find(|(suite, _)| *suite == plan.suite);
                shown.push(match kernel {
                    Some((_, Ok(kernel))) => plan.run(kernel, &programs),
                    Some((_, Err(error))) => plan.without_kernel(error),
                    None => unreachable!("every plan's suite was asked for"),
                });
            }
            shown
        };
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(run)).collect();
        handles
            .into_iter()
            .flat_map(|handle| match handle.join() {
                Ok(shown) => shown,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    });
    shown.sort_by_key(|shown| shown.order);
    print!("\n{}", table(&shown));
    Ok(outcome(&shown))
}

/// What goes into every machine: the shipped binary, and the labs.
pub fn programs() -> Result<Vec<(PathBuf, String)>> {
    let mut programs = vec![(build::shipped()?, format!("{PROGRAMS}/whydrop"))];
    let stripped = super::folder().join("labs");
    fs::create_dir_all(&stripped)?;
    for (name, path) in LABS.iter().zip(build::shipped_labs(&LABS)?) {
        let to = stripped.join(name);
        initramfs::strip(&path, &to)?;
        programs.push((to, format!("{PROGRAMS}/lab-{name}")));
    }
    Ok(programs)
}

impl Plan {
    /// Its name in the table; the kernel's release where it is known.
    fn name(&self, kernel: &str) -> String {
        format!("{kernel} {}", self.parameters)
            .trim_end()
            .to_owned()
    }

    /// The name of its files.
    fn file_name(&self) -> String {
        self.name(self.suite).replace([' ', '='], "-")
    }

    fn shown(&self, kernel: &str) -> Shown {
        Shown {
            order: MATRIX.iter().position(|plan| std::ptr::eq(plan, self)),
            name: self.name(kernel),
            labs: self
                .labs
                .iter()
                .map(|(lab, tests)| format!("{lab}{}", tests.suffix()))
                .collect::<Vec<_>>()
                .join(", "),
            passed: 0,
            left_out: Vec::new(),
            wrong: Vec::new(),
            took: Duration::ZERO,
        }
    }

    fn without_kernel(&self, error: &anyhow::Error) -> Shown {
        let mut shown = self.shown(self.suite);
        shown.wrong.push(format!("{error:#}"));
        shown
    }

    fn steps(&self) -> Vec<Step> {
        let check = Step {
            name: "check".to_owned(),
            command: "whydrop check; echo; exec whydrop check -o json 2>&1".to_owned(),
        };
        let labs = self.labs.iter().map(|(lab, tests)| Step {
            name: (*lab).to_owned(),
            // Two threads: libtest names its threads after the tests from two on.
            command: format!(
                "exec env {ENVIRONMENT} lab-{lab} --test-threads=2{}",
                tests.filter()
            ),
        });
        let commands = self.commands.iter().map(|(name, line)| Step {
            name: (*name).to_owned(),
            command: (*line).to_owned(),
        });
        [check].into_iter().chain(labs).chain(commands).collect()
    }

    fn run(&self, kernel: &Kernel, programs: &[(PathBuf, String)]) -> Shown {
        let mut shown = self.shown(&kernel.release);
        let started = Instant::now();
        if let Err(error) = self.run_steps(kernel, programs, &mut shown) {
            shown.wrong.push(format!("{error:#}"));
        }
        shown.took = started.elapsed();
        for wrong in &shown.wrong {
            eprintln!("vm: {}: {wrong}", shown.name);
        }
        shown
    }

    fn run_steps(
        &self,
        kernel: &Kernel,
        programs: &[(PathBuf, String)],
        shown: &mut Shown,
    ) -> Result<()> {
        let place = Place::new()?;
        let steps = self.steps();
        initramfs::write(
            &place.initramfs,
            &kernel.modules(),
            programs,
            &steps::script(&steps),
        )?;
        let machine = place.machine(kernel, self.parameters, self.clock);
        let log = super::folder().join(format!("{}.log", self.file_name()));
        let mut output = String::new();
        let mut reader = Reader::default();
        let name = shown.name.clone();
        let ended = machine.run(LIMIT, SILENCE, |line| {
            output += line;
            output.push('\n');
            if let Heard::Ended(_, ran) = reader.line(line) {
                eprintln!("vm: {name}: {}", progress(ran));
            }
        });
        let console = fs::read_to_string(&place.console).unwrap_or_default();
        fs::write(&log, format!("{output}\n--- console ---\n{console}"))
            .with_context(|| format!("write {}", log.display()))?;
        let ran = reader.ran();
        for step in &steps {
            match ran.iter().find(|ran| ran.name == step.name) {
                Some(ran) if ran.code.is_some() => self.judge(ran, shown),
                Some(ran) => shown.wrong.push(format!(
                    "{} did not end:\n{}",
                    step.name,
                    ran.lines[ran.lines.len().saturating_sub(30)..].join("\n")
                )),
                None => shown.wrong.push(format!("{} did not begin", step.name)),
            }
        }
        if ended.is_err() || ran.len() < steps.len() {
            shown.wrong.push(format!(
                "the end of the console, whole in {}:\n{}",
                log.display(),
                machine.tail()
            ));
        }
        ended
    }

    /// What a step that ended says of this kernel.
    fn judge(&self, ran: &Ran, shown: &mut Shown) {
        if ran.name == "check" {
            if let Err(error) = self.check.judge(ran) {
                let report = ran.lines.join("\n");
                shown.wrong.push(format!("check: {error:#}\n{report}"));
            }
        } else if self.labs.iter().any(|(lab, _)| *lab == ran.name) {
            let tests = steps::tests(&ran.lines);
            shown.passed += tests.passed;
            if tests.passed == 0 && tests.failed.is_empty() {
                shown.wrong.push(format!("{}: no test ran", ran.name));
            }
            if !tests.failed.is_empty() || ran.code != Some(0) {
                let from = ran.lines.iter().position(|line| line == "failures:");
                shown.wrong.push(format!(
                    "{}: exit code {:?}, failed: {}\n{}",
                    ran.name,
                    ran.code,
                    tests.failed.join(", "),
                    ran.lines[from.unwrap_or(0)..].join("\n")
                ));
            }
            for (test, why) in tests.left_out {
                let test = format!("{}: {test}", ran.name);
                if !self.may_leave_out {
                    shown
                        .wrong
                        .push(format!("{test} was left out, and nothing may be: {why}"));
                }
                shown.left_out.push((test, why));
            }
        } else if ran.code != Some(0) {
            shown.wrong.push(format!(
                "{}: exit code {:?}\n{}",
                ran.name,
                ran.code,
                ran.lines.join("\n")
            ));
        }
    }
}

impl Check {
    /// Compares what it printed, text and JSON, and how it ended, with what must be.
    fn judge(&self, ran: &Ran) -> Result<()> {
        let json = ran.lines.iter().position(|line| line == "{");
        let json = json.context("no JSON in it")?;
        let report: Value =
            serde_json::from_str(&ran.lines[json..].join("\n")).context("bad JSON")?;
        ensure!(
            report["observable"] == self.observable
                && ran.code == Some(if self.observable { 0 } else { 1 }),
            "it says observable {}, with exit code {:?}",
            report["observable"],
            ran.code
        );
        let sources = report["sources"].as_array().context("no sources")?;
        let down: Vec<&str> = sources
            .iter()
            .filter(|source| source["up"] == false)
            .filter_map(|source| source["source"].as_str())
            .collect();
        ensure!(
            down == self.down,
            "down are {down:?}, and must be {:?}",
            self.down
        );
        let text = ran.lines[..json].join("\n");
        ensure!(text.contains(self.says), "it does not say {:?}", self.says);
        Ok(())
    }
}

fn progress(ran: &Ran) -> String {
    let tests = steps::tests(&ran.lines);
    let mut text = format!("{} in {} s", ran.name, ran.took.as_secs());
    if tests != steps::Tests::default() {
        text += &format!(
            ", {} passed, {} failed, {} left out",
            tests.passed,
            tests.failed.len(),
            tests.left_out.len()
        );
    }
    text
}

fn table(shown: &[Shown]) -> String {
    let width = shown.iter().map(|shown| shown.name.len()).max();
    let width = width.unwrap_or(0).max("kernel".len());
    let mut text = format!(
        "{:<width$}  passed  failed  left out  seconds  labs\n",
        "kernel"
    );
    for shown in shown {
        text += &format!(
            "{:<width$}  {:>6}  {:>6}  {:>8}  {:>7}  {}\n",
            shown.name,
            shown.passed,
            shown.wrong.len(),
            shown.left_out.len(),
            shown.took.as_secs(),
            shown.labs
        );
    }
    for shown in shown.iter().filter(|shown| !shown.left_out.is_empty()) {
        text += &format!("\nleft out on {}:\n", shown.name);
        for (test, why) in &shown.left_out {
            text += &format!("  {test}: {why}\n");
        }
    }
    text
}

fn outcome(shown: &[Shown]) -> Matrix {
    let bad: Vec<_> = shown
        .iter()
        .filter(|shown| !shown.wrong.is_empty())
        .collect();
    if bad.is_empty() {
        let passed: usize = shown.iter().map(|shown| shown.passed).sum();
        let left_out: usize = shown.iter().map(|shown| shown.left_out.len()).sum();
        return Matrix::Good(format!(
            "{} machines, {passed} tests, {left_out} left out by what their kernel lacks",
            shown.len()
        ));
    }
    let names: Vec<_> = bad.iter().map(|shown| shown.name.as_str()).collect();
    Matrix::Bad(names.join(", "))
}
