//! `--objects`: Kubernetes objects from files and folders, the embedded stand-in for a cluster.
//!
//! Changes are found by polling, not by inotify. A look at each file's identity and times finds
//! every way in which files change: written in place, renamed over, a ConfigMap's `..data` link
//! swapped, on any file system, and also where a node's inotify instances are used up, which is
//! common on Kubernetes nodes. It costs one `stat` a file.
//!
//! A change counts when two looks have seen the same, so that a file is not read while `kubectl
//! get > file` still writes it: half a list is often valid YAML.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::document;
use super::objects::{Change, Interner, Key, Object};

/// How often files are looked at. Two looks and the reading stay under the 2 s in which a change
/// counts.
pub const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Something in the files that could not be used. Everything else was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file or folder.
    pub file: PathBuf,
    /// The object's kind; empty if the whole file is meant.
    pub kind: String,
    /// `namespace/name` or `name`; empty if the whole file is meant or the object has no name.
    pub name: String,
    /// What is wrong, and what that means.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file.display())?;
        for part in [&self.kind, &self.name] {
            if !part.is_empty() {
                write!(f, "{part} ")?;
            }
        }
        f.write_str(&self.message)
    }
}

/// A path of `--objects` cannot be read at start.
#[derive(Debug, thiserror::Error)]
#[error("cannot read Kubernetes objects from {}: {error}; give an existing file or folder", path.display())]
pub struct OpenError {
    /// The path.
    pub path: PathBuf,
    /// Why not.
    pub error: io::Error,
}

/// The files, and the objects in their last good states.
#[derive(Debug)]
pub struct Files {
    sources: Vec<Source>,
    /// In an order, so that of two pods with one address always the same one wins.
    objects: BTreeMap<Key, Object>,
    strings: Interner,
    problems_total: Arc<AtomicU64>,
}

/// One path of `--objects`.
#[derive(Debug)]
struct Source {
    path: PathBuf,
    /// Why the last look failed, and whether that was said.
    failed: Option<(io::ErrorKind, bool)>,
    files: BTreeMap<PathBuf, File>,
}

#[derive(Debug, Default)]
struct File {
    /// What the last look saw.
    seen: Option<Stamp>,
    /// What was seen when it was last read, or found to be gone.
    done: Option<Stamp>,
    objects: Vec<Object>,
}

/// What tells one state of a file from another; `None` for one that is not there.
type Stamp = Option<[i64; 7]>;

fn stamp(m: &Metadata) -> Stamp {
    if !m.is_file() {
        // A pipe, as in `--objects <(kubectl get pods -o yaml)`, is read once.
        return Some([0; 7]);
    }
    Some([
        m.dev().cast_signed(),
        m.ino().cast_signed(),
        m.size().cast_signed(),
        m.mtime(),
        m.mtime_nsec(),
        m.ctime(),
        m.ctime_nsec(),
    ])
}

/// What a look at the files brought.
#[derive(Debug, Default)]
pub struct Update {
    /// The way from the objects before to those now.
    pub changes: Vec<Change>,
    /// What could not be used; already logged and counted.
    pub problems: Vec<Problem>,
}

impl Files {
    /// Reads all paths. Files of a folder count if they end in `.yaml`, `.yml` or `.json` and do
    /// not begin with a dot, as for `kubectl apply -f`; folders in it do not. A broken file and
    /// malformed objects are problems, added to `problems_total`.
    ///
    /// # Errors
    /// A path does not exist or cannot be read.
    pub fn open(
        paths: &[PathBuf],
        problems_total: Arc<AtomicU64>,
    ) -> Result<(Self, Vec<Problem>), OpenError> {
        let mut files = Self {
            sources: Vec::new(),
            objects: BTreeMap::new(),
            strings: Interner::default(),
            problems_total,
        };
        for path in paths {
            let readable = list(path).and_then(|found| match found.get(path) {
                // That a named file can be opened is asked now, that it is good is not.
                Some(m) if m.is_file() => fs::File::open(path).map(drop),
                _ => Ok(()),
            });
            readable.map_err(|error| OpenError {
                path: path.clone(),
                error,
            })?;
            files.sources.push(Source {
                path: path.clone(),
                failed: None,
                files: BTreeMap::new(),
            });
        }
        let update = files.look(true);
        Ok((files, update.problems))
    }

    /// All objects in their last good states, in the order of their names. An object in several
    /// files is the last one's.
    pub fn objects(&self) -> impl Iterator<Item = &Object> {
        self.objects.values()
    }

    /// Looks at the files once and reads those that changed before the last look.
    pub fn poll(&mut self) -> Update {
        self.look(false)
    }

    fn look(&mut self, at_once: bool) -> Update {
        let mut problems = Vec::new();
        let mut changed = false;
        for source in &mut self.sources {
            changed |= source.look(at_once, &mut self.strings, &mut problems);
        }
        for problem in &problems {
            tracing::warn!(
                file = %problem.file.display(), kind = problem.kind, name = problem.name,
                "{}", problem.message,
            );
        }
        self.problems_total
            .fetch_add(problems.len() as u64, Ordering::Relaxed);
        let changes = match changed {
            true => self.diff(),
            false => Vec::new(),
        };
        Update { changes, problems }
    }

    /// Merges the files anew and compares. What is gone comes first, so that an address is free
    /// before its next holder comes.
    fn diff(&mut self) -> Vec<Change> {
        let files = self.sources.iter().flat_map(|s| s.files.values());
        let all = files.flat_map(|f| &f.objects);
        let new: BTreeMap<Key, Object> = all.map(|o| (o.key().clone(), o.clone())).collect();
        let gone = self.objects.keys().filter(|key| !new.contains_key(key));
        let mut changes: Vec<Change> = gone.cloned().map(Change::Delete).collect();
        let upserts = new
            .iter()
            .filter(|(key, o)| self.objects.get(key) != Some(o));
        changes.extend(upserts.map(|(_, object)| Change::Upsert(object.clone())));
        self.objects = new;
        self.strings.purge();
        changes
    }
}

impl Source {
    /// Returns whether objects may have changed.
    fn look(&mut self, at_once: bool, strings: &mut Interner, problems: &mut Vec<Problem>) -> bool {
        let mut found = match list(&self.path) {
            Ok(found) => found,
            Err(error) => {
                self.fail(&error, problems);
                return false;
            }
        };
        self.failed = None;
        for path in found.keys() {
            self.files.entry(path.clone()).or_default();
        }
        let mut changed = false;
        self.files.retain(|path, file| {
            let now = found.remove(path).and_then(|m| stamp(&m));
            let settled = at_once || file.seen == Some(now);
            file.seen = Some(now);
            if !settled || file.done == Some(now) {
                return true;
            }
            file.done = Some(now);
            if now.is_some() {
                changed |= file.read(path, strings, problems);
            } else {
                // Taken out of a folder; of a path that was named, `list` fails.
                changed = true;
            }
            now.is_some()
        });
        changed
    }

    /// The path itself is not there or cannot be read. That is said once, and not in the instant
    /// in which an editor replaces a file.
    fn fail(&mut self, error: &io::Error, problems: &mut Vec<Problem>) {
        let said = match self.failed {
            Some((kind, said)) if kind == error.kind() => {
                if !said {
                    let message = format!("cannot be read ({error}); what was read before stays");
                    problems.push(whole(&self.path, message));
                }
                true
            }
            _ => false,
        };
        self.failed = Some((error.kind(), said));
    }
}

/// The files at a path: itself, or those in the folder that it is.
pub(crate) fn list(path: &Path) -> io::Result<BTreeMap<PathBuf, Metadata>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_dir() {
        return Ok(BTreeMap::from([(path.to_owned(), metadata)]));
    }
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let is_manifest = path
            .extension()
            .is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        // A dot begins a ConfigMap's own `..data` and the temporary files of editors.
        if !is_manifest || name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        match fs::metadata(&path) {
            Ok(m) if m.is_file() => _ = found.insert(path, m),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

fn whole(file: &Path, message: String) -> Problem {
    Problem {
        file: file.to_owned(),
        kind: String::new(),
        name: String::new(),
        message,
    }
}

impl File {
    /// Reads the file; of one that is broken the last good objects stay. Returns whether it was
    /// read.
    fn read(&mut self, path: &Path, strings: &mut Interner, problems: &mut Vec<Problem>) -> bool {
        let is_json = path.extension().is_some_and(|e| e == "json");
        let text = fs::read_to_string(path).map_err(|e| format!("cannot be read: {e}"));
        let objects = match text.and_then(|text| document::read(&text, is_json)) {
            Ok(objects) => objects,
            Err(message) => {
                let message = match self.objects.is_empty() {
                    true => format!("{message}; nothing of it is used"),
                    false => format!("{message}; its last good objects stay"),
                };
                problems.push(whole(path, message));
                return false;
            }
        };
        tracing::debug!(
            file = %path.display(), used = objects.parsed.len(),
            malformed = objects.malformed.len(), of_other_kinds = objects.ignored, "objects read",
        );
        let before = std::mem::take(&mut self.objects);
        for malformed in objects.malformed {
            let (namespace, name) = (&malformed.namespace, &malformed.name);
            // Its last good state stays, as it does when the API server refuses a change.
            let last_good = before.iter().find(|o| {
                let key = o.key();
                key.kind.as_str() == malformed.kind
                    && *key.name == **name
                    && (*key.namespace == **namespace || namespace.is_empty())
            });
            let consequence = match last_good {
                Some(_) => "its last good state stays",
                None => "it is skipped",
            };
            self.objects.extend(last_good.cloned());
            problems.push(Problem {
                file: path.to_owned(),
                name: match namespace.is_empty() {
                    true => name.clone(),
                    false => format!("{namespace}/{name}"),
                },
                message: format!("{}; {consequence}", malformed.message),
                kind: malformed.kind,
            });
        }
        let parsed = objects.parsed.into_iter();
        self.objects.extend(parsed.map(|p| p.strip(strings)));
        true
    }
}

/// Looks at the files every [`POLL_INTERVAL`] until `shutdown`, and hands what changed to `apply`.
///
/// Reading happens on a thread of its own, which ends with the process: a dump of gigabytes must
/// neither hold up the runtime nor a shutdown.
///
/// # Errors
/// The thread cannot be started, or it died.
pub async fn run(
    mut files: Files,
    mut apply: impl FnMut(Vec<Change>),
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    // One: while changes wait, the next look waits.
    let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
    let thread = std::thread::Builder::new().name("objects".into());
    thread.spawn(move || {
        while !sender.is_closed() {
            std::thread::sleep(POLL_INTERVAL);
            let changes = files.poll().changes;
            if !changes.is_empty() && sender.blocking_send(changes).is_err() {
                return;
            }
        }
    })?;
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => return Ok(()),
            changes = receiver.recv() => match changes {
                Some(changes) => apply(changes),
                None => return Err(io::Error::other("the thread that reads --objects died")),
            },
        }
    }
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
