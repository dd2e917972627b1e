//! Where the dynamic loader of a process tells debuggers that its list of libraries has changed.

use std::io::Read as _;

use super::mapped_file::MappedFile;
use super::maps::Maps;
use super::{Pid, ProcessError, read_proc};
use crate::elf::file::ElfFile;
use crate::elf::symbols::FunctionSymbol;

/// `AT_BASE` of the kernel's include/uapi/linux/auxvec.h: load address of the program's interpreter.
const AT_BASE: u64 = 7;
/// Offset of `r_state` in `struct r_debug` (glibc's link.h; musl's is laid out alike).
const R_STATE_OFFSET: u64 = 24;
/// `RT_CONSISTENT`: every library in the list is mapped and relocated.
const RT_CONSISTENT: u32 = 0;
/// Loaders are a few hundred kilobytes, with debug information some megabytes.
const LOADER_LIMIT_BYTES: u64 = 64 << 20;

/// The function that the loader calls at every change, and its record of the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoaderHook {
    /// `_dl_debug_state`.
    pub function_avma: u64,
    record: Option<Record>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Record {
    /// `_r_debug` (glibc): the structure itself.
    At(u64),
    /// `_dl_debug_addr` (musl): a pointer to it.
    PointerAt(u64),
}

impl LoaderHook {
    /// `None` when the process has no interpreter (a static program) or one without the hook.
    pub fn find(pid: Pid, maps: &Maps) -> Result<Option<Self>, ProcessError> {
        let Some(base_avma) = interpreter_base(&read_proc(pid, "auxv")?) else {
            return Ok(None);
        };
        let Some(mapping) = maps.find(base_avma) else {
            return Ok(None);
        };
        let Ok(loader) = MappedFile::open(pid, mapping) else {
            return Ok(None);
        };
        // Read, not mapped: any program can name an interpreter of its own, and truncate it.
        let mut bytes = Vec::new();
        let limit = LOADER_LIMIT_BYTES + 1;
        if loader.file().take(limit).read_to_end(&mut bytes).is_err() || bytes.len() as u64 == limit
        {
            return Ok(None);
        }
        Ok(Self::in_file(&bytes, base_avma))
    }

    fn in_file(bytes: &[u8], base_avma: u64) -> Option<Self> {
        let file = ElfFile::parse(bytes).ok()?;
        let bias = base_avma.wrapping_sub(file.lowest_svma()? & !0xfff);
        let (mut function, mut structure, mut pointer) = (None, None, None);
        let mut note = |symbol: FunctionSymbol<'_>| {
            let place = match symbol.name {
                b"_dl_debug_state" => &mut function,
                b"_r_debug" => &mut structure,
                b"_dl_debug_addr" => &mut pointer,
                _ => return,
            };
            place.get_or_insert(symbol.svma.wrapping_add(bias));
        };
        file.visit_functions(&mut note);
        file.visit_variables(&mut note);
        let record = structure.map(Record::At).or(pointer.map(Record::PointerAt));
        Some(Self { function_avma: function?, record })
    }

    /// Whether the call that happens now is the one after the last library, as `read` (eight bytes
    /// at an address) finds the loader's record. Without a record every call counts.
    pub fn list_is_consistent(&self, read: impl Fn(u64) -> Option<u64>) -> bool {
        let avma = match self.record {
            None => return true,
            Some(Record::At(avma)) => Some(avma),
            Some(Record::PointerAt(avma)) => read(avma),
        };
        let state = avma.and_then(|avma| read(avma.wrapping_add(R_STATE_OFFSET)));
        state.is_none_or(|word| word as u32 == RT_CONSISTENT)
    }
}

/// `auxv` is that of a 64-bit process; a 32-bit one's has no pair that looks like a load address.
fn interpreter_base(auxv: &[u8]) -> Option<u64> {
    let word = |bytes: &[u8]| Some(u64::from_ne_bytes(bytes.try_into().ok()?));
    auxv.chunks_exact(16)
        .find_map(|pair| {
            let (kind, value) = pair.split_at(8);
            (word(kind)? == AT_BASE).then(|| word(value)).flatten()
        })
        .filter(|&base| base != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interpreters_base_is_found_between_other_entries() {
        let auxv = |pairs: &[(u64, u64)]| -> Vec<u8> {
            pairs
                .iter()
                .flat_map(|(kind, value)| [kind.to_ne_bytes(), value.to_ne_bytes()].concat())
                .collect()
        };
        let base = 0x7f00_0000_0000;
        assert_eq!(interpreter_base(&auxv(&[(3, 64), (7, base), (0, 0)])), Some(base));
        assert_eq!(interpreter_base(&auxv(&[(3, 64), (7, 0), (0, 0)])), None);
        assert_eq!(interpreter_base(&auxv(&[(3, 64)])), None);
        assert_eq!(interpreter_base(b"\x07\0\0\0\0\0\0\0short"), None);
    }

    #[test]
    fn the_state_is_read_through_either_kind_of_record() {
        let memory = |state: u64| {
            move |avma: u64| match avma {
                0x100 => Some(0x200),
                0x218 => Some(0xffff_ffff_0000_0000 | state),
                _ => None,
            }
        };
        let hook = |record| LoaderHook { function_avma: 0, record };
        for record in [Record::At(0x200), Record::PointerAt(0x100)] {
            assert!(hook(Some(record)).list_is_consistent(memory(0)));
            assert!(!hook(Some(record)).list_is_consistent(memory(1)));
            assert!(!hook(Some(record)).list_is_consistent(memory(2)));
        }
        assert!(hook(None).list_is_consistent(memory(1)));
    }

    #[test]
    fn the_loader_of_this_process_has_a_hook_and_a_record_in_itself() {
        let maps = Maps::of(Pid::current()).expect("our own");
        let hook = LoaderHook::find(Pid::current(), &maps).expect("readable").expect("a hook");
        let (code, _) = maps.locate(hook.function_avma).expect("in a file");
        assert!(code.permissions.execute);
        let Some(Record::At(avma) | Record::PointerAt(avma)) = hook.record else {
            panic!("no record");
        };
        assert!(maps.find(avma).expect("mapped").permissions.read);
    }

    #[test]
    fn a_file_that_is_no_loader_has_no_hook() {
        assert_eq!(LoaderHook::in_file(b"", 0x1000), None);
        let own = std::fs::read(std::env::current_exe().expect("exe")).expect("readable");
        assert_eq!(LoaderHook::in_file(&own, 0x1000), None);
    }
}
