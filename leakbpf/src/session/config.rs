//! What a session is asked to do: the command line's meaning, without its spelling.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use crate::{
    probe::kernel::Links,
    process::select::Selector,
    profile::{BlockFilter, Mode},
    report::{Format, Sort},
};

/// Whom a session is about.
#[derive(Debug, Clone)]
pub enum Target {
    /// Processes that run already.
    Running(Selector),
    /// A program to start.
    Program { program: OsString, arguments: Vec<OsString> },
}

/// Where the result goes besides the terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    Recording(PathBuf),
    Report(Format, PathBuf),
}

/// How stacks are walked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StackMethod {
    /// With rows where the kernel can do that, else by frame pointers.
    Auto,
    /// With rows compiled from call frame information (DWARF), as well as the kernel can.
    Rows,
    /// As kernels without `bpf_loop` do it.
    RowsBounded,
    FramePointers,
}

#[derive(Debug, Clone)]
pub struct Config {
    pub target: Target,
    pub mode: Mode,
    pub duration: Option<Duration>,
    pub output: Option<Output>,
    pub filter: BlockFilter,
    pub interval: Duration,
    pub top: usize,
    pub sort: Sort,
    pub blocks: bool,
    pub follow_forks: bool,
    /// One probe for all processes that map a file, instead of one for each that is watched.
    pub shared_probes: bool,
    /// Most outstanding blocks that the kernel side keeps; in the mode that looks at pages, most
    /// pages that the agent keeps.
    pub max_blocks: u32,
    pub stack: StackMethod,
    /// What holds the probes, if not what suits the session best.
    pub links: Option<Links>,
    /// Kernel memory for all unwind tables together. 400 libraries of a desktop take some 40 MB.
    pub max_table_bytes: u64,
    /// Keep names for later sessions, and use those that earlier ones kept.
    pub cache: bool,
    pub quiet: bool,
}
