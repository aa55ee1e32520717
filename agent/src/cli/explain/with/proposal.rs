//! The proposed policies out of files.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::cluster::document;
use crate::cluster::files;
use crate::cluster::objects::{Interner, Key};
use crate::policy::proposal::Proposal;
use crate::policy::world::World;

/// What is proposed, and what of the files is none.
#[derive(Debug, Default)]
pub struct Proposed {
    /// The changes.
    pub proposal: Proposal,
    /// What is proposed, by name.
    pub names: Vec<String>,
    /// Objects that are neither policies nor namespaces.
    pub others: usize,
}

/// Reads files, folders, and `-` for standard input.
///
/// # Errors
/// One cannot be read, holds no policy, or holds one that the API server would refuse; or two hold the same.
pub fn read(paths: &[PathBuf]) -> Result<Proposed> {
    let mut proposed = Proposed::default();
    let mut known: BTreeMap<Key, PathBuf> = BTreeMap::new();
    let mut strings = Interner::default();
    for path in paths {
        for (path, text) in texts(path)? {
            let is_json = path.extension().is_some_and(|e| e == "json");
            let shown = path.display();
            let objects =
                document::read(&text, is_json).map_err(|why| anyhow!("{shown}: {why}"))?;
            if let Some(malformed) = objects.malformed.first() {
                let name = match malformed.namespace.as_str() {
                    "" => malformed.name.clone(),
                    namespace => format!("{namespace}/{}", malformed.name),
                };
                bail!(
                    "{shown}: {} {name} would be refused: {}",
                    malformed.kind,
                    malformed.message
                );
            }
            proposed.others += objects.ignored;
            for parsed in objects.parsed {
                let object = parsed.strip(&mut strings);
                let key = object.key().clone();
                if !proposed.proposal.add(object) {
                    proposed.others += 1;
                    continue;
                }
                let name = match &*key.namespace {
                    "" => format!("{} {}", key.kind.as_str(), key.name),
                    namespace => format!("{} {namespace}/{}", key.kind.as_str(), key.name),
                };
                if let Some(before) = known.insert(key, path.clone()) {
                    bail!(
                        "{name} is proposed twice, in {} and in {shown}: which one counts?",
                        before.display()
                    );
                }
                proposed.names.push(name);
            }
        }
    }
    if proposed.names.is_empty() && !paths.is_empty() {
        bail!(
            "--with holds no NetworkPolicy, ClusterNetworkPolicy, AdminNetworkPolicy, \
             BaselineAdminNetworkPolicy or Namespace, but {} other objects",
            proposed.others
        );
    }
    Ok(proposed)
}

impl Proposed {
    /// Also takes policies away.
    ///
    /// # Errors
    /// One is not there, or is proposed at once.
    pub fn without(mut self, names: &[String], world: &World) -> Result<Self> {
        for name in names {
            let (namespace, policy) = name
                .split_once('/')
                .with_context(|| format!("--without {name:?}: expected namespace/name"))?;
            let proposed = format!("NetworkPolicy {name}");
            if self.names.contains(&proposed) {
                bail!("{name} is in --with and in --without");
            }
            if !world
                .policies_of(namespace)
                .iter()
                .any(|p| *p.name == *policy)
            {
                bail!("--without {name}: there is no such NetworkPolicy");
            }
            self.proposal.remove(namespace, policy);
            self.names.push(format!("without {proposed}"));
        }
        Ok(self)
    }
}

/// The texts at a path.
fn texts(path: &Path) -> Result<Vec<(PathBuf, String)>> {
    let cannot = |path: &Path| format!("cannot read {}", path.display());
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("cannot read standard input")?;
        return Ok(vec![(PathBuf::from("standard input"), text)]);
    }
    let files = files::list(path).with_context(|| cannot(path))?;
    let texts = files.into_keys().map(|file| {
        let text = std::fs::read_to_string(&file).with_context(|| cannot(&file))?;
        Ok((file, text))
    });
    texts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::sentence;
    use crate::policy::testing::{policy, world};

    fn of(texts: &[&str]) -> Result<Proposed, String> {
        let folder = tempfile::tempdir().unwrap();
        let paths = (0..).zip(texts).map(|(i, text)| {
            let path = folder.path().join(format!("{i}.yaml"));
            std::fs::write(&path, text).unwrap();
            path
        });
        read(&paths.collect::<Vec<_>>()).map_err(|e| sentence(&e))
    }

    #[test]
    fn policies_of_all_kinds_and_namespaces_are_taken() {
        let more = "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: of-default}
spec: {podSelector: {}}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: shop}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: closed}
spec:
  tier: Admin
  priority: 5
  subject: {namespaces: {}}
  ingress: [{action: Deny, from: [{namespaces: {}}]}]
";
        let proposed = of(&[&policy("guard", "  policyTypes: [Ingress]"), more]).unwrap();
        assert_eq!(
            proposed.names,
            [
                "NetworkPolicy db/guard",
                "NetworkPolicy default/of-default",
                "Namespace shop",
                "ClusterNetworkPolicy closed"
            ]
        );
        assert_eq!(proposed.others, 1);
    }

    #[test]
    fn what_cannot_be_judged_is_one_sentence() {
        let guard = policy("guard", "  policyTypes: [Ingress]");
        let other = "{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: n}}";
        let selector = guard.replace(
            "matchLabels: {app: pg}",
            "matchExpressions: [{key: a, operator: Is}]",
        );
        for (texts, part) in [
            (vec!["a: ["], "no YAML"),
            (vec![""], "empty"),
            (vec![other], "no NetworkPolicy"),
            (
                vec![&selector],
                "NetworkPolicy db/guard would be refused: spec.podSelector.matchExpressions[0].operator",
            ),
            (
                vec![&guard, &guard],
                "NetworkPolicy db/guard is proposed twice",
            ),
        ] {
            let error = of(&texts).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let missing = read(&[PathBuf::from("/nowhere.yaml")]).unwrap_err();
        assert!(sentence(&missing).contains("cannot read /nowhere.yaml"));
    }

    #[test]
    fn what_is_taken_away_has_to_be_there() {
        let guard = policy("guard", "  policyTypes: [Ingress]");
        let world = world(&guard);
        let without = |proposed: Proposed, name: &str| {
            let proposed = proposed.without(&[name.to_owned()], &world);
            proposed.map(|p| p.names).map_err(|e| sentence(&e))
        };
        let names = without(Proposed::default(), "db/guard").unwrap();
        assert_eq!(names, ["without NetworkPolicy db/guard"]);
        for (name, part) in [("guard", "expected namespace/name"), ("db/none", "no such")] {
            let error = without(Proposed::default(), name).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let error = without(of(&[&guard]).unwrap(), "db/guard").unwrap_err();
        assert!(error.contains("in --with and in --without"), "{error}");
    }
}
