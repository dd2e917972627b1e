//! Starting a program so that probes are in place before its first allocation.
//!
//! The program is started traced (`ptrace`), run to the moment at which its loader has mapped and
//! relocated every library but run none of their constructors, held there while the caller places
//! probes, and let go for good.
//!
//! That moment is the loader's call of `_dl_debug_state`, the hook that debuggers use: glibc (elf/rtld.c,
//! `dl_main`) calls it when it begins to add libraries and again when the list is consistent; musl
//! (ldso/dynlink.c) calls it once, when it is. The trap there is an `int3`, taken out before the
//! caller is called: a probe may be placed on the same instruction.
//!
//! Should the agent die meanwhile, the kernel kills the program (`PTRACE_O_EXITKILL`) instead of
//! letting it run into that trap. It has not reached its own first instruction yet, so nothing is lost.

use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, pthread_sigmask, signal};
use nix::unistd::{ForkResult, fork};

use super::loader::LoaderHook;
use super::maps::Maps;
use super::{Pid, ProcessError};

/// Exit status for a program that was found but cannot be executed, as `env` and `timeout` use it.
pub const EXIT_NOT_EXECUTABLE: u8 = 126;
/// Exit status for a program that was not found.
pub const EXIT_NOT_FOUND: u8 = 127;

/// Why a program was not started. Nothing of it is left running.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError<E> {
    #[error("{} was not found: give its path, or a name that is in $PATH", program.display())]
    NotFound { program: OsString },
    #[error("{} cannot be executed: {source}", program.display())]
    NotExecutable { program: OsString, source: io::Error },
    #[error("an argument of {} contains a zero byte", program.display())]
    ZeroByte { program: OsString },
    /// A missing library, for example; the program has said so itself.
    #[error("{} ended before its first instruction ({status})", program.display())]
    EndedEarly { program: OsString, status: ExitStatus },
    #[error("cannot {action} {}", program.display())]
    Trace { action: &'static str, program: OsString, source: io::Error },
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// From the caller's closure.
    #[error("{0}")]
    NotReady(E),
}

impl<E> LaunchError<E> {
    /// Status with which the agent should end: the program's own where it has one, 127 and 126 as
    /// shells, `env` and `timeout` do; `None` for errors that are the agent's.
    pub fn exit_code(&self) -> Option<u8> {
        match self {
            Self::NotFound { .. } => Some(EXIT_NOT_FOUND),
            Self::NotExecutable { .. } => Some(EXIT_NOT_EXECUTABLE),
            Self::EndedEarly { status, .. } => Some(exit_code(*status)),
            Self::ZeroByte { .. } | Self::Trace { .. } | Self::Process(_) | Self::NotReady(_) => {
                None
            }
        }
    }
}

/// A shell's `$?`: the exit status, or 128 and the number of the signal that ended it.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    };
    u8::try_from(code).unwrap_or(255)
}

/// A program that was started and now runs on its own. Dropping this leaves it running.
#[derive(Debug)]
pub struct LaunchedProgram {
    raw: nix::unistd::Pid,
    status: Option<ExitStatus>,
}

impl LaunchedProgram {
    pub fn pid(&self) -> Pid {
        Pid(self.raw.as_raw().unsigned_abs())
    }

    /// Passes a signal on. Only for signals that were sent to the agent alone: a terminal's Ctrl-C
    /// and Ctrl-\ already reach the program, which is in the same process group. A program that has
    /// ended gets none, nor does a stranger under its id: the id is kept until [`Self::try_wait`].
    pub fn forward(&self, signal: Signal) -> io::Result<()> {
        match self.status {
            Some(_) => Ok(()),
            None => match kill(self.raw, signal) {
                Ok(()) | Err(Errno::ESRCH) => Ok(()),
                Err(error) => Err(error.into()),
            },
        }
    }

    /// How the program ended, if it has. Never waits; combine it with
    /// [`super::exit::ExitWatch::exited`].
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.reap(libc::WNOHANG)
    }

    /// Waits for the program's end.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.reap(0)? {
                return Ok(status);
            }
        }
    }

    fn reap(&mut self, flags: i32) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = wait_for(self.raw, flags)?.and_then(|stop| match stop {
                Stop::Ended(status) => Some(status),
                Stop::Signal(_) => None,
            });
        }
        Ok(self.status)
    }
}

/// Starts `program` (looked up in `$PATH` as `execvp` does) and holds it before its first
/// constructor while `on_ready` runs, then lets it go. It inherits the standard streams, the
/// environment and ignored signals (as under `nohup`), but no blocked ones, and `SIGPIPE` is as usual
/// again. On an error, also one of `on_ready`, the program is killed.
///
/// `ptrace` binds tracer and tracee by thread: all of this happens on the calling one, which is
/// blocked until the program runs.
pub fn launch<R, E: fmt::Display>(
    program: &OsStr,
    arguments: &[OsString],
    on_ready: impl FnOnce(Pid) -> Result<R, E>,
) -> Result<(LaunchedProgram, R), LaunchError<E>> {
    let tracee = Tracee::start(program, arguments)?;
    let deferred = match tracee.run_to_last_library() {
        Ok(Reached::Ready { deferred }) => deferred,
        Ok(Reached::End(status)) => {
            tracee.forget();
            return Err(LaunchError::EndedEarly { program: program.to_owned(), status });
        }
        Err(error) => return Err(error.named(program)),
    };
    let ready = on_ready(tracee.pid()).map_err(LaunchError::NotReady)?;
    tracee.release(deferred).map_err(|error| error.named(program)).map(|child| (child, ready))
}

/// A failure in the start phase, before it is known for which program.
enum StartError {
    Trace { action: &'static str, source: io::Error },
    Process(ProcessError),
}

impl StartError {
    fn named<E>(self, program: &OsStr) -> LaunchError<E> {
        match self {
            Self::Trace { action, source } => {
                LaunchError::Trace { action, program: program.to_owned(), source }
            }
            Self::Process(error) => LaunchError::Process(error),
        }
    }
}

impl From<ProcessError> for StartError {
    fn from(error: ProcessError) -> Self {
        Self::Process(error)
    }
}

fn tracing<T>(action: &'static str, result: nix::Result<T>) -> Result<T, StartError> {
    result.map_err(|error| StartError::Trace { action, source: error.into() })
}

enum Reached {
    Ready {
        /// A stop signal that arrived meanwhile, or 0.
        deferred: i32,
    },
    End(ExitStatus),
}

enum Stop {
    /// Its number: real-time signals have no name.
    Signal(i32),
    Ended(ExitStatus),
}

/// A child that is traced by this thread and stopped. Killed on drop.
struct Tracee {
    raw: nix::unistd::Pid,
    running_alone: bool,
}

impl Tracee {
    /// Returns at the stop that follows a successful `execve`: the new program is mapped and has run
    /// no instruction.
    fn start<E>(program: &OsStr, arguments: &[OsString]) -> Result<Self, LaunchError<E>> {
        let trace =
            |action, source| LaunchError::Trace { action, program: program.to_owned(), source };
        let words: Vec<CString> = std::iter::once(program)
            .chain(arguments.iter().map(OsString::as_os_str))
            .map(|word| CString::new(word.as_bytes()))
            .collect::<Result<_, _>>()
            .map_err(|_| LaunchError::ZeroByte { program: program.to_owned() })?;
        let mut pointers: Vec<*const libc::c_char> =
            words.iter().map(|word| word.as_ptr()).collect();
        pointers.push(std::ptr::null());
        let (failure_reader, failure_writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .map_err(|error| trace("make a pipe for", error.into()))?;

        // With all signals blocked, none reaches the agent's handlers in the child's first moments.
        let mut before = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))
            .map_err(|error| trace("block signals for", error.into()))?;
        // SAFETY: the child calls only async-signal-safe functions until it executes or exits, and
        // `pointers` (made before) lives in its copy of our memory.
        let forked = match unsafe { fork() } {
            // SAFETY: this is the child of a fork; `pointers` is a null-terminated array of C strings.
            Ok(ForkResult::Child) => unsafe { become_program(&pointers, &failure_writer) },
            Ok(ForkResult::Parent { child }) => Ok(child),
            Err(error) => Err(error),
        };
        let restored = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
        drop(failure_writer);
        let raw = forked.map_err(|error| trace("fork for", error.into()))?;
        let tracee = Self { raw, running_alone: false };
        restored.map_err(|error| trace("unblock signals for", error.into()))?;
        match tracee.run_to_trap(&mut 0).map_err(|error| error.named(program))? {
            Some(status) => {
                tracee.forget();
                Err(start_failure(program, status, &failure_reader))
            }
            None => {
                ptrace::setoptions(raw, ptrace::Options::PTRACE_O_EXITKILL)
                    .map_err(|error| trace("trace", error.into()))?;
                Ok(tracee)
            }
        }
    }

    fn pid(&self) -> Pid {
        Pid(self.raw.as_raw().unsigned_abs())
    }

    fn run_to_last_library(&self) -> Result<Reached, StartError> {
        let mut deferred = 0;
        let Some(hook) = LoaderHook::find(self.pid(), &Maps::of(self.pid())?)? else {
            return Ok(Reached::Ready { deferred });
        };
        let trap = Trap::set(self.raw, hook.function_avma)?;
        loop {
            self.resume(Resume::Continue, 0)?;
            if let Some(status) = self.run_to_hit(&trap, &mut deferred)? {
                return Ok(Reached::End(status));
            }
            trap.clear()?;
            if hook.list_is_consistent(|avma| trap.read(avma)) {
                return Ok(Reached::Ready { deferred });
            }
            self.resume(Resume::Step, 0)?;
            if let Some(status) = self.wait_for_trap(&mut deferred, Resume::Step)? {
                return Ok(Reached::End(status));
            }
            trap.arm()?;
        }
    }

    fn run_to_hit(
        &self,
        trap: &Trap,
        deferred: &mut i32,
    ) -> Result<Option<ExitStatus>, StartError> {
        loop {
            if let Some(status) = self.wait_for_trap(deferred, Resume::Continue)? {
                return Ok(Some(status));
            }
            if trap.step_back_from_hit()? {
                return Ok(None);
            }
            // Somebody's SIGTRAP, not ours.
            self.resume(Resume::Continue, libc::SIGTRAP)?;
        }
    }

    fn run_to_trap(&self, deferred: &mut i32) -> Result<Option<ExitStatus>, StartError> {
        self.wait_for_trap(deferred, Resume::Continue)
    }

    /// Waits for the next `SIGTRAP` and delivers other signals on the way. A stop signal would end in
    /// a stop that looks like this one: it is kept for later.
    fn wait_for_trap(
        &self,
        deferred: &mut i32,
        resume: Resume,
    ) -> Result<Option<ExitStatus>, StartError> {
        loop {
            let stop = wait_for(self.raw, libc::__WALL)
                .map_err(|source| StartError::Trace { action: "wait for", source })?;
            let signal = match stop {
                Some(Stop::Ended(status)) => return Ok(Some(status)),
                Some(Stop::Signal(libc::SIGTRAP)) => return Ok(None),
                Some(Stop::Signal(
                    signal @ (libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU),
                )) => {
                    *deferred = signal;
                    0
                }
                Some(Stop::Signal(signal)) => signal,
                None => continue,
            };
            self.resume(resume, signal)?;
        }
    }

    /// Lets it go on after delivering a signal (0: none).
    fn resume(&self, how: Resume, signal: i32) -> Result<(), StartError> {
        let (request, action) = match how {
            Resume::Continue => (libc::PTRACE_CONT, "resume"),
            Resume::Step => (libc::PTRACE_SINGLESTEP, "step"),
            Resume::Detached => (libc::PTRACE_DETACH, "let go of"),
        };
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: these requests take no memory of ours; the last argument is the signal's number.
        let result = unsafe {
            libc::ptrace(request, self.raw.as_raw(), nothing, libc::c_long::from(signal))
        };
        tracing(action, Errno::result(result).map(drop))
    }

    fn release(mut self, deferred: i32) -> Result<LaunchedProgram, StartError> {
        self.resume(Resume::Detached, deferred)?;
        self.running_alone = true;
        Ok(LaunchedProgram { raw: self.raw, status: None })
    }

    /// It has ended and was waited for.
    fn forget(mut self) {
        self.running_alone = true;
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if !self.running_alone {
            // Neither can fail in a way that leaves it running: it is our unreaped child.
            let _ = kill(self.raw, Signal::SIGKILL);
            while !matches!(wait_for(self.raw, libc::__WALL), Ok(Some(Stop::Ended(_))) | Err(_)) {}
        }
    }
}

#[derive(Clone, Copy)]
enum Resume {
    Continue,
    Step,
    Detached,
}

/// An `int3` in a stopped tracee.
struct Trap {
    raw: nix::unistd::Pid,
    avma: u64,
    /// The eight bytes there, as they were.
    original: i64,
}

impl Trap {
    fn set(raw: nix::unistd::Pid, avma: u64) -> Result<Self, StartError> {
        let original = tracing("read the loader of", ptrace::read(raw, avma as *mut libc::c_void))?;
        let trap = Self { raw, avma, original };
        trap.arm()?;
        Ok(trap)
    }

    fn arm(&self) -> Result<(), StartError> {
        self.write((self.original & !0xff) | 0xcc)
    }

    fn clear(&self) -> Result<(), StartError> {
        self.write(self.original)
    }

    fn write(&self, word: i64) -> Result<(), StartError> {
        let address = self.avma as *mut libc::c_void;
        tracing("place a trap in the loader of", ptrace::write(self.raw, address, word))
    }

    fn read(&self, avma: u64) -> Option<u64> {
        ptrace::read(self.raw, avma as *mut libc::c_void).ok().map(|word| word as u64)
    }

    /// Whether the tracee stopped here; if so it will execute the instruction when resumed.
    fn step_back_from_hit(&self) -> Result<bool, StartError> {
        let mut registers = tracing("read the registers of", ptrace::getregs(self.raw))?;
        if registers.rip != self.avma.wrapping_add(1) {
            return Ok(false);
        }
        registers.rip = self.avma;
        tracing("set the registers of", ptrace::setregs(self.raw, registers))?;
        Ok(true)
    }
}

/// # Safety
/// Only in the child of a fork; `words` must be null-terminated and point to C strings.
unsafe fn become_program(words: &[*const libc::c_char], failure: &OwnedFd) -> ! {
    if ptrace::traceme().is_ok() {
        // Handlers fall away at execve by themselves, ignored signals do not; SIGPIPE is ignored
        // because Rust's runtime does that in the agent, not because the user wants it.
        // SAFETY: SIG_DFL is no handler of ours.
        let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
        let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
        if let Some(&program) = words.first() {
            // SAFETY: as the caller promises.
            unsafe { libc::execvp(program, words.as_ptr()) };
        }
    }
    let errno = (Errno::last_raw()).to_ne_bytes();
    // SAFETY: `errno` is four readable bytes, and _exit does not return.
    unsafe {
        libc::write(failure.as_raw_fd(), errno.as_ptr().cast(), errno.len());
        libc::_exit(i32::from(EXIT_NOT_FOUND))
    }
}

fn start_failure<E>(program: &OsStr, status: ExitStatus, failure: &OwnedFd) -> LaunchError<E> {
    let mut errno = [0; 4];
    match nix::unistd::read(failure, &mut errno) {
        Ok(4) => {
            let source = io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
            let program = program.to_owned();
            match source.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) => LaunchError::NotFound { program },
                // execvp also says so of a folder in $PATH that may not be searched.
                Some(libc::EACCES) if is_in_no_folder(&program) => {
                    LaunchError::NotFound { program }
                }
                _ => LaunchError::NotExecutable { program, source },
            }
        }
        _ => LaunchError::EndedEarly { program: program.to_owned(), status },
    }
}

fn is_in_no_folder(program: &OsStr) -> bool {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    !program.as_bytes().contains(&b'/')
        && !std::env::split_paths(&folders).any(|folder| folder.join(program).exists())
}

/// `None` when `WNOHANG` was asked for and nothing has happened. Not nix's `waitpid`, which fails for
/// real-time signals.
fn wait_for(raw: nix::unistd::Pid, flags: i32) -> io::Result<Option<Stop>> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is an integer that the call may write.
        match unsafe { libc::waitpid(raw.as_raw(), &mut status, flags) } {
            0 => return Ok(None),
            -1 => match Errno::last() {
                Errno::EINTR => continue,
                error => return Err(error.into()),
            },
            _ if libc::WIFSTOPPED(status) => {
                return Ok(Some(Stop::Signal(libc::WSTOPSIG(status))));
            }
            _ => return Ok(Some(Stop::Ended(ExitStatus::from_raw(status)))),
        }
    }
}

#[cfg(test)]
#[path = "launch_tests.rs"]
pub(super) mod tests;
