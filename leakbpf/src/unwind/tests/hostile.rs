//! Files made to break their reader.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use gimli::write::CallFrameInstruction as Cfi;
use proptest::prelude::*;

use super::assert_sound;
use super::fixture::{CODE, compile, eh_frame, elf, usual};
use crate::unwind::{Table, TableError};

#[test]
fn a_long_common_program_is_not_run_for_each_of_many_functions() {
    let mut common = usual();
    for offset in 0..20_000 {
        common.push(Cfi::CfaOffset(8 + offset % 100));
    }
    let functions = (0..10_000).map(|at| (CODE + at, 1, vec![])).collect();
    let file = elf(&eh_frame(common, functions));
    let start = Instant::now();
    let table = Table::of_bytes(&file).unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_sound(&table);
    assert!(table.stats.exhausted);
}

/// By its own measure a function can be as long as all code, with a row for each byte.
#[test]
fn one_function_has_no_more_rows_than_a_file_may_have() {
    let mut program = Vec::new();
    for offset in 0..9_000_000u32 {
        // DW_CFA_advance_loc 1, DW_CFA_def_cfa_offset.
        program.extend([0x41, 0x0e, if offset % 2 == 0 { 8 } else { 16 }]);
    }
    let table = Table::of_bytes(&one_function(&program)).unwrap();
    assert!(table.rows.len() <= (8 << 20) + 3, "{} rows", table.rows.len());
    assert!(table.stats.exhausted);
    assert_sound(&table);
}

#[test]
fn one_file_has_no_more_rules_than_a_table_can_hold() {
    let mut program = Vec::new();
    for offset in 0..300_000u32 {
        let leb = [0x80 | offset as u8, 0x80 | (offset >> 7) as u8, (offset >> 14) as u8 & 0x7f];
        program.extend([&[0x41, 0x0e], leb.as_slice()].concat());
    }
    let table = Table::of_bytes(&one_function(&program)).unwrap();
    assert!(table.rules.len() <= (1 << 18) + 2, "{} rules", table.rules.len());
    assert!(table.stats.exhausted);
    assert_sound(&table);
}

/// A file of one function with that program. Its code is said to be a gigabyte, which is not there.
fn one_function(program: &[u8]) -> Vec<u8> {
    let mut frames = eh_frame(usual(), vec![(CODE, 1 << 29, vec![])]);
    // The entry is the last, before the end that has no length.
    frames.truncate(frames.len() - 4);
    let first = 4 + u32::from_le_bytes(*frames.first_chunk().unwrap()) as usize;
    frames.extend(program);
    let length = (frames.len() - first - 4) as u32;
    frames[first..first + 4].copy_from_slice(&length.to_le_bytes());
    frames.extend([0; 4]);
    let mut file = elf(&frames);
    let first_segment_bytes = 64 + 0x20;
    file[first_segment_bytes..first_segment_bytes + 8].copy_from_slice(&(1u64 << 30).to_le_bytes());
    file
}

#[test]
fn more_registers_and_states_than_the_machine_has_are_refused() {
    let registers = (0..100).map(|number| (1, Cfi::Offset(gimli::Register(number), -8))).collect();
    let states = (0..100).map(|_| (1, Cfi::RememberState)).collect();
    let frames = eh_frame(usual(), vec![(CODE, 16, registers), (CODE + 16, 16, states)]);
    let table = Table::of_bytes(&elf(&frames)).unwrap();
    assert_sound(&table);
    assert_eq!(table.stats.damaged_entries, 2);
}

#[test]
fn other_machines_and_other_files_are_refused() {
    let mut file = elf(&eh_frame(usual(), vec![]));
    file[0x12] = 183;
    assert!(matches!(Table::of_bytes(&file), Err(TableError::OtherMachine(183))));
    assert!(matches!(Table::of_bytes(b"#!/bin/sh\n"), Err(TableError::Image(_))));
    assert!(matches!(Table::of_bytes(&[]), Err(TableError::Image(_))));
}

/// A library with frames of many kinds.
static LIBRARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let source = "
        void callee(char *);
        void alloca_of(int n) { char *p = __builtin_alloca(n); callee(p); }
        void aligned(int n) { char p[64] __attribute__((aligned(64))); p[n] = 0; callee(p); }
        void huge(void) { char p[500000]; callee(p); }
        int many(int n) { for (int i = 0; i < n; i++) { alloca_of(i); aligned(i); } return n; }
        void callee(char *p) { __asm__ volatile(\"\" :: \"r\"(p) : \"rbx\", \"rbp\", \"r12\"); }
    ";
    compile(source, "many.c", &["-O2", "-g", "-fomit-frame-pointer"])
});

/// Where `.eh_frame` lies in [`LIBRARY`].
fn frames() -> std::ops::Range<usize> {
    use object::{Object as _, ObjectSection as _};
    let file = object::File::parse(LIBRARY.as_slice()).unwrap();
    let (start, size) = file.section_by_name(".eh_frame").unwrap().file_range().unwrap();
    start as usize..(start + size) as usize
}

proptest! {
    #[test]
    fn mutated_call_frame_information_never_panics(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
    ) {
        let mut file = LIBRARY.clone();
        let range = frames();
        for (index, byte) in changes {
            let at = range.start + index.index(range.len());
            file[at] = byte;
        }
        let table = Table::of_bytes(&file).unwrap();
        assert_sound(&table);
    }

    #[test]
    fn mutated_headers_and_lengths_never_panic(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        length in any::<prop::sample::Index>(),
        section_headers in any::<bool>(),
    ) {
        let mut file = LIBRARY.clone();
        if !section_headers {
            file[0x28..0x30].fill(0);
        }
        let shorter = length.index(file.len() * 4).min(file.len());
        let (near_start, tables) = (0x400, file.len() - 0x1000);
        for (index, byte) in changes {
            let at = index.index(near_start + 0x1000);
            let at = if at < near_start { at } else { tables + at - near_start };
            file[at] = byte;
        }
        file.truncate(shorter);
        if let Ok(table) = Table::of_bytes(&file) {
            assert_sound(&table);
        }
    }

    #[test]
    fn any_bytes_for_call_frame_information_never_panic(
        frames in proptest::collection::vec(any::<u8>(), 1..400),
    ) {
        let table = Table::of_bytes(&elf(&frames)).unwrap();
        assert_sound(&table);
    }
}
