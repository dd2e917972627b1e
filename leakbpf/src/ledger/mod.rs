//! The agent's side of the books. The blocks themselves are kept in the kernel by
//! `leakbpf_common::ledger`; here are the anonymous mappings, the pages of a session that counts
//! those, and what survives windows of time.

pub mod pages;
pub mod ranges;
pub mod windows;
