//! Perf maps: the names that a JIT compiler writes for the code it made.
//!
//! Format: one `START SIZE name` a line, the numbers hexadecimal (Linux,
//! tools/perf/Documentation/jit-interface.txt).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::demangle::NAME_MAX_BYTES;
use super::root::{self, OpenError};

/// A long-running JIT appends for ever; what lies beyond is not read.
const FILE_MAX_BYTES: u64 = 64 << 20;

/// As many as an honest file of that size has; a line can be as short as six bytes, and takes a
/// hundred in memory.
const LINES_MAX: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum PerfMapError {
    #[error("{path}: {source}")]
    Open { path: PathBuf, source: OpenError },
    #[error(
        "{path} belongs to user {owner}, not to the target's user or root: its names are not trusted"
    )]
    Owner { path: PathBuf, owner: u32 },
    #[error("{path} cannot be read: {source}")]
    Read { path: PathBuf, source: io::Error },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Range {
    begin_avma: u64,
    end_avma: u64,
    /// Where the name lies in the text.
    name: (usize, usize),
}

/// Names by address in the process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PerfMap {
    /// Sorted, disjoint.
    ranges: Vec<Range>,
    text: Vec<u8>,
}

impl PerfMap {
    /// Reads the text of a map, up to [`LINES_MAX`]. Lines that make no sense are left out; where two overlap, the later
    /// one wins, because a JIT compiler uses memory again.
    pub fn parse(text: Vec<u8>) -> PerfMap {
        let mut lines = Vec::new();
        let mut at = 0;
        for line in text.split(|&byte| byte == b'\n') {
            lines.extend(parse_line(line, at));
            if lines.len() == LINES_MAX {
                break;
            }
            at += line.len() + 1;
        }
        PerfMap { ranges: latest(lines), text }
    }

    /// The name of the code at `avma`, demangled names excepted: maps hold plain ones.
    pub fn name(&self, avma: u64) -> Option<String> {
        let after = self.ranges.partition_point(|range| range.begin_avma <= avma);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        if avma >= range.end_avma {
            return None;
        }
        let (begin, end) = range.name;
        let name = self.text.get(begin..end)?;
        Some(String::from_utf8_lossy(name).into_owned())
    }

    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Reads `/tmp/perf-PID.map` below `root` (`/proc/PID/root`); `namespace_pid` is the process's
    /// id in its own PID namespace, `uid` its user. A name in a root's report must come from the
    /// target or from root, and /tmp is everybody's: the owner is checked, links are not followed.
    ///
    /// `Ok(None)` when there is no such file.
    pub fn open(
        root: &Path,
        namespace_pid: u32,
        uid: u32,
    ) -> Result<Option<PerfMap>, PerfMapError> {
        let path = PathBuf::from(format!("/tmp/perf-{namespace_pid}.map"));
        let file = match root::open_unlinked(root, &path) {
            Ok(file) => file,
            Err(OpenError::Missing) => return Ok(None),
            Err(source) => return Err(PerfMapError::Open { path, source }),
        };
        read(file, uid, path).map(Some)
    }
}

fn read(file: File, uid: u32, path: PathBuf) -> Result<PerfMap, PerfMapError> {
    let failed = |source| PerfMapError::Read { path: path.clone(), source };
    let owner = file.metadata().map_err(failed)?.uid();
    if owner != uid && owner != 0 {
        return Err(PerfMapError::Owner { path, owner });
    }
    let mut text = Vec::new();
    file.take(FILE_MAX_BYTES).read_to_end(&mut text).map_err(failed)?;
    Ok(PerfMap::parse(text))
}

fn parse_line(line: &[u8], at: usize) -> Option<Range> {
    let first = line.iter().position(|&byte| byte == b' ')?;
    let rest = line.get(first + 1..)?;
    let second = first + 1 + rest.iter().position(|&byte| byte == b' ')?;
    let begin_avma = hexadecimal(line.get(..first)?)?;
    let size = hexadecimal(line.get(first + 1..second)?)?;
    let end_avma = begin_avma.checked_add(size)?;
    let name_begin = at + second + 1;
    let name_end = (at + line.len()).min(name_begin + NAME_MAX_BYTES);
    (end_avma > begin_avma && name_end > name_begin).then_some(Range {
        begin_avma,
        end_avma,
        name: (name_begin, name_end),
    })
}

fn hexadecimal(digits: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(digits).ok()?;
    let digits = digits.strip_prefix("0x").unwrap_or(digits);
    // from_str_radix takes a sign, too.
    if digits.starts_with('+') {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

/// Makes ranges disjoint: of all that cover an address, the last in the file stays.
fn latest(lines: Vec<Range>) -> Vec<Range> {
    use std::collections::{BTreeSet, BinaryHeap};

    let mut edges: BTreeSet<u64> = BTreeSet::new();
    for line in &lines {
        edges.insert(line.begin_avma);
        edges.insert(line.end_avma);
    }
    let mut by_begin: Vec<usize> = (0..lines.len()).collect();
    by_begin.sort_by_key(|&index| lines.get(index).map(|line| line.begin_avma));
    let mut by_begin = by_begin.into_iter().peekable();

    let mut covering: BinaryHeap<usize> = BinaryHeap::new();
    let mut ranges: Vec<Range> = Vec::new();
    let mut edges = edges.into_iter().peekable();
    while let (Some(begin), Some(&end)) = (edges.next(), edges.peek()) {
        while let Some(index) =
            by_begin.next_if(|&index| lines.get(index).is_some_and(|line| line.begin_avma <= begin))
        {
            covering.push(index);
        }
        while let Some(&index) = covering.peek()
            && lines.get(index).is_none_or(|line| line.end_avma <= begin)
        {
            covering.pop();
        }
        let Some(line) = covering.peek().and_then(|&index| lines.get(index)) else {
            continue;
        };
        match ranges.last_mut() {
            Some(last) if last.end_avma == begin && last.name == line.name => last.end_avma = end,
            _ => ranges.push(Range { begin_avma: begin, end_avma: end, name: line.name }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> PerfMap {
        PerfMap::parse(text.as_bytes().to_vec())
    }

    #[test]
    fn names_may_hold_spaces_and_ranges_end_before_their_end() {
        let map = map("7f00 10 LazyCompile:~add /app/main.js:1:2\n7f10 8 b\n");
        assert_eq!(map.name(0x7f0f).as_deref(), Some("LazyCompile:~add /app/main.js:1:2"));
        assert_eq!(map.name(0x7f10).as_deref(), Some("b"));
        assert_eq!(map.name(0x7f18), None);
        assert_eq!(map.name(0x7eff), None);
    }

    #[test]
    fn of_two_overlapping_lines_the_later_one_wins() {
        let map = map("100 100 old\n140 20 new\n");
        assert_eq!(map.name(0x13f).as_deref(), Some("old"));
        assert_eq!(map.name(0x140).as_deref(), Some("new"));
        assert_eq!(map.name(0x15f).as_deref(), Some("new"));
        assert_eq!(map.name(0x160).as_deref(), Some("old"));
    }

    #[test]
    fn lines_without_sense_are_left_out() {
        let map =
            map("\nx y z\n10\n10 5\n10 5 \n+10 5 a\nffffffffffffffff 2 wraps\n20 0 empty\n30 1 ok");
        assert_eq!(map.len(), 1);
        assert_eq!(map.name(0x30).as_deref(), Some("ok"));
    }

    #[test]
    fn a_map_of_nothing_but_short_lines_is_cut() {
        let text = (0..1u32 << 21).map(|number| format!("{:x} 1 {number}\n", number * 2));
        let map = PerfMap::parse(text.collect::<String>().into_bytes());
        assert_eq!(map.len(), LINES_MAX);
        assert_eq!(map.name(2 * 5).as_deref(), Some("5"));
    }

    #[test]
    fn a_map_of_another_user_is_refused_and_a_link_is_not_followed() {
        let root = tempfile::tempdir().expect("temporary directory");
        let tmp = root.path().join("tmp");
        std::fs::create_dir(&tmp).expect("directory");
        std::fs::write(tmp.join("perf-7.map"), "10 10 name\n").expect("map");
        std::os::unix::fs::symlink("perf-7.map", tmp.join("perf-8.map")).expect("link");
        let uid = std::fs::metadata(&tmp).expect("metadata").uid();

        let map = PerfMap::open(root.path(), 7, uid).expect("own map");
        assert_eq!(map.and_then(|map| map.name(0x10)).as_deref(), Some("name"));
        assert!(matches!(PerfMap::open(root.path(), 8, uid), Err(PerfMapError::Open { .. })));
        assert_eq!(PerfMap::open(root.path(), 9, uid).expect("none"), None);
        if uid != 0 {
            assert!(matches!(
                PerfMap::open(root.path(), 7, uid + 1),
                Err(PerfMapError::Owner { .. })
            ));
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_gives_sorted_disjoint_ranges(text: Vec<u8>) {
            let map = PerfMap::parse(text);
            for pair in map.ranges.windows(2) {
                proptest::prop_assert!(pair[0].end_avma <= pair[1].begin_avma);
            }
        }

        #[test]
        fn every_address_gets_the_last_line_that_covers_it(
            lines in proptest::collection::vec((0u64..64, 1u64..16), 0..20),
            avma in 0u64..96,
        ) {
            let text: String = lines.iter().enumerate()
                .map(|(number, (begin, size))| format!("{begin:x} {size:x} f{number}\n"))
                .collect();
            let expected = lines.iter().enumerate().rev()
                .find(|(_, (begin, size))| (*begin..begin + size).contains(&avma))
                .map(|(number, _)| format!("f{number}"));
            proptest::prop_assert_eq!(map(&text).name(avma), expected);
        }
    }
}
