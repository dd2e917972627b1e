//! The kernel side's maps, as typed tables.
//!
//! aya reads maps one key after the other, which restarts when its key is deleted; the batch
//! calls of `bpf(2)` walk whole buckets and neither lose nor double an entry
//! (`kernel/bpf/hashtab.c`, `__htab_map_lookup_and_delete_batch`).

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd},
};

use aya::maps::MapData;
use leakbpf_common::{
    abi::{Block, BlockKey, Control, Owner, ProcessState, SiteCounters, SiteKey},
    ledger::ThreadState,
    table::AddressSpace,
};

use super::fdinfo;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_DELETE_BATCH: libc::c_long = 27;

/// Entries asked for in one batch: 160 KiB of blocks.
const BATCH: usize = 4096;

/// Largest batch; no bucket of a hash map with enough buckets is that long.
const MAX_BATCH: usize = 1 << 22;

/// Plain data with the layout that the kernel side uses.
///
/// # Safety
/// `repr(C)`, without padding, valid for every bit pattern.
pub unsafe trait Wire: Copy + Default {}

// SAFETY: leakbpf_common::abi asserts size and has only integers in these.
unsafe impl Wire for BlockKey {}
// SAFETY: as above.
unsafe impl Wire for Block {}
// SAFETY: as above.
unsafe impl Wire for SiteKey {}
// SAFETY: as above.
unsafe impl Wire for SiteCounters {}
// SAFETY: as above.
unsafe impl Wire for ProcessState {}
// SAFETY: as above.
unsafe impl Wire for ThreadState {}
// SAFETY: as above.
unsafe impl Wire for Control {}
// SAFETY: as above.
unsafe impl Wire for Owner {}
// SAFETY: leakbpf_common::table asserts the size and has only integers in it.
unsafe impl Wire for AddressSpace {}
// SAFETY: integers.
unsafe impl Wire for u32 {}
// SAFETY: integers.
unsafe impl Wire for u64 {}

/// A map of the kernel side with its key and value types.
pub struct Table<K, V> {
    map: MapData,
    types: PhantomData<(K, V)>,
}

/// Argument of the `BPF_MAP_*_ELEM` commands (`union bpf_attr`).
#[repr(C)]
#[derive(Default)]
struct ElementArgs {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Argument of the `BPF_MAP_*_BATCH` commands (`union bpf_attr`).
#[repr(C)]
#[derive(Default)]
pub(super) struct BatchArgs {
    pub in_batch: u64,
    pub out_batch: u64,
    pub keys: u64,
    pub values: u64,
    pub count: u32,
    pub map_fd: u32,
    pub elem_flags: u64,
    pub flags: u64,
}

/// Returns what the command returns: 0 or a descriptor.
pub(super) fn bpf<A>(command: libc::c_long, args: &mut A) -> io::Result<libc::c_long> {
    // SAFETY: `args` is the command's part of `union bpf_attr`; the pointers in it are to live
    // buffers of the map's key and value sizes, which `Table::new` has checked.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(args), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl<K: Wire, V: Wire> Table<K, V> {
    /// Fails when the map's keys or values have another size than `K` and `V`.
    pub fn new(map: MapData) -> io::Result<Self> {
        let about = map.info().map_err(io::Error::other)?;
        if about.key_size() as usize != size_of::<K>()
            || about.value_size() as usize != size_of::<V>()
        {
            return Err(io::Error::other("the kernel side has another layout than the agent"));
        }
        Ok(Self { map, types: PhantomData })
    }

    pub(super) fn fd(&self) -> u32 {
        self.map.fd().as_fd().as_raw_fd() as u32
    }

    fn element(&self, command: libc::c_long, key: &K, value: *mut V) -> io::Result<()> {
        bpf(
            command,
            &mut ElementArgs {
                map_fd: self.fd(),
                pad: 0,
                key: std::ptr::from_ref(key) as u64,
                value: value as u64,
                flags: 0,
            },
        )
        .map(drop)
    }

    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::default();
        match self.element(BPF_MAP_LOOKUP_ELEM, key, &raw mut value) {
            Ok(()) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn set(&self, key: &K, mut value: V) -> io::Result<()> {
        self.element(BPF_MAP_UPDATE_ELEM, key, &raw mut value)
    }

    /// Whether there was something to delete.
    pub fn delete(&self, key: &K) -> io::Result<bool> {
        match self.element(BPF_MAP_DELETE_ELEM, key, std::ptr::null_mut()) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Every entry of a hash map. Entries that come or go meanwhile may or may not be seen; all
    /// others are seen exactly once. After an error there is nothing more.
    pub fn walk(&self) -> Walk<'_, K, V> {
        Walk {
            table: self,
            keys: vec![K::default(); BATCH],
            values: vec![V::default(); BATCH],
            filled: 0,
            taken: 0,
            position: None,
            last: false,
        }
    }

    /// Takes out every entry that `chosen` picks. Entries that come meanwhile may stay.
    pub fn take(&self, mut chosen: impl FnMut(&K, &V) -> bool) -> io::Result<()> {
        let mut unwanted = Vec::with_capacity(BATCH);
        for entry in self.walk() {
            let (key, value) = entry?;
            if chosen(&key, &value) {
                unwanted.push(key);
            }
            // What the walk has returned lies in buckets that it has left behind.
            if unwanted.len() == BATCH {
                self.delete_all(&unwanted)?;
                unwanted.clear();
            }
        }
        self.delete_all(&unwanted)
    }

    fn delete_all(&self, mut keys: &[K]) -> io::Result<()> {
        while !keys.is_empty() {
            let mut args = BatchArgs {
                keys: keys.as_ptr() as u64,
                count: keys.len() as u32,
                map_fd: self.fd(),
                ..Default::default()
            };
            let gone = match bpf(BPF_MAP_DELETE_BATCH, &mut args) {
                Ok(_) => return Ok(()),
                // The first key that is not deleted is not there (kernel/bpf/syscall.c,
                // generic_map_delete_batch).
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => 1,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => 0,
                Err(error) => return Err(error),
            };
            keys = keys.get(args.count as usize + gone..).unwrap_or_default();
        }
        Ok(())
    }

    /// Memory that the kernel charges for the map, in bytes (`memlock` in `/proc/self/fdinfo`).
    pub fn memory_bytes(&self) -> io::Result<u64> {
        Ok(fdinfo::number(self.map.fd().as_fd().as_raw_fd(), "memlock")?.unwrap_or(0))
    }
}

/// See [`Table::walk`].
pub struct Walk<'a, K, V> {
    table: &'a Table<K, V>,
    keys: Vec<K>,
    values: Vec<V>,
    filled: usize,
    taken: usize,
    /// The bucket that comes next (`u32` for hash maps).
    position: Option<u32>,
    last: bool,
}

impl<K: Wire, V: Wire> Walk<'_, K, V> {
    fn fill(&mut self) -> io::Result<()> {
        let mut begin = self.position.unwrap_or(0);
        let mut next = 0u32;
        loop {
            let mut args = BatchArgs {
                in_batch: if self.position.is_some() { &raw mut begin as u64 } else { 0 },
                out_batch: &raw mut next as u64,
                keys: self.keys.as_mut_ptr() as u64,
                values: self.values.as_mut_ptr() as u64,
                count: self.keys.len() as u32,
                map_fd: self.table.fd(),
                ..Default::default()
            };
            match bpf(BPF_MAP_LOOKUP_BATCH, &mut args) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOENT) => self.last = true,
                    Some(libc::EINTR) => continue,
                    // One bucket alone is larger than the batch.
                    Some(libc::ENOSPC) if self.keys.len() < MAX_BATCH => {
                        let larger = self.keys.len() * 2;
                        self.keys.resize(larger, K::default());
                        self.values.resize(larger, V::default());
                        continue;
                    }
                    _ => return Err(error),
                },
            }
            self.filled = (args.count as usize).min(self.keys.len());
            self.taken = 0;
            self.position = Some(next);
            return Ok(());
        }
    }
}

impl<K: Wire, V: Wire> Iterator for Walk<'_, K, V> {
    type Item = io::Result<(K, V)>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.taken >= self.filled {
            if self.last {
                return None;
            }
            if let Err(error) = self.fill() {
                self.last = true;
                self.filled = 0;
                return Some(Err(error));
            }
        }
        let entry = (*self.keys.get(self.taken)?, *self.values.get(self.taken)?);
        self.taken += 1;
        Some(Ok(entry))
    }
}
