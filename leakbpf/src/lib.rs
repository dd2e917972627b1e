//! leakbpf: which code holds the memory that a running process never frees.
//!
//! The module list is the architecture; docs/architecture.md draws it. Only [`probe`], [`process`]
//! and the binary touch the world; the rest is data in, data out.

pub mod elf;
pub mod ledger;
pub mod preflight;
pub mod probe;
pub mod process;
pub mod profile;
pub mod recording;
pub mod report;
pub mod session;
pub mod symbolize;
pub mod unwind;
