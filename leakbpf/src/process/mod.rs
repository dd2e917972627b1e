//! Other processes as the kernel shows them: the only place that reads `/proc` and `/sys`, and that
//! starts, watches and waits for processes.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

pub mod cpu_time;
pub mod exit;
pub mod host;
pub mod launch;
pub mod loader;
pub mod mapped_file;
pub mod maps;
pub mod memory;
pub mod pagemap;
pub mod preemption;
pub mod priority;
pub mod root_directory;
pub mod select;
pub mod status;
pub mod target;
pub mod tracefs;

/// A process (the kernel's thread group id), as the agent's pid namespace numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pid(pub u32);

/// A thread (the kernel's `task->pid`), as the agent's pid namespace numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tid(pub u32);

impl Pid {
    /// The agent itself.
    pub fn current() -> Self {
        Self(std::process::id())
    }

    /// `/proc/PID/ENTRY`.
    pub fn proc_path(self, entry: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{self}/{entry}"))
    }

    /// For system calls; a number that no process can have (0, or above the kernel's
    /// `PID_MAX_LIMIT` of 2^22) is an error before it can mean "every process" or "my group".
    fn to_raw(self) -> Result<nix::unistd::Pid, ProcessError> {
        match i32::try_from(self.0) {
            Ok(raw) if raw > 0 => Ok(nix::unistd::Pid::from_raw(raw)),
            _ => Err(ProcessError::Gone(self)),
        }
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Tid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why something about a process could not be learnt.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("process {0} does not exist (any more): `ps -e` lists those that do")]
    Gone(Pid),
    #[error("no permission to read {}: run as root, or grant CAP_SYS_PTRACE", path.display())]
    Denied { pid: Pid, path: PathBuf },
    #[error("{} is not what this kernel's documentation says: {reason}", path.display())]
    Malformed { path: PathBuf, reason: String },
    #[error("cannot read {}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
}

/// No file in `/proc` of a sane process comes near; a hostile one must not fill the agent's memory.
const PROC_FILE_LIMIT_BYTES: u64 = 256 << 20;

fn read_proc(pid: Pid, entry: &str) -> Result<Vec<u8>, ProcessError> {
    let path = pid.proc_path(entry);
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(PROC_FILE_LIMIT_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| classify(pid, path.clone(), error))?;
    if bytes.len() as u64 > PROC_FILE_LIMIT_BYTES {
        return Err(ProcessError::Malformed { path, reason: "larger than 256 MiB".into() });
    }
    Ok(bytes)
}

/// Tells "gone" from "hidden" (`hidepid=` mounts answer `ENOENT` for foreign processes).
fn classify(pid: Pid, path: PathBuf, error: io::Error) -> ProcessError {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => ProcessError::Denied { pid, path },
        Some(libc::ENOENT | libc::ESRCH) => match pid.to_raw() {
            Ok(raw) if nix::sys::signal::kill(raw, None) == Err(nix::errno::Errno::EPERM) => {
                ProcessError::Denied { pid, path }
            }
            Ok(raw)
                if nix::sys::signal::kill(raw, None).is_ok() && pid.proc_path("stat").exists() =>
            {
                ProcessError::Unreadable { path, source: error }
            }
            _ => ProcessError::Gone(pid),
        },
        _ => ProcessError::Unreadable { path, source: error },
    }
}
