//! A session: the story of `leakbpf record`.
//!
//! [`admission`] says who may be watched, [`watch`] knows the processes, [`placement`] their probes,
//! [`life`], [`space`] and [`numbers`] what code is behind a frame, [`unwinding`] what the kernel side
//! walks stacks with. [`loading`] sets the kernel side up, [`inbox`] reads its records, [`snapshot`]
//! turns its books into a profile.

mod admission;
mod budget;
mod calibration;
pub mod config;
mod control;
mod cost;
mod detacher;
pub mod floor;
mod fold;
mod inbox;
mod jit;
pub mod life;
mod limits;
mod loading;
pub mod modules;
mod numbers;
mod output;
pub mod placement;
mod signals;
pub mod snapshot;
pub mod space;
mod terminal;
pub mod unwinding;
pub mod watch;

use std::{
    io::{self, Write},
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use self::{
    admission::{admit, bystanders},
    budget::Step,
    config::{Config, Method, Target},
    control::Control,
    cost::Meter,
    fold::Groups,
    inbox::Inbox,
    loading::load,
    output::{OutputFile, OutputKind},
    placement::Plans,
    signals::Signals,
    snapshot::{Sites, View, loss_names},
    terminal::Progress,
    watch::{Attached, Scope, Watch, monotonic_ns},
};
use crate::{
    preflight::{self, host::HostFacts},
    probe::kernel::{KernelError, MappingEvents},
    process::{
        Pid, ProcessError, host,
        launch::{LaunchError, LaunchedProgram, exit_code, launch},
        select::{SelectError, Selector, select},
    },
    profile::{Profile, SiteKind, Symbol},
    recording,
    report::{self, ReportOptions},
    symbolize::perf_map::PerfMap,
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

/// A touched page is looked at so soon that it is as it was mapped: the kernel puts pages together
/// to huge ones later.
const LOOK_AT_FRESH_PAGES: Duration = Duration::from_millis(250);

/// More processes than these are announced in one line.
const ANNOUNCED_ONE_BY_ONE: usize = 8;

/// With more processes than these, the cost of probes for each is worth a word.
const PROBED_ONE_BY_ONE: usize = 32;

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
    let planner = planner_kernel(&host);
    let pids = match &config.target {
        Target::Running(selector) => admit(select(selector)?, selector, &host, config.method)?,
        Target::Program { .. } => Vec::new(),
    };
    // From here on a signal ends the session in an orderly way.
    let mut signals = Signals::new().map_err(SessionError::Events)?;
    let mut output = OutputFile::create(config, &host)?;

    let (mut kernel, lesser_stacks) = load(config)?;
    kernel.attach_process_events()?;
    let mapping_events = match config.method {
        Method::Exact => Some(kernel.attach_mapping_events()),
        Method::Sample { .. } | Method::Auto { .. } => {
            Some(kernel.attach_mapping_functions().map(|()| MappingEvents::Functions))
        }
        Method::Pages { .. } | Method::Windows { .. } => None,
    };
    if let Some(one_in) = config.method.page_interval() {
        kernel.attach_page_faults(&host::online_cpus())?;
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
    let plans = Plans::new(planner);
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
    match mapping_events {
        None | Some(Ok(MappingEvents::Functions)) => {}
        Some(Ok(MappingEvents::Tracepoints)) => watch.note(
            None,
            "mappings are seen through system call tracepoints, which slow every system call of \
             the machine down a little: the kernel refuses programs on its functions (fentry), \
             or leaves some out, since it preempts itself"
                .to_owned(),
        ),
        Some(Err(_)) if config.method != Method::Exact => watch.note(
            None,
            "where blocks are counted, mappings are not: without programs on its functions \
             (fentry) that it always runs, this kernel shows them only by slowing every system call of the machine down"
                .to_owned(),
        ),
        Some(Err(error)) => {
            eprintln!("leakbpf: mmap, munmap, mremap and brk are not counted: {error}");
            watch.note(None, format!("anonymous mappings are not counted: {error}"));
        }
    }

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
            if placed.len() > PROBED_ONE_BY_ONE && watch.probes() > placed.len() {
                eprintln!(
                    "leakbpf: {} processes have probes of their own: the kernel asks each process's at \
                     each hit, some 45 ns each, and takes them away one by one, some 70 ms each; \
                     --shared-probes has one for all",
                    placed.len()
                );
            }
            if placed.len() > ANNOUNCED_ONE_BY_ONE {
                eprintln!(
                    "leakbpf: attached to {} processes: {} in {} ms",
                    placed.len(),
                    match config.method {
                        Method::Pages { one_in } => pages_in_words(one_in),
                        _ => format!("{} probes", watch.probes()),
                    },
                    started.elapsed().as_millis()
                );
            } else {
                placed.iter().for_each(|attached| announce(attached, &watch, config, started));
            }
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
            announce(&attached, &watch, config, started);
            program = Some(launched);
        }
    }

    control.begin(&mut watch)?;
    let began_ns = watch.began_ns;
    let mut session = Session {
        config,
        watch,
        inbox,
        control,
        sites: Sites::default(),
        groups: Groups::default(),
        next_fold: Instant::now(),
        began_ns,
        started_unix_ns: unix_ns(),
        kernel_release: host.kernel_release.clone(),
    };
    let status = session.wait(&mut signals, &mut exited, program.as_mut(), &mut output).await?;
    // What ended the session is not meant for the report.
    let interrupted = signals.raise_flag().map_err(SessionError::Events)?;
    session.watch.modules.end_fetching_with(&interrupted);
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

fn pages_in_words(one_in: u32) -> String {
    match one_in {
        1 => "every page".to_owned(),
        _ => format!("1 in {one_in} pages"),
    }
}

fn announce(attached: &Attached, watch: &Watch, config: &Config, started: Instant) {
    let comm = watch
        .lives
        .iter()
        .find(|life| life.pid() == attached.pid)
        .map_or("", |life| life.process.comm.as_str());
    let what = match config.method {
        Method::Pages { one_in } => pages_in_words(one_in),
        _ => format!("{} functions", attached.functions),
    };
    eprintln!(
        "leakbpf: attached to PID {} ({}): {what} in {} ms",
        attached.pid,
        report::printable(comm),
        started.elapsed().as_millis()
    );
    if config.method.probes() && attached.functions == 0 && watch.probes() == 0 {
        let looked_at: Vec<String> = attached
            .looked_at
            .iter()
            .map(|file| match &file.plan {
                Ok(_) => file.path.display().to_string(),
                Err(error) => format!("{} ({error})", file.path.display()),
            })
            .collect();
        eprintln!(
            "leakbpf: no allocator function was found in {1}: only mappings are counted; debug \
             symbols of a stripped static program would help (`leakbpf doctor -p {0}`), and `leakbpf \
             record --mode pages -p {0}` shows what it holds without them",
            attached.pid,
            report::printable(&looked_at.join(", ")),
        );
    }
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

pub use loading::planner_kernel;
pub use terminal::options as terminal_options;

/// The perf map of a process that makes code at run time.
pub(crate) fn jit_symbols(map: Option<&PerfMap>, avma: u64) -> Arc<[Symbol]> {
    let name = map.and_then(|map| map.name(avma.saturating_sub(1)));
    name.map(|function| Symbol { function, file: None, line: None, inlined: false })
        .into_iter()
        .collect()
}

struct Session<'a> {
    config: &'a Config,
    watch: Watch,
    inbox: Inbox,
    control: Control,
    sites: Sites,
    groups: Groups,
    next_fold: Instant,
    began_ns: u64,
    started_unix_ns: u64,
    kernel_release: String,
}

impl Session<'_> {
    /// Counts until it is time to stop; returns the exit status.
    async fn wait(
        &mut self,
        signals: &mut Signals,
        exited: &mut mpsc::UnboundedReceiver<(Pid, leakbpf_common::abi::Owner)>,
        mut program: Option<&mut LaunchedProgram>,
        output: &mut OutputFile,
    ) -> Result<u8, SessionError> {
        let mut interval =
            tokio::time::interval(self.config.interval.max(Duration::from_millis(100)));
        interval.tick().await;
        let mut progress_tick = tokio::time::interval(Duration::from_secs(1));
        let mut progress = Progress::new();
        let mut look = tokio::time::interval(LOOK_AT_FRESH_PAGES);
        let deadline = self.config.duration.map(|duration| tokio::time::Instant::now() + duration);
        loop {
            let deadline_reached = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            let headless_due = self.watch.headless_due();
            let headless = async {
                match headless_due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            let control_due = self.control.due();
            let control = async {
                match control_due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                signal = signals.next() => {
                    let Some(program) = program.as_deref_mut() else { break };
                    // When it has ended, only children of it are left.
                    if program.try_wait().map_err(SessionError::Events)?.is_some() {
                        break;
                    }
                    // Ctrl-C and Ctrl-\ of the terminal have reached the program as well.
                    let reached = matches!(signal, Signal::SIGINT | Signal::SIGQUIT)
                        && terminal::in_foreground();
                    if !reached {
                        program.forward(signal).map_err(SessionError::Events)?;
                    }
                }
                () = deadline_reached => break,
                () = control => self.keep_within_budget()?,
                Some((pid, owner)) = exited.recv() => {
                    // What it did last is still in the ring buffer.
                    self.drain();
                    self.watch.exited(pid, owner);
                    if self.watch.all_ended() {
                        break;
                    }
                    self.fold(fold::KEPT_WHOLE)?;
                }
                () = headless => self.watch.attend_headless(),
                _ = interval.tick() => {
                    self.drain();
                    progress.clear();
                    if self.interval(output)?.is_break() {
                        break;
                    }
                }
                _ = look.tick(), if self.config.method.page_interval().is_some() => {
                    self.drain();
                    self.watch.look_at_pages(false);
                }
                _ = progress_tick.tick(), if progress.shown() => {
                    let counts = self.watch.kernel.counts()?;
                    let hits = self.watch.kernel.cost()?.hits + counts.pages_touched;
                    progress.show(Duration::from_nanos(monotonic_ns().saturating_sub(self.began_ns)), self.live_bytes()?, hits, &counts);
                }
                // Last: whoever fills the ring buffer faster than it is read must not keep the
                // session from ending.
                () = self.inbox.arrived() => self.drain(),
            }
        }
        progress.clear();
        match program {
            None => Ok(0),
            Some(program) => match program.try_wait().map_err(SessionError::Events)? {
                Some(status) => Ok(exit_code(status)),
                None => {
                    eprintln!("leakbpf: the program still runs as PID {}", program.pid());
                    Ok(0)
                }
            },
        }
    }

    /// Takes in what is in the ring buffer, and of what comes meanwhile no more than fits it once.
    fn drain(&mut self) {
        // What was taken out of it, what was in it, and what came meanwhile.
        for _ in 0..3 {
            let records = self.inbox.take();
            if records.is_empty() {
                break;
            }
            for record in records {
                self.watch.take(record);
            }
        }
        self.watch.take_in_mappings();
    }

    /// Takes probes away, or brings them back, as the budget says.
    fn keep_within_budget(&mut self) -> Result<(), SessionError> {
        match self.control.attend(&mut self.watch)? {
            Step::Stay => {}
            Step::Open => self.control.open(&mut self.watch)?,
            Step::Close => {
                let window = self.control.close(&mut self.watch)?;
                self.drain();
                self.control.keep(window, &mut self.watch, &mut self.sites)?;
            }
        }
        Ok(())
    }

    fn live_bytes(&self) -> Result<u64, SessionError> {
        let mut live = 0u64;
        let mode = self.control.mode();
        if mode.lists(SiteKind::Resident) {
            for page in self.watch.lives.iter().flat_map(|life| life.pages.live()) {
                let estimate = mode.estimate(SiteKind::Resident, page.length_bytes);
                live = live.saturating_add(estimate.bytes);
            }
            return Ok(live);
        }
        for entry in self.watch.kernel.sites.walk() {
            let (_, site) = entry.map_err(|source| KernelError::Map { map: "SITES", source })?;
            live = live.saturating_add(site.allocated_bytes.saturating_sub(site.freed_bytes));
        }
        Ok(live)
    }

    /// Folds ended lives when there are many of them, or when their blocks leave no room.
    fn fold(&mut self, most_kept: usize) -> Result<(), SessionError> {
        let began = Instant::now();
        if began < self.next_fold || fold::foldable(&self.watch.lives) <= most_kept {
            return Ok(());
        }
        let filter = self.config.filter;
        let method = self.config.method;
        let now_ns = monotonic_ns();
        fold::fold(&mut self.watch, &mut self.sites, &mut self.groups, method, filter, now_ns)?;
        // A walk takes as long as there are blocks of others: no more than a twentieth of the time.
        self.next_fold = Instant::now() + began.elapsed() * 20;
        Ok(())
    }

    fn interval(&mut self, output: &mut OutputFile) -> Result<ControlFlow<()>, SessionError> {
        self.watch.look_for_code();
        self.watch.look_at_pages(true);
        let counts = self.watch.kernel.counts()?;
        if counts.losses.first().is_some_and(|&blocks_full| blocks_full > 0) {
            self.fold(0)?;
        }
        if self.config.quiet && !matches!(output.kind, OutputKind::Recording(_)) {
            return Ok(ControlFlow::Continue(()));
        }
        let profile = self.profile(false, monotonic_ns())?;
        if let OutputKind::Recording(writer) = &mut output.kind {
            writer.snapshot(&profile)?;
        }
        if !self.config.quiet && !self.print(&profile)? && matches!(output.kind, OutputKind::None) {
            return Ok(ControlFlow::Break(()));
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Whether anybody still reads.
    fn print(&self, profile: &Profile) -> Result<bool, SessionError> {
        let options = ReportOptions { with_blocks: false, ..self.options() };
        let mut stdout = io::stdout().lock();
        let written =
            report::text::write(profile, &options, &mut stdout).and_then(|()| stdout.flush());
        match written {
            // Whoever reads has seen enough, as with `head`.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            other => other.map(|()| true).map_err(SessionError::Stdout),
        }
    }

    fn options(&self) -> ReportOptions {
        ReportOptions {
            top: Some(self.config.top),
            sort: self.config.sort,
            with_blocks: self.config.blocks,
            filter: self.config.filter,
            ..terminal::options()
        }
    }

    fn profile(&mut self, finished: bool, now_ns: u64) -> Result<Profile, SessionError> {
        let watch = &mut self.watch;
        watch.listed = watch.lives.len();
        let mode = self.control.mode();
        let survivors = self.control.survivors(watch, &mut self.sites, now_ns)?;
        let view = View {
            mode,
            method: self.config.method,
            filter: self.config.filter,
            survivors: &survivors.sites,
        };
        let mut census =
            self.sites.census(view, &watch.kernel, &watch.lives, &watch.by_owner, now_ns)?;
        self.sites.forget_jit();
        self.sites.name(&mut census.sites, &watch.lives, &mut watch.modules);
        if finished {
            // Only now, since events would be lost while servers are waited for.
            if let Some(patience) = watch.modules.lack_debug_files() {
                if Progress::new().shown() {
                    eprintln!(
                        "leakbpf: asking debuginfod for debug files ({} s at most, Ctrl-C goes on \
                         without) …",
                        patience.as_secs()
                    );
                }
                let renamed = watch.modules.fetch_debug_files();
                self.sites.rename(&mut census.sites, &renamed, &mut watch.modules);
            }
            for problem in watch.modules.problems() {
                watch.note(None, problem);
            }
        }
        let counts = watch.kernel.counts()?;
        let mut losses = loss_names(&self.control.without_expected(counts.losses));
        let mut add = |name: &str, count: u64| {
            let total: &mut u64 = losses.entry(name.to_owned()).or_default();
            *total = total.saturating_add(count);
        };
        let mapping_losses = watch.lives.iter().map(|life| life.mappings.losses());
        for loss in mapping_losses.chain([watch.folded_losses]) {
            add("frees_missed", loss.frees_missed);
            add("ranges_full", loss.ranges_full);
        }
        add("ranges_full", 0);
        add("blocks_full", watch.pages_full);
        add("stacks_lost", census.stacks_missing);
        add("mappings_unmatched", watch.mapping_losses);
        add("mappings_missed", watch.kernel.mappings_missed());
        add("children_seen_late", watch.children_seen_late);
        add("probes_moved", watch.probes_moved);
        let unwinding = watch.unwinding.losses();
        add("spaces_full", unwinding.spaces_full);
        add("unwind_tables_full", unwinding.tables_full);
        Ok(Profile {
            mode,
            started_unix_ns: self.started_unix_ns,
            duration_ns: now_ns.saturating_sub(self.began_ns),
            kernel: self.kernel_release.clone(),
            hostname: hostname(),
            processes: watch.lives.iter().map(|life| life.process.clone()).collect(),
            modules: watch.modules.list(),
            sites: census.sites,
            blocks: Vec::new(),
            losses,
            events: watch.events.clone(),
            finished,
            windows: survivors.windows,
            page_interval: self.config.method.page_interval(),
            cost: self.control.meter.cost(&mut self.watch, self.config.method)?,
        })
    }

    /// Stops counting, takes the probes away and reports.
    fn finish(mut self, output: OutputFile) -> Result<(), SessionError> {
        self.watch.kernel.enable(false)?;
        let now_ns = monotonic_ns();
        self.watch.detach();
        self.watch.kernel.detach_page_faults();
        self.drain();
        self.watch.look_at_pages(true);
        // For those that were not there when they were looked at first.
        self.watch.look_at_pages(true);
        if let Some(one_in) = self.config.method.page_interval() {
            self.watch.compare_with_the_kernels_account(one_in);
        }
        let mut profile = self.profile(true, now_ns)?;
        let filter = self.config.filter;
        let mode = self.control.mode();
        let listed = |kind| mode.lists(kind);
        let outstanding = self.sites.outstanding(
            &listed,
            &self.watch.kernel,
            &self.watch.lives,
            &self.watch.by_owner,
            now_ns,
        )?;
        match output.kind {
            OutputKind::Recording(writer) => {
                let mut failed = None;
                let blocks =
                    outstanding.map_while(|block| block.map_err(|e| failed = Some(e)).ok());
                writer.finish(&profile, blocks)?;
                if let Some(error) = failed {
                    return Err(error.into());
                }
            }
            OutputKind::Report(format, file) => {
                if self.config.blocks {
                    for block in outstanding {
                        let block = block?;
                        if filter.keeps(block.size_bytes, block.age_ns) {
                            profile.blocks.push(block);
                        }
                    }
                }
                let options = ReportOptions { color: false, top: None, ..self.options() };
                file.write(format, &profile, &options)?;
            }
            OutputKind::None => {}
        }
        let printed = self.print(&profile);
        self.watch.modules.save();
        printed?;
        let left = self.watch.detaching();
        // Up to 70 ms each (see `Watch::detach`): silence for seconds looks like a hang.
        if left > 15 && terminal::Progress::new().shown() {
            eprintln!("leakbpf: taking {left} probes away …");
        }
        Ok(())
    }
}

fn hostname() -> String {
    nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
