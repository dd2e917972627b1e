//! `.gnu_debugdata`: a stripped file's own symbol table, as an xz-compressed ELF file inside it
//! (<https://sourceware.org/gdb/current/onlinedocs/gdb.html/MiniDebugInfo.html>).

/// Most bytes that a table may have when decompressed. Fedora's largest (LLVM's) have about 10 MB.
pub const MAX_UNPACKED_BYTES: u64 = 64 << 20;

/// Why the table cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum MiniDebugError {
    #[error(".gnu_debugdata is not an xz stream of LZMA2 chunks")]
    NotXz,
    #[error(".gnu_debugdata unpacks to more than {MAX_UNPACKED_BYTES} bytes")]
    TooLarge,
    #[error("cannot decompress .gnu_debugdata: {0}")]
    Corrupt(String),
}

/// The ELF file inside `.gnu_debugdata`.
pub fn unpack(packed: &[u8]) -> Result<Vec<u8>, MiniDebugError> {
    // The decoder keeps everything in memory until its end and takes no limit, so the size is
    // added up beforehand: each chunk states its own, and the decoder holds it to that.
    if unpacked_bytes(packed).ok_or(MiniDebugError::NotXz)? > MAX_UNPACKED_BYTES {
        return Err(MiniDebugError::TooLarge);
    }
    let mut unpacked = Vec::new();
    lzma_rs::xz_decompress(&mut &*packed, &mut unpacked)
        .map_err(|error| MiniDebugError::Corrupt(format!("{error:?}")))?;
    Ok(unpacked)
}

/// Adds up the unpacked sizes of all LZMA2 chunks of an xz stream
/// (<https://tukaani.org/xz/xz-file-format.txt>). Stops counting once over the limit.
fn unpacked_bytes(stream: &[u8]) -> Option<u64> {
    let mut rest = stream.strip_prefix(b"\xfd7zXZ\0")?;
    let check_bytes = match rest.get(1)? & 0xf {
        0 => 0,
        1..=3 => 4,
        4..=6 => 8,
        7..=9 => 16,
        10..=12 => 32,
        _ => 64,
    };
    rest = rest.get(6..)?;
    let mut total = 0u64;
    loop {
        let header_bytes = match *rest.first()? {
            0 => return Some(total),
            size => (usize::from(size) + 1) * 4,
        };
        // More filters than LZMA2 alone would change the size.
        if rest.get(1)? & 0x03 != 0 {
            return None;
        }
        let block = rest.get(header_bytes..)?;
        let mut chunks = block;
        loop {
            let control = *chunks.first()?;
            let low = || Some(u64::from(u16::from_be_bytes([*chunks.get(1)?, *chunks.get(2)?])));
            let skip = match control {
                0 => break,
                1 | 2 => {
                    total += low()? + 1;
                    3 + usize::try_from(low()?).ok()? + 1
                }
                3..0x80 => return None,
                _ => {
                    total += (u64::from(control & 0x1f) << 16 | low()?) + 1;
                    let packed = u16::from_be_bytes([*chunks.get(3)?, *chunks.get(4)?]);
                    let properties = usize::from(control >= 0xc0);
                    5 + properties + usize::from(packed) + 1
                }
            };
            if total > MAX_UNPACKED_BYTES {
                return Some(total);
            }
            chunks = chunks.get(skip..)?;
        }
        let used = block.len() - chunks.len() + 1;
        rest = block.get(used.next_multiple_of(4).checked_add(check_bytes)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        lzma_rs::xz_compress(&mut &*bytes, &mut packed).expect("compresses to memory");
        packed
    }

    #[test]
    fn a_table_comes_back_as_it_was() {
        let table: Vec<u8> = (0..200_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
        assert_eq!(unpacked_bytes(&packed(&table)), Some(200_000));
        assert_eq!(unpack(&packed(&table)).expect("unpacks"), table);
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_unpacked() {
        // Stream header, block header (LZMA2), then chunks that state 2 MiB each.
        let mut bomb = b"\xfd7zXZ\0\0\0\0\0\0\0\x02\0\x21\x01\x08\0\0\0\0\0\0\0".to_vec();
        for _ in 0..40 {
            bomb.extend([0x9f, 0xff, 0xff, 0, 0, 0]);
        }
        assert!(matches!(unpack(&bomb), Err(MiniDebugError::TooLarge)));
    }

    #[test]
    fn a_truncated_or_foreign_stream_is_an_error() {
        let whole = packed(b"some bytes");
        for length in 0..whole.len() {
            assert!(unpack(&whole[..length]).is_err(), "length {length}");
        }
        assert!(matches!(unpack(b"\x7fELF"), Err(MiniDebugError::NotXz)));
    }
}
