//! What an agent leaves behind: changed code in the target, programs and maps in the kernel.

use std::fs::{self, File};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// `bpf(2)` commands, from `include/uapi/linux/bpf.h`.
const BPF_PROG_GET_FD_BY_ID: i32 = 13;
const BPF_MAP_GET_FD_BY_ID: i32 = 14;
const BPF_LINK_GET_FD_BY_ID: i32 = 30;

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
    const QUIET: Duration = Duration::from_millis(300);
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

fn exists(command: i32, id: u32) -> bool {
    // `struct { __u32 id; __u32 next_id; __u32 open_flags; }` of union bpf_attr.
    let attributes = [id, 0, 0];
    // SAFETY: the attributes are valid for their stated size during the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(&attributes))
    };
    if result < 0 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "bpf(2): {error}");
        return false;
    }
    // SAFETY: the call returned a descriptor that nobody else owns.
    drop(unsafe { OwnedFd::from_raw_fd(result as i32) });
    true
}
