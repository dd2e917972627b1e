//! The kernel side's maps for walking stacks with rows: one array for each module's table, and one
//! list of executable mappings for each process.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use aya::maps::MapData;
use leakbpf_common::{
    abi::Owner,
    table::{AddressSpace, BLOCK_BYTES, Block, TABLES_MAX},
};

use super::tables::{BatchArgs, Table, bpf};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
/// Arrays of different lengths fit one array of maps (include/uapi/linux/bpf.h, since Linux 5.10).
const BPF_F_INNER_MAP: u32 = 1 << 12;

/// Argument of `BPF_MAP_CREATE` (`union bpf_attr`), as far as it is used.
#[repr(C)]
#[derive(Default)]
struct CreateArgs {
    map_type: u32,
    key_bytes: u32,
    value_bytes: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
    map_ifindex: u32,
}

/// A table in kernel memory that no walk can reach yet.
#[derive(Debug)]
pub struct UnloadedTable {
    serial: u32,
    array: OwnedFd,
}

/// See the module's documentation.
pub struct UnwindMaps {
    /// Values are file descriptors of arrays; the kernel keeps the arrays.
    tables: Arc<Table<u32, u32>>,
    spaces: Table<Owner, AddressSpace>,
    loading: Mutex<Vec<JoinHandle<()>>>,
    failed: Arc<AtomicU64>,
}

impl UnwindMaps {
    /// Fails when the maps are not as the agent knows them.
    pub fn new(tables: MapData, spaces: MapData) -> io::Result<Self> {
        Ok(Self {
            tables: Arc::new(Table::new(tables)?),
            spaces: Table::new(spaces)?,
            loading: Mutex::default(),
            failed: Arc::default(),
        })
    }

    /// Copies a table into kernel memory.
    pub fn copy(&self, serial: u32, blocks: &[Block]) -> io::Result<UnloadedTable> {
        let array = create_array(blocks.len())?;
        let keys: Vec<u32> = (0..blocks.len() as u32).collect();
        bpf(
            BPF_MAP_UPDATE_BATCH,
            &mut BatchArgs {
                keys: keys.as_ptr() as u64,
                values: blocks.as_ptr() as u64,
                count: keys.len() as u32,
                map_fd: array.as_fd().as_raw_fd() as u32,
                ..BatchArgs::default()
            },
        )?;
        Ok(UnloadedTable { serial, array })
    }

    /// Makes tables known under their serial numbers, in the background: they are known at once,
    /// but then the kernel waits for a grace period, tens of milliseconds
    /// (`maybe_wait_bpf_programs` in kernel/bpf/syscall.c).
    pub fn load(&self, tables: Vec<UnloadedTable>) {
        if tables.is_empty() {
            return;
        }
        let outer = Arc::clone(&self.tables);
        let failed = Arc::clone(&self.failed);
        let thread = std::thread::spawn(move || {
            let keys: Vec<u32> = tables.iter().map(|table| position(table.serial)).collect();
            let values: Vec<u32> =
                tables.iter().map(|table| table.array.as_raw_fd() as u32).collect();
            let mut args = BatchArgs {
                keys: keys.as_ptr() as u64,
                values: values.as_ptr() as u64,
                count: keys.len() as u32,
                map_fd: outer.fd(),
                ..BatchArgs::default()
            };
            if bpf(BPF_MAP_UPDATE_BATCH, &mut args).is_err() {
                failed.fetch_add(tables.len() as u64, Ordering::Relaxed);
            }
        });
        let mut loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        loading.retain(|thread| !thread.is_finished());
        loading.push(thread);
    }

    /// Waits until all that is being loaded is known, and the kernel's grace period has passed.
    pub fn wait_until_loaded(&self) {
        let loading =
            std::mem::take(&mut *self.loading.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in loading {
            // What it could not do is counted.
            let _ = thread.join();
        }
    }

    /// Drops tables in the background, after all that is still being loaded. No list of mappings
    /// may name them any more. Calls `dropped` with the serial numbers of those that are gone.
    pub fn unload(&self, serials: Vec<u32>, dropped: impl Fn(u32) + Send + 'static) {
        let tables = Arc::clone(&self.tables);
        let loading =
            std::mem::take(&mut *self.loading.lock().unwrap_or_else(PoisonError::into_inner));
        std::thread::spawn(move || {
            for thread in loading {
                // It has nothing to say.
                let _ = thread.join();
            }
            for serial in serials {
                if tables.delete(&position(serial)).is_ok() {
                    dropped(serial);
                }
            }
        });
    }

    /// Tables that the kernel refused.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Replaces the list of a process's mappings, all at once.
    pub fn set_space(&self, space: &AddressSpace) -> io::Result<()> {
        self.spaces.set(&space.owner, *space)
    }

    pub fn remove_space(&self, owner: Owner) -> io::Result<()> {
        self.spaces.delete(&owner).map(drop)
    }
}

fn position(serial: u32) -> u32 {
    serial % TABLES_MAX as u32
}

fn create_array(blocks: usize) -> io::Result<OwnedFd> {
    let mut args = CreateArgs {
        map_type: BPF_MAP_TYPE_ARRAY,
        key_bytes: 4,
        value_bytes: BLOCK_BYTES as u32,
        max_entries: blocks as u32,
        map_flags: BPF_F_INNER_MAP,
        map_name: *b"unwind_table\0\0\0\0",
        ..CreateArgs::default()
    };
    let fd = bpf(BPF_MAP_CREATE, &mut args)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the command returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
