//! A unix socket that only one agent owns.
//!
//! Who holds the lock on `PATH.lock` owns `PATH`: two agents that start at the same moment cannot
//! both replace the socket of a killed one. The kernel frees the lock of a killed agent.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, fchmod};
use tokio::net::{UnixListener, UnixSocket};

/// Longest path that fits a `sockaddr_un` with its final zero (unix(7)).
const MAX_PATH_BYTES: usize = 107;

/// Connections that wait to be accepted; more than there can be readers.
const BACKLOG: u32 = 128;

/// Why a socket could not be had. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Someone holds the lock, or answers.
    #[error(
        "another whydrop agent answers on {}; stop it or give this one another --socket",
        .0.display()
    )]
    InUse(PathBuf),
    /// A file of the user's is never deleted.
    #[error(
        "{} exists and is no socket; remove it or give the agent another --socket",
        .0.display()
    )]
    NoSocket(PathBuf),
    /// See [`MAX_PATH_BYTES`].
    #[error(
        "the path {} is longer than the {MAX_PATH_BYTES} bytes that a unix socket may have; \
         give the agent another --socket",
        .0.display()
    )]
    TooLong(PathBuf),
    /// The file system refused.
    #[error(
        "could not {what} {}: {source}; {} give it another --socket",
        .path.display(),
        remedy(.source)
    )]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// What else can be done.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => "make room there for the agent, or",
        io::ErrorKind::ReadOnlyFilesystem => "let the agent write there, or",
        _ => "run the agent as root or",
    }
}

/// A socket that listens. Dropping it removes the socket and its lock, if they are still ours.
#[derive(Debug)]
pub struct LocalSocket {
    listener: UnixListener,
    _owned: Owned,
}

/// The names in the file system, apart from the listener so that they are removed however binding
/// ends.
#[derive(Debug)]
struct Owned {
    path: PathBuf,
    /// Device and inode of the socket, once it is bound.
    socket: Option<(u64, u64)>,
    lock_path: PathBuf,
    /// Holds the lock.
    lock: File,
}

impl LocalSocket {
    /// Listens on `path`, mode 0600 from the first moment. Makes the parent folder if it is
    /// missing, and replaces the socket of an agent that was killed.
    ///
    /// # Errors
    /// If another agent has it, if `path` is no socket, or if the file system refuses.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| SocketError::Io { what, path, source }
        };
        if path.as_os_str().len() > MAX_PATH_BYTES {
            return Err(SocketError::TooLong(path.to_owned()));
        }
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(parent)
                .map_err(failed("make the folder", parent))?;
        }
        refuse_other_files(path)?;
        let mut owned = Owned::lock(path)?;
        refuse_other_files(path)?;
        match UnixStream::connect(path) {
            Ok(_) => return Err(SocketError::InUse(path.to_owned())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed("replace the old socket", path))?;
            }
            Err(e) => return Err(failed("look whether an agent answers on", path)(e)),
        }
        let socket = UnixSocket::new_stream().map_err(failed("make a socket for", path))?;
        // On Linux bind(2) gives the file the mode of the socket's own inode (less the umask), so
        // there is no moment in which others could connect.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|e| failed("set the mode of", path)(e.into()))?;
        socket.bind(path).map_err(failed("bind", path))?;
        owned.socket = Some(identity(path).map_err(failed("look at", path))?);
        let listener = socket.listen(BACKLOG).map_err(failed("listen on", path))?;
        Ok(Self {
            listener,
            _owned: owned,
        })
    }

    /// Where connections come in.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Owned {
    fn lock(path: &Path) -> Result<Self, SocketError> {
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let failed = |source| SocketError::Io {
            what: "lock",
            path: lock_path.clone(),
            source,
        };
        loop {
            let lock = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&lock_path)
                .map_err(failed)?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => {
                    return Err(SocketError::InUse(path.to_owned()));
                }
                Err(fs::TryLockError::Error(e)) => return Err(failed(e)),
            }
            // An agent that ends removes its lock file: what was locked must be what is there.
            let locked = lock.metadata().map_err(failed)?;
            if identity(&lock_path).ok() == Some((locked.dev(), locked.ino())) {
                return Ok(Self {
                    path: path.to_owned(),
                    socket: None,
                    lock_path,
                    lock,
                });
            }
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if self.socket.is_some() && identity(&self.path).ok() == self.socket {
            let _ = fs::remove_file(&self.path);
        }
        // Still locked here, so nobody else's lock is removed. Ours is empty; a file of the user's
        // that happens to have its name is not.
        if self.lock.metadata().is_ok_and(|m| m.len() == 0) {
            let _ = fs::remove_file(&self.lock_path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()))
}

fn refuse_other_files(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(SocketError::NoSocket(path.to_owned())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::Barrier;

    use super::*;

    fn bind(path: &Path) -> Result<LocalSocket, SocketError> {
        // A listener needs a reactor.
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_io().build().unwrap();
        let _guard = runtime.enter();
        LocalSocket::bind(path)
    }

    #[test]
    fn it_is_private_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/folder/agent.sock");
        let socket = bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        drop(socket);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn a_living_one_is_refused_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let first = bind(&path).unwrap();
        let error = bind(&path).unwrap_err().to_string();
        assert!(
            error.starts_with("another whydrop agent answers on "),
            "{error}"
        );
        assert!(error.contains("--socket"));
        UnixStream::connect(&path).unwrap();
        drop(first);
        bind(&path).unwrap();
    }

    #[test]
    fn a_listener_without_the_lock_is_refused_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(SocketError::InUse(_))));
        assert!(path.exists());
    }

    #[test]
    fn the_socket_of_a_killed_agent_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        fs::write(dir.path().join("agent.sock.lock"), "").unwrap();
        let _socket = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_of_the_users_stays() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("notes");
        fs::write(&file, "precious").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link, &dir.path().to_owned()] {
            assert!(
                matches!(bind(path), Err(SocketError::NoSocket(_))),
                "{path:?}"
            );
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            2,
            "no lock is left"
        );
    }

    #[test]
    fn only_its_own_socket_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let socket = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(socket);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_path_that_is_too_long_is_told() {
        let path = Path::new("/tmp").join("x".repeat(120));
        assert!(matches!(bind(&path), Err(SocketError::TooLong(_))));
    }

    #[test]
    fn of_many_that_start_at_once_one_has_it() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let path = dir.path().join(format!("{round}.sock"));
            if round % 2 == 0 {
                drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
            }
            let barrier = Barrier::new(8);
            let sockets: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            bind(&path)
                        })
                    })
                    .collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            let won = sockets.iter().filter(|s| s.is_ok()).count();
            assert_eq!(won, 1, "{sockets:?}");
            UnixStream::connect(&path).unwrap();
        }
    }
}
