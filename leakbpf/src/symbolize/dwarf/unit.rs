//! The functions of one unit, and the calls that were inlined into them.

use std::collections::HashMap;
use std::sync::Arc;

use gimli::{AttributeValue, UnitOffset};

use super::lines::Lines;
use super::{Budget, DwarfError, Lookup, Part, Ranges, Root, SourceFrame, Unit, name_of};
use crate::symbolize::demangle::NAME_MAX_BYTES;

/// Deeper calls are shown as part of the last one.
const INLINE_DEPTH_MAX: usize = 256;
/// Functions that overlap and are tried for an address.
const LOOK_BACK: usize = 16;

#[derive(Debug)]
struct FunctionRange {
    begin: u64,
    end: u64,
    entry: usize,
}

#[derive(Debug)]
struct InlinedCall {
    /// Index of the call that this one was inlined into; `None` for the function itself.
    parent: Option<usize>,
    /// Part of [`Function::ranges`].
    ranges: (usize, usize),
    entry: usize,
    file: Option<u64>,
    line: Option<u32>,
}

#[derive(Debug, Default)]
struct Function {
    /// Parents before children.
    calls: Vec<InlinedCall>,
    ranges: Vec<(u64, u64)>,
}

/// What has been parsed of one unit so far. Keys are offsets of DIEs in the unit.
#[derive(Debug)]
pub(super) struct UnitNames {
    offset: usize,
    /// Where its functions are: in the unit itself, or behind it.
    part: Part,
    /// Sorted by begin.
    ranges: Option<Vec<FunctionRange>>,
    functions: HashMap<usize, Function>,
    names: HashMap<usize, Option<Arc<str>>>,
    lines: Option<Lines>,
}

impl UnitNames {
    pub fn new(offset: usize, part: Part) -> UnitNames {
        UnitNames {
            offset,
            part,
            ranges: None,
            functions: HashMap::new(),
            names: HashMap::new(),
            lines: None,
        }
    }

    pub fn part(&self) -> Part {
        self.part
    }

    pub fn size_bytes(&self) -> usize {
        let functions: usize = self
            .functions
            .values()
            .map(|function| {
                function.calls.len() * size_of::<InlinedCall>() + function.ranges.len() * 16
            })
            .sum();
        self.ranges.as_ref().map_or(0, Vec::len) * size_of::<FunctionRange>()
            + functions
            + self.names.len() * 96
            + self.lines.as_ref().map_or(0, Lines::size_bytes)
    }

    pub fn find<'a>(
        &mut self,
        svma: u64,
        lookup: &mut Lookup<'a>,
        budget: &mut Budget,
    ) -> Result<Vec<SourceFrame>, DwarfError> {
        // Opened only when something has to be parsed.
        let part = self.part;
        let mut opened = Opened { offset: self.offset, unit: None, split: None };
        if self.ranges.is_none() {
            let unit = opened.functions(lookup)?;
            self.ranges = Some(function_ranges(lookup, unit, part, budget)?);
        }
        let lines = match &mut self.lines {
            Some(lines) => lines,
            unread => {
                let (unit, root) = opened.get(lookup)?;
                unread.insert(Lines::read(lookup, unit, root, budget)?)
            }
        };
        let location = lines.find(svma);
        let entry = function_at(self.ranges.as_deref().unwrap_or_default(), svma);
        let Some(entry) = entry else {
            return Ok(match location {
                Some((file, line)) => vec![SourceFrame {
                    function: None,
                    file: lines.file(file, &mut opened, lookup, budget)?,
                    line,
                }],
                None => Vec::new(),
            });
        };
        let function = match self.functions.entry(entry) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(unread) => {
                let unit = opened.functions(lookup)?;
                unread.insert(Function::read(lookup, unit, part, entry, budget)?)
            }
        };

        let chain = function.calls_at(svma);
        let mut frames = Vec::with_capacity(chain.len() + 1);
        let mut location = location.map_or((None, None), |(file, line)| (Some(file), line));
        let entries = chain.iter().rev().map(|call| (call.entry, Some(*call)));
        for (entry, call) in entries.chain([(entry, None)]) {
            let function = match self.names.get(&entry) {
                Some(known) => known.clone(),
                None => {
                    let unit = opened.functions(lookup)?;
                    let name = match name_of(lookup, unit, part, UnitOffset(entry), budget) {
                        Err(DwarfError::TooMuchWork) => return Err(DwarfError::TooMuchWork),
                        name => name.ok().flatten(),
                    };
                    let name = name.map(|name| {
                        let name = name.slice();
                        let name = name.get(..NAME_MAX_BYTES).unwrap_or(name);
                        Arc::from(String::from_utf8_lossy(name))
                    });
                    self.names.insert(entry, name.clone());
                    name
                }
            };
            let (file, line) = location;
            frames.push(SourceFrame {
                function,
                file: match file {
                    Some(file) => lines.file(file, &mut opened, lookup, budget)?,
                    None => None,
                },
                line,
            });
            location = call.map_or((None, None), |call| (call.file, call.line));
        }
        Ok(frames)
    }
}

/// A unit that is opened when it is first needed.
pub(super) struct Opened<'a> {
    offset: usize,
    unit: Option<(Unit<'a>, Root<'a>)>,
    split: Option<Unit<'a>>,
}

impl<'a> Opened<'a> {
    pub fn get(&mut self, lookup: &mut Lookup<'a>) -> Result<&(Unit<'a>, Root<'a>), DwarfError> {
        if self.unit.is_none() {
            self.unit = Some(lookup.open(Part::Main, self.offset)?);
        }
        self.unit.as_ref().ok_or(DwarfError::Damaged(gimli::Error::MissingUnitDie))
    }

    /// The unit that has the functions: what is behind a skeleton.
    fn functions(&mut self, lookup: &mut Lookup<'a>) -> Result<&Unit<'a>, DwarfError> {
        let Some((part, offset)) = lookup.split.as_ref().map(|split| (split.part, split.offset))
        else {
            return Ok(&self.get(lookup)?.0);
        };
        if self.split.is_none() {
            let (mut unit, _) = lookup.open(part, offset)?;
            unit.copy_relocated_attributes(&self.get(lookup)?.0);
            self.split = Some(unit);
        }
        self.split.as_ref().ok_or(DwarfError::Damaged(gimli::Error::MissingUnitDie))
    }
}

fn function_at(ranges: &[FunctionRange], svma: u64) -> Option<usize> {
    let after = ranges.partition_point(|range| range.begin <= svma);
    let before = ranges.get(..after)?.iter().rev().take(LOOK_BACK);
    before.into_iter().find(|range| svma < range.end).map(|range| range.entry)
}

fn function_ranges<'a>(
    lookup: &Lookup<'a>,
    unit: &Unit<'a>,
    part: Part,
    budget: &mut Budget,
) -> Result<Vec<FunctionRange>, DwarfError> {
    let dwarf = lookup.dwarf(part);
    let mut functions = Vec::new();
    let mut entries = unit.entries_raw(None)?;
    while !entries.is_empty() {
        budget.step()?;
        let entry = entries.next_offset().0;
        let Some(abbreviation) = entries.read_abbreviation()? else {
            continue;
        };
        budget.step_over(abbreviation.attributes())?;
        if abbreviation.tag() != gimli::DW_TAG_subprogram {
            entries.skip_attributes(abbreviation.attributes())?;
            continue;
        }
        let mut ranges = Ranges::default();
        for specification in abbreviation.attributes() {
            ranges.take(&entries.read_attribute(*specification)?);
        }
        ranges.each(dwarf, unit, budget, |begin, end| {
            functions.push(FunctionRange { begin, end, entry });
        })?;
    }
    functions.sort_unstable_by_key(|range| (range.begin, range.end));
    functions.shrink_to_fit();
    Ok(functions)
}

impl Function {
    fn read<'a>(
        lookup: &Lookup<'a>,
        unit: &Unit<'a>,
        part: Part,
        entry: usize,
        budget: &mut Budget,
    ) -> Result<Function, DwarfError> {
        let dwarf = lookup.dwarf(part);
        let mut function = Function::default();
        let mut entries = unit.entries_raw(Some(UnitOffset(entry)))?;
        let top = entries.next_depth();
        if let Some(abbreviation) = entries.read_abbreviation()? {
            entries.skip_attributes(abbreviation.attributes())?;
        }
        // Depth in the tree and index of each call that we are inside of.
        let mut inside: Vec<(isize, usize)> = Vec::new();
        // Depth of a nested function that we are inside of: its calls are its own.
        let mut nested: Option<isize> = None;
        while !entries.is_empty() && entries.next_depth() > top {
            budget.step()?;
            let depth = entries.next_depth();
            let entry = entries.next_offset().0;
            let Some(abbreviation) = entries.read_abbreviation()? else {
                continue;
            };
            budget.step_over(abbreviation.attributes())?;
            if nested.is_some_and(|nested| depth <= nested) {
                nested = None;
            }
            while inside.last().is_some_and(|(outer, _)| depth <= *outer) {
                inside.pop();
            }
            let is_call = abbreviation.tag() == gimli::DW_TAG_inlined_subroutine;
            if !is_call || nested.is_some() || inside.len() >= INLINE_DEPTH_MAX {
                if abbreviation.tag() == gimli::DW_TAG_subprogram && nested.is_none() {
                    nested = Some(depth);
                }
                entries.skip_attributes(abbreviation.attributes())?;
                continue;
            }
            let mut ranges = Ranges::default();
            let (mut file, mut line) = (None, None);
            for specification in abbreviation.attributes() {
                let attribute = entries.read_attribute(*specification)?;
                ranges.take(&attribute);
                match (attribute.name(), attribute.value()) {
                    // File 0 is a file since DWARF 5 and none before.
                    (gimli::DW_AT_call_file, AttributeValue::FileIndex(index)) => {
                        file = (index > 0 || unit.header.version() >= 5).then_some(index);
                    }
                    (gimli::DW_AT_call_line, _) => {
                        line = attribute
                            .udata_value()
                            .and_then(|line| u32::try_from(line).ok())
                            .filter(|line| *line > 0);
                    }
                    _ => {}
                }
            }
            let first = function.ranges.len();
            ranges.each(dwarf, unit, budget, |begin, end| {
                function.ranges.push((begin, end));
            })?;
            budget.keep()?;
            let number = function.calls.len();
            function.calls.push(InlinedCall {
                parent: inside.last().map(|(_, index)| *index),
                ranges: (first, function.ranges.len()),
                entry,
                file,
                line,
            });
            inside.push((depth, number));
        }
        Ok(function)
    }

    /// The inlined calls that `svma` lies in, outermost first.
    fn calls_at(&self, svma: u64) -> Vec<&InlinedCall> {
        let mut chain = Vec::new();
        let mut last = None;
        for (number, call) in self.calls.iter().enumerate() {
            let (begin, end) = call.ranges;
            let ranges = self.ranges.get(begin..end).unwrap_or_default();
            let holds = ranges.iter().any(|&(begin, end)| (begin..end).contains(&svma));
            if holds && call.parent == last {
                chain.push(call);
                last = Some(number);
            }
        }
        chain
    }
}
