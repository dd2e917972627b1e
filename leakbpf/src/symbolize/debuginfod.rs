//! Debug files from debuginfod servers, which `debuginfod-find` asks for us.
//!
//! It is a program of its own and not a library so that a server, and what parses its answers, can
//! be stopped. What it says is only a path: whether the file there belongs to the module is judged
//! like that of any other debug file.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::elf::debug_files::hex;

const PROGRAM: &str = "debuginfod-find";
/// More files are not asked for in one session: build ids are what the files of others state.
const FILES_MAX: usize = 256;
/// Programs that run at the same time: most of what they do is wait.
const PARALLEL: usize = 4;
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// `PATH_MAX` of Linux, and the end of the line.
const ANSWER_MAX_BYTES: u64 = 4097;

/// Why a debug file was not fetched.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    #[error(
        "{PROGRAM} is not in PATH: install it (Debian: debuginfod, Fedora: elfutils-debuginfod-client), or unset DEBUGINFOD_URLS"
    )]
    NoProgram,
    #[error("{PROGRAM} cannot be started: {0}")]
    Start(String),
    #[error("no server of DEBUGINFOD_URLS has it or answers (`{PROGRAM} debuginfo {0}` says more)")]
    NotServed(String),
    #[error("no server of DEBUGINFOD_URLS sent it in {} s", .0.as_secs_f32())]
    Slow(Duration),
    #[error("{PROGRAM} answered with something that is no file's path")]
    NoPath,
    #[error("a session asks for {FILES_MAX} files at most")]
    TooMany,
    #[error("the {} s that a session waits for debuginfod are over", .0.as_secs_f32())]
    Over(Duration),
    #[error("a signal ended the wait for debuginfod")]
    Interrupted,
}

/// How long to wait for servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For one file.
    pub file: Duration,
    /// For all files of a session.
    pub session: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { file: Duration::from_secs(10), session: Duration::from_secs(30) }
    }
}

impl Patience {
    /// `DEBUGINFOD_MAXTIME` is the time in seconds after which `debuginfod-find` itself gives up a
    /// file.
    pub fn of(variable: impl Fn(&str) -> Option<OsString>) -> Patience {
        let standard = Patience::default();
        let text = variable("DEBUGINFOD_MAXTIME").and_then(|text| text.into_string().ok());
        let seconds = text.and_then(|text| text.parse::<u32>().ok()).filter(|&seconds| seconds > 0);
        let Some(seconds) = seconds else { return standard };
        // It is stopped only when it does not keep to it.
        let file = Duration::from_secs(u64::from(seconds) + 1);
        Patience { file, session: standard.session.max(file) }
    }
}

/// Asks the servers in `DEBUGINFOD_URLS`, each file once.
#[derive(Debug)]
pub struct Client {
    program: Option<PathBuf>,
    patience: Patience,
    spent: Duration,
    asked: HashSet<Vec<u8>>,
    interrupted: Arc<AtomicBool>,
}

impl Client {
    /// `None` when `DEBUGINFOD_URLS` names no server. `variable` looks up the environment.
    pub fn new(patience: Patience, variable: impl Fn(&str) -> Option<OsString>) -> Option<Client> {
        let urls = variable("DEBUGINFOD_URLS")?;
        if urls.as_encoded_bytes().trim_ascii().is_empty() {
            return None;
        }
        let program = variable("PATH").and_then(|path| find_program(&path));
        let interrupted = Arc::default();
        Some(Client {
            program,
            patience,
            spent: Duration::ZERO,
            asked: HashSet::new(),
            interrupted,
        })
    }

    /// Nothing is waited for when `interrupted` is set.
    pub fn end_with(&mut self, interrupted: Arc<AtomicBool>) {
        self.interrupted = interrupted;
    }

    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// Was the file asked for before?
    pub fn has_asked(&self, build_id: &[u8]) -> bool {
        self.asked.contains(build_id)
    }

    /// Has the files of these build ids fetched; returns the path of each, in the same order.
    pub fn fetch(&mut self, build_ids: &[Vec<u8>]) -> Vec<Result<PathBuf, FetchError>> {
        let began = Instant::now();
        let patience = self.patience;
        let until = began + patience.session.saturating_sub(self.spent);
        let mut answers: Vec<Result<PathBuf, FetchError>> =
            build_ids.iter().map(|_| Err(FetchError::Over(patience.session))).collect();
        let allowed = FILES_MAX.saturating_sub(self.asked.len());
        self.asked.extend(build_ids.iter().cloned());
        let Some(program) = &self.program else {
            answers.fill_with(|| Err(FetchError::NoProgram));
            return answers;
        };

        answers.iter_mut().skip(allowed).for_each(|answer| *answer = Err(FetchError::TooMany));
        let mut waiting = build_ids.iter().zip(&mut answers).take(allowed);
        let mut running: Vec<(Running, &mut Result<PathBuf, FetchError>)> = Vec::new();
        loop {
            if self.interrupted.load(Ordering::Relaxed) {
                let unanswered = running.into_iter().map(|(_, answer)| answer);
                for answer in unanswered.chain(waiting.map(|(_, answer)| answer)) {
                    *answer = Err(FetchError::Interrupted);
                }
                break;
            }
            while running.len() < PARALLEL && Instant::now() < until {
                let Some((build_id, answer)) = waiting.next() else { break };
                match Running::start(program, build_id, patience, until) {
                    Ok(started) => running.push((started, answer)),
                    Err(error) => *answer = Err(error),
                }
            }
            if running.is_empty() {
                break;
            }
            std::thread::sleep(POLL_INTERVAL);
            running.retain_mut(|(program, answer)| match program.poll() {
                Some(outcome) => {
                    **answer = outcome;
                    false
                }
                None => true,
            });
        }
        self.spent += began.elapsed();
        answers
    }
}

/// Only absolute directories: where root happens to stand is not where its programs are.
fn find_program(path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(path).filter(|directory| directory.is_absolute()).find_map(|directory| {
        let program = directory.join(PROGRAM);
        let metadata = program.metadata().ok()?;
        let is_executable = metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
        is_executable.then_some(program)
    })
}

/// A program that was started, and is stopped when it is dropped.
struct Running {
    child: Child,
    hex_id: String,
    until: Instant,
    /// What to say when it still runs then.
    late: FetchError,
    has_ended: bool,
}

impl Running {
    fn start(
        program: &Path,
        build_id: &[u8],
        patience: Patience,
        session_until: Instant,
    ) -> Result<Running, FetchError> {
        let failed = |error: io::Error| FetchError::Start(error.to_string());
        let hex_id = hex(build_id);
        let mut command = Command::new(program);
        command
            .args(["debuginfo", &hex_id])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Ctrl-C ends the session, which ends this; and what it starts is stopped with it.
            .process_group(0);
        if std::env::var_os("DEBUGINFOD_MAXTIME").is_none() {
            // When it gives up by itself, it removes what it has of the file.
            let seconds = patience.file.as_secs().saturating_sub(1).max(1);
            command.env("DEBUGINFOD_MAXTIME", seconds.to_string());
        }
        let child = command.spawn().map_err(failed)?;
        let file_until = Instant::now() + patience.file;
        let (until, late) = match file_until < session_until {
            true => (file_until, FetchError::Slow(patience.file)),
            false => (session_until, FetchError::Over(patience.session)),
        };
        let running = Running { child, hex_id, until, late, has_ended: false };
        if let Some(stdout) = &running.child.stdout {
            // A process that it left behind may keep the pipe open.
            fcntl(stdout.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(|errno| failed(errno.into()))?;
        }
        Ok(running)
    }

    /// What came of it; `None` while it runs and may.
    fn poll(&mut self) -> Option<Result<PathBuf, FetchError>> {
        match self.child.try_wait() {
            Ok(Some(status)) => {
                self.has_ended = true;
                Some(match status.success() {
                    true => self.answer(),
                    false => Err(FetchError::NotServed(self.hex_id.clone())),
                })
            }
            Ok(None) if Instant::now() < self.until => None,
            Ok(None) => Some(Err(self.late.clone())),
            Err(error) => Some(Err(FetchError::Start(error.to_string()))),
        }
    }

    fn answer(&mut self) -> Result<PathBuf, FetchError> {
        let mut answer = Vec::new();
        if let Some(stdout) = &mut self.child.stdout {
            // An error is the end of what it wrote.
            let _ = stdout.take(ANSWER_MAX_BYTES).read_to_end(&mut answer);
        }
        let line = answer.strip_suffix(b"\n").ok_or(FetchError::NoPath)?;
        let path = PathBuf::from(OsString::from_vec(line.to_vec()));
        match path.is_absolute() && path.is_file() {
            true => Ok(path),
            false => Err(FetchError::NoPath),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        /// A killed process that waits for a disk or a server may stay for as long as it likes.
        const POLLS_MAX: u32 = 20;
        if self.has_ended {
            return;
        }
        if let Ok(group) = i32::try_from(self.child.id()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        for _ in 0..POLLS_MAX {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}
