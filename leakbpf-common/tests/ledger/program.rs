//! A simulated program: threads, their stacks, an allocator that hands out a released address at
//! once, and what the program truly holds. Everything that a probe would see goes to the rules.

use std::collections::{BTreeMap, HashMap};

use leakbpf_common::{
    abi::{
        Block, BlockKey, Cookie, Loss, MAX_IN_FLIGHT, Owner, RegisterSlot, Role, SiteKey, SizeRule,
        StackId, Tally,
    },
    ledger::{self, Call, ThreadState},
};
use proptest::sample::Index;

use super::books::{HostBooks, begin};

/// Threads of a process.
pub const THREADS: usize = 3;

/// Most processes of a run.
const PROCESSES: usize = 2;

/// Far enough from each other that no two stacks are taken for one.
const STACK_STRIDE: u64 = 1 << 30;

const ENOMEM: u64 = 12;

/// What a call pushes, and what a return probe puts in its place.
pub const RETURN_ADDRESS: u64 = 0x40_1234;
pub const TRAMPOLINE: u64 = 0x7fff_ffff_e000;

/// Words of memory that `posix_memalign` writes to, one a call.
const RESULT_WORDS: u64 = 0x7000_0000_0000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Malloc,
    Calloc,
    CallocOverflow,
    PosixMemalign,
    Realloc,
    ReallocZero,
    ReallocNull,
    Reallocarray,
    ReallocarrayOverflow,
    Reallocf,
    Xallocx,
    Free,
    FreeNull,
}

#[derive(Debug, Clone)]
pub struct Request {
    pub shape: Shape,
    pub size: u64,
    pub pick: Index,
    /// Depth of the caller's stack, in bytes.
    pub gap: u64,
}

#[derive(Debug, Clone)]
pub enum Action {
    /// The program calls the allocator.
    Begin(usize, Request),
    /// The innermost call of a thread does its work, or, when it has done it, returns.
    Advance(usize, bool),
    /// The allocator calls itself, this far down the stack: a `malloc` or a `free`.
    Nested(usize, u64, bool),
    /// The allocator function jumps to another one that does the work.
    TailCall(usize),
    /// A handler on a signal stack calls the allocator.
    Signal(usize, Request),
    /// `longjmp` out of all that a thread is in, then a `malloc` from this far above or below.
    Jump(usize, u64, Index),
    /// The thread ends where it is.
    Die(usize),
    /// A release that no probe sees.
    UnseenFree(usize, Index),
    Fork,
}

/// A call of the program that has not returned.
#[derive(Debug, Clone)]
struct Frame {
    shape: Shape,
    role: Role,
    stack_pointer: u64,
    size: u64,
    pointer: u64,
    result: Option<u64>,
    /// The record that the call replaces.
    old: Option<Block>,
    /// How many functions return at this stack pointer (tail calls).
    returns: usize,
}

#[derive(Debug)]
struct Thread {
    state: ThreadState,
    frames: Vec<Frame>,
    /// Recursion of the allocator inside the innermost frame.
    nested: Vec<u64>,
}

impl Thread {
    fn new(owner: Owner) -> Self {
        Self { state: ThreadState::new(owner), frames: Vec::new(), nested: Vec::new() }
    }
}

struct Process {
    owner: Owner,
    threads: Vec<Thread>,
    /// The last one released is the next one handed out.
    free_addresses: Vec<u64>,
    /// What the program holds and the session does not know: from before it, or lost.
    unknown: Vec<u64>,
}

pub struct World {
    books: HostBooks,
    processes: Vec<Process>,
    /// What must be in the books.
    recorded: HashMap<BlockKey, Block>,
    /// Released without a trace, and still recorded.
    ghosts: Vec<BlockKey>,
    losses: BTreeMap<Loss, u64>,
    tallies: BTreeMap<Tally, u64>,
    capacity: usize,
    now_ns: u64,
}

impl World {
    /// `attached_late`: calls are in flight and blocks exist when the session begins.
    pub fn new(capacity: usize, attached_late: bool) -> Self {
        let owner = Owner::new(100, 1);
        let mut process = Process {
            owner,
            threads: (0..THREADS).map(|_| Thread::new(owner)).collect(),
            free_addresses: (1..=64).rev().map(|page| page * 0x1000).collect(),
            unknown: Vec::new(),
        };
        if attached_late {
            process.unknown = (65..70).map(|page| page * 0x1000).collect();
        }
        let mut world = Self {
            books: HostBooks::new(capacity),
            processes: vec![process],
            recorded: HashMap::new(),
            ghosts: Vec::new(),
            losses: BTreeMap::new(),
            tallies: BTreeMap::new(),
            capacity,
            now_ns: 0,
        };
        if attached_late {
            world.return_of_an_unseen_call();
        }
        world
    }

    fn return_of_an_unseen_call(&mut self) {
        let process = &mut self.processes[0];
        let address = process.free_addresses.pop().expect("an address");
        process.unknown.push(address);
        let state = &mut process.threads[0].state;
        let birth = ledger::leave(state, &mut self.books, top((0, 0), 0), address);
        assert_eq!(birth, None, "a return without its entry counts nothing");
    }

    pub fn act(&mut self, action: &Action) {
        self.now_ns += 1;
        let place = |thread: usize| (thread / THREADS % self.processes.len(), thread % THREADS);
        match action {
            Action::Begin(thread, request) => {
                let at = place(*thread);
                if self.thread(at).frames.is_empty() {
                    self.begin(at, request, top(at, 0) - request.gap);
                }
            }
            Action::Signal(thread, request) => {
                let at = place(*thread);
                let level = self.thread(at).frames.len();
                if level > 0 && level < MAX_IN_FLIGHT && self.thread(at).nested.is_empty() {
                    self.begin(at, request, top(at, level as u64));
                }
            }
            Action::Advance(thread, succeeds) => self.advance(place(*thread), *succeeds),
            Action::Nested(thread, gap, free) => self.nest(place(*thread), *gap, *free),
            Action::TailCall(thread) => self.tail_call(place(*thread)),
            Action::Jump(thread, gap, pick) => self.jump(place(*thread), *gap, *pick),
            Action::Die(thread) => self.die(place(*thread)),
            Action::UnseenFree(thread, pick) => self.free_unseen(place(*thread).0, *pick),
            Action::Fork => self.fork(),
        }
    }

    /// Lets every call in flight return.
    pub fn finish(&mut self) {
        for process in 0..self.processes.len() {
            for thread in 0..THREADS {
                while !self.thread((process, thread)).frames.is_empty() {
                    self.now_ns += 1;
                    self.advance((process, thread), true);
                }
            }
        }
        self.books.assert_filter_is_exact();
    }

    /// The books against the truth: block by block, site by site, loss by loss.
    pub fn check(&self) {
        assert_eq!(self.books.blocks, self.recorded, "blocks");
        let mut live: BTreeMap<SiteKey, (u64, u64)> = BTreeMap::new();
        let recorded = self.recorded.iter().map(|(key, block)| (key.owner, *block));
        let aside = self.processes.iter().flat_map(|process| {
            let frames = process.threads.iter().flat_map(|thread| &thread.frames);
            frames.filter_map(|frame| Some((process.owner, frame.old?)))
        });
        for (owner, block) in recorded.chain(aside) {
            let site = live.entry(SiteKey { owner, stack: block.stack }).or_default();
            site.0 += block.size_bytes;
            site.1 += 1;
        }
        assert_eq!(self.books.live(), live, "allocated - freed = live, for each site");
        assert_eq!(self.books.losses, self.losses, "losses");
        assert_eq!(self.books.tallies, self.tallies, "tallies");
    }

    fn thread(&mut self, (process, thread): (usize, usize)) -> &mut Thread {
        &mut self.processes[process].threads[thread]
    }

    fn lose(&mut self, loss: Loss) {
        *self.losses.entry(loss).or_default() += 1;
    }

    fn tally(&mut self, tally: Tally, count: usize) {
        if count > 0 {
            *self.tallies.entry(tally).or_default() += count as u64;
        }
    }

    /// A block that nobody else is working on: recorded, or not known to the session.
    fn choose(&self, process: usize, pick: Index) -> Option<u64> {
        let process = &self.processes[process];
        let mut addresses: Vec<u64> = self
            .recorded
            .keys()
            .filter(|key| key.owner == process.owner && !self.ghosts.contains(key))
            .map(|key| key.address)
            .chain(process.unknown.iter().copied())
            .collect();
        addresses.sort_unstable();
        (!addresses.is_empty()).then(|| addresses[pick.index(addresses.len())])
    }

    fn begin(&mut self, at: (usize, usize), request: &Request, stack_pointer: u64) {
        use Shape::*;
        let owner = self.processes[at.0].owner;
        let (role, rule) = match request.shape {
            Malloc => (Role::Allocate, SizeRule::First),
            Calloc | CallocOverflow => (Role::Allocate, SizeRule::Product),
            PosixMemalign => (Role::AllocateOut, SizeRule::First),
            Realloc | ReallocZero | ReallocNull | Reallocf => (Role::Reallocate, SizeRule::First),
            Reallocarray | ReallocarrayOverflow => (Role::Reallocate, SizeRule::Product),
            Xallocx => (Role::ResizeInPlace, SizeRule::Sum),
            Free | FreeNull => (Role::Free, SizeRule::First),
        };
        let pointer = match request.shape {
            Malloc | Calloc | CallocOverflow | ReallocNull | FreeNull => 0,
            PosixMemalign => RESULT_WORDS + ((at.0 as u64) << 44) + stack_pointer,
            _ => match self.choose(at.0, request.pick) {
                Some(address) => address,
                None => return,
            },
        };
        let (size, second_size) = match request.shape {
            ReallocZero => (0, 0),
            CallocOverflow | ReallocarrayOverflow => (u64::MAX / 2, 3),
            Calloc | Reallocarray => (request.size, 7),
            _ => (request.size, 0),
        };
        let fits = size.checked_mul(second_size.max(1)).is_some();
        let mut frame = Frame {
            shape: request.shape,
            role,
            stack_pointer,
            size: size.wrapping_mul(second_size.max(1)),
            pointer,
            result: None,
            old: None,
            returns: 1,
        };
        let key = BlockKey { owner, address: pointer };
        if matches!(role, Role::Reallocate | Role::ResizeInPlace) && pointer != 0 && fits {
            frame.old = self.recorded.remove(&key);
            self.forget(at.0, &frame);
        }
        let call = Call {
            cookie: cookie(role, rule, request.shape == Reallocf),
            stack_pointer,
            size,
            second_size,
            pointer,
        };
        let thread = &mut self.processes[at.0].threads[at.1];
        if role == Role::Free {
            // Absent in the kernel's map as long as the thread has never allocated.
            let state = (thread.state != ThreadState::new(owner)).then_some(&mut thread.state);
            ledger::free(state, &mut self.books, owner, &call);
            if pointer != 0 && self.recorded.remove(&key).is_none() {
                self.tally(Tally::UnknownFrees, 1);
            }
            self.processes[at.0].unknown.retain(|&address| address != pointer);
        } else {
            self.books.memory.insert(stack_pointer, RETURN_ADDRESS);
            begin(&mut thread.state, &mut self.books, &call);
            // The kernel sets the return probe after the programs have run.
            self.books.memory.insert(stack_pointer, TRAMPOLINE);
        }
        self.thread(at).frames.push(frame);
    }

    /// A block that the session does not know is no longer the program's to pass on.
    fn forget(&mut self, process: usize, frame: &Frame) {
        self.processes[process].unknown.retain(|&address| address != frame.pointer);
        if frame.old.is_none() {
            self.tally(Tally::UnknownFrees, 1);
        }
    }

    fn advance(&mut self, at: (usize, usize), succeeds: bool) {
        if let Some(stack_pointer) = self.thread(at).nested.pop() {
            self.deliver_return(at, stack_pointer, 0xbad_0000);
            return;
        }
        let Some(frame) = self.thread(at).frames.last().cloned() else { return };
        match frame.result {
            None => {
                let result = self.work(at.0, &frame, succeeds);
                if frame.role == Role::AllocateOut && result as u32 == 0 {
                    let address = self.processes[at.0].free_addresses.pop().expect("an address");
                    self.books.memory.insert(frame.pointer, address);
                }
                if let Some(frame) = self.thread(at).frames.last_mut() {
                    frame.result = Some(result);
                }
            }
            Some(result) => self.finish_call(at, &frame, result),
        }
    }

    /// What the allocator does; returns what the function will return.
    fn work(&mut self, process: usize, frame: &Frame, succeeds: bool) -> u64 {
        use Shape::*;
        let addresses = &mut self.processes[process].free_addresses;
        // Enough stays for everything that can be in flight.
        let succeeds = succeeds && addresses.len() > THREADS * MAX_IN_FLIGHT;
        match frame.shape {
            CallocOverflow | ReallocarrayOverflow | FreeNull => 0,
            // The upper half of the register is whatever it was.
            PosixMemalign if succeeds => 0xdead_0000_0000,
            PosixMemalign => 0xdead_0000_0000 | ENOMEM,
            Malloc | Calloc | ReallocNull if succeeds => addresses.pop().unwrap_or_default(),
            Realloc | Reallocarray if succeeds => {
                // In half of the cases the block stays where it is.
                if frame.size.is_multiple_of(2) {
                    return frame.pointer;
                }
                let new = addresses.pop().unwrap_or_default();
                addresses.push(frame.pointer);
                new
            }
            Reallocf if succeeds => frame.pointer,
            Xallocx if succeeds => frame.size,
            Xallocx => frame.size - 1,
            ReallocZero | Reallocf | Free => {
                addresses.push(frame.pointer);
                0
            }
            _ => 0,
        }
    }

    fn deliver_return(&mut self, at: (usize, usize), stack_pointer: u64, result: u64) {
        let process = &mut self.processes[at.0];
        let state = &mut process.threads[at.1].state;
        let stack = StackId(2 + stack_pointer % 5);
        let birth = ledger::leave(state, &mut self.books, stack_pointer, result);
        if let Some(birth) = birth {
            ledger::born(&mut self.books, &birth, stack, self.now_ns);
        }
    }

    fn finish_call(&mut self, at: (usize, usize), frame: &Frame, result: u64) {
        use Shape::*;
        self.thread(at).frames.pop();
        if frame.role != Role::Free {
            for _ in 0..frame.returns {
                self.deliver_return(at, frame.stack_pointer, result);
            }
        }
        let stack = StackId(2 + frame.stack_pointer % 5);
        let new = Block { size_bytes: frame.size, born_ns: self.now_ns, stack };
        match frame.shape {
            Free | FreeNull | CallocOverflow | ReallocarrayOverflow => {}
            Xallocx => match frame.old {
                Some(old) if result >= frame.size => {
                    let resized = Block { size_bytes: frame.size, ..old };
                    self.record(at.0, frame.pointer, resized);
                }
                _ => self.give_back(at.0, frame),
            },
            PosixMemalign if result as u32 == 0 => {
                let address = self.books.memory.remove(&frame.pointer).unwrap_or_default();
                self.record(at.0, address, new);
            }
            PosixMemalign => {}
            _ if result != 0 => {
                self.record(at.0, result, new);
            }
            Realloc | Reallocarray => self.give_back(at.0, frame),
            ReallocZero | Reallocf | Malloc | Calloc | ReallocNull => {}
        }
    }

    /// A call failed: what it was to replace is the program's as before.
    fn give_back(&mut self, process: usize, frame: &Frame) {
        match frame.old {
            Some(old) => self.record(process, frame.pointer, old),
            None => self.processes[process].unknown.push(frame.pointer),
        }
    }

    fn record(&mut self, process: usize, address: u64, block: Block) {
        let key = BlockKey { owner: self.processes[process].owner, address };
        if let Some(ghost) = self.ghosts.iter().position(|&ghost| ghost == key) {
            self.ghosts.swap_remove(ghost);
            self.lose(Loss::FreesMissed);
        } else if self.recorded.len() >= self.capacity {
            self.lose(Loss::BlocksFull);
            self.processes[process].unknown.push(address);
            return;
        }
        self.recorded.insert(key, block);
    }

    fn nest(&mut self, at: (usize, usize), gap: u64, free: bool) {
        let owner = self.processes[at.0].owner;
        let thread = &mut self.processes[at.0].threads[at.1];
        let Some(frame) = thread.frames.last() else { return };
        if frame.role == Role::Free || frame.result.is_some() {
            return;
        }
        let above = thread.nested.last().copied().unwrap_or(frame.stack_pointer);
        let Some(stack_pointer) = above
            .checked_sub(gap)
            .filter(|&stack_pointer| frame.stack_pointer - stack_pointer < ledger::NESTING_BYTES)
        else {
            return;
        };
        let role = if free { Role::Free } else { Role::Allocate };
        let call = Call {
            cookie: cookie(role, SizeRule::First, false),
            stack_pointer,
            size: 1,
            second_size: 0,
            pointer: if free { frame.pointer } else { 0 },
        };
        if free {
            ledger::free(Some(&mut thread.state), &mut self.books, owner, &call);
        } else {
            thread.nested.push(stack_pointer);
            begin(&mut thread.state, &mut self.books, &call);
        }
    }

    /// The function ends in a jump to the same function of another name: a second entry at the
    /// same stack pointer, and both return probes fire.
    fn tail_call(&mut self, at: (usize, usize)) {
        use Shape::*;
        let thread = &mut self.processes[at.0].threads[at.1];
        if !thread.nested.is_empty() {
            return;
        }
        let Some(frame) = thread.frames.last_mut().filter(|frame| frame.result.is_none()) else {
            return;
        };
        let role = match frame.shape {
            Malloc | Calloc | ReallocNull => Role::Allocate,
            Realloc => Role::Reallocate,
            _ => return,
        };
        if frame.returns > 2 {
            return;
        }
        frame.returns += 1;
        let call = Call {
            cookie: cookie(role, SizeRule::First, false),
            stack_pointer: frame.stack_pointer,
            size: frame.size,
            second_size: 0,
            pointer: frame.pointer,
        };
        begin(&mut thread.state, &mut self.books, &call);
    }

    /// Whether a thread can be torn out of what it does without its allocator losing a block.
    fn nothing_done(&mut self, at: (usize, usize)) -> bool {
        self.thread(at).frames.iter().all(|frame| frame.result.is_none())
    }

    /// The calls of a thread will not return: the blocks that they held are still the program's.
    fn abandon_all(&mut self, at: (usize, usize)) {
        let frames = std::mem::take(&mut self.thread(at).frames);
        self.thread(at).nested.clear();
        for frame in frames.iter().rev() {
            match frame.role {
                // The probe has seen the release; the program gave the block up.
                Role::Free if frame.pointer != 0 => {
                    self.processes[at.0].free_addresses.push(frame.pointer);
                }
                Role::Free => {}
                Role::Reallocate | Role::ResizeInPlace
                    if frame.pointer != 0 && frame.shape != Shape::ReallocarrayOverflow =>
                {
                    self.give_back(at.0, frame);
                    self.tally(Tally::AbandonedCalls, 1);
                }
                _ => self.tally(Tally::AbandonedCalls, 1),
            }
        }
    }

    fn jump(&mut self, at: (usize, usize), gap: u64, pick: Index) {
        let one_stack = self.thread(at).frames.len() == 1;
        if !one_stack || !self.nothing_done(at) {
            return;
        }
        let left = self.thread(at).frames[0].stack_pointer;
        self.abandon_all(at);
        // What runs next writes over the stack; a call of its own may lie above or below.
        self.books.memory.insert(left, RETURN_ADDRESS);
        let stack_pointer = if gap & 16 == 0 { left + gap } else { left - gap };
        let request = Request { shape: Shape::Malloc, size: 33, pick, gap: 0 };
        self.begin(at, &request, stack_pointer);
    }

    fn die(&mut self, at: (usize, usize)) {
        if !self.nothing_done(at) {
            return;
        }
        self.abandon_all(at);
        let owner = self.processes[at.0].owner;
        let thread = &mut self.processes[at.0].threads[at.1];
        thread.state.end(&mut self.books);
        *thread = Thread::new(owner);
    }

    fn free_unseen(&mut self, process: usize, pick: Index) {
        let Some(address) = self.choose(process, pick) else { return };
        let key = BlockKey { owner: self.processes[process].owner, address };
        if self.recorded.contains_key(&key) {
            self.ghosts.push(key);
        }
        let process = &mut self.processes[process];
        process.unknown.retain(|&unknown| unknown != address);
        process.free_addresses.push(address);
    }

    /// The child has a copy of everything, and none of it is its own doing.
    fn fork(&mut self) {
        if self.processes.len() >= PROCESSES {
            return;
        }
        let parent = &self.processes[0];
        let held = self.recorded.keys().filter(|key| !self.ghosts.contains(key));
        let owner = Owner::new(101, 2);
        let child = Process {
            owner,
            threads: (0..THREADS).map(|_| Thread::new(owner)).collect(),
            free_addresses: parent.free_addresses.clone(),
            unknown: held.map(|key| key.address).chain(parent.unknown.iter().copied()).collect(),
        };
        self.processes.push(child);
    }
}

/// Highest stack pointer of a thread's own stack (`level` 0) and of its signal stacks, which lie
/// above it and below it in turn.
fn top((process, thread): (usize, usize), level: u64) -> u64 {
    let own = ((process * THREADS + thread) as u64 * 16 + 8) * STACK_STRIDE;
    if level % 2 == 1 { own + level * STACK_STRIDE } else { own - level * STACK_STRIDE }
}

pub fn cookie(role: Role, size_rule: SizeRule, frees_on_failure: bool) -> Cookie {
    Cookie {
        role,
        size_rule,
        frees_on_failure,
        returns_unprobed: false,
        return_optional: false,
        size: RegisterSlot::NONE,
        second_size: RegisterSlot::NONE,
        pointer: RegisterSlot::NONE,
        stack_distance: 0,
    }
}
