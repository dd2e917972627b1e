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
