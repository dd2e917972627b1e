//! The books of one address space's anonymous mappings.
//!
//! Every page belongs to the call that brought it into being, wherever `mremap` moves it and
//! whatever `munmap` cuts off around it; a mapping counts as long as one of its bytes is left.
//! docs/accounting.md explains the decisions.
//!
//! Nothing here trusts a record: what the kernel cannot have done is refused, and memory is bounded
//! by [`MAX_RANGES`].

mod asides;
mod pieces;
mod totals;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod rule_tests;

use std::collections::BTreeMap;

use leakbpf_common::abi::{MappingChange, MappingRecord, StackId};
use thiserror::Error;

use self::asides::{Aside, Asides, Remap};
use self::pieces::{Origin, PAGE_BYTES, Piece, Pieces, Span, round_up};
use self::totals::Totals;
use crate::profile::{Counters, SiteKind};

/// Most pieces of one address space. The kernel's own limit (`vm.max_map_count`, 65,530 unless
/// raised) is lower, but it merges neighbours that different calls made.
pub const MAX_RANGES: usize = 1 << 20;

/// `MAP_HUGETLB` without a size; other values of `default_hugepagesz=` cannot be seen in a record.
const DEFAULT_HUGE_PAGE_BYTES: u64 = 2 << 20;

const MAP_FIXED: u64 = libc::MAP_FIXED as u64;
const MAP_FIXED_NOREPLACE: u64 = libc::MAP_FIXED_NOREPLACE as u64;
const MAP_ANONYMOUS: u64 = libc::MAP_ANONYMOUS as u64;
const MAP_STACK: u64 = libc::MAP_STACK as u64;
const MAP_HUGETLB: u64 = libc::MAP_HUGETLB as u64;
const MREMAP_FIXED: u64 = libc::MREMAP_FIXED as u64;
const MREMAP_DONTUNMAP: u64 = libc::MREMAP_DONTUNMAP as u64;

/// `IS_ERR_VALUE` of the kernel's `include/linux/err.h`.
const MAX_ERRNO: i64 = 4095;

/// A record that says what the kernel cannot have done, or whose beginning is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RecordError {
    #[error("unknown mapping change {0}: the kernel side and the agent are of different versions")]
    UnknownChange(u32),
    #[error("mapping at {address:#x} of {length_bytes} bytes is impossible; record ignored")]
    Impossible { address: u64, length_bytes: u64 },
    #[error(
        "mremap of thread {tid} returned without having begun (attached in between, or records \
         were dropped); its memory stays uncounted"
    )]
    RemapWithoutBegin { tid: u32 },
}

/// What the books could not hold or had missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MappingLosses {
    /// Pieces that were still recorded where the kernel placed a new mapping: their release had
    /// not been seen.
    pub frees_missed: u64,
    /// Pieces that are not in the books (they count as freed): more than [`MAX_RANGES`].
    pub ranges_full: u64,
}

/// Live anonymous memory that one call made, or the part of it that is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    /// A multiple of the page size.
    pub length_bytes: u64,
    pub stack: StackId,
    pub kind: SiteKind,
    /// `CLOCK_MONOTONIC` when the call that made it returned.
    pub born_ns: u64,
}

/// The anonymous mappings of one [`Owner`](leakbpf_common::abi::Owner) that were made while it was
/// watched. A forked child starts with an empty one and its parent's [`Mappings::program_break`].
#[derive(Debug)]
pub struct Mappings {
    pieces: Pieces,
    asides: Asides,
    totals: Totals,
    losses: MappingLosses,
    program_break: Option<u64>,
    next_mapping: u64,
    range_limit: usize,
}

impl Mappings {
    /// `initial_break` is the program break now; unknown, the first `brk` tells it and is not
    /// counted itself.
    pub fn new(initial_break: Option<u64>) -> Self {
        Self::with_range_limit(initial_break, MAX_RANGES)
    }

    fn with_range_limit(initial_break: Option<u64>, range_limit: usize) -> Self {
        Self {
            pieces: Pieces::default(),
            asides: Asides::default(),
            totals: Totals::default(),
            losses: MappingLosses::default(),
            program_break: initial_break,
            next_mapping: 0,
            range_limit,
        }
    }

    /// Books one record; records must come in causal order. O(log n) for each piece touched.
    ///
    /// # Errors
    /// When the record is impossible or its beginning is missing. The books stay consistent and
    /// the next record can be applied.
    pub fn apply(&mut self, record: &MappingRecord) -> Result<(), RecordError> {
        let change = change_of(record.change)?;
        let aside = self.asides.remove(record.head.tid);
        match (change, aside) {
            (MappingChange::UnmapFailed, Some(Aside::Unmap(pieces))) => {
                self.restore(pieces);
                return Ok(());
            }
            (MappingChange::RemapEnd, Some(Aside::Remap(remap))) => {
                return self.finish_remap(remap, record);
            }
            (_, Some(aside)) => self.settle(aside),
            (_, None) => {}
        }
        match change {
            MappingChange::Map => self.map(record),
            MappingChange::Unmap => {
                self.begin_unmap(record);
                Ok(())
            }
            // What it had taken was nothing, or was not seen.
            MappingChange::UnmapFailed => Ok(()),
            MappingChange::RemapBegin => {
                self.begin_remap(record);
                Ok(())
            }
            MappingChange::RemapEnd => self.finish_unknown_remap(record),
            MappingChange::Break => self.set_break(record),
        }
    }

    /// Everything that is live. A piece in the middle of `mremap` is at its old address, which the
    /// kernel may already have given to another one.
    pub fn live(&self) -> impl Iterator<Item = Range> {
        self.pieces.iter().chain(self.asides.remapping()).map(|piece| Range {
            start: piece.span.start,
            length_bytes: piece.span.length_bytes(),
            stack: piece.origin.stack,
            kind: piece.origin.kind,
            born_ns: piece.origin.born_ns,
        })
    }

    /// Of every site that ever made a mapping; `live = allocated - freed` always holds, and
    /// `live_bytes` is the sum of [`Mappings::live`].
    pub fn counters(&self) -> BTreeMap<(StackId, SiteKind), Counters> {
        self.totals.counters()
    }

    pub fn losses(&self) -> MappingLosses {
        self.losses
    }

    /// The program break, as far as it is known.
    pub fn program_break(&self) -> Option<u64> {
        self.program_break
    }

    fn map(&mut self, record: &MappingRecord) -> Result<(), RecordError> {
        let Some(start) = returned_address(record)? else {
            return Ok(());
        };
        let impossible = impossible(start, record.length_bytes);
        let page_bytes = page_bytes_of(record.flags).ok_or(impossible)?;
        let span = Span::of_length(start, record.length_bytes, page_bytes).ok_or(impossible)?;
        // The kernel sets MAP_FIXED itself when MAP_FIXED_NOREPLACE is given, and refuses an
        // overlap all the same: mm/mmap.c, do_mmap.
        let replaces = record.flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) == MAP_FIXED;
        self.vacate(span, replaces);
        if record.flags & MAP_ANONYMOUS != 0 {
            let kind = if record.flags & MAP_STACK != 0 {
                SiteKind::ThreadStack
            } else {
                SiteKind::Mapping
            };
            self.allocate(&[span], record, kind, page_bytes);
        }
        Ok(())
    }

    fn begin_unmap(&mut self, record: &MappingRecord) {
        // The kernel refuses what is no span (mm/vma.c, do_vmi_munmap), huge pages included: there
        // a length that is no multiple fails rather than being rounded.
        let Some(span) = Span::of_length(record.address, record.length_bytes, PAGE_BYTES) else {
            return;
        };
        let pieces = self.carve(span);
        if pieces.is_empty() {
            return;
        }
        for &piece in &pieces {
            self.totals.free(piece);
        }
        self.set_aside(record.head.tid, Aside::Unmap(pieces));
    }

    fn begin_remap(&mut self, record: &MappingRecord) {
        let origin = self.pieces.origin_at(record.address);
        let page_bytes = origin.map_or(PAGE_BYTES, |origin| origin.page_bytes);
        let source = Span::of_length(record.address, record.length_bytes, page_bytes);
        let remap = Remap {
            source,
            duplicates: record.length_bytes == 0 && origin.is_some(),
            flags: record.flags,
            page_bytes,
            pieces: source.map(|span| self.carve(span)).unwrap_or_default(),
        };
        self.set_aside(record.head.tid, Aside::Remap(remap));
    }

    fn finish_remap(&mut self, remap: Remap, record: &MappingRecord) -> Result<(), RecordError> {
        let target = match returned_address(record) {
            Ok(Some(start)) => Span::of_length(start, record.length_bytes, remap.page_bytes)
                .ok_or(impossible(start, record.length_bytes)),
            Ok(None) => {
                self.put_back(remap.pieces);
                return Ok(());
            }
            Err(error) => Err(error),
        };
        let target = match target {
            Ok(target) => target,
            Err(error) => {
                self.put_back(remap.pieces);
                return Err(error);
            }
        };
        let flags = remap.flags | record.flags;
        let replaces = flags & MREMAP_FIXED != 0;
        match remap.source {
            None => {
                self.vacate(target, replaces);
                if remap.duplicates {
                    self.allocate(&[target], record, SiteKind::Mapping, remap.page_bytes);
                }
            }
            Some(source) if flags & MREMAP_DONTUNMAP != 0 => {
                let copies: Vec<Span> = remap
                    .pieces
                    .iter()
                    .filter_map(|piece| moved(piece.span, source, target))
                    .collect();
                self.put_back(remap.pieces);
                self.vacate(target, replaces);
                self.allocate(&copies, record, SiteKind::Mapping, remap.page_bytes);
            }
            Some(source) => self.resize(source, target, replaces, remap, record),
        }
        Ok(())
    }

    /// `source` is now `target`: the pages that are in both are the same pages.
    fn resize(
        &mut self,
        source: Span,
        target: Span,
        replaces: bool,
        remap: Remap,
        record: &MappingRecord,
    ) {
        // One kernel mapping is anonymous as a whole or not at all, so a single known page is
        // enough to know what the added ones are.
        let anonymous = !remap.pieces.is_empty();
        let added = target
            .start
            .checked_add(source.length_bytes())
            .and_then(|start| Span::new(start, target.end));
        if source.start == target.start {
            let kept = remap.pieces.iter().filter_map(|piece| {
                piece.span.intersection(target).map(|span| piece.with_span(span))
            });
            let kept: Vec<Piece> = kept.collect();
            for &piece in &remap.pieces {
                self.totals.free(piece);
            }
            // Whatever another thread placed here meanwhile came after.
            self.restore(kept);
            if let Some(added) = added {
                self.vacate(added, false);
            }
        } else {
            self.vacate(target, replaces);
            for piece in remap.pieces {
                self.totals.free(piece);
                if let Some(span) = moved(piece.span, source, target) {
                    self.revive(piece.with_span(span));
                }
            }
        }
        if let (Some(added), true) = (added, anonymous) {
            self.allocate(&[added], record, SiteKind::Mapping, remap.page_bytes);
        }
    }

    fn finish_unknown_remap(&mut self, record: &MappingRecord) -> Result<(), RecordError> {
        let Some(start) = returned_address(record)? else {
            return Ok(());
        };
        let target = Span::of_length(start, record.length_bytes, PAGE_BYTES)
            .ok_or(impossible(start, record.length_bytes))?;
        // Resized where it is: what is known of it is still right.
        if start != record.address {
            self.vacate(target, record.flags & MREMAP_FIXED != 0);
        }
        Err(RecordError::RemapWithoutBegin { tid: record.head.tid })
    }

    fn set_break(&mut self, record: &MappingRecord) -> Result<(), RecordError> {
        let impossible = impossible(record.address, 0);
        let now = u64::try_from(record.result).map_err(|_| impossible)?;
        let now_end = round_up(now, PAGE_BYTES).ok_or(impossible)?;
        let Some(before) = self.program_break else {
            self.program_break = Some(now);
            return Ok(());
        };
        // A question or a refusal. The answer may be older than what is known: another thread can
        // have moved the break before this call's record was written.
        if record.address != now || now == 0 {
            return Ok(());
        }
        let before_end = round_up(before, PAGE_BYTES).ok_or(impossible)?;
        if let Some(added) = Span::new(before_end, now_end) {
            self.vacate(added, false);
            self.allocate(&[added], record, SiteKind::Mapping, PAGE_BYTES);
        } else if let Some(removed) = Span::new(now_end, before_end) {
            self.vacate(removed, true);
        }
        self.program_break = Some(now);
        Ok(())
    }

    /// Books `spans`, which must be vacant, as one new mapping made by the call of `record`.
    fn allocate(
        &mut self,
        spans: &[Span],
        record: &MappingRecord,
        kind_outside_allocator: SiteKind,
        page_bytes: u64,
    ) {
        if spans.is_empty() {
            return;
        }
        let kind = match record.inside_allocator {
            0 => kind_outside_allocator,
            _ => SiteKind::AllocatorMapping,
        };
        let origin = Origin {
            mapping: self.next_mapping,
            stack: record.stack,
            kind,
            born_ns: record.head.time_ns,
            page_bytes,
        };
        self.next_mapping += 1;
        self.totals.allocate(origin, spans.iter().map(|span| span.length_bytes()).sum());
        for &span in spans {
            let piece = Piece { span, origin };
            if !self.try_insert(piece) {
                self.totals.free(piece);
            }
        }
    }

    /// Nothing recorded is in `span` any more. Unless the call replaces what it finds, there
    /// should have been nothing.
    fn vacate(&mut self, span: Span, replaces: bool) {
        for piece in self.carve(span) {
            self.totals.free(piece);
            if !replaces {
                self.losses.frees_missed += 1;
            }
        }
    }

    /// Cuts `span` out of the pieces, still counted as live.
    fn carve(&mut self, span: Span) -> Vec<Piece> {
        let taken = self.pieces.take(span);
        // A hole makes two pieces of one.
        if self.pieces.len() > self.range_limit
            && let Some(rest) = self.pieces.remove_at(span.end)
        {
            self.totals.free(rest);
            self.losses.ranges_full += 1;
        }
        taken
    }

    fn set_aside(&mut self, tid: u32, aside: Aside) {
        for pushed_out in self.asides.insert(tid, aside, self.range_limit) {
            self.settle(pushed_out);
        }
    }

    /// A call whose end will not be told (any more): `munmap` only tells when it fails; memory
    /// whose `mremap` ended unseen exists at an unknown address, so its old one has to do.
    fn settle(&mut self, aside: Aside) {
        match aside {
            Aside::Unmap(_) => {}
            Aside::Remap(remap) => self.put_back(remap.pieces),
        }
    }

    /// Live pieces that were taken aside return to where they were.
    fn put_back(&mut self, pieces: Vec<Piece>) {
        for &piece in &pieces {
            self.totals.free(piece);
        }
        self.restore(pieces);
    }

    /// Freed pieces are live again, except where something newer is.
    fn restore(&mut self, pieces: Vec<Piece>) {
        for piece in pieces {
            for gap in self.pieces.gaps(piece.span) {
                self.revive(piece.with_span(gap));
            }
        }
    }

    fn revive(&mut self, piece: Piece) {
        if self.try_insert(piece) {
            self.totals.unfree(piece);
        }
    }

    fn try_insert(&mut self, piece: Piece) -> bool {
        let fits = self.pieces.len() < self.range_limit;
        if fits {
            self.pieces.insert(piece);
        } else {
            self.losses.ranges_full += 1;
        }
        fits
    }
}

/// Where `part` of `source` is in `target`; what `target` is too short for is `None`.
fn moved(part: Span, source: Span, target: Span) -> Option<Span> {
    let start = target.start.checked_add(part.start.checked_sub(source.start)?)?;
    let end = start.checked_add(part.length_bytes())?.min(target.end);
    Span::new(start, end)
}

/// `None` when the call failed.
fn returned_address(record: &MappingRecord) -> Result<Option<u64>, RecordError> {
    match u64::try_from(record.result) {
        Ok(address) => Ok(Some(address)),
        Err(_) if record.result >= -MAX_ERRNO => Ok(None),
        Err(_) => Err(impossible(record.result as u64, record.length_bytes)),
    }
}

/// What the kernel rounds a new mapping's length to: mm/mmap.c, ksys_mmap_pgoff.
fn page_bytes_of(flags: u64) -> Option<u64> {
    if flags & MAP_HUGETLB == 0 {
        return Some(PAGE_BYTES);
    }
    match flags >> libc::MAP_HUGE_SHIFT & libc::MAP_HUGE_MASK as u64 {
        0 => Some(DEFAULT_HUGE_PAGE_BYTES),
        shift @ 12..48 => Some(1 << shift),
        _ => None,
    }
}

fn change_of(change: u32) -> Result<MappingChange, RecordError> {
    use MappingChange::{Break, Map, RemapBegin, RemapEnd, Unmap, UnmapFailed};
    [Map, Unmap, UnmapFailed, RemapBegin, RemapEnd, Break]
        .into_iter()
        .find(|&known| known as u32 == change)
        .ok_or(RecordError::UnknownChange(change))
}

fn impossible(address: u64, length_bytes: u64) -> RecordError {
    RecordError::Impossible { address, length_bytes }
}
