//! What an ELF file is, and where its bytes lie.

use std::ops::Range;

use object::Endianness;
use object::elf;
use object::elf::{FileHeader32, FileHeader64};
use object::read::ReadRef;
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader, SectionHeader, SectionTable};

/// Most program headers that are looked at; `e_phnum` of real files stays below 20.
const MAX_SEGMENTS: usize = 256;

/// Most section headers that are looked at; `-ffunction-sections` objects aside, files have some
/// dozens.
pub(super) const MAX_SECTIONS: usize = 1 << 16;

/// Longer than each name that is looked for.
const MAX_SECTION_NAME_BYTES: usize = 64;

/// Most notes that are looked at in one file. Real ones have half a dozen; a hostile one can list
/// the same megabytes of notes under each of its sections.
const MAX_NOTES: usize = 4096;

/// Why a file cannot be read as ELF.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    #[error("not an ELF file")]
    NotElf,
    #[error("malformed ELF file: {0}")]
    Malformed(#[from] object::read::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    Bits32,
    Bits64,
}

/// `e_machine`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Machine {
    X86_64,
    Aarch64,
    Other(u16),
}

/// `e_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Relocatable,
    /// At a fixed address.
    Executable,
    /// A library or a position-independent executable.
    SharedObject,
    Other(u16),
}

/// A `PT_LOAD` program header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Load {
    svma: u64,
    file_offset: u64,
    /// Bytes that come from the file; the rest of the segment is zeroes.
    file_size: u64,
    executable: bool,
}

/// An ELF file's bytes and what its headers say of them. Names are read on demand: see
/// [`ElfFile::visit_functions`](crate::elf::symbols).
#[derive(Debug, Clone)]
pub struct ElfFile<'data> {
    data: &'data [u8],
    class: Class,
    machine: Machine,
    kind: Kind,
    loads: Vec<Load>,
    dynamic: Option<Range<u64>>,
    interpreter: Option<&'data [u8]>,
    build_id: Option<&'data [u8]>,
    is_go: bool,
}

impl<'data> ElfFile<'data> {
    /// Reads the headers. A damaged section table is tolerated (the loader does not need it, so
    /// neither may we); damaged program headers are not.
    pub fn parse(data: &'data [u8]) -> Result<Self, ElfError> {
        match data.get(..5) {
            Some([0x7f, b'E', b'L', b'F', 1]) => {
                Self::parse_as::<FileHeader32<Endianness>>(data, Class::Bits32)
            }
            Some([0x7f, b'E', b'L', b'F', 2]) => {
                Self::parse_as::<FileHeader64<Endianness>>(data, Class::Bits64)
            }
            _ => Err(ElfError::NotElf),
        }
    }

    fn parse_as<Elf: FileHeader<Endian = Endianness>>(
        data: &'data [u8],
        class: Class,
    ) -> Result<Self, ElfError> {
        let header = Elf::parse(data)?;
        let endian = header.endian()?;
        let machine = match header.e_machine(endian) {
            elf::EM_X86_64 => Machine::X86_64,
            elf::EM_AARCH64 => Machine::Aarch64,
            other => Machine::Other(other.0),
        };
        let kind = match header.e_type(endian) {
            elf::ET_REL => Kind::Relocatable,
            elf::ET_EXEC => Kind::Executable,
            elf::ET_DYN => Kind::SharedObject,
            other => Kind::Other(other.0),
        };
        let mut notes_left = MAX_NOTES;
        let mut file = Self {
            data,
            class,
            machine,
            kind,
            loads: Vec::new(),
            dynamic: None,
            interpreter: None,
            build_id: None,
            is_go: false,
        };
        for segment in header.program_headers(endian, data)?.iter().take(MAX_SEGMENTS) {
            let (file_offset, file_size) = segment.file_range(endian);
            match segment.p_type(endian) {
                elf::PT_LOAD => file.loads.push(Load {
                    svma: segment.p_vaddr(endian).into(),
                    file_offset,
                    file_size,
                    executable: segment.p_flags(endian).0 & elf::PF_X.0 != 0,
                }),
                elf::PT_DYNAMIC => {
                    file.dynamic = file_offset.checked_add(file_size).map(|end| file_offset..end);
                }
                elf::PT_INTERP => {
                    file.interpreter = segment.interpreter(endian, data).ok().flatten();
                }
                elf::PT_NOTE => {
                    if let Ok(Some(notes)) = segment.notes(endian, data) {
                        file.read_notes(endian, notes, &mut notes_left);
                    }
                }
                _ => {}
            }
        }
        if let Ok(sections) = header.sections(endian, data) {
            let names = section_names(header, endian, data, &sections);
            file.read_sections(endian, &sections, names, &mut notes_left);
        }
        Ok(file)
    }

    fn read_notes<Elf: FileHeader<Endian = Endianness>>(
        &mut self,
        endian: Endianness,
        mut notes: NoteIterator<'data, Elf>,
        notes_left: &mut usize,
    ) {
        while *notes_left > 0
            && let Ok(Some(note)) = notes.next()
        {
            *notes_left -= 1;
            let note_type = note.n_type(endian);
            if note.name() == elf::ELF_NOTE_GNU && note_type == elf::NT_GNU_BUILD_ID {
                self.build_id.get_or_insert(note.desc());
            }
            // Written by Go's linker: cmd/link/internal/ld/elf.go, ELF_NOTE_GOBUILDID_TAG.
            self.is_go |= note.name() == b"Go" && note_type.0 == 4;
        }
    }

    fn read_sections<Elf: FileHeader<Endian = Endianness>>(
        &mut self,
        endian: Endianness,
        sections: &SectionTable<'data, Elf>,
        names: &'data [u8],
        notes_left: &mut usize,
    ) {
        for section in sections.iter().take(MAX_SECTIONS) {
            let name = section_name(names, section.sh_name(endian));
            self.is_go |= matches!(name, b".note.go.buildid" | b".go.buildinfo" | b".gopclntab");
            if let Ok(Some(notes)) = section.notes(endian, self.data) {
                self.read_notes(endian, notes, notes_left);
            }
        }
    }

    pub fn data(&self) -> &'data [u8] {
        self.data
    }

    pub fn class(&self) -> Class {
        self.class
    }

    pub fn machine(&self) -> Machine {
        self.machine
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The dynamic loader's path, without its terminating zero.
    pub fn interpreter(&self) -> Option<&'data [u8]> {
        self.interpreter
    }

    /// `NT_GNU_BUILD_ID`.
    pub fn build_id(&self) -> Option<&'data [u8]> {
        self.build_id
    }

    /// Linked by Go's linker; cgo may have added C functions.
    pub fn is_go(&self) -> bool {
        self.is_go
    }

    /// File range of `PT_DYNAMIC`.
    pub(crate) fn dynamic(&self) -> Option<Range<u64>> {
        self.dynamic.clone()
    }

    /// Where the first loaded segment is to begin.
    pub fn lowest_svma(&self) -> Option<u64> {
        self.loads.iter().map(|load| load.svma).min()
    }

    /// The file offset of the byte that the loader puts at `svma`, if it comes from the file.
    pub fn file_offset(&self, svma: u64) -> Option<u64> {
        self.loads.iter().find_map(|load| load.file_offset(svma))
    }

    /// As [`ElfFile::file_offset`], for an address that can be executed.
    pub fn code_offset(&self, svma: u64) -> Option<u64> {
        self.loads.iter().filter(|load| load.executable).find_map(|load| load.file_offset(svma))
    }

    /// Up to `limit` bytes of code from `svma` on; fewer at the end of the segment or of the file,
    /// none outside of code.
    pub fn code(&self, svma: u64, limit: usize) -> &'data [u8] {
        let bytes = self.loads.iter().filter(|load| load.executable).find_map(|load| {
            let start = load.file_offset(svma)?;
            let end = load.file_offset.checked_add(load.file_size)?;
            let end = end.min(self.data.len() as u64);
            self.data.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
        });
        let bytes = bytes.unwrap_or_default();
        bytes.get(..limit).unwrap_or(bytes)
    }

    /// A slice of the file, by file offset.
    pub(crate) fn bytes_at(&self, offset: u64, size: u64) -> Option<&'data [u8]> {
        self.data.read_bytes_at(offset, size).ok()
    }
}

/// The bytes that the names of sections are in.
pub(super) fn section_names<'data, Elf: FileHeader<Endian = Endianness>>(
    header: &Elf,
    endian: Endianness,
    data: &'data [u8],
    sections: &SectionTable<'data, Elf>,
) -> &'data [u8] {
    let names = || {
        let index = header.section_strings_index(endian, data).ok()?;
        sections.section(index).ok()?.data(endian, data).ok()
    };
    names().unwrap_or_default()
}

/// The name at an offset, as far as it matters. `SectionTable::section_name` looks for its end, and
/// all the sections of a hostile file can share one name that is as long as the file.
pub(super) fn section_name(names: &[u8], offset: u32) -> &[u8] {
    let rest = names.get(offset as usize..).unwrap_or_default();
    let name = rest.get(..MAX_SECTION_NAME_BYTES).unwrap_or(rest);
    name.split(|&byte| byte == 0).next().unwrap_or_default()
}

impl Load {
    fn file_offset(&self, svma: u64) -> Option<u64> {
        let into = svma.checked_sub(self.svma)?;
        if into >= self.file_size {
            return None;
        }
        self.file_offset.checked_add(into)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// A file that is a section header table and what their common name is in.
    fn with_sections(count: usize, names: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 64 + count * 64];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(0x10, &3u16.to_le_bytes()); // ET_DYN
        put(0x12, &62u16.to_le_bytes()); // EM_X86_64
        put(0x14, &1u32.to_le_bytes());
        put(0x28, &64u64.to_le_bytes()); // e_shoff
        put(0x34, &64u16.to_le_bytes());
        put(0x36, &56u16.to_le_bytes());
        put(0x3a, &64u16.to_le_bytes()); // e_shentsize
        put(0x3e, &1u16.to_le_bytes()); // e_shstrndx; their number is in the first header
        put(64 + 0x20, &(count as u64).to_le_bytes());
        put(128 + 0x04, &3u32.to_le_bytes()); // SHT_STRTAB
        put(128 + 0x18, &(64 + count as u64 * 64).to_le_bytes());
        put(128 + 0x20, &(names.len() as u64).to_le_bytes());
        file.extend(names);
        file
    }

    #[test]
    fn sections_are_told_by_their_names() {
        assert!(ElfFile::parse(&with_sections(3, b".gopclntab\0")).unwrap().is_go());
        assert!(!ElfFile::parse(&with_sections(3, b".gopclntab2\0")).unwrap().is_go());
    }

    #[test]
    fn an_image_keeps_little_of_each_of_many_sections() {
        use crate::elf::image::{Image, Source};
        let open = |count| {
            let file = with_sections(count, &vec![b'x'; 1 << 20]);
            Image::open(Source::Memory(file.into()))
        };
        let image = open(1 << 14).unwrap();
        let bytes: usize =
            image.sections().iter().map(|section| size_of_val(section) + section.name.len()).sum();
        assert!(bytes <= 3 << 20, "{bytes} bytes");
        assert!(open(1 + (1 << 14)).is_err());
    }

    #[test]
    fn a_name_as_long_as_the_file_is_not_read_for_each_section() {
        let file = with_sections(100_000, &vec![b'x'; 8 << 20]);
        let start = Instant::now();
        let file = ElfFile::parse(&file).unwrap();
        file.visit_functions(&mut |_| {});
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}
