//! What an agent leaves behind: changed code in the target, programs and maps in the kernel.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// `bpf(2)` commands, from `include/uapi/linux/bpf.h`.
const BPF_MAP_GET_NEXT_ID: i32 = 12;
const BPF_PROG_GET_FD_BY_ID: i32 = 13;
const BPF_MAP_GET_FD_BY_ID: i32 = 14;
const BPF_OBJ_GET_INFO_BY_FD: i32 = 15;
const BPF_LINK_GET_FD_BY_ID: i32 = 30;

/// An agent that has placed nothing for so long is done placing.
const QUIET: Duration = Duration::from_millis(300);

/// Compares all executable mappings of a process with the files that they map. One line for each
/// run of bytes that differ; a breakpoint is one byte, `cc`.
pub fn text_differences(pid: u32) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("a living process");
    let memory = File::open(format!("/proc/{pid}/mem")).expect("root reads any memory");
    let mut differences = Vec::new();
    for line in maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[range, protection, offset, _, _, path] = words.as_slice() else { continue };
        if !protection.contains('x') || !path.starts_with('/') {
            continue;
        }
        let (start, end) = range.split_once('-').expect("a range");
        let number = |text| u64::from_str_radix(text, 16).expect("a hexadecimal number");
        let (start, end, offset) = (number(start), number(end), number(offset));
        let file = File::open(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let length_bytes = (end - start)
            .min(file.metadata().expect("an open file has a length").len().saturating_sub(offset));
        let mut mapped = vec![0; length_bytes as usize];
        let mut stored = vec![0; length_bytes as usize];
        memory.read_exact_at(&mut mapped, start).expect("mapped code is readable");
        file.read_exact_at(&mut stored, offset).expect("the file is as long as it says");
        let mut at = 0;
        while at < mapped.len() {
            if mapped[at] == stored[at] {
                at += 1;
                continue;
            }
            let length = mapped[at..].iter().zip(&stored[at..]).take_while(|(a, b)| a != b).count();
            differences.push(format!(
                "{path}+{:#x}: {:02x?} where the file has {:02x?}",
                offset + at as u64,
                &mapped[at..at + length],
                &stored[at..at + length]
            ));
            at += length;
        }
    }
    differences
}

/// Waits until breakpoints are seen in a library that the process has loaded while an agent was
/// attached, and no more are added: the agent does not say when it is done with it.
pub fn wait_until_probed(pid: u32, library: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let (mut count, mut since) = (0, Instant::now());
    while count == 0 || since.elapsed() < QUIET {
        let now = text_differences(pid).iter().filter(|line| line.contains(library)).count();
        if now != count {
            (count, since) = (now, Instant::now());
        }
        assert!(Instant::now() < deadline, "no probe in {library}, which was loaded late");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// The kernel objects that an agent holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BpfIds(Vec<(i32, &'static str, u32)>);

impl BpfIds {
    /// Of a running process.
    pub fn held_by(pid: u32) -> Self {
        let mut ids = Vec::new();
        let descriptors =
            fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("root reads any process");
        for descriptor in descriptors.flatten() {
            // Closed between the listing and here.
            let Ok(text) = fs::read_to_string(descriptor.path()) else { continue };
            for line in text.lines() {
                let Some((key, value)) = line.split_once(':') else { continue };
                let kind = match key {
                    "prog_id" => (BPF_PROG_GET_FD_BY_ID, "program"),
                    "map_id" => (BPF_MAP_GET_FD_BY_ID, "map"),
                    "link_id" => (BPF_LINK_GET_FD_BY_ID, "link"),
                    _ => continue,
                };
                if let Ok(id) = value.trim().parse() {
                    ids.push((kind.0, kind.1, id));
                }
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Self(ids)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Fails the test when any of them still exists. The kernel frees them a moment after the last
    /// descriptor is closed.
    pub fn assert_gone(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        for (command, kind, id) in &self.0 {
            while exists(*command, *id) {
                assert!(Instant::now() < deadline, "BPF {kind} {id} outlives its agent");
                std::thread::park_timeout(Duration::from_millis(1));
            }
        }
    }
}

/// The unwind tables that are in the kernel, by id, each with the memory that it takes.
pub fn unwind_tables() -> BTreeMap<u32, u64> {
    let mut tables = BTreeMap::new();
    let mut id = 0;
    while let Some(next) = next_map(id) {
        id = next;
        // Gone since.
        let Some(map) = open(BPF_MAP_GET_FD_BY_ID, id) else { continue };
        if name(&map).starts_with(b"unwind_table\0") {
            let path = format!("/proc/self/fdinfo/{}", map.as_raw_fd());
            let text = fs::read_to_string(path).expect("an open descriptor");
            let memory = text.lines().find_map(|line| line.strip_prefix("memlock:"));
            let bytes = memory.expect("a map's memory").trim().parse().expect("a number");
            tables.insert(id, bytes);
        }
    }
    tables
}

fn next_map(id: u32) -> Option<u32> {
    // `struct { __u32 start_id; __u32 next_id; __u32 open_flags; }` of union bpf_attr.
    let mut attributes = [id, 0, 0];
    bpf(BPF_MAP_GET_NEXT_ID, &mut attributes).map(|_| attributes[1])
}

fn name(map: &OwnedFd) -> [u8; 16] {
    // `struct bpf_map_info`: six numbers, then the name.
    let mut about = [0u8; 40];
    // `struct { __u32 bpf_fd; __u32 info_len; __u64 info; }` of union bpf_attr.
    let address = about.as_mut_ptr() as u64;
    let mut attributes =
        [map.as_raw_fd() as u32, about.len() as u32, address as u32, (address >> 32) as u32];
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes).expect("an open map can be asked");
    about[24..].try_into().expect("16 bytes")
}

fn exists(command: i32, id: u32) -> bool {
    open(command, id).is_some()
}

fn open(command: i32, id: u32) -> Option<OwnedFd> {
    // `struct { __u32 id; __u32 next_id; __u32 open_flags; }` of union bpf_attr.
    let descriptor = bpf(command, &mut [id, 0, 0])?;
    // SAFETY: the call returned a descriptor that nobody else owns.
    Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// `None` when there is no such object.
fn bpf(command: i32, attributes: &mut [u32]) -> Option<i32> {
    // SAFETY: the attributes, and what they point to, are valid during the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(attributes))
    };
    if result < 0 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "bpf(2): {error}");
        return None;
    }
    Some(result as i32)
}

/// How many links of a kind a process holds, as the kernel names it (`perf`, `uprobe_multi`, …).
pub fn links_of(pid: u32, kind: &str) -> usize {
    let fdinfo = fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("a living process");
    fdinfo
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok())
        .filter(|info| {
            info.lines().any(|line| {
                line.strip_prefix("link_type:").is_some_and(|found| found.trim() == kind)
            })
        })
        .count()
}

/// Waits until an agent holds more links of a kind than before, and has added none for a while.
pub fn wait_until_more_links(pid: u32, kind: &str, before: usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let (mut links, mut since) = (before, Instant::now());
    while links <= before || since.elapsed() < QUIET {
        let now = links_of(pid, kind);
        if now != links {
            (links, since) = (now, Instant::now());
        }
        assert!(Instant::now() < deadline, "still {now} {kind} links");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}
