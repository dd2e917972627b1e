//! Where a process writes the names of the code that it makes at run time.

use std::sync::Arc;

use crate::{
    process::{Pid, root_directory::RootDirectory, status::Status},
    profile::Symbol,
    symbolize::PerfMap,
};

/// Found while the process lives, because its perf map outlives it, and its names are asked for at
/// the end.
#[derive(Debug)]
pub struct PerfMapPlace {
    root: RootDirectory,
    namespace_pid: u32,
    uid: u32,
}

impl PerfMapPlace {
    pub fn find(pid: Pid) -> Option<Self> {
        let status = Status::of(pid).ok()?;
        Some(Self {
            root: RootDirectory::open(pid).ok()?,
            namespace_pid: status.namespace_pids.last().copied().unwrap_or(pid.0),
            uid: status.effective_uid?,
        })
    }

    /// What the perf map says now.
    pub fn read(&self) -> Option<PerfMap> {
        PerfMap::open(&self.root.path(), self.namespace_pid, self.uid).ok().flatten()
    }
}

/// The name of code at an address, where a perf map has it.
pub fn symbols(map: Option<&PerfMap>, avma: u64) -> Arc<[Symbol]> {
    let name = map.and_then(|map| map.name(avma.saturating_sub(1)));
    name.map(|function| Symbol { function, file: None, line: None, inlined: false })
        .into_iter()
        .collect()
}
