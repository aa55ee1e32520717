//! Reading `/proc/net` files of a namespace: through a process in it, else by entering it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};

use super::{Namespace, parse};

/// A text longer than this is cut off: `fib_trie` of a router with 10,000 routes has 0.5 MB.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// Reads files of any namespace, one at a time.
#[derive(Debug)]
pub struct Reader {
    proc: PathBuf,
    visitor: Option<Visitor>,
}

impl Reader {
    /// `proc` is where procfs is mounted.
    pub fn new(proc: &Path) -> Self {
        Self {
            proc: proc.to_owned(),
            visitor: None,
        }
    }

    /// Reads `/proc/net/FILE` of a namespace into `text`, in place of what it held; `false` if the
    /// namespace is gone.
    ///
    /// Nothing stays open: an open file would keep the namespace, and its devices with it.
    ///
    /// # Errors
    /// The kernel refuses (`PermissionDenied`: a namespace without a process takes
    /// CAP_SYS_ADMIN), or the file cannot be read.
    pub fn read(
        &mut self,
        namespace: &Namespace,
        file: &'static str,
        text: &mut String,
    ) -> io::Result<bool> {
        for pid in &namespace.pids {
            let process = self.proc.join(pid.to_string());
            match read_of_process(&process, namespace.id, file, text) {
                Ok(true) => return Ok(true),
                // Another process may be left.
                Ok(false) => {}
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let Some(mount) = &namespace.mount else {
            return Ok(false);
        };
        match self.visit(mount, namespace.id, file, text) {
            Err(error) if is_gone(&error) => Ok(false),
            result => result,
        }
    }

    fn visit(
        &mut self,
        mount: &Path,
        id: u32,
        file: &'static str,
        text: &mut String,
    ) -> io::Result<bool> {
        let visitor = match self.visitor.take() {
            Some(visitor) => visitor,
            None => Visitor::start()?,
        };
        let visit = Visit {
            mount: mount.to_owned(),
            id,
            file,
            text: std::mem::take(text),
        };
        // A visitor that could not come home has ended: the next visit starts another.
        let (result, read) = visitor.visit(visit)?;
        self.visitor = Some(visitor);
        *text = read;
        result
    }
}

/// `false` if the process is in another namespace by now.
fn read_of_process(process: &Path, id: u32, file: &str, text: &mut String) -> io::Result<bool> {
    let opened = File::open(process.join("net").join(file))?;
    // What was opened is the namespace of that moment: its number may be another's by now, or the
    // process have moved on.
    if link(&process.join("ns/net"))? != Some(id) {
        return Ok(false);
    }
    fill(opened, text).map(|()| true)
}

fn fill(file: File, text: &mut String) -> io::Result<()> {
    text.clear();
    file.take(MAX_TEXT_BYTES).read_to_string(text).map(drop)
}

/// The inode number that a link as `/proc/PID/ns/net` names.
///
/// # Errors
/// It cannot be read.
pub fn link(path: &Path) -> io::Result<Option<u32>> {
    let name = std::fs::read_link(path)?;
    Ok(name.to_str().and_then(parse::inode))
}

/// Whether an error says that the process or the namespace has ended.
pub fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}

/// A thread that enters namespaces, so that no other one is ever in the wrong one.
#[derive(Debug)]
struct Visitor {
    visits: SyncSender<Visit>,
    results: Receiver<(io::Result<bool>, String)>,
}

struct Visit {
    mount: PathBuf,
    id: u32,
    file: &'static str,
    text: String,
}

impl Visitor {
    fn start() -> io::Result<Self> {
        let (visits, asked) = sync_channel::<Visit>(0);
        let (answer, results) = sync_channel(0);
        let home = File::open("/proc/thread-self/ns/net")?;
        std::thread::Builder::new()
            .name("netns".to_owned())
            .stack_size(128 * 1024)
            .spawn(move || {
                for Visit {
                    mount,
                    id,
                    file,
                    mut text,
                } in asked
                {
                    let result = visit(&mount, id, file, &mut text);
                    // Home before the answer: whoever stays keeps the namespace alive.
                    if setns(&home, CloneFlags::CLONE_NEWNET).is_err()
                        || answer.send((result, text)).is_err()
                    {
                        return;
                    }
                }
            })?;
        Ok(Self { visits, results })
    }

    fn visit(&self, visit: Visit) -> io::Result<(io::Result<bool>, String)> {
        let ended = || io::Error::other("the thread that enters network namespaces ended");
        self.visits.send(visit).map_err(|_| ended())?;
        self.results.recv().map_err(|_| ended())
    }
}

/// `false` if another namespace, or none, is mounted there by now.
fn visit(mount: &Path, id: u32, file: &str, text: &mut String) -> io::Result<bool> {
    let namespace = File::open(mount)?;
    if namespace.metadata()?.ino() != u64::from(id) {
        return Ok(false);
    }
    setns(&namespace, CloneFlags::CLONE_NEWNET)?;
    let opened = File::open(Path::new("/proc/thread-self/net").join(file))?;
    fill(opened, text).map(|()| true)
}
