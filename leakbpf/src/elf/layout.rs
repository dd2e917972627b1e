//! Where the bytes of a file come to lie: `PT_LOAD` program headers, and nothing else of the file.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use object::{
    Endianness, elf,
    read::elf::{FileHeader as _, ProgramHeader as _},
};

/// Program headers that are read; files have about a dozen.
const MAX_SEGMENTS: usize = 1024;

const PROGRAM_HEADER_BYTES: usize = size_of::<elf::ProgramHeader64<Endianness>>();

/// The loaded segments of a 64-bit file: file offset, size in the file, and stated address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    loads: Vec<(u64, u64, u64)>,
}

impl Layout {
    pub fn of_file(file: &File) -> io::Result<Self> {
        Self::read(|buffer, offset| file.read_at(buffer, offset))
    }

    pub fn of_bytes(bytes: &[u8]) -> io::Result<Self> {
        Self::read(|buffer, offset| {
            let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
            let rest = rest.unwrap_or_default();
            let count = rest.len().min(buffer.len());
            if let (Some(to), Some(from)) = (buffer.get_mut(..count), rest.get(..count)) {
                to.copy_from_slice(from);
            }
            Ok(count)
        })
    }

    /// `read` fills a buffer from an offset on, as far as there is something.
    fn read(read: impl Fn(&mut [u8], u64) -> io::Result<usize>) -> io::Result<Self> {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "not a 64-bit ELF file");
        let mut header = [0; size_of::<elf::FileHeader64<Endianness>>()];
        read(&mut header, 0)?;
        let (offset, count) = {
            let header =
                elf::FileHeader64::<Endianness>::parse(&header[..]).map_err(|_| damaged())?;
            let endian = header.endian().map_err(|_| damaged())?;
            (header.e_phoff(endian), usize::from(header.e_phnum(endian)).min(MAX_SEGMENTS))
        };
        // Laid out as if the headers followed the file's: that is how the parser wants them.
        let mut bytes = header.to_vec();
        bytes.resize(header.len() + count * PROGRAM_HEADER_BYTES, 0);
        let (_, segments) = bytes.split_at_mut(header.len());
        read(segments, offset)?;
        let endian = elf::FileHeader64::<Endianness>::parse(&header[..])
            .and_then(elf::FileHeader64::<Endianness>::endian)
            .map_err(|_| damaged())?;
        let segments: &[elf::ProgramHeader64<Endianness>] =
            object::pod::slice_from_all_bytes(segments).map_err(|()| damaged())?;
        let loads = segments
            .iter()
            .filter(|segment| segment.p_type(endian) == elf::PT_LOAD)
            .map(|segment| {
                (segment.p_offset(endian), segment.p_filesz(endian), segment.p_vaddr(endian))
            })
            .collect();
        Ok(Self { loads })
    }

    /// The address that the file states for the byte at `file_offset`.
    ///
    /// Mappings are made of whole pages, so that the end of one segment's file part can be mapped
    /// as the beginning of the next one; the segment that really holds the byte is preferred.
    pub fn svma(&self, file_offset: u64) -> Option<u64> {
        self.loads.iter().find_map(|&(offset, size, svma)| {
            let inside = file_offset.checked_sub(offset).filter(|&inside| inside < size)?;
            svma.checked_add(inside)
        })
    }

    /// Where the file holds the byte at an address that it states.
    pub fn file_offset(&self, svma: u64) -> Option<u64> {
        self.loads.iter().find_map(|&(offset, size, start)| {
            let inside = svma.checked_sub(start).filter(|&inside| inside < size)?;
            offset.checked_add(inside)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_program_states_its_own_addresses() {
        let path = std::env::current_exe().expect("a path");
        let bytes = std::fs::read(&path).expect("readable");
        let of_bytes = Layout::of_bytes(&bytes).expect("an ELF file");
        let of_file = Layout::of_file(&File::open(&path).expect("readable")).expect("an ELF file");
        assert_eq!(of_bytes, of_file);
        assert_eq!(of_file.svma(0), Some(0));
        let code = of_file
            .loads
            .iter()
            .find(|(offset, _, svma)| offset != svma)
            .expect("a shifted segment");
        assert_eq!(of_file.svma(code.0 + 5), Some(code.2 + 5));
        assert_eq!(of_file.svma(u64::MAX), None);
        assert_eq!(of_file.file_offset(code.2 + 5), Some(code.0 + 5));
        assert_eq!(of_file.file_offset(u64::MAX), None);
    }

    #[test]
    fn what_is_no_elf_file_is_refused() {
        assert!(Layout::of_bytes(b"").is_err());
        assert!(Layout::of_bytes(&[0x7f; 200]).is_err());
    }
}
