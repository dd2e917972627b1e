//! The `leakbpf` command.

mod cli;
mod commands;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            if error.use_stderr() {
                eprintln!("leakbpf: {}", cli::one_line(&error.to_string()));
                return ExitCode::from(2);
            }
            // A closed standard output is nothing to complain about.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
    };
    match commands::run(cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("leakbpf: {}", failure.line());
            ExitCode::from(failure.code)
        }
    }
}
