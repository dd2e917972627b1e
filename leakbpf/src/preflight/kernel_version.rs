//! Kernel release numbers. They decide only where the kernel cannot be asked: distributions carry
//! features and repairs back.

use std::fmt;

/// The three numbers that `uname -r` begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl KernelVersion {
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// From `uname -r`: `6.1.0-18-amd64`, `5.15.153.1-microsoft-standard-WSL2`, `6.14-rc1`.
    pub fn parse(release: &str) -> Option<Self> {
        let numbers = release.split(|c: char| c != '.' && !c.is_ascii_digit()).next()?;
        let mut numbers = numbers.split('.');
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?.parse().ok()?;
        let patch = match numbers.next() {
            Some(patch) if !patch.is_empty() => patch.parse().ok()?,
            _ => 0,
        };
        Some(Self { major, minor, patch })
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions_are_understood() {
        for (release, expected) in [
            ("6.18.44-fc-v657", (6, 18, 44)),
            ("6.1.0-18-amd64", (6, 1, 0)),
            ("5.15.153.1-microsoft-standard-WSL2", (5, 15, 153)),
            ("6.14-rc1", (6, 14, 0)),
            ("7.0", (7, 0, 0)),
            ("5.14.0-427.el9.x86_64", (5, 14, 0)),
            ("6.12.+", (6, 12, 0)),
        ] {
            let (major, minor, patch) = expected;
            let expected = KernelVersion::new(major, minor, patch);
            assert_eq!(KernelVersion::parse(release), Some(expected), "{release}");
        }
        for release in ["", "6", "linux", "6.x", "99999999999.1.1"] {
            assert_eq!(KernelVersion::parse(release), None, "{release}");
        }
    }

    #[test]
    fn versions_compare_number_by_number() {
        assert!(KernelVersion::new(5, 4, 200) < KernelVersion::new(5, 15, 0));
        assert!(KernelVersion::new(6, 12, 13) < KernelVersion::new(6, 12, 14));
    }
}
