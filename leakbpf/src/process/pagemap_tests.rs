use std::process::{Command, Stdio};

use super::*;

const PRESENT: u64 = WORD_PRESENT;

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn runs_of(first: u64, bytes: &[u8]) -> Vec<Run> {
    let mut runs = Vec::new();
    let flags = [(7, FLAG_ZERO_PAGE), (0x100, FLAG_THP), (0x101, FLAG_THP), (1, 0)];
    append(&mut runs, first, bytes, &HashMap::from(flags));
    runs
}

#[test]
fn words_of_the_page_map_are_understood() {
    let bytes = words(&[
        PRESENT | 1,
        PRESENT | 2 | 1 << 55,
        0,
        PRESENT | WORD_FILE | 3,
        WORD_SWAPPED | 0x1234,
        PRESENT | 7,
        PRESENT | 0x100,
        PRESENT | 0x101,
    ]);
    let there = Found { present: true, ..Found::default() };
    let expected = [
        (100..102, there),
        (103..104, Found { file: true, ..there }),
        (104..105, Found { swapped: true, ..Found::default() }),
        (105..106, Found { zero: true, ..there }),
        (106..108, Found { huge: true, ..there }),
    ];
    let expected: Vec<Run> =
        expected.into_iter().map(|(pages, found)| Run { pages, found }).collect();
    assert_eq!(runs_of(100, &bytes), expected);
    assert_eq!(
        runs_of(100, &bytes[..bytes.len() - 3]).last(),
        Some(&Run { pages: 106..107, found: Found { huge: true, ..there } })
    );
    assert!(runs_of(0, &[]).is_empty());
}

#[test]
fn flags_are_asked_for_only_of_new_anonymous_pages() {
    let bytes = words(&[
        PRESENT | 9,
        PRESENT | 5,
        PRESENT | WORD_FILE | 3,
        WORD_SWAPPED | 0x1234,
        PRESENT | 5,
        PRESENT,
        0,
        PRESENT | 8,
    ]);
    assert!(frames(100, &bytes, &[]).is_empty());
    assert_eq!(frames(100, &bytes, &[3, 99, 100, 101, 102, 103, 104, 105, 106, 108]), [5, 9]);
}

#[test]
fn frames_near_each_other_are_read_together() {
    assert!(together(&[]).is_empty());
    assert_eq!(together(&[1, 2, 3, 12, 21, 31]), [1..22, 31..32]);
    let many: Vec<u64> = (0..2000).collect();
    assert_eq!(together(&many), [0..512, 512..1024, 1024..1536, 1536..2000]);
}

#[test]
fn flags_are_those_of_their_frames() {
    let file = tempfile::tempfile().expect("a temporary file");
    for frame in [4u64, 6, 100] {
        file.write_all_at(&(frame << 22).to_ne_bytes(), frame * 8).expect("written");
    }
    let mut pagemap = Pagemap::open(Pid::current()).expect("our own");
    pagemap.flags = Some(Flags::Readable(file));
    let flags = pagemap.flags_of(&[4, 6, 100, 101, 5000]);
    let of = |frame| flags.get(&frame).copied();
    assert_eq!([4, 6, 100].map(of), [4u64, 6, 100].map(|frame| Some(frame << 22)));
    assert_eq!([101, 5000].map(of), [None, None], "beyond the end");
}

/// Memory of this process of which some pages are written.
struct Memory {
    start: *mut u8,
    length: usize,
}

impl Memory {
    fn with_pages(pages: usize, written: &[usize]) -> Self {
        let length = pages * PAGE_BYTES as usize;
        // SAFETY: a new mapping, which nobody else knows of.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        let memory = Self { start: start.cast(), length };
        for page in written {
            // SAFETY: inside the mapping.
            unsafe { memory.start.add(page * PAGE_BYTES as usize).write_volatile(1) };
        }
        memory
    }

    fn pages(&self) -> Range<u64> {
        let first = self.start as u64 / PAGE_BYTES;
        first..first + self.length as u64 / PAGE_BYTES
    }

    fn give_back(&self, page: usize) {
        // SAFETY: inside the mapping, whose contents nobody needs.
        let result = unsafe {
            libc::madvise(
                self.start.add(page * PAGE_BYTES as usize).cast(),
                PAGE_BYTES as usize,
                libc::MADV_DONTNEED,
            )
        };
        assert_eq!(result, 0);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

/// Numbers of the pages, counted from the memory's beginning, that a scan finds anonymous.
fn anonymous(pagemap: &mut Pagemap, memory: &Memory) -> Vec<u64> {
    let runs = pagemap.scan(memory.pages(), &[]).expect("our own page tables");
    let of_memory = runs.into_iter().filter(|run| run.found.present && !run.found.file);
    of_memory.flat_map(|run| run.pages).map(|page| page - memory.pages().start).collect()
}

fn ways() -> [Pagemap; 2] {
    let open = || Pagemap::open(Pid::current()).expect("our own");
    let mut reading = open();
    reading.flags = Some(match File::open("/proc/kpageflags") {
        Ok(file) => Flags::Readable(file),
        Err(_) => Flags::Unreadable,
    });
    [open(), reading]
}

#[test]
fn pages_that_were_written_are_there_until_they_are_given_back() {
    // Isolated ones, more of them than one call of the kernel returns.
    let written: Vec<usize> = (0..1500).map(|index| 2 * index).collect();
    let memory = Memory::with_pages(3001, &written);
    for mut pagemap in ways() {
        let expected: Vec<u64> = written.iter().map(|page| *page as u64).collect();
        assert_eq!(anonymous(&mut pagemap, &memory), expected, "{pagemap:?}");
    }
    memory.give_back(4);
    memory.give_back(2998);
    for mut pagemap in ways() {
        let left = anonymous(&mut pagemap, &memory);
        assert_eq!(left.len(), written.len() - 2, "{pagemap:?}");
        assert!(!left.contains(&4) && !left.contains(&2998), "{pagemap:?}");
    }
}

#[test]
fn the_program_itself_is_a_files() {
    let page = words_of_the_page_map_are_understood as fn() as usize as u64 / PAGE_BYTES;
    for mut pagemap in ways() {
        let runs = pagemap.scan(page..page + 1, &[page]).expect("our own page tables");
        assert!(runs.iter().all(|run| run.found.file) && runs.len() == 1, "{runs:?}");
    }
}

#[test]
fn a_kernel_that_cannot_look_is_not_asked_again() {
    let [asking, mut reading] = ways();
    assert!(asking.flags.is_none() && reading.flags.is_some());
    let memory = Memory::with_pages(3, &[1]);
    assert_eq!(anonymous(&mut reading, &memory), [1]);
    assert!(reading.flags.is_some());
}

#[test]
fn memory_that_is_gone_is_not_taken_for_memory_that_was_given_back() {
    for way in 0..2 {
        let mut child =
            Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("cat");
        let mut pagemap = Pagemap::open(Pid(child.id())).expect("our child");
        if way == 1 {
            pagemap.flags = Some(Flags::Unreadable);
        }
        assert!(pagemap.scan(0x1000..0x2000, &[]).is_ok());
        child.kill().expect("kill");
        child.wait().expect("wait");
        let result = pagemap.scan(0x1000..0x2000, &[]);
        assert!(matches!(result, Err(PagemapError::Gone)), "{way}: {result:?}");
    }
}
