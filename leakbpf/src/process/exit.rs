//! Noticing that a process ends.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::status::Stat;
use super::{Pid, ProcessError, classify};

#[derive(Debug, thiserror::Error)]
pub enum ExitWatchError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("process {0} ended, and its id already belongs to another process")]
    Reused(Pid),
    #[error("cannot watch process {pid}")]
    Watch { pid: Pid, source: io::Error },
}

/// Becomes ready when every thread of a process is gone; not when only the first one is.
#[derive(Debug)]
pub struct ExitWatch {
    pid: Pid,
    pidfd: OwnedFd,
}

impl ExitWatch {
    /// `start_time` is [`Stat::start_time`] as it was when the process was chosen: the check after
    /// opening makes sure that it is still that process, and a pidfd never becomes another one's.
    pub fn open(pid: Pid, start_time: u64) -> Result<Self, ExitWatchError> {
        let raw = pid.to_raw()?;
        // SAFETY: the call takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, raw.as_raw(), 0) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::ESRCH) => classify(pid, pid.proc_path("stat"), error).into(),
                _ => ExitWatchError::Watch { pid, source: error },
            });
        }
        // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        if Stat::of(pid)?.start_time != start_time {
            return Err(ExitWatchError::Reused(pid));
        }
        Ok(Self { pid, pidfd })
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether the process has ended, without waiting.
    pub fn has_exited(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
    }

    /// Waits until the process has ended. Needs a tokio runtime with I/O; may be dropped and called
    /// again. `&mut`: two waits at once would register the descriptor twice, which epoll refuses.
    pub async fn exited(&mut self) -> io::Result<()> {
        // SAFETY: the registration lives shorter than the descriptor, which `self` owns and never
        // exchanges.
        let registered =
            unsafe { AsyncFd::register_with_interest(self.pidfd.as_fd(), Interest::READABLE) }?;
        registered.readable().await?.retain_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::process::mapped_file::MappedFile;
    use crate::process::maps::Maps;
    use crate::process::status::Identity;

    fn waiting_child() -> Child {
        Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("cat")
    }

    fn watch(child: &Child) -> ExitWatch {
        let pid = Pid(child.id());
        let start_time = Stat::of(pid).expect("alive").start_time;
        ExitWatch::open(pid, start_time).expect("a watch")
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("runtime").block_on(future)
    }

    #[test]
    fn the_end_of_a_process_is_noticed_before_it_is_reaped() {
        let mut child = waiting_child();
        let mut watch = watch(&child);
        assert!(!watch.has_exited().expect("poll"));
        block_on(async {
            let early = tokio::time::timeout(std::time::Duration::ZERO, watch.exited()).await;
            assert!(early.is_err(), "it lives");
            drop(child.stdin.take());
            watch.exited().await.expect("the end");
            watch.exited().await.expect("still ended");
        });
        assert!(watch.has_exited().expect("poll"));
        child.wait().expect("wait");
        assert!(watch.has_exited().expect("poll"));
    }

    #[test]
    fn another_process_under_the_same_id_is_not_watched() {
        let mut child = waiting_child();
        let pid = Pid(child.id());
        let start_time = Stat::of(pid).expect("alive").start_time;
        let error = ExitWatch::open(pid, start_time + 1).expect_err("another start time");
        assert!(matches!(error, ExitWatchError::Reused(_)), "{error}");
        child.kill().expect("kill");
        child.wait().expect("wait");
        let error = ExitWatch::open(pid, start_time).expect_err("gone");
        assert!(matches!(error, ExitWatchError::Process(ProcessError::Gone(_))), "{error}");
    }

    #[test]
    fn a_process_whose_first_thread_ended_still_lives() {
        // A thread that outlives the first one and waits for the end of its input.
        let source = r#"
            #include <pthread.h>
            #include <unistd.h>
            static void *rest(void *first) {
                char byte;
                pthread_join(*(pthread_t *)first, 0);
                write(1, "x", 1);
                while (read(0, &byte, 1) > 0) {}
                return 0;
            }
            static pthread_t first, second;
            int main(void) {
                first = pthread_self();
                pthread_create(&second, 0, rest, &first);
                pthread_exit(0);
            }"#;
        let program = crate::process::launch::tests::Program::compile(source, &["-pthread"]);
        let mut child = Command::new(program.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start");
        let mut byte = [0];
        use std::io::Read;
        child.stdout.as_mut().expect("stdout").read_exact(&mut byte).expect("joined");
        let mut watch = watch(&child);
        assert!(!watch.has_exited().expect("poll"));
        // Its memory is there, too, though not below the first thread's id.
        let pid = Pid(child.id());
        assert!(!Stat::of(pid).expect("alive").is_zombie());
        let maps = Maps::of(pid).expect("maps");
        assert!(maps.executable_files().len() >= 3);
        for file in maps.executable_files() {
            MappedFile::open(pid, file.mappings[0]).expect("a mapped file");
        }
        assert!(!Identity::of(pid).expect("alive").exe.is_empty());
        drop(child.stdin.take());
        block_on(watch.exited()).expect("the end");
        child.wait().expect("wait");
    }
}
