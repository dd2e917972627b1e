//! Which pages are looked at when only one in so many is.
//!
//! The choice falls on pages, not on faults: every fault of a chosen page is seen, so that what is
//! known of it is always its last touch, however often the page was given back in between.

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;

/// Bytes of a huge page that one entry of the middle page table maps.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// For [`is_chosen`]: one page in `interval`, as the largest hash that is chosen.
pub const fn limit(interval: u32) -> u32 {
    let interval = if interval == 0 { 1 } else { interval };
    ((1u64 << 32) / interval as u64 - 1) as u32
}

/// Whether a page is looked at. `key` holds what differs from session to session and from process
/// to process: processes with the same layout must not have the same pages chosen.
#[inline(always)]
pub const fn is_chosen(key: u64, page: u64, limit: u32) -> bool {
    // The finalizer of SplitMix64 (Steele, Lea, Flood 2014): programs touch pages in regular
    // strides, and anything weaker would favour some of them.
    let mut hash = page ^ key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (hash >> 32) as u32 <= limit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(key: u64, interval: u32, pages: impl Iterator<Item = u64>) -> u64 {
        let limit = limit(interval);
        pages.filter(|&page| is_chosen(key, page, limit)).count() as u64
    }

    #[test]
    fn one_page_in_so_many_is_chosen_whatever_the_stride() {
        for key in [0, 1, 0xdead_beef, u64::MAX] {
            for stride in [1, 2, 3, 8, 16, 21, 34, 512, 513, 4181] {
                for interval in [2, 16, 100] {
                    const PAGES: u64 = 1 << 17;
                    let count = chosen(key, interval, (0..PAGES).map(|i| 0x7f12_3456 + i * stride));
                    let expected = PAGES as f64 / f64::from(interval);
                    // Five standard deviations of a binomial distribution.
                    let most = 5.0 * (expected * (1.0 - 1.0 / f64::from(interval))).sqrt();
                    let off = (count as f64 - expected).abs();
                    assert!(off <= most, "key {key} stride {stride} 1 in {interval}: {count}");
                }
            }
        }
    }

    #[test]
    fn neighbouring_processes_have_different_pages_chosen() {
        let limit = limit(16);
        let both = (0..1u64 << 16)
            .filter(|&page| is_chosen(7 << 32 | 100, page, limit))
            .filter(|&page| is_chosen(7 << 32 | 101, page, limit))
            .count();
        // 1 in 256 of 65,536 are 256.
        assert!((150..400).contains(&both), "{both}");
    }

    #[test]
    fn an_interval_of_one_chooses_every_page() {
        assert_eq!(chosen(3, 1, 0..10_000), 10_000);
        assert_eq!(limit(0), limit(1));
    }
}
