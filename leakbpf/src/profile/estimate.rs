//! How far an estimate can be off.

use leakbpf_common::{
    pages::{HUGE_PAGE_BYTES, PAGE_BYTES},
    sampling::{self, COUNT_SHIFT},
};

use super::Counters;

/// What one thing that was seen adds to what is live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    pub bytes: u64,
    pub count: u64,
    pub spread: Spread,
}

impl Estimate {
    /// It stands for so many of its size.
    pub fn times(size_bytes: u64, factor: u32) -> Self {
        let count = u64::from(factor);
        let bytes = size_bytes.saturating_mul(count);
        Self { bytes, count, spread: Spread::default() }
    }

    /// It stands for the blocks that were not chosen, too: see [`sampling`].
    pub fn sampled(size_bytes: u64, interval_bytes: u32) -> Self {
        let interval = u64::from(interval_bytes.max(1));
        if sampling::is_certain(size_bytes, interval) {
            return Self::times(size_bytes, 1);
        }
        let weight = sampling::weight(size_bytes, interval);
        let p =
            -(-(sampling::counted_bytes(size_bytes, interval) as f64) / interval as f64).exp_m1();
        // As estimated from itself.
        let variance = (1.0 - p) / (p * p);
        let size = size_bytes as f64;
        Self {
            bytes: weight.bytes,
            count: weight.count >> COUNT_SHIFT,
            spread: Spread {
                bytes: weight.bytes,
                count: weight.count,
                bytes_variance: variance * size * size,
                count_variance: variance,
            },
        }
    }
}

/// The part of what is live that sampled blocks stand for, and how far it can be off.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Spread {
    pub bytes: u64,
    /// In units of 2^-[`COUNT_SHIFT`].
    pub count: u64,
    /// Sums of the blocks' variances: of bytes, in their square.
    pub bytes_variance: f64,
    pub count_variance: f64,
}

/// The variances are sums of numbers.
impl Eq for Spread {}

impl Spread {
    /// Returns what the fractions of the counts have in common that is whole.
    pub fn add(&mut self, other: &Self) -> u64 {
        let before = (self.count >> COUNT_SHIFT) + (other.count >> COUNT_SHIFT);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.count = self.count.saturating_add(other.count);
        self.bytes_variance += other.bytes_variance;
        self.count_variance += other.count_variance;
        (self.count >> COUNT_SHIFT).saturating_sub(before)
    }
}

/// Where what is live really lies, in 95 of 100 cases: lowest and highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    pub bytes: (u64, u64),
    pub count: (u64, u64),
}

/// Of so many cases in a hundred an [`Interval`] speaks.
pub const CONFIDENCE_PERCENT: u32 = 95;

/// Standard deviations to either side that [`CONFIDENCE_PERCENT`] of a normal distribution lie within.
pub const DEVIATIONS: f64 = 1.959_964;

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

impl Interval {
    /// Of blocks of which one was chosen every `interval_bytes` on average.
    ///
    /// The estimate is a sum of independent ones whose variances are known; with as many blocks of one
    /// size as would give the same deviation, the ends are those of a Poisson distribution for which
    /// what was seen is just [`DEVIATIONS`] away from what is to be expected (the score interval).
    pub fn of_samples(counters: &Counters, interval_bytes: u32) -> Self {
        let spread = &counters.spread;
        // No block was chosen: of all blocks one in 512 is, and of their bytes one in an interval.
        let none = DEVIATIONS * DEVIATIONS;
        let rarest = sampling::weight(0, interval_bytes.into()).count >> COUNT_SHIFT;
        let bytes = score_ends(
            spread.bytes as f64,
            spread.bytes_variance,
            none * f64::from(interval_bytes),
        );
        let count_estimated = spread.count as f64 / f64::from(1 << COUNT_SHIFT);
        let count = score_ends(count_estimated, spread.count_variance, none * rarest as f64);
        // The rest is certain.
        let with = |(low, high): (f64, f64), certain: u64| {
            let low = certain.saturating_add(low.floor() as u64);
            (low, certain.saturating_add(high.ceil() as u64))
        };
        Self {
            bytes: with(bytes, counters.live_bytes.saturating_sub(spread.bytes)),
            count: with(count, counters.live_count.saturating_sub(spread.count >> COUNT_SHIFT)),
        }
    }
}

impl Interval {
    /// Of what survived so many windows: the mean of a few, whose variance is known from themselves
    /// alone (Student's t). One window says nothing of others.
    pub fn of_windows(counters: &Counters, windows: u32) -> Option<Self> {
        let deviations = student_deviations(windows.checked_sub(1)?)?;
        let ends = |estimate: u64, variance: f64| {
            let width = deviations * variance.max(0.0).sqrt();
            let estimate = estimate as f64;
            ((estimate - width).max(0.0).floor() as u64, (estimate + width).ceil() as u64)
        };
        Some(Self {
            bytes: ends(counters.live_bytes, counters.spread.bytes_variance),
            count: ends(counters.live_count, counters.spread.count_variance),
        })
    }
}

/// Standard deviations to either side that [`CONFIDENCE_PERCENT`] of Student's t distribution lie
/// within; `None` without a degree of freedom.
fn student_deviations(freedom: u32) -> Option<f64> {
    const FEW: [f64; 4] = [12.706_2, 4.302_65, 3.182_45, 2.776_45];
    let index = usize::try_from(freedom).ok()?.checked_sub(1)?;
    if let Some(known) = FEW.get(index) {
        return Some(*known);
    }
    // Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5).
    let (z, n) = (DEVIATIONS, f64::from(freedom));
    let first = (z.powi(3) + z) / 4.0;
    let second = (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0;
    let third = (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0;
    Some(z + first / n + second / (n * n) + third / n.powi(3))
}

fn score_ends(estimate: f64, variance: f64, none: f64) -> (f64, f64) {
    if estimate <= 0.0 {
        return (0.0, none);
    }
    // z²/n, where n equal things were seen.
    let share = DEVIATIONS * DEVIATIONS * variance / (estimate * estimate);
    let middle = 1.0 + share / 2.0;
    let width = (share + share * share / 4.0).sqrt();
    (estimate * (middle - width), estimate * (middle + width))
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
    use crate::profile::{Mode, SiteKind};
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
    fn few_windows_say_little() {
        for (freedom, expected) in
            [(1, 12.706), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)]
        {
            let found = student_deviations(freedom).expect("known");
            assert!((found - expected).abs() < 0.004, "{freedom}: {found}");
        }
        let mut counters = Counters { live_bytes: 1000, ..Counters::default() };
        counters.spread.bytes_variance = 100.0;
        assert_eq!(Interval::of_windows(&counters, 0), None);
        assert_eq!(Interval::of_windows(&counters, 1), None);
        let of = |windows| Interval::of_windows(&counters, windows).expect("some").bytes;
        assert_eq!(of(2), (872, 1128));
        assert_eq!(of(1001), (980, 1020));
    }

    /// SplitMix64 (Steele, Lea, Flood 2014): the same numbers everywhere.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u32 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.0;
            word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            (word ^ word >> 31) as u32
        }

        /// Of a server: most blocks are small, most bytes are not, and one in three stays.
        fn size_bytes(&mut self) -> u64 {
            match self.next() % 100 {
                0..50 => 16 + u64::from(self.next() % 112),
                50..80 => 128 + u64::from(self.next() % 896),
                80..97 => 1024 + u64::from(self.next() % 15_360),
                97..99 => 16_384 + u64::from(self.next() % 245_760),
                _ => 262_144 + u64::from(self.next() % 2_000_000),
            }
        }
    }

    /// Counts of 1,000 seeded runs in which the interval held the truth: bytes and count.
    fn covered_by_samples(interval_bytes: u32, blocks: u32, certain: u64) -> (u32, u32) {
        let mode = Mode::Sample { interval_bytes, since_ns: 0 };
        let mut held = (0, 0);
        for seed in 0..1000 {
            let mut random = Random(seed << 32);
            let (mut until, mut truth, mut seen) = (0, (0u64, 0u64), Counters::default());
            for _ in 0..certain {
                let size_bytes = u64::from(interval_bytes) * 16;
                truth = (truth.0 + size_bytes, truth.1 + 1);
                seen.hold(mode.estimate(SiteKind::Heap, size_bytes, 0));
            }
            for _ in 0..blocks {
                let size_bytes = random.size_bytes();
                let chosen =
                    sampling::choose(&mut until, size_bytes, interval_bytes.into(), || {
                        random.next()
                    });
                if random.next().is_multiple_of(3) {
                    truth = (truth.0 + size_bytes, truth.1 + 1);
                    if chosen {
                        seen.hold(mode.estimate(SiteKind::Heap, size_bytes, 0));
                    }
                }
            }
            let interval = Interval::of_samples(&seen, interval_bytes);
            let holds = |(low, high), truth| u32::from((low..=high).contains(&truth));
            held.0 += holds(interval.bytes, truth.0);
            held.1 += holds(interval.count, truth.1);
        }
        held
    }

    #[test]
    fn an_interval_of_samples_holds_the_truth_as_often_as_it_says() {
        // 512 KiB is the default; with the shorter ones, small blocks are seen, too.
        for (interval_bytes, blocks, certain) in [
            (512 << 10, 60_000, 0),
            (64 << 10, 60_000, 0),
            (4096, 30_000, 0),
            // Blocks that are always chosen must not hide what is not known of the others.
            (64 << 10, 60_000, 10_000),
        ] {
            let (bytes, count) = covered_by_samples(interval_bytes, blocks, certain);
            let what = format!("every {interval_bytes}, {blocks} blocks: {bytes} and {count}");
            assert!((930..=970).contains(&bytes) && (930..=970).contains(&count), "{what}");
        }
    }

    #[test]
    fn a_rough_estimate_is_never_said_to_be_certain() {
        // Small blocks at the longest interval.
        let counters = |size_bytes| {
            let mut counters = Counters::default();
            (0..40).for_each(|_| counters.hold(Estimate::sampled(size_bytes, 64 << 20)));
            counters
        };
        for size_bytes in [1, 16, 100, 5000] {
            let seen = counters(size_bytes);
            let interval = Interval::of_samples(&seen, 64 << 20);
            let width = (interval.bytes.1 - interval.bytes.0) as f64 / seen.live_bytes as f64;
            // Of 40 chosen blocks.
            assert!((0.5..0.8).contains(&width), "{size_bytes}: {interval:?}");
        }
    }

    #[test]
    fn what_is_certain_stays_certain_beside_what_is_not() {
        let mut counters = Counters::default();
        counters.hold(Estimate::times(1 << 30, 1));
        let interval = Interval::of_samples(&counters, 1000);
        assert_eq!(interval.bytes, (1 << 30, (1 << 30) + 3842));
        assert_eq!(interval.count, (1, 1 + 1921));
    }

    #[test]
    fn nothing_chosen_may_be_a_few_intervals() {
        let interval = Interval::of_samples(&Counters::default(), 1000);
        assert_eq!((interval.bytes, interval.count), ((0, 3842), (0, 1921)));
    }

    #[test]
    fn fractions_of_the_count_add_up() {
        let mut counters = Counters::default();
        // Blocks of one interval stand for 1.579 each.
        for _ in 0..1000 {
            counters.hold(Estimate::sampled(4096, 4096));
        }
        assert_eq!((counters.live_count, counters.live_bytes), (1579, 6_472_000));
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
