//! The kernel side's maps for walking stacks with rows: one array for each module's table, and one
//! list of executable mappings for each process.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicIsize, AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use aya::maps::MapData;
use leakbpf_common::{
    abi::Owner,
    table::{AddressSpace, BLOCK_BYTES, Block, TABLES_MAX},
};

use super::tables::{BatchArgs, Table, bpf};
use crate::process::priority;

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
    loaders: Loaders,
    failed: Arc<AtomicU64>,
}

impl UnwindMaps {
    /// Fails when the maps are not as the agent knows them.
    pub fn new(tables: MapData, spaces: MapData) -> io::Result<Self> {
        Ok(Self {
            tables: Arc::new(Table::new(tables)?),
            spaces: Table::new(spaces)?,
            loaders: Loaders::new(),
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

    /// Makes tables known under their serial numbers; returns when walks can reach them. They can at
    /// once, but then the kernel waits for a grace period, tens of milliseconds
    /// (`maybe_wait_bpf_programs` in kernel/bpf/syscall.c), and that is left to a thread.
    pub fn load(&self, tables: Vec<UnloadedTable>) {
        /// A tenth of what compiling a small table takes.
        const LOOK_AGAIN: Duration = Duration::from_micros(20);
        /// Stacks are worse without a table, and a session that hangs is worse than that.
        const PATIENCE: Duration = Duration::from_secs(2);
        // The kernel takes them in this order.
        let Some(last) = tables.last().map(|table| position(table.serial)) else { return };
        let outer = Arc::clone(&self.tables);
        let failed = Arc::clone(&self.failed);
        let refused = Arc::new(AtomicBool::new(false));
        let refusal = Arc::clone(&refused);
        self.loaders.run(Box::new(move || {
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
                refusal.store(true, Ordering::Relaxed);
            }
        }));
        let began = Instant::now();
        while !refused.load(Ordering::Relaxed)
            && !matches!(self.tables.get(&last), Ok(Some(_)))
            && began.elapsed() < PATIENCE
        {
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Drops tables in the background. No list of mappings may name them any more. Calls `dropped`
    /// with the serial numbers of those that are gone.
    pub fn unload(&self, serials: Vec<u32>, dropped: impl Fn(u32) + Send + 'static) {
        let tables = Arc::clone(&self.tables);
        self.loaders.run(Box::new(move || {
            for serial in serials {
                if tables.delete(&position(serial)).is_ok() {
                    dropped(serial);
                }
            }
        }));
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

/// Threads for what the kernel takes its time for. They are there before they are needed: a new
/// thread may have to wait for its first turn longer than one that is woken.
struct Loaders {
    jobs: Sender<Job>,
    waiting: Arc<Mutex<Receiver<Job>>>,
    /// Threads without a job, less jobs without a thread.
    idle: Arc<AtomicIsize>,
    threads: AtomicUsize,
}

type Job = Box<dyn FnOnce() + Send>;

/// A grace period takes as long as some tens of small tables do.
const LOADERS_AT_FIRST: usize = 2;
const LOADERS_MAX: usize = 64;

impl Loaders {
    fn new() -> Self {
        let (jobs, waiting) = channel();
        let waiting = Arc::new(Mutex::new(waiting));
        let loaders = Self { jobs, waiting, idle: Arc::default(), threads: AtomicUsize::new(0) };
        for _ in 0..LOADERS_AT_FIRST {
            loaders.add();
        }
        loaders
    }

    /// Adds a thread, unless there are enough or the machine has none to give.
    fn add(&self) {
        if self.threads.fetch_add(1, Ordering::Relaxed) >= LOADERS_MAX {
            self.threads.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let waiting = Arc::clone(&self.waiting);
        let idle = Arc::clone(&self.idle);
        idle.fetch_add(1, Ordering::Relaxed);
        let work = move || {
            priority::raise();
            loop {
                // The lock is held by the one that waits, and given back with the job.
                let job = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok(job) = job else { return };
                job();
                idle.fetch_add(1, Ordering::Relaxed);
            }
        };
        if std::thread::Builder::new().name("tables".to_owned()).spawn(work).is_err() {
            self.threads.fetch_sub(1, Ordering::Relaxed);
            self.idle.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn run(&self, job: Job) {
        if self.idle.fetch_sub(1, Ordering::Relaxed) <= 0 {
            self.add();
        }
        if self.threads.load(Ordering::Relaxed) == 0 {
            self.idle.fetch_add(1, Ordering::Relaxed);
            return job();
        }
        // They receive until this is dropped.
        let _ = self.jobs.send(job);
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
