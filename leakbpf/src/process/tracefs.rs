//! tracefs, which describes the kernel's tracepoints: where it is mounted, or a mount of our own that
//! no other process sees and that ends with the agent.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::preflight::host::UnreadFile;

/// The second place is the one of kernels before 4.1 and of debugfs.
const MOUNTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// Of the kernel's include/uapi/linux/mount.h.
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;

/// The format file of a tracepoint, such as `sched/sched_process_exit`.
pub fn tracepoint_format(name: &str) -> Result<Vec<u8>, UnreadFile> {
    let [first, second] = MOUNTS.map(|mount| format_file(Path::new(mount), name));
    fs::read(&first).or_else(|error| {
        fs::read(&second)
            .or_else(|_| fs::read(format_file(own_mount()?, name)))
            .map_err(|_| UnreadFile { path: first, reason: error.kind() })
    })
}

fn format_file(mount: &Path, tracepoint: &str) -> PathBuf {
    mount.join("events").join(tracepoint).join("format")
}

/// The root of a mount that is attached to no directory.
fn own_mount() -> io::Result<&'static Path> {
    static MOUNT: OnceLock<Option<(OwnedFd, PathBuf)>> = OnceLock::new();
    let mount = MOUNT.get_or_init(|| {
        let root = mount_detached(c"tracefs").ok()?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
        Some((root, path))
    });
    mount.as_ref().map(|(_, path)| path.as_path()).ok_or(io::ErrorKind::NotFound.into())
}

/// fsopen(2), fsconfig(2), fsmount(2); since Linux 5.2.
fn mount_detached(kind: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: `kind` is a string with an end.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
    let nothing = std::ptr::null::<libc::c_void>();
    // SAFETY: this command takes neither key nor value.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            nothing,
            nothing,
            0,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: numbers only.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let descriptor = i32::try_from(result).map_err(io::Error::other)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_of_our_own_needs_rights_and_has_the_events() {
        match mount_detached(c"tracefs") {
            Ok(root) => {
                let path = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
                let format = fs::read(format_file(&path, "task/task_newtask")).expect("readable");
                assert!(String::from_utf8_lossy(&format).contains("name: task_newtask"));
            }
            Err(error) => {
                assert!(!nix::unistd::geteuid().is_root(), "root is refused: {error}");
            }
        }
    }

    #[test]
    fn an_unknown_tracepoint_is_named() {
        let error = tracepoint_format("no/such_event").expect_err("there is none");
        assert!(error.path.ends_with("events/no/such_event/format"));
    }
}
