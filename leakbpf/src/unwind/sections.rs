//! Where a file keeps its call frame information.

use gimli::{BaseAddresses, EhFrameHdr, LittleEndian, Pointer};
use object::elf;

use crate::elf::image::{Image, ImageError, Segment};

/// Most bytes of call frame information that are read from one section. libLLVM, with 66 MB of code,
/// has 7 MB.
const FRAMES_MAX_BYTES: u64 = 128 << 20;

/// The header, its table of functions included, is read only for its first fields.
const HEADER_BYTES: u64 = 64;

/// Which section rows come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    EhFrame,
    /// `.eh_frame` of a file without section headers, through `PT_GNU_EH_FRAME`.
    EhFrameSegment,
    DebugFrame,
}

impl Origin {
    pub const fn name(self) -> &'static str {
        match self {
            Self::EhFrame => ".eh_frame",
            Self::EhFrameSegment => ".eh_frame by program header",
            Self::DebugFrame => ".debug_frame",
        }
    }
}

/// Bytes of call frame information and the address that they are loaded at.
#[derive(Debug)]
pub(super) struct Frames {
    pub origin: Origin,
    pub bytes: Vec<u8>,
    pub bases: BaseAddresses,
}

/// All call frame information of a file, best first.
pub(super) fn frames(image: &Image) -> Result<Vec<Frames>, ImageError> {
    let mut found = Vec::new();
    // A separate debug file has the section without its contents, and its program headers do not
    // describe it.
    if image.sections().iter().any(|section| section.name == ".eh_frame") {
        if let Some(section) = image.section(".eh_frame") {
            let bytes = image.contents(section, FRAMES_MAX_BYTES)?;
            let bases = bases(image).set_eh_frame(section.address);
            found.push(Frames { origin: Origin::EhFrame, bytes, bases });
        }
    } else if let Some(segment) = eh_frame_segment(image)? {
        found.push(segment);
    }
    let debug_frame = image.section(".debug_frame").or_else(|| image.section(".zdebug_frame"));
    if let Some(section) = debug_frame {
        let bytes = image.contents(section, FRAMES_MAX_BYTES)?;
        found.push(Frames { origin: Origin::DebugFrame, bytes, bases: bases(image) });
    }
    Ok(found)
}

/// Pointers relative to text or data do not occur on x86-64; with bases, they cost no function.
fn bases(image: &Image) -> BaseAddresses {
    let address = |name| image.section(name).map_or(0, |section| section.address);
    BaseAddresses::default().set_text(address(".text")).set_got(address(".got"))
}

fn eh_frame_segment(image: &Image) -> Result<Option<Frames>, ImageError> {
    let Some(segment) =
        image.segments().iter().find(|segment| segment.kind == elf::PT_GNU_EH_FRAME.0)
    else {
        return Ok(None);
    };
    let size = segment.file_bytes.min(HEADER_BYTES);
    let header = image.bytes(".eh_frame_hdr", segment.offset, size, HEADER_BYTES)?;
    let bases = bases(image).set_eh_frame_hdr(segment.address);
    let header = EhFrameHdr::new(&header, LittleEndian)
        .parse(&bases, 8)
        .map_err(|_| ImageError::Damaged("odd .eh_frame_hdr"))?;
    let Pointer::Direct(address) = header.eh_frame_ptr() else {
        return Err(ImageError::Damaged("odd .eh_frame_hdr"));
    };
    let Some((offset, rest)) = image.segments().iter().find_map(|load| load_rest(load, address))
    else {
        return Err(ImageError::Damaged("its .eh_frame lies outside of its segments"));
    };
    // Its length is stated nowhere: it ends with a zero entry, or where no entry can be read.
    let size = rest.min(FRAMES_MAX_BYTES).min(image.len_bytes().saturating_sub(offset));
    let bytes = image.bytes(".eh_frame", offset, size, FRAMES_MAX_BYTES)?;
    let bases = bases.set_eh_frame(address);
    Ok(Some(Frames { origin: Origin::EhFrameSegment, bytes, bases }))
}

/// The file offset of `address`, and how many bytes of the segment follow.
fn load_rest(load: &Segment, address: u64) -> Option<(u64, u64)> {
    let into = address.checked_sub(load.address)?;
    let rest = load.file_bytes.checked_sub(into).filter(|&rest| rest > 0)?;
    (load.kind == elf::PT_LOAD.0).then_some(())?;
    Some((load.offset.checked_add(into)?, rest))
}
