//! What the kernel tells of an open descriptor (`/proc/self/fdinfo`).

use std::{fs, io, os::fd::RawFd};

/// The number behind a name; none when the kernel has no such line.
pub fn number(fd: RawFd, name: &str) -> io::Result<Option<u64>> {
    Ok(parse(&fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?, name))
}

fn parse(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_found_by_its_whole_name() {
        let text = "prog_type:\t26\nrun_cnt:\t0\nrecursion_misses:\t75852\nverified_insns:\tmany\n";
        assert_eq!(parse(text, "recursion_misses"), Some(75_852));
        assert_eq!(parse(text, "recursion"), None);
        assert_eq!(parse(text, "verified_insns"), None);
    }
}
