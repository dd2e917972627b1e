//! What the kernel side's numbers stand for: every block, or some of them; every page, or some.

use leakbpf_common::{abi::SiteCounters, sampling::COUNT_SHIFT};

use super::config::Method;
use crate::profile::{Counters, Mode, SiteKind};

/// How a session counts at a moment. The method stays; whether blocks are sampled can change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Counting {
    method: Method,
    /// Bytes from one recorded block to the next, on average; none while every block is recorded.
    sample_interval_bytes: Option<u32>,
}

impl Counting {
    /// As a session begins.
    pub const fn new(method: Method) -> Self {
        let sample_interval_bytes = match method {
            Method::Sample { interval_bytes } => Some(interval_bytes),
            _ => None,
        };
        Self { method, sample_interval_bytes }
    }

    pub const fn every_block(self) -> Self {
        Self { sample_interval_bytes: None, ..self }
    }

    pub const fn samples(self, interval_bytes: u32) -> Self {
        Self { sample_interval_bytes: Some(interval_bytes), ..self }
    }

    pub const fn sample_interval_bytes(self) -> Option<u32> {
        self.sample_interval_bytes
    }

    /// How things of a kind are counted, wherever that kind is.
    pub const fn mode_of(self, kind: SiteKind) -> Mode {
        match (kind, self.sample_interval_bytes, self.method.page_interval()) {
            (SiteKind::Heap, Some(interval_bytes), _) => Mode::Sample { interval_bytes },
            (SiteKind::Resident, _, Some(one_in)) => Mode::Pages { one_in },
            _ => Mode::Exact,
        }
    }

    /// What went through a site of the kernel side, without what is live.
    pub fn heap_counters(self, value: &SiteCounters) -> Counters {
        let fraction = if self.method.samples() { COUNT_SHIFT } else { 0 };
        let (allocated_bytes, allocated_count) =
            (value.allocated_bytes, value.allocated_count >> fraction);
        Counters {
            allocated_bytes,
            allocated_count,
            // Blocks that were recorded before sampling began stand for others from then on, and may
            // turn out to have been more.
            freed_bytes: value.freed_bytes.min(allocated_bytes),
            freed_count: (value.freed_count >> fraction).min(allocated_count),
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

    #[test]
    fn blocks_are_what_they_are_until_they_are_sampled() {
        let counting = Counting::new(AUTO);
        assert_eq!(counting.mode_of(SiteKind::Heap), Mode::Exact);
        assert_eq!(counting.mode_of(SiteKind::Resident), Mode::Pages { one_in: 16 });
        let sampled = counting.samples(4096);
        assert_eq!(sampled.mode_of(SiteKind::Heap), Mode::Sample { interval_bytes: 4096 });
        assert_eq!(sampled.mode_of(SiteKind::Mapping), Mode::Exact);
        assert_eq!(sampled.every_block(), counting);
    }

    #[test]
    fn where_blocks_may_be_sampled_their_numbers_have_fractions() {
        let value = SiteCounters {
            allocated_bytes: 100,
            allocated_count: 3 << COUNT_SHIFT,
            freed_bytes: 120,
            freed_count: 1 << COUNT_SHIFT,
            announced: 0,
        };
        let counters = Counting::new(AUTO).heap_counters(&value);
        assert_eq!((counters.allocated_count, counters.freed_count), (3, 1));
        assert_eq!(counters.freed_bytes, 100, "no more than was allocated");
        let value = SiteCounters { allocated_count: 3, ..value };
        assert_eq!(Counting::new(Method::Exact).heap_counters(&value).allocated_count, 3);
    }
}
