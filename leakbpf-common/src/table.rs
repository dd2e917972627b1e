//! How unwind tables and address spaces lie in the kernel side's maps.
//!
//! A module's table is one BPF array of [`Block`]s, which the agent packs and the kernel side
//! searches. It is a sequence of 32-bit words: first a [`PackedPage`] for each
//! [`PAGE_BYTES`](crate::unwind::PAGE_BYTES) of code, then [`PackedRow`]s, then
//! [`Rule`](crate::unwind::Rule)s. Pages point to rows and rows to rules by their position in the
//! whole table, so that nothing else must be known to search it. The rows of a page never straddle
//! two blocks: one look-up in the array reaches all of them.

use crate::{
    abi::{FramePlace, FrameWord, Owner},
    unwind::{PAGE_SHIFT, Rule},
};

/// Modules whose tables can be loaded at once. A table is at the position of its serial number
/// modulo this; a serial number never comes twice, so that what was cached of a table that is gone
/// is never taken for another's.
pub const TABLES_MAX: usize = 4096;

const _: () = assert!(TABLES_MAX.is_power_of_two());

/// Processes whose mappings can be known at once. Those beyond follow frame pointers.
pub const SPACES_MAX: u32 = 1 << 14;

pub const BLOCK_WORDS: usize = 1024;
pub const BLOCK_BYTES: usize = BLOCK_WORDS * size_of::<u32>();

/// One element of a table's array.
pub type Block = [u32; BLOCK_WORDS];

pub const RULE_WORDS: usize = size_of::<Rule>() / size_of::<u32>();

/// Where a page's rows are: 24 bits of word position, 8 bits of row count minus one.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedPage(pub u32);

impl PackedPage {
    /// Positions are below this.
    pub const POSITIONS: u32 = 1 << 24;
    pub const ROWS_MAX: u32 = 256;

    /// `rows` is 1 to [`Self::ROWS_MAX`], `position` below [`Self::POSITIONS`].
    pub const fn new(position: u32, rows: u32) -> Self {
        Self(position << 8 | (rows - 1) & 0xff)
    }
    pub const fn position(self) -> u32 {
        self.0 >> 8
    }
    pub const fn rows(self) -> u32 {
        (self.0 & 0xff) + 1
    }
}

/// From this byte of its page on, one rule holds: 24 bits of rule position (in rules from the
/// table's beginning), 8 bits of offset in the page. A page's first row has offset 0.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedRow(pub u32);

impl PackedRow {
    /// `rule` is below 2^24.
    pub const fn new(offset: u8, rule: u32) -> Self {
        Self(rule << 8 | offset as u32)
    }
    pub const fn offset(self) -> u32 {
        self.0 & 0xff
    }
    pub const fn rule(self) -> u32 {
        self.0 >> 8
    }
}

/// Bisections that find a row among [`PackedPage::ROWS_MAX`].
const ROW_STEPS: u32 = 8;

/// The page of `pc`, as position of its word. `pc` counts from the table's base address.
#[inline(always)]
pub const fn page_position(pc: u32) -> u32 {
    pc >> PAGE_SHIFT
}

/// The row that holds at `pc`, among the rows of its page in the block that holds them.
#[inline(always)]
pub fn find_row(block: &Block, page: PackedPage, pc: u32) -> PackedRow {
    const MASK: u32 = BLOCK_WORDS as u32 - 1;
    let wanted = pc & 0xff;
    let mut base = page.position() & MASK;
    let mut rows = page.rows();
    let mut turn = 0;
    while turn < ROW_STEPS {
        turn += 1;
        let half = rows >> 1;
        let middle = (base + half) & MASK;
        if half != 0 && PackedRow(block[middle as usize]).offset() <= wanted {
            base = middle;
        }
        rows -= half;
    }
    PackedRow(block[(base & MASK) as usize])
}

/// Executable mappings that are known of one process. Those beyond are treated as code without
/// rows.
pub const MAPPINGS_MAX: usize = 512;

/// Bisections that find a mapping among [`MAPPINGS_MAX`].
const MAPPING_STEPS: u32 = 10;

const _: () = assert!(MAPPINGS_MAX < 1 << MAPPING_STEPS && MAPPINGS_MAX.is_power_of_two());

/// Values of [`ExecutableMapping::table`] that are no table.
pub mod no_table {
    /// The kernel's return trampolines for return probes.
    pub const TRAMPOLINE: u32 = u32::MAX - 1;
    /// Code without rows: made at run time, or of a file that has none.
    pub const FRAME_POINTERS: u32 = u32::MAX;
}

/// One executable mapping of a process.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExecutableMapping {
    pub start_avma: u64,
    pub length_bytes: u32,
    /// Serial number of the module's table, not 0, or one of [`no_table`].
    pub table: u32,
    /// Added to an address, makes it the [`FrameWord`] of its place in a module, whose lower half
    /// counts from the table's base address where there is a table. 0 for code of no module.
    pub shift: u64,
}

impl ExecutableMapping {
    /// [`Self::shift`] of a mapping whose first byte is at `offset` of the module.
    pub const fn shift(start_avma: u64, number: u32, offset: u32) -> u64 {
        FrameWord::of(FramePlace::Module { number, offset }).0.wrapping_sub(start_avma)
    }

    /// The offset in the module.
    #[inline(always)]
    pub const fn offset(&self, avma: u64) -> u32 {
        avma.wrapping_add(self.shift) as u32
    }

    #[inline(always)]
    pub const fn contains(&self, avma: u64) -> bool {
        avma.wrapping_sub(self.start_avma) < self.length_bytes as u64
    }
}

/// Value of the address space map.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct AddressSpace {
    pub owner: Owner,
    /// How many of the mappings are filled.
    pub count: u32,
    /// They were read when libraries had come and gone so many times
    /// ([`ProcessState::library_epoch`](crate::abi::ProcessState)). At any other time, code may be
    /// another module's than the list says.
    pub library_epoch: u32,
    /// By rising address.
    pub mappings: [ExecutableMapping; MAPPINGS_MAX],
}

const _: () = assert!(size_of::<ExecutableMapping>() == 24);
const _: () = assert!(size_of::<AddressSpace>() == 16 + 24 * MAPPINGS_MAX);

impl Default for AddressSpace {
    fn default() -> Self {
        let mappings = [ExecutableMapping::default(); MAPPINGS_MAX];
        Self { owner: Owner::default(), count: 0, library_epoch: 0, mappings }
    }
}

impl AddressSpace {
    /// Position of the mapping that an address is in. `likely` is looked at first.
    #[inline(always)]
    pub fn find(&self, avma: u64, likely: u32) -> Option<u32> {
        const MASK: u32 = MAPPINGS_MAX as u32 - 1;
        if self.mappings[(likely & MASK) as usize].contains(avma) {
            return Some(likely & MASK);
        }
        let mut base = 0;
        let mut count = self.count;
        let mut turn = 0;
        while turn < MAPPING_STEPS {
            turn += 1;
            let half = count >> 1;
            let middle = (base + half) & MASK;
            if half != 0 && self.mappings[middle as usize].start_avma <= avma {
                base = middle;
            }
            count -= half;
        }
        let found = base & MASK;
        self.mappings[found as usize].contains(avma).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_turns_an_address_into_a_place_in_its_module() {
        let start_avma = 0x7f12_3456_7000;
        let mapping = ExecutableMapping {
            start_avma,
            length_bytes: 0x2000,
            table: 5,
            shift: ExecutableMapping::shift(start_avma, 77, 0x1000),
        };
        let avma = start_avma + 0x1234;
        assert_eq!(mapping.offset(avma), 0x2234);
        let word = FrameWord(avma.wrapping_add(mapping.shift));
        assert_eq!(word.place(), FramePlace::Module { number: 77, offset: 0x2234 });
    }
}
