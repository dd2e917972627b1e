//! Integration tests: real processes, real probes, an independent oracle.
//!
//! A [`Target`] is a program under test that answers commands line by line; `Leakbpf` is the
//! agent attached to it; [`Books`] are what really is outstanding, kept by the program itself or by
//! a preloaded library. [`compare`] says block by block where the two differ. Everything here
//! panics with the reason and its remedy: it is test code, and a precondition that does not hold
//! fails the test instead of skipping it.

// Attaching needs root: a test that does it and is not declared to need the feature must not compile.
#[cfg(feature = "privileged")]
mod agent;
mod books;
mod build;
mod command;
mod compare;
mod pages;
mod profile;
mod refusal;
#[cfg(feature = "privileged")]
mod scenario;
pub mod servers;
mod services;
mod storm;
mod target;
mod traces;

#[cfg(feature = "privileged")]
pub use agent::{Leakbpf, Session};
pub use books::{Books, Event, EventKind, KnownBlock};
pub use build::{
    Allocator, Program, bare_program, c_library, c_library_without_frame_pointers, c_program,
    c_program_without_frame_pointers, cpp_program, require_file, require_program, rust_program,
};
pub use command::leakbpf_command;
pub use compare::{Difference, assert_heap_equals, heap_difference};
pub use pages::PageSet;
pub use profile::{Block, Frame, Process, Profile, Site, Totals};
pub use refusal::{assert_nothing_written, assert_refused};
#[cfg(feature = "privileged")]
pub use scenario::{assert_exact, assert_exact_on, assert_exact_with_oracle};
pub use services::{Service, free_port};
pub use storm::{StormLog, assert_storm_explained};
pub use target::Target;
pub use traces::{
    BpfIds, links_of, text_differences, unwind_tables, wait_until_more_links, wait_until_probed,
};

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of the kernel side and of the books.
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec for the call to fill.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Major and minor version of the kernel that runs.
pub fn kernel_version() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel");
    let mut numbers = release.split(['.', '-']).map_while(|word| word.parse::<u32>().ok());
    let mut next = || numbers.next().unwrap_or_else(|| panic!("no version in {release}"));
    (next(), next())
}

/// Fails the test unless it runs as root.
pub fn require_root() {
    // SAFETY: geteuid has no preconditions.
    let uid = unsafe { libc::geteuid() };
    assert_eq!(uid, 0, "attaching probes needs root: run `sudo cargo xtask test --privileged`");
}
