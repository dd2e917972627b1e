//! A session while it counts: waits for what comes, keeps within the budget, and reports.

use std::{
    io::{self, Write},
    ops::ControlFlow,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use leakbpf_common::abi::Owner;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use super::{
    SessionError,
    budget::Step,
    clock::{monotonic_ns, unix_ns},
    config::{Config, Output},
    control::Control,
    fold::{self, Groups},
    inbox::Inbox,
    output::{OutputFile, OutputKind},
    signals::Signals,
    snapshot::{Sites, View, loss_names},
    terminal::{self, Progress},
    watch::Watch,
};
use crate::{
    probe::kernel::KernelError,
    process::{
        Pid, host,
        launch::{LaunchedProgram, exit_code},
    },
    profile::{BlockFilter, Profile, SiteKind},
    report::{self, ReportOptions},
};

/// A touched page is looked at so soon that it is as it was mapped: the kernel puts pages together
/// to huge ones later.
const LOOK_AT_FRESH_PAGES: Duration = Duration::from_millis(250);

/// Waits for a time; for good, when there is none.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

pub struct Session<'a> {
    config: &'a Config,
    watch: Watch,
    inbox: Inbox,
    control: Control,
    sites: Sites,
    groups: Groups,
    next_fold: Instant,
    /// A recording is written.
    records: bool,
    started_unix_ns: u64,
    kernel_release: String,
}

impl<'a> Session<'a> {
    /// Of processes whose probes are in place, and count.
    pub fn new(
        config: &'a Config,
        watch: Watch,
        inbox: Inbox,
        control: Control,
        kernel_release: String,
    ) -> Self {
        Self {
            config,
            watch,
            inbox,
            control,
            sites: Sites::default(),
            groups: Groups::default(),
            next_fold: Instant::now(),
            records: matches!(config.output, Some(Output::Recording(_))),
            started_unix_ns: unix_ns(),
            kernel_release,
        }
    }

    /// Counts until it is time to stop; returns the exit status.
    pub async fn wait(
        &mut self,
        signals: &mut Signals,
        exited: &mut mpsc::UnboundedReceiver<(Pid, Owner)>,
        mut program: Option<&mut LaunchedProgram>,
        output: &mut OutputFile,
    ) -> Result<u8, SessionError> {
        let mut interval =
            tokio::time::interval(self.config.interval.max(Duration::from_millis(100)));
        interval.tick().await;
        let mut progress_tick = tokio::time::interval(Duration::from_secs(1));
        let mut progress = Progress::new();
        let mut look = tokio::time::interval(LOOK_AT_FRESH_PAGES);
        let deadline = self.config.duration.map(|duration| Instant::now() + duration);
        loop {
            let watch_due = self.watch.due();
            let control_due = self.control.due();
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
                () = until(deadline) => break,
                () = until(control_due) => self.keep_within_budget()?,
                Some((pid, owner)) = exited.recv() => {
                    // What it did last is still in the ring buffer.
                    self.drain();
                    self.watch.exited(pid, owner);
                    if self.watch.all_ended() {
                        break;
                    }
                    self.fold(fold::KEPT_WHOLE)?;
                }
                () = until(watch_due) => self.watch.attend(),
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
                    let cost = self.watch.kernel.cost()?;
                    let hits = cost.hits.count + cost.touches.count;
                    progress.show(Duration::from_nanos(monotonic_ns().saturating_sub(self.watch.began_ns)), self.live_bytes()?, hits, &counts);
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

    /// From now on that ends the wait for debug files.
    pub fn end_fetching_with(&mut self, flag: &Arc<AtomicBool>) {
        self.watch.modules.end_fetching_with(flag);
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
            Step::Sample => self.control.sample(&mut self.watch)?,
            Step::StopPages => {
                self.control.stop_pages(&mut self.watch);
                self.drain();
                self.watch.look_at_pages(true);
            }
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
        let counting = self.control.counting();
        if self.control.mode(monotonic_ns()).lists(SiteKind::Resident) {
            for page in self.watch.lives.iter().flat_map(|life| life.pages.live()) {
                let estimate =
                    counting.estimate(SiteKind::Resident, page.length_bytes, page.born_ns);
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
        let now_ns = monotonic_ns();
        let (mode, counting) = (self.control.mode(now_ns), self.control.counting().at(now_ns));
        // A recording has all: it can be reported from with any filter.
        let least_bytes = if self.records { 0 } else { self.config.filter.min_size_bytes };
        let counts = |kind, size_bytes| !mode.lists(kind) || size_bytes >= least_bytes;
        fold::fold(&mut self.watch, &mut self.sites, &mut self.groups, counting, counts)?;
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
        let now_ns = monotonic_ns();
        if let OutputKind::Recording(writer) = &mut output.kind {
            writer.snapshot(&self.profile(false, now_ns, BlockFilter::default())?)?;
        }
        if self.config.quiet {
            return Ok(ControlFlow::Continue(()));
        }
        let profile = self.profile(false, now_ns, self.config.filter)?;
        if !self.print(&profile)? && matches!(output.kind, OutputKind::None) {
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

    fn profile(
        &mut self,
        finished: bool,
        now_ns: u64,
        filter: BlockFilter,
    ) -> Result<Profile, SessionError> {
        let watch = &mut self.watch;
        watch.listed = watch.lives.len();
        let mode = self.control.mode(now_ns);
        let survivors = self.control.survivors(watch, &mut self.sites, now_ns)?;
        let view = View {
            mode,
            counting: self.control.counting().at(now_ns),
            filter,
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
            duration_ns: now_ns.saturating_sub(watch.began_ns),
            kernel: self.kernel_release.clone(),
            hostname: host::name(),
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
    pub fn finish(mut self, output: OutputFile) -> Result<(), SessionError> {
        self.watch.kernel.enable(false)?;
        let now_ns = monotonic_ns();
        // The cost of a hit depends on what probes there are.
        self.control.meter.read(&mut self.watch)?;
        self.watch.detach();
        self.watch.kernel.detach_page_faults();
        self.drain();
        self.watch.look_at_pages(true);
        // For those that were not there when they were looked at first.
        self.watch.look_at_pages(true);
        if let Some(one_in) = self.config.method.page_interval()
            && self.control.looks_at_pages()
        {
            self.watch.compare_with_the_kernels_account(one_in);
        }
        let filter = self.config.filter;
        let in_recording = if self.records { BlockFilter::default() } else { filter };
        let mut profile = self.profile(true, now_ns, in_recording)?;
        let mode = self.control.mode(now_ns);
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
        if in_recording != filter {
            profile = Profile { finished: true, ..self.profile(false, now_ns, filter)? };
        }
        let printed = self.print(&profile);
        self.watch.modules.save();
        printed?;
        let left = self.watch.detaching();
        // Up to 70 ms each (see `Watch::detach`): silence for seconds looks like a hang.
        if left > 15 && Progress::new().shown() {
            eprintln!("leakbpf: taking {left} probes away …");
        }
        Ok(())
    }
}
