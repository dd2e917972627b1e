//! ELF bytes to unwind tables: call frame information compiled to what
//! [`leakbpf_common::unwind::step`] needs. Pure; the input may be hostile.
//!
//! `sections` finds the call frame information, `functions` runs its programs, `rules` says what
//! a row of theirs means, `signals` finds what no information describes, `table` sorts the result,
//! and `pack` lays it out as the kernel side searches it.

mod functions;
mod pack;
mod rules;
mod sections;
mod signals;
mod table;
#[cfg(test)]
mod tests;

pub use self::pack::{Packed, TooLarge};
pub use self::sections::Origin;
pub use self::table::{Stats, Table, TableError};
