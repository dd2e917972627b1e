//! Names from `.symtab`, `.dynsym` and the packed symbol table in `.gnu_debugdata`.
//!
//! Addresses and sizes are kept, names stay in the file until somebody asks for them: node's names
//! alone are 12 MB.

use std::cmp::Reverse;
use std::sync::Arc;

use object::elf;

use super::demangle::{NAME_MAX_BYTES, without_version};
use crate::elf::image::{Fields, Image, ImageError, Source};
use crate::elf::mini_debug::{self, MiniDebugError};

const SYMBOL_BYTES: u64 = 24;
/// 4 million symbols, twice what the largest browsers have.
const TABLE_MAX_BYTES: u64 = 96 << 20;
/// A whole number of symbols.
const CHUNK_BYTES: u64 = 8192 * SYMBOL_BYTES;
/// How far to look back for a symbol that is large enough to reach the address.
const LOOK_BACK: usize = 256;
/// Names compared when several symbols share an address.
const ALIASES_MAX: usize = 64;

const PACKED_MAX_BYTES: u64 = 16 << 20;

#[derive(Debug, Clone, Copy)]
struct Symbol {
    svma: u64,
    size_bytes: u64,
    name_offset: u32,
    /// Lower is better; see [`rank`].
    rank: u8,
}

/// The function symbols of one table, sorted by address.
#[derive(Debug)]
pub struct SymbolTable {
    symbols: Vec<Symbol>,
    /// Begin and end of the string table in the file.
    names: (u64, u64),
}

/// A symbol that an address belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    pub svma: u64,
    /// As the table spells it, without a version.
    pub name: String,
}

impl SymbolTable {
    /// Reads the table of the section `name`; `None` when the file has none.
    pub fn read(image: &Image, name: &str) -> Result<Option<SymbolTable>, ImageError> {
        let Some(section) = image.section(name) else {
            return Ok(None);
        };
        if section.size_bytes > TABLE_MAX_BYTES {
            return Err(ImageError::TooLarge {
                what: section.name.clone(),
                size_bytes: section.size_bytes,
                limit_bytes: TABLE_MAX_BYTES,
            });
        }
        let strings = image
            .sections()
            .get(section.link as usize)
            .ok_or(ImageError::Damaged("a symbol table has no string table"))?;
        let names = (
            strings.offset,
            strings.offset.saturating_add(strings.size_bytes).min(image.len_bytes()),
        );

        let mut symbols = Vec::new();
        let end = section.size_bytes - section.size_bytes % SYMBOL_BYTES;
        let mut at = 0;
        while at < end {
            let count = (end - at).min(CHUNK_BYTES);
            let offset = section
                .offset
                .checked_add(at)
                .ok_or(ImageError::Damaged("a symbol table lies nowhere"))?;
            let chunk = image.bytes(&section.name, offset, count, CHUNK_BYTES)?;
            symbols.extend(
                chunk
                    .chunks_exact(SYMBOL_BYTES as usize)
                    .filter_map(|bytes| function(image, &Fields(bytes))),
            );
            at += count;
        }
        symbols.shrink_to_fit();
        symbols
            .sort_unstable_by_key(|symbol| (symbol.svma, Reverse(symbol.size_bytes), symbol.rank));
        Ok(Some(SymbolTable { symbols, names }))
    }

    /// The function that holds `svma`. A symbol of known size names nothing beyond its end; one of
    /// size 0 names what follows it in its section, up to the next symbol.
    pub fn find(&self, image: &Image, svma: u64) -> Option<Match> {
        let after = self.symbols.partition_point(|symbol| symbol.svma <= svma);
        let before = self.symbols.get(..after)?;
        let holder = before
            .iter()
            .rev()
            .take(LOOK_BACK)
            .find(|symbol| svma - symbol.svma < symbol.size_bytes)
            .or_else(|| {
                // The largest of an address comes first: when that one is 0, all are.
                let nearest = before.last()?.svma;
                let first = before.partition_point(|symbol| symbol.svma < nearest);
                let label = before.get(first)?;
                (label.size_bytes == 0 && same_section(image, label.svma, svma)).then_some(label)
            })?;
        let first = before.partition_point(|symbol| symbol.svma < holder.svma);
        let aliases = before.get(first..)?.iter().take(ALIASES_MAX);
        let (_, name) = aliases
            .take_while(|alias| alias.svma == holder.svma)
            .filter(|alias| alias.size_bytes == 0 || svma - alias.svma < alias.size_bytes)
            .filter_map(|alias| Some((alias, self.name(image, alias)?)))
            .min_by(|(a, a_name), (b, b_name)| {
                (a.size_bytes == 0, a.rank)
                    .cmp(&(b.size_bytes == 0, b.rank))
                    .then_with(|| plainness(a_name).cmp(&plainness(b_name)))
            })?;
        Some(Match { svma: holder.svma, name })
    }

    fn name(&self, image: &Image, symbol: &Symbol) -> Option<String> {
        let (begin, end) = self.names;
        let offset = begin.checked_add(u64::from(symbol.name_offset))?;
        let name = image.string_at(offset, end, NAME_MAX_BYTES)?;
        let name = String::from_utf8_lossy(&name);
        // Mapping symbols ($x) and assembler labels (.L5) name no function.
        if name.is_empty() || name.starts_with('$') || name.starts_with(".L") {
            return None;
        }
        Some(without_version(&name).to_owned())
    }

    /// What the index occupies, for whoever keeps several.
    pub fn size_bytes(&self) -> usize {
        self.symbols.len() * size_of::<Symbol>()
    }
}

/// Order of names for one function: the one that people call it by comes first (`malloc` before
/// `__libc_malloc`, `free` before `cfree`).
pub(super) fn plainness(name: &str) -> (usize, usize, &str) {
    let underscores = name.len() - name.trim_start_matches('_').len();
    (underscores, name.len(), name)
}

fn function(image: &Image, fields: &Fields) -> Option<Symbol> {
    let info = fields.u32(4) as u8;
    let section = fields.u16(6);
    let svma = fields.u64(8);
    let rank = rank(elf::SymbolType(info & 0xf), elf::SymbolBind(info >> 4))?;
    // Undefined, absolute and common symbols have no section: they are no code of this file.
    let is_code =
        image.sections().get(usize::from(section)).is_some_and(|section| section.is_code());
    is_code.then_some(Symbol { svma, size_bytes: fields.u64(16), name_offset: fields.u32(0), rank })
}

fn rank(kind: elf::SymbolType, bind: elf::SymbolBind) -> Option<u8> {
    let kind = match kind {
        elf::STT_FUNC | elf::STT_GNU_IFUNC => 0,
        elf::STT_NOTYPE => 2,
        _ => return None,
    };
    // A weak name is as public as a global one: glibc's `malloc` is global, its `write` is weak.
    let bind = match bind {
        elf::STB_LOCAL => 1,
        _ => 0,
    };
    Some(kind + bind)
}

fn same_section(image: &Image, a: u64, b: u64) -> bool {
    image
        .sections()
        .iter()
        .any(|section| section.is_code() && section.contains(a) && section.contains(b))
}

/// The ELF file that Fedora and others pack into `.gnu_debugdata`: the function symbols that
/// stripping removed. `None` when there is none.
pub fn packed_image(image: &Image) -> Result<Option<Image>, ImageError> {
    let Some(section) = image.section(".gnu_debugdata") else {
        return Ok(None);
    };
    let packed = image.contents(section, PACKED_MAX_BYTES)?;
    let plain = mini_debug::unpack(&packed).map_err(|error| match error {
        MiniDebugError::TooLarge => {
            ImageError::Damaged(".gnu_debugdata unpacks to more than 64 MiB")
        }
        MiniDebugError::NotXz => ImageError::Damaged(".gnu_debugdata is no xz file"),
        MiniDebugError::Corrupt(_) => ImageError::Damaged(".gnu_debugdata cannot be unpacked"),
    })?;
    Image::open(Source::Memory(Arc::from(plain))).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_that_people_use_comes_first() {
        let mut names = ["__libc_malloc", "__malloc", "malloc", "cfree"];
        names.sort_by_key(|name| plainness(name));
        assert_eq!(names, ["cfree", "malloc", "__malloc", "__libc_malloc"]);
        assert!(plainness("free") < plainness("cfree"));
    }
}
