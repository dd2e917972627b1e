//! Source lines of one unit.

use std::collections::HashMap;
use std::sync::Arc;

use gimli::{DebugLine, DebugLineOffset, LittleEndian, Section as _};

use super::unit::Opened;
use super::{Budget, Dwarf, DwarfError, Lookup, Part, Reader, Root, Unit};

/// Line programs are read up to this size. Their list of files is read whole before the first row,
/// at some 40 times its size in memory.
const PROGRAM_MAX_BYTES: usize = 8 << 20;
/// `PATH_MAX` of Linux.
const PATH_MAX_BYTES: usize = 4096;

#[derive(Debug)]
struct Row {
    address: u64,
    file: u32,
    /// 0 for code that belongs to no line.
    line: u32,
}

#[derive(Debug)]
struct Sequence {
    begin: u64,
    end: u64,
    /// Part of [`Lines::rows`].
    rows: (usize, usize),
}

#[derive(Debug, Default)]
pub(super) struct Lines {
    rows: Vec<Row>,
    /// Sorted by begin.
    sequences: Vec<Sequence>,
    files: HashMap<u64, Option<Arc<str>>>,
}

impl Lines {
    /// Runs the unit's line program. A damaged one costs the unit its lines, not its functions.
    pub fn read<'a>(
        lookup: &Lookup<'a>,
        unit: &Unit<'a>,
        root: &Root<'a>,
        budget: &mut Budget,
    ) -> Result<Lines, DwarfError> {
        let mut lines = Lines::default();
        let Some(offset) = root.lines else {
            return Ok(lines);
        };
        let Ok(program) = program(lookup.dwarf(Part::Main), unit, offset) else {
            return Ok(lines);
        };
        let mut first = 0;
        let mut begin = None;
        let mut rows = program.rows();
        while let Ok(Some((_, row))) = rows.next_row() {
            budget.step()?;
            let address = row.address();
            if row.end_sequence() {
                match begin.take() {
                    Some(begin) if 0 < begin && begin < address => {
                        lines.sequences.push(Sequence {
                            begin,
                            end: address,
                            rows: (first, lines.rows.len()),
                        });
                    }
                    _ => lines.rows.truncate(first),
                }
                first = lines.rows.len();
                continue;
            }
            let file = u32::try_from(row.file_index()).unwrap_or(u32::MAX);
            let line = row.line().and_then(|line| u32::try_from(line.get()).ok()).unwrap_or(0);
            let is_first = begin.is_none();
            begin.get_or_insert(address);
            match lines.rows.last_mut() {
                Some(last) if !is_first && last.address == address => {
                    last.file = file;
                    last.line = line;
                }
                Some(last) if !is_first && (last.file, last.line) == (file, line) => {}
                _ => {
                    budget.keep()?;
                    lines.rows.push(Row { address, file, line });
                }
            }
        }
        // A sequence that does not end covers nothing.
        lines.rows.truncate(first);
        lines.rows.shrink_to_fit();
        lines.sequences.sort_unstable_by_key(|sequence| sequence.begin);
        Ok(lines)
    }

    pub fn size_bytes(&self) -> usize {
        self.rows.len() * size_of::<Row>()
            + self.sequences.len() * size_of::<Sequence>()
            + self.files.len() * 128
    }

    /// Number of the file, and the line.
    pub fn find(&self, svma: u64) -> Option<(u64, Option<u32>)> {
        let after = self.sequences.partition_point(|sequence| sequence.begin <= svma);
        let sequence = self.sequences.get(after.checked_sub(1)?)?;
        if svma >= sequence.end {
            return None;
        }
        let (first, end) = sequence.rows;
        let rows = self.rows.get(first..end)?;
        let after = rows.partition_point(|row| row.address <= svma);
        let row = rows.get(after.checked_sub(1)?)?;
        Some((u64::from(row.file), (row.line > 0).then_some(row.line)))
    }

    /// Path of a file by its number.
    pub fn file<'a>(
        &mut self,
        number: u64,
        opened: &mut Opened<'a>,
        lookup: &mut Lookup<'a>,
        budget: &Budget,
    ) -> Result<Option<Arc<str>>, DwarfError> {
        if let Some(known) = self.files.get(&number) {
            return Ok(known.clone());
        }
        // The list of files is read anew for each.
        budget.check_time()?;
        let path = opened.get(lookup).ok().and_then(|(unit, root)| {
            let dwarf = lookup.dwarf(Part::Main);
            let program = program(dwarf, unit, root.lines?).ok()?;
            path(dwarf, unit, program.header(), number)
        });
        let path = path.map(Arc::from);
        self.files.insert(number, path.clone());
        Ok(path)
    }
}

fn program<'a>(
    dwarf: &Dwarf<'a>,
    unit: &Unit<'a>,
    offset: DebugLineOffset<usize>,
) -> Result<gimli::IncompleteLineProgram<Reader<'a>>, gimli::Error> {
    let section = dwarf.debug_line.reader().slice();
    let end = section.len().min(offset.0.saturating_add(PROGRAM_MAX_BYTES));
    let section = section.get(..end).unwrap_or_default();
    DebugLine::new(section, LittleEndian).program(
        offset,
        unit.header.address_size(),
        unit.comp_dir,
        unit.name,
    )
}

fn path<'a>(
    dwarf: &Dwarf<'a>,
    unit: &Unit<'a>,
    header: &gimli::LineProgramHeader<Reader<'a>>,
    number: u64,
) -> Option<String> {
    let file = header.file(number)?;
    let mut path = String::new();
    let mut push = |part: Reader<'a>| -> Option<()> {
        let part = part.slice();
        if path.len() + part.len() + 1 > PATH_MAX_BYTES {
            return None;
        }
        let part = String::from_utf8_lossy(part);
        if part.starts_with('/') {
            path.clear();
        } else if !path.is_empty() && !path.ends_with('/') {
            path.push('/');
        }
        path.push_str(&part);
        Some(())
    };
    if let Some(directory) = unit.comp_dir {
        push(directory)?;
    }
    // Directory 0 is the unit's own.
    if file.directory_index() != 0
        && let Some(directory) = file.directory(header)
    {
        push(dwarf.attr_string(unit, directory).ok()?)?;
    }
    push(dwarf.attr_string(unit, file.path_name()).ok()?)?;
    Some(path)
}
