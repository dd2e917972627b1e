use std::io;

use super::*;

fn unreadable(errno: i32) -> ProcessError {
    let source = io::Error::from_raw_os_error(errno);
    ProcessError::Unreadable { path: "/proc/7/pagemap".into(), source }
}

#[test]
fn pages_that_cannot_be_looked_at_are_told_of_with_the_remedy() {
    let text = pages_unseen(unreadable(libc::EMFILE), true).expect("told");
    assert!(text.contains("/proc/7/pagemap") && text.contains("Too many open files"), "{text}");
    assert!(text.contains("counts as resident") && text.contains("ulimit -n"), "{text}");
    let denied = ProcessError::Denied { pid: Pid(7), path: "/proc/7/pagemap".into() };
    let text = pages_unseen(denied, true).expect("told");
    assert!(text.contains("CAP_SYS_PTRACE") && !text.contains("ulimit"), "{text}");
    // A kernel without CONFIG_PROC_PAGE_MONITOR.
    assert!(pages_unseen(unreadable(libc::ENOENT), true).is_some());
}

#[test]
fn of_memory_that_is_gone_nothing_is_told() {
    assert_eq!(pages_unseen(ProcessError::Gone(Pid(7)), true), None);
    assert_eq!(pages_unseen(unreadable(libc::ESRCH), true), None);
    assert_eq!(pages_unseen(unreadable(libc::EMFILE), false), None);
}

#[test]
fn memory_that_no_site_explains_may_have_come_without_a_fault() {
    let text = unexplained_text(100 << 20, 20 << 20);
    assert!(text.contains("100 MiB") && text.contains("20 MiB"), "{text}");
    assert!(text.contains("moved by mremap or brought in without a fault"), "{text}");
}
