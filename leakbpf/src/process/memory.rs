//! Reading another process's memory.

use std::{fs::File, os::unix::fs::FileExt as _};

use super::{Pid, ProcessError, classify};

/// `/proc/PID/mem`, opened.
#[derive(Debug)]
pub struct Memory {
    file: File,
}

impl Memory {
    pub fn open(pid: Pid) -> Result<Self, ProcessError> {
        let path = pid.proc_path("mem");
        match File::open(&path) {
            Ok(file) => Ok(Self { file }),
            Err(error) => Err(classify(pid, path, error)),
        }
    }

    /// `None` where nothing is mapped, or when the process is gone.
    pub fn byte(&self, avma: u64) -> Option<u8> {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, avma).ok()?;
        Some(byte[0])
    }
}
