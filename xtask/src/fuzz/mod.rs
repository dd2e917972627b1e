//! `cargo xtask fuzz`: the fuzz targets in leakbpf/fuzz, one after the other.

mod seeds;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::shell;

/// In the order of how exposed their readers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    Unwind,
    Elf,
    Symbolize,
    Recording,
    Text,
    Planner,
}

#[derive(Args)]
pub struct Options {
    /// Which targets; all unless named
    #[arg(value_enum)]
    targets: Vec<Target>,
    /// For each target; 0 runs what is known and looks for nothing new
    #[arg(long, default_value_t = 2)]
    minutes: u64,
    /// Processes for each target
    #[arg(long, default_value_t = 1)]
    jobs: u32,
}

/// A process that grows beyond this has found something. The readers' own limits come to half of it,
/// with what the address sanitizer adds.
const MEMORY_LIMIT_MB: u32 = 2048;

/// No reader makes a single allocation as large as this.
const ALLOCATION_LIMIT_MB: u32 = 512;

/// Larger files are slower to run and show nothing that small ones do not.
const INPUT_MAX_BYTES: u32 = 64 << 10;

impl Target {
    const fn name(self) -> &'static str {
        match self {
            Self::Unwind => "unwind",
            Self::Elf => "elf",
            Self::Symbolize => "symbolize",
            Self::Recording => "recording",
            Self::Text => "text",
            Self::Planner => "planner",
        }
    }

    /// For one input. A symbolizer grants itself 10 s for an index and 20 s for lookups in one file.
    const fn timeout_seconds(self) -> u32 {
        match self {
            Self::Symbolize => 40,
            _ => 20,
        }
    }
}

/// Where things are: all but the sources and the findings' inputs lies in the target folder.
struct Folders {
    sources: PathBuf,
    work: PathBuf,
}

impl Folders {
    fn new() -> Self {
        let root = shell::root();
        Self { sources: root.join("leakbpf/fuzz"), work: root.join("target/fuzz") }
    }

    fn of(&self, kind: &str, target: Target) -> Result<PathBuf> {
        let folder = self.work.join(kind).join(target.name());
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        Ok(folder)
    }

    /// For temporary files of this run: another one may go on at the same time.
    fn temporary(&self) -> PathBuf {
        self.work.join(format!("tmp-{}", std::process::id()))
    }

    fn command(&self, target: Target) -> Command {
        let folder = self.work.join("build/x86_64-unknown-linux-gnu/release");
        let mut command = Command::new(folder.join(target.name()));
        // SQLite has constants of one name in two of its parts.
        command.env("ASAN_OPTIONS", "detect_odr_violation=0").env("TMPDIR", self.temporary());
        command
    }
}

pub fn run(options: &Options) -> Result<()> {
    let folders = Folders::new();
    let targets = match options.targets.as_slice() {
        [] => Target::value_variants(),
        chosen => chosen,
    };
    if shell::find_program("cargo-fuzz").is_none() {
        shell::run(shell::cargo().args(["install", "--locked", "cargo-fuzz"]))?;
    }
    build(&folders)?;
    fs::create_dir_all(folders.temporary()).context("create a folder for temporary files")?;
    let mut failed = Vec::new();
    for &target in targets {
        println!("\n=== {}", target.name());
        seeds::make(&folders, target)?;
        if let Err(error) = fuzz(&folders, target, options) {
            println!("{}: {error:#}", target.name());
            failed.push(target.name());
        }
    }
    fs::remove_dir_all(folders.temporary()).context("remove temporary files")?;
    if !failed.is_empty() {
        bail!("{} found something: see target/fuzz/artifacts", failed.join(", "));
    }
    Ok(())
}

/// Builds all targets. Sanitizers need a nightly compiler, or a stable one that believes it is one.
fn build(folders: &Folders) -> Result<()> {
    let nightly =
        Command::new("rustc").env("RUSTUP_TOOLCHAIN", "nightly").arg("--version").output();
    let mut command = Command::new("cargo");
    match nightly {
        Ok(output) if output.status.success() => command.env("RUSTUP_TOOLCHAIN", "nightly"),
        _ => command.env("RUSTC_BOOTSTRAP", "1"),
    };
    // cargo's own word for the toolchain that runs this would win.
    command.env_remove("CARGO").env_remove("RUSTC").current_dir(shell::root());
    command.args(["fuzz", "build", "--target", "x86_64-unknown-linux-gnu"]);
    command.arg("--fuzz-dir").arg(&folders.sources);
    command.arg("--target-dir").arg(folders.work.join("build"));
    shell::run(&mut command)
}

fn fuzz(folders: &Folders, target: Target, options: &Options) -> Result<()> {
    let mut artifacts = folders.of("artifacts", target)?.into_os_string();
    artifacts.push("/");
    let mut command = folders.command(target);
    command
        .arg(format!("-rss_limit_mb={MEMORY_LIMIT_MB}"))
        .arg(format!("-malloc_limit_mb={ALLOCATION_LIMIT_MB}"))
        .arg(format!("-timeout={}", target.timeout_seconds()))
        .arg(format!("-max_len={INPUT_MAX_BYTES}"))
        .arg("-print_final_stats=1");
    match options.minutes {
        0 => command.arg("-runs=0"),
        minutes => command.arg(format!("-max_total_time={}", minutes * 60)),
    };
    if options.jobs > 1 {
        command.arg(format!("-fork={}", options.jobs));
    }
    let mut prefix = std::ffi::OsString::from("-artifact_prefix=");
    prefix.push(artifacts);
    command.arg(prefix);
    // What is new goes to the first.
    command.arg(folders.of("corpus", target)?).arg(folders.of("seeds", target)?);
    let known = folders.sources.join("regressions").join(target.name());
    if known.is_dir() {
        command.arg(known);
    }
    shell::run(&mut command)
}

fn read_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}
