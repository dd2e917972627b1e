//! Opening the very file that a process has mapped, whatever happened to its name since.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use super::maps::{Backing, Device, Mapping, Maps};
use super::status::memory_owner;
use super::{Pid, ProcessError};

/// Why a mapped file could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the mapping at {0:#x} has no file")]
    NoFile(u64),
    #[error(
        "{} of process {pid} was replaced or deleted, and /proc/{pid}/map_files cannot be read: run as root",
        path.display()
    )]
    Replaced { pid: Pid, path: PathBuf },
    #[error("{} of process {pid} is no regular file", path.display())]
    NotRegular { pid: Pid, path: PathBuf },
    #[error("cannot open {} of process {pid}", path.display())]
    Unreadable { pid: Pid, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// A file that a process has mapped. Stays valid when the process ends.
#[derive(Debug)]
pub struct MappedFile {
    file: File,
}

impl MappedFile {
    /// Opens the file behind `mapping`.
    ///
    /// `/proc/PID/map_files` leads to deleted files and into every mount namespace, but wants
    /// `CAP_SYS_ADMIN` or `CAP_CHECKPOINT_RESTORE`; the fall-back is the name as the target sees it,
    /// taken only when device and inode are the mapping's.
    pub fn open(pid: Pid, mapping: &Mapping) -> Result<Self, OpenError> {
        let Backing::File { id, path, .. } = &mapping.backing else {
            return Err(OpenError::NoFile(mapping.start_avma));
        };
        let unreadable = |source| OpenError::Unreadable { pid, path: path.clone(), source };

        let owner = memory_owner(pid);
        if let Ok(fd) = open_location(&map_files_path(owner, mapping)) {
            let metadata = metadata(&fd).map_err(unreadable)?;
            // The inode says that the range was not reused since it was listed. Where stat and maps
            // number inodes differently (overlayfs), a second look at the list says so.
            if metadata.ino() == id.inode || still_mapped(pid, mapping)? {
                return Self::reopen(pid, path, fd);
            }
        }
        let fd = open_in_root(owner, path).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT) => OpenError::Replaced { pid, path: path.clone() },
            _ => unreadable(error),
        })?;
        let metadata = metadata(&fd).map_err(unreadable)?;
        if metadata.ino() != id.inode || device_of(metadata.dev()) != id.device {
            return Err(OpenError::Replaced { pid, path: path.clone() });
        }
        Self::reopen(pid, path, fd)
    }

    /// `O_PATH` descriptors come first: opening for real what a hostile process has put at a name
    /// (a FIFO, a tape drive) could block or have effects.
    fn reopen(pid: Pid, path: &Path, location: OwnedFd) -> Result<Self, OpenError> {
        let path = || path.to_path_buf();
        let unreadable = |source| OpenError::Unreadable { pid, path: path(), source };
        if !metadata(&location).map_err(unreadable)?.is_file() {
            return Err(OpenError::NotRegular { pid, path: path() });
        }
        let file = File::open(descriptor_path(&location)).map_err(unreadable)?;
        Ok(Self { file })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// A path that leads the agent, and the kernel in a system call of the agent, to this file for
    /// as long as `self` lives. `perf_event_open` resolves `uprobe_path` with `kern_path`
    /// (kernel/trace/trace_event_perf.c, kernel/trace/trace_uprobe.c), which follows such links.
    pub fn probe_path(&self) -> PathBuf {
        descriptor_path(&self.file)
    }
}

fn map_files_path(pid: Pid, mapping: &Mapping) -> PathBuf {
    pid.proc_path(&format!("map_files/{:x}-{:x}", mapping.start_avma, mapping.end_avma))
}

fn descriptor_path(fd: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn open_location(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// Absolute links inside the target's root must lead to the target's files, not to ours.
fn open_in_root(pid: Pid, path: &Path) -> io::Result<OwnedFd> {
    let root = open_location(&pid.proc_path("root"))?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    Ok(openat2(root, path, how)?)
}

fn metadata(fd: &OwnedFd) -> io::Result<std::fs::Metadata> {
    File::from(fd.try_clone()?).metadata()
}

fn device_of(dev: u64) -> Device {
    Device { major: libc::major(dev), minor: libc::minor(dev) }
}

fn still_mapped(pid: Pid, mapping: &Mapping) -> Result<bool, ProcessError> {
    Ok(Maps::of(pid)?.find(mapping.start_avma) == Some(mapping))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn own_code() -> Mapping {
        let address = own_code as *const () as u64;
        let maps = Maps::of(Pid::current()).expect("own maps");
        maps.find(address).expect("this function").clone()
    }

    #[test]
    fn the_own_executable_is_opened_through_its_mapping() {
        let opened = MappedFile::open(Pid::current(), &own_code()).expect("own executable");
        let mut magic = [0; 4];
        opened.file().read_exact_at(&mut magic, 0).expect("four bytes");
        assert_eq!(&magic, b"\x7fELF");
        let mut again = [0; 4];
        let mut through_path = File::open(opened.probe_path()).expect("the descriptor's path");
        through_path.read_exact(&mut again).expect("four bytes");
        assert_eq!(again, magic);
    }

    #[test]
    fn another_file_under_the_same_name_is_not_taken() {
        let mut mapping = own_code();
        // No such range, so that only the name remains.
        mapping.start_avma = 0x1000;
        mapping.end_avma = 0x2000;
        MappedFile::open(Pid::current(), &mapping).expect("the right file by name");
        if let Backing::File { id, .. } = &mut mapping.backing {
            id.inode ^= 1;
        }
        let error = MappedFile::open(Pid::current(), &mapping).expect_err("another inode");
        assert!(matches!(error, OpenError::Replaced { .. }), "{error}");
    }

    #[test]
    fn a_directory_or_a_device_is_not_opened() {
        let metadata = std::fs::metadata("/dev/null").expect("/dev/null");
        let mapping = Mapping {
            start_avma: 0x1000,
            end_avma: 0x2000,
            permissions: Default::default(),
            file_offset: 0,
            backing: Backing::File {
                id: super::super::maps::FileId {
                    device: device_of(metadata.dev()),
                    inode: metadata.ino(),
                },
                path: "/dev/null".into(),
                deleted: false,
            },
        };
        let error = MappedFile::open(Pid::current(), &mapping).expect_err("a device");
        assert!(matches!(error, OpenError::NotRegular { .. }), "{error}");
    }

    #[test]
    fn anonymous_memory_has_no_file() {
        let mut mapping = own_code();
        mapping.backing = Backing::Anonymous;
        let error = MappedFile::open(Pid::current(), &mapping).expect_err("no file");
        assert!(matches!(error, OpenError::NoFile(_)), "{error}");
    }
}
