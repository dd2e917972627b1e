//! Small ELF files with call frame information made to measure.

use std::{path::Path, process::Command};

use gimli::{
    Encoding, Format, LittleEndian, X86_64,
    write::{
        Address, CallFrameInstruction as Cfi, CommonInformationEntry, EhFrame, EndianVec,
        FrameDescriptionEntry, FrameTable, Writer as _,
    },
};

use crate::unwind::Table;

/// Where the code of a fixture begins, and how long it is.
pub const CODE: u64 = 0x1000;
pub const CODE_BYTES: u64 = 0x4000;

/// A function: its address, its length, and instructions by their offset in it.
pub type Function = (u64, u32, Vec<(u32, Cfi)>);

/// What every x86-64 compiler begins with: at entry, the return address is the top word.
pub fn usual() -> Vec<Cfi> {
    vec![Cfi::Cfa(X86_64::RSP, 8), Cfi::Offset(X86_64::RA, -8)]
}

pub fn encoding() -> Encoding {
    Encoding { format: Format::Dwarf32, version: 1, address_size: 8 }
}

/// `.eh_frame` of functions that share one CIE.
pub fn eh_frame(common: Vec<Cfi>, functions: Vec<Function>) -> Vec<u8> {
    let mut table = FrameTable::default();
    let mut cie = CommonInformationEntry::new(encoding(), 1, -8, X86_64::RA);
    for instruction in common {
        cie.add_instruction(instruction);
    }
    let cie = table.add_cie(cie);
    for (start, length, instructions) in functions {
        let mut fde = FrameDescriptionEntry::new(Address::Constant(start), length);
        for (offset, instruction) in instructions {
            fde.add_instruction(offset, instruction);
        }
        table.add_fde(cie, fde);
    }
    let mut section = EhFrame(EndianVec::new(LittleEndian));
    table.write_eh_frame(&mut section).unwrap();
    // A zero length ends the section, as crtend.o does.
    section.write_u32(0).unwrap();
    section.0.into_vec()
}

/// A file without section headers: code from [`CODE`] on, and `.eh_frame` through its header.
pub fn elf(eh_frame: &[u8]) -> Vec<u8> {
    elf_of_code(&vec![0x90; CODE_BYTES as usize], eh_frame)
}

pub fn elf_of_code(code: &[u8], eh_frame: &[u8]) -> Vec<u8> {
    assert_eq!(code.len() as u64, CODE_BYTES);
    let header_address = CODE + CODE_BYTES;
    let frames_bytes = 12 + eh_frame.len() as u64;
    let mut file = vec![0; CODE as usize];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x10, &3u16.to_le_bytes()); // ET_DYN
    put(0x12, &62u16.to_le_bytes()); // EM_X86_64
    put(0x20, &64u64.to_le_bytes()); // e_phoff
    put(0x36, &56u16.to_le_bytes()); // e_phentsize
    put(0x38, &3u16.to_le_bytes()); // e_phnum
    let segments = [
        (1u32, 5u32, CODE, CODE_BYTES), // PT_LOAD, PF_R | PF_X
        (1, 4, header_address, frames_bytes),
        (0x6474_e550, 4, header_address, 12), // PT_GNU_EH_FRAME
    ];
    for (index, (kind, flags, address, size)) in segments.into_iter().enumerate() {
        let at = 64 + 56 * index;
        put(at, &kind.to_le_bytes());
        put(at + 0x04, &flags.to_le_bytes());
        put(at + 0x08, &address.to_le_bytes());
        put(at + 0x10, &address.to_le_bytes());
        put(at + 0x20, &size.to_le_bytes());
        put(at + 0x28, &size.to_le_bytes());
    }
    file.extend_from_slice(code);
    // Version 1; the pointer is a relative sdata4; no table.
    file.extend_from_slice(&[1, 0x1b, 0xff, 0xff]);
    file.extend_from_slice(&8u32.to_le_bytes());
    file.extend_from_slice(&[0; 4]);
    file.extend_from_slice(eh_frame);
    file
}

/// The table of functions that share the usual CIE.
pub fn table(functions: Vec<Function>) -> Table {
    let table = Table::of_bytes(&elf(&eh_frame(usual(), functions))).unwrap();
    super::assert_sound(&table);
    table
}

/// A library that gcc makes of a C or assembly source.
pub fn compile(source: &str, name: &str, options: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let input = directory.path().join(name);
    let output = directory.path().join("library.so");
    std::fs::write(&input, source).unwrap();
    let status = Command::new("gcc")
        .args(["-shared", "-nostdlib", "-fPIC"])
        .args(options)
        .args([input.as_path(), Path::new("-o"), output.as_path()])
        .status()
        .expect("gcc runs; to install it: apt-get install gcc");
    assert!(status.success());
    std::fs::read(output).unwrap()
}
