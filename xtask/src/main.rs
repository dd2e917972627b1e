//! The project's chores, one file a command. `cargo xtask --help` lists them.

mod bench;
mod bpf;
mod ci;
mod fuzz;
mod kernel;
mod packages;
mod setup;
mod shell;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, tests and measures leakbpf")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install the Debian packages that the tests and benchmarks use (root)
    Setup,
    /// Rebuild the committed BPF object and its stamp, or check that both are current
    Bpf(bpf::Options),
    /// Run tests
    Test(test::Options),
    /// Run everything that must be green before a merge
    Ci,
    /// Read mutated files with a sanitizer watching (nightly Rust)
    Fuzz(fuzz::Options),
    /// Measure, and write the tables of docs/benchmarks.md
    Bench(bench::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Setup => setup::run(),
        Command::Bpf(options) => bpf::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Ci => ci::run(),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Bench(options) => bench::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without the backtrace that `main` would print: what failed is a command, not a line.
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
