//! The text that programs and the kernel write. The first byte chooses the parser.

#![no_main]

use leakbpf::preflight::tracepoint::TracepointFormat;
use leakbpf::process::maps::Maps;
use leakbpf::process::status::{Stat, Status, cgroup_path, join_arguments};
use leakbpf::report::printable;
use leakbpf::symbolize::PerfMap;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((choice, text)) = data.split_first() else {
        return;
    };
    match choice % 8 {
        0 => perf_map(text),
        1 => maps(text),
        2 => drop(Status::parse(text)),
        3 => {
            if let Some(stat) = Stat::parse(text) {
                let _ = stat.is_zombie();
            }
        }
        4 => {
            if let Ok(format) = TracepointFormat::parse(text) {
                let _ = format.field("pid");
            }
        }
        5 => drop(cgroup_path(&String::from_utf8_lossy(text))),
        6 => drop(join_arguments(text)),
        _ => {
            let text = String::from_utf8_lossy(text);
            assert!(!printable(&text).contains(char::is_control));
        }
    }
});

fn perf_map(text: &[u8]) {
    let map = PerfMap::parse(text.to_vec());
    // Of each two lines' four ends, at most three ranges.
    let lines = text.split(|&byte| byte == b'\n').count();
    assert!(map.len() <= 2 * lines);
    for address in [0, 1, 0x1000, 0x7f00_0000_1000, u64::MAX] {
        let _ = map.name(address);
    }
}

fn maps(text: &[u8]) {
    let Ok(maps) = Maps::parse(text) else {
        return;
    };
    for mapping in maps.iter() {
        assert!(mapping.start_avma < mapping.end_avma);
        for address in [mapping.start_avma, mapping.end_avma - 1, mapping.end_avma] {
            let _ = maps.find(address);
            let _ = maps.locate(address);
        }
    }
    for file in maps.executable_files() {
        assert!(!file.mappings.is_empty());
    }
}
