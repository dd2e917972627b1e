//! Which blocks are recorded when not every one is, and what one that is recorded stands for.
//!
//! Bytes are chosen as by a Poisson process: one every `interval` bytes on average, at distances with
//! an exponential distribution, and with a byte its block. So a block of `size` bytes is chosen with
//! the probability `p = 1 - exp(-size / interval)`, whatever was allocated before it, and stands for
//! `1 / p` blocks of its size (the estimator of Horvitz and Thompson): every sum is without bias.
//!
//! Every block counts as `interval / 512` bytes more than it has: of small blocks, too, one in 512 is
//! seen at least, without which their number would be known badly, and with what they cost anyhow
//! that costs next to nothing.
//!
//! Everything is in whole numbers, since BPF has no others.

/// Blocks of so many intervals are always chosen; the probability that they were not is `exp(-16)`,
/// one in nine million.
const CERTAIN_INTERVALS: u64 = 16;

/// Largest interval, in bytes: distances are exact to a quarter of a byte.
pub const MAX_INTERVAL_BYTES: u64 = 64 << 20;

/// Fractional bits of [`Weight::count`].
pub const COUNT_SHIFT: u32 = 16;

/// What a block stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weight {
    pub bytes: u64,
    /// Blocks, in units of 2^-[`COUNT_SHIFT`].
    pub count: u64,
}

impl Weight {
    /// Itself alone.
    pub const fn one(size_bytes: u64) -> Self {
        Self { bytes: size_bytes, count: 1 << COUNT_SHIFT }
    }
}

/// Which blocks are recorded at a moment, and which of those that were stand for others.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling {
    /// Bytes from one recorded block to the next, on average; 0: every block is recorded.
    pub interval_bytes: u64,
    /// Blocks that were born before stand for themselves alone: all were recorded then
    /// (`CLOCK_MONOTONIC`).
    pub since_ns: u64,
}

impl Sampling {
    /// Every block is recorded.
    pub const NONE: Self = Self { interval_bytes: 0, since_ns: u64::MAX };

    /// What a recorded block stands for.
    #[inline(always)]
    pub fn weight(&self, size_bytes: u64, born_ns: u64) -> Weight {
        if born_ns < self.since_ns || self.interval_bytes == 0 {
            Weight::one(size_bytes)
        } else {
            weight(size_bytes, self.interval_bytes)
        }
    }

    /// When a block counts as born that is there since `now_ns`, so that this tells how it was chosen:
    /// its call may have begun before the switch.
    #[inline(always)]
    pub fn birth_ns(&self, sampled: bool, now_ns: u64) -> u64 {
        if sampled {
            now_ns.max(self.since_ns)
        } else {
            now_ns.min(self.since_ns.saturating_sub(1))
        }
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self::NONE
    }
}

/// Whether a block of `size_bytes` is chosen. `until` is how many bytes are still to be allocated until
/// the next chosen one, by whoever shares it; 0 when that is not drawn yet. `random` gives 32 random bits.
#[inline(always)]
pub fn choose(
    until: &mut u64,
    size_bytes: u64,
    interval_bytes: u64,
    mut random: impl FnMut() -> u32,
) -> bool {
    if is_certain(size_bytes, interval_bytes) {
        return true;
    }
    let size = counted_bytes(size_bytes, interval_bytes);
    if *until == 0 {
        *until = distance(random(), interval_bytes);
    }
    if size < *until {
        *until -= size;
        return false;
    }
    *until = distance(random(), interval_bytes);
    true
}

/// From random bits to a distance in bytes with an exponential distribution: `-ln(u) * interval`,
/// rounded up.
#[inline(always)]
fn distance(random: u32, interval_bytes: u64) -> u64 {
    /// ln 2 in units of 2^-32.
    const LN_2: u64 = 2_977_044_472;
    // u = (random + 1) / 2^32; -log2(u) in units of 2^-27, at most 32 of them.
    let doublings = (32 << 27) - log2(u64::from(random) + 1);
    let natural = (doublings * (LN_2 >> 8)) >> 23;
    ((natural * interval_bytes) >> 28) + 1
}

/// The binary logarithm of `value`, at least 1 and at most 2^32, in units of 2^-27. Bit by bit: the
/// logarithm of the square is twice as large.
#[inline(always)]
fn log2(value: u64) -> u64 {
    // Without the instruction that counts zeros, which BPF lacks; and without branches, of which the
    // kernel's verifier would follow every combination.
    let mut whole = 0;
    let mut rest = value;
    let mut step = 32;
    while step > 0 {
        let above = ((1u64 << step) - 1).wrapping_sub(rest) >> 63;
        whole += above * step;
        rest >>= above * step;
        step >>= 1;
    }
    // From 2^31 up to, but not including, 2^32.
    let mut mantissa = value << 31 >> whole;
    let mut logarithm = whole;
    let mut bit = 0;
    while bit < 27 {
        let square = (mantissa * mantissa) >> 31;
        let carry = square >> 32;
        mantissa = square >> carry;
        logarithm = logarithm << 1 | carry;
        bit += 1;
    }
    logarithm
}

/// What a chosen block stands for.
#[inline(always)]
pub fn weight(size_bytes: u64, interval_bytes: u64) -> Weight {
    if is_certain(size_bytes, interval_bytes) {
        return Weight::one(size_bytes);
    }
    let size = counted_bytes(size_bytes, interval_bytes);
    // In intervals, in units of 2^-28.
    let x = divide(size << 28, interval_bytes);
    // In units of 2^-24.
    let blocks = divide(interval_bytes * expected_intervals(x), size);
    Weight { bytes: (size_bytes * blocks + (1 << 23)) >> 24, count: (blocks + (1 << 7)) >> 8 }
}

/// Whether a block is always chosen, and so stands for itself alone.
#[inline(always)]
pub fn is_certain(size_bytes: u64, interval_bytes: u64) -> bool {
    size_bytes >= interval_bytes * CERTAIN_INTERVALS
}

/// As how many bytes a block counts when one is chosen.
#[inline(always)]
pub fn counted_bytes(size_bytes: u64, interval_bytes: u64) -> u64 {
    size_bytes + (interval_bytes >> 9) + 1
}

/// `x / (1 - exp(-x))` in units of 2^-24, for `x` below 17 in units of 2^-28.
#[inline(always)]
fn expected_intervals(x: u64) -> u64 {
    const ONE: u64 = 1 << 28;
    if x < ONE >> 6 {
        // 1 + x/2 + x²/12 - …: the next term is below 2^-33.
        return (ONE + x / 2 + ((x * x) >> 28) / 12) >> 4;
    }
    let y = ONE - exp_minus(x);
    divide(x << 24, y)
}

/// No divisor here is 0; but a program that could panic is not taken by the kernel.
#[inline(always)]
fn divide(dividend: u64, divisor: u64) -> u64 {
    dividend.checked_div(divisor).unwrap_or(0)
}

/// `exp(-x)` in units of 2^-28, for `x` below 17 in the same units.
#[inline(always)]
fn exp_minus(x: u64) -> u64 {
    /// 1 / ln 2 in units of 2^-28.
    const LOG2_E: u64 = 387_270_501;
    // exp(-x) = 2^-y; its whole part is a shift.
    let y = (x * (LOG2_E >> 4)) >> 24;
    let mut result: u64 = 1 << 28;
    let mut bit = 0;
    while bit < FACTORS.len() {
        // Bit 27 of y is one half.
        let wanted = y >> (27 - bit as u64) & 1;
        let factor = FACTORS[bit] * wanted + (1 << 28) * (1 - wanted);
        result = (result * factor + (1 << 27)) >> 28;
        bit += 1;
    }
    result >> (y >> 28)
}

/// 2^-(2^-n) for n from 1, in units of 2^-28.
const FACTORS: [u64; 24] = [
    189_812_531,
    225_726_413,
    246_156_398,
    257_054_673,
    262_683_438,
    265_543_873,
    266_985_750,
    267_709_622,
    268_072_293,
    268_253_813,
    268_344_619,
    268_390_034,
    268_412_744,
    268_424_100,
    268_429_778,
    268_432_617,
    268_434_036,
    268_434_746,
    268_435_101,
    268_435_279,
    268_435_367,
    268_435_412,
    268_435_434,
    268_435_445,
];

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [u64; 14] = [
        1,
        8,
        24,
        100,
        1000,
        4096,
        33_333,
        262_144,
        524_288,
        600_000,
        1 << 20,
        3 << 20,
        8 << 20,
        1 << 30,
    ];
    const INTERVALS: [u64; 5] = [64, 4096, 512 << 10, 3_000_000, MAX_INTERVAL_BYTES];

    /// SplitMix64 (Steele, Lea, Flood 2014): the same numbers everywhere.
    pub struct Random(pub u64);

    impl Random {
        pub fn next(&mut self) -> u32 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.0;
            word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            (word ^ word >> 31) as u32
        }
    }

    fn probability(size: u64, interval: u64) -> f64 {
        -(-(counted_bytes(size, interval) as f64) / interval as f64).exp_m1()
    }

    #[test]
    fn a_distance_is_the_logarithm_of_its_random_bits() {
        for interval in INTERVALS {
            for random in [0, 1, 2, 3, 1000, 65_535, 1 << 20, 1 << 31, u32::MAX - 1, u32::MAX] {
                let u = (f64::from(random) + 1.0) / 2f64.powi(32);
                let expected = -u.ln() * interval as f64;
                let found = distance(random, interval) as f64;
                let apart = (found - expected).abs();
                let resolution = interval as f64 / f64::from(1 << 27);
                assert!(
                    apart <= 1.0 + resolution + 1e-6 * expected,
                    "{random} {interval}: {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn a_weight_is_one_by_the_probability() {
        for interval in INTERVALS {
            for size in SIZES {
                let found = weight(size, interval);
                let count = 1.0 / probability(size, interval);
                let count_found = found.count as f64 / f64::from(1 << COUNT_SHIFT);
                let bytes = count * size as f64;
                assert!((count_found / count - 1.0).abs() < 2e-5, "{size} {interval}: {found:?}");
                let apart = (found.bytes as f64 - bytes).abs();
                assert!(apart <= 0.6 + 5e-6 * bytes, "{size} {interval}: {found:?} {bytes}");
            }
        }
    }

    #[test]
    fn an_empty_block_has_no_bytes_and_counts() {
        let found = weight(0, 4096);
        assert_eq!(found.bytes, 0);
        assert!((1 << COUNT_SHIFT..512 << COUNT_SHIFT).contains(&found.count), "{found:?}");
    }

    #[test]
    fn large_blocks_are_always_chosen_and_stand_for_themselves() {
        for interval in INTERVALS {
            let size = interval * CERTAIN_INTERVALS;
            let mut until = 0;
            assert!((0..100).all(|_| choose(&mut until, size, interval, || unreachable!())));
            assert_eq!(weight(size, interval), Weight::one(size));
        }
    }

    #[test]
    fn a_block_is_chosen_with_its_probability_whatever_came_before() {
        const INTERVAL: u64 = 4096;
        const TURNS: u32 = 400_000;
        let mut random = Random(1);
        let mut until = 0;
        let mut chosen = [0u32; 5];
        let sizes = [16, 100, 2000, 5000, 20_000];
        for turn in 0..TURNS {
            // A pattern with a period, as programs have them.
            let which = (turn % 5) as usize;
            chosen[which] +=
                u32::from(choose(&mut until, sizes[which], INTERVAL, || random.next()));
        }
        for (size, chosen) in sizes.into_iter().zip(chosen) {
            let p = probability(size, INTERVAL);
            let expected = f64::from(TURNS / 5) * p;
            let deviation = (expected * (1.0 - p)).sqrt();
            let off = (f64::from(chosen) - expected).abs() / deviation;
            assert!(off < 4.0, "size {size}: {chosen} of {}, expected {expected}", TURNS / 5);
        }
    }

    #[test]
    fn sums_are_without_bias() {
        const INTERVAL: u64 = 1000;
        let mut random = Random(7);
        let (mut bytes, mut count, mut true_bytes, mut true_count) = (0, 0, 0, 0);
        let mut until = 0;
        for _ in 0..2_000_000 {
            let size = u64::from(random.next() % 3000);
            true_bytes += size;
            true_count += 1;
            if choose(&mut until, size, INTERVAL, || random.next()) {
                let weight = weight(size, INTERVAL);
                bytes += weight.bytes;
                count += weight.count;
            }
        }
        let ratio = bytes as f64 / true_bytes as f64;
        assert!((ratio - 1.0).abs() < 0.003, "{ratio}");
        let ratio = (count >> COUNT_SHIFT) as f64 / f64::from(true_count);
        assert!((ratio - 1.0).abs() < 0.05, "{ratio}");
    }
}
