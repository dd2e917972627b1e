//! Names of one module's addresses, and the file that keeps them between sessions: a line that says
//! what follows, then JSON.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::module::Quality;
use crate::profile::Symbol;

/// Raise it when the same file gets other names than before.
const FORMAT: u32 = 1;

/// Entries beyond this are not kept. An address takes some 150 bytes.
pub(super) const FILE_MAX_BYTES: usize = 8 << 20;
/// What an address and a call take besides their strings, at most.
const ENTRY_BYTES: usize = 32;
const CALL_BYTES: usize = 40;
const STRING_BYTES: usize = 4;

#[derive(Debug, Default)]
pub(super) struct Names {
    strings: Vec<Arc<str>>,
    numbers: HashMap<Arc<str>, u32>,
    entries: HashMap<u64, Entry>,
    /// What the file would have at most.
    bytes: usize,
}

#[derive(Debug, Clone)]
struct Entry {
    quality: Quality,
    calls: Box<[Call]>,
}

/// A [`Symbol`]; function and file are indices of strings.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Call(u32, Option<u32>, Option<u32>, bool);

#[derive(Serialize, Deserialize)]
struct Stored {
    key: String,
    strings: Vec<String>,
    entries: Vec<(u64, u8, Vec<Call>)>,
}

impl Names {
    pub fn get(&self, svma: u64) -> Option<(Quality, Vec<Symbol>)> {
        let entry = self.entries.get(&svma)?;
        let string = |number: u32| Some(self.strings.get(number as usize)?.as_ref().to_owned());
        let symbols = entry.calls.iter().map(|&Call(function, file, line, inlined)| {
            let file = match file {
                Some(file) => Some(string(file)?),
                None => None,
            };
            Some(Symbol { function: string(function)?, file, line, inlined })
        });
        Some((entry.quality, symbols.collect::<Option<_>>()?))
    }

    /// Whether there was room for it.
    pub fn insert(&mut self, svma: u64, quality: Quality, symbols: &[Symbol]) -> bool {
        let strings = symbols.iter().flat_map(|symbol| {
            [symbol.function.len(), symbol.file.as_ref().map_or(0, String::len)]
        });
        let bytes = ENTRY_BYTES
            + symbols.len() * CALL_BYTES
            + strings.map(|length| length + STRING_BYTES).sum::<usize>();
        if self.bytes.saturating_add(bytes) > FILE_MAX_BYTES {
            return false;
        }
        let calls = symbols.iter().map(|symbol| {
            let function = self.number(&symbol.function);
            let file = symbol.file.as_deref().map(|file| self.number(file));
            Call(function, file, symbol.line, symbol.inlined)
        });
        let calls = calls.collect();
        self.bytes += ENTRY_BYTES + symbols.len() * CALL_BYTES;
        self.entries.insert(svma, Entry { quality, calls });
        true
    }

    fn number(&mut self, string: &str) -> u32 {
        if let Some(&number) = self.numbers.get(string) {
            return number;
        }
        let number = self.strings.len() as u32;
        let string: Arc<str> = Arc::from(string);
        self.bytes += string.len() + STRING_BYTES;
        self.strings.push(Arc::clone(&string));
        self.numbers.insert(string, number);
        number
    }

    /// Takes over what others have and we do not, or not as good.
    pub fn merge(&mut self, others: &Names) {
        for (&svma, theirs) in &others.entries {
            let ours = self.entries.get(&svma);
            if ours.is_none_or(|ours| ours.quality < theirs.quality)
                && let Some((quality, symbols)) = others.get(svma)
            {
                self.insert(svma, quality, &symbols);
            }
        }
    }

    pub fn size_bytes(&self) -> usize {
        self.bytes
    }

    /// The file of the module that `key` stands for.
    pub fn encode(&self, key: &str) -> Vec<u8> {
        // Strings of entries that were replaced are left out.
        let mut used = Names::default();
        let mut addresses: Vec<&u64> = self.entries.keys().collect();
        addresses.sort_unstable();
        let entries = addresses.into_iter().filter_map(|&svma| {
            let (quality, symbols) = self.get(svma)?;
            used.insert(svma, quality, &symbols);
            let entry = used.entries.remove(&svma)?;
            Some((svma, quality as u8, entry.calls.into_vec()))
        });
        let entries = entries.collect();
        let strings = used.strings.iter().map(|string| string.as_ref().to_owned()).collect();
        let stored = Stored { key: key.to_owned(), strings, entries };
        let json = serde_json::to_vec(&stored).unwrap_or_default();
        let mut bytes = head(&json).into_bytes();
        bytes.extend_from_slice(&json);
        bytes
    }

    /// `None` when the file is damaged, another version's, or another module's.
    pub fn decode(bytes: &[u8], key: &str) -> Option<Names> {
        let end = bytes.iter().take(128).position(|&byte| byte == b'\n')? + 1;
        let (line, json) = bytes.split_at_checked(end)?;
        if line != head(json).as_bytes() {
            return None;
        }
        let stored: Stored = serde_json::from_slice(json).ok()?;
        if stored.key != key {
            return None;
        }
        let mut names = Names { bytes: bytes.len(), ..Names::default() };
        names.strings = stored.strings.into_iter().map(Arc::from).collect();
        names.numbers = (0..).zip(&names.strings).map(|(n, s)| (Arc::clone(s), n)).collect();
        for (svma, quality, calls) in stored.entries {
            let quality = *Quality::ALL.get(usize::from(quality))?;
            let is_string = |number: u32| (number as usize) < names.strings.len();
            if !calls.iter().all(|call| is_string(call.0) && call.1.is_none_or(is_string)) {
                return None;
            }
            names.entries.insert(svma, Entry { quality, calls: calls.into() });
        }
        Some(names)
    }
}

/// The first line. Other versions of leakbpf may name the same code in another way.
fn head(json: &[u8]) -> String {
    let checksum = crc32fast::hash(json);
    format!("leakbpf names {FORMAT} {} {checksum:08x}\n", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "0123456789abcdef-u0";

    fn any_symbols() -> impl Strategy<Value = Vec<Symbol>> {
        let symbol = (
            "\\PC{0,12}",
            proptest::option::of("[a-c/\"\n]{0,6}"),
            any::<Option<u32>>(),
            any::<bool>(),
        );
        let symbol = symbol.prop_map(|(function, file, line, inlined)| Symbol {
            function,
            file,
            line,
            inlined,
        });
        proptest::collection::vec(symbol, 0..4)
    }

    fn any_names() -> impl Strategy<Value = Vec<(u64, Quality, Vec<Symbol>)>> {
        let entry = (any::<u64>(), proptest::sample::select(&Quality::ALL[..]), any_symbols());
        proptest::collection::vec(entry, 0..20)
    }

    fn names_of(entries: &[(u64, Quality, Vec<Symbol>)]) -> Names {
        let mut names = Names::default();
        for (svma, quality, symbols) in entries {
            assert!(names.insert(*svma, *quality, symbols));
        }
        names
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(entries in any_names()) {
            let bytes = names_of(&entries).encode(KEY);
            let back = Names::decode(&bytes, KEY).expect("readable");
            // Of entries for one address the last one counts.
            let last: HashMap<_, _> =
                entries.iter().map(|(svma, quality, symbols)| (*svma, (*quality, symbols))).collect();
            prop_assert_eq!(back.entries.len(), last.len());
            for (svma, (quality, symbols)) in last {
                prop_assert_eq!(back.get(svma), Some((quality, symbols.clone())));
            }
            prop_assert_eq!(back.encode(KEY), bytes);
        }

        #[test]
        fn a_changed_file_is_refused(
            entries in any_names(),
            at in any::<proptest::sample::Index>(),
            bit in 0..8u32,
        ) {
            let mut bytes = names_of(&entries).encode(KEY);
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(Names::decode(&bytes, KEY).is_none());
            prop_assert!(Names::decode(&bytes[..at], KEY).is_none());
        }

        /// The checksum says nothing about who wrote it.
        #[test]
        fn any_contents_under_a_right_checksum_do_no_harm(json in "\\PC{0,60}") {
            let numbers = ["[0]", "[1,2,3]", &json];
            for entries in numbers {
                let text = format!(
                    "{{\"key\":\"{KEY}\",\"strings\":[\"a\"],\"entries\":[[1,9,[]],[2,0,{entries}]]}}"
                );
                for json in [text.as_bytes(), json.as_bytes()] {
                    let mut bytes = head(json).into_bytes();
                    bytes.extend_from_slice(json);
                    prop_assert!(Names::decode(&bytes, KEY).is_none());
                }
            }
        }
    }

    #[test]
    fn strings_that_are_not_there_are_refused() {
        for (call, is_right) in
            [("[0,0,1,true]", true), ("[1,null,1,true]", false), ("[0,1,1,true]", false)]
        {
            let json =
                format!("{{\"key\":\"{KEY}\",\"strings\":[\"a\"],\"entries\":[[7,0,[{call}]]]}}");
            let mut bytes = head(json.as_bytes()).into_bytes();
            bytes.extend_from_slice(json.as_bytes());
            assert_eq!(Names::decode(&bytes, KEY).is_some(), is_right, "{call}");
            assert!(Names::decode(&bytes, "another").is_none());
        }
    }

    fn symbol(function: &str) -> Vec<Symbol> {
        vec![Symbol { function: function.to_owned(), file: None, line: None, inlined: false }]
    }

    #[test]
    fn the_better_of_two_names_is_kept() {
        let mut ours = names_of(&[
            (1, Quality::Symbols, symbol("ours")),
            (2, Quality::DebugInfo, symbol("ours")),
            (3, Quality::Symbols, symbol("ours")),
        ]);
        ours.merge(&names_of(&[
            (1, Quality::DebugInfo, symbol("theirs")),
            (2, Quality::Symbols, symbol("theirs")),
            (3, Quality::Symbols, symbol("theirs")),
            (4, Quality::Symbols, symbol("theirs")),
        ]));
        let functions =
            [1, 2, 3, 4].map(|svma| ours.get(svma).expect("known").1[0].function.clone());
        assert_eq!(functions, ["theirs", "ours", "ours", "theirs"]);
        // The string that nothing refers to any more stays out of the file.
        ours.insert(2, Quality::DebugInfo, &symbol("new"));
        ours.insert(3, Quality::DebugInfo, &symbol("new"));
        let text = String::from_utf8(ours.encode(KEY)).expect("text");
        assert!(text.contains("theirs") && !text.contains("ours\""), "{text}");
    }

    #[test]
    fn the_file_never_exceeds_its_limit() {
        let mut names = Names::default();
        let mut svma = u64::MAX;
        let escaped = "\u{1}".repeat(100);
        while names.insert(svma, Quality::DebugInfo, &symbol(&format!("{svma}{escaped}"))) {
            svma -= 1;
        }
        assert!(u64::MAX - svma > 10_000);
        // What JSON escapes takes six times its length.
        assert!(names.encode(KEY).len() < 6 * FILE_MAX_BYTES);
    }
}
