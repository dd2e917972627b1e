//! Where probes go, by the bytes of a function or of a whole ELF file.

#![no_main]

use std::collections::BTreeSet;

use leakbpf::elf::file::ElfFile;
use leakbpf::probe::discover::{allocators_by_message, discover};
use leakbpf::probe::planner::x86_64::flow::{self, Destination, Onward};
use leakbpf::probe::planner::x86_64::{self, FunctionCode};
use libfuzzer_sys::fuzz_target;

const SVMA: u64 = 0x1000;

fuzz_target!(|data: &[u8]| {
    if data.starts_with(b"\x7fELF") {
        file(data);
    } else if let Some((&choice, code)) = data.split_first() {
        function(choice, code);
    }
});

fn file(data: &[u8]) {
    let Ok(file) = ElfFile::parse(data) else {
        return;
    };
    let plan = discover(&file, Some(&file));
    for probe in &plan.probes {
        let offsets = [probe.entry_file_offset, probe.enter_file_offset];
        for offset in offsets.into_iter().chain(probe.leave_file_offset) {
            assert!(offset < data.len() as u64, "a probe beyond the file");
        }
        assert!(!probe.plan.to_string().is_empty());
    }
    for skipped in &plan.skipped {
        assert!(!skipped.reason.to_string().is_empty());
    }
    let _ = allocators_by_message(&file);
}

fn function(choice: u8, code: &[u8]) {
    // Where addresses overflow within the function, or at an ordinary address.
    let svma = if choice & 2 != 0 { u64::MAX - 16 } else { SVMA };
    let size_bytes = match choice >> 2 & 3 {
        0 => 0,
        1 => code.len() as u64 / 2,
        2 => code.len() as u64,
        _ => u64::MAX,
    };
    let (bytes, cold) = match choice & 16 {
        0 => (code, Vec::new()),
        _ => {
            let (bytes, cold) = code.split_at(code.len() / 2);
            (bytes, vec![(svma.wrapping_sub(0x100), cold)])
        }
    };
    let survey = x86_64::survey(FunctionCode { svma, bytes, size_bytes, cold: &cold });
    if let Ok(survey) = survey {
        for arguments in [&[][..], &[0], &[0, 1], &[5, 200]] {
            for needs_return in [false, true] {
                let plan = survey.plan(arguments, needs_return);
                assert_eq!(plan.leave.is_some(), needs_return);
                for site in plan.leave.into_iter().chain([plan.enter]) {
                    let rest = bytes.get(site.offset as usize..).expect("a site in the function");
                    assert!(
                        x86_64::may_be_probed(rest),
                        "a site where forked children could crash"
                    );
                }
            }
        }
    }
    let _ = flow::import_slot(bytes, svma);
    let from = |address: u64| -> &[u8] {
        let offset = usize::try_from(address.wrapping_sub(svma)).ok();
        offset.and_then(|offset| bytes.get(offset..)).unwrap_or_default()
    };
    for null_is_failure in [false, true] {
        let destination = |target: u64| match target % 16 {
            0 => Destination::Goal,
            1 => Destination::End,
            _ => Destination::Other,
        };
        flow::every_path_reaches(svma, &from, &destination, null_is_failure);
    }
    let onward = |target: u64| match target % 16 {
        0 => Onward::Elsewhere,
        1 => Onward::Nowhere,
        2 => Onward::Unknown,
        _ => Onward::Code(target),
    };
    let exits: Option<BTreeSet<u64>> = flow::exits(svma, &from, &onward);
    for exit in exits.into_iter().flatten() {
        assert!(!from(exit).is_empty(), "a return outside of the code");
    }
}
