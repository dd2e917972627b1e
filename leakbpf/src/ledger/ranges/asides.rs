//! What calls in flight took out of the books, one call a thread.

use std::collections::{BTreeMap, HashMap};

use super::pieces::{Piece, Span};

/// Most threads that can be in the middle of `munmap` or `mremap`. A `munmap` that succeeds has no
/// end record, so the last one of each thread that is gone stays here until newer ones push it out.
const MAX_CALLS: usize = 4096;

#[derive(Debug)]
pub enum Aside {
    /// `munmap`: already counted as freed.
    Unmap(Vec<Piece>),
    Remap(Remap),
}

/// `mremap`: its pieces still count as live.
#[derive(Debug)]
pub struct Remap {
    /// `None` when the kernel cannot but refuse the arguments, or when the old length is 0.
    pub source: Option<Span>,
    /// The old length is 0, and there is an anonymous shared mapping to duplicate.
    pub duplicates: bool,
    pub flags: u64,
    pub page_bytes: u64,
    pub pieces: Vec<Piece>,
}

impl Aside {
    fn piece_count(&self) -> usize {
        match self {
            Self::Unmap(pieces) => pieces.len(),
            Self::Remap(remap) => remap.pieces.len(),
        }
    }
}

#[derive(Debug, Default)]
pub struct Asides {
    by_thread: HashMap<u32, (u64, Aside)>,
    thread_by_age: BTreeMap<u64, u32>,
    next_age: u64,
    piece_count: usize,
}

impl Asides {
    pub fn remove(&mut self, tid: u32) -> Option<Aside> {
        let (age, aside) = self.by_thread.remove(&tid)?;
        self.thread_by_age.remove(&age);
        self.piece_count -= aside.piece_count();
        Some(aside)
    }

    /// Adds what `tid` took; its earlier call has been removed. Returns the oldest calls that find
    /// no room any more when all together may hold `piece_limit` pieces.
    pub fn insert(&mut self, tid: u32, aside: Aside, piece_limit: usize) -> Vec<Aside> {
        self.piece_count += aside.piece_count();
        self.thread_by_age.insert(self.next_age, tid);
        self.by_thread.insert(tid, (self.next_age, aside));
        self.next_age += 1;
        let mut pushed_out = Vec::new();
        while self.by_thread.len() > MAX_CALLS
            || (self.piece_count > piece_limit && self.by_thread.len() > 1)
        {
            let Some((_, &oldest)) = self.thread_by_age.first_key_value() else {
                break;
            };
            pushed_out.extend(self.remove(oldest));
        }
        pushed_out
    }

    /// The pieces that are in the middle of `mremap`.
    pub fn remapping(&self) -> impl Iterator<Item = Piece> {
        self.by_thread
            .values()
            .filter_map(|(_, aside)| match aside {
                Aside::Remap(remap) => Some(remap.pieces.iter().copied()),
                Aside::Unmap(_) => None,
            })
            .flatten()
    }
}
