//! Names as their authors wrote them.

use std::fmt::{self, Write};

use cpp_demangle::{DemangleOptions, ParseOptions};

/// Longer names are kept as they are, cut at this length.
pub(super) const NAME_MAX_BYTES: usize = 64 << 10;
/// Mangled names can refer back to their own parts, so that a short one can grow without end.
const MANGLED_MAX_BYTES: usize = 16 << 10;
/// For writing, which takes no longer than the name that comes out of it.
const RECURSION_MAX: u32 = 128;

/// How deep the parts of a C++ name of so many bytes may be nested. The parser tries what a part could
/// be one after the other, and inside of it again: a name of 46 bytes that is wrong in its 84th level
/// takes 0.1 s, and each seven levels more take 3.6 times as long. With these limits the worst name
/// that was found takes 0.3 s. Of 209,578 names of C++ libraries and programs, 35 are deeper.
const fn nesting_max(name_bytes: usize) -> u32 {
    match name_bytes {
        0..=256 => 64,
        257..=1024 => 56,
        1025..=4096 => 44,
        _ => 32,
    }
}

/// The source-level form of a symbol name: Rust without the hash, C++ with parameters, everything
/// else unchanged but for a symbol version (`@GLIBC_2.2.5`), which is dropped.
pub fn demangle(name: &str) -> String {
    let name = without_version(cut(name));
    if name.len() <= MANGLED_MAX_BYTES {
        if let Ok(rust) = rustc_demangle::try_demangle(name)
            && let Some(plain) = written(format_args!("{rust:#}"))
        {
            return plain;
        }
        if let Some(plain) = demangle_cpp(name) {
            return plain;
        }
    }
    name.to_owned()
}

/// Is the name in a mangled form, which is a language's own and not one of several aliases?
pub(super) fn is_mangled(name: &str) -> bool {
    name.starts_with("_Z") || name.starts_with("_R")
}

pub(super) fn without_version(name: &str) -> &str {
    match name.find('@') {
        Some(at) if at > 0 => name.get(..at).unwrap_or(name),
        _ => name,
    }
}

fn demangle_cpp(name: &str) -> Option<String> {
    if !name.starts_with("_Z") && !name.starts_with("_GLOBAL_") {
        return None;
    }
    let parsing = ParseOptions::default().recursion_limit(nesting_max(name.len()));
    let symbol = cpp_demangle::Symbol::new_with_options(name, &parsing).ok()?;
    let writing = DemangleOptions::default().recursion_limit(RECURSION_MAX);
    let mut plain = Bounded(String::new());
    symbol.structured_demangle(&mut plain, &writing).ok().map(|()| plain.0)
}

fn cut(name: &str) -> &str {
    name.get(..name.floor_char_boundary(NAME_MAX_BYTES)).unwrap_or(name)
}

fn written(text: fmt::Arguments) -> Option<String> {
    let mut plain = Bounded(String::new());
    plain.write_fmt(text).ok().map(|()| plain.0)
}

/// A string that refuses to outgrow [`NAME_MAX_BYTES`].
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        if self.0.len() + part.len() > NAME_MAX_BYTES {
            return Err(fmt::Error);
        }
        self.0.push_str(part);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn rust_names_lose_their_hash() {
        assert_eq!(
            demangle("_ZN4core3fmt9Formatter9write_str17h0123456789abcdefE"),
            "core::fmt::Formatter::write_str"
        );
        assert_eq!(demangle("_RNvCskwGfYPst2Cb_7mycrate3foo"), "mycrate::foo");
    }

    #[test]
    fn cpp_names_keep_their_parameters() {
        assert_eq!(demangle("_Znwm"), "operator new(unsigned long)");
        assert_eq!(
            demangle("_ZNSt6vectorIiSaIiEE9push_backERKi"),
            "std::vector<int, std::allocator<int> >::push_back(int const&)"
        );
    }

    #[test]
    fn plain_names_stay_and_versions_go() {
        assert_eq!(demangle("malloc"), "malloc");
        assert_eq!(demangle("memcpy@@GLIBC_2.14"), "memcpy");
        assert_eq!(demangle("_Zthis is not mangled"), "_Zthis is not mangled");
        assert_eq!(demangle(""), "");
        assert_eq!(demangle("@"), "@");
    }

    #[test]
    fn a_name_that_grows_without_end_is_left_as_it_is() {
        // Each substitution doubles the one before it.
        let mut name = String::from("_Z1fI1aS_E");
        for depth in 0..40 {
            name = format!("_Z1f{}", "I".repeat(depth) + "1aS_S_S0_S0_S1_S1_S2_S2_E");
        }
        let _ = demangle(&name);
        let deep = format!("_Z1f{}i", "P".repeat(15_000));
        assert_eq!(demangle(&deep), deep);
        assert!(demangle(&"x".repeat(1 << 20)).len() <= NAME_MAX_BYTES);
    }

    /// Found by the fuzzer: parts that could each be two things, and are neither.
    #[test]
    fn names_with_many_readings_are_not_read_in_every_way() {
        let found = "_ZN5ou4RingIPcvKcL4RingIngIPcvKv2_oRingIPcvKcL4RingIngIPcvK2_5oIPcIngIPcvK2_5oIPcvKcL\
            4RingIngIPcvK2_5u4RingIP2_oRingIPcvKcL4RingIngIPcvK2_5oIPcIngIPcvK2_5oIPcvKcL4RingIngIPcvK2_5u\
            4RingIPcvKcL4RingIngIPcvK2_5ovKcL4RingIngIPcvK2_5u4RingIPcvKc14RingIngIPcvK2_5oIPcvKcL4RingIng";
        let shortest = format!("_Z1fI{}$", "L1aI".repeat(30));
        let wide = format!("_Z1fI{}{}$", "L1aI".repeat(6), "1bIiE".repeat(190));
        let start = Instant::now();
        for name in [found, &shortest, &wide] {
            assert_eq!(demangle(name), name);
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    }
}
