//! The vDSO: code that the kernel maps into every process, and that is in no file.

use std::sync::Arc;

use crate::elf::image::{Fields, Image, Source};

/// The kernel's images are one or two pages of text; more than this is none.
const IMAGE_MAX_BYTES: u64 = 1 << 20;

/// Our own vDSO's bytes, the same as every 64-bit process's on this kernel; `None` where the
/// kernel maps none (`vdso=0`).
pub fn image_bytes() -> Option<Arc<[u8]>> {
    // SAFETY: getauxval reads the auxiliary vector and has no other effect.
    let address = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    if address == 0 {
        return None;
    }
    // SAFETY: the kernel mapped a whole ELF file at this address (vdso(7)), for the life of the
    // process, and nothing writes to it. A file header is smaller than the first page.
    let header = unsafe { std::slice::from_raw_parts(address as *const u8, 64) };
    let fields = Fields(header);
    let sections = u64::from(fields.u16(0x3a)) * u64::from(fields.u16(0x3c));
    // The section headers are the last thing in the image (arch/x86/entry/vdso: the image is
    // stripped, then padded to whole pages).
    let len = fields.u64(0x28).checked_add(sections)?;
    if len > IMAGE_MAX_BYTES || !header.starts_with(b"\x7fELF") {
        return None;
    }
    // SAFETY: as above; the length is the image's own.
    let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, len as usize) };
    let bytes: Arc<[u8]> = bytes.into();
    Image::open(Source::Memory(bytes.clone())).ok()?;
    Some(bytes)
}
