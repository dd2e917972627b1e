//! `cargo xtask bench`: measures in one run and writes the tables of docs/benchmarks.md.

mod agent;
mod pair;
mod program;
mod scale;
mod servers;
mod stacks;
mod table;

use std::fs;
use std::process::Command;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::{setup, shell};

#[derive(Args)]
pub struct Options {
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

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// malloc and free, against other tools
    Pair,
    /// Stacks by depth, with unwind rows and with frame pointers
    Stacks,
    /// redis and memcached under load
    Servers,
    /// Start-up, and a million live blocks
    Scale,
}

impl Group {
    const fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Stacks => "stacks",
            Self::Servers => "servers",
            Self::Scale => "scale",
        }
    }
}

pub fn run(options: &Options) -> Result<()> {
    if !shell::is_root() {
        bail!("attaching probes needs root: run `sudo -E env PATH=\"$PATH\" cargo xtask bench`");
    }
    setup::run()?;
    shell::run(shell::cargo().args(["build", "--release", "-p", "leakbpf"]))?;
    let groups = match options.groups.as_slice() {
        [] => &[Group::Pair, Group::Stacks, Group::Servers, Group::Scale],
        chosen => chosen,
    };
    let file = shell::root().join("docs/benchmarks.md");
    let machine = machine();
    let mut failed = Vec::new();
    for &group in groups {
        let result = match group {
            Group::Pair => pair::run(options.rounds),
            Group::Stacks => stacks::run(options.rounds),
            Group::Servers => servers::run(options.rounds),
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
