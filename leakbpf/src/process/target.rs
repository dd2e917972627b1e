//! Gathers what [`crate::preflight::target`] judges.

use std::fs;

use super::status::{ElfKind, SeccompMode, Stat, Status};
use super::{Pid, ProcessError, read_proc};
use crate::preflight::target::TargetFacts;

/// Looks at a process. `go` says whether its executable holds Go text, which only a reader of ELF
/// files can tell.
pub fn observe(pid: Pid, go: bool) -> Result<TargetFacts, ProcessError> {
    let stat = Stat::of(pid)?;
    let without_memory = stat.kernel_thread || stat.is_zombie();
    let elf = if without_memory { None } else { ElfKind::of(pid)? };
    let (seccomp, shadow_stack) = strictest_thread(pid)?;
    Ok(TargetFacts {
        pid: pid.0,
        comm: String::from_utf8_lossy(&stat.comm).into_owned(),
        kernel_thread: stat.kernel_thread,
        zombie: stat.is_zombie(),
        elf,
        seccomp,
        shadow_stack,
        go,
    })
}

/// Filters and shadow stacks belong to threads: the first one's status says nothing of the others'.
fn strictest_thread(pid: Pid) -> Result<(SeccompMode, bool), ProcessError> {
    let first = Status::of(pid)?;
    let mut strictest = (first.seccomp, first.shadow_stack);
    let Ok(threads) = fs::read_dir(pid.proc_path("task")) else {
        return Ok(strictest);
    };
    for thread in threads.flatten() {
        let Some(tid) = thread.file_name().to_str().map(str::to_owned) else {
            continue;
        };
        // A thread that ended meanwhile is no obstacle.
        if let Ok(bytes) = read_proc(pid, &format!("task/{tid}/status")) {
            let status = Status::parse(&bytes);
            strictest.0 = strictest.0.max(status.seccomp);
            strictest.1 |= status.shadow_stack;
        }
    }
    Ok(strictest)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_agent_itself_is_an_ordinary_process() {
        let facts = observe(Pid::current(), false).expect("ourselves");
        assert!(!facts.kernel_thread && !facts.zombie);
        assert_eq!(facts.elf.map(|elf| elf.bits), Some(64));
    }

    #[test]
    fn a_filter_of_a_later_thread_is_seen() {
        let source = r#"
            #include <pthread.h>
            #include <stddef.h>
            #include <linux/filter.h>
            #include <linux/seccomp.h>
            #include <sys/prctl.h>
            #include <unistd.h>
            static void *confined(void *unused) {
                char byte;
                struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
                struct sock_fprog filter = {1, &allow};
                prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter)) _exit(9);
                write(1, "x", 1);
                read(0, &byte, 1);
                return unused;
            }
            int main(void) {
                pthread_t thread;
                pthread_create(&thread, 0, confined, 0);
                pthread_join(thread, 0);
            }"#;
        let program = crate::process::launch::tests::Program::compile(source, &["-pthread"]);
        let mut child = Command::new(program.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start");
        child.stdout.as_mut().expect("stdout").read_exact(&mut [0]).expect("confined");
        let pid = Pid(child.id());
        let own = Status::of(Pid::current()).expect("status").seccomp;
        assert_eq!(Status::of(pid).expect("status").seccomp, own, "the first thread is as we are");
        assert_eq!(observe(pid, false).expect("facts").seccomp, SeccompMode::Filter);
        child.stdin.as_mut().expect("stdin").write_all(b"x").expect("release");
        assert!(child.wait().expect("wait").success());
    }

    #[test]
    fn a_zombie_is_observed_without_an_error() {
        let mut child = Command::new("true").spawn().expect("true");
        let raw = nix::sys::wait::Id::Pid(nix::unistd::Pid::from_raw(child.id() as i32));
        let flags = nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT;
        nix::sys::wait::waitid(raw, flags).expect("dead");
        assert!(observe(Pid(child.id()), false).expect("facts").zombie);
        child.wait().expect("wait");
        assert!(matches!(observe(Pid(child.id()), false), Err(ProcessError::Gone(_))));
    }
}
