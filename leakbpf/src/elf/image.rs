//! One ELF file of another process, read piece by piece.
//!
//! Nothing is memory-mapped: a process can truncate its own files, and touching the lost pages of
//! a mapping would end the reader with SIGBUS. Ownership by root does not help, since root inside a
//! container is often root outside. Nothing is read whole either: only the sections that somebody
//! asks for, each up to a limit that the asker names.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use object::elf;
use object::{CompressedData, CompressionFormat};

use super::file::section_name;

/// Section headers looked at; files that are linked have some dozens. They stay in memory for as long
/// as the module is known.
const SECTIONS_MAX: u64 = 1 << 14;
const SEGMENTS_MAX: u64 = 1 << 10;
const SECTION_NAMES_MAX_BYTES: u64 = 4 << 20;
const NOTES_MAX_BYTES: u64 = 1 << 16;
/// The longest build ids in use are 32 bytes (SHA-256).
const BUILD_ID_MAX_BYTES: usize = 64;

const FILE_HEADER_BYTES: u64 = 64;
const SECTION_HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;

/// Why an ELF file, or a part of it, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error("is not a 64-bit little-endian ELF file")]
    NotElf,
    #[error("is a damaged ELF file: {0}")]
    Damaged(&'static str),
    #[error("has a {what} of {size_bytes} bytes, more than the {limit_bytes} that are read")]
    TooLarge { what: String, size_bytes: u64, limit_bytes: u64 },
}

/// Where the bytes of a file come from.
#[derive(Debug)]
pub enum Source {
    File(File),
    /// For what is no file: the vDSO, an unpacked `.gnu_debugdata`.
    Memory(Arc<[u8]>),
}

impl Source {
    pub(crate) fn len(&self) -> io::Result<u64> {
        match self {
            Source::File(file) => Ok(file.metadata()?.len()),
            Source::Memory(bytes) => Ok(bytes.len() as u64),
        }
    }

    /// Reads what there is from `offset` on, at most `buffer.len()` bytes.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            Source::File(file) => loop {
                match file.read_at(buffer, offset) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    result => return result,
                }
            },
            Source::Memory(bytes) => {
                let rest = usize::try_from(offset)
                    .ok()
                    .and_then(|offset| bytes.get(offset..))
                    .unwrap_or_default();
                let count = rest.len().min(buffer.len());
                buffer[..count].copy_from_slice(&rest[..count]);
                Ok(count)
            }
        }
    }

    fn read_exact_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            let count = self.read_at(buffer, offset)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffer = &mut buffer[count..];
            offset = offset.saturating_add(count as u64);
        }
        Ok(())
    }
}

/// A section header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    pub name: String,
    /// `SHT_*`.
    pub kind: u32,
    /// `SHF_*`.
    pub flags: u64,
    /// SVMA; 0 when the section is not loaded.
    pub address: u64,
    pub offset: u64,
    pub size_bytes: u64,
    pub link: u32,
}

impl Section {
    /// Does the section hold machine code?
    pub fn is_code(&self) -> bool {
        self.flags & elf::SHF_EXECINSTR.0 != 0
    }

    pub fn contains(&self, svma: u64) -> bool {
        svma >= self.address && svma - self.address < self.size_bytes
    }
}

/// A program header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// `PT_*`.
    pub kind: u32,
    /// `PF_*`.
    pub flags: u32,
    pub offset: u64,
    /// SVMA.
    pub address: u64,
    /// Bytes that come from the file.
    pub file_bytes: u64,
}

impl Segment {
    pub fn is_code(&self) -> bool {
        self.kind == elf::PT_LOAD.0 && self.flags & elf::PF_X.0 != 0
    }
}

/// An opened ELF file whose headers have been read.
#[derive(Debug)]
pub struct Image {
    source: Source,
    len_bytes: u64,
    /// `EM_*`.
    machine: u16,
    segments: Vec<Segment>,
    sections: Vec<Section>,
    /// Offset and size of each `PT_NOTE`.
    note_segments: Vec<(u64, u64)>,
}

impl Image {
    /// Reads the headers of `source`.
    pub fn open(source: Source) -> Result<Image, ImageError> {
        let len_bytes = source.len()?;
        let mut image = Image {
            source,
            len_bytes,
            machine: 0,
            segments: Vec::new(),
            sections: Vec::new(),
            note_segments: Vec::new(),
        };
        if len_bytes < FILE_HEADER_BYTES {
            return Err(ImageError::NotElf);
        }
        let header = image.bytes("file header", 0, FILE_HEADER_BYTES, FILE_HEADER_BYTES)?;
        if !header.starts_with(&elf::ELFMAG)
            || header.get(4) != Some(&elf::ELFCLASS64.0)
            || header.get(5) != Some(&elf::ELFDATA2LSB.0)
        {
            return Err(ImageError::NotElf);
        }
        let header = Fields(&header);
        image.machine = header.u16(0x12);
        image.read_segments(header.u64(0x20), header.u16(0x36), header.u16(0x38))?;
        image.read_sections(
            header.u64(0x28),
            header.u16(0x3a),
            header.u16(0x3c),
            header.u16(0x3e),
        )?;
        Ok(image)
    }

    fn read_segments(
        &mut self,
        offset: u64,
        entry_bytes: u16,
        count: u16,
    ) -> Result<(), ImageError> {
        if offset == 0 || count == 0 {
            return Ok(());
        }
        if u64::from(entry_bytes) != PROGRAM_HEADER_BYTES || u64::from(count) > SEGMENTS_MAX {
            return Err(ImageError::Damaged("odd program headers"));
        }
        let size = u64::from(count) * PROGRAM_HEADER_BYTES;
        let table = self.bytes("program header table", offset, size, size)?;
        for segment in table.chunks_exact(PROGRAM_HEADER_BYTES as usize).map(Fields) {
            if segment.u32(0) == elf::PT_NOTE.0 {
                self.note_segments.push((segment.u64(0x08), segment.u64(0x20)));
            }
            self.segments.push(Segment {
                kind: segment.u32(0),
                flags: segment.u32(0x04),
                offset: segment.u64(0x08),
                address: segment.u64(0x10),
                file_bytes: segment.u64(0x20),
            });
        }
        Ok(())
    }

    fn read_sections(
        &mut self,
        offset: u64,
        entry_bytes: u16,
        count: u16,
        names_index: u16,
    ) -> Result<(), ImageError> {
        if offset == 0 {
            return Ok(());
        }
        if u64::from(entry_bytes) != SECTION_HEADER_BYTES {
            return Err(ImageError::Damaged("odd section headers"));
        }
        let first =
            self.bytes("section header", offset, SECTION_HEADER_BYTES, SECTION_HEADER_BYTES)?;
        // Numbers that do not fit the file header are in the first section header (ELF gABI).
        let count = match count {
            0 => Fields(&first).u64(0x20),
            count => u64::from(count),
        };
        let names_index = match names_index {
            0xffff => Fields(&first).u32(0x28),
            index => u32::from(index),
        };
        if count > SECTIONS_MAX {
            return Err(ImageError::Damaged("too many sections"));
        }
        let size = count * SECTION_HEADER_BYTES;
        let table = self.bytes("section header table", offset, size, size)?;
        let mut name_offsets = Vec::new();
        for header in table.chunks_exact(SECTION_HEADER_BYTES as usize).map(Fields) {
            name_offsets.push(header.u32(0));
            self.sections.push(Section {
                name: String::new(),
                kind: header.u32(0x04),
                flags: header.u64(0x08),
                address: header.u64(0x10),
                offset: header.u64(0x18),
                size_bytes: header.u64(0x20),
                link: header.u32(0x28),
            });
        }
        let names = match self.sections.get(names_index as usize) {
            Some(names) => self.bytes(
                "section name table",
                names.offset,
                names.size_bytes,
                SECTION_NAMES_MAX_BYTES,
            )?,
            None => Vec::new(),
        };
        for (section, offset) in self.sections.iter_mut().zip(name_offsets) {
            // Cut: names that many sections share must not multiply a hostile table's size.
            section.name = String::from_utf8_lossy(section_name(&names, offset)).into_owned();
        }
        Ok(())
    }

    /// `EM_*`.
    pub fn machine(&self) -> u16 {
        self.machine
    }

    /// In the file's order. Those of a separate debug file are its origin's.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The first section of that name that has contents.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections
            .iter()
            .find(|section| section.name == name && section.kind != elf::SHT_NOBITS.0)
    }

    /// `None` for what is no file.
    pub fn file(&self) -> Option<&File> {
        match &self.source {
            Source::File(file) => Some(file),
            Source::Memory(_) => None,
        }
    }

    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Bytes of the file; `what` is for the error.
    pub fn bytes(
        &self,
        what: &str,
        offset: u64,
        size_bytes: u64,
        limit_bytes: u64,
    ) -> Result<Vec<u8>, ImageError> {
        if size_bytes > limit_bytes {
            return Err(ImageError::TooLarge { what: what.to_owned(), size_bytes, limit_bytes });
        }
        if offset.checked_add(size_bytes).is_none_or(|end| end > self.len_bytes) {
            return Err(ImageError::Damaged("a part lies beyond the end of the file"));
        }
        let mut bytes = vec![0; size_bytes as usize];
        self.source.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// The contents of a section, decompressed; neither form may be larger than `limit_bytes`.
    pub fn contents(&self, section: &Section, limit_bytes: u64) -> Result<Vec<u8>, ImageError> {
        let mut bytes =
            self.bytes(&section.name, section.offset, section.size_bytes, limit_bytes)?;
        let (format, size, header_bytes) = if section.flags & elf::SHF_COMPRESSED.0 != 0 {
            let header = Fields(&bytes);
            let format = match elf::CompressionType(header.u32(0)) {
                elf::ELFCOMPRESS_ZLIB => CompressionFormat::Zlib,
                elf::ELFCOMPRESS_ZSTD => CompressionFormat::Zstandard,
                _ => return Err(ImageError::Damaged("unknown compression")),
            };
            (format, header.u64(8), 24)
        } else if section.name.starts_with(".zdebug_") && bytes.starts_with(b"ZLIB") {
            let size = bytes.get(4..12).and_then(|size| size.try_into().ok());
            (CompressionFormat::Zlib, size.map_or(0, u64::from_be_bytes), 12)
        } else {
            return Ok(bytes);
        };
        if size > limit_bytes {
            return Err(ImageError::TooLarge {
                what: section.name.clone(),
                size_bytes: size,
                limit_bytes,
            });
        }
        bytes.drain(..header_bytes.min(bytes.len()));
        let compressed = CompressedData { format, data: &bytes, uncompressed_size: size };
        match compressed.decompress() {
            Ok(plain) => Ok(plain.into_owned()),
            Err(_) => Err(ImageError::Damaged("a section cannot be decompressed")),
        }
    }

    /// The zero-terminated string at `offset` in the file; `None` when it is longer than
    /// `limit_bytes` or runs beyond `end`.
    pub fn string_at(&self, offset: u64, end: u64, limit_bytes: usize) -> Option<Vec<u8>> {
        let mut string = Vec::new();
        let mut chunk = [0; 256];
        let mut at = offset;
        while at < end && string.len() <= limit_bytes {
            let want = (end - at).min(chunk.len() as u64) as usize;
            let count = self.source.read_at(chunk.get_mut(..want)?, at).ok()?;
            let part = chunk.get(..count)?;
            if let Some(length) = part.iter().position(|&byte| byte == 0) {
                string.extend_from_slice(part.get(..length)?);
                return (string.len() <= limit_bytes).then_some(string);
            }
            if count == 0 {
                return None;
            }
            string.extend_from_slice(part);
            at = at.checked_add(count as u64)?;
        }
        None
    }

    /// The GNU build id, when there is one.
    pub fn build_id(&self) -> Option<Vec<u8>> {
        let sections = self
            .sections
            .iter()
            .filter(|section| section.kind == elf::SHT_NOTE.0)
            .map(|section| (section.offset, section.size_bytes));
        // A separate debug file keeps the program headers of its origin, with offsets that mean
        // nothing in it: its sections come first.
        sections.chain(self.note_segments.iter().copied()).take(SEGMENTS_MAX as usize).find_map(
            |(offset, size)| {
                let notes = self.bytes("note", offset, size, NOTES_MAX_BYTES).ok()?;
                build_id_note(&notes)
            },
        )
    }
}

fn build_id_note(mut notes: &[u8]) -> Option<Vec<u8>> {
    while notes.len() >= 12 {
        let header = Fields(notes);
        let name_bytes = header.u32(0) as usize;
        let desc_bytes = header.u32(4) as usize;
        let kind = header.u32(8);
        let desc_offset = 12usize.checked_add(name_bytes.checked_next_multiple_of(4)?)?;
        let desc = notes.get(desc_offset..desc_offset.checked_add(desc_bytes)?)?;
        if kind == elf::NT_GNU_BUILD_ID.0
            && notes.get(12..16) == Some(b"GNU\0")
            && (1..=BUILD_ID_MAX_BYTES).contains(&desc_bytes)
        {
            return Some(desc.to_vec());
        }
        let next = desc_offset.checked_add(desc_bytes.checked_next_multiple_of(4)?)?;
        notes = notes.get(next..)?;
    }
    None
}

/// Little-endian fields of a header; what lies outside reads as 0.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    fn field<const N: usize>(&self, offset: usize) -> [u8; N] {
        let bytes = self.0.get(offset..).and_then(|rest| rest.first_chunk());
        bytes.copied().unwrap_or([0; N])
    }

    pub fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.field(offset))
    }

    pub fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.field(offset))
    }

    pub fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.field(offset))
    }
}
