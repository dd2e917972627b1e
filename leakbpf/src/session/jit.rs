//! Where a process writes the names of the code that it makes at run time.

use std::{
    fs::{File, OpenOptions},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::PathBuf,
};

use crate::{
    process::{Pid, status::Status},
    symbolize::PerfMap,
};

/// Found while the process lives, because its perf map outlives it, and its names are asked for at
/// the end.
#[derive(Debug)]
pub struct PerfMapPlace {
    root: File,
    namespace_pid: u32,
    uid: u32,
}

impl PerfMapPlace {
    pub fn find(pid: Pid) -> Option<Self> {
        let status = Status::of(pid).ok()?;
        let root = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(pid.proc_path("root"))
            .ok()?;
        Some(Self {
            root,
            namespace_pid: status.namespace_pids.last().copied().unwrap_or(pid.0),
            uid: status.effective_uid?,
        })
    }

    /// What the perf map says now.
    pub fn read(&self) -> Option<PerfMap> {
        let root = PathBuf::from(format!("/proc/self/fd/{}", self.root.as_raw_fd()));
        PerfMap::open(&root, self.namespace_pid, self.uid).ok().flatten()
    }
}
