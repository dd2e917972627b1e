//! The agent's own limits.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::process::Pid;

/// Soft and hard limit.
type Limits = (u64, u64);

/// Lets the agent open as many files as it may. Returns the limits that there were before, or
/// `None` when nothing was changed.
pub fn raise_open_files() -> Option<Limits> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    if soft >= hard || setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() {
        return None;
    }
    Some((soft, hard))
}

/// Gives a program that inherited the raised limit the former one: programs that use `select(2)`
/// break when they get descriptors above 1023.
pub fn restore(pid: Pid, (soft, hard): Limits) {
    let limits = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    let Ok(raw) = libc::pid_t::try_from(pid.0) else { return };
    // SAFETY: `limits` is live, and no old limits are asked for. A failure means that the program
    // is gone.
    unsafe {
        libc::prlimit(raw, libc::RLIMIT_NOFILE, &raw const limits, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_gets_the_limit_that_it_would_have_had_without_the_agent() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("cat");
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limits");
        restore(Pid(child.id()), (123, hard));
        let limits =
            std::fs::read_to_string(format!("/proc/{}/limits", child.id())).expect("limits");
        child.kill().expect("kill");
        child.wait().expect("wait");
        let line = limits.lines().find(|line| line.starts_with("Max open files"));
        let soft = line.and_then(|line| line.split_whitespace().nth(3));
        assert_eq!(soft, Some("123"));
    }
}
