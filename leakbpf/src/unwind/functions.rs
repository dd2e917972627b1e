//! Runs the call frame programs of a file's functions.

use std::collections::HashMap;
use std::ops::Range;

use gimli::{
    CieOrFde, CommonInformationEntry, EndianSlice, FrameDescriptionEntry, LittleEndian, Register,
    RegisterRule, UnwindContext, UnwindContextStorage, UnwindOffset, UnwindSection, UnwindTableRow,
};
use leakbpf_common::unwind::{Row, Rule};

use super::rules::{self, Dictionary};
use super::sections::Frames;
use super::table::Stats;

/// Most rows of one file before neighbours are merged. libLLVM has 1.2 million.
const ROWS_MAX: usize = 8 << 20;

/// Most functions of one file. libLLVM has 130,000.
const FUNCTIONS_MAX: usize = 4 << 20;

/// Most different rules of one file. 440 libraries together have 4,000.
const RULES_MAX: usize = 1 << 18;

/// Common entries that are kept; linkers leave one for each compiler that took part.
const COMMONS_MAX: usize = 1 << 10;

/// Gaps between functions smaller than this are padding that is never executed; the rule of the
/// function before may as well hold there.
pub(super) const GAP_MIN_BYTES: u32 = 16;

/// Program bytes that are run, for each byte of call frame information. A file can make all its
/// functions run one long common program; real files come to 2.
const WORK_FACTOR: usize = 8;
const WORK_MIN: usize = 1 << 20;

/// Room for gimli to run a program in: x86-64's 17 registers, and deeper nesting than compilers
/// make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Storage;

impl UnwindContextStorage<usize> for Storage {
    type Rules = [(Register, RegisterRule<usize>); 20];
    type Stack = Box<[UnwindTableRow<usize, Self>; 8]>;
}

/// One function's rows, or a part's: compilers split off cold paths.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function {
    /// Bytes after the base, as are all rows' addresses.
    pub start: u32,
    pub end: u32,
    pub first_row: u32,
    pub row_count: u32,
}

/// What the programs of a file say, in the file's order.
#[derive(Debug)]
pub(super) struct Functions {
    pub base_svma: u64,
    /// Executable addresses, bytes after the base; sorted, apart from each other.
    code: Vec<Range<u64>>,
    pub functions: Vec<Function>,
    pub rows: Vec<Row>,
    pub dictionary: Dictionary,
    pub stats: Stats,
}

impl Functions {
    pub fn new(base_svma: u64, code: Vec<Range<u64>>) -> Self {
        Self {
            base_svma,
            code,
            functions: Vec::new(),
            rows: Vec::new(),
            dictionary: Dictionary::new(),
            stats: Stats::default(),
        }
    }

    /// Adds every function of a section. What is damaged is counted and left out.
    pub fn read<'data, S>(&mut self, section: &S, frames: &'data Frames)
    where
        S: UnwindSection<EndianSlice<'data, LittleEndian>>,
        S::Offset: UnwindOffset<usize> + std::hash::Hash,
    {
        let mut work = frames.bytes.len().saturating_mul(WORK_FACTOR).max(WORK_MIN);
        let mut context = UnwindContext::new_in();
        let mut commons = HashMap::<S::Offset, CommonInformationEntry<_>>::new();
        let mut entries = section.entries(&frames.bases);
        loop {
            let partial = match entries.next() {
                Ok(None) => return,
                Ok(Some(CieOrFde::Cie(_))) => continue,
                Ok(Some(CieOrFde::Fde(partial))) => partial,
                // Where an entry ends is not known, nor where the next begins.
                Err(_) => {
                    self.stats.damaged_entries += 1;
                    return;
                }
            };
            let function = partial.parse(|section, bases, offset| {
                if let Some(common) = commons.get(&offset) {
                    return Ok(common.clone());
                }
                let common = section.cie_from_offset(bases, offset)?;
                if commons.len() == COMMONS_MAX {
                    commons.clear();
                }
                commons.insert(offset, common.clone());
                Ok(common)
            });
            let Ok(function) = function else {
                self.stats.damaged_entries += 1;
                continue;
            };
            let cost = function.entry_len().saturating_add(function.cie().entry_len());
            let Some(rest) = work.checked_sub(cost) else {
                self.stats.exhausted = true;
                return;
            };
            work = rest;
            self.add(section, frames, &mut context, &function);
            if self.is_full() {
                self.stats.exhausted = true;
                return;
            }
        }
    }

    fn is_full(&self) -> bool {
        self.rows.len() > ROWS_MAX
            || self.functions.len() > FUNCTIONS_MAX
            || self.dictionary.len() > RULES_MAX
    }

    fn add<'data, S>(
        &mut self,
        section: &S,
        frames: &'data Frames,
        context: &mut UnwindContext<usize, Storage>,
        function: &FrameDescriptionEntry<EndianSlice<'data, LittleEndian>>,
    ) where
        S: UnwindSection<EndianSlice<'data, LittleEndian>>,
    {
        let Some((start, end)) = self.place(function.initial_address(), function.len()) else {
            self.stats.outside_code += 1;
            return;
        };
        let first_row = self.rows.len();
        let encoding = function.cie().encoding();
        // Whatever the program fails to say about its function is not known.
        let mut covered = start;
        if let Ok(mut table) = function.rows(section, &frames.bases, context) {
            // One function alone can have more rows than are kept.
            while !self.is_full()
                && let Ok(Some(row)) = table.next_row()
            {
                let Some(pc) =
                    self.offset(row.start_address()).filter(|pc| (start..end).contains(pc))
                else {
                    break;
                };
                let rule = rules::rule(section, encoding, row);
                self.push(pc, rule);
                covered = self.offset(row.end_address()).unwrap_or(end).max(pc);
            }
        }
        if covered < end {
            self.push(covered, Rule::UNSUPPORTED);
            self.stats.damaged_entries += 1;
        }
        self.functions.push(Function {
            start,
            end,
            first_row: first_row as u32,
            row_count: (self.rows.len() - first_row) as u32,
        });
    }

    /// Adds what one rule describes.
    pub fn add_uniform(&mut self, range: Range<u64>, rule: Rule) {
        let length = range.end.saturating_sub(range.start);
        if let Some((start, end)) = self.place(range.start, length) {
            let first_row = self.rows.len() as u32;
            self.push(start, rule);
            self.functions.push(Function { start, end, first_row, row_count: 1 });
        }
    }

    /// The code that no function covers, as SVMAs, when the functions are sorted.
    pub fn gaps(&self) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        for segment in &self.code {
            let mut covered = segment.start;
            let first = self.functions.partition_point(|f| u64::from(f.start) < segment.start);
            let own = self.functions.get(first..).unwrap_or_default();
            for function in own.iter().take_while(|f| u64::from(f.start) < segment.end) {
                if u64::from(function.start) >= covered + u64::from(GAP_MIN_BYTES) {
                    gaps.push(covered..function.start.into());
                }
                covered = covered.max(function.end.into());
            }
            if segment.end >= covered + u64::from(GAP_MIN_BYTES) {
                gaps.push(covered..segment.end);
            }
        }
        let base = self.base_svma;
        gaps.iter()
            .map(|gap| base.saturating_add(gap.start)..base.saturating_add(gap.end))
            .collect()
    }

    /// Sorts by address. Of functions at one address, the file's first stays first.
    pub fn sort(&mut self) {
        self.functions.sort_by_key(|function| function.start);
    }

    fn push(&mut self, pc: u32, rule: Rule) {
        self.stats.unsupported_rows += u64::from(rule == Rule::UNSUPPORTED);
        let rule = self.dictionary.index(rule);
        self.rows.push(Row { pc, rule });
    }

    fn offset(&self, svma: u64) -> Option<u32> {
        u32::try_from(svma.checked_sub(self.base_svma)?).ok()
    }

    /// A function's offsets, when it lies in code. Linkers leave those of dropped functions behind, at
    /// address 0.
    fn place(&self, svma: u64, length: u64) -> Option<(u32, u32)> {
        let start = svma.checked_sub(self.base_svma)?;
        let after = self.code.partition_point(|range| range.start <= start);
        let segment =
            self.code.get(after.checked_sub(1)?).filter(|range| range.contains(&start))?;
        let end = start.checked_add(length)?.min(segment.end);
        let start = u32::try_from(start).ok()?;
        let end = u32::try_from(end).ok()?;
        (start < end).then_some((start, end))
    }
}
