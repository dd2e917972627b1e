//! Gathers what [`crate::preflight::host`] judges.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::Pid;
use super::status::Status;
use super::tracefs::tracepoint_format;
use crate::preflight::host::{HostFacts, OLDEST_KERNEL, SeccompAndReturnProbes, TRACEPOINTS};
use crate::preflight::kernel_version::KernelVersion;

/// `__NR_uretprobe` of the kernel's arch/x86/entry/syscalls/syscall_64.tbl.
const SYS_URETPROBE: libc::c_long = 335;
/// What the test filter answers: an error number that no system call returns.
const FILTERED_ERRNO: i32 = 3999;

const KERNEL_TYPES: &str = "/sys/kernel/btf/vmlinux";

/// Looks at this machine and at the agent's rights. What cannot be read counts as absent.
pub fn observe() -> HostFacts {
    let kernel_release = line("/proc/sys/kernel/osrelease").unwrap_or_default();
    let status = Status::of(Pid::current()).unwrap_or_default();
    let is_old =
        KernelVersion::parse(&kernel_release).is_none_or(|version| version < OLDEST_KERNEL);
    let btf = Path::new(KERNEL_TYPES);
    HostFacts {
        architecture: std::env::consts::ARCH.to_owned(),
        effective_uid: nix::unistd::geteuid().as_raw(),
        effective_capabilities: status.effective_capabilities,
        pid_namespace: link("/proc/self/ns/pid"),
        user_namespace: link("/proc/self/ns/user"),
        has_bpf: has_bpf(),
        has_btf: btf.exists(),
        btf_has_attach_cookie: is_old && contains(btf, b"BPF_FUNC_get_attach_cookie"),
        uprobe_event_type: line("/sys/bus/event_source/devices/uprobe/type")
            .and_then(|text| text.parse().ok()),
        perf_event_paranoid: line("/proc/sys/kernel/perf_event_paranoid")
            .and_then(|text| text.parse().ok()),
        lockdown: line("/sys/kernel/security/lockdown"),
        tracepoints: TRACEPOINTS.map(|(name, _)| (name, tracepoint_format(name))).to_vec(),
        seccomp_and_return_probes: try_seccomp(),
        kernel_release,
    }
}

/// Whether the kernel maps huge pages wherever it can.
pub fn maps_huge_pages_unasked() -> bool {
    line("/sys/kernel/mm/transparent_hugepage/enabled")
        .is_some_and(|modes| modes.contains("[always]"))
}

/// The kernel's type information (BTF), where it gives it.
pub fn kernel_types() -> Option<Vec<u8>> {
    fs::read(KERNEL_TYPES).ok()
}

fn line(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end().to_owned())
}

fn link(path: &str) -> Option<String> {
    Some(fs::read_link(path).ok()?.to_string_lossy().into_owned())
}

fn contains(path: &Path, needle: &[u8]) -> bool {
    fs::read(path).is_ok_and(|bytes| bytes.windows(needle.len()).any(|window| window == needle))
}

fn has_bpf() -> bool {
    const NO_SUCH_COMMAND: libc::c_int = -1;
    // SAFETY: the kernel refuses the command (or us) before it reads the attributes, whose size is 0.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, NO_SUCH_COMMAND, std::ptr::null::<libc::c_void>(), 0)
    };
    // EINVAL says that it exists; so does EPERM, unless a container's filter gives it.
    result >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS)
}

/// Asks the kernel whether seccomp filters see the system call at the end of a return probe: two
/// children make it themselves, one under a filter that refuses it, one without. Made by hand it is
/// harmless: the caller gets `SIGILL` or an error (arch/x86/kernel/uprobes.c).
fn try_seccomp() -> SeccompAndReturnProbes {
    match in_child(|| if install_filter() { make_call() } else { Answer::Untried }) {
        Some(Answer::Filtered) => match in_child(make_call) {
            Some(Answer::NoSuchCall) => SeccompAndReturnProbes::Safe,
            Some(Answer::Untried) | None => SeccompAndReturnProbes::Untried,
            Some(Answer::Filtered | Answer::Passed) => SeccompAndReturnProbes::Crash,
        },
        Some(Answer::Passed | Answer::NoSuchCall) => SeccompAndReturnProbes::Safe,
        Some(Answer::Untried) | None => SeccompAndReturnProbes::Untried,
    }
}

/// How a child ended.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Passed = 0,
    Filtered = 1,
    NoSuchCall = 2,
    Untried = 3,
}

fn in_child(action: impl FnOnce() -> Answer) -> Option<Answer> {
    // SAFETY: the child makes system calls only and leaves by _exit.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: plain system calls on values that live here; SIG_DFL is no handler of ours.
            unsafe {
                libc::setrlimit(libc::RLIMIT_CORE, &no_core);
                libc::signal(libc::SIGILL, libc::SIG_DFL);
                libc::_exit(action() as i32)
            }
        }
        Ok(ForkResult::Parent { child }) => loop {
            match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, code)) => {
                    let answers =
                        [Answer::Passed, Answer::Filtered, Answer::NoSuchCall, Answer::Untried];
                    return answers.into_iter().find(|&answer| answer as i32 == code);
                }
                Ok(WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGILL, _)) => {
                    return Some(Answer::Passed);
                }
                Ok(WaitStatus::Signaled(..)) => return None,
                Ok(_) | Err(nix::errno::Errno::EINTR) => continue,
                Err(_) => return None,
            }
        },
        Err(_) => None,
    }
}

fn make_call() -> Answer {
    // SAFETY: outside a return probe's trampoline the kernel refuses this call without effects.
    unsafe { libc::syscall(SYS_URETPROBE) };
    match nix::errno::Errno::last_raw() {
        FILTERED_ERRNO => Answer::Filtered,
        libc::ENOSYS => Answer::NoSuchCall,
        // A container's own filter.
        libc::EPERM => Answer::Untried,
        _ => Answer::Passed,
    }
}

fn install_filter() -> bool {
    const LOAD_NUMBER: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, k, jf| libc::sock_filter { code, jt: 0, jf, k };
    let mut steps = [
        // `nr` is the first field of struct seccomp_data.
        step(LOAD_NUMBER, 0, 0),
        step(JUMP_IF_EQUAL, SYS_URETPROBE as u32, 1),
        step(RETURN, libc::SECCOMP_RET_ERRNO | FILTERED_ERRNO as u32, 0),
        step(RETURN, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: `program` and its steps live until both calls are done; the kernel copies them.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    }
}

/// As the machine calls itself.
pub fn name() -> String {
    nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let host = observe();
        assert!(host.version().is_some(), "{}", host.kernel_release);
        assert_eq!(host.tracepoints.len(), TRACEPOINTS.len());
        assert!(host.pid_namespace.expect("a namespace").starts_with("pid:["));
    }

    #[test]
    fn the_filter_answers_for_the_call_that_it_is_about_and_no_other() {
        // The number of a call that the kernel has in every release, under the same filter.
        let other = in_child(|| {
            // SAFETY: getppid takes nothing and cannot fail.
            let alive = install_filter() && unsafe { libc::getppid() } > 0;
            if alive { Answer::Passed } else { Answer::Untried }
        });
        assert_eq!(other, Some(Answer::Passed));
    }

    #[test]
    fn a_repaired_kernel_is_found_safe_and_an_old_one_too() {
        let version = observe().version().expect("a version");
        let answer = try_seccomp();
        let repaired = version >= KernelVersion::new(6, 14, 0);
        let before = version < KernelVersion::new(5, 14, 0);
        if repaired || before {
            assert_eq!(answer, SeccompAndReturnProbes::Safe);
        } else {
            // Distributions repair and carry back: any real answer is right.
            assert_ne!(answer, SeccompAndReturnProbes::Untried);
        }
    }

    #[test]
    fn a_child_that_the_call_ends_counts_as_passed() {
        let ended = in_child(|| {
            // SAFETY: the child is meant to end by this.
            unsafe { libc::raise(libc::SIGILL) };
            Answer::Untried
        });
        assert_eq!(ended, Some(Answer::Passed));
    }
}
