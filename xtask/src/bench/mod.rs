//! `cargo xtask bench`: measures in one run and writes the tables of docs/benchmarks.md.

mod agent;
mod compare;
mod control_group;
mod leak;
mod overhead;
mod pair;
mod program;
mod scale;
mod soak;
mod stacks;
mod table;
mod tools;
mod twins;
mod workloads;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum};
use workloads::{Kind, Workload};

use crate::{setup, shell};

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    question: Option<Question>,
    /// Measure only these
    #[arg(value_enum)]
    groups: Vec<Group>,
    /// How often each thing is measured
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,
    /// Print the tables only
    #[arg(long)]
    dry_run: bool,
}

/// What is measured on real programs, each by a command of its own: they take minutes.
#[derive(Subcommand)]
enum Question {
    /// The same work untraced, under each mode of leakbpf and under other tools
    Compare {
        #[command(flatten)]
        choice: Choice,
        /// How often each thing is measured
        #[arg(long, default_value_t = 3, value_name = "N")]
        rounds: usize,
        /// Length of a measurement, in seconds
        #[arg(long, default_value_t = 1, value_name = "S")]
        slice: u64,
    },
    /// Processor time of a unit of work with and without leakbpf, and the noise
    Overhead {
        #[command(flatten)]
        choice: Choice,
        #[command(flatten)]
        flags: Flags,
        /// How often each thing is measured
        #[arg(long, default_value_t = 5, value_name = "N")]
        rounds: usize,
        /// Length of a measurement, in seconds
        #[arg(long, default_value_t = 2, value_name = "S")]
        slice: u64,
    },
    /// Whether a leak that is planted into a server is the first site of the report
    Leak {
        #[command(flatten)]
        choice: Choice,
        /// leakbpf's modes, one after the other
        #[arg(long, default_value = "pages,sample", value_delimiter = ',')]
        mode: Vec<String>,
        /// How long leakbpf looks
        #[arg(long, default_value_t = 60, value_name = "S")]
        seconds: u64,
        /// What each process leaks in a second, in bytes
        #[arg(long, default_value_t = 1 << 20, value_name = "BYTES")]
        rate: u64,
        /// Further arguments of `leakbpf record`
        #[arg(last = true, value_name = "FLAGS")]
        further: Vec<String>,
    },
    /// Processor time of a unit of work, against a twin under the same load that nobody watches
    Twins {
        #[command(flatten)]
        choice: Choice,
        #[command(flatten)]
        flags: Flags,
        /// Sessions
        #[arg(long, default_value_t = 5, value_name = "N")]
        rounds: u32,
        /// Length of each, and of the times between them
        #[arg(long, default_value_t = 60, value_name = "N")]
        seconds: u32,
    },
    /// Whether the budget holds for long, under a load that changes every minute
    Soak {
        /// Measure these servers, of each of which two run
        #[arg(long, default_value = "redis", value_delimiter = ',', value_parser = workload_parser(), value_name = "NAME")]
        only: Vec<&'static Workload>,
        #[command(flatten)]
        flags: Flags,
        /// How long leakbpf watches
        #[arg(long, default_value_t = 60, value_name = "N")]
        minutes: u32,
        /// How long the two are compared before and after, with nobody watched
        #[arg(long, default_value_t = 6, value_name = "N")]
        unwatched: u32,
        /// Print the tables only
        #[arg(long)]
        dry_run: bool,
    },
    /// The load of the workload memcached, as a process of its own
    #[command(hide = true)]
    LoadMemcached { socket: PathBuf, milliseconds: u64 },
}

#[derive(Args)]
struct Choice {
    /// Measure only these
    #[arg(long, value_delimiter = ',', value_parser = workload_parser(), value_name = "NAME")]
    only: Vec<&'static Workload>,
    /// Print the tables only
    #[arg(long)]
    dry_run: bool,
}

/// What leakbpf is called with.
#[derive(Args)]
struct Flags {
    /// leakbpf's mode
    #[arg(long)]
    mode: Option<String>,
    /// Of the mode `auto`
    #[arg(long, value_name = "PERCENT")]
    max_overhead: Option<String>,
    /// Further arguments of `leakbpf record`
    #[arg(last = true, value_name = "FLAGS")]
    further: Vec<String>,
}

impl Flags {
    fn arguments(&self, usual_mode: &str) -> Vec<String> {
        let mode = self.mode.as_deref().unwrap_or(usual_mode);
        let mut arguments = ["--mode", mode].map(str::to_owned).to_vec();
        if let Some(percent) = &self.max_overhead {
            arguments.extend(["--max-overhead".to_owned(), percent.clone()]);
        }
        arguments.extend(self.further.iter().cloned());
        arguments
    }
}

fn workload_parser() -> impl TypedValueParser<Value = &'static Workload> {
    PossibleValuesParser::new(workloads::ALL.map(|workload| workload.name)).try_map(|name| {
        let found = workloads::ALL.into_iter().find(|workload| workload.name == name);
        found.ok_or("no such workload")
    })
}

impl Choice {
    /// Whether what is measured is all that the table in docs has.
    fn is_whole(&self) -> bool {
        !self.dry_run && self.only.is_empty()
    }

    /// What was asked for, or else all of those kinds.
    fn workloads(&self, kinds: &[Kind]) -> Vec<&'static Workload> {
        if !self.only.is_empty() {
            return self.only.clone();
        }
        workloads::ALL.into_iter().filter(|workload| kinds.contains(&workload.kind)).collect()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// malloc and free, against other tools
    Pair,
    /// Stacks by depth, with unwind rows and with frame pointers
    Stacks,
    /// Start-up, and a million live blocks
    Scale,
}

impl Group {
    const fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Stacks => "stacks",
            Self::Scale => "scale",
        }
    }
}

pub fn run(options: &Options) -> Result<()> {
    if let Some(Question::LoadMemcached { socket, milliseconds }) = &options.question {
        return workloads::load_until(socket, Duration::from_millis(*milliseconds));
    }
    if !shell::is_root() {
        bail!("attaching probes needs root: run `sudo -E env PATH=\"$PATH\" cargo xtask bench`");
    }
    setup::run()?;
    shell::run(shell::cargo().args(["build", "--release", "-p", "leakbpf"]))?;
    match &options.question {
        Some(question) => answer(question),
        None => measure(options),
    }
}

fn answer(question: &Question) -> Result<()> {
    setup::servers_and_profilers()?;
    let all = [Kind::Loop, Kind::Server, Kind::Job];
    // Some rows would replace all of them.
    let (name, whole, tables) = match question {
        Question::Compare { choice, rounds, slice } => {
            let span = Duration::from_secs(*slice);
            ("compare", choice.is_whole(), compare::run(&choice.workloads(&all), *rounds, span)?)
        }
        Question::Overhead { choice, flags, rounds, slice } => {
            let span = Duration::from_secs(*slice);
            let workloads = choice.workloads(&[Kind::Server, Kind::Job]);
            (
                "overhead",
                choice.is_whole(),
                overhead::run(&workloads, *rounds, span, &flags.arguments("pages"))?,
            )
        }
        Question::Leak { choice, mode, seconds, rate, further } => {
            let span = Duration::from_secs(*seconds);
            let workloads = choice.workloads(&[Kind::Server]);
            ("leak", choice.is_whole(), leak::run(&workloads, mode, span, *rate, further)?)
        }
        Question::Twins { choice, flags, rounds, seconds } => {
            let workloads = choice.workloads(&[Kind::Server]);
            let arguments = flags.arguments("auto");
            ("twins", choice.is_whole(), twins::run(&workloads, *rounds, *seconds, &arguments)?)
        }
        Question::Soak { only, flags, minutes, unwatched, dry_run } => {
            let arguments = flags.arguments("auto");
            let tables: Result<Vec<String>> = only
                .iter()
                .map(|workload| soak::run(workload, *minutes, *unwatched, &arguments))
                .collect();
            let whole = !dry_run && only.len() == 1 && *minutes >= 60;
            ("soak", whole, tables?.join("\n"))
        }
        Question::LoadMemcached { .. } => return Ok(()),
    };
    let content = format!("{}\n\n{tables}", machine());
    println!("{content}");
    if whole {
        table::insert(&shell::root().join("docs/benchmarks.md"), name, &content)?;
    }
    Ok(())
}

fn measure(options: &Options) -> Result<()> {
    let groups = match options.groups.as_slice() {
        [] => &[Group::Pair, Group::Stacks, Group::Scale],
        chosen => chosen,
    };
    let file = shell::root().join("docs/benchmarks.md");
    let machine = machine();
    let mut failed = Vec::new();
    for &group in groups {
        let result = match group {
            Group::Pair => pair::run(options.rounds),
            Group::Stacks => stacks::run(options.rounds),
            Group::Scale => scale::run(options.rounds),
        };
        match result {
            Ok(tables) => {
                let content = format!("{machine}\n\n{tables}");
                println!("{content}");
                if !options.dry_run {
                    table::insert(&file, group.name(), &content)?;
                }
            }
            Err(error) => {
                println!("{}: {error:#}", group.name());
                failed.push(group.name());
            }
        }
    }
    if !failed.is_empty() {
        bail!("not measured: {}", failed.join(", "));
    }
    Ok(())
}

/// One line: figures of different machines cannot be compared.
fn machine() -> String {
    let said = |program: &str, arguments: &[&str]| {
        shell::output(Command::new(program).args(arguments))
            .unwrap_or_else(|_| "unknown".to_owned())
    };
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        cpuinfo.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(": "))
    };
    let model = field("model name").unwrap_or("unknown processor");
    let virtualised =
        field("flags").is_some_and(|flags| flags.split(' ').any(|f| f == "hypervisor"));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "Measured on {} with Linux {}, {model}, {cores} cores{}; {}, {}.",
        said("date", &["+%F"]),
        said("uname", &["-r"]),
        if virtualised { " of a virtual machine" } else { "" },
        said("heaptrack", &["--version"]),
        said("valgrind", &["--version"]),
    )
}
