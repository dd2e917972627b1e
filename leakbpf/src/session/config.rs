//! What a session is asked to do: the command line's meaning, without its spelling.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use leakbpf_common::sampling::Sampling;

use crate::{
    probe::settings::Links,
    process::select::Selector,
    profile::BlockFilter,
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

/// How memory is looked at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// Every block.
    Exact,
    /// One block every so many bytes.
    Sample { interval_bytes: u32 },
    /// Resident pages, one in so many.
    Pages { one_in: u32 },
    /// Every block, for short times with long ones between them.
    Windows { limit: Limit },
    /// Every block while that costs little enough, else samples, else windows; and pages at all times.
    Auto { limit: Limit, one_in: u32, interval_bytes: u32 },
}

/// Most that a session may cost, in millionths of the watched processes' own processor time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub ppm: u32,
}

impl Method {
    /// Whether allocator functions are probed.
    pub const fn probes(self) -> bool {
        !matches!(self, Self::Pages { .. })
    }

    /// One page in so many is looked at, where pages are.
    pub const fn page_interval(self) -> Option<u32> {
        match self {
            Self::Pages { one_in } | Self::Auto { one_in, .. } => Some(one_in),
            Self::Exact | Self::Sample { .. } | Self::Windows { .. } => None,
        }
    }

    /// Which blocks are recorded at first.
    pub const fn sampling(self) -> Sampling {
        match self {
            Self::Sample { interval_bytes } => {
                Sampling { interval_bytes: interval_bytes as u64, since_ns: 0 }
            }
            _ => Sampling::NONE,
        }
    }

    /// Whether blocks are sampled, or may be.
    pub const fn may_sample(self) -> bool {
        matches!(self, Self::Sample { .. } | Self::Auto { .. })
    }

    pub const fn limit(self) -> Option<Limit> {
        match self {
            Self::Windows { limit } | Self::Auto { limit, .. } => Some(limit),
            Self::Exact | Self::Sample { .. } | Self::Pages { .. } => None,
        }
    }
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
    pub method: Method,
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
