//! Opening files as a target sees them.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("no such file")]
    Missing,
    #[error("not a regular file")]
    NotRegular,
    #[error("cannot be opened: {0}")]
    Io(#[from] io::Error),
}

/// Opens `path` below `root`; absolute links and `..` stay inside of it.
pub fn open(root: &Path, path: &Path) -> Result<File, OpenError> {
    open_with(root, path, OFlag::empty())
}

/// As [`open`], but refuses a link as the last part of `path`.
pub fn open_unlinked(root: &Path, path: &Path) -> Result<File, OpenError> {
    open_with(root, path, OFlag::O_NOFOLLOW)
}

fn open_with(root: &Path, path: &Path, flags: OFlag) -> Result<File, OpenError> {
    let root = File::open(root)?;
    // O_NONBLOCK: a FIFO under a library's name must not hold us up.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | flags)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = match openat2(root.as_fd(), path, how) {
        Ok(file) => File::from(file),
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Err(OpenError::Missing),
        Err(errno) => return Err(io::Error::from(errno).into()),
    };
    if !file.metadata()?.is_file() {
        return Err(OpenError::NotRegular);
    }
    Ok(file)
}
