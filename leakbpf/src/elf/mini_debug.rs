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
            0 => {
                // To the size of the index, which the footer states, the decoder adds 1.
                let index_size = stream.get(stream.len().checked_sub(8)?..)?.first_chunk()?;
                return (u32::from_le_bytes(*index_size) < u32::MAX >> 2).then_some(total);
            }
            size => (usize::from(size) + 1) * 4,
        };
        // Each filter after the first would unpack once more what the one before unpacked.
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

    /// LZMA2 chunks of LZMA2 chunks: the outer ones do not state what comes out in the end.
    #[test]
    fn a_bomb_inside_of_another_filter_is_refused() {
        let inner = b"\x01\x00\x03data\x00";
        let mut nested = b"\xfd7zXZ\0".to_vec();
        nested.extend([0, 0]);
        nested.extend(crc32fast::hash(&[0, 0]).to_le_bytes());
        let block = [2, 1, 0x21, 1, 8, 0x21, 1, 8];
        nested.extend(block);
        nested.extend(crc32fast::hash(&block).to_le_bytes());
        nested.extend([1, 0, inner.len() as u8 - 1]);
        nested.extend(inner);
        nested.push(0);
        // An index, far enough from the end to have a footer; the decoder is not to come so far.
        nested.resize((nested.len() + 1).next_multiple_of(4) + 24, 0);
        let mut plain = Vec::new();
        let _ = lzma_rs::xz_decompress(&mut nested.as_slice(), &mut plain);
        assert_eq!(plain, b"data", "the decoder follows both filters");
        assert!(matches!(unpack(&nested), Err(MiniDebugError::NotXz)));
    }

    #[test]
    fn a_footer_whose_index_size_overflows_is_refused() {
        let mut whole = packed(b"some bytes");
        let footer = whole.len() - 8;
        whole[footer..footer + 4].fill(0xff);
        assert!(matches!(unpack(&whole), Err(MiniDebugError::NotXz)));
    }

    proptest::proptest! {
        #[test]
        fn damage_does_not_unpack_to_more_than_was_counted(position in 0usize..400, byte: u8) {
            let plain: Vec<u8> = (0..3000u32).map(|n| (n % 251) as u8).collect();
            let mut packed = packed(&plain);
            if let Some(at) = packed.len().checked_sub(position + 1) {
                packed[at] = byte;
            }
            if let Some(size) = unpacked_bytes(&packed) && size <= MAX_UNPACKED_BYTES {
                let mut out = Vec::new();
                let _ = lzma_rs::xz_decompress(&mut packed.as_slice(), &mut out);
                proptest::prop_assert!(out.len() as u64 <= size);
            }
        }
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
