//! What the kernel side walks stacks with: each executable file's table once, however many
//! processes map it, and each process's list of mappings.
//!
//! Memory is bounded: a file whose table does not fit any more is walked by frame pointers, and
//! counted.
//!
//! A process's list of mappings is written by the session, which takes processes in and lets them
//! go, and by the thread that reads the kernel side's records ([`super::inbox`]). Its mappings are
//! read inside the lock, so that what is written last is what was read last.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use leakbpf_common::{
    abi::{Owner, ProcessState, process_flags},
    table::{AddressSpace, ExecutableMapping, MAPPINGS_MAX, TABLES_MAX, no_table},
};

use super::numbers::{Base, Listed, Numbered, Numbers, Opened, Origin, Stamp};
use crate::{
    elf::image::{Image, Segment, Source},
    probe::{
        records::Record,
        tables::Table as KernelTable,
        unwind_maps::{UnloadedTable, UnwindMaps},
    },
    process::{
        Pid,
        mapped_file::MappedFile,
        maps::{Backing, Mapping, Maps},
    },
    symbolize::vdso,
    unwind::{Packed, Table},
};

/// Code made at run time comes and goes within such a reach of itself (V8's code range); it is
/// listed as one mapping.
const RUN_TIME_CODE_REACH_BYTES: u64 = 512 << 20;

/// When tables take longer, those that are ready are made known before the rest: a library's
/// constructors run soon after it is mapped, while the next library's table is compiled.
const TOLD_EVERY: Duration = Duration::from_millis(2);

/// A table for so much code takes 10 ms and more.
const LARGE_BYTES: u64 = 4 << 20;

/// The loader tells that it begins, and then that it is done. What it maps first may be large, and
/// what comes with it must not wait for it.
const SETTLED_AFTER: Duration = Duration::from_millis(2);

/// How often a process's mappings are read again because libraries came meanwhile.
const TURNS: usize = 8;

/// A table that the kernel side has.
#[derive(Debug)]
struct Loaded {
    serial: u32,
    bytes: u64,
    svma: Range<u64>,
    /// Executable ones.
    segments: Vec<Segment>,
}

#[derive(Debug)]
struct Shared {
    /// `None` for files without rows, and for those whose table did not fit.
    loaded: Option<Loaded>,
    stamp: Option<Stamp>,
    users: usize,
}

/// What the kernel side knows of a process.
#[derive(Debug, Clone)]
struct Told {
    uses: HashSet<Origin>,
    library_epoch: u32,
    mappings: Vec<ExecutableMapping>,
}

/// What a record says of the code that stacks lead through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeChange {
    /// A process has other mappings than before, or was never met.
    Mappings(Owner),
    Fork {
        parent: Owner,
        child: Owner,
    },
    /// `old` is the life that ended, unless its memory belongs to another process.
    Exec {
        old: Option<Owner>,
        new: Owner,
    },
}

impl CodeChange {
    pub fn of(record: &Record) -> Option<Self> {
        let borrows = |flags: u32| flags & process_flags::BORROWS_MEMORY != 0;
        match record {
            Record::Libraries(record) | Record::Seen(record) => {
                Some(Self::Mappings(record.head.owner))
            }
            Record::Unmapped(record) => Some(Self::Mappings(record.head.owner)),
            // A vfork child uses its parent's memory until its exec.
            Record::Fork(fork) if borrows(fork.flags) => None,
            Record::Fork(fork) => Some(Self::Fork { parent: fork.head.owner, child: fork.child }),
            Record::Exec(exec) => {
                let old = (!borrows(exec.old_flags)).then_some(exec.old);
                Some(Self::Exec { old, new: exec.head.owner })
            }
            Record::Stack(_)
            | Record::Mapping(_)
            | Record::Page(_)
            | Record::CarrierEnded(_)
            | Record::Ended(_) => None,
        }
    }
}

/// What did not fit.
#[derive(Debug, Clone, Copy, Default)]
pub struct Losses {
    /// Files whose table did not fit.
    pub tables_full: u64,
    /// Lists of mappings that did not fit their map.
    pub spaces_full: u64,
}

/// See the module's documentation.
pub struct Unwinding {
    kernel: Arc<UnwindMaps>,
    processes: Arc<KernelTable<u32, ProcessState>>,
    known: Mutex<Known>,
    numbers: Numbers,
}

impl Unwinding {
    /// `max_bytes` of kernel memory for all tables together.
    pub fn new(
        kernel: Arc<UnwindMaps>,
        processes: Arc<KernelTable<u32, ProcessState>>,
        max_bytes: u64,
    ) -> Self {
        let numbers = Numbers::default();
        let known = Known { max_bytes, numbers: numbers.clone(), ..Known::default() };
        Self { kernel, processes, known: Mutex::new(known), numbers }
    }

    /// What the modules' numbers in stacks mean.
    pub fn numbers(&self) -> Numbers {
        self.numbers.clone()
    }

    /// Takes in a process that the kernel side does not watch yet.
    pub fn begin(&self, owner: Owner, pid: Pid, maps: &Maps) {
        self.known().take_in(&self.kernel, owner, pid, maps, 0);
    }

    /// Reads a process's mappings and tells the kernel side, if it is a process of the session
    /// still.
    pub fn refresh(&self, owner: Owner) {
        let mut known = self.known();
        let pid = Pid(owner.tgid());
        for turn in 1..=TURNS {
            // First: code that goes after it was read belongs to a later time.
            let Some(first) = self.current_epoch(owner) else { break };
            let Ok(maps) = Maps::of(pid) else { break };
            let Some(last) = self.current_epoch(owner) else { break };
            self.numbers.tell(Listed { owner, epochs: first..=last, maps: maps.clone() });
            let outdated = || turn < TURNS && self.current_epoch(owner) != Some(first);
            if known.refresh(&self.kernel, owner, pid, &maps, first, outdated) {
                break;
            }
        }
        known.release_unused(&self.kernel);
    }

    /// A process has ended, or begun another life. The kernel side's map of processes says so
    /// already.
    pub fn forget(&self, owner: Owner) {
        self.known().forget(&self.kernel, owner);
    }

    /// Does what the records ask for, which were all sent before now, in their order.
    pub fn apply(&self, changes: &[CodeChange]) {
        let mut refreshed = HashSet::new();
        for &change in changes {
            match change {
                // Mappings are read as they are now: once is enough.
                CodeChange::Mappings(owner) => {
                    if refreshed.insert(owner) {
                        self.refresh(owner);
                    }
                }
                CodeChange::Fork { parent, child } => self.inherit(parent, child),
                CodeChange::Exec { old, new } => {
                    if let Some(old) = old {
                        self.forget(old);
                    }
                    self.refresh(new);
                }
            }
        }
    }

    pub fn losses(&self) -> Losses {
        let known = self.known();
        let Losses { tables_full, spaces_full } = known.losses;
        Losses { tables_full: tables_full + self.kernel.failed(), spaces_full }
    }

    /// A forked child has its parent's mappings. The kernel side has given it its parent's list
    /// when it began; tables that the parent lets go of must stay for the child.
    fn inherit(&self, parent: Owner, child: Owner) {
        let mut known = self.known();
        let Some(library_epoch) = self.current_epoch(child) else { return };
        if !known.inherit(&self.kernel, parent, child, library_epoch) {
            drop(known);
            self.refresh(child);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` when the life is over. Whoever ends one takes it out of the kernel side's map first
    /// and then forgets it: what is current inside the lock will be forgotten later, if at all.
    fn current_epoch(&self, owner: Owner) -> Option<u32> {
        let state = self.processes.get(&owner.tgid()).ok().flatten()?;
        (state.owner == owner).then_some(state.library_epoch)
    }
}

/// What the kernel side has.
#[derive(Debug, Default)]
struct Known {
    tables: HashMap<Origin, Shared>,
    told: HashMap<Owner, Told>,
    serials: Serials,
    bytes: u64,
    max_bytes: u64,
    /// Copied, not loaded yet.
    unloaded: Vec<UnloadedTable>,
    losses: Losses,
    numbers: Numbers,
}

/// Serial numbers of tables; see [`TABLES_MAX`].
#[derive(Debug, Default)]
struct Serials {
    last: u32,
    /// Positions, not serial numbers.
    taken: HashSet<u32>,
    /// Of tables that the kernel side no longer has.
    returned: Arc<Mutex<Vec<u32>>>,
}

impl Serials {
    /// `None` when as many tables are loaded as there is room for, or when all numbers are used up.
    fn take(&mut self) -> Option<u32> {
        let count = TABLES_MAX as u32;
        let returned =
            std::mem::take(&mut *self.returned.lock().unwrap_or_else(PoisonError::into_inner));
        for serial in returned {
            self.give_back(serial);
        }
        if self.taken.len() >= TABLES_MAX || self.last >= no_table::TRAMPOLINE - count {
            return None;
        }
        loop {
            self.last += 1;
            if self.taken.insert(self.last % count) {
                return Some(self.last);
            }
        }
    }

    fn give_back(&mut self, serial: u32) {
        self.taken.remove(&(serial % TABLES_MAX as u32));
    }
}

impl Known {
    /// Tells the kernel side what code a process has: loads the tables of files that are new,
    /// replaces the list of its mappings, and drops the tables that nobody uses any more. Returns
    /// whether it did: not when the mappings are outdated meanwhile.
    fn refresh(
        &mut self,
        kernel: &UnwindMaps,
        owner: Owner,
        pid: Pid,
        maps: &Maps,
        library_epoch: u32,
        outdated: impl Fn() -> bool,
    ) -> bool {
        if maps.is_empty() {
            return true;
        }
        let began = Instant::now();
        let mut told: Option<Instant> = None;
        for (origin, mapping) in self.lacking(maps) {
            // At once, too: what is mapped is known by its name before it has a table.
            if told.is_none_or(|told| told.elapsed() >= TOLD_EVERY) {
                let mappings = self.list(maps);
                self.publish(kernel, owner, &mappings, library_epoch);
                told = Some(Instant::now());
            }
            if mapping.end_avma - mapping.start_avma >= LARGE_BYTES {
                std::thread::sleep(SETTLED_AFTER.saturating_sub(began.elapsed()));
            }
            if outdated() {
                return false;
            }
            self.load(kernel, origin, pid, mapping);
        }
        self.take_in(kernel, owner, pid, maps, library_epoch);
        true
    }

    /// [`Self::refresh`] all at once.
    fn take_in(
        &mut self,
        kernel: &UnwindMaps,
        owner: Owner,
        pid: Pid,
        maps: &Maps,
        library_epoch: u32,
    ) {
        if maps.is_empty() {
            return;
        }
        for (origin, mapping) in self.lacking(maps) {
            self.load(kernel, origin, pid, mapping);
        }
        let mappings = self.list(maps);
        let uses = code_of_modules(maps).map(|(origin, _)| origin).collect();
        let before = self.told.get(&owner);
        let same = |told: &Told| told.mappings == mappings && told.library_epoch == library_epoch;
        if !before.is_some_and(same) {
            self.publish(kernel, owner, &mappings, library_epoch);
        }
        self.tell(kernel, owner, Told { uses, library_epoch, mappings });
    }

    /// Files whose tables were not looked for yet: small ones, which are ready soon, first.
    fn lacking<'a>(&self, maps: &'a Maps) -> Vec<(Origin, &'a Mapping)> {
        let mut lacking: Vec<_> =
            code_of_modules(maps).filter(|(origin, _)| !self.tables.contains_key(origin)).collect();
        lacking.sort_by_key(|(_, mapping)| mapping.end_avma - mapping.start_avma);
        lacking
    }

    /// The list of a process's mappings, as far as tables are there.
    fn list(&self, maps: &Maps) -> Vec<ExecutableMapping> {
        let mut list = List::default();
        for mapping in maps.iter().filter(|mapping| mapping.permissions.execute) {
            let avma = mapping.start_avma..mapping.end_avma;
            if let Some(origin) = origin_of(mapping) {
                list.module(mapping, origin, self.tables.get(&origin), &self.numbers);
            } else if matches!(&mapping.backing, Backing::Special(name) if name == "[uprobes]") {
                list.push(avma, no_table::TRAMPOLINE, 0);
            } else {
                list.run_time_code(avma);
            }
        }
        list.chosen()
    }

    /// Whether the parent is known as it was when the child began.
    fn inherit(
        &mut self,
        kernel: &UnwindMaps,
        parent: Owner,
        child: Owner,
        library_epoch: u32,
    ) -> bool {
        let Some(told) = self.told.get(&parent).cloned() else { return false };
        if told.library_epoch != library_epoch {
            return false;
        }
        // The parent's list may have changed since.
        self.publish(kernel, child, &told.mappings, library_epoch);
        self.tell(kernel, child, told);
        true
    }

    /// Gives the kernel side a process's list and the tables that it names.
    fn publish(
        &mut self,
        kernel: &UnwindMaps,
        owner: Owner,
        mappings: &[ExecutableMapping],
        library_epoch: u32,
    ) {
        // First, or a walk would meet a table that is not there yet.
        kernel.load(std::mem::take(&mut self.unloaded));
        let space = space(owner, mappings, library_epoch);
        self.losses.spaces_full += u64::from(kernel.set_space(&space).is_err());
    }

    fn tell(&mut self, kernel: &UnwindMaps, owner: Owner, told: Told) {
        for origin in &told.uses {
            if let Some(shared) = self.tables.get_mut(origin) {
                shared.users += 1;
            }
        }
        if let Some(before) = self.told.insert(owner, told) {
            self.release(kernel, before.uses);
        }
    }

    fn forget(&mut self, kernel: &UnwindMaps, owner: Owner) {
        // Gone already when the process never had a list.
        let _ = kernel.remove_space(owner);
        if let Some(told) = self.told.remove(&owner) {
            self.release(kernel, told.uses);
        }
    }

    fn release(&mut self, kernel: &UnwindMaps, origins: HashSet<Origin>) {
        let mut unused = Vec::new();
        for origin in origins {
            let Some(shared) = self.tables.get_mut(&origin) else { continue };
            shared.users = shared.users.saturating_sub(1);
            if shared.users > 0 {
                continue;
            }
            if let Some(Shared { loaded: Some(loaded), .. }) = self.tables.remove(&origin) {
                self.bytes -= loaded.bytes;
                unused.push(loaded.serial);
            }
        }
        if !unused.is_empty() {
            let returned = Arc::clone(&self.serials.returned);
            kernel.unload(unused, move |serial| {
                returned.lock().unwrap_or_else(PoisonError::into_inner).push(serial);
            });
        }
    }

    /// Drops the tables that were loaded for a process that ended meanwhile.
    fn release_unused(&mut self, kernel: &UnwindMaps) {
        let unused = self.tables.iter().filter(|(_, shared)| shared.users == 0);
        let unused: HashSet<Origin> = unused.map(|(&origin, _)| origin).collect();
        if !unused.is_empty() {
            kernel.load(std::mem::take(&mut self.unloaded));
            self.release(kernel, unused);
        }
    }

    fn load(&mut self, kernel: &UnwindMaps, origin: Origin, pid: Pid, mapping: &Mapping) {
        if self.tables.contains_key(&origin) {
            return;
        }
        let file = match origin {
            Origin::File(_) => MappedFile::open(pid, mapping)
                .ok()
                .and_then(|opened| opened.file().try_clone().ok()),
            Origin::Vdso => None,
        };
        let stamp = file.as_ref().and_then(Stamp::of);
        if let Some(file) = file.as_ref().and_then(|file| file.try_clone().ok()) {
            self.numbers.keep(Opened { pid, mapping: mapping.clone(), file });
        }
        let loaded = match packed(origin, file) {
            None => None,
            Some((packed, segments)) => {
                let loaded = self.give(kernel, &packed, segments);
                self.losses.tables_full += u64::from(loaded.is_none());
                loaded
            }
        };
        self.tables.insert(origin, Shared { loaded, stamp, users: 0 });
    }

    /// `None` when there is no room.
    fn give(
        &mut self,
        kernel: &UnwindMaps,
        packed: &Packed,
        segments: Vec<Segment>,
    ) -> Option<Loaded> {
        let bytes = packed.size_bytes() as u64;
        if self.bytes + bytes > self.max_bytes {
            return None;
        }
        let serial = self.serials.take()?;
        match kernel.copy(serial, &packed.blocks) {
            Ok(table) => self.unloaded.push(table),
            Err(_) => {
                self.serials.give_back(serial);
                return None;
            }
        }
        self.bytes += bytes;
        Some(Loaded { serial, bytes, svma: packed.svma.clone(), segments })
    }
}

/// Executable mappings of files, and the vDSO.
fn code_of_modules(maps: &Maps) -> impl Iterator<Item = (Origin, &Mapping)> {
    maps.iter()
        .filter(|mapping| mapping.permissions.execute)
        .filter_map(|mapping| Some((origin_of(mapping)?, mapping)))
}

/// `None` for code of no file.
fn origin_of(mapping: &Mapping) -> Option<Origin> {
    match &mapping.backing {
        Backing::File { id, .. } => Some(Origin::File(*id)),
        Backing::Special(name) if name == "[vdso]" => Some(Origin::Vdso),
        Backing::Special(_) | Backing::Anonymous => None,
    }
}

fn space(owner: Owner, mappings: &[ExecutableMapping], library_epoch: u32) -> AddressSpace {
    let mut space = AddressSpace { owner, library_epoch, ..AddressSpace::default() };
    for (slot, mapping) in space.mappings.iter_mut().zip(mappings) {
        *slot = *mapping;
        space.count += 1;
    }
    space
}

/// A file's table and its executable segments; `None` for files that cannot be read or have none.
fn packed(origin: Origin, file: Option<File>) -> Option<(Packed, Vec<Segment>)> {
    let source = match origin {
        Origin::File(_) => Source::File(file?),
        Origin::Vdso => Source::Memory(vdso::image_bytes()?),
    };
    let image = Image::open(source).ok()?;
    let table = Table::of_image(&image).ok()?;
    let packed = Packed::new(&table).ok()??;
    let segments = image.segments().iter().copied().filter(Segment::is_code).collect();
    Some((packed, segments))
}

/// The address that a file states for a byte of one of its executable mappings, which begin at
/// the page that their segment begins in.
fn svma(segments: &[Segment], file_offset: u64) -> Option<u64> {
    const PAGE: u64 = 4096;
    segments.iter().find_map(|segment| {
        let end = segment.offset.checked_add(segment.file_bytes)?;
        let begin = segment.offset & !(PAGE - 1);
        let inside = (begin..end).contains(&file_offset);
        inside.then(|| segment.address.wrapping_sub(segment.offset).wrapping_add(file_offset))
    })
}

/// A list of mappings in the making.
#[derive(Debug, Default)]
struct List {
    mappings: Vec<ExecutableMapping>,
}

impl List {
    fn push(&mut self, avma: Range<u64>, table: u32, shift: u64) {
        let length = avma.end.saturating_sub(avma.start);
        if let Ok(length_bytes) = u32::try_from(length)
            && length_bytes > 0
        {
            let start_avma = avma.start;
            self.mappings.push(ExecutableMapping { start_avma, length_bytes, table, shift });
        }
    }

    /// Code of no file; neighbours become one.
    fn run_time_code(&mut self, avma: Range<u64>) {
        if let Some(last) = self.mappings.last_mut()
            && last.table == no_table::FRAME_POINTERS
            && last.shift == 0
            && avma.end.saturating_sub(last.start_avma) <= RUN_TIME_CODE_REACH_BYTES
        {
            last.length_bytes = (avma.end - last.start_avma) as u32;
            return;
        }
        self.push(avma, no_table::FRAME_POINTERS, 0);
    }

    /// A mapping of a file, or of the vDSO. What its table does not answer for is code without
    /// rows.
    fn module(
        &mut self,
        mapping: &Mapping,
        origin: Origin,
        shared: Option<&Shared>,
        numbers: &Numbers,
    ) {
        let avma = mapping.start_avma..mapping.end_avma;
        let file_offset = if origin == Origin::Vdso { 0 } else { mapping.file_offset };
        let stamp = shared.and_then(|shared| shared.stamp);
        let shift = |avma: &Range<u64>, base: Base, offset: u64| {
            let end = offset.checked_add(avma.end.saturating_sub(avma.start))?;
            let offset = u32::try_from(end).and(u32::try_from(offset)).ok()?;
            let number = numbers.of(Numbered { origin, stamp, base })?;
            Some(ExecutableMapping::shift(avma.start, number, offset))
        };
        let without_rows = |part: Range<u64>| {
            let offset = file_offset.saturating_add(part.start - avma.start);
            let shift = shift(&part, Base::FileStart, offset).unwrap_or(0);
            (part, no_table::FRAME_POINTERS, shift)
        };
        let table = shared.and_then(|shared| shared.loaded.as_ref());
        let Some((table, start)) = table
            .and_then(|table| Some((table, svma(&table.segments, file_offset)?)))
            .filter(|(table, start)| *start < table.svma.end)
        else {
            let (avma, table, shift) = without_rows(avma.clone());
            return self.push(avma, table, shift);
        };
        let first = avma.start.saturating_add(table.svma.start.saturating_sub(start)).min(avma.end);
        let last = avma.start.saturating_add(table.svma.end - start).min(avma.end).max(first);
        let offset = start.saturating_sub(table.svma.start);
        let with_rows = match shift(&(first..last), Base::Svma(table.svma.start), offset) {
            Some(shift) => (first..last, table.serial, shift),
            None => without_rows(first..last),
        };
        let parts = [without_rows(avma.start..first), with_rows, without_rows(last..avma.end)];
        for (avma, table, shift) in parts {
            self.push(avma, table, shift);
        }
    }

    /// Those that fit; when there are too many, those with a table.
    fn chosen(mut self) -> Vec<ExecutableMapping> {
        if self.mappings.len() > MAPPINGS_MAX {
            self.mappings.retain(|mapping| mapping.table != no_table::FRAME_POINTERS);
        }
        self.mappings.truncate(MAPPINGS_MAX);
        self.mappings
    }
}

#[cfg(test)]
mod tests {
    use leakbpf_common::abi::{FramePlace, FrameWord};

    use super::*;

    const MAPS: &[u8] = b"\
401000-403000 r-xp 00001000 08:01 11 /usr/bin/a\n\
500000-502000 r-xp 00003000 08:01 12 /usr/lib/b.so\n\
502000-503000 r-xp 00000000 00:00 0 \n\
503000-504000 rwxp 00000000 00:00 0 \n\
700000-701000 --xp 00000000 00:00 0 [uprobes]\n";

    fn known(maps: &Maps) -> Known {
        let mut known = Known::default();
        let (origin, _) = code_of_modules(maps).next().expect("a program");
        let code =
            Segment { kind: 1, flags: 5, offset: 0x1000, address: 0x401000, file_bytes: 0x1800 };
        let loaded = Loaded { serial: 7, bytes: 0, svma: 0x401100..0x402800, segments: vec![code] };
        known.tables.insert(origin, Shared { loaded: Some(loaded), stamp: None, users: 1 });
        known
    }

    fn place(list: &[ExecutableMapping], avma: u64) -> (u32, FramePlace) {
        let mapping = list.iter().find(|it| it.contains(avma)).expect("a mapping");
        (mapping.table, FrameWord(avma.wrapping_add(mapping.shift)).place())
    }

    #[test]
    fn an_address_is_a_place_in_a_module_with_and_without_a_table() {
        let maps = Maps::parse(MAPS).expect("valid");
        let known = known(&maps);
        let list = known.list(&maps);
        let origins: Vec<_> = code_of_modules(&maps).map(|(origin, _)| origin).collect();
        let number = |index: usize, base| {
            known
                .numbers
                .of(Numbered { origin: origins[index], stamp: None, base })
                .expect("a number")
        };
        let rows = number(0, Base::Svma(0x401100));
        let file = number(0, Base::FileStart);
        let other = number(1, Base::FileStart);
        let module = |number, offset| FramePlace::Module { number, offset };
        assert_eq!(place(&list, 0x401110), (7, module(rows, 0x10)));
        assert_eq!(place(&list, 0x401010), (no_table::FRAME_POINTERS, module(file, 0x1010)));
        assert_eq!(place(&list, 0x402900), (no_table::FRAME_POINTERS, module(file, 0x2900)));
        assert_eq!(place(&list, 0x500020), (no_table::FRAME_POINTERS, module(other, 0x3020)));
    }

    #[test]
    fn code_of_no_module_keeps_its_address_and_its_own_entry() {
        let maps = Maps::parse(MAPS).expect("valid");
        let list = known(&maps).list(&maps);
        assert_eq!(
            place(&list, 0x503010),
            (no_table::FRAME_POINTERS, FramePlace::Address(0x503010))
        );
        assert_eq!(list.iter().filter(|it| it.shift == 0).count(), 2);
        assert_eq!(list.iter().filter(|it| it.table == no_table::TRAMPOLINE).count(), 1);
    }
}
