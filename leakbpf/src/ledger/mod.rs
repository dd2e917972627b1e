//! The agent's side of the books. The blocks themselves are kept in the kernel by
//! `leakbpf_common::ledger`; here are the anonymous mappings, and the pages of a session that counts
//! those.

pub mod pages;
pub mod ranges;
