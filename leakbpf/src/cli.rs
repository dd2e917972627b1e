//! What the user typed. `config` turns it into what is meant.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use leakbpf::{probe::settings::Links, profile::Mode, session::floor::Sites};
use leakbpf_common::sampling;

#[derive(Debug, Parser)]
#[command(
    name = "leakbpf",
    version,
    about = "Shows which code holds the memory that a running process never frees",
    after_help = "Exit status: 0 when all went well, 2 on errors; `record -- CMD` ends with CMD's own."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Attach to running processes, or start one, and count what they allocate and do not free
    Record(RecordArgs),
    /// Show a recording
    Report(ReportArgs),
    /// Tell whether leakbpf can work here, and on which functions of a process, at which sites
    Doctor(DoctorArgs),
    /// Show how stacks are unwound through a program or library
    Unwind(UnwindArgs),
    /// Start a small leaking program, attach to it and show the result: proves an installation
    Demo,
    /// What `demo` watches: a program that leaks on purpose
    #[command(hide = true)]
    DemoTarget,
    /// Place probes with empty programs, for benchmarks
    #[command(hide = true)]
    BenchFloor(BenchFloorArgs),
}

#[derive(Debug, Args)]
pub struct RecordArgs {
    /// Process to attach to; may be given several times
    #[arg(short = 'p', long = "pid", value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub pids: Vec<u32>,
    /// Attach to every process whose name matches the regular expression
    #[arg(long, value_name = "REGEX")]
    pub name: Option<String>,
    /// Attach to every process of a control group
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
    /// Attach to every process of the machine, also those that start later (with --shared-probes)
    #[arg(long)]
    pub all: bool,
    /// Start this program and trace it from its first instruction
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<OsString>,
    /// How to count [default: auto; exact for a program that is started with --, unless --max-overhead is
    /// given]
    #[arg(long, value_enum)]
    pub mode: Option<ModeArg>,
    /// Most that watching may cost, in percent of the watched processes' own processor time (modes auto
    /// and windows) [default: 1%]
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub max_overhead: Option<u32>,
    /// When blocks are sampled (modes sample and auto): record one for every SIZE bytes that are
    /// allocated, on average
    #[arg(long, value_name = "SIZE", value_parser = sample_interval, default_value = "512KiB")]
    pub sample_interval: u32,
    /// When pages are looked at (modes pages and auto): look at one page in N
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=i64::from(Mode::MAX_ONE_IN)))]
    pub page_interval: u32,
    /// Stop after this time (30s, 5m, 1h); unless given, with Ctrl-C or the last process's end
    #[arg(short = 'd', long, value_name = "TIME", value_parser = time)]
    pub duration: Option<Duration>,
    /// Write the result to this file: a report if its name ends in .svg, .pb.gz, .json, .folded or .txt,
    /// else a recording for `leakbpf report`
    #[arg(short = 'o', long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Leave out blocks younger than this (estimates from windows have all)
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "0s")]
    pub min_age: Duration,
    /// Leave out blocks smaller than this (512, 4KiB, 1MiB)
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "0")]
    pub min_size: u64,
    /// Print the table this often
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "5s")]
    pub interval: Duration,
    /// Sites to show
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub top: usize,
    /// What to rank sites by
    #[arg(long, value_enum, default_value_t = SortArg::Bytes)]
    pub sort: SortArg,
    /// List every outstanding block, too (JSON)
    #[arg(long)]
    pub blocks: bool,
    /// Do not follow children made by fork
    #[arg(long)]
    pub no_follow: bool,
    /// Place each probe once for all processes that map the file, though only the chosen ones count:
    /// children are seen from their first instruction on, and hundreds of processes cost no more
    /// than one, but every other process pays for the traps, too
    #[arg(long)]
    pub shared_probes: bool,
    /// Most live blocks to keep (about 100 bytes of kernel memory each); where pages are looked at, also
    /// most pages (60 to 140 bytes of leakbpf's own memory each)
    #[arg(long, value_name = "N", default_value_t = 1 << 21, value_parser = clap::value_parser!(u32).range(1..=1 << 28))]
    pub max_blocks: u32,
    /// How to walk stacks
    #[arg(long, value_enum, default_value_t = StackArg::Auto)]
    pub stack: StackArg,
    /// Most kernel memory for unwind tables; files beyond it are walked by frame pointers
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "192MiB")]
    pub max_tables: u64,
    /// What holds the probes
    #[arg(long, value_enum, hide = true)]
    pub links: Option<LinksArg>,
    /// Look all names up anew: neither use nor keep those in ~/.cache/leakbpf
    #[arg(long)]
    pub no_cache: bool,
    /// Print only the final table
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct ReportArgs {
    /// A recording made by `leakbpf record -o`
    pub file: PathBuf,
    #[arg(long, value_enum, default_value_t = FormatArg::Text)]
    pub format: FormatArg,
    /// Write to this file instead of the standard output
    #[arg(short = 'o', long, value_name = "OUT")]
    pub output: Option<PathBuf>,
    /// Sites to show (text)
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub top: usize,
    #[arg(long, value_enum, default_value_t = SortArg::Bytes)]
    pub sort: SortArg,
    /// Leave out blocks younger than this (estimates from windows have all)
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "0s")]
    pub min_age: Duration,
    /// Leave out blocks smaller than this
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "0")]
    pub min_size: u64,
    /// List every outstanding block, too (JSON)
    #[arg(long)]
    pub blocks: bool,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Look at this process as well
    #[arg(short = 'p', long = "pid", value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Option<u32>,
    #[arg(long, value_enum, default_value_t = DoctorFormat::Text)]
    pub format: DoctorFormat,
}

#[derive(Debug, Args)]
pub struct UnwindArgs {
    /// An ELF file for x86-64
    pub file: PathBuf,
    /// Show the rule at this address of the file (hexadecimal) instead of the summary
    #[arg(long = "pc", value_name = "ADDR", value_parser = address)]
    pub pc: Option<u64>,
}

#[derive(Debug, Args)]
pub struct BenchFloorArgs {
    #[arg(short = 'p', long = "pid", value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: u32,
    /// Where the probes are placed
    #[arg(long, value_enum, default_value_t = SitesArg::Session)]
    pub sites: SitesArg,
    /// What holds the probes
    #[arg(long, value_enum, default_value_t = LinksArg::Many)]
    pub links: LinksArg,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// Every block, while that costs no more than --max-overhead; else some blocks (sample), if that is
    /// cheap enough; else every block in short windows of time. Resident memory beside it
    Auto,
    /// Every block
    Exact,
    /// Some blocks, larger ones more often, from which the rest is estimated: the probes' cost alone
    Sample,
    /// Resident memory by the code that touched it first, from one page in some: any language and
    /// allocator, at next to no cost
    Pages,
    /// Every block, for short times with long ones between them: what is live is estimated from what
    /// survives them
    Windows,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StackArg {
    /// dwarf where the kernel can do it, else fp
    Auto,
    /// With the call frame information of each file (.eh_frame)
    Dwarf,
    /// As dwarf, in the way of kernels before 5.17: at most 64 frames
    Dwarf64,
    /// By frame pointers: most programs of distributions are built without
    Fp,
}

/// See `leakbpf::probe::settings::Links`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LinksArg {
    Many,
    Single,
}

impl From<LinksArg> for Links {
    fn from(argument: LinksArg) -> Self {
        match argument {
            LinksArg::Many => Self::Many,
            LinksArg::Single => Self::Single,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SitesArg {
    /// Where a session would place its own
    Session,
    /// The same, without the returns that a block needs not that is not chosen
    Unchosen,
    /// At the functions' first instructions, as other tools do
    First,
}

impl From<SitesArg> for Sites {
    fn from(argument: SitesArg) -> Self {
        match argument {
            SitesArg::Session => Self::Session,
            SitesArg::Unchosen => Self::Unchosen,
            SitesArg::First => Self::First,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SortArg {
    Bytes,
    Count,
    Age,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    Text,
    Json,
    Svg,
    Folded,
    Pprof,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DoctorFormat {
    Text,
    Json,
}

/// clap's explanation of a wrong command line, without its usage lines.
pub fn one_line(error: &str) -> String {
    let sentences: Vec<&str> = error
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let text = sentences.join(" ");
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    format!("{text}; see `leakbpf --help`")
}

fn time(text: &str) -> Result<Duration, String> {
    // A bare number means seconds, as with sleep(1) and timeout(1).
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string());
    }
    humantime::parse_duration(text).map_err(|error| format!("{error}: try 30s, 5m or 1h30m"))
}

fn address(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).map_err(|_| "expected an address like 0x1f40".to_owned())
}

fn size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "expected a size like 512, 4KiB or 1MiB")?;
    let shift = match unit.trim().to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b')
    {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(format!("unknown unit {unit:?}: use KiB, MiB or GiB")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))
}

/// In millionths.
fn percent(text: &str) -> Result<u32, String> {
    let wrong = || "expected a share like 1%, 0.5% or 10%".to_owned();
    let number: f64 = text.trim_end_matches('%').trim().parse().map_err(|_| wrong())?;
    let ppm = (number * 10_000.0).round();
    if (1.0..=1e6).contains(&ppm) { Ok(ppm as u32) } else { Err(wrong()) }
}

fn sample_interval(text: &str) -> Result<u32, String> {
    match size(text)? {
        bytes @ 1..=sampling::MAX_INTERVAL_BYTES => Ok(bytes as u32),
        _ => Err("expected 1 byte to 64 MiB".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_wrong_command_line_is_explained_in_one_line() {
        let error = Cli::try_parse_from(["leakbpf", "record", "-p", "x"]).expect_err("no number");
        let line = one_line(&error.to_string());
        assert!(line.starts_with("invalid value 'x' for '--pid <PID>'"), "{line}");
        assert!(!line.contains('\n') && !line.contains("Usage"), "{line}");
    }

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(size("512"), Ok(512));
        assert_eq!(size("4k"), Ok(4096));
        assert_eq!(size("4KiB"), Ok(4096));
        assert_eq!(size("1MB"), Ok(1 << 20));
        assert!(size("1x").is_err());
        assert!(size("99999999999G").is_err());
        assert!(size("").is_err());
    }

    #[test]
    fn addresses_are_hexadecimal() {
        assert_eq!(address("0x1f40"), Ok(0x1f40));
        assert_eq!(address("1F40"), Ok(0x1f40));
        assert!(address("malloc").is_err());
        assert!(address("1ffffffffffffffff").is_err());
    }

    #[test]
    fn shares_are_in_percent() {
        assert_eq!(percent("1%"), Ok(10_000));
        assert_eq!(percent("0.5"), Ok(5000));
        assert_eq!(percent("100 %"), Ok(1_000_000));
        for wrong in ["0", "-1%", "101%", "nan", "inf", "", "%", "one"] {
            assert!(percent(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_without_a_unit_are_seconds() {
        assert_eq!(time("30"), Ok(Duration::from_secs(30)));
        assert_eq!(time("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(time("5m"), Ok(Duration::from_secs(300)));
        assert!(time("-1").is_err());
        assert!(time("soon").is_err());
    }
}
