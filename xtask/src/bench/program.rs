//! The C programs of xtask/bench, which take orders on standard input.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::shell;

/// Compiles `xtask/bench/NAME.c`.
///
/// Returns the program's path.
pub fn build(name: &str) -> Result<PathBuf> {
    let folder = folder()?;
    let program = folder.join(name);
    let source = shell::root().join("xtask/bench").join(name).with_extension("c");
    shell::run(
        Command::new("gcc")
            .args(["-O2", "-g", "-Wall", "-fno-omit-frame-pointer", "-fno-builtin-malloc", "-o"])
            .arg(&program)
            .arg(source),
    )?;
    Ok(program)
}

/// Where the benchmarks keep their files.
pub fn folder() -> Result<PathBuf> {
    let folder = shell::root().join("target/bench");
    std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    Ok(folder)
}

pub struct Program {
    process: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// What its answers begin with.
    prefix: String,
}

impl Program {
    /// Starts the program under `wrapper` (empty: directly), with an environment variable.
    pub fn start(path: &Path, wrapper: &[&str], variable: Option<(&str, &str)>) -> Result<Self> {
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let mut command = match wrapper.split_first() {
            None => Command::new(path),
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(path);
                command
            }
        };
        command.envs(variable).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let orders = process.stdin.take();
        let answers = BufReader::new(process.stdout.take().context("standard output")?);
        Ok(Self { process, orders, answers, prefix: format!("{name}: ") })
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Gives two numbers and waits for the nanoseconds that the program took.
    pub fn order(&mut self, first: u64, second: u64) -> Result<f64> {
        let orders = self.orders.as_mut().context("standard input")?;
        orders.write_all(format!("{first} {second}\n").as_bytes())?;
        let mut line = String::new();
        // A wrapper prints lines of its own.
        while self.answers.read_line(&mut line)? > 0 {
            if let Some(ns) = line.trim_end().strip_prefix(&self.prefix) {
                return ns.parse().with_context(|| format!("{}{ns}", self.prefix));
            }
            line.clear();
        }
        bail!("{}ended without an answer", self.prefix);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // The programs end with their input; a wrapper then writes what it has to.
        self.orders = None;
        let mut rest = String::new();
        while matches!(self.answers.read_line(&mut rest), Ok(n) if n > 0) {}
        let _ = self.process.wait();
    }
}
