//! Layout of everything that passes between the kernel side and the agent.
//!
//! Every struct is `repr(C)`, holds only integers and has no padding, so that it can be a map key,
//! a map value or a ring buffer record as it is.

use crate::sampling::Sampling;

/// Most frames of one stack.
pub const MAX_FRAMES: usize = 127;

/// Most allocator calls of one thread that can be in flight on different stacks (signal stacks,
/// coroutines). Calls nested on the same stack need no slot: only the outermost counts.
pub const MAX_IN_FLIGHT: usize = 4;

/// A process's memory, from one `execve` (or fork) to the next: the process id of whoever owns the
/// address space, and a generation that tells two lives of the same process id apart.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Owner(pub u64);

impl Owner {
    pub const fn new(tgid: u32, generation: u32) -> Self {
        Self((generation as u64) << 32 | tgid as u64)
    }
    pub const fn tgid(self) -> u32 {
        self.0 as u32
    }
}

/// Hash of a stack's frames, its outcome and its owner. 0 never occurs.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct StackId(pub u64);

impl StackId {
    /// The stack could not be captured.
    pub const LOST: Self = Self(1);
}

/// Key of the block map.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BlockKey {
    pub owner: Owner,
    pub address: u64,
}

/// Value of the block map: one outstanding allocation.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Block {
    /// As the program asked for.
    pub size_bytes: u64,
    /// `CLOCK_MONOTONIC` when the allocator returned it.
    pub born_ns: u64,
    pub stack: StackId,
}

/// Key of the site map.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SiteKey {
    pub owner: Owner,
    pub stack: StackId,
}

/// Value of the site map.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SiteCounters {
    pub allocated_bytes: u64,
    /// Blocks; where they may be sampled, in units of 2^-[`COUNT_SHIFT`](crate::sampling::COUNT_SHIFT).
    pub allocated_count: u64,
    pub freed_bytes: u64,
    pub freed_count: u64,
    /// 1 once the frames went through the ring buffer.
    pub announced: u64,
}

/// Value of the process map, keyed by process id.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessState {
    pub owner: Owner,
    /// Counts the times that libraries came or went: the same address is another function after.
    pub library_epoch: u32,
    /// [`process_flags`].
    pub flags: u32,
    /// When an [`UnmappedRecord`] was last sent, `CLOCK_MONOTONIC`.
    pub asked_ns: u64,
}

pub mod process_flags {
    /// Shares its parent's memory (`vfork`): goes away at its `execve` or exit.
    pub const BORROWS_MEMORY: u32 = 1;
    /// Anonymous mappings are reported.
    pub const MAPPINGS: u32 = 2;
}

/// Run-time switches; the only entry of the control map.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Control {
    /// 0: every program returns at once.
    pub enabled: u64,
    /// 0: those at allocator functions do.
    pub calls: u64,
    /// Not 0: mappings are told of, and whether an allocator's function made them.
    pub mappings: u64,
    pub sampling: Sampling,
}

/// How often programs of a kind ran, and how long some of the runs took.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Runs {
    pub count: u64,
    /// The one that is timed next.
    pub next_timed: u64,
    /// How many were timed, and how long those took.
    pub timed: u64,
    pub timed_ns: u64,
}

impl Runs {
    /// A run that took longer was interrupted.
    pub const MOST_TIMED_NS: u64 = 1 << 16;

    /// What one takes, on average; none before any was timed.
    pub fn mean_ns(&self) -> Option<f64> {
        (self.timed > 0).then(|| self.timed_ns as f64 / self.timed as f64)
    }
}

/// What the programs have cost that run in the watched processes' time; the only entry of the per-CPU
/// cost map.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// At allocator functions.
    pub hits: Runs,
    /// Hits at a return that nobody waits for when its block is not chosen.
    pub optional_returns: u64,
    /// Calls whose return is not seen: those whose block is not chosen, and such as do not count.
    pub returns_let_go: u64,
    /// Page faults of the processes at pages that are chosen.
    pub faults: u64,
    /// Those of them that are looked into, because they may bring memory.
    pub touches: Runs,
}

impl Cost {
    /// A hit is timed once in so many, at least; at most once in twice as many less one. No pattern of
    /// calls is in step with it.
    pub const HIT_TIMED_EVERY: u64 = 32;
    /// The same of touches, of which there are fewer.
    pub const TOUCH_TIMED_EVERY: u64 = 4;
}

/// What a probed function does with memory.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Returns a new block.
    Allocate = 1,
    /// Writes the new block's address through a pointer and returns 0 (`posix_memalign`).
    AllocateOut = 2,
    /// Replaces a block (`realloc`).
    Reallocate = 3,
    /// Changes a block's size where it is and returns the size it got (`xallocx`).
    ResizeInPlace = 4,
    /// Releases a block.
    Free = 5,
}

impl Role {
    pub const fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Allocate,
            2 => Self::AllocateOut,
            3 => Self::Reallocate,
            4 => Self::ResizeInPlace,
            5 => Self::Free,
            _ => return None,
        })
    }
}

/// How the size follows from the arguments.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SizeRule {
    /// The first size operand.
    First = 0,
    /// First times second (`calloc`, `reallocarray`); overflow means that the call fails.
    Product = 1,
    /// Up to first plus second (`xallocx`: size and extra).
    Sum = 2,
}

/// Index of a register's 8-byte word in the kernel's saved user registers (`struct pt_regs`).
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegisterSlot(pub u8);

impl RegisterSlot {
    pub const NONE: Self = Self(0xff);
}

/// What a program needs to know of the site that it was hit at, packed into its attach cookie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie {
    pub role: Role,
    pub size_rule: SizeRule,
    /// The call releases the block even when it fails (`reallocf`).
    pub frees_on_failure: bool,
    /// The end is probed at the function's own return instructions: its return address stays.
    pub returns_unprobed: bool,
    /// The probe at the end comes with the call, if the beginning wants one, and the end tells nothing
    /// when no block is recorded: the function calls no other one that is probed.
    pub return_optional: bool,
    pub size: RegisterSlot,
    pub second_size: RegisterSlot,
    /// The old block, the block to free, or where the new address is written.
    pub pointer: RegisterSlot,
    /// Stack pointer at the function's entry minus stack pointer at the site, in bytes.
    pub stack_distance: u16,
}

impl Cookie {
    pub const fn pack(self) -> u64 {
        self.role as u64
            | (self.size_rule as u64) << 8
            | (self.frees_on_failure as u64) << 12
            | (self.returns_unprobed as u64) << 13
            | (self.return_optional as u64) << 14
            | (self.size.0 as u64) << 16
            | (self.second_size.0 as u64) << 24
            | (self.pointer.0 as u64) << 32
            | (self.stack_distance as u64) << 40
    }

    pub const fn unpack(value: u64) -> Option<Self> {
        let Some(role) = Role::from_u8(value as u8) else {
            return None;
        };
        Some(Self {
            role,
            size_rule: match value >> 8 & 0xf {
                1 => SizeRule::Product,
                2 => SizeRule::Sum,
                _ => SizeRule::First,
            },
            frees_on_failure: value >> 12 & 1 != 0,
            returns_unprobed: value >> 13 & 1 != 0,
            return_optional: value >> 14 & 1 != 0,
            size: RegisterSlot((value >> 16) as u8),
            second_size: RegisterSlot((value >> 24) as u8),
            pointer: RegisterSlot((value >> 32) as u8),
            stack_distance: (value >> 40) as u16,
        })
    }
}

/// How the kernel side walks stacks: the best that the kernel takes.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StackWalk {
    /// Along the chain of frame pointers.
    FramePointers = 0,
    /// With unwind rows, in a loop that the verifier follows turn by turn.
    RowsBounded = 1,
    /// With unwind rows, in `bpf_loop` (Linux 5.17).
    Rows = 2,
}

/// What could not be seen; index into the per-CPU counter map.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Loss {
    /// An allocation was not recorded: the block map is full.
    BlocksFull = 0,
    /// An allocation was recorded without its stack: the site map is full.
    SitesFull = 1,
    /// A thread's calls were not seen: the thread map is full.
    ThreadsFull = 2,
    /// A call in flight was forgotten: too many on different stacks of one thread.
    InFlightFull = 3,
    /// A record did not fit the ring buffer (a mapping or process event, never a stack: those are
    /// sent again).
    EventsDropped = 4,
    /// A stack was not captured: all scratch slots were taken.
    StacksLost = 5,
    /// An allocation came back at the address of a block that was still recorded: its release had
    /// not been seen.
    FreesMissed = 6,
    /// A process was not followed: the process map is full.
    ProcessesFull = 7,
    /// The address that `posix_memalign` wrote could not be read.
    ResultsUnreadable = 8,
    /// A process's stacks follow frame pointers: its mappings did not fit the map.
    SpacesFull = 9,
}

impl Loss {
    pub const ALL: [Self; 10] = [
        Self::BlocksFull,
        Self::SitesFull,
        Self::ThreadsFull,
        Self::InFlightFull,
        Self::EventsDropped,
        Self::StacksLost,
        Self::FreesMissed,
        Self::ProcessesFull,
        Self::ResultsUnreadable,
        Self::SpacesFull,
    ];

    /// As the reports name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BlocksFull => "blocks_full",
            Self::SitesFull => "sites_full",
            Self::ThreadsFull => "threads_full",
            Self::InFlightFull => "in_flight_full",
            Self::EventsDropped => "events_dropped",
            Self::StacksLost => "stacks_lost",
            Self::FreesMissed => "frees_missed",
            Self::ProcessesFull => "processes_full",
            Self::ResultsUnreadable => "results_unreadable",
            Self::SpacesFull => "spaces_full",
        }
    }
}

/// Counters that are no losses; they follow the losses in the per-CPU counter map.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tally {
    /// Frees of blocks that were allocated before the session began (or through a nested call).
    UnknownFrees = 17,
    /// Calls in flight that never returned (`longjmp`, an exception, the thread's end).
    AbandonedCalls = 18,
}

/// Length of the per-CPU counter map.
pub const COUNTERS: u32 = 32;

/// Why a stack ends where it ends, as the kernel side saw it.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// Walked to the thread's first frame.
    Complete = 0,
    /// Deeper than the frame limit.
    Truncated = 1,
    /// Code without rows, and the frame pointer is none.
    NoFramePointer = 2,
    /// Stack memory could not be read.
    Unreadable = 3,
    /// Not captured: all scratch slots were taken.
    Lost = 4,
    /// The tables have no answer for an address of a known mapping.
    NoRow = 5,
    /// An address lies in no known executable mapping.
    BadAddress = 6,
    /// A return probe of another tool has replaced a return address.
    Trampoline = 7,
    /// The caller's frame would not lie above this one.
    StackNotGrowing = 8,
    /// The row needs a register or an expression that is not followed.
    UnsupportedRule = 9,
}

impl Outcome {
    /// Stacks by outcome follow the tallies in the per-CPU counter map.
    pub const FIRST_COUNTER: u32 = 20;

    pub const ALL: [Self; 10] = [
        Self::Complete,
        Self::Truncated,
        Self::NoFramePointer,
        Self::Unreadable,
        Self::Lost,
        Self::NoRow,
        Self::BadAddress,
        Self::Trampoline,
        Self::StackNotGrowing,
        Self::UnsupportedRule,
    ];

    pub const fn from_u32(value: u32) -> Option<Self> {
        if (value as usize) < Self::ALL.len() { Some(Self::ALL[value as usize]) } else { None }
    }

    /// Index into the per-CPU counter map: stacks captured with this outcome.
    pub const fn counter(self) -> u32 {
        Self::FIRST_COUNTER + self as u32
    }
}

const _: () = assert!(Outcome::FIRST_COUNTER + Outcome::ALL.len() as u32 <= COUNTERS);
const _: () = assert!(Tally::AbandonedCalls as u32 <= Outcome::FIRST_COUNTER);

/// First word of every ring buffer record.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    Stack = 1,
    Mapping = 2,
    Fork = 3,
    Exec = 4,
    Libraries = 5,
    Seen = 6,
    Unmapped = 7,
    CarrierEnded = 8,
    Page = 9,
    Ended = 10,
}

/// Head of every ring buffer record.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RecordHead {
    /// [`RecordKind`].
    pub kind: u32,
    /// The thread that it happened in.
    pub tid: u32,
    pub owner: Owner,
    pub time_ns: u64,
}

/// A frame of a stack: an address, or a module and the offset in it, in one word.
///
/// A module and offset hold whatever happens to the process's mappings until the agent reads them;
/// an address has to be looked up in the mappings of its time.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct FrameWord(pub u64);

/// What a [`FrameWord`] points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FramePlace {
    Address(u64),
    /// The number is one that the agent gave, in the list of the process's mappings.
    Module {
        number: u32,
        offset: u32,
    },
}

impl FrameWord {
    /// Set in a frame that was interrupted there: its address is that of an instruction that has
    /// not run, not one that a call returns to.
    pub const INTERRUPTED: u64 = 1 << 63;
    /// Set where the lower half is an offset in a module, and the upper one its number.
    pub const IN_MODULE: u64 = 1 << 62;
    /// Where an address is in its word. No address of a program has more bits.
    pub const ADDRESS: u64 = Self::IN_MODULE - 1;

    /// Numbers are below this, and not 0.
    pub const MODULES_MAX: u32 = 1 << 30;

    pub const fn of(place: FramePlace) -> Self {
        Self(match place {
            FramePlace::Address(avma) => avma & Self::ADDRESS,
            FramePlace::Module { number, offset } => {
                Self::IN_MODULE | (number as u64) << 32 | offset as u64
            }
        })
    }

    pub const fn is_interrupted(self) -> bool {
        self.0 & Self::INTERRUPTED != 0
    }

    pub const fn place(self) -> FramePlace {
        if self.0 & Self::IN_MODULE == 0 {
            return FramePlace::Address(self.0 & Self::ADDRESS);
        }
        FramePlace::Module {
            number: (self.0 >> 32) as u32 & (Self::MODULES_MAX - 1),
            offset: self.0 as u32,
        }
    }
}

/// A stack, when its site is new. Only the first `frame_count` frames are sent.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StackRecord {
    pub head: RecordHead,
    pub stack: StackId,
    pub library_epoch: u32,
    /// [`Outcome`].
    pub outcome: u32,
    pub frame_count: u64,
    /// Innermost first.
    pub frames: [FrameWord; MAX_FRAMES],
}

/// What happened to a range of addresses.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MappingChange {
    /// `mmap` returned `result`.
    Map = 1,
    /// `munmap` begins.
    Unmap = 2,
    /// `munmap` failed: what [`MappingChange::Unmap`] took is back.
    UnmapFailed = 3,
    /// `mremap` begins: `address`, `length_bytes` are taken aside.
    RemapBegin = 4,
    /// `mremap` returned `result`; `length_bytes` is the new length.
    RemapEnd = 5,
    /// `brk` returned `result`.
    Break = 6,
}

/// A change of a process's anonymous mappings.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MappingRecord {
    pub head: RecordHead,
    /// [`MappingChange`].
    pub change: u32,
    /// 1 while the thread was inside an allocator call.
    pub inside_allocator: u32,
    pub address: u64,
    pub length_bytes: u64,
    /// `MAP_*` or `MREMAP_*`.
    pub flags: u64,
    /// The call's return value; negative values are errors.
    pub result: i64,
    pub stack: StackId,
}

/// `fork`, `vfork` or `clone` made a process. `head.owner` is the parent's.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ForkRecord {
    pub head: RecordHead,
    pub child: Owner,
    pub child_tgid: u32,
    /// [`process_flags`] of the child.
    pub flags: u32,
}

/// `execve` replaced the memory. `head.owner` is the new one's.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExecRecord {
    pub head: RecordHead,
    pub old: Owner,
    /// [`process_flags`] before.
    pub old_flags: u32,
    /// The thread that called it; another than `head.tid` has taken the first one's place.
    pub old_tid: u32,
}

/// Libraries came or went, or (`Seen`) a process was met for the first time.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LibrariesRecord {
    pub head: RecordHead,
    pub library_epoch: u32,
    pub pad: u32,
}

/// A stack led to an address in no mapping that is known of the process. At most one for each
/// [`UNMAPPED_INTERVAL_NS`] of a process.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UnmappedRecord {
    pub head: RecordHead,
    pub library_epoch: u32,
    pub pad: u32,
    pub address: u64,
}

/// A chosen page was touched: the fault is about to be served.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageRecord {
    pub head: RecordHead,
    /// Of the access, not of its page.
    pub address: u64,
    pub stack: StackId,
}

/// The last thread of a process ends.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EndedRecord {
    pub head: RecordHead,
    /// Processor time of its threads since it began, but for what the kernel has not added up yet.
    pub cpu_ns: u64,
}

pub const UNMAPPED_INTERVAL_NS: u64 = 20_000_000;

const _: () = {
    assert!(size_of::<BlockKey>() == 16);
    assert!(size_of::<Block>() == 24);
    assert!(size_of::<SiteKey>() == 16);
    assert!(size_of::<SiteCounters>() == 40);
    assert!(size_of::<ProcessState>() == 24);
    assert!(size_of::<Control>() == 40);
    assert!(size_of::<RecordHead>() == 24);
    assert!(size_of::<StackRecord>() == 24 + 24 + 8 * MAX_FRAMES);
    assert!(size_of::<MappingRecord>() == 24 + 48);
    assert!(size_of::<ForkRecord>() == 40);
    assert!(size_of::<ExecRecord>() == 40);
    assert!(size_of::<LibrariesRecord>() == 32);
    assert!(size_of::<UnmappedRecord>() == 40);
    assert!(size_of::<PageRecord>() == 40);
    assert!(size_of::<EndedRecord>() == 32);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_survives_packing() {
        let cookie = Cookie {
            role: Role::Reallocate,
            size_rule: SizeRule::Product,
            frees_on_failure: true,
            returns_unprobed: true,
            return_optional: true,
            size: RegisterSlot(3),
            second_size: RegisterSlot::NONE,
            pointer: RegisterSlot(14),
            stack_distance: 0x1238,
        };
        assert_eq!(Cookie::unpack(cookie.pack()), Some(cookie));
        assert_eq!(Cookie::unpack(0), None);
    }

    #[test]
    fn a_frame_survives_packing() {
        let number = FrameWord::MODULES_MAX - 1;
        let places = [
            FramePlace::Address(0x7fff_ffff_f000),
            FramePlace::Module { number: 1, offset: 0 },
            FramePlace::Module { number, offset: u32::MAX },
        ];
        for place in places {
            let word = FrameWord::of(place);
            assert_eq!((word.place(), word.is_interrupted()), (place, false));
            let word = FrameWord(word.0 | FrameWord::INTERRUPTED);
            assert_eq!((word.place(), word.is_interrupted()), (place, true));
        }
    }
}
