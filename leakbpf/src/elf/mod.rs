//! Reading ELF files of other processes: untrusted bytes in, plain data out.

pub mod debug_files;
pub mod file;
pub mod image;
pub mod layout;
pub mod mini_debug;
pub mod symbols;
