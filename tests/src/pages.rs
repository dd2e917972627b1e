//! Sets of address ranges, normalised: what is compared of mappings, because two neighbouring
//! mappings and one large one are the same memory.

use std::fmt;

/// Disjoint, sorted, never adjacent ranges `[start, end)`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageSet(Vec<(u64, u64)>);

impl PageSet {
    pub fn new(ranges: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut ranges: Vec<_> = ranges.into_iter().filter(|(start, end)| start < end).collect();
        ranges.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
        for (start, end) in ranges {
            match merged.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => merged.push((start, end)),
            }
        }
        Self(merged)
    }

    /// The lines `page START BYTES` that a target says.
    pub fn from_lines(lines: &[String]) -> Self {
        Self::new(lines.iter().filter_map(|line| {
            let mut words = line.strip_prefix("page ")?.split(' ');
            let start = u64::from_str_radix(words.next()?, 16).ok()?;
            Some((start, start + words.next()?.parse::<u64>().ok()?))
        }))
    }

    /// Anonymous memory of a process as the kernel lists it, without the main stack and the vDSO.
    pub fn of_process(pid: u32) -> Self {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("a living process");
        Self::new(maps.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let name = words.nth(4).unwrap_or("");
            (name.is_empty() || name == "[heap]").then_some((
                u64::from_str_radix(start, 16).ok()?,
                u64::from_str_radix(end, 16).ok()?,
            ))
        }))
    }

    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    /// What is in this set and not in the other.
    pub fn minus(&self, other: &Self) -> Self {
        let mut left = Vec::new();
        for &(mut start, end) in &self.0 {
            for &(taken_start, taken_end) in &other.0 {
                if taken_end <= start || taken_start >= end {
                    continue;
                }
                if taken_start > start {
                    left.push((start, taken_start));
                }
                start = start.max(taken_end);
            }
            if start < end {
                left.push((start, end));
            }
        }
        Self::new(left)
    }

    /// Fails the test with what is missing and what is too much.
    pub fn assert_equals(&self, expected: &Self, what: &str) {
        let (missing, extra) = (expected.minus(self), self.minus(expected));
        assert!(
            missing.0.is_empty() && extra.0.is_empty(),
            "{what}: missing {missing}, extra {extra}\n  reported {self}\n  expected {expected}"
        );
    }
}

impl fmt::Display for PageSet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{{")?;
        for (start, end) in &self.0 {
            write!(formatter, " {start:#x}+{:#x}", end - start)?;
        }
        write!(formatter, " }}")
    }
}

#[cfg(test)]
mod tests {
    use super::PageSet;

    #[test]
    fn neighbours_are_one_range() {
        assert_eq!(PageSet::new([(4, 8), (0, 4), (9, 10)]), PageSet::new([(0, 8), (9, 10)]));
    }

    #[test]
    fn a_difference_cuts_ranges_at_both_ends_and_in_the_middle() {
        let whole = PageSet::new([(0, 10), (20, 30)]);
        let holes = PageSet::new([(0, 1), (4, 6), (9, 22)]);
        assert_eq!(whole.minus(&holes), PageSet::new([(1, 4), (6, 9), (22, 30)]));
        assert_eq!(whole.minus(&whole).bytes(), 0);
    }
}
