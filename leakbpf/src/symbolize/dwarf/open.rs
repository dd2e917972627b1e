//! Units as they are opened: their abbreviations, and what their first DIE says.

use std::collections::HashMap;
use std::sync::Arc;

use gimli::{
    Abbreviations, AttributeValue, DebugAbbrevOffset, DebugLineOffset, LittleEndian, Reader as _,
    Section as _,
};

use super::{Budget, Dwarf, DwarfError, Part, Reader, Unit};

/// The largest compilers' tables have some ten thousand entries.
const ABBREVIATIONS_MAX_BYTES: usize = 1 << 20;
/// Bytes of the tables that are kept parsed.
const ABBREVIATIONS_KEPT_BYTES: usize = 1 << 20;
/// What a byte of a table takes when parsed, at worst.
pub(super) const ABBREVIATIONS_GROWTH: usize = 24;

/// Address ranges as a DIE states them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ranges<'a> {
    low: Option<AttributeValue<Reader<'a>>>,
    high: Option<AttributeValue<Reader<'a>>>,
    list: Option<AttributeValue<Reader<'a>>>,
}

impl<'a> Ranges<'a> {
    /// Takes up an attribute when it is about ranges.
    pub(super) fn take(&mut self, attribute: &gimli::Attribute<Reader<'a>>) {
        match attribute.name() {
            gimli::DW_AT_low_pc => self.low = Some(attribute.value()),
            gimli::DW_AT_high_pc => self.high = Some(attribute.value()),
            gimli::DW_AT_ranges => self.list = Some(attribute.value()),
            _ => {}
        }
    }

    /// Calls `keep` with begin and end of each range. What a linker dropped is left out: its
    /// addresses are 0 or near the highest (DWARF issue 200609.1).
    pub(super) fn each(
        &self,
        dwarf: &Dwarf<'a>,
        unit: &Unit<'a>,
        budget: &mut Budget,
        mut keep: impl FnMut(u64, u64),
    ) -> Result<(), DwarfError> {
        let mut take = |begin: u64, end: u64, budget: &mut Budget| {
            if begin == 0 || begin >= end {
                return budget.step();
            }
            keep(begin, end);
            budget.keep()
        };
        if let Some(list) = self.list {
            // It may be as long as its section, and say nothing.
            budget.check_time()?;
            let Ok(Some(mut ranges)) = dwarf.attr_ranges(unit, list) else {
                return Ok(());
            };
            while let Ok(Some(range)) = ranges.next() {
                take(range.begin, range.end, budget)?;
            }
            return Ok(());
        }
        let (Some(low), Some(high)) = (self.low, self.high) else {
            return Ok(());
        };
        let Ok(Some(begin)) = dwarf.attr_address(unit, low) else {
            return Ok(());
        };
        let end = match high {
            AttributeValue::Udata(size) => begin.checked_add(size),
            high => dwarf.attr_address(unit, high).ok().flatten(),
        };
        match end {
            Some(end) => take(begin, end, budget),
            None => Ok(()),
        }
    }
}

/// What a unit's first DIE says.
pub(super) struct Root<'a> {
    pub(super) ranges: Ranges<'a>,
    pub(super) lines: Option<DebugLineOffset<usize>>,
    /// Name of the file that the unit is a skeleton of.
    pub(super) dwo_name: Option<AttributeValue<Reader<'a>>>,
}

/// As `gimli::Dwarf::unit`, but leaves the line program's header alone: with its lists of files it
/// is most of the cost, and few units' lines are ever asked for.
pub(super) fn open_unit<'a>(
    dwarf: &Dwarf<'a>,
    header: gimli::UnitHeader<Reader<'a>>,
    abbreviations: Arc<Abbreviations>,
) -> Result<(Unit<'a>, Root<'a>), DwarfError> {
    let encoding = header.encoding();
    let mut unit = Unit {
        abbreviations,
        name: None,
        comp_dir: None,
        low_pc: 0,
        str_offsets_base: gimli::DebugStrOffsetsBase::default_for_encoding_and_file(
            encoding,
            dwarf.file_type,
        ),
        addr_base: gimli::DebugAddrBase(0),
        loclists_base: gimli::DebugLocListsBase::default_for_encoding_and_file(
            encoding,
            dwarf.file_type,
        ),
        rnglists_base: gimli::DebugRngListsBase::default_for_encoding_and_file(
            encoding,
            dwarf.file_type,
        ),
        line_program: None,
        dwo_id: match header.type_() {
            gimli::UnitType::Skeleton(id) | gimli::UnitType::SplitCompilation(id) => Some(id),
            _ => None,
        },
        header,
    };
    let mut root = Root { ranges: Ranges::default(), lines: None, dwo_name: None };
    let mut directory = None;
    let mut attributes = Vec::new();
    {
        let mut entries = unit.entries_raw(None)?;
        if let Some(abbreviation) = entries.read_abbreviation()? {
            for specification in abbreviation.attributes() {
                attributes.push(entries.read_attribute(*specification)?);
            }
        }
    }
    for attribute in &attributes {
        root.ranges.take(attribute);
        match (attribute.name(), attribute.value()) {
            (gimli::DW_AT_comp_dir, value) => directory = Some(value),
            (gimli::DW_AT_stmt_list, AttributeValue::DebugLineRef(offset)) => {
                root.lines = Some(offset);
            }
            (gimli::DW_AT_str_offsets_base, AttributeValue::DebugStrOffsetsBase(base)) => {
                unit.str_offsets_base = base;
            }
            (
                gimli::DW_AT_addr_base | gimli::DW_AT_GNU_addr_base,
                AttributeValue::DebugAddrBase(base),
            ) => unit.addr_base = base,
            (
                gimli::DW_AT_rnglists_base | gimli::DW_AT_GNU_ranges_base,
                AttributeValue::DebugRngListsBase(base),
            ) => unit.rnglists_base = base,
            (gimli::DW_AT_GNU_dwo_id, AttributeValue::DwoId(id)) => unit.dwo_id = Some(id),
            (gimli::DW_AT_dwo_name | gimli::DW_AT_GNU_dwo_name, name) => {
                root.dwo_name = Some(name);
            }
            _ => {}
        }
    }
    // Only now, since these may be indices that count from the bases.
    unit.comp_dir = directory.and_then(|value| dwarf.attr_string(&unit, value).ok());
    let low = root.ranges.low;
    if let Some(Ok(Some(low_pc))) = low.map(|low| dwarf.attr_address(&unit, low)) {
        unit.low_pc = low_pc;
    }
    Ok((unit, root))
}

/// Tables that several units may share.
#[derive(Debug, Default)]
pub(super) struct KeptAbbreviations {
    pub(super) tables: HashMap<(Part, usize), Arc<Abbreviations>>,
    /// In the section.
    pub(super) bytes: usize,
}

impl KeptAbbreviations {
    pub(super) fn keep(&mut self, place: (Part, usize), table: Arc<Abbreviations>, bytes: usize) {
        if self.bytes.saturating_add(bytes) > ABBREVIATIONS_KEPT_BYTES {
            *self = Self::default();
        }
        self.bytes = self.bytes.saturating_add(bytes);
        self.tables.insert(place, table);
    }
}

/// How long a table is that can be read.
pub(super) fn table_bytes(dwarf: &Dwarf, offset: usize) -> Result<usize, DwarfError> {
    let mut reader = *dwarf.debug_abbrev.reader();
    reader.skip(offset)?;
    let all = reader.len();
    while reader.read_uleb128()? != 0 {
        reader.read_uleb128()?;
        reader.read_u8()?;
        loop {
            let (name, form) = (reader.read_uleb128()?, reader.read_uleb128()?);
            if form == u64::from(gimli::DW_FORM_implicit_const.0) {
                reader.read_sleb128()?;
            }
            if (name, form) == (0, 0) {
                break;
            }
        }
    }
    Ok(all - reader.len())
}

pub(super) fn abbreviations(
    dwarf: &Dwarf,
    offset: usize,
) -> Result<Arc<Abbreviations>, DwarfError> {
    let section = dwarf.debug_abbrev.reader().slice();
    // A table that does not end would be read to the end of the section for every unit.
    let end = section.len().min(offset.saturating_add(ABBREVIATIONS_MAX_BYTES));
    let section = section.get(..end).unwrap_or_default();
    let section = gimli::DebugAbbrev::new(section, LittleEndian);
    Ok(Arc::new(section.abbreviations(DebugAbbrevOffset(offset))?))
}
