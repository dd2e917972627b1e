//! Bytes and mappings of each site.

use std::collections::{BTreeMap, HashMap};

use leakbpf_common::abi::StackId;

use super::pieces::{Origin, Piece};
use crate::profile::{Counters, SiteKind};

/// What one site made and lost since the session began. Wider than a report's counters: a program
/// that reserves and returns 64 TiB in a loop passes 2^64 bytes within a second.
#[derive(Debug, Clone, Copy, Default)]
struct SiteTotals {
    live_bytes: u128,
    live_count: u128,
    freed_bytes: u128,
    freed_count: u128,
}

#[derive(Debug, Default)]
pub struct Totals {
    sites: BTreeMap<(StackId, SiteKind), SiteTotals>,
    /// Bytes left of each mapping that has any.
    live_bytes: HashMap<u64, u64>,
}

impl Totals {
    /// A call made a mapping of `bytes` bytes.
    pub fn allocate(&mut self, origin: Origin, bytes: u64) {
        let site = self.sites.entry((origin.stack, origin.kind)).or_default();
        site.live_bytes += u128::from(bytes);
        site.live_count += 1;
        self.live_bytes.insert(origin.mapping, bytes);
    }

    /// A piece is gone; with the last one, its mapping is.
    pub fn free(&mut self, piece: Piece) {
        let bytes = piece.span.length_bytes();
        let site = self.sites.entry((piece.origin.stack, piece.origin.kind)).or_default();
        site.live_bytes -= u128::from(bytes);
        site.freed_bytes += u128::from(bytes);
        let left = self.live_bytes.entry(piece.origin.mapping).or_default();
        *left -= bytes;
        if *left == 0 {
            self.live_bytes.remove(&piece.origin.mapping);
            site.live_count -= 1;
            site.freed_count += 1;
        }
    }

    /// A piece that was freed, or a part of it, was not gone after all.
    pub fn unfree(&mut self, piece: Piece) {
        let bytes = piece.span.length_bytes();
        let site = self.sites.entry((piece.origin.stack, piece.origin.kind)).or_default();
        site.live_bytes += u128::from(bytes);
        site.freed_bytes -= u128::from(bytes);
        let left = self.live_bytes.entry(piece.origin.mapping).or_insert_with(|| {
            site.live_count += 1;
            site.freed_count -= 1;
            0
        });
        *left += bytes;
    }

    pub fn counters(&self) -> BTreeMap<(StackId, SiteKind), Counters> {
        self.sites.iter().map(|(&site, totals)| (site, totals.counters())).collect()
    }
}

impl SiteTotals {
    /// Beyond 2^64 the history saturates; `live = allocated - freed` stays exact.
    fn counters(self) -> Counters {
        let (allocated_bytes, freed_bytes, live_bytes) =
            saturated(self.live_bytes, self.freed_bytes);
        let (allocated_count, freed_count, live_count) =
            saturated(self.live_count, self.freed_count);
        Counters {
            live_bytes,
            live_count,
            allocated_bytes,
            allocated_count,
            freed_bytes,
            freed_count,
            ..Counters::default()
        }
    }
}

/// Allocated, freed and live.
fn saturated(live: u128, freed: u128) -> (u64, u64, u64) {
    let live = u64::try_from(live).unwrap_or(u64::MAX);
    let freed = u64::try_from(freed).unwrap_or(u64::MAX).min(u64::MAX - live);
    (freed + live, freed, live)
}
