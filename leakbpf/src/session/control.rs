//! Keeps a session within its budget: samples blocks where that is enough, takes the probes away when
//! they cost too much, brings them back for windows, and keeps what survives those.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use leakbpf_common::{
    abi::{Block, BlockKey, Loss, Owner, SiteCounters, SiteKey, StackId},
    sampling::Sampling,
};

use super::{
    SessionError,
    budget::{Budget, Step},
    clock::monotonic_ns,
    config::Method,
    cost::Meter,
    counting::Counting,
    snapshot::Sites,
    watch::Watch,
};
use crate::{
    ledger::windows::{Seen, Window, Windows},
    probe::kernel::KernelError,
    process::cpu_time,
    profile::{self, Counters, Mode, SiteId, SiteKind},
    report,
};

/// A window of the mode that has nothing else ends after so long.
const LONGEST_WINDOW: Duration = Duration::from_secs(2);

/// Shorter windows are not told of: too much survives them.
const SHORTEST_TOLD: u64 = 40_000_000;

/// So many windows tell more of who keeps memory than who touched it first does.
const ENOUGH_WINDOWS: u32 = 3;

/// Most blocks that are watched from one window to the next.
const MOST_KEPT: u64 = 1 << 17;

/// Programs that run when sampling begins have long ended after this time, wherever they were
/// interrupted.
const SWITCHING_NS: u64 = 1_000_000_000;

/// From then on a window is worth a word.
const LONG_WINDOW: Duration = Duration::from_secs(10);

/// What survived windows, taken for the whole session.
pub struct Survivors {
    pub sites: Vec<(SiteId, Counters)>,
    /// None when there was no window.
    pub windows: Option<profile::Windows>,
}

type Losses = [u64; Loss::ALL.len()];

pub struct Control {
    method: Method,
    counting: Counting,
    pub meter: Meter,
    budget: Option<Budget>,
    windows: Windows<SiteId>,
    /// What survived windows, by site, and is still in the kernel's map.
    kept: HashMap<SiteId, u64>,
    /// One in 2^n of them is kept there.
    thinned: u32,
    opened_ns: u64,
    /// Some were placed then.
    has_probes: bool,
    /// What had been spent then.
    opened_spent_ns: u64,
    /// When the last window was closed.
    closed_ns: u64,
    /// Nothing was missed since the session began.
    unbroken: bool,
    /// Releases that were not seen until then.
    missed_while_unbroken: Option<u64>,
    told_of_long_window: bool,
    looks_at_pages: bool,
    due: Instant,
}

impl Control {
    pub fn new(method: Method, meter: Meter) -> Self {
        Self {
            method,
            counting: Counting::new(method, monotonic_ns()),
            meter,
            budget: None,
            windows: Windows::default(),
            kept: HashMap::new(),
            thinned: 0,
            opened_ns: monotonic_ns(),
            has_probes: false,
            opened_spent_ns: 0,
            closed_ns: monotonic_ns(),
            unbroken: true,
            missed_while_unbroken: None,
            told_of_long_window: false,
            looks_at_pages: method.page_interval().is_some(),
            due: Instant::now(),
        }
    }

    /// The probes are in place, and count.
    pub fn begin(&mut self, watch: &mut Watch) -> Result<(), SessionError> {
        (self.opened_ns, self.closed_ns) = (watch.began_ns, watch.began_ns);
        self.counting = Counting::new(self.method, watch.began_ns);
        self.has_probes = watch.probes() > 0;
        // Without a probe, there is nothing to be unbroken.
        self.unbroken = self.has_probes;
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

    pub fn counting(&self) -> Counting {
        self.counting
    }

    /// How the numbers come to be that a profile shows now.
    pub fn mode(&self, now_ns: u64) -> Mode {
        let of_blocks = self.counting.at(now_ns).mode_of(SiteKind::Heap);
        match self.method {
            Method::Exact | Method::Sample { .. } => of_blocks,
            Method::Pages { one_in } => Mode::Pages { one_in },
            Method::Windows { .. } => Mode::Windows,
            Method::Auto { .. } if self.unbroken => of_blocks,
            Method::Auto { .. } if self.windows.count() >= ENOUGH_WINDOWS => Mode::Windows,
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
        let left = || match self.method {
            // What was missed can't be made up for.
            Method::Auto { interval_bytes, .. } if self.unbroken => {
                self.meter.left_by_sampling(interval_bytes, now, watch)
            }
            _ => None,
        };
        let mut step = budget.decide(now, left);
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

    /// Losses, without releases that were missed because nothing was watched at the time.
    pub fn without_expected(&self, mut losses: Losses) -> Losses {
        if let Some(unexpected) = self.missed_while_unbroken {
            losses[Loss::FreesMissed as usize] = unexpected;
        }
        losses
    }

    /// From now on only some of the blocks are recorded, and stand for the others. Those that are there
    /// stand for themselves.
    pub fn sample(&mut self, watch: &mut Watch) -> Result<(), SessionError> {
        let (Some(budget), Method::Auto { interval_bytes, .. }) = (&mut self.budget, self.method)
        else {
            return Ok(());
        };
        let now = self.meter.read(watch)?;
        let sampling = Sampling {
            interval_bytes: interval_bytes.into(),
            since_ns: monotonic_ns().saturating_add(SWITCHING_NS),
        };
        watch.kernel.sample(sampling)?;
        self.counting = self.counting.with(sampling);
        budget.begin_sampling(now);
        self.due = Instant::now() + budget.look_again_after(now);
        let text = format!(
            "every allocation was counted for {}, which cost the processes {} of processor time, \
             more than they may pay: from here on one block every {} is recorded, and stands for \
             others",
            report::duration(now.at_ns.saturating_sub(self.opened_ns)),
            report::duration(now.spent_ns.saturating_sub(self.opened_spent_ns)),
            report::bytes(interval_bytes.into()),
        );
        watch.note(None, text);
        Ok(())
    }

    /// Page faults are not looked at from now on. What was taken in until then is shown.
    pub fn stop_pages(&mut self, watch: &mut Watch) {
        watch.kernel.detach_page_faults();
        self.looks_at_pages = false;
        self.budget.iter_mut().for_each(Budget::stopped_pages);
        watch.note(
            None,
            "looking at page faults alone costs the processes more than they may pay: from here on \
             resident memory is what was touched until now and is still there"
                .to_owned(),
        );
    }

    /// Resident memory is seen to come, from begin to end.
    pub fn looks_at_pages(&self) -> bool {
        self.looks_at_pages
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
        self.has_probes = watch.probes() > 0;
        self.told_of_long_window = false;
        let now = self.meter.read(watch)?;
        self.opened_spent_ns = now.spent_ns;
        budget.opened(now, placing);
        self.due = Instant::now() + budget.look_again_after(now);
        Ok(())
    }

    /// Takes the probes away. What was counted is still in the kernel's maps: see [`Self::keep`].
    pub fn close(&mut self, watch: &mut Watch) -> Result<Window, SessionError> {
        let window = Window {
            since_ns: self.closed_ns,
            opened_ns: self.opened_ns,
            closed_ns: monotonic_ns(),
        };
        self.closed_ns = window.closed_ns;
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
        if self.missed_while_unbroken.is_none() {
            let losses = watch.kernel.counts()?.losses;
            self.missed_while_unbroken = Some(losses[Loss::FreesMissed as usize]);
        }
        self.unbroken = false;
        Ok(window)
    }

    fn why_closed(&mut self, watch: &mut Watch, window: Window) -> Result<String, SessionError> {
        let time = window.closed_ns.saturating_sub(window.opened_ns);
        let spent = self.meter.read(watch)?.spent_ns.saturating_sub(self.opened_spent_ns);
        let what = match self.method {
            Method::Windows { .. } => "from here on probes are in place for short windows",
            _ => {
                "from here on probes are in place for short windows, and the numbers are resident \
                 memory by who touched it first, and, after some windows, what survives them"
            }
        };
        let counted = if self.counting.samples() {
            "allocations were counted, then sampled,"
        } else {
            "every allocation was counted"
        };
        Ok(format!(
            "{counted} for {}, which cost the processes {} of processor time, \
             more than they may pay: {what}",
            report::duration(time),
            report::duration(spent)
        ))
    }

    /// Takes what a closed window has counted out of the kernel's maps, but for what survived it: a
    /// later window shows whether that goes.
    pub fn keep(
        &mut self,
        window: Window,
        watch: &mut Watch,
        sites: &mut Sites,
    ) -> Result<(), SessionError> {
        // Whoever has a site keeps its place.
        watch.listed = watch.lives.len();
        // What begins with less than a moment's credit says more of the moment than of survival.
        let told = window.closed_ns.saturating_sub(window.opened_ns) >= SHORTEST_TOLD;
        let mut seen = Tallies::new(window, self.counting, watch, sites);
        watch
            .kernel
            .sites
            .take(|key, value| {
                seen.site(key, value);
                value.allocated_count > 0
            })
            .map_err(failed("SITES"))?;
        let mut still_there: HashMap<SiteId, u64> = HashMap::new();
        let mut kept: HashMap<SiteId, u64> = HashMap::new();
        let (thinned, counting) = (self.thinned, self.counting);
        watch
            .kernel
            .blocks
            .take(|key, block| {
                let is_old = block.born_ns < window.opened_ns;
                let site = if is_old {
                    seen.living_site(key.owner, block.stack)
                } else {
                    seen.survivor(key, block).filter(|_| told)
                };
                let Some(site) = site else { return true };
                if is_old {
                    *still_there.entry(site).or_default() += 1;
                }
                // One that stands for others would tell of them all when it goes.
                let is_kept = !counting.is_sampled(block) && chosen(key, thinned);
                if is_kept {
                    *kept.entry(site).or_default() += 1;
                }
                !is_kept
            })
            .map_err(failed("BLOCKS"))?;
        for (&site, &before) in &self.kept {
            // The end of a process is no release.
            let life = seen.sites.process(site).and_then(|id| watch.lives.get(id.0));
            if life.is_some_and(|life| !life.ended()) {
                let after = still_there.get(&site).copied().unwrap_or(0);
                let seen = seen.by_site.entry(site).or_default();
                seen.kept_count = before;
                seen.gone_count = before.saturating_sub(after);
            }
        }
        let seen = seen.by_site;
        if told {
            self.windows.add(window, seen);
        }
        watch.kernel.sample(Sampling::NONE)?;
        self.counting = self.counting.with(Sampling::NONE);
        if kept.values().sum::<u64>() > MOST_KEPT {
            self.thinned += 1;
        }
        self.kept = kept;
        Ok(())
    }

    /// What survived so far, with the window that is open.
    pub fn survivors(
        &self,
        watch: &mut Watch,
        sites: &mut Sites,
        now_ns: u64,
    ) -> Result<Survivors, SessionError> {
        let session_ns = now_ns.saturating_sub(watch.began_ns);
        let open = self.budget.as_ref().is_some_and(Budget::is_open)
            && self.has_probes
            && (!self.unbroken || matches!(self.method, Method::Windows { .. }));
        let mut all = None;
        if open {
            let window =
                Window { since_ns: self.closed_ns, opened_ns: self.opened_ns, closed_ns: now_ns };
            let mut seen = Tallies::new(window, self.counting, watch, sites);
            for entry in watch.kernel.sites.walk() {
                let (key, value) = entry.map_err(failed("SITES"))?;
                seen.site(&key, &value);
            }
            for entry in watch.kernel.blocks.walk() {
                let (key, block) = entry.map_err(failed("BLOCKS"))?;
                seen.survivor(&key, &block);
            }
            let seen = seen.by_site;
            let mut windows = self.windows.clone();
            windows.add(window, seen);
            all = Some(windows);
        }
        let windows = all.as_ref().unwrap_or(&self.windows);
        Ok(Survivors {
            sites: windows.estimates(session_ns).collect(),
            windows: (windows.count() > 0).then(|| windows.facts(session_ns)),
        })
    }
}

/// What a window has seen, by site.
struct Tallies<'a> {
    window: Window,
    counting: Counting,
    watch: &'a Watch,
    sites: &'a mut Sites,
    by_site: HashMap<SiteId, Seen>,
}

impl<'a> Tallies<'a> {
    fn new(window: Window, counting: Counting, watch: &'a Watch, sites: &'a mut Sites) -> Self {
        Self { window, counting, watch, sites, by_site: HashMap::new() }
    }

    fn of(&mut self, owner: Owner, stack: StackId) -> Option<&mut Seen> {
        let life = *self.watch.by_owner.get(&owner)?;
        let (site, _) = self.sites.of(&self.watch.lives, life, stack, SiteKind::Survivor);
        Some(self.by_site.entry(site).or_default())
    }

    fn site(&mut self, key: &SiteKey, value: &SiteCounters) {
        let Counters { allocated_bytes, allocated_count, .. } = self.counting.heap_counters(value);
        if value.allocated_count > 0
            && let Some(seen) = self.of(key.owner, key.stack)
        {
            let allocated = Counters { allocated_bytes, allocated_count, ..Counters::default() };
            seen.counters.add(&allocated);
        }
    }

    /// Counts the block if it has survived the window, and tells its site.
    fn survivor(&mut self, key: &BlockKey, block: &Block) -> Option<SiteId> {
        let early = self.window.opened_ns..self.window.middle_ns();
        if !early.contains(&block.born_ns) {
            return None;
        }
        let site = self.living_site(key.owner, block.stack)?;
        let estimate = self.counting.estimate(SiteKind::Heap, block.size_bytes, block.born_ns);
        self.by_site.entry(site).or_default().counters.hold(estimate);
        Some(site)
    }

    /// The site of a process that lives: what a process has when it ends goes with it.
    fn living_site(&mut self, owner: Owner, stack: StackId) -> Option<SiteId> {
        let life = *self.watch.by_owner.get(&owner)?;
        self.watch.lives.get(life.0).filter(|life| !life.ended())?;
        Some(self.sites.of(&self.watch.lives, life, stack, SiteKind::Survivor).0)
    }
}

/// One block in 2^n, always the same ones (Fibonacci hashing: Knuth, TAOCP 3, 6.4).
fn chosen(key: &BlockKey, thinned: u32) -> bool {
    let hash = key.address.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    thinned == 0 || hash >> (64 - thinned.min(63)) == 0
}

fn failed(map: &'static str) -> impl Fn(std::io::Error) -> KernelError {
    move |source| KernelError::Map { map, source }
}
