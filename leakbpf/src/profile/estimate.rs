//! How far an estimate can be off.

use leakbpf_common::pages::{HUGE_PAGE_BYTES, PAGE_BYTES};

use super::Counters;

/// Where what is live really lies, in 95 of 100 cases: lowest and highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    pub bytes: (u64, u64),
    pub count: (u64, u64),
}

/// Of so many cases in a hundred an [`Interval`] speaks.
pub const CONFIDENCE_PERCENT: u32 = 95;

/// Standard deviations to either side that [`CONFIDENCE_PERCENT`] of a normal distribution lie within.
const DEVIATIONS: f64 = 1.959_964;

impl Interval {
    /// Of pages of which each was looked at with a chance of 1 in `one_in`, independently.
    ///
    /// The number seen has a binomial distribution. The ends are the numbers of pages for which what
    /// was seen is just [`DEVIATIONS`] away from what is to be expected: Wilson's interval, which
    /// holds for small numbers as well.
    pub fn of_pages(counters: &Counters, one_in: u32) -> Self {
        let one_in = f64::from(one_in.max(1));
        let seen = counters.live_count as f64 / one_in;
        let seen_bytes = counters.live_bytes as f64 / one_in;
        let (squares, page) = if seen_bytes > 0.0 {
            let squares = sum_of_squares(seen, seen_bytes);
            (squares, squares / seen_bytes)
        } else {
            (0.0, PAGE_BYTES as f64)
        };
        // Pages of different sizes: as many of one size as would give the same deviation.
        let equal = if squares > 0.0 { seen_bytes * seen_bytes / squares } else { 0.0 };
        let (low, high) = ends(equal, one_in);
        let count = ends(seen, one_in);
        let whole = |(low, high): (f64, f64), least: f64| {
            // What was seen is certain.
            (low.max(least).floor() as u64, high.max(least).ceil() as u64)
        };
        Self { bytes: whole((low * page, high * page), seen_bytes), count: whole(count, seen) }
    }
}

/// Of how many things `seen` may be the share of 1 in `one_in`.
fn ends(seen: f64, one_in: f64) -> (f64, f64) {
    let spread = DEVIATIONS * DEVIATIONS * (1.0 - 1.0 / one_in);
    let middle = 2.0 * seen + spread;
    let width = (spread * (spread + 4.0 * seen)).sqrt();
    ((middle - width) * one_in / 2.0, (middle + width) * one_in / 2.0)
}

/// The sum of the squares of the sizes of `count` pages of two sizes that together have `bytes`.
fn sum_of_squares(count: f64, bytes: f64) -> f64 {
    let (small, large) = (PAGE_BYTES as f64, HUGE_PAGE_BYTES as f64);
    let huge = ((bytes - small * count) / (large - small)).clamp(0.0, count);
    (count - huge) * small * small + huge * large * large
}

#[cfg(test)]
mod tests {
    use super::*;
    use leakbpf_common::pages;

    fn counters(small: u64, huge: u64, one_in: u64) -> Counters {
        Counters {
            live_bytes: (small * PAGE_BYTES + huge * HUGE_PAGE_BYTES) * one_in,
            live_count: (small + huge) * one_in,
            ..Counters::default()
        }
    }

    /// How many of many programs with so many pages have an interval that holds the truth.
    fn covered(small: u64, huge: u64, one_in: u32) -> f64 {
        const PROGRAMS: u64 = 2000;
        let limit = pages::limit(one_in);
        let truth = small * PAGE_BYTES + huge * HUGE_PAGE_BYTES;
        let holds = |key: &u64| {
            let chosen = |range: std::ops::Range<u64>| {
                range.filter(|page| pages::is_chosen(*key, *page, limit)).count() as u64
            };
            let seen = counters(chosen(0..small), chosen(1 << 30..(1 << 30) + huge), one_in.into());
            let interval = Interval::of_pages(&seen, one_in);
            (interval.bytes.0..=interval.bytes.1).contains(&truth)
        };
        (0..PROGRAMS).filter(holds).count() as f64 / PROGRAMS as f64
    }

    #[test]
    fn an_interval_holds_the_truth_as_often_as_it_says() {
        for (small, huge, one_in) in [
            (40, 0, 16),
            (1000, 0, 16),
            (20_000, 0, 64),
            (3000, 0, 2),
            (0, 400, 16),
            (5000, 300, 16),
        ] {
            let share = covered(small, huge, one_in);
            let what = format!("{small} small, {huge} huge, 1 in {one_in}: {share}");
            assert!((0.93..=0.985).contains(&share), "{what}");
        }
    }

    #[test]
    fn what_is_certain_is_said_with_certainty() {
        let seen = counters(7, 1, 1);
        let interval = Interval::of_pages(&seen, 1);
        assert_eq!(interval.bytes, (seen.live_bytes, seen.live_bytes));
        assert_eq!(interval.count, (8, 8));
    }

    #[test]
    fn nothing_seen_may_be_a_few_pages() {
        let interval = Interval::of_pages(&Counters::default(), 16);
        assert_eq!((interval.bytes.0, interval.count.0), (0, 0));
        assert_eq!(interval.count.1, 58);
        assert_eq!(interval.bytes.1.div_ceil(PAGE_BYTES), 58);
    }

    #[test]
    fn impossible_counters_of_a_recording_do_no_harm() {
        for (live_bytes, live_count) in [(u64::MAX, 0), (0, u64::MAX), (u64::MAX, u64::MAX), (1, 1)]
        {
            let counters = Counters { live_bytes, live_count, ..Counters::default() };
            for one_in in [0, 1, 16, u32::MAX] {
                let interval = Interval::of_pages(&counters, one_in);
                assert!(interval.bytes.0 <= interval.bytes.1, "{counters:?} {one_in}");
            }
        }
    }
}
