//! The numbers of modules in the kernel side's frames
//! ([`FramePlace::Module`](leakbpf_common::abi::FramePlace)), shared by the thread that gives them
//! and the session that reads them.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    ops::RangeInclusive,
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use leakbpf_common::abi::{FrameWord, Owner};

use crate::process::{
    Pid,
    maps::{FileId, Mapping, Maps},
};

/// Files that wait for the session. Those beyond it has to open itself, while they are mapped.
const OPENED_MAX: usize = 1024;

/// Lists of mappings that wait for the session.
const LISTS_MAX: usize = 64;

/// Tells a file from one that has its inode number after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    modified: (i64, i64),
    bytes: u64,
}

impl Stamp {
    pub fn of(file: &File) -> Option<Self> {
        let metadata = file.metadata().ok()?;
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Some(Self { modified, bytes: metadata.len() })
    }
}

/// Whose code it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    File(FileId),
    /// The kernel's own page of code, the same in every process.
    Vdso,
}

/// What a frame's offset counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Base {
    /// The file's first byte.
    FileStart,
    /// An address as the file states it.
    Svma(u64),
}

/// What a number stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Numbered {
    pub origin: Origin,
    /// `None` when it could not be opened.
    pub stamp: Option<Stamp>,
    pub base: Base,
}

/// A file that was opened for its table, which the session names code from: by the time that it
/// looks, the file may not be mapped any more.
#[derive(Debug)]
pub struct Opened {
    pub pid: Pid,
    pub mapping: Mapping,
    pub file: File,
}

/// The mappings of a process, read soon after they changed.
#[derive(Debug)]
pub struct Listed {
    pub owner: Owner,
    /// Library epochs before and after they were read.
    pub epochs: RangeInclusive<u32>,
    pub maps: Maps,
}

/// See the module's documentation.
#[derive(Debug, Clone, Default)]
pub struct Numbers {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    numbers: HashMap<Numbered, u32>,
    /// From number 1 on.
    modules: Vec<Numbered>,
    opened: Vec<Opened>,
    lists: VecDeque<Listed>,
}

impl Numbers {
    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` when all numbers are given.
    pub fn of(&self, module: Numbered) -> Option<u32> {
        let Shared { numbers, modules, .. } = &mut *self.shared();
        if let Some(&known) = numbers.get(&module) {
            return Some(known);
        }
        let number = u32::try_from(modules.len()).ok()?.checked_add(1)?;
        if number >= FrameWord::MODULES_MAX {
            return None;
        }
        modules.push(module);
        numbers.insert(module, number);
        Some(number)
    }

    pub fn get(&self, number: u32) -> Option<Numbered> {
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        self.shared().modules.get(index).copied()
    }

    pub fn keep(&self, opened: Opened) {
        let waiting = &mut self.shared().opened;
        if waiting.len() < OPENED_MAX {
            waiting.push(opened);
        }
    }

    pub fn tell(&self, list: Listed) {
        let lists = &mut self.shared().lists;
        if lists.len() >= LISTS_MAX {
            lists.pop_front();
        }
        lists.push_back(list);
    }

    pub fn take_lists(&self) -> VecDeque<Listed> {
        std::mem::take(&mut self.shared().lists)
    }

    pub fn take_opened(&self) -> Vec<Opened> {
        std::mem::take(&mut self.shared().opened)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_has_one_number_and_a_number_one_module() {
        let numbers = Numbers::default();
        let module = Numbered { origin: Origin::Vdso, stamp: None, base: Base::FileStart };
        let other = Numbered { base: Base::Svma(0x1000), ..module };
        let (first, second) = (numbers.of(module), numbers.of(other));
        assert_eq!((first, second), (Some(1), Some(2)));
        assert_eq!(numbers.of(module), first);
        assert_eq!((numbers.get(1), numbers.get(2)), (Some(module), Some(other)));
        assert_eq!((numbers.get(0), numbers.get(3)), (None, None));
    }
}
