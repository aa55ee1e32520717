//! The group `vm`: runs the machines of `plans.rs`, and says what each showed.

use std::{
    collections::VecDeque,
    fs,
    path::PathBuf,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    ENVIRONMENT, PROGRAMS, Place, initramfs,
    kernels::{self, Kernel},
    plans::{LABS, LIMIT, MATRIX, Plan, SILENCE},
    steps::{self, Heard, Ran, Reader, Step},
};
use crate::{
    architecture::Architecture,
    build,
    image::{self, Selection},
};

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
/// With a kernel's name only those of that kernel. Machines of the other architecture are left out if there
/// is a reason for that.
pub fn run(kernel: Option<&str>, no_other: Option<&str>) -> Result<Matrix> {
    let own = Architecture::own()?;
    let kernel = kernel.map(super::kernel).transpose()?;
    let mut plans: VecDeque<&Plan> = MATRIX
        .iter()
        .filter(|plan| kernel.is_none_or(|kernel| plan.kernel() == kernel))
        .collect();
    ensure!(
        !plans.is_empty(),
        "no machine of the matrix has this kernel"
    );
    let all = plans.len();
    if let Some(reason) = no_other {
        plans.retain(|plan| plan.architecture == own);
        if plans.is_empty() {
            return Ok(Matrix::NoKernel(reason.to_owned()));
        }
    }
    let without = no_other.filter(|_| plans.len() < all);
    let mut kernels = Vec::new();
    let mut programs = Vec::new();
    for plan in &plans {
        let (suite, architecture) = plan.kernel();
        if !kernels.iter().any(|(of, _)| *of == plan.kernel()) {
            kernels.push((plan.kernel(), kernels::get(suite, architecture)));
        }
    }
    if kernels.iter().all(|(_, kernel)| kernel.is_err())
        && let Some((_, Err(error))) = kernels.first()
    {
        return Ok(Matrix::NoKernel(format!("{error:#}")));
    }
    for plan in &plans {
        if !programs.iter().any(|(of, _)| *of == plan.architecture) {
            programs.push((plan.architecture, self::programs(plan.architecture)?));
        }
    }

    let queue = Mutex::new(plans);
    let next = || queue.lock().ok()?.pop_front();
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let mut shown: Vec<Shown> = thread::scope(|scope| {
        let run = || {
            let mut shown = Vec::new();
            while let Some(plan) = next() {
                let kernel = kernels.iter().find(|(of, _)| *of == plan.kernel());
                let programs = programs.iter().find(|(of, _)| *of == plan.architecture);
                shown.push(match (kernel, programs) {
                    (Some((_, Ok(kernel))), Some((_, programs))) => plan.run(kernel, programs),
                    (Some((_, Err(error))), _) => plan.without_kernel(error),
                    _ => unreachable!("every plan's kernel and programs were asked for"),
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
    Ok(outcome(&shown, without))
}

/// What goes into every machine: the binary, and the labs. For this architecture the shipped one; for the
/// other the image's, which is made twice for that.
pub fn programs(architecture: Architecture) -> Result<Vec<(PathBuf, String)>> {
    let binary = if architecture == Architecture::own()? {
        build::shipped(architecture)?
    } else {
        image::made_twice(&Selection::one(architecture))?;
        build::without_debug_info(architecture)?
    };
    let mut programs = vec![(binary, format!("{PROGRAMS}/whydrop"))];
    let stripped = super::folder().join("labs").join(architecture.name());
    fs::create_dir_all(&stripped)?;
    for (name, path) in LABS.iter().zip(build::shipped_labs(architecture, &LABS)?) {
        let to = stripped.join(name);
        initramfs::strip(architecture, &path, &to)?;
        programs.push((to, format!("{PROGRAMS}/lab-{name}")));
    }
    Ok(programs)
}

impl Plan {
    /// What it boots.
    fn kernel(&self) -> (&'static str, Architecture) {
        (self.suite, self.architecture)
    }

    /// Its name in the table; the kernel's release where it is known.
    fn name(&self, kernel: &str) -> String {
        format!("{kernel} {}", self.parameters)
            .trim_end()
            .to_owned()
    }

    /// The name of its files.
    fn file_name(&self) -> String {
        let name = self.name(self.suite).replace([' ', '='], "-");
        format!("{name}-{}", self.architecture)
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
        let mut shown = self.shown(&format!("{} {}", self.suite, self.architecture));
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
            // Two threads: libtest names its threads after the tests from two on. The clock counts the
            // machine's instructions, so that nothing is late that whydrop is not.
            command: format!(
                "exec env {ENVIRONMENT} WHYDROP_TIMES=strict lab-{lab} --test-threads=2{}",
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
        initramfs::write(&place.initramfs, kernel, programs, &steps::script(&steps))?;
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

fn outcome(shown: &[Shown], without: Option<&str>) -> Matrix {
    let bad: Vec<_> = shown
        .iter()
        .filter(|shown| !shown.wrong.is_empty())
        .collect();
    if bad.is_empty() {
        let passed: usize = shown.iter().map(|shown| shown.passed).sum();
        let left_out: usize = shown.iter().map(|shown| shown.left_out.len()).sum();
        let mut text = format!(
            "{} machines, {passed} tests, {left_out} left out by what their kernel lacks",
            shown.len()
        );
        if let Some(reason) = without {
            text += &format!("; without the other architecture: {reason}");
        }
        return Matrix::Good(text);
    }
    let names: Vec<_> = bad.iter().map(|shown| shown.name.as_str()).collect();
    Matrix::Bad(names.join(", "))
}
