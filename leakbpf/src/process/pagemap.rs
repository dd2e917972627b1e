//! Which pages of a process are there: `/proc/PID/pagemap`.
//!
//! Since Linux 6.7 the kernel looks for itself (`PAGEMAP_SCAN`, in the kernel's
//! Documentation/admin-guide/mm/pagemap.rst); before, a word is read for each page.

use std::{
    collections::HashMap,
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
};

use super::{Pid, ProcessError, classify, status::memory_owner};
use crate::ledger::pages::{Found, Run};
use leakbpf_common::pages::PAGE_BYTES;

/// `struct page_region` of include/uapi/linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong =
    3 << 30 | (size_of::<ScanArgs>() as libc::c_ulong) << 16 | (b'f' as libc::c_ulong) << 8 | 16;

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_HUGE: u64 = 1 << 6;

const REGIONS: usize = 512;

/// Bits of a word of `/proc/PID/pagemap`.
const WORD_PRESENT: u64 = 1 << 63;
const WORD_SWAPPED: u64 = 1 << 62;
const WORD_FILE: u64 = 1 << 61;
const WORD_FRAME: u64 = (1 << 55) - 1;

/// Page frames between two whose flags are read, up to which they are read together.
const GAP_FRAMES: u64 = 8;

/// Most page frames whose flags are read together.
const MOST_FRAMES: u64 = 512;

/// Bits of a word of `/proc/kpageflags`.
const FLAG_THP: u64 = 1 << 22;
const FLAG_ZERO_PAGE: u64 = 1 << 24;

/// The page tables of a process, as it was when they were opened: after an `execve`, and after its
/// end, they are gone.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    /// `/proc/kpageflags`, when the kernel can't look for itself.
    flags: Option<Flags>,
}

#[derive(Debug)]
enum Flags {
    Readable(File),
    /// Huge pages and pages of zeros are not told from others.
    Unreadable,
}

/// Why page tables can't be read.
#[derive(Debug, thiserror::Error)]
pub enum PagemapError {
    #[error("the memory is gone")]
    Gone,
    #[error("cannot read page tables: {0}")]
    Unreadable(#[from] io::Error),
}

impl Pagemap {
    pub fn open(pid: Pid) -> Result<Self, ProcessError> {
        let path = memory_owner(pid).proc_path("pagemap");
        match File::open(&path) {
            Ok(file) => Ok(Self { file, flags: None }),
            Err(error) => Err(classify(pid, path, error)),
        }
    }

    /// What is to say of a range of pages, without those that are not there. Whether one is huge, or
    /// the page of zeros, may be said only of the `unsettled` ones, which are sorted.
    pub fn scan(&mut self, pages: Range<u64>, unsettled: &[u64]) -> Result<Vec<Run>, PagemapError> {
        let runs = match &self.flags {
            Some(_) => self.read(pages.clone(), unsettled)?,
            None => match self.ask(pages.clone()) {
                Ok(runs) => runs,
                // Older than 6.7.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                    self.flags = Some(match File::open("/proc/kpageflags") {
                        Ok(file) => Flags::Readable(file),
                        Err(_) => Flags::Unreadable,
                    });
                    self.read(pages.clone(), unsettled)?
                }
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                    return Err(PagemapError::Gone);
                }
                Err(error) => return Err(error.into()),
            },
        };
        // Memory that is going away looks like memory that was given back. As long as a word can
        // be read, nobody has begun to take it away.
        match self.file.read_at(&mut [0; 8], pages.start.saturating_mul(8)) {
            Ok(8) => Ok(runs),
            Ok(_) => Err(PagemapError::Gone),
            Err(error) => Err(error.into()),
        }
    }

    /// Has the kernel look.
    fn ask(&self, pages: Range<u64>) -> io::Result<Vec<Run>> {
        let mut regions = [PageRegion::default(); REGIONS];
        let mut runs = Vec::new();
        let end = pages.end.saturating_mul(PAGE_BYTES);
        let mut start = pages.start.saturating_mul(PAGE_BYTES);
        while start < end {
            let mut args = ScanArgs {
                size: size_of::<ScanArgs>() as u64,
                start,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_PRESENT
                    | PAGE_IS_SWAPPED
                    | PAGE_IS_FILE
                    | PAGE_IS_PFNZERO
                    | PAGE_IS_HUGE,
                ..ScanArgs::default()
            };
            // SAFETY: `args` is what the command takes, and `regions` has as many as it says.
            let found = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut args) };
            if found < 0 {
                match io::Error::last_os_error() {
                    error if error.raw_os_error() == Some(libc::EINTR) => continue,
                    error => return Err(error),
                }
            }
            let found = regions.get(..found as usize).unwrap_or(&regions);
            runs.extend(found.iter().map(|region| Run {
                pages: region.start / PAGE_BYTES..region.end / PAGE_BYTES,
                found: Found {
                    present: region.categories & PAGE_IS_PRESENT != 0,
                    swapped: region.categories & PAGE_IS_SWAPPED != 0,
                    file: region.categories & PAGE_IS_FILE != 0,
                    zero: region.categories & PAGE_IS_PFNZERO != 0,
                    huge: region.categories & PAGE_IS_HUGE != 0,
                },
            }));
            if args.walk_end <= start {
                break;
            }
            start = args.walk_end;
        }
        Ok(runs)
    }

    /// Reads a word for each page.
    fn read(&self, pages: Range<u64>, unsettled: &[u64]) -> io::Result<Vec<Run>> {
        const WORDS: u64 = 512;
        let mut bytes = [0; 8 * WORDS as usize];
        let mut runs = Vec::new();
        let mut page = pages.start;
        while page < pages.end {
            let count = (pages.end - page).min(WORDS) as usize;
            let wanted = bytes.get_mut(..8 * count).unwrap_or_default();
            let filled = self.file.read_at(wanted, page.saturating_mul(8))?;
            let words = bytes.get(..filled).unwrap_or_default();
            let flags = self.flags_of(&frames(page, words, unsettled));
            append(&mut runs, page, words, &flags);
            if filled < 8 * count {
                break;
            }
            page += count as u64;
        }
        Ok(runs)
    }

    /// Words of `/proc/kpageflags`, of those page frames of which they can be read; `frames` are
    /// sorted.
    fn flags_of(&self, frames: &[u64]) -> HashMap<u64, u64> {
        let mut flags = HashMap::new();
        let Some(Flags::Readable(file)) = &self.flags else { return flags };
        let mut bytes = [0; 8 * MOST_FRAMES as usize];
        for range in together(frames) {
            let count = (range.end - range.start) as usize;
            let wanted = bytes.get_mut(..8 * count).unwrap_or_default();
            let filled = file.read_at(wanted, range.start.saturating_mul(8)).unwrap_or(0);
            let words = bytes.get(..filled).unwrap_or_default().as_chunks().0;
            flags.extend(range.zip(words.iter().map(|word| u64::from_ne_bytes(*word))));
        }
        flags
    }
}

/// Page frames, sorted, of the anonymous ones among `unsettled` pages. `words` of `/proc/PID/pagemap`
/// are those of the pages from `first` on.
fn frames(first: u64, words: &[u8], unsettled: &[u64]) -> Vec<u64> {
    let words = words.as_chunks().0;
    let mut frames: Vec<u64> = unsettled
        .iter()
        .filter_map(|page| {
            let index = usize::try_from(page.checked_sub(first)?).ok()?;
            let word = u64::from_ne_bytes(*words.get(index)?);
            let anonymous = word & WORD_PRESENT != 0 && word & WORD_FILE == 0;
            // Without the right to know, all frames are 0.
            (anonymous && word & WORD_FRAME != 0).then_some(word & WORD_FRAME)
        })
        .collect();
    frames.sort_unstable();
    frames.dedup();
    frames
}

/// Ranges that hold all of the frames, which are sorted: the kernel passes over a few in less time
/// than a further call takes.
fn together(frames: &[u64]) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for &frame in frames {
        match ranges.last_mut() {
            Some(range) if frame <= range.end + GAP_FRAMES && frame - range.start < MOST_FRAMES => {
                range.end = frame + 1;
            }
            _ => ranges.push(frame..frame + 1),
        }
    }
    ranges
}

/// Adds what words of `/proc/PID/pagemap` say of the pages from `first` on. `flags` are words of
/// `/proc/kpageflags`, by page frame, as far as they were asked for.
fn append(runs: &mut Vec<Run>, first: u64, words: &[u8], flags: &HashMap<u64, u64>) {
    for (page, word) in (first..).zip(words.as_chunks().0) {
        let word = u64::from_ne_bytes(*word);
        let mut found = Found {
            present: word & WORD_PRESENT != 0,
            swapped: word & WORD_SWAPPED != 0,
            file: word & WORD_FILE != 0,
            ..Found::default()
        };
        if !found.present && !found.swapped {
            continue;
        }
        if found.present
            && let Some(flags) = flags.get(&(word & WORD_FRAME))
        {
            // The page of zeros is not an anonymous one to this file.
            found.zero = flags & FLAG_ZERO_PAGE != 0;
            found.huge = flags & FLAG_THP != 0;
        }
        match runs.last_mut() {
            Some(run) if run.pages.end == page && run.found == found => run.pages.end += 1,
            _ => runs.push(Run { pages: page..page + 1, found }),
        }
    }
}

#[cfg(test)]
#[path = "pagemap_tests.rs"]
mod tests;
