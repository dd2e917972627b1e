//! The commands: what was typed becomes what is meant, and the library does it.

mod bench_floor;
mod demo;
mod doctor;
mod record;
mod report;
mod unwind;

use leakbpf::session::SessionError;

use crate::cli::{Command, FormatArg, SortArg};

/// Why a command ended without success: an error and the exit status that goes with it.
pub struct Failure {
    pub error: anyhow::Error,
    pub code: u8,
}

impl Failure {
    /// The error with its causes, on one line.
    pub fn line(&self) -> String {
        let mut text = String::new();
        for cause in self.error.chain() {
            let cause = cause.to_string();
            // Errors that print their source themselves would say it twice.
            if !text.contains(cause.as_str()) {
                if !text.is_empty() {
                    text.push_str(": ");
                }
                text.push_str(&cause);
            }
        }
        text.replace('\n', " ")
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        let code = error.downcast_ref::<SessionError>().map_or(2, SessionError::exit_code);
        Self { error, code }
    }
}

pub fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Record(args) => record::run(args),
        Command::Report(args) => report::run(args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Unwind(args) => unwind::run(&args),
        Command::Demo => demo::run(),
        Command::DemoTarget => demo::target(),
        Command::BenchFloor(args) => bench_floor::run(&args),
    }
}

impl From<SortArg> for leakbpf::report::Sort {
    fn from(sort: SortArg) -> Self {
        match sort {
            SortArg::Bytes => Self::Bytes,
            SortArg::Count => Self::Count,
            SortArg::Age => Self::Age,
        }
    }
}

impl From<FormatArg> for leakbpf::report::Format {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Text => Self::Text,
            FormatArg::Json => Self::Json,
            FormatArg::Svg => Self::Svg,
            FormatArg::Folded => Self::Folded,
            FormatArg::Pprof => Self::Pprof,
        }
    }
}
