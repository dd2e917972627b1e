//! What survives windows of time, and what that says of the time between them.
//!
//! In a window every call of an allocator is counted. A block that is made in its first half and not
//! released in its second has survived: it lived half a window at least. The amounts that survive are
//! one observation a window; as windows are opened without regard to what the program does, their mean
//! is that of all time, and their differences say how good it is. Windows may have different lengths:
//! the estimate is the ratio of all that survived to all the time in which it was made, and its
//! variance that of a ratio of means (Cochran, Sampling Techniques, 6.4).
//!
//! What has survived one window may be released later, between windows, unseen. But some of its kind
//! are released in later windows, or their addresses are handed out again there; each one that is stands
//! for as many as a window is shorter than the time from one window to the next. So the share of a site's blocks
//! that goes from one window to the next is known, and with it how many of those that were made all along
//! are there at the end: all of a leak, the youngest of a cache that turns over.

use std::collections::HashMap;
use std::hash::Hash;

use crate::profile::{
    self, Counters,
    estimate::{DEVIATIONS, Spread},
};

/// One window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// When the one before was closed, or the session began.
    pub since_ns: u64,
    pub opened_ns: u64,
    pub closed_ns: u64,
}

impl Window {
    /// What is made before has the time to survive.
    pub const fn middle_ns(&self) -> u64 {
        self.opened_ns + self.closed_ns.saturating_sub(self.opened_ns) / 2
    }

    const fn open_ns(&self) -> u64 {
        self.closed_ns.saturating_sub(self.opened_ns)
    }

    /// For how many releases one stands that was seen.
    fn weight(&self) -> f64 {
        let cycle_ns = self.closed_ns.saturating_sub(self.since_ns).max(self.open_ns());
        if self.open_ns() == 0 { 1.0 } else { cycle_ns as f64 / self.open_ns() as f64 }
    }

    const fn early_ns(&self) -> u64 {
        self.middle_ns() - self.opened_ns
    }
}

/// What one window saw of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    /// What was allocated, and what of it survived, as live.
    pub counters: Counters,
    /// Blocks that had survived earlier windows, when this one was opened.
    pub kept_count: u64,
    /// Those of them that were seen to go.
    pub gone_count: u64,
}

/// Sums over the windows of a session, by site.
#[derive(Debug, Clone)]
pub struct Windows<K> {
    count: u32,
    open_ns: u64,
    early_ns: u64,
    /// Sum of the squares of the windows' first halves, in ns².
    early_squares: f64,
    /// Sum of [`Window::weight`].
    weights: f64,
    sites: HashMap<K, Site>,
    all: Site,
}

#[derive(Debug, Clone, Copy, Default)]
struct Site {
    bytes: Amount,
    count: Amount,
    allocated_bytes: u64,
    allocated_count: u64,
    /// Over the windows: blocks that might have gone, those that were seen to, and those that stand
    /// behind them.
    kept: u64,
    gone: u64,
    gone_weighted: f64,
}

/// Share of what survived that is still there at the end: the estimate, and between what it may lie.
#[derive(Debug, Clone, Copy)]
struct Retained {
    share: f64,
    low: f64,
    high: f64,
}

/// Amounts that survived, one for each window.
#[derive(Debug, Clone, Copy, Default)]
struct Amount {
    sum: u64,
    squares: f64,
    /// Sum of the products with the windows' first halves.
    products: f64,
    /// Of those that are estimates themselves, in windows whose blocks were sampled.
    sampling_variance: f64,
}

impl Amount {
    fn add(&mut self, survived: u64, variance: f64, early_ns: u64) {
        self.sampling_variance += variance;
        self.sum = self.sum.saturating_add(survived);
        let survived = survived as f64;
        self.squares += survived * survived;
        self.products += survived * early_ns as f64;
    }
}

impl<K> Default for Windows<K> {
    fn default() -> Self {
        Self {
            count: 0,
            open_ns: 0,
            early_ns: 0,
            early_squares: 0.0,
            weights: 0.0,
            sites: HashMap::new(),
            all: Site::default(),
        }
    }
}

impl<K: Eq + Hash + Copy> Windows<K> {
    /// Adds what a window saw.
    pub fn add(&mut self, window: Window, seen: impl IntoIterator<Item = (K, Seen)>) {
        let early_ns = window.early_ns();
        self.count = self.count.saturating_add(1);
        self.open_ns = self.open_ns.saturating_add(window.open_ns());
        self.early_ns = self.early_ns.saturating_add(early_ns);
        self.early_squares += early_ns as f64 * early_ns as f64;
        let weight = window.weight();
        self.weights += weight;
        let mut all = Seen::default();
        for (key, seen) in seen {
            self.sites.entry(key).or_default().add(&seen, early_ns, weight);
            all.counters.add(&seen.counters);
        }
        self.all.add(&all, early_ns, weight);
    }

    pub fn count(&self) -> u32 {
        self.count
    }

    /// What survived at each site in a session of this length.
    pub fn estimates(&self, session_ns: u64) -> impl Iterator<Item = (K, Counters)> + '_ {
        self.sites.iter().map(move |(key, site)| (*key, self.estimate(site, session_ns)))
    }

    /// For a profile of a session of this length.
    pub fn facts(&self, session_ns: u64) -> profile::Windows {
        let of_early = factor(session_ns, self.early_ns);
        let mut facts = profile::Windows {
            count: self.count,
            open_ns: self.open_ns,
            early_ns: self.early_ns,
            ..profile::Windows::default()
        };
        // What survives at one site and at another does so in the same windows; what goes later does
        // not.
        let mut totals = Counters::default();
        for site in self.sites.values() {
            let retained = self.retained(site);
            totals.add(&self.estimate(site, session_ns));
            facts.bytes_variance += retained.variance(site.bytes.sum as f64 * of_early);
            facts.count_variance += retained.variance(site.count.sum as f64 * of_early);
        }
        let shrunk = |left: u64, all: u64| {
            let survived = all as f64 * of_early;
            if survived > 0.0 { left as f64 / survived } else { 0.0 }
        };
        let bytes = shrunk(totals.live_bytes, self.all.bytes.sum);
        let count = shrunk(totals.live_count, self.all.count.sum);
        facts.bytes_variance += self.variance(&self.all.bytes, of_early) * bytes * bytes;
        facts.count_variance += self.variance(&self.all.count, of_early) * count * count;
        facts
    }

    fn estimate(&self, site: &Site, session_ns: u64) -> Counters {
        let of_early = factor(session_ns, self.early_ns);
        let of_open = factor(session_ns, self.open_ns);
        let retained = self.retained(site);
        let scale = |amount: u64, factor: f64| (amount as f64 * factor).round() as u64;
        let (live_bytes, live_count) = (
            scale(site.bytes.sum, of_early * retained.share),
            scale(site.count.sum, of_early * retained.share),
        );
        // What is made late in a window has no time to survive, but it is made.
        let allocated_bytes = scale(site.allocated_bytes, of_open).max(live_bytes);
        let allocated_count = scale(site.allocated_count, of_open).max(live_count);
        let variance = |amount: &Amount| {
            let of_rate = self.variance(amount, of_early) * retained.share * retained.share;
            of_rate + retained.variance(amount.sum as f64 * of_early)
        };
        Counters {
            live_bytes,
            live_count,
            allocated_bytes,
            allocated_count,
            freed_bytes: allocated_bytes - live_bytes,
            freed_count: allocated_count - live_count,
            spread: Spread {
                bytes_variance: variance(&site.bytes),
                count_variance: variance(&site.count),
                ..Spread::default()
            },
        }
    }

    /// Of the blocks that a site made all along and that survived.
    fn retained(&self, site: &Site) -> Retained {
        let kept = site.kept as f64;
        if kept == 0.0 {
            return Retained { share: 1.0, low: 1.0, high: 1.0 };
        }
        let seen = site.gone as f64;
        // For how many one that was seen stands; where none was, on average.
        let weight = match site.gone {
            0 => self.weights / f64::from(self.count.max(1)),
            _ => site.gone_weighted / seen,
        };
        // The number seen is Poisson's: its root has a standard deviation of one half.
        let least = (seen.sqrt() - DEVIATIONS / 2.0).max(0.0).powi(2);
        let most = ((seen + 1.0).sqrt() + DEVIATIONS / 2.0).powi(2);
        let share = |gone: f64| self.share_left(gone * weight / kept);
        Retained { share: share(seen), low: share(most), high: share(least) }
    }

    /// Of blocks that were made at an even pace, when such a share goes from one window to the next.
    fn share_left(&self, going: f64) -> f64 {
        let stays = (1.0 - going).clamp(0.0, 1.0);
        let windows = f64::from(self.count.max(1));
        // 1 + stays + stays² + …, a term for each window, over their number.
        if stays >= 1.0 { 1.0 } else { (1.0 - stays.powf(windows)) / (1.0 - stays) / windows }
    }

    /// Of an estimate for the whole session.
    fn variance(&self, amount: &Amount, of_early: f64) -> f64 {
        let sampling = of_early * of_early * amount.sampling_variance;
        if self.count < 2 || self.early_ns == 0 {
            return sampling;
        }
        let windows = f64::from(self.count);
        let rate = amount.sum as f64 / self.early_ns as f64;
        let residuals =
            amount.squares - 2.0 * rate * amount.products + rate * rate * self.early_squares;
        // Of a session that was seen whole, nothing is unknown.
        let unseen = (1.0 - 1.0 / of_early).clamp(0.0, 1.0);
        let differences = residuals.max(0.0) * windows / (windows - 1.0) * unseen;
        of_early * of_early * differences + sampling
    }
}

fn factor(whole_ns: u64, part_ns: u64) -> f64 {
    if part_ns == 0 { 0.0 } else { (whole_ns as f64 / part_ns as f64).max(1.0) }
}

impl Retained {
    fn variance(&self, whole: f64) -> f64 {
        let deviation = (self.high - self.low) / (2.0 * DEVIATIONS) * whole;
        deviation * deviation
    }
}

impl Site {
    fn add(&mut self, seen: &Seen, early_ns: u64, weight: f64) {
        self.kept = self.kept.saturating_add(seen.kept_count);
        self.gone = self.gone.saturating_add(seen.gone_count);
        self.gone_weighted += seen.gone_count as f64 * weight;
        let Counters { live_bytes, live_count, spread, .. } = seen.counters;
        self.bytes.add(live_bytes, spread.bytes_variance, early_ns);
        self.count.add(live_count, spread.count_variance, early_ns);
        self.allocated_bytes = self.allocated_bytes.saturating_add(seen.counters.allocated_bytes);
        self.allocated_count = self.allocated_count.saturating_add(seen.counters.allocated_count);
    }
}

#[cfg(test)]
#[path = "windows_tests.rs"]
mod tests;
