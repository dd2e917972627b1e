//! A module's unwind table: rows sorted by address, rules, pages.

use std::ops::Range;

use gimli::{DebugFrame, EhFrame, LittleEndian};
use leakbpf_common::unwind::{
    FRAME_POINTER_RULE, PAGE_BYTES, PAGE_SHIFT, Page, Row, Rule, find_rule,
};
use object::elf;

use super::functions::{Function, Functions, GAP_MIN_BYTES};
use super::sections::{self, Origin};
use super::signals::sigreturns;
use crate::elf::image::{Image, ImageError, Source};

/// Code further than this from its file's first is left out: the page index takes 1/32 of the code
/// that it spans. The largest known executables (Chromium, debug builds) have half of it.
pub const CODE_MAX_BYTES: u64 = 1 << 30;

/// Why a file gives no table.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error("the file {0}")]
    Image(#[from] ImageError),
    #[error("the file is for another machine than x86-64 (e_machine {0})")]
    OtherMachine(u16),
    #[error("the file has no executable segment")]
    NoCode,
}

/// How a table came to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stats {
    /// What was read, in this order: earlier functions win.
    pub origins: Vec<Origin>,
    /// Bytes of call frame information.
    pub frame_bytes: u64,
    pub functions: u64,
    /// Before neighbours were merged.
    pub raw_rows: u64,
    /// Rows that need a register or an expression that is not followed.
    pub unsupported_rows: u64,
    /// Entries of call frame information that cannot be read, or that end too early.
    pub damaged_entries: u64,
    /// Functions that are empty or lie outside of the file's code.
    pub outside_code: u64,
    /// Functions hidden by an earlier one.
    pub overlapping: u64,
    /// The file has more than is read of one file: the rest is missing.
    pub exhausted: bool,
}

/// What the unwinder needs to know of one module. A file without call frame information gives an
/// empty table: all of its code is walked by frame pointers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table {
    /// Rows and pages count from this address of the file on; a multiple of [`PAGE_BYTES`].
    pub base_svma: u64,
    /// Sorted by address, each address once.
    pub rows: Vec<Row>,
    /// [`Rule::FRAME_POINTER`] is the first.
    pub rules: Vec<Rule>,
    /// One for each [`PAGE_BYTES`] of code; code beyond has no rows.
    pub pages: Vec<Page>,
    pub stats: Stats,
}

impl Table {
    /// Compiles the call frame information of an ELF file that is held in memory.
    pub fn of_bytes(bytes: &[u8]) -> Result<Self, TableError> {
        Self::of_image(&Image::open(Source::Memory(bytes.into()))?)
    }

    /// Compiles the call frame information of an ELF file.
    pub fn of_image(image: &Image) -> Result<Self, TableError> {
        if image.machine() != elf::EM_X86_64.0 {
            return Err(TableError::OtherMachine(image.machine()));
        }
        let (base_svma, code) = code(image).ok_or(TableError::NoCode)?;
        let mut functions = Functions::new(base_svma, code);
        for frames in sections::frames(image)? {
            functions.stats.origins.push(frames.origin);
            functions.stats.frame_bytes += frames.bytes.len() as u64;
            match frames.origin {
                Origin::EhFrame | Origin::EhFrameSegment => {
                    let mut section = EhFrame::new(&frames.bytes, LittleEndian);
                    section.set_address_size(8);
                    functions.read(&section, &frames);
                }
                Origin::DebugFrame => {
                    let mut section = DebugFrame::new(&frames.bytes, LittleEndian);
                    section.set_address_size(8);
                    functions.read(&section, &frames);
                }
            }
        }
        functions.stats.functions = functions.functions.len() as u64;
        functions.sort();
        for range in sigreturns(image, functions.gaps()) {
            functions.add_uniform(range, Rule::SIGNAL);
        }
        functions.sort();
        Ok(Self::of_functions(functions))
    }

    /// The functions must be sorted.
    fn of_functions(mut read: Functions) -> Self {
        read.stats.raw_rows = read.rows.len() as u64;
        let rows = merge(&read.functions, &read.rows, &mut read.stats);
        let pages = pages(&rows);
        Self {
            base_svma: read.base_svma,
            rows,
            rules: read.dictionary.into_rules(),
            pages,
            stats: read.stats,
        }
    }

    /// The row that holds at an address of the file, as the kernel side finds it.
    pub fn row(&self, svma: u64) -> Option<Row> {
        let pc = u32::try_from(svma.checked_sub(self.base_svma)?).ok()?;
        let page = *self.pages.get((pc >> PAGE_SHIFT) as usize)?;
        let mut found = None;
        find_rule(page, pc, |index| {
            let row = self.rows.get(index as usize).copied();
            found = row.filter(|row| row.pc <= pc).or(found);
            row
        })?;
        found
    }

    /// The rule that holds at an address of the file; [`Rule::FRAME_POINTER`] where there is no
    /// row.
    pub fn rule(&self, svma: u64) -> Rule {
        let row = self.row(svma).unwrap_or_default();
        self.rules.get(row.rule as usize).copied().unwrap_or(Rule::FRAME_POINTER)
    }

    /// Memory that the unwinder needs for it.
    pub fn size_bytes(&self) -> usize {
        size_of_val(self.rows.as_slice())
            + size_of_val(self.rules.as_slice())
            + size_of_val(self.pages.as_slice())
    }
}

/// The base address, and the executable ranges after it: sorted, apart from each other.
fn code(image: &Image) -> Option<(u64, Vec<Range<u64>>)> {
    let segments = || image.segments().iter().filter(|s| s.is_code() && s.file_bytes > 0);
    let lowest = segments().map(|segment| segment.address).min()?;
    let base = lowest & !u64::from(PAGE_BYTES - 1);
    let ranges = segments().map(|segment| {
        let start = segment.address - base;
        start..start.saturating_add(segment.file_bytes).min(CODE_MAX_BYTES)
    });
    let mut ranges: Vec<_> = ranges.filter(|range| !range.is_empty()).collect();
    ranges.sort_by_key(|range| range.start);
    ranges.dedup_by(|next, range| {
        let joined = next.start <= range.end;
        if joined {
            range.end = range.end.max(next.end);
        }
        joined
    });
    Some((base, ranges))
}

/// One sequence of rows out of those of all functions, sorted by their start.
fn merge(functions: &[Function], raw: &[Row], stats: &mut Stats) -> Vec<Row> {
    let mut rows = Vec::<Row>::with_capacity(raw.len());
    // Up to where earlier functions have spoken.
    let mut covered = 0;
    for function in functions {
        if function.end <= covered {
            stats.overlapping += 1;
            continue;
        }
        stats.overlapping += u64::from(function.start < covered);
        let start = function.start.max(covered);
        if start - covered >= GAP_MIN_BYTES && !rows.is_empty() {
            push(&mut rows, Row { pc: covered, rule: FRAME_POINTER_RULE });
        }
        let first = function.first_row as usize;
        let own = raw.get(first..first + function.row_count as usize).unwrap_or_default();
        for row in own {
            push(&mut rows, Row { pc: row.pc.max(start), rule: row.rule });
        }
        covered = function.end;
    }
    if !rows.is_empty() {
        push(&mut rows, Row { pc: covered, rule: FRAME_POINTER_RULE });
    }
    rows.shrink_to_fit();
    rows
}

/// Appends a row that says something new; the later of two at one address holds.
fn push(rows: &mut Vec<Row>, row: Row) {
    if rows.last().is_some_and(|last| last.pc == row.pc) {
        rows.pop();
    }
    if rows.last().is_none_or(|last| last.rule != row.rule) {
        rows.push(row);
    }
}

fn pages(rows: &[Row]) -> Vec<Page> {
    let Some(last) = rows.last() else {
        return Vec::new();
    };
    let count = (last.pc >> PAGE_SHIFT) + 1;
    let mut pages = Vec::with_capacity(count as usize);
    let mut next = 0;
    for page in 0..count {
        let start = page << PAGE_SHIFT;
        // The row before the page holds at its start, unless the page begins with one of its own.
        let begins = rows.get(next).is_some_and(|row| row.pc == start);
        let first = if begins { next } else { next.saturating_sub(1) };
        while rows.get(next).is_some_and(|row| row.pc >> PAGE_SHIFT == page) {
            next += 1;
        }
        pages.push(Page::new(first as u32, next as u32));
    }
    pages
}
