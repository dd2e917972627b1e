//! What the kernel side and the agent share: the layout of what passes between them ([`abi`]), the
//! accounting rules ([`ledger`]) and the step from a stack frame to its caller ([`unwind`]), which
//! run in BPF and, for their tests, on any host.
#![no_std]
#![forbid(unsafe_code)]

pub mod abi;
pub mod ledger;
pub mod pages;
pub mod sampling;
pub mod table;
pub mod unwind;
