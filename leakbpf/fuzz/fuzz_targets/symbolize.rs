//! Names of addresses all over an ELF file with DWARF. What does not begin like an ELF file is a
//! name to demangle.

#![no_main]

use std::path::PathBuf;
use std::sync::Arc;

use leakbpf::elf::image::{Image, Source};
use leakbpf::symbolize::{Limits, ModuleSource, Symbolizer, demangle};
use libfuzzer_sys::fuzz_target;

const NAMED_MAX: u64 = 8;

fuzz_target!(|data: &[u8]| {
    if !data.starts_with(b"\x7fELF") {
        // A name is kept up to 64 KiB; what replaces a broken character has three bytes for one.
        assert!(demangle(&String::from_utf8_lossy(data)).len() <= 64 << 10);
        return;
    }
    let bytes: Arc<[u8]> = Arc::from(data);
    let addresses = addresses(&bytes);
    let mut symbolizer = Symbolizer::new(Limits::default(), Vec::new());
    let module = symbolizer.add(ModuleSource {
        path: PathBuf::from("/nowhere/fuzzed"),
        image: Source::Memory(bytes),
        root: PathBuf::from("/nowhere"),
    });
    let _ = symbolizer.build_id(module);
    for address in addresses {
        for symbol in symbolizer.name(module, address, true) {
            assert!(symbol.function.len() <= 64 << 10);
        }
    }
    for problem in symbolizer.problems(module) {
        assert!(!problem.to_string().is_empty());
    }
});

/// Evenly over each code segment, and the last words of the file.
fn addresses(bytes: &Arc<[u8]>) -> Vec<u64> {
    let mut addresses = Vec::new();
    if let Ok(image) = Image::open(Source::Memory(bytes.clone())) {
        for segment in image.segments().iter().filter(|segment| segment.is_code()).take(2) {
            let part = (segment.file_bytes / NAMED_MAX).max(1);
            addresses.extend(
                (0..NAMED_MAX)
                    .map(|number| segment.address.saturating_add(number.saturating_mul(part) + 4)),
            );
        }
    }
    let (words, _) = bytes.as_chunks::<8>();
    addresses.extend(words.iter().rev().take(4).map(|word| u64::from_le_bytes(*word)));
    addresses
}
