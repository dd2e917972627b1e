//! The kernel side's records, read by a thread of its own as they come.
//!
//! A library is in the next stack only if its table is loaded before: that cannot wait for a
//! session that names stacks, places probes or writes a report. The thread keeps the records for
//! the session and does what they ask of the [`Unwinding`].

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use aya::maps::{MapData, RingBuf};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use tokio::sync::Notify;

use super::unwinding::{CodeChange, Unwinding};
use crate::{probe::records::Record, process::priority};

/// As much is kept as fits the ring buffer; the rest stays there.
const BYTES_MAX: usize = 4 << 20;

/// Changes that wait for the thread; no more than that many records fit the ring buffer.
const CHANGES_MAX: usize = BYTES_MAX / 32;

/// See the module's documentation.
pub struct Inbox {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    ring: Mutex<Ring>,
    unwinding: Arc<Unwinding>,
    /// There are records for the session.
    arrived: Notify,
    /// There is something for the thread besides what is in the ring buffer.
    wake: EventFd,
    ended: AtomicBool,
}

struct Ring {
    buffer: RingBuf<MapData>,
    records: VecDeque<Record>,
    bytes: usize,
    changes: Vec<CodeChange>,
}

impl Inbox {
    /// Reads from now on.
    pub fn start(buffer: RingBuf<MapData>, unwinding: Arc<Unwinding>) -> io::Result<Self> {
        let ring = Ring { buffer, records: VecDeque::new(), bytes: 0, changes: Vec::new() };
        let shared = Arc::new(Shared {
            ring: Mutex::new(ring),
            unwinding,
            arrived: Notify::new(),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            ended: AtomicBool::new(false),
        });
        let reader = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name("records".to_owned()).spawn(move || reader.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Waits until there are records.
    pub async fn arrived(&self) {
        self.shared.arrived.notified().await;
    }

    /// The records that have come, oldest first: all that were in the ring buffer, or as many as
    /// fit it.
    pub fn take(&self) -> VecDeque<Record> {
        let mut ring = self.shared.ring();
        let full = ring.is_full();
        ring.read();
        ring.bytes = 0;
        let records = std::mem::take(&mut ring.records);
        if full || !ring.changes.is_empty() {
            self.shared.wake();
        }
        records
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when it is awake 2^64 times already.
        let _ = self.wake.write(1);
    }

    fn run(&self) {
        priority::raise();
        while !self.ended.load(Ordering::Relaxed) {
            let changes = {
                let mut ring = self.ring();
                ring.read();
                if !ring.records.is_empty() {
                    self.arrived.notify_one();
                }
                std::mem::take(&mut ring.changes)
            };
            self.unwinding.apply(&changes);
            if changes.is_empty() && self.wait().is_err() {
                return;
            }
        }
    }

    /// Waits for something to do.
    fn wait(&self) -> nix::Result<()> {
        let ring = self.ring();
        let descriptor = ring.buffer.as_raw_fd();
        let full = ring.is_full();
        drop(ring);
        // SAFETY: the ring buffer is open for as long as `self` lives.
        let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
        let mut ready = [
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(descriptor, PollFlags::POLLIN),
        ];
        // When there is no room, what is in the ring buffer is no reason to wake up.
        let watched = if full { &mut ready[..1] } else { &mut ready[..] };
        match poll(watched, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        // Nothing to read when it was the ring buffer that woke it.
        let _ = self.wake.read();
        Ok(())
    }
}

impl Ring {
    fn is_full(&self) -> bool {
        self.bytes >= BYTES_MAX || self.changes.len() >= CHANGES_MAX
    }

    /// Takes what is in the ring buffer, and of what comes meanwhile no more than fits.
    fn read(&mut self) {
        while !self.is_full() {
            let Some(item) = self.buffer.next() else { break };
            self.bytes += item.len();
            let Some(record) = Record::parse(&item) else { continue };
            self.changes
                .extend(CodeChange::of(&record).filter(|it| Some(it) != self.changes.last()));
            self.records.push_back(record);
        }
    }
}
