//! Everything that reads ELF headers, sections, symbols and separate debug files.
//!
//! What does not begin like an ELF file is taken for the LZMA2 chunks of a `.gnu_debugdata`: the
//! checksums around them would keep a fuzzer out.

#![no_main]

use std::path::Path;
use std::sync::Arc;

use leakbpf::elf::debug_files::{self, Debuginfod, Place};
use leakbpf::elf::file::ElfFile;
use leakbpf::elf::image::{Image, Source};
use leakbpf::elf::layout::Layout;
use leakbpf::elf::mini_debug;
use leakbpf::process::status::ElfKind;
use leakbpf::symbolize::symbol_table::{SymbolTable, packed_image};
use libfuzzer_sys::fuzz_target;

/// As much as the readers themselves take of any one section but the largest.
const CONTENTS_MAX_BYTES: u64 = 64 << 20;

const ADDRESSES: [u64; 5] = [0, 0x1000, 0x1040, 0x40_1000, u64::MAX];

fuzz_target!(|data: &[u8]| {
    if !data.starts_with(b"\x7fELF") {
        unpack(data);
        return;
    }
    headers(data);
    let bytes: Arc<[u8]> = Arc::from(data);
    if let Ok(image) = Image::open(Source::Memory(bytes.clone())) {
        sections(&image);
        separate(&image, &bytes);
    }
});

fn headers(data: &[u8]) {
    let _ = ElfKind::parse(data);
    if let Ok(layout) = Layout::of_bytes(data) {
        for offset in ADDRESSES {
            let _ = layout.svma(offset);
        }
    }
    let Ok(file) = ElfFile::parse(data) else {
        return;
    };
    let _ = (file.interpreter(), file.build_id(), file.is_go(), file.kind());
    for svma in ADDRESSES {
        let _ = file.code_offset(svma);
        assert!(file.code(svma, 64).len() <= 64);
    }
    file.visit_functions(&mut |symbol| assert!(symbol.name.len() <= 1024));
    file.visit_import_slots(&mut |_, name| assert!(name.len() <= 1024));
}

fn sections(image: &Image) {
    let _ = image.build_id();
    for section in image.sections().iter().take(64) {
        if let Ok(contents) = image.contents(section, CONTENTS_MAX_BYTES) {
            assert!(contents.len() as u64 <= CONTENTS_MAX_BYTES);
        }
        let _ = image.string_at(section.offset, section.offset.saturating_add(100), 64);
    }
    for name in [".symtab", ".dynsym"] {
        if let Ok(Some(table)) = SymbolTable::read(image, name) {
            for svma in ADDRESSES {
                let _ = table.find(image, svma);
            }
        }
    }
    if let Ok(Some(inner)) = packed_image(image) {
        let _ = SymbolTable::read(&inner, ".symtab");
    }
}

/// The file as its own debug file.
fn separate(image: &Image, bytes: &Arc<[u8]>) {
    let debuginfod = Debuginfod { caches: vec!["/cache".into()], ..Debuginfod::default() };
    let mut open = |_: &Place| Some(Source::Memory(bytes.clone()));
    let search = debug_files::find(image, Path::new("/usr/lib/x.so"), &debuginfod, &mut open);
    for refusal in &search.refused {
        assert!(!refusal.to_string().is_empty());
    }
    let place = Place::Target("/usr/lib/debug/x.debug".into());
    let _ = debug_files::find_alternate(image, &place, &debuginfod, &mut open);
}

/// A stream without checks, and a block that says nothing about its size.
fn unpack(chunks: &[u8]) {
    let mut packed = b"\xfd7zXZ\0".to_vec();
    let flags = [0, 0];
    packed.extend(flags);
    packed.extend(crc32fast::hash(&flags).to_le_bytes());
    let block = [2, 0, 0x21, 1, 8, 0, 0, 0];
    packed.extend(block);
    packed.extend(crc32fast::hash(&block).to_le_bytes());
    packed.extend(chunks);
    if let Ok(plain) = mini_debug::unpack(&packed) {
        assert!(plain.len() as u64 <= mini_debug::MAX_UNPACKED_BYTES);
        headers(&plain);
    }
}
