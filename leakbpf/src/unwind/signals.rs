//! Signal return code that no call frame information describes, as musl's.

use std::ops::Range;

use crate::elf::image::Image;

/// `mov $15, %rax; syscall`: rt_sigreturn. The kernel demands no form, but debuggers know this one
/// (gdb, amd64_linux_sigtramp_start), so that C libraries keep to it.
const SIGRETURN: [u8; 9] = [0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05];

/// Most code bytes without rows that are searched in one file; musl has half a megabyte.
const SEARCH_MAX_BYTES: u64 = 16 << 20;

/// The address range of the first signal return code in each of `gaps`, ranges of SVMAs without
/// rows. Begins a byte early, where a return address is looked up.
pub(super) fn sigreturns(
    image: &Image,
    gaps: impl IntoIterator<Item = Range<u64>>,
) -> Vec<Range<u64>> {
    let mut left = SEARCH_MAX_BYTES;
    let mut found = Vec::new();
    for gap in gaps {
        let size = gap.end.saturating_sub(gap.start);
        if size > left {
            break;
        }
        left -= size;
        if let Some(code) = code(image, gap.start, size)
            && let Some(at) = code.windows(SIGRETURN.len()).position(|window| window == SIGRETURN)
        {
            let start = gap.start.saturating_add(at as u64);
            found.push(start.saturating_sub(1)..start.saturating_add(SIGRETURN.len() as u64));
        }
    }
    found
}

fn code(image: &Image, svma: u64, size: u64) -> Option<Vec<u8>> {
    image.segments().iter().filter(|segment| segment.is_code()).find_map(|segment| {
        let into = svma.checked_sub(segment.address)?;
        (into.checked_add(size)? <= segment.file_bytes).then_some(())?;
        image.bytes("code", segment.offset.checked_add(into)?, size, SEARCH_MAX_BYTES).ok()
    })
}
