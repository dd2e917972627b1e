//! Placing probes: which functions, at which instructions, and the kernel objects behind them.

pub mod attach;
pub mod discover;
mod fdinfo;
pub mod functions;
pub mod kernel;
pub mod kernel_types;
pub mod planner;
pub mod program;
pub mod records;
pub mod settings;
pub mod tables;
pub mod unwind_maps;
