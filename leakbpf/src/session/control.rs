//! Keeps a session within its budget: takes the probes away when they cost too much, brings them back
//! for windows, and keeps what survives those.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use leakbpf_common::abi::{Block, BlockKey, Owner, SiteCounters, SiteKey, StackId};

use super::{
    SessionError,
    budget::{Budget, Step},
    config::Method,
    cost::Meter,
    snapshot::Sites,
    watch::{Watch, monotonic_ns},
};
use crate::{
    ledger::windows::{Seen, Window, Windows},
    probe::kernel::KernelError,
    process::cpu_time,
    profile::{self, Counters, Mode, ProcessId, SiteId, SiteKind},
    report,
};

/// A window of the mode that has nothing else ends after so long.
const LONGEST_WINDOW: Duration = Duration::from_secs(2);

/// Shorter windows are not told of: too much survives them.
const SHORTEST_TOLD: u64 = 40_000_000;

/// From then on a window is worth a word.
const LONG_WINDOW: Duration = Duration::from_secs(10);

pub struct Control {
    method: Method,
    pub meter: Meter,
    budget: Option<Budget>,
    windows: Windows<SiteId>,
    opened_ns: u64,
    /// Nothing was missed since the session began.
    unbroken: bool,
    told_of_long_window: bool,
    due: Instant,
}

impl Control {
    pub fn new(method: Method, meter: Meter) -> Self {
        Self {
            method,
            meter,
            budget: None,
            windows: Windows::default(),
            opened_ns: monotonic_ns(),
            unbroken: true,
            told_of_long_window: false,
            due: Instant::now(),
        }
    }

    /// The probes are in place, and count.
    pub fn begin(&mut self, watch: &mut Watch) -> Result<(), SessionError> {
        self.opened_ns = watch.began_ns;
        // Without a probe, there is nothing to be unbroken.
        self.unbroken = watch.probes() > 0;
        let Some(limit) = self.method.limit() else { return Ok(()) };
        let longest = match self.method {
            Method::Windows { .. } => Some(LONGEST_WINDOW),
            _ => None,
        };
        let now = self.meter.read(watch)?;
        let budget = Budget::new(f64::from(limit.ppm) / 1e6, longest, now);
        self.due = Instant::now() + budget.look_again_after(now);
        self.budget = Some(budget);
        Ok(())
    }

    /// How the numbers come to be that a profile shows now.
    pub fn mode(&self) -> Mode {
        match self.method {
            Method::Exact => Mode::Exact,
            Method::Sample { interval_bytes } => Mode::Sample { interval_bytes },
            Method::Pages { one_in } => Mode::Pages { one_in },
            Method::Windows { .. } => Mode::Windows,
            Method::Auto { .. } if self.unbroken => Mode::Exact,
            Method::Auto { one_in, .. } => Mode::Pages { one_in },
        }
    }

    /// When [`Self::attend`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        self.budget.as_ref().map(|_| self.due)
    }

    /// Looks what was spent, and acts.
    pub fn attend(&mut self, watch: &mut Watch) -> Result<Step, SessionError> {
        let Some(budget) = &mut self.budget else { return Ok(Step::Stay) };
        let now = self.meter.read(watch)?;
        let mut step = budget.decide(now);
        if step == Step::Open && watch.detaching() > 0 {
            // Those of the last window still run their programs: a call would be counted twice.
            step = Step::Stay;
        }
        self.due = Instant::now() + budget.look_again_after(now);
        let open_for = Duration::from_nanos(now.at_ns.saturating_sub(self.opened_ns));
        let long = budget.is_open() && open_for >= LONG_WINDOW && !self.unbroken;
        if step == Step::Stay && long && !self.told_of_long_window {
            self.told_of_long_window = true;
            watch.note(
                None,
                "every allocation is counted again, for as long as it costs little".to_owned(),
            );
        }
        Ok(step)
    }

    /// Brings the probes back.
    pub fn open(&mut self, watch: &mut Watch) -> Result<(), SessionError> {
        let Some(budget) = &mut self.budget else { return Ok(()) };
        watch.look_for_code();
        // What calls were in flight when the last window closed says nothing now.
        watch.kernel.threads.take(|_, _| true).map_err(failed("THREADS"))?;
        watch.kernel.count_calls(true)?;
        let before = cpu_time::of_this_thread();
        watch.place_all();
        let placing = cpu_time::of_this_thread().saturating_sub(before);
        self.opened_ns = monotonic_ns();
        self.told_of_long_window = false;
        let now = self.meter.read(watch)?;
        budget.opened(now, placing);
        self.due = Instant::now() + budget.look_again_after(now);
        Ok(())
    }

    /// Takes the probes away. What was counted is still in the kernel's maps: see [`Self::keep`].
    pub fn close(&mut self, watch: &mut Watch) -> Result<Window, SessionError> {
        let window = Window { opened_ns: self.opened_ns, closed_ns: monotonic_ns() };
        watch.kernel.count_calls(false)?;
        watch.take_all_away();
        if let Some(budget) = &mut self.budget {
            let now = self.meter.read(watch)?;
            budget.closed(now);
            self.due = Instant::now() + budget.look_again_after(now);
        }
        if self.unbroken || self.told_of_long_window {
            let text = self.why_closed(watch, window)?;
            watch.note(None, text);
        }
        self.unbroken = false;
        Ok(window)
    }

    fn why_closed(&self, watch: &mut Watch, window: Window) -> Result<String, SessionError> {
        let time = window.closed_ns.saturating_sub(window.opened_ns);
        let cost = self.meter.cost(watch, self.method)?;
        let share = cost.share().map_or(0.0, |share| share * 100.0);
        let what = match self.method {
            Method::Windows { .. } => "from here on probes are in place for short windows",
            _ => {
                "from here on the numbers are resident memory by who touched it first, and what \
                 survives short windows"
            }
        };
        Ok(format!(
            "every allocation was counted for {}; the session has cost {share:.1} % of the \
             processes' own time so far: {what}",
            report::duration(time)
        ))
    }

    /// Takes what a closed window has counted out of the kernel's maps.
    pub fn keep(
        &mut self,
        window: Window,
        watch: &mut Watch,
        sites: &mut Sites,
    ) -> Result<(), SessionError> {
        // Whoever has a site keeps its place.
        watch.listed = watch.lives.len();
        let mut seen = Tallies::new(window, watch, sites);
        watch
            .kernel
            .sites
            .take(|key, value| {
                seen.site(key, value);
                value.allocated_count > 0
            })
            .map_err(failed("SITES"))?;
        watch
            .kernel
            .blocks
            .take(|key, block| {
                seen.block(key, block);
                true
            })
            .map_err(failed("BLOCKS"))?;
        let seen = seen.by_site;
        // What begins with less than a moment's credit says more of the moment than of survival.
        if window.closed_ns.saturating_sub(window.opened_ns) >= SHORTEST_TOLD {
            self.windows.add(window, seen);
        }
        Ok(())
    }

    /// What survived so far, with the window that is open.
    pub fn survivors(
        &self,
        watch: &mut Watch,
        sites: &mut Sites,
        now_ns: u64,
    ) -> Result<(Vec<(SiteId, Counters)>, Option<profile::Windows>), SessionError> {
        let session_ns = now_ns.saturating_sub(watch.began_ns);
        let open = self.budget.as_ref().is_some_and(Budget::is_open)
            && (!self.unbroken || matches!(self.method, Method::Windows { .. }));
        let mut all = None;
        if open {
            let window = Window { opened_ns: self.opened_ns, closed_ns: now_ns };
            let mut seen = Tallies::new(window, watch, sites);
            for entry in watch.kernel.sites.walk() {
                let (key, value) = entry.map_err(failed("SITES"))?;
                seen.site(&key, &value);
            }
            for entry in watch.kernel.blocks.walk() {
                let (key, block) = entry.map_err(failed("BLOCKS"))?;
                seen.block(&key, &block);
            }
            let seen = seen.by_site;
            let mut windows = self.windows.clone();
            windows.add(window, seen);
            all = Some(windows);
        }
        let windows = all.as_ref().unwrap_or(&self.windows);
        let facts = (!windows.is_empty()).then(|| windows.facts(session_ns));
        Ok((windows.estimates(session_ns).collect(), facts))
    }
}

/// What a window has seen, by site.
struct Tallies<'a> {
    window: Window,
    watch: &'a Watch,
    sites: &'a mut Sites,
    by_site: HashMap<SiteId, Seen>,
}

impl<'a> Tallies<'a> {
    fn new(window: Window, watch: &'a Watch, sites: &'a mut Sites) -> Self {
        Self { window, watch, sites, by_site: HashMap::new() }
    }

    fn of(&mut self, owner: Owner, stack: StackId) -> Option<&mut Seen> {
        let life = *self.watch.by_owner.get(&owner)?;
        let (site, _) = self.sites.of(&self.watch.lives, life, stack, SiteKind::Survivor);
        Some(self.by_site.entry(site).or_default())
    }

    fn site(&mut self, key: &SiteKey, value: &SiteCounters) {
        if value.allocated_count > 0
            && let Some(seen) = self.of(key.owner, key.stack)
        {
            seen.allocated_bytes = seen.allocated_bytes.saturating_add(value.allocated_bytes);
            seen.allocated_count = seen.allocated_count.saturating_add(value.allocated_count);
        }
    }

    fn block(&mut self, key: &BlockKey, block: &Block) {
        let early = self.window.opened_ns..self.window.middle_ns();
        // What a process has when it ends goes with it.
        let lives = |life: &ProcessId| self.watch.lives.get(life.0).is_some_and(|it| !it.ended());
        if early.contains(&block.born_ns)
            && self.watch.by_owner.get(&key.owner).is_some_and(lives)
            && let Some(seen) = self.of(key.owner, block.stack)
        {
            seen.survived_bytes = seen.survived_bytes.saturating_add(block.size_bytes);
            seen.survived_count = seen.survived_count.saturating_add(1);
        }
    }
}

fn failed(map: &'static str) -> impl Fn(std::io::Error) -> KernelError {
    move |source| KernelError::Map { map, source }
}
