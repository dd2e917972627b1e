//! Where the paths of a process begin, held open: files can be found there when it is gone.

use std::{
    fs::{self, File},
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::PathBuf,
};

use super::{Pid, ProcessError, classify};

/// `/proc/PID/root`, opened.
#[derive(Debug)]
pub struct RootDirectory {
    directory: File,
    id: RootId,
}

/// The same directory with the same mounts below it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RootId {
    device: u64,
    inode: u64,
    /// As the kernel spells it: `mnt:[4026531841]`.
    mount_namespace: PathBuf,
}

impl RootDirectory {
    pub fn open(pid: Pid) -> Result<Self, ProcessError> {
        let path = pid.proc_path("root");
        let open = || {
            let directory = File::open(&path)?;
            let metadata = directory.metadata()?;
            let mount_namespace = fs::read_link(pid.proc_path("ns/mnt"))?;
            let id = RootId { device: metadata.dev(), inode: metadata.ino(), mount_namespace };
            Ok(Self { directory, id })
        };
        open().map_err(|error| classify(pid, path.clone(), error))
    }

    pub fn id(&self) -> &RootId {
        &self.id
    }

    /// A path to it for this process, as long as this value lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd()))
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn files_are_found_below_the_root_of_a_process_that_is_gone() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat");
        let root = RootDirectory::open(Pid(child.id())).expect("root");
        assert_eq!(root.id(), RootDirectory::open(Pid::current()).expect("root").id());
        child.kill().expect("kill");
        child.wait().expect("wait");
        assert!(RootDirectory::open(Pid(child.id())).is_err());
        let program = std::env::current_exe().expect("path");
        let below = root.path().join(program.strip_prefix("/").expect("absolute"));
        let inode = |path: &PathBuf| fs::metadata(path).expect("file").ino();
        assert_eq!(inode(&below), inode(&program));
    }
}
