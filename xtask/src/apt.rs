//! Debian packages as files: by an apt with sources, lists and cache of its own, so that the system's
//! stay untouched.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    architecture::Architecture,
    command::{command, find, output, quietly},
};

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt for one suite.
pub struct Apt {
    work: PathBuf,
    options: Vec<String>,
}

impl Apt {
    /// Sets apt up in an empty folder and gets the suite's lists. Errors if this machine has no apt
    /// or no key of Debian's, or if the mirror does not carry the suite.
    pub fn new(work: &Path, suite: &str) -> Result<Self> {
        Self::with(Vec::new(), work, suite)
    }

    /// As [`Apt::new`], for packages of an architecture.
    pub fn of(architecture: Architecture, work: &Path, suite: &str) -> Result<Self> {
        let options = ["APT::Architecture", "APT::Architectures"];
        let options = options.map(|option| format!("{option}={architecture}"));
        Self::with(options.to_vec(), work, suite)
    }

    fn with(mut options: Vec<String>, work: &Path, suite: &str) -> Result<Self> {
        for tool in ["apt-get", "dpkg-deb"] {
            ensure!(find(tool).is_some(), "there is no {tool}");
        }
        ensure!(
            Path::new(KEYRING).is_file(),
            "{KEYRING} is missing (package debian-archive-keyring)"
        );
        let sources = work.join("sources.list");
        fs::create_dir_all(work.join("lists/partial"))?;
        fs::create_dir_all(work.join("cache/archives/partial"))?;
        fs::write(
            &sources,
            format!("deb [signed-by={KEYRING}] {} {suite} main\n", mirror()),
        )?;
        options.extend([
            format!("Dir::Etc::sourcelist={}", sources.display()),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={}", work.join("lists").display()),
            // What is installed here is another release's.
            "Dir::State::status=/dev/null".to_owned(),
            format!("Dir::Cache={}", work.join("cache").display()),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        ]);
        let apt = Self {
            work: work.to_owned(),
            options,
        };
        quietly(apt.tool("apt-get").args(["-qq", "update"]))?;
        Ok(apt)
    }

    /// An apt program for this suite.
    pub fn tool(&self, name: &str) -> Command {
        let mut tool = command(name);
        for option in &self.options {
            tool.args(["-o", option]);
        }
        tool.current_dir(&self.work);
        tool
    }

    /// Downloads packages (`name` or `name=version`), checked against the suite's signature.
    pub fn download(&self, packages: &[String]) -> Result<Vec<PathBuf>> {
        quietly(
            self.tool("apt-get")
                .args(["-qq", "download"])
                .args(packages),
        )?;
        let files: Vec<_> = fs::read_dir(&self.work)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .collect();
        ensure!(
            files.len() == packages.len(),
            "apt-get left {} packages of {}",
            files.len(),
            packages.join(", ")
        );
        Ok(files)
    }

    /// These packages and all that they need to run.
    pub fn closure(&self, packages: &[&str]) -> Result<Vec<String>> {
        let mut install = self.tool("apt-get");
        install.args(["-qq", "--simulate", "--no-install-recommends", "install"]);
        Ok(installed(&output(install.args(packages))?))
    }

    /// The packages that one depends on, the first of each choice.
    pub fn depends(&self, package: &str) -> Result<Vec<String>> {
        let text = output(self.tool("apt-cache").args(["show", package]))
            .with_context(|| format!("the suite has no package {package}"))?;
        Ok(depends(&text))
    }
}

/// The dependencies in the first record of what `apt-cache show` prints, which is the newest version.
fn depends(show: &str) -> Vec<String> {
    show.lines()
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            line.strip_prefix("Depends: ")
                .or_else(|| line.strip_prefix("Pre-Depends: "))
        })
        .flat_map(|list| list.split(", "))
        .filter_map(|choice| choice.split([' ', '|', ':']).next())
        .map(str::to_owned)
        .collect()
}

/// The packages that a simulated installation would install.
fn installed(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next())
        .map(str::to_owned)
        .collect()
}

/// The mirror from which this machine gets its own Debian release, else the public one.
fn mirror() -> String {
    let codename = fs::read_to_string("/etc/os-release").ok().and_then(|text| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
        line.map(|name| name.trim_matches('"').to_owned())
    });
    let targets = output(command("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
    ]));
    codename
        .zip(targets.ok())
        .and_then(|(codename, targets)| own_mirror(&targets, &codename))
        .unwrap_or_else(|| MIRROR.to_owned())
}

fn own_mirror(targets: &str, codename: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (mirror, release, component) = (words.next()?, words.next()?, words.next()?);
        // Ubuntu's mirrors do not carry Debian's suites.
        (release == codename && component == "main" && !mirror.contains("ubuntu"))
            .then(|| mirror.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_mirror_of_the_own_release() {
        let targets = "https://example.org/node nodistro main\n\
            http://security.example.org/debian bookworm-security main\n\
            http://ftp.example.org/debian bookworm main\n";
        assert_eq!(
            own_mirror(targets, "bookworm").as_deref(),
            Some("http://ftp.example.org/debian")
        );
        assert_eq!(own_mirror(targets, "trixie"), None);
        assert_eq!(
            own_mirror("http://archive.ubuntu.com/ubuntu noble main\n", "noble"),
            None
        );
    }

    #[test]
    fn reads_the_dependencies_of_the_newest_version() {
        let show = "Package: linux-image-cloud-amd64\n\
            Pre-Depends: linux-base:any\n\
            Depends: linux-image-6.1.0-9-cloud-amd64 (= 6.1.9-1), initramfs-tools | dracut\n\
            \n\
            Package: linux-image-cloud-amd64\n\
            Depends: linux-image-6.1.0-8-cloud-amd64\n";
        assert_eq!(
            depends(show),
            [
                "linux-base",
                "linux-image-6.1.0-9-cloud-amd64",
                "initramfs-tools"
            ]
        );
    }

    #[test]
    fn reads_what_would_be_installed() {
        let text = "Inst libc6 (2.41-12 Debian:13/stable [arm64]) []\n\
            Inst netbase (6.5 Debian:13/stable [all])\n\
            Conf libc6 (2.41-12 Debian:13/stable [arm64])\n";
        assert_eq!(installed(text), ["libc6", "netbase"]);
    }
}
