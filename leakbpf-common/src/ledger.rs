//! The accounting rules: what an allocator call does to the set of outstanding blocks.
//!
//! The same code runs in BPF, over maps, and in tests, over a `HashMap`. docs/accounting.md gives
//! the reasons; in short:
//! - only the outermost allocator call of a thread counts;
//! - a free takes the block out before the allocator has it back, an allocation puts it in after
//!   the allocator has given it away, so that no other thread can be confused with this one;
//! - `realloc` takes the old block aside and puts it back when the call failed;
//! - a call that never returned (`longjmp`, an exception) is recognised by its stack pointer;
//! - where blocks are sampled, the choice is made when the call begins, by its size; a call whose block
//!   is not chosen need not be seen to return, when its function calls no other that is probed.

use crate::{
    abi::{Block, BlockKey, Cookie, Loss, MAX_IN_FLIGHT, Owner, Role, SizeRule, StackId, Tally},
    sampling::Sampling,
};

/// Two calls whose stack pointers are nearer than this are on the same stack, the lower one
/// called by the higher one. Allocators' own frames stay far below it.
pub const NESTING_BYTES: u64 = 256 << 10;

/// A call in flight whose stack pointer lies at most this far *below* the current one, was left
/// without a return: the stack has unwound past it. The usual limit of a thread's stack.
pub const UNWOUND_BYTES: u64 = 8 << 20;

/// Where the books are kept.
pub trait Books {
    /// Puts a block in. When one is recorded at this address, it replaces that one and returns it.
    fn put(&mut self, key: &BlockKey, block: &Block) -> Put;
    /// Puts a block in unless one is recorded at this address.
    fn put_new(&mut self, key: &BlockKey, block: &Block) -> Result<(), NotPut>;
    /// Takes a block out.
    fn take(&mut self, key: &BlockKey) -> Option<Block>;
    /// Adds an allocation to its site.
    fn allocated(&mut self, key: &BlockKey, block: &Block);
    /// Adds a release to the site that had allocated.
    fn freed(&mut self, key: &BlockKey, block: &Block);
    fn lost(&mut self, loss: Loss);
    fn tally(&mut self, tally: Tally);
    /// Reads a word of the current process's memory.
    fn read_word(&mut self, address: u64) -> Option<u64>;
    fn sampling(&self) -> Sampling;
    /// Whether a block is chosen ([`sampling::choose`]); an interval of this process, or of others with
    /// it, is counted down.
    fn choose(&mut self, size_bytes: u64, interval_bytes: u64) -> bool;
}

/// Result of [`Books::put`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    New,
    Replaced(Block),
    /// No room; nothing is recorded at the address now.
    Full,
}

/// Why [`Books::put_new`] did not put a block in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotPut {
    Occupied,
    Full,
}

/// One allocator call that has begun and not returned.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InFlight {
    /// At the function's entry, pointing to the return address.
    pub stack_pointer: u64,
    /// What the program asks for, in bytes.
    pub size_bytes: u64,
    /// What it would take on top (`xallocx`).
    pub extra_bytes: u64,
    /// The old block, or where the result will be written.
    pub pointer: u64,
    /// [`Cookie`], packed.
    pub cookie: u64,
    /// Where it returns to; 0 when a return probe takes that place.
    pub return_address: u64,
    /// The block taken aside; meaningful when `aside` is 1.
    pub old: Block,
    pub aside: u32,
    /// [`Choice`].
    pub chosen: u32,
}

/// Whether the block that a call makes is recorded.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    Not = 0,
    /// As every one is.
    Certain = 1,
    /// Among others that are not.
    Sampled = 2,
}

/// A call that may have returned since: nobody waits for that.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unwatched {
    /// At the function's entry, pointing to the return address; 0 when there is none.
    pub stack_pointer: u64,
    pub return_address: u64,
}

/// Whether a call has to be seen to return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    Watched,
    /// Seeing it changes nothing.
    Unwatched,
}

/// A thread's calls in flight; the value of the thread map.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadState {
    /// Whose memory the calls work on. A thread that gets other memory (`execve`) gets another state.
    pub owner: Owner,
    /// How many of `calls` are in use.
    pub depth: u64,
    /// The last call whose return nobody waits for.
    pub unwatched: Unwatched,
    pub calls: [InFlight; MAX_IN_FLIGHT],
}

const _: () = assert!(size_of::<InFlight>() == 80);
const _: () = assert!(size_of::<ThreadState>() == 32 + 80 * MAX_IN_FLIGHT);
const _: () = assert!(MAX_IN_FLIGHT.is_power_of_two());

impl Default for ThreadState {
    fn default() -> Self {
        Self::new(Owner::default())
    }
}

/// The operands of a call, as read at its site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    pub cookie: Cookie,
    /// At the function's entry.
    pub stack_pointer: u64,
    pub size: u64,
    pub second_size: u64,
    pub pointer: u64,
}

/// A block that a call has just made; the caller captures its stack and passes both to [`born`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Birth {
    pub owner: Owner,
    pub address: u64,
    pub size_bytes: u64,
    /// Other blocks were not recorded.
    pub sampled: bool,
}

impl Call {
    /// What the program asks for, in bytes, and whether that is a number.
    #[inline(always)]
    fn size_bytes(&self) -> (u64, bool) {
        match self.cookie.size_rule {
            SizeRule::First | SizeRule::Sum => (self.size, true),
            SizeRule::Product => overflowing_product(self.size, self.second_size),
        }
    }
}

impl ThreadState {
    /// Nothing in flight.
    pub const fn new(owner: Owner) -> Self {
        const NONE: InFlight = InFlight {
            stack_pointer: 0,
            size_bytes: 0,
            extra_bytes: 0,
            pointer: 0,
            cookie: 0,
            return_address: 0,
            old: Block { size_bytes: 0, born_ns: 0, stack: StackId(0) },
            aside: 0,
            chosen: 0,
        };
        let unwatched = Unwatched { stack_pointer: 0, return_address: 0 };
        Self { owner, depth: 0, unwatched, calls: [NONE; MAX_IN_FLIGHT] }
    }

    /// The slot of the innermost call, in a form that the BPF verifier can bound.
    #[inline(always)]
    fn innermost(&self) -> usize {
        (self.depth.wrapping_sub(1) as usize) & (MAX_IN_FLIGHT - 1)
    }

    /// Whether a call at `stack_pointer` is made by the allocator itself. Drops the calls that
    /// were left without a return.
    ///
    /// A call at the stack pointer of another one is made by a jump: the callee inherits the
    /// caller's return address (glibc's `realloc(NULL, n)` ends so in `malloc`).
    #[inline(always)]
    pub fn nested(&mut self, books: &mut impl Books, stack_pointer: u64) -> bool {
        let mut turn = 0;
        while turn < MAX_IN_FLIGHT && self.depth != 0 {
            turn += 1;
            let top = &self.calls[self.innermost()];
            if stack_pointer <= top.stack_pointer {
                if top.stack_pointer - stack_pointer >= NESTING_BYTES {
                    return false;
                }
                // Functions whose end is probed in place are never jumped to by one another: the
                // same return address at the same place is the same caller, calling again.
                let again = stack_pointer == top.stack_pointer && top.return_address != 0;
                if !again && returns_to_probe(books, top) {
                    return true;
                }
            } else if stack_pointer - top.stack_pointer >= UNWOUND_BYTES {
                return false;
            }
            self.abandon(books);
        }
        false
    }

    /// Whether an allocator's function is running now, as far as can be told without its return.
    #[inline(always)]
    pub fn is_inside(
        &self,
        stack_pointer: u64,
        read_word: impl FnOnce(u64) -> Option<u64>,
    ) -> bool {
        if self.depth != 0 {
            return true;
        }
        // Whatever its caller calls next puts another return address there, unless it calls from the same
        // place. Probes of others may have put a trampoline there.
        let Unwatched { stack_pointer: entry, return_address } = self.unwatched;
        stack_pointer < entry
            && entry - stack_pointer < NESTING_BYTES
            && read_word(entry)
                .is_some_and(|word| word != 0 && (word == return_address || is_trampoline(word)))
    }

    /// Forgets the innermost call: it will not return. A block that it held aside is still the
    /// program's.
    #[inline(always)]
    fn abandon(&mut self, books: &mut impl Books) {
        let slot = self.innermost();
        self.depth -= 1;
        put_back(books, self.owner, &self.calls[slot]);
        books.tally(Tally::AbandonedCalls);
    }

    /// The thread is gone, and with it whatever it had in flight.
    #[inline(always)]
    pub fn end(&mut self, books: &mut impl Books) {
        let mut turn = 0;
        while turn < MAX_IN_FLIGHT && self.depth != 0 {
            turn += 1;
            self.abandon(books);
        }
    }
}

/// A return probe replaces the return address by that of a trampoline, the first byte of a page of
/// its own (kernel/events/uprobes.c, `uprobe_get_trampoline_vaddr`, `__create_xol_area`).
#[inline(always)]
pub fn is_trampoline(address: u64) -> bool {
    address & 0xfff == 0
}

/// Whether the call will still return to where a probe waits: the stack may have been unwound past
/// it (`longjmp`) and grown again, and then its return address has been written over.
#[inline(always)]
fn returns_to_probe(books: &mut impl Books, call: &InFlight) -> bool {
    match books.read_word(call.stack_pointer) {
        Some(0) | None => false,
        Some(address) if call.return_address != 0 => address == call.return_address,
        Some(address) => is_trampoline(address),
    }
}

#[inline(always)]
fn put_back(books: &mut impl Books, owner: Owner, call: &InFlight) {
    if call.aside != 0 {
        let key = BlockKey { owner, address: call.pointer };
        let loss = match books.put_new(&key, &call.old) {
            Ok(()) => return,
            // Another thread has released it while it was aside, and its address is in use again.
            Err(NotPut::Occupied) => Loss::FreesMissed,
            Err(NotPut::Full) => Loss::BlocksFull,
        };
        books.lost(loss);
        books.freed(&key, &call.old);
    }
}

/// Whether the block is recorded that a call makes. The first thing to know of a call: what is chosen of
/// one that does not count then (it is nested) changes no other's chances.
#[inline(always)]
pub fn choose(books: &mut impl Books, call: &Call) -> Choice {
    // Of what is resized in place, the size is known at its end.
    if call.cookie.role == Role::ResizeInPlace {
        Choice::Certain
    } else {
        choose_of(books, call.size_bytes().0)
    }
}

/// Nobody waits for the end of a call of which that is so.
#[inline(always)]
pub fn leaves_no_trace(call: &Call, chosen: Choice) -> bool {
    chosen == Choice::Not && call.cookie.return_optional
}

/// An allocation, reallocation or resize begins.
#[inline(always)]
pub fn enter(
    thread: &mut ThreadState,
    books: &mut impl Books,
    call: &Call,
    chosen: Choice,
) -> Return {
    if thread.nested(books, call.stack_pointer) {
        return Return::Unwatched;
    }
    if thread.depth >= MAX_IN_FLIGHT as u64 {
        books.lost(Loss::InFlightFull);
        thread.abandon(books);
    }
    let (size_bytes, fits) = call.size_bytes();
    if leaves_no_trace(call, chosen) {
        let return_address = books.read_word(call.stack_pointer).unwrap_or(0);
        thread.unwatched = Unwatched { stack_pointer: call.stack_pointer, return_address };
        return Return::Unwatched;
    }
    let return_address = if call.cookie.returns_unprobed {
        books.read_word(call.stack_pointer).unwrap_or(0)
    } else {
        0
    };
    let mut old = Block::default();
    let mut aside = 0;
    let replaces = matches!(call.cookie.role, Role::Reallocate | Role::ResizeInPlace);
    if replaces && call.pointer != 0 && fits {
        let key = BlockKey { owner: thread.owner, address: call.pointer };
        match books.take(&key) {
            Some(block) => {
                old = block;
                aside = 1;
            }
            None => unknown_free(books),
        }
    }
    thread.unwatched.stack_pointer = 0;
    thread.depth += 1;
    let slot = thread.innermost();
    let entry = &mut thread.calls[slot];
    entry.stack_pointer = call.stack_pointer;
    entry.size_bytes = size_bytes;
    entry.extra_bytes = match call.cookie.size_rule {
        SizeRule::Sum => call.second_size,
        SizeRule::First | SizeRule::Product => 0,
    };
    entry.pointer = call.pointer;
    entry.cookie = call.cookie.pack();
    entry.return_address = return_address;
    entry.old = old;
    entry.aside = aside;
    entry.chosen = chosen as u32;
    Return::Watched
}

#[inline(always)]
fn choose_of(books: &mut impl Books, size_bytes: u64) -> Choice {
    match books.sampling().interval_bytes {
        0 => Choice::Certain,
        interval if books.choose(size_bytes, interval) => Choice::Sampled,
        _ => Choice::Not,
    }
}

/// A block is released that is not in the books: it is older than the session, or was not chosen.
#[inline(always)]
fn unknown_free(books: &mut impl Books) {
    if books.sampling().interval_bytes == 0 {
        books.tally(Tally::UnknownFrees);
    }
}

/// A product and whether it fits, in 64-bit steps: BPF has no wider multiplication.
#[inline(always)]
fn overflowing_product(first: u64, second: u64) -> (u64, bool) {
    let (first_high, first_low) = (first >> 32, first & 0xffff_ffff);
    let (second_high, second_low) = (second >> 32, second & 0xffff_ffff);
    if first_high != 0 && second_high != 0 {
        return (0, false);
    }
    let cross = first_high * second_low + second_high * first_low;
    let low = first_low * second_low;
    let product = low.wrapping_add(cross << 32);
    (product, cross >> 32 == 0 && product >= low)
}

/// A call returns that leaves no trace: its block was not chosen, and it held none aside. When it is
/// not such a call, nothing is changed, and [`leave`] has to deal with it.
#[inline(always)]
pub fn leave_unseen(thread: &mut ThreadState, stack_pointer: u64) -> bool {
    let call = &thread.calls[thread.innermost()];
    let unseen = call.chosen | call.aside == 0 && call.stack_pointer == stack_pointer;
    if unseen {
        thread.depth -= 1;
    }
    unseen
}

/// A call returns `result`; `stack_pointer` is that of its entry. The block that it made, if any,
/// goes to [`born`] once its stack is known.
#[inline(always)]
pub fn leave(
    thread: &mut ThreadState,
    books: &mut impl Books,
    stack_pointer: u64,
    result: u64,
) -> Option<Birth> {
    let mut turn = 0;
    while turn < MAX_IN_FLIGHT && thread.depth != 0 {
        turn += 1;
        let slot = thread.innermost();
        let call = &thread.calls[slot];
        if call.stack_pointer == stack_pointer {
            thread.depth -= 1;
            return settle(books, thread.owner, &thread.calls[slot], result);
        }
        // A call that is still running lies above; only what lies below was left behind.
        if call.stack_pointer > stack_pointer || stack_pointer - call.stack_pointer >= UNWOUND_BYTES
        {
            return None;
        }
        thread.abandon(books);
    }
    None
}

#[inline(always)]
fn settle(books: &mut impl Books, owner: Owner, call: &InFlight, result: u64) -> Option<Birth> {
    if call.chosen | call.aside == 0 {
        return None;
    }
    let cookie = Cookie::unpack(call.cookie)?;
    let old_key = BlockKey { owner, address: call.pointer };
    let birth = |address| {
        let sampled = call.chosen == Choice::Sampled as u32;
        let birth = Birth { owner, address, size_bytes: call.size_bytes, sampled };
        (call.chosen != Choice::Not as u32).then_some(birth)
    };
    match cookie.role {
        Role::Allocate => {
            if result == 0 {
                return None;
            }
            birth(result)
        }
        Role::AllocateOut => {
            // posix_memalign(3) returns an int; the upper half of the register is undefined.
            if result as u32 != 0 {
                return None;
            }
            match books.read_word(call.pointer) {
                Some(0) => None,
                Some(address) => birth(address),
                None => {
                    books.lost(Loss::ResultsUnreadable);
                    None
                }
            }
        }
        Role::Reallocate => {
            let released = result != 0 || call.size_bytes == 0 || cookie.frees_on_failure;
            if released {
                if call.aside != 0 {
                    books.freed(&old_key, &call.old);
                }
            } else {
                put_back(books, owner, call);
            }
            if result == 0 { None } else { birth(result) }
        }
        Role::ResizeInPlace => {
            if result < call.size_bytes {
                put_back(books, owner, call);
                return None;
            }
            // The result counts the allocator's rounding, too.
            let size_bytes = result.min(call.size_bytes.saturating_add(call.extra_bytes));
            if call.aside != 0 {
                books.freed(&old_key, &call.old);
            }
            if books.sampling().interval_bytes != 0 {
                // A block of another size stands for others, and is chosen anew.
                let birth = Birth { owner, address: call.pointer, size_bytes, sampled: true };
                let chosen = choose_of(books, size_bytes) != Choice::Not;
                return chosen.then_some(birth);
            }
            if call.aside != 0 {
                let old = Block { size_bytes, ..call.old };
                books.allocated(&old_key, &old);
                let resized = InFlight { old, ..*call };
                put_back(books, owner, &resized);
            }
            None
        }
        Role::Free => None,
    }
}

/// A block exists from now on.
#[inline(always)]
pub fn born(books: &mut impl Books, birth: &Birth, stack: StackId, now_ns: u64) {
    let key = BlockKey { owner: birth.owner, address: birth.address };
    let born_ns = books.sampling().birth_ns(birth.sampled, now_ns);
    let block = Block { size_bytes: birth.size_bytes, born_ns, stack };
    match books.put(&key, &block) {
        Put::New => {}
        Put::Replaced(ghost) => {
            books.lost(Loss::FreesMissed);
            books.freed(&key, &ghost);
        }
        // What is not in the books is not in the counters either: they must agree.
        Put::Full => {
            books.lost(Loss::BlocksFull);
            return;
        }
    }
    books.allocated(&key, &block);
}

/// A block of `owner` is about to be released. `thread` is absent when the thread never allocated.
#[inline(always)]
pub fn free(thread: Option<&mut ThreadState>, books: &mut impl Books, owner: Owner, call: &Call) {
    if call.pointer == 0 {
        return;
    }
    if let Some(thread) = thread
        && thread.depth != 0
        && thread.nested(books, call.stack_pointer)
    {
        return;
    }
    let key = BlockKey { owner, address: call.pointer };
    match books.take(&key) {
        Some(block) => books.freed(&key, &block),
        None => unknown_free(books),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_exact_or_known_not_to_fit() {
        let samples =
            [0, 1, 3, 0xffff, 0xffff_ffff, 1 << 32, (1 << 32) + 5, 1 << 63, u64::MAX / 3, u64::MAX];
        for first in samples {
            for second in samples {
                let (product, fits) = overflowing_product(first, second);
                assert_eq!(fits, first.checked_mul(second).is_some(), "{first} * {second}");
                if fits {
                    assert_eq!(Some(product), first.checked_mul(second));
                }
            }
        }
    }
}
