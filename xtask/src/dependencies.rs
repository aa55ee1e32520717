//! The dependencies against deny.toml, from `cargo metadata` alone. cargo-deny reads the same file
//! and checks more, but takes minutes to install and a network for its advisories.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use spdx::{Expression, Licensee, ParseMode};

use crate::command::{cargo, host, output, root};

/// The parts of deny.toml that are checked here.
#[derive(Deserialize)]
struct Policy {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
    exceptions: Vec<Exception>,
}

#[derive(Deserialize)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Deserialize)]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
    /// Allowed, but in one version only.
    #[serde(default, rename = "deny-multiple-versions")]
    once: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

/// What `cargo metadata` says.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    id: String,
    license: Option<String>,
    /// None for a crate in a folder.
    source: Option<String>,
}

/// An error that names every dependency that does not keep to deny.toml.
pub fn check() -> Result<()> {
    let file = root().join("deny.toml");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let policy: Policy = toml::from_str(&text).context("deny.toml")?;
    let metadata = output(cargo("metadata").args([
        "--format-version=1",
        "--all-features",
        "--filter-platform",
        &host()?,
    ]))?;
    let metadata: Metadata = serde_json::from_str(&metadata).context("cargo metadata")?;
    let problems = problems(&metadata, &policy)?;
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    println!("{} packages keep to deny.toml", metadata.packages.len());
    Ok(())
}

fn problems(metadata: &Metadata, policy: &Policy) -> Result<Vec<String>> {
    let allowed = licensees(&policy.licenses.allow)?;
    let mut problems = Vec::new();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in &metadata.packages {
        versions
            .entry(&package.name)
            .or_default()
            .push(&package.version);
        let mut say = |problem: String| {
            problems.push(format!("{} {}: {problem}", package.name, package.version));
        };

        let exceptions = &policy.licenses.exceptions;
        let exception = exceptions
            .iter()
            .find(|exception| exception.name == package.name);
        let also = licensees(exception.map_or(&[][..], |exception| &exception.allow))?;
        match package
            .license
            .as_deref()
            .map(|text| (text, Expression::parse_mode(text, ParseMode::LAX)))
        {
            None => say("names no licence".to_owned()),
            Some((text, Err(_))) => say(format!("licence `{text}` is no SPDX expression")),
            Some((text, Ok(expression))) => {
                if !expression.evaluate(|asked| {
                    allowed
                        .iter()
                        .chain(&also)
                        .any(|licensee| licensee.satisfies(asked))
                }) {
                    say(format!("licence `{text}` is not allowed"));
                }
            }
        }

        let registry = |source: &str| {
            let url = source.strip_prefix("registry+");
            url.is_some_and(|url| {
                policy
                    .sources
                    .allow_registry
                    .iter()
                    .any(|allowed| allowed == url)
            })
        };
        match &package.source {
            Some(source) if !registry(source) => say(format!("comes from {source}")),
            None if !metadata.workspace_members.contains(&package.id) => {
                say("is a folder outside the workspace".to_owned())
            }
            _ => {}
        }
    }
    for ban in &policy.bans.deny {
        match versions.get(ban.name.as_str()) {
            Some(_) if !ban.once => problems.push(format!("{} is not allowed", ban.name)),
            Some(versions) if versions.len() > 1 => problems.push(format!(
                "{} is there in versions {}",
                ban.name,
                versions.join(" and ")
            )),
            _ => {}
        }
    }
    Ok(problems)
}

fn licensees(names: &[String]) -> Result<Vec<Licensee>> {
    let parse = |name: &String| {
        Licensee::parse_mode(name, ParseMode::LAX)
            .with_context(|| format!("deny.toml: licence `{name}`"))
    };
    names.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

    fn policy() -> Policy {
        toml::from_str(
            r#"
            [licenses]
            allow = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "Unicode-3.0"]
            exceptions = [{ crate = "special", allow = ["LGPL-2.1-or-later"] }]
            [bans]
            deny = [{ crate = "once", deny-multiple-versions = true }, { crate = "never" }]
            [sources]
            allow-registry = ["https://github.com/rust-lang/crates.io-index"]
            "#,
        )
        .unwrap()
    }

    fn package(name: &str, license: &str, source: Option<&str>) -> Package {
        Package {
            name: name.to_owned(),
            version: "1.0.0".to_owned(),
            id: name.to_owned(),
            license: Some(license.to_owned()),
            source: source.map(str::to_owned),
        }
    }

    fn problems_of(packages: Vec<Package>) -> Vec<String> {
        let workspace_members = vec!["ours".to_owned()];
        problems(
            &Metadata {
                packages,
                workspace_members,
            },
            &policy(),
        )
        .unwrap()
    }

    #[test]
    fn lets_allowed_packages_pass() {
        let fine = [
            ("a", "MIT OR GPL-3.0-only"),
            ("b", "MIT/Apache-2.0"),
            ("c", "(MIT OR Apache-2.0) AND Unicode-3.0"),
            ("d", "Apache-2.0 WITH LLVM-exception"),
            ("special", "LGPL-2.1-or-later"),
            ("once", "MIT"),
        ];
        let mut packages: Vec<_> = fine
            .map(|(name, license)| package(name, license, Some(CRATES_IO)))
            .into();
        packages.push(package("ours", "Apache-2.0 OR MIT", None));
        assert_eq!(problems_of(packages), [""; 0]);
    }

    #[test]
    fn names_a_licence_that_is_not_allowed() {
        let mut none = package("none", "", Some(CRATES_IO));
        none.license = None;
        let packages = vec![
            package("gpl", "GPL-3.0-only AND MIT", Some(CRATES_IO)),
            package("lgpl", "LGPL-2.1-or-later", Some(CRATES_IO)),
            package("odd", "Free for all", Some(CRATES_IO)),
            none,
        ];
        assert_eq!(
            problems_of(packages),
            [
                "gpl 1.0.0: licence `GPL-3.0-only AND MIT` is not allowed",
                "lgpl 1.0.0: licence `LGPL-2.1-or-later` is not allowed",
                "odd 1.0.0: licence `Free for all` is no SPDX expression",
                "none 1.0.0: names no licence",
            ]
        );
    }

    #[test]
    fn names_sources_outside_the_registry() {
        let git = "git+https://github.com/example/git?rev=1#1";
        let packages = vec![
            package("git", "MIT", Some(git)),
            package("folder", "MIT", None),
        ];
        assert_eq!(
            problems_of(packages),
            [
                format!("git 1.0.0: comes from {git}"),
                "folder 1.0.0: is a folder outside the workspace".to_owned(),
            ]
        );
    }

    #[test]
    fn names_bans_and_second_versions() {
        let mut second = package("once", "MIT", Some(CRATES_IO));
        second.version = "2.0.0".to_owned();
        let packages = vec![
            package("once", "MIT", Some(CRATES_IO)),
            second,
            package("never", "MIT", Some(CRATES_IO)),
        ];
        assert_eq!(
            problems_of(packages),
            [
                "once is there in versions 1.0.0 and 2.0.0",
                "never is not allowed"
            ]
        );
    }
}
