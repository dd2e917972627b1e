//! Pieces of address space, none overlapping another.

use std::collections::BTreeMap;

use leakbpf_common::abi::StackId;

use crate::profile::SiteKind;

/// The base page size of x86-64.
pub const PAGE_BYTES: u64 = 4096;

/// No user address reaches the upper half on any 64-bit architecture, and none is a negative
/// return value.
const ADDRESS_END: u64 = 1 << 63;

/// `bytes` rounded up to a multiple of `unit`, a power of two; `None` on overflow.
pub fn round_up(bytes: u64, unit: u64) -> Option<u64> {
    let mask = unit.checked_sub(1)?;
    Some(bytes.checked_add(mask)? & !mask)
}

/// A page-aligned, non-empty range of user addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start: u64,
    /// First address after it.
    pub end: u64,
}

impl Span {
    /// `None` when it is empty, unaligned or not in the user's half.
    pub fn new(start: u64, end: u64) -> Option<Self> {
        let aligned = start.is_multiple_of(PAGE_BYTES) && end.is_multiple_of(PAGE_BYTES);
        (aligned && start < end && end <= ADDRESS_END).then_some(Self { start, end })
    }

    /// The pages of `unit` bytes that `length_bytes` from `start` touch, as the kernel rounds them.
    pub fn of_length(start: u64, length_bytes: u64, unit: u64) -> Option<Self> {
        Self::new(start, start.checked_add(round_up(length_bytes, unit)?)?)
    }

    pub fn length_bytes(self) -> u64 {
        self.end - self.start
    }

    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }
}

/// Where the bytes of a piece come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Number of the call that made them, unique in its address space.
    pub mapping: u64,
    pub stack: StackId,
    pub kind: SiteKind,
    pub born_ns: u64,
    /// What the kernel rounds lengths to in this mapping.
    pub page_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub span: Span,
    pub origin: Origin,
}

impl Piece {
    pub fn with_span(self, span: Span) -> Self {
        Self { span, ..self }
    }
}

#[derive(Debug, Default)]
pub struct Pieces {
    by_start: BTreeMap<u64, (u64, Origin)>,
}

impl Pieces {
    pub fn len(&self) -> usize {
        self.by_start.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = Piece> {
        self.by_start
            .iter()
            .map(|(&start, &(end, origin))| Piece { span: Span { start, end }, origin })
    }

    pub fn origin_at(&self, address: u64) -> Option<Origin> {
        let (_, &(end, origin)) = self.by_start.range(..=address).next_back()?;
        (address < end).then_some(origin)
    }

    /// Adds a piece; nothing may overlap it.
    pub fn insert(&mut self, piece: Piece) {
        debug_assert!(self.overlapping(piece.span).is_empty());
        self.by_start.insert(piece.span.start, (piece.span.end, piece.origin));
    }

    pub fn remove_at(&mut self, start: u64) -> Option<Piece> {
        let (end, origin) = self.by_start.remove(&start)?;
        Some(Piece { span: Span { start, end }, origin })
    }

    /// Cuts everything inside `span` out, in order of address; what reaches beyond stays.
    pub fn take(&mut self, span: Span) -> Vec<Piece> {
        let touched = self.overlapping(span);
        let mut taken = Vec::with_capacity(touched.len());
        for piece in touched {
            self.by_start.remove(&piece.span.start);
            if let Some(before) = Span::new(piece.span.start, span.start) {
                self.insert(piece.with_span(before));
            }
            if let Some(after) = Span::new(span.end, piece.span.end) {
                self.insert(piece.with_span(after));
            }
            taken.extend(piece.span.intersection(span).map(|inside| piece.with_span(inside)));
        }
        taken
    }

    /// The parts of `span` that no piece covers.
    pub fn gaps(&self, span: Span) -> Vec<Span> {
        let mut gaps = Vec::new();
        let mut start = span.start;
        for piece in self.overlapping(span) {
            gaps.extend(Span::new(start, piece.span.start));
            start = piece.span.end;
        }
        gaps.extend(Span::new(start, span.end));
        gaps
    }

    fn overlapping(&self, span: Span) -> Vec<Piece> {
        let before = self.by_start.range(..span.start).next_back();
        before
            .into_iter()
            .chain(self.by_start.range(span.start..span.end))
            .map(|(&start, &(end, origin))| Piece { span: Span { start, end }, origin })
            .filter(|piece| piece.span.end > span.start)
            .collect()
    }
}
