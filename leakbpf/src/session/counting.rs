//! What the kernel side's numbers stand for: every block, or some of them; every page, or some.

use leakbpf_common::{
    abi::{Block, SiteCounters},
    sampling::{COUNT_SHIFT, Sampling},
};

use super::config::Method;
use crate::profile::{Counters, Mode, SiteKind, estimate::Estimate};

/// How a session counts at a moment. The method stays; whether blocks are sampled can change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Counting {
    method: Method,
    sampling: Sampling,
    /// Of the session (`CLOCK_MONOTONIC`).
    began_ns: u64,
}

impl Counting {
    /// As a session begins.
    pub const fn new(method: Method, began_ns: u64) -> Self {
        Self { method, sampling: method.sampling(), began_ns }
    }

    /// From now on blocks are recorded in this way.
    pub const fn with(self, sampling: Sampling) -> Self {
        Self { sampling, ..self }
    }

    /// As it looks at a moment: blocks that count as born later are there already (see
    /// [`Sampling::birth_ns`]).
    pub fn at(self, now_ns: u64) -> Self {
        let since_ns = match self.samples() {
            true => self.sampling.since_ns.min(now_ns),
            false => self.sampling.since_ns,
        };
        Self { sampling: Sampling { since_ns, ..self.sampling }, ..self }
    }

    pub const fn samples(self) -> bool {
        self.sampling.interval_bytes != 0
    }

    /// Whether a block stands for others.
    pub const fn is_sampled(self, block: &Block) -> bool {
        block.born_ns >= self.sampling.since_ns
    }

    /// How things of a kind are counted, wherever that kind is.
    pub const fn mode_of(self, kind: SiteKind) -> Mode {
        match (kind, self.method.page_interval()) {
            (SiteKind::Heap, _) if self.samples() => Mode::Sample {
                interval_bytes: self.sampling.interval_bytes as u32,
                since_ns: self.sampling.since_ns.saturating_sub(self.began_ns),
            },
            (SiteKind::Resident, Some(one_in)) => Mode::Pages { one_in },
            _ => Mode::Exact,
        }
    }

    /// What one thing of a kind stands for that is there since then (`CLOCK_MONOTONIC`).
    pub fn estimate(self, kind: SiteKind, size_bytes: u64, born_ns: u64) -> Estimate {
        self.mode_of(kind).estimate(kind, size_bytes, born_ns.saturating_sub(self.began_ns))
    }

    /// What went through a site of the kernel side, without what is live.
    pub fn heap_counters(self, value: &SiteCounters) -> Counters {
        let fraction = if self.method.may_sample() { COUNT_SHIFT } else { 0 };
        // Rounded so that the difference is what is live.
        let live_count = value.allocated_count.saturating_sub(value.freed_count) >> fraction;
        let freed_count = value.freed_count >> fraction;
        Counters {
            allocated_bytes: value.allocated_bytes,
            allocated_count: freed_count.saturating_add(live_count),
            freed_bytes: value.freed_bytes,
            freed_count,
            ..Counters::default()
        }
    }

    /// What the pages that were seen stand for, without what is live.
    pub fn page_counters(self, seen: Counters) -> Counters {
        let one_in = self.method.page_interval().unwrap_or(1);
        Counters { live_bytes: 0, live_count: 0, ..seen }.times(one_in)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::config::Limit;

    const AUTO: Method =
        Method::Auto { limit: Limit { ppm: 10_000 }, one_in: 16, interval_bytes: 4096 };
    const BEGAN_NS: u64 = 1_000_000;

    #[test]
    fn blocks_are_what_they_are_until_they_are_sampled() {
        let counting = Counting::new(AUTO, BEGAN_NS);
        assert_eq!(counting.mode_of(SiteKind::Heap), Mode::Exact);
        assert_eq!(counting.mode_of(SiteKind::Resident), Mode::Pages { one_in: 16 });
        let sampling = Sampling { interval_bytes: 4096, since_ns: BEGAN_NS + 700 };
        let sampled = counting.with(sampling);
        let mode = Mode::Sample { interval_bytes: 4096, since_ns: 700 };
        assert_eq!(sampled.mode_of(SiteKind::Heap), mode);
        assert_eq!(sampled.mode_of(SiteKind::Mapping), Mode::Exact);
        assert_eq!(sampled.estimate(SiteKind::Heap, 64, BEGAN_NS + 699), Estimate::times(64, 1));
        let estimate = sampled.estimate(SiteKind::Heap, 64, BEGAN_NS + 700);
        assert_eq!(estimate, Estimate::sampled(64, 4096));
        assert_eq!(estimate.bytes, sampling.weight(64, BEGAN_NS + 700).bytes);
        assert_eq!(sampled.with(Sampling::NONE), counting);
        // A second after the switch, all is as it will be; before, what is sampled is the youngest.
        assert_eq!(sampled.at(BEGAN_NS + 900), sampled);
        let early = sampled.at(BEGAN_NS + 500);
        let estimate = early.estimate(SiteKind::Heap, 64, BEGAN_NS + 500);
        assert_eq!(estimate, Estimate::sampled(64, 4096));
        assert_eq!(early.estimate(SiteKind::Heap, 64, BEGAN_NS + 499), Estimate::times(64, 1));
    }

    #[test]
    fn where_blocks_may_be_sampled_their_numbers_have_fractions() {
        let value = SiteCounters { allocated_count: 3 << COUNT_SHIFT, ..SiteCounters::default() };
        let counters = Counting::new(AUTO, BEGAN_NS).heap_counters(&value);
        assert_eq!(counters.allocated_count, 3);
        let value = SiteCounters { allocated_count: 3, ..value };
        let counters = Counting::new(Method::Exact, BEGAN_NS).heap_counters(&value);
        assert_eq!(counters.allocated_count, 3);
    }
}
