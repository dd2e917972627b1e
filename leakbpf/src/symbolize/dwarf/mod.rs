//! Functions, inlined calls and source lines from DWARF.
//!
//! Only what an address needs is parsed: an index of the units, then the functions of one unit,
//! then the inlined calls of one function. What is parsed is kept as plain data and dropped when it
//! grows; nothing recurses, and each step has a [`Budget`], since the file may have been written to
//! exhaust whoever reads it.

mod budget;
mod lines;
mod open;
mod split;
mod unit;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gimli::{
    Abbreviations, AttributeValue, DebugAbbrevOffset, DebugInfoOffset, EndianSlice, LittleEndian,
    SectionId, UnitOffset,
};

use crate::elf::debug_files::{Open, Place};
use crate::elf::image::{Image, ImageError};
use budget::Budget;
pub use budget::WorkTime;
use open::{
    ABBREVIATIONS_GROWTH, KeptAbbreviations, Ranges, Root, abbreviations, open_unit, table_bytes,
};
pub use split::SplitError;
use split::{Splits, View};
use unit::UnitNames;

type Reader<'a> = EndianSlice<'a, LittleEndian>;
type Dwarf<'a> = gimli::Dwarf<Reader<'a>>;
type Unit<'a> = gimli::Unit<Reader<'a>>;

/// Parsed units are dropped beyond this.
const UNITS_KEPT_BYTES: usize = 16 << 20;
/// Units that claim the same address and are tried for it.
const CANDIDATES_MAX: usize = 16;
/// How far to look back for a unit that is large enough to reach the address.
const LOOK_BACK: usize = 256;
#[derive(Debug, thiserror::Error)]
pub enum DwarfError {
    #[error("{0}")]
    Image(#[from] ImageError),
    #[error("debug information is damaged: {0}")]
    Damaged(#[from] gimli::Error),
    #[error("debug information takes more work than an honest file needs")]
    TooMuchWork,
}

/// One function at an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFrame {
    /// Linkage name where there is one, plain name otherwise; not demangled.
    pub function: Option<Arc<str>>,
    pub file: Option<Arc<str>>,
    pub line: Option<u32>,
}

#[derive(Debug)]
struct Span {
    begin: u64,
    end: u64,
    /// Index into [`UnitOffsets`].
    unit: u32,
}

/// Offsets in `.debug_info`, ascending.
type UnitOffsets = Vec<usize>;

/// Which file an offset is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Part {
    Main,
    /// What is behind the skeleton unit of that number.
    Split(u32),
    /// What `dwz` moved to a file that several debug files share.
    Alternate,
}

/// The debug information of one module.
#[derive(Debug)]
pub struct DebugInfo {
    sections: gimli::DwarfSections<Vec<u8>>,
    alternate: Option<gimli::DwarfSections<Vec<u8>>>,
    /// Sorted by begin.
    spans: Vec<Span>,
    unit_offsets: UnitOffsets,
    alternate_unit_offsets: UnitOffsets,
    units: HashMap<u32, UnitNames>,
    splits: Splits,
    abbreviations: KeptAbbreviations,
    section_bytes: usize,
    limit_bytes: u64,
    time: WorkTime,
    lookups: u32,
    spent: Duration,
}

/// What is known of an address.
#[derive(Debug, Default)]
pub struct Found {
    /// The innermost inlined call first; empty when no unit knows the address.
    pub frames: Vec<SourceFrame>,
    /// A file that says more was not found: see [`DebugInfo::split_error`].
    pub is_partial: bool,
}

impl DebugInfo {
    /// Reads the sections that names need, at most `limit_bytes` together, and finds out which
    /// unit covers which addresses. `beside`: files that a `.dwp` file may lie beside.
    pub fn read(
        image: &Image,
        alternate: Option<&Image>,
        beside: Vec<Place>,
        limit_bytes: u64,
        time: WorkTime,
    ) -> Result<DebugInfo, DwarfError> {
        let mut left = limit_bytes;
        let sections = gimli::DwarfSections::load(|id| load_main(image, id, &mut left))?;
        let alternate = alternate
            .map(|image| gimli::DwarfSections::load(|id| load_main(image, id, &mut left)))
            .transpose()?;
        let mut info = DebugInfo {
            sections,
            alternate,
            spans: Vec::new(),
            unit_offsets: Vec::new(),
            alternate_unit_offsets: Vec::new(),
            units: HashMap::new(),
            splits: Splits::new(beside),
            abbreviations: KeptAbbreviations::default(),
            section_bytes: (limit_bytes - left) as usize,
            limit_bytes,
            time,
            lookups: 0,
            spent: Duration::ZERO,
        };
        info.index()?;
        Ok(info)
    }

    /// Bytes kept in memory, nearly.
    pub fn size_bytes(&self) -> usize {
        let units: usize = self.units.values().map(UnitNames::size_bytes).sum();
        let spans = self.spans.len() * size_of::<Span>();
        let abbreviations = self.abbreviations.bytes * ABBREVIATIONS_GROWTH;
        self.section_bytes + units + spans + abbreviations + self.splits.size_bytes()
    }

    /// Why some addresses have less names than they could have.
    pub fn split_error(&self) -> Option<&SplitError> {
        self.splits.error()
    }

    fn index(&mut self) -> Result<(), DwarfError> {
        let mut budget = Budget::new(self.time.index);
        let dwarf = view(&self.sections, self.alternate.as_ref());
        let mut spans = Vec::new();
        let mut offsets = Vec::new();
        let mut shared: Option<(usize, Arc<Abbreviations>)> = None;

        let mut headers = dwarf.units();
        // Damage ends the list and keeps what was read before it.
        while let Ok(Some(header)) = headers.next() {
            budget.keep()?;
            budget.check_time()?;
            let Some(DebugInfoOffset(offset)) = header.debug_info_offset() else {
                continue;
            };
            let number = offsets.len() as u32;
            offsets.push(offset);
            if !matches!(
                header.type_(),
                gimli::UnitType::Compilation | gimli::UnitType::Skeleton(_)
            ) {
                continue;
            }
            let DebugAbbrevOffset(abbreviations_offset) = header.debug_abbrev_offset();
            let abbreviations = match &shared {
                Some((offset, table)) if *offset == abbreviations_offset => table.clone(),
                _ => match abbreviations(&dwarf, abbreviations_offset) {
                    Ok(table) => table,
                    Err(_) => continue,
                },
            };
            shared = Some((abbreviations_offset, abbreviations.clone()));
            let Ok((unit, root)) = open_unit(&dwarf, header, abbreviations) else {
                continue;
            };
            if let Some(id) = unit.dwo_id {
                self.splits.add(number, id);
            }
            root.ranges.each(&dwarf, &unit, &mut budget, |begin, end| {
                spans.push(Span { begin, end, unit: number });
            })?;
        }
        spans.sort_unstable_by_key(|span| (span.begin, span.end));
        spans.shrink_to_fit();

        let mut alternate_offsets = Vec::new();
        if let Some(alternate) = dwarf.sup() {
            let mut headers = alternate.units();
            while let Ok(Some(header)) = headers.next() {
                budget.keep()?;
                alternate_offsets.extend(header.debug_info_offset().map(|offset| offset.0));
            }
        }
        self.spans = spans;
        self.unit_offsets = offsets;
        self.alternate_unit_offsets = alternate_offsets;
        Ok(())
    }

    /// What was compiled to `svma`. `open` opens `.dwo` and `.dwp` files.
    pub fn find(&mut self, svma: u64, open: &mut Open) -> Result<Found, DwarfError> {
        let allowed = self.time.mean.saturating_mul(self.lookups);
        if self.spent > self.time.total.saturating_add(allowed) {
            return Err(DwarfError::TooMuchWork);
        }
        self.lookups = self.lookups.saturating_add(1);
        let began = Instant::now();
        let found = self.find_timed(svma, open);
        self.spent += began.elapsed();
        found
    }

    fn find_timed(&mut self, svma: u64, open: &mut Open) -> Result<Found, DwarfError> {
        let after = self.spans.partition_point(|span| span.begin <= svma);
        let candidates: Vec<u32> = self
            .spans
            .get(..after)
            .unwrap_or_default()
            .iter()
            .rev()
            .take(LOOK_BACK)
            .filter(|span| svma < span.end)
            .map(|span| span.unit)
            .take(CANDIDATES_MAX)
            .collect();
        let mut budget = Budget::new(self.time.lookup);
        let mut is_partial = false;
        for number in candidates {
            let frames = self.find_in_unit(number, svma, open, &mut budget)?;
            is_partial |= self.splits.lacks(number);
            if !frames.is_empty() {
                return Ok(Found { frames, is_partial });
            }
        }
        Ok(Found { frames: Vec::new(), is_partial })
    }

    fn find_in_unit(
        &mut self,
        number: u32,
        svma: u64,
        open: &mut Open,
        budget: &mut Budget,
    ) -> Result<Vec<SourceFrame>, DwarfError> {
        let Some(&offset) = self.unit_offsets.get(number as usize) else {
            return Ok(Vec::new());
        };
        if !self.units.contains_key(&number)
            && self.units.values().map(UnitNames::size_bytes).sum::<usize>() > UNITS_KEPT_BYTES
        {
            self.units.clear();
        }
        let dwarf = view(&self.sections, self.alternate.as_ref());
        if self.splits.is_unopened(number) {
            let header = dwarf.unit_header(DebugInfoOffset(offset))?;
            let DebugAbbrevOffset(table) = header.debug_abbrev_offset();
            let skeleton = open_unit(&dwarf, header, abbreviations(&dwarf, table)?)?;
            let left = self.limit_bytes.saturating_sub(self.section_bytes as u64);
            self.splits.open(number, &dwarf, &skeleton, left, open, budget)?;
        }
        let mut lookup = Lookup {
            split: self.splits.view(number, &dwarf),
            dwarf,
            unit_offsets: &self.unit_offsets,
            alternate_unit_offsets: &self.alternate_unit_offsets,
            abbreviations: &mut self.abbreviations,
        };
        let part = match lookup.split {
            Some(_) => Part::Split(number),
            None => Part::Main,
        };
        let names = self.units.entry(number).or_insert_with(|| UnitNames::new(offset, part));
        // What was behind it was dropped, and is there no more.
        if names.part() != part {
            *names = UnitNames::new(offset, part);
        }
        names.find(svma, &mut lookup, budget)
    }
}

/// What finding something in a unit needs besides the unit.
struct Lookup<'a> {
    dwarf: Dwarf<'a>,
    split: Option<View<'a>>,
    unit_offsets: &'a UnitOffsets,
    alternate_unit_offsets: &'a UnitOffsets,
    abbreviations: &'a mut KeptAbbreviations,
}

impl<'a> Lookup<'a> {
    fn dwarf(&self, part: Part) -> &Dwarf<'a> {
        match (part, self.dwarf.sup(), &self.split) {
            (Part::Alternate, Some(alternate), _) => alternate,
            (Part::Split(_), _, Some(split)) => &split.dwarf,
            _ => &self.dwarf,
        }
    }

    /// Opens the unit whose header is at `offset`.
    fn open(&mut self, part: Part, offset: usize) -> Result<(Unit<'a>, Root<'a>), DwarfError> {
        let header = self.dwarf(part).unit_header(DebugInfoOffset(offset))?;
        let DebugAbbrevOffset(table) = header.debug_abbrev_offset();
        let abbreviations = match self.abbreviations.tables.get(&(part, table)) {
            Some(known) => known.clone(),
            None => {
                let (parsed, bytes) = {
                    let dwarf = self.dwarf(part);
                    (abbreviations(dwarf, table)?, table_bytes(dwarf, table)?)
                };
                self.abbreviations.keep((part, table), parsed.clone(), bytes);
                parsed
            }
        };
        open_unit(self.dwarf(part), header, abbreviations)
    }

    /// The unit that an offset in `.debug_info` lies in.
    fn unit_around(&self, part: Part, offset: usize) -> Option<usize> {
        let offsets = match part {
            Part::Main => self.unit_offsets,
            Part::Split(_) => self.split.as_ref()?.offsets,
            Part::Alternate => self.alternate_unit_offsets,
        };
        let after = offsets.partition_point(|&unit| unit <= offset);
        offsets.get(after.checked_sub(1)?).copied()
    }
}

fn view<'a>(
    sections: &'a gimli::DwarfSections<Vec<u8>>,
    alternate: Option<&'a gimli::DwarfSections<Vec<u8>>>,
) -> Dwarf<'a> {
    sections.borrow_with_sup(alternate, |bytes| EndianSlice::new(bytes, LittleEndian))
}

/// Reads a section when names need it; empty when the file has none.
fn load_main(image: &Image, id: SectionId, left: &mut u64) -> Result<Vec<u8>, ImageError> {
    if !matches!(
        id,
        SectionId::DebugAbbrev
            | SectionId::DebugAddr
            | SectionId::DebugInfo
            | SectionId::DebugLine
            | SectionId::DebugLineStr
            | SectionId::DebugRanges
            | SectionId::DebugRngLists
            | SectionId::DebugStr
            | SectionId::DebugStrOffsets
    ) {
        return Ok(Vec::new());
    }
    load(image, id.name(), left)
}

fn load(image: &Image, name: &str, left: &mut u64) -> Result<Vec<u8>, ImageError> {
    let packed_name = name.replacen(".debug", ".zdebug", 1);
    let Some(section) = image.section(name).or_else(|| image.section(&packed_name)) else {
        return Ok(Vec::new());
    };
    let bytes = image.contents(section, *left)?;
    *left = left.saturating_sub(bytes.len() as u64);
    Ok(bytes)
}

/// Follows names through at most this many references.
const REFERENCES_MAX: u32 = 16;

/// The name of the function that the DIE at `offset` is, or stands for.
fn name_of<'a>(
    lookup: &mut Lookup<'a>,
    unit: &Unit<'a>,
    part: Part,
    offset: UnitOffset,
    budget: &mut Budget,
) -> Result<Option<Reader<'a>>, DwarfError> {
    let mut part = part;
    let mut offset = offset;
    let mut foreign: Option<Unit<'a>> = None;
    for _ in 0..REFERENCES_MAX {
        let mut name = None;
        let mut origin = None;
        {
            let unit = foreign.as_ref().unwrap_or(unit);
            let dwarf = lookup.dwarf(part);
            let mut entries = unit.entries_raw(Some(offset))?;
            let Some(abbreviation) = entries.read_abbreviation()? else {
                return Ok(None);
            };
            budget.step_over(abbreviation.attributes())?;
            for specification in abbreviation.attributes() {
                let attribute = entries.read_attribute(*specification)?;
                match attribute.name() {
                    gimli::DW_AT_linkage_name | gimli::DW_AT_MIPS_linkage_name => {
                        if let Ok(linkage_name) = dwarf.attr_string(unit, attribute.value()) {
                            return Ok(Some(linkage_name));
                        }
                    }
                    gimli::DW_AT_name => name = dwarf.attr_string(unit, attribute.value()).ok(),
                    gimli::DW_AT_abstract_origin | gimli::DW_AT_specification => {
                        origin = Some(attribute.value());
                    }
                    _ => {}
                }
            }
        }
        let (next_part, target) = match (name, origin) {
            (Some(name), _) => return Ok(Some(name)),
            (None, Some(AttributeValue::UnitRef(inside))) => {
                offset = inside;
                continue;
            }
            (None, Some(AttributeValue::DebugInfoRef(DebugInfoOffset(target)))) => (part, target),
            (None, Some(AttributeValue::DebugInfoRefSup(DebugInfoOffset(target)))) => {
                (Part::Alternate, target)
            }
            _ => return Ok(None),
        };
        if next_part == Part::Alternate && lookup.dwarf.sup().is_none() {
            return Ok(None);
        }
        let Some(around) = lookup.unit_around(next_part, target) else {
            return Ok(None);
        };
        budget.check_time()?;
        let (next, _) = lookup.open(next_part, around)?;
        let Some(inside) = DebugInfoOffset(target).to_unit_offset(&next.header) else {
            return Ok(None);
        };
        part = next_part;
        offset = inside;
        foreign = Some(next);
    }
    Ok(None)
}
