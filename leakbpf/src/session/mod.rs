//! A session: the story of `leakbpf record`.
//!
//! [`admission`] says who may be watched, [`watch`] knows the processes, [`placement`] their probes,
//! [`life`], [`space`] and [`numbers`] what code is behind a frame, [`unwinding`] what the kernel side
//! walks stacks with. [`loading`] sets the kernel side up, [`inbox`] reads its records, [`snapshot`]
//! turns its books into a profile. [`running`] is what goes on from the attach to the last report.

mod admission;
mod announce;
mod budget;
mod calibration;
mod clock;
pub mod config;
mod control;
mod cost;
mod counting;
mod detacher;
pub mod floor;
mod fold;
mod inbox;
mod inheritance;
mod jit;
pub mod life;
mod limits;
mod loading;
pub mod modules;
mod numbers;
mod output;
pub mod placement;
mod running;
mod signals;
pub mod snapshot;
pub mod space;
mod terminal;
pub mod unwinding;
pub mod watch;

use std::{io, sync::Arc, time::Instant};

use tokio::sync::mpsc;

use self::{
    admission::{admit, bystanders},
    config::{Config, Method, Target},
    control::Control,
    cost::Meter,
    inbox::Inbox,
    loading::load,
    output::OutputFile,
    placement::Plans,
    running::Session,
    signals::Signals,
    watch::{Attached, Scope, Watch},
};
use crate::{
    preflight::{self, host::HostFacts},
    probe::kernel::{KernelError, MappingEvents},
    process::{
        Pid, ProcessError, host,
        launch::{LaunchError, launch},
        select::{SelectError, Selector, select},
    },
    recording, report,
};

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Refused(#[from] preflight::Refusal),
    #[error(transparent)]
    Select(#[from] SelectError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("cannot watch process {pid}: {source}")]
    Watch { pid: Pid, source: io::Error },
    #[error("cannot read the tracepoint {name}: {reason}")]
    Tracepoint { name: &'static str, reason: String },
    #[error("{0}")]
    Launch(#[from] LaunchError<String>),
    #[error(transparent)]
    Recording(#[from] recording::WriteError),
    #[error(transparent)]
    Output(#[from] report::FileError),
    #[error("cannot write the report: {0}")]
    Stdout(io::Error),
    #[error("cannot wait for events: {0}")]
    Events(io::Error),
}

impl SessionError {
    /// The agent's exit status.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Launch(error) => error.exit_code().unwrap_or(2),
            _ => 2,
        }
    }
}

/// Runs a session from preflight to the last report; returns the exit status.
pub async fn run(config: &Config) -> Result<u8, SessionError> {
    let started = Instant::now();
    // One for each probe, each module and each process.
    let descriptors = limits::raise_open_files();
    let host = host::observe();
    let (config, without_pages) = &with_what_the_host_has(config, &host);
    let checks = if !config.method.probes() {
        preflight::host::judge_for_pages(&host)
    } else if config.shared_probes {
        let mut checks = preflight::host::judge_for_shared_probes(&host);
        checks.extend(bystanders(&host)?);
        checks
    } else {
        preflight::host::judge(&host)
    };
    preflight::Report { checks }.refuse_failures()?;
    let pids = match &config.target {
        Target::Running(selector) => admit(select(selector)?, selector, &host, config.method)?,
        Target::Program { .. } => Vec::new(),
    };
    // From here on a signal ends the session in an orderly way.
    let mut signals = Signals::new().map_err(SessionError::Events)?;
    let mut output = OutputFile::create(config, &host)?;

    let (mut kernel, lesser_stacks) = load(config)?;
    kernel.sample(config.method.sampling())?;
    kernel.attach_process_events()?;
    let mapping_events = match config.method {
        Method::Exact => Some(kernel.attach_mapping_events()),
        Method::Sample { .. } | Method::Auto { .. } => {
            Some(kernel.attach_mapping_functions().map(|()| MappingEvents::Functions))
        }
        Method::Pages { .. } | Method::Windows { .. } => None,
    };
    if let Some(one_in) = config.method.page_interval() {
        kernel.attach_page_faults()?;
        if one_in > 1 && host::maps_huge_pages_unasked() {
            eprintln!(
                "leakbpf: this machine uses huge pages wherever it can, so there are few page \
                 faults to see: --page-interval 1 costs little and errs less"
            );
        }
    }
    let mut meter = Meter::new(config.method);
    let mut calibrated = Vec::new();
    if config.method.probes()
        && let Some((trap, links)) = calibration::trap(&mut kernel)
    {
        meter.calibrate(trap);
        calibrated = links;
    }
    let records = kernel.take_records()?;
    let (exits, mut exited) = mpsc::unbounded_channel();
    let endless = matches!(config.target, Target::Running(Selector::All));
    let plans = Plans::default();
    let mappings = matches!(mapping_events, Some(Ok(_)));
    let scope = Scope {
        shared_probes: config.shared_probes,
        endless,
        mappings,
        probes: config.method.probes(),
        short: config.method.limit().is_some(),
        max_pages: config.method.page_interval().map(|_| config.max_blocks as usize),
    };
    let mut watch = Watch::new(kernel, plans, scope, config.max_table_bytes, exits);
    watch.let_go(calibrated);
    if config.cache {
        watch.modules.use_cache();
    }
    if let Some(reason) = without_pages {
        eprintln!("leakbpf: {reason}");
        watch.note(None, reason.clone());
    }
    if let Some(reason) = lesser_stacks {
        eprintln!("leakbpf: {reason}");
        watch.note(None, reason);
    }
    announce::mapping_events(mapping_events, config.method, &mut watch);

    let inbox =
        Inbox::start(records, Arc::clone(&watch.unwinding)).map_err(SessionError::Events)?;
    let mut control = Control::new(config.method, meter);
    let mut program = None;
    match &config.target {
        Target::Running(_) => {
            let mut placed = Vec::with_capacity(pids.len());
            for &pid in &pids {
                match watch.attach(pid) {
                    Ok(attached) => placed.push(attached),
                    // One of many may end before its turn; the only one may not.
                    Err(SessionError::Process(ProcessError::Gone(_))) if pids.len() > 1 => {}
                    Err(error) => return Err(error),
                }
            }
            watch.begin()?;
            announce::all(&placed, &watch, config, started);
        }
        Target::Program { program: name, arguments } => {
            let ready = |pid: Pid| -> Result<Attached, String> {
                let selector = Selector::Pids(vec![pid]);
                admit(vec![pid], &selector, &host, config.method)
                    .map_err(|error| error.to_string())?;
                // The larger limit is the agent's alone.
                if let Some(before) = descriptors {
                    limits::restore(pid, before);
                }
                let attached = watch.attach(pid).map_err(|error| error.to_string())?;
                watch.begin().map_err(|error| error.to_string())?;
                Ok(attached)
            };
            let (launched, attached) = launch(name, arguments, ready)?;
            announce::one(&attached, &watch, config, started);
            program = Some(launched);
        }
    }

    control.begin(&mut watch)?;
    let mut session = Session::new(config, watch, inbox, control, host.kernel_release.clone());
    let status = session.wait(&mut signals, &mut exited, program.as_mut(), &mut output).await?;
    // What ended the session is not meant for the report.
    let interrupted = signals.raise_flag().map_err(SessionError::Events)?;
    session.end_fetching_with(&interrupted);
    session.finish(output)?;
    Ok(status)
}

/// Where page faults can't be looked at, `auto` does without; with the reason.
fn with_what_the_host_has(config: &Config, host: &HostFacts) -> (Config, Option<String>) {
    let Method::Auto { limit, .. } = config.method else { return (config.clone(), None) };
    let checks = preflight::host::judge_for_pages(host);
    match (preflight::Report { checks }).refuse_failures() {
        Ok(()) => (config.clone(), None),
        Err(refusal) => (
            Config { method: Method::Windows { limit }, ..config.clone() },
            Some(format!("only windows are looked at, not resident memory: {refusal}")),
        ),
    }
}

pub use terminal::options as terminal_options;
