//! `leakbpf record`

use anyhow::{Context as _, bail};
use leakbpf::{
    process::{Pid, select::Selector},
    profile::BlockFilter,
    report::Format,
    session::{
        self,
        config::{Config, Limit, Method, Output, StackMethod, Target},
    },
};

use super::Failure;
use crate::cli::{ModeArg, RecordArgs, StackArg};

pub fn run(args: RecordArgs) -> Result<u8, Failure> {
    let config = config(args)?;
    run_session(&config)
}

/// Runs a session on this thread.
pub fn run_session(config: &Config) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let local = tokio::task::LocalSet::new();
    Ok(local.block_on(&runtime, session::run(config))?)
}

/// What a session may cost unless somebody says otherwise: 1 %.
const DEFAULT_MAX_OVERHEAD_PPM: u32 = 10_000;

fn config(args: RecordArgs) -> anyhow::Result<Config> {
    let target = target(args.pids, args.name, args.cgroup, args.all, args.command)?;
    let mode = args.mode.unwrap_or(match target {
        Target::Running(_) => ModeArg::Auto,
        // Whoever starts a program to watch it wants to know all, and no service waits.
        Target::Program { .. } if args.max_overhead.is_none() => ModeArg::Exact,
        Target::Program { .. } => ModeArg::Auto,
    });
    let limit = Limit { ppm: args.max_overhead.unwrap_or(DEFAULT_MAX_OVERHEAD_PPM) };
    let method = match mode {
        ModeArg::Auto => {
            Method::Auto { limit, one_in: args.page_interval, interval_bytes: args.sample_interval }
        }
        ModeArg::Windows => Method::Windows { limit },
        _ if args.max_overhead.is_some() => bail!(
            "--max-overhead is kept by --mode auto and --mode windows alone: leave --mode out, or \
             --max-overhead"
        ),
        ModeArg::Exact => Method::Exact,
        ModeArg::Sample => Method::Sample { interval_bytes: args.sample_interval },
        ModeArg::Pages => Method::Pages { one_in: args.page_interval },
    };
    let output = args.output.map(|path| match Format::from_path(&path) {
        Some(format) => Output::Report(format, path),
        None => Output::Recording(path),
    });
    Ok(Config {
        method,
        target,
        duration: args.duration,
        output,
        filter: BlockFilter {
            min_age_ns: u64::try_from(args.min_age.as_nanos()).unwrap_or(u64::MAX),
            min_size_bytes: args.min_size,
        },
        interval: args.interval,
        top: args.top,
        sort: args.sort.into(),
        blocks: args.blocks,
        follow_forks: !args.no_follow,
        shared_probes: args.shared_probes || args.all,
        max_blocks: args.max_blocks,
        stack: match args.stack {
            StackArg::Auto => StackMethod::Auto,
            StackArg::Dwarf => StackMethod::Rows,
            StackArg::Dwarf64 => StackMethod::RowsBounded,
            StackArg::Fp => StackMethod::FramePointers,
        },
        links: args.links.map(Into::into),
        max_table_bytes: args.max_tables,
        cache: !args.no_cache,
        quiet: args.quiet,
    })
}

fn target(
    pids: Vec<u32>,
    name: Option<String>,
    cgroup: Option<std::path::PathBuf>,
    all: bool,
    command: Vec<std::ffi::OsString>,
) -> anyhow::Result<Target> {
    let ways = [!pids.is_empty(), name.is_some(), cgroup.is_some(), all, !command.is_empty()];
    match ways.into_iter().filter(|&way| way).count() {
        0 => {
            bail!("whom to watch? give one of -p PID, --name REGEX, --cgroup PATH, --all or -- CMD")
        }
        1 => {}
        _ => bail!("-p, --name, --cgroup, --all and -- CMD exclude each other: give one of them"),
    }
    let mut command = command.into_iter();
    if let Some(program) = command.next() {
        return Ok(Target::Program { program, arguments: command.collect() });
    }
    Ok(Target::Running(match (name, cgroup) {
        (Some(name), _) => Selector::Name(
            regex::bytes::Regex::new(&name)
                .map_err(|_| anyhow::anyhow!("--name {name:?} is not a regular expression"))?,
        ),
        (None, Some(path)) => Selector::Cgroup(path),
        (None, None) if all => Selector::All,
        (None, None) => Selector::Pids(pids.into_iter().map(Pid).collect()),
    }))
}
