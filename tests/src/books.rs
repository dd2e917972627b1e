//! The oracle's books as the programs under test write them (`tests/targets/table.h`).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const MAGIC: u64 = 0x31_6b6f_6f42;
const SHARDS: usize = 256;
const SLOTS: usize = 2048;
const EVENTS: usize = 1 << 16;
const HEAD_BYTES: usize = 32;
const EVENT_BYTES: usize = 40;
const SHARD_HEAD_BYTES: usize = 16;
const SLOT_BYTES: usize = 32;

/// An outstanding block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownBlock {
    pub address: u64,
    pub size_bytes: u64,
    /// `CLOCK_MONOTONIC` before the allocating call.
    pub begun_ns: u64,
    /// And after it.
    pub born_ns: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    Born,
    Freed,
    /// The call was left by a jump: the block may exist, and the program does not know it.
    Maybe,
}

/// One of the last calls that the program made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    pub kind: EventKind,
    pub address: u64,
    pub size_bytes: u64,
    pub begun_ns: u64,
    pub ended_ns: u64,
    pub tid: u32,
}

/// Everything outstanding at one moment, and the last events before it, oldest first.
#[derive(Debug, Clone, Default)]
pub struct Books {
    pub blocks: BTreeMap<u64, KnownBlock>,
    pub events: Vec<Event>,
}

impl Books {
    /// Reads a program's books while it does not change them.
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let word = |at: usize| -> u64 {
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
        };
        let shard_bytes = SHARD_HEAD_BYTES + SLOTS * SLOT_BYTES;
        let events_end = HEAD_BYTES + EVENTS * EVENT_BYTES;
        assert_eq!(bytes.len(), events_end + SHARDS * shard_bytes, "{}: layout", path.display());
        assert_eq!(word(0), MAGIC, "{}: not books", path.display());
        assert_eq!(word(16), 0, "{}: the program has more blocks than they hold", path.display());

        let mut blocks = BTreeMap::new();
        for shard in 0..SHARDS {
            let head = events_end + shard * shard_bytes;
            let mut left = u32::from_le_bytes(bytes[head + 4..head + 8].try_into().expect("four"));
            for slot in 0..SLOTS {
                if left == 0 {
                    break;
                }
                let at = head + SHARD_HEAD_BYTES + slot * SLOT_BYTES;
                let address = word(at);
                if address != 0 {
                    left -= 1;
                    let block = KnownBlock {
                        address,
                        size_bytes: word(at + 8),
                        begun_ns: word(at + 16),
                        born_ns: word(at + 24),
                    };
                    blocks.insert(address, block);
                }
            }
        }

        let next = word(8) as usize;
        let events = (next.saturating_sub(EVENTS)..next)
            .filter_map(|index| {
                let at = HEAD_BYTES + index % EVENTS * EVENT_BYTES;
                let kind = match word(at + 32) as u32 {
                    1 => EventKind::Born,
                    2 => EventKind::Freed,
                    3 => EventKind::Maybe,
                    _ => return None,
                };
                Some(Event {
                    kind,
                    address: word(at),
                    size_bytes: word(at + 8),
                    begun_ns: word(at + 16),
                    ended_ns: word(at + 24),
                    tid: (word(at + 32) >> 32) as u32,
                })
            })
            .collect();
        Self { blocks, events }
    }

    /// Books of a program that says only addresses and sizes, all of blocks born at that time.
    pub fn of_sizes(sizes: &BTreeMap<u64, u64>, born_ns: u64) -> Self {
        let blocks = sizes.iter().map(|(&address, &size_bytes)| {
            (address, KnownBlock { address, size_bytes, begun_ns: born_ns, born_ns })
        });
        Self { blocks: blocks.collect(), events: Vec::new() }
    }

    /// Only the blocks whose allocation began at that time or later.
    pub fn since(mut self, time_ns: u64) -> Self {
        self.blocks.retain(|_, block| block.begun_ns >= time_ns);
        self
    }

    pub fn live_bytes(&self) -> u64 {
        self.blocks.values().map(|block| block.size_bytes).sum()
    }
}
