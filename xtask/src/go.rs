//! Programs that the tests need and that are built from their Go modules, once.

use std::{env, fs, path::PathBuf, process::Command, time::Instant};

use anyhow::{Context as _, Result, ensure};

use crate::{
    build,
    command::{command, find, output, root, run as execute},
};

/// A go.mod of this project that names programs of others.
pub struct Module<'a> {
    /// The folder of go.mod and go.sum, below the project's root.
    pub source: &'a str,
    /// Where the programs go: `bin/` of this folder below `target/`.
    pub to: &'a str,
    /// What each program is called, and its Go package.
    pub programs: &'a [(&'a str, &'a str)],
    /// Build tags, separated by commas.
    pub tags: &'a str,
}

impl Module<'_> {
    /// The folder with all programs; those that are missing or older than go.sum are built.
    /// `linker_flags` is asked only then.
    ///
    /// # Errors
    /// There is no Go, no module proxy answers, or a program does not build.
    pub fn built(&self, linker_flags: impl FnOnce() -> Result<String>) -> Result<PathBuf> {
        let to = build::target().join(self.to);
        let folder = to.join("bin");
        let stamp = to.join("go.sum");
        let sum = root().join(self.source).join("go.sum");
        let wanted = fs::read(&sum).with_context(|| format!("read {}", sum.display()))?;
        let is_current = fs::read(&stamp).is_ok_and(|built| built == wanted);
        let mut missing = self.programs.to_vec();
        missing.retain(|(name, _)| !is_current || !folder.join(name).is_file());
        if missing.is_empty() {
            return Ok(folder);
        }
        find("go").context("there is no Go")?;
        if !is_current && stamp.exists() {
            // Broken off, it must not pass for what it was before.
            fs::remove_file(&stamp).with_context(|| format!("remove {}", stamp.display()))?;
        }
        let flags = format!("-s -w {}", linker_flags()?);
        for (name, package) in missing {
            eprintln!("{}: building {name}", self.to);
            let started = Instant::now();
            let mut go = self.go(&["build", "-trimpath", "-ldflags", &flags]);
            // What the linker would leave out again is not even made.
            go.args(["-gcflags", "all=-dwarf=false"]);
            go.args(["-tags", self.tags, "-o"]).arg(folder.join(name));
            execute(go.arg(package)).with_context(|| format!("build {name}"))?;
            eprintln!("{}: built in {} s", self.to, started.elapsed().as_secs());
        }
        fs::write(&stamp, wanted).with_context(|| format!("write {}", stamp.display()))?;
        Ok(folder)
    }

    /// The version of a module that go.mod asks for, as `v1.34.4`.
    ///
    /// # Errors
    /// go.mod does not ask for it.
    pub fn version_of(&self, module: &str) -> Result<String> {
        let version = output(&mut self.go(&["list", "-m", "-f", "{{.Version}}", module]))?;
        Ok(version.trim().to_owned())
    }

    fn go(&self, arguments: &[&str]) -> Command {
        let mut go = command("go");
        go.current_dir(root().join(self.source)).args(arguments);
        // Static: the programs run wherever they are copied.
        go.env("CGO_ENABLED", "0").env("GOFLAGS", "-mod=readonly");
        go
    }
}

/// The folder of a published module, as the module cache has it; `sum` is what go.sum would say of it.
///
/// # Errors
/// There is no Go, no module proxy answers, or the module is another one.
pub fn downloaded(module: &str, version: &str, sum: &str) -> Result<PathBuf> {
    find("go").context("there is no Go")?;
    let wanted = format!("{module}@{version}");
    let mut go = command("go");
    // Outside of any module, so that none has to agree with it.
    go.current_dir(env::temp_dir())
        .args(["mod", "download", "-json", &wanted]);
    let answer: serde_json::Value = serde_json::from_str(&output(&mut go)?)
        .with_context(|| format!("what Go says of {wanted}"))?;
    ensure!(
        answer["Sum"] == sum,
        "{wanted} has the sum {}, and not {sum}",
        answer["Sum"]
    );
    let folder = answer["Dir"].as_str().context("Go names no folder")?;
    Ok(folder.into())
}
