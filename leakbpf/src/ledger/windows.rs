//! What survives windows of time, and what that says of the time between them.
//!
//! In a window every call of an allocator is counted. A block that is made in its first half and not
//! released in its second has survived: it lived half a window at least. The amounts that survive are
//! one observation a window; as windows are opened without regard to what the program does, their mean
//! is that of all time, and their differences say how good it is. Windows may have different lengths:
//! the estimate is the ratio of all that survived to all the time in which it was made, and its
//! variance that of a ratio of means (Cochran, Sampling Techniques, 6.4).

use std::collections::HashMap;
use std::hash::Hash;

use crate::profile::{self, Counters, estimate::Spread};

/// One window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
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

    const fn early_ns(&self) -> u64 {
        self.middle_ns() - self.opened_ns
    }
}

/// What one window saw of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    pub survived_bytes: u64,
    pub survived_count: u64,
    pub allocated_bytes: u64,
    pub allocated_count: u64,
}

/// Sums over the windows of a session, by site.
#[derive(Debug, Clone)]
pub struct Windows<K> {
    count: u32,
    open_ns: u64,
    early_ns: u64,
    /// Sum of the squares of the windows' first halves, in ns².
    early_squares: f64,
    sites: HashMap<K, Site>,
    all: Site,
}

#[derive(Debug, Clone, Copy, Default)]
struct Site {
    bytes: Amount,
    count: Amount,
    allocated_bytes: u64,
    allocated_count: u64,
}

/// Amounts that survived, one for each window.
#[derive(Debug, Clone, Copy, Default)]
struct Amount {
    sum: u64,
    squares: f64,
    /// Sum of the products with the windows' first halves.
    products: f64,
}

impl Amount {
    fn add(&mut self, survived: u64, early_ns: u64) {
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
        let mut all = Seen::default();
        for (key, seen) in seen {
            self.sites.entry(key).or_default().add(&seen, early_ns);
            all.survived_bytes = all.survived_bytes.saturating_add(seen.survived_bytes);
            all.survived_count = all.survived_count.saturating_add(seen.survived_count);
            all.allocated_bytes = all.allocated_bytes.saturating_add(seen.allocated_bytes);
            all.allocated_count = all.allocated_count.saturating_add(seen.allocated_count);
        }
        self.all.add(&all, early_ns);
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// What survived at each site in a session of this length.
    pub fn estimates(&self, session_ns: u64) -> impl Iterator<Item = (K, Counters)> + '_ {
        self.sites.iter().map(move |(key, site)| (*key, self.estimate(site, session_ns)))
    }

    /// For a profile of a session of this length.
    pub fn facts(&self, session_ns: u64) -> profile::Windows {
        let all = self.estimate(&self.all, session_ns);
        profile::Windows {
            count: self.count,
            open_ns: self.open_ns,
            early_ns: self.early_ns,
            bytes_variance: all.spread.bytes_variance,
            count_variance: all.spread.count_variance,
        }
    }

    fn estimate(&self, site: &Site, session_ns: u64) -> Counters {
        let of_early = factor(session_ns, self.early_ns);
        let of_open = factor(session_ns, self.open_ns);
        let scale = |amount: u64, factor: f64| (amount as f64 * factor).round() as u64;
        let (live_bytes, live_count) =
            (scale(site.bytes.sum, of_early), scale(site.count.sum, of_early));
        // What is made late in a window has no time to survive, but it is made.
        let allocated_bytes = scale(site.allocated_bytes, of_open).max(live_bytes);
        let allocated_count = scale(site.allocated_count, of_open).max(live_count);
        Counters {
            live_bytes,
            live_count,
            allocated_bytes,
            allocated_count,
            freed_bytes: allocated_bytes - live_bytes,
            freed_count: allocated_count - live_count,
            spread: Spread {
                bytes_variance: self.variance(&site.bytes, of_early),
                count_variance: self.variance(&site.count, of_early),
                ..Spread::default()
            },
        }
    }

    /// Of an estimate for the whole session.
    fn variance(&self, amount: &Amount, of_early: f64) -> f64 {
        if self.count < 2 || self.early_ns == 0 {
            return 0.0;
        }
        let windows = f64::from(self.count);
        let rate = amount.sum as f64 / self.early_ns as f64;
        let residuals =
            amount.squares - 2.0 * rate * amount.products + rate * rate * self.early_squares;
        // Of a session that was seen whole, nothing is unknown.
        let unseen = (1.0 - 1.0 / of_early).clamp(0.0, 1.0);
        of_early * of_early * residuals.max(0.0) * windows / (windows - 1.0) * unseen
    }
}

fn factor(whole_ns: u64, part_ns: u64) -> f64 {
    if part_ns == 0 { 0.0 } else { (whole_ns as f64 / part_ns as f64).max(1.0) }
}

impl Site {
    fn add(&mut self, seen: &Seen, early_ns: u64) {
        self.bytes.add(seen.survived_bytes, early_ns);
        self.count.add(seen.survived_count, early_ns);
        self.allocated_bytes = self.allocated_bytes.saturating_add(seen.allocated_bytes);
        self.allocated_count = self.allocated_count.saturating_add(seen.allocated_count);
    }
}

#[cfg(test)]
#[path = "windows_tests.rs"]
mod tests;
