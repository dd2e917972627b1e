//! Names from `.symtab`, `.dynsym` and the packed symbol table in `.gnu_debugdata`.
//!
//! Addresses and sizes are kept, names stay in the file until somebody asks for them: node's names
//! alone are 12 MB.

use std::cmp::Reverse;
use std::io::{self, Write};
use std::sync::Arc;

use object::elf;

use super::demangle::{NAME_MAX_BYTES, without_version};
use crate::elf::image::{Fields, Image, ImageError, Source};

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
const UNPACKED_MAX_BYTES: u64 = 64 << 20;

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
    let mut plain = Vec::new();
    let size = xz_size(&packed).ok_or(ImageError::Damaged(".gnu_debugdata is no xz file"))?;
    if size > UNPACKED_MAX_BYTES {
        return Err(ImageError::TooLarge {
            what: "unpacked .gnu_debugdata".to_owned(),
            size_bytes: size,
            limit_bytes: UNPACKED_MAX_BYTES,
        });
    }
    lzma_rs::xz_decompress(&mut packed.as_slice(), &mut Bounded(&mut plain))
        .map_err(|_| ImageError::Damaged(".gnu_debugdata cannot be unpacked"))?;
    Image::open(Source::Memory(Arc::from(plain))).map(Some)
}

struct Bounded<'a>(&'a mut Vec<u8>);

impl Write for Bounded<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() as u64 + bytes.len() as u64 > UNPACKED_MAX_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How large an xz file will be, by the headers of its LZMA2 chunks. The decoder holds a block
/// whole before it hands it on, so a bomb must be recognised before. `None` for what the decoder
/// would refuse, too. (The .xz File Format, sections 2 and 3; LZMA2 chunks as in XZ Embedded.)
fn xz_size(file: &[u8]) -> Option<u64> {
    const STREAM_HEADER_BYTES: usize = 12;
    const CHECK_BYTES: [usize; 16] = [0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64];
    if !file.starts_with(b"\xfd7zXZ\0") {
        return None;
    }
    let check_bytes = *CHECK_BYTES.get(usize::from(file.get(7)? & 0xf))?;
    let mut at = STREAM_HEADER_BYTES;
    let mut total = 0u64;
    loop {
        let header_size = usize::from(*file.get(at)?);
        if header_size == 0 {
            // The decoder adds 1 to the footer's size of the index.
            let index_size = file.get(file.len().checked_sub(8)?..)?.first_chunk()?;
            return (u32::from_le_bytes(*index_size) < u32::MAX >> 2).then_some(total);
        }
        let block = at;
        at += (header_size + 1) * 4;
        loop {
            let control = *file.get(at)?;
            let size = |offset: usize| -> Option<u64> {
                let bytes = file.get(at + offset..)?.first_chunk()?;
                Some(u64::from(u16::from_be_bytes(*bytes)) + 1)
            };
            let (plain, packed, header) = match control {
                0 => break,
                1 | 2 => (size(1)?, size(1)?, 3),
                3..0x80 => return None,
                0x80.. => (
                    (u64::from(control & 0x1f) << 16) + size(1)?,
                    size(3)?,
                    if control >= 0xc0 { 6 } else { 5 },
                ),
            };
            total = total.checked_add(plain)?;
            at = at.checked_add(header + packed as usize)?;
        }
        at += 1;
        at = block + (at - block).checked_next_multiple_of(4)? + check_bytes;
    }
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

    #[test]
    fn the_size_of_an_xz_file_is_known_before_it_is_unpacked() {
        for size in [0, 1, 5_000, 3_000_000] {
            let mut packed = Vec::new();
            let plain = vec![7u8; size];
            lzma_rs::xz_compress(&mut plain.as_slice(), &mut packed).expect("packed");
            assert_eq!(xz_size(&packed), Some(size as u64));
        }
    }

    proptest::proptest! {
        #[test]
        fn damaged_xz_files_do_no_harm(position in 0usize..400, byte: u8) {
            let plain: Vec<u8> = (0..3000u32).map(|n| (n % 251) as u8).collect();
            let mut packed = Vec::new();
            lzma_rs::xz_compress(&mut plain.as_slice(), &mut packed).expect("packed");
            if let Some(at) = packed.len().checked_sub(position + 1) {
                packed[at] = byte;
            }
            if let Some(size) = xz_size(&packed) && size < UNPACKED_MAX_BYTES {
                let mut out = Vec::new();
                let _ = lzma_rs::xz_decompress(&mut packed.as_slice(), &mut Bounded(&mut out));
                proptest::prop_assert!(out.len() as u64 <= size);
            }
        }
    }
}
