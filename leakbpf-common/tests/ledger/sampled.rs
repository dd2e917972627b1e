//! The rules where only some blocks are recorded.

use std::collections::BTreeMap;

use leakbpf_common::{
    abi::{BlockKey, Cookie, Owner, Role, SizeRule, StackId},
    ledger::{self, Call, Return, ThreadState},
    sampling::{COUNT_SHIFT, Sampling, Weight},
};

use super::{
    books::{HostBooks, begin},
    program::cookie,
};

const OWNER: Owner = Owner::new(100, 1);
const STACK: u64 = 1 << 40;

/// A program whose blocks are sampled, and what it really holds.
struct Program {
    thread: ThreadState,
    books: HostBooks,
    held: BTreeMap<u64, u64>,
    next: u64,
    now_ns: u64,
    /// Returns that left no trace.
    unseen: u64,
    /// Those that need not even be seen.
    unwatched: u64,
}

impl Program {
    fn new(interval_bytes: u64, seed: u64) -> Self {
        Self::with(Sampling { interval_bytes, since_ns: 0 }, seed)
    }

    fn with(sampling: Sampling, seed: u64) -> Self {
        let books = HostBooks { sampling, seed, in_fractions: true, ..HostBooks::new(usize::MAX) };
        Self {
            thread: ThreadState::new(OWNER),
            books,
            held: BTreeMap::new(),
            next: 0x1000,
            now_ns: 1,
            unseen: 0,
            unwatched: 0,
        }
    }

    fn call(&mut self, role: Role, rule: SizeRule, size: u64, second: u64, pointer: u64) -> Call {
        let return_optional = role == Role::Allocate && self.books.any_number().is_multiple_of(2);
        Call {
            cookie: Cookie { return_optional, ..cookie(role, rule, false) },
            stack_pointer: STACK,
            size,
            second_size: second,
            pointer,
        }
    }

    fn run(&mut self, call: &Call, result: u64) {
        let chosen = ledger::choose(&mut self.books, call);
        // Where mappings are not told of, nobody asks what the thread has in flight.
        let at_once = self.books.any_number().is_multiple_of(2);
        let ends = if at_once && ledger::leaves_no_trace(call, chosen) {
            Return::Unwatched
        } else {
            ledger::enter(&mut self.thread, &mut self.books, call, chosen)
        };
        // As the kernel side does it. Not every kernel can do without a return that is not watched.
        if ends == Return::Unwatched {
            self.unwatched += 1;
            assert_eq!(self.thread.depth, 0);
            assert_eq!(ledger::leave(&mut self.thread, &mut self.books, STACK, result), None);
        } else if ledger::leave_unseen(&mut self.thread, STACK) {
            self.unseen += 1;
        } else if let Some(birth) = ledger::leave(&mut self.thread, &mut self.books, STACK, result)
        {
            ledger::born(&mut self.books, &birth, StackId(7), self.now_ns);
        }
        assert_eq!(self.thread.depth, 0);
    }

    fn fresh(&mut self) -> u64 {
        self.next += 16;
        self.next
    }

    fn any(&mut self) -> Option<u64> {
        let pick = u64::from(self.books.any_number()) % self.held.len().max(1) as u64;
        self.held.keys().nth(pick as usize).copied()
    }

    fn step(&mut self) {
        self.now_ns += 1;
        let size = match self.books.any_number() % 10 {
            0..7 => u64::from(self.books.any_number() % 100),
            7..9 => u64::from(self.books.any_number() % 5000),
            _ => u64::from(self.books.any_number() % 100_000),
        };
        let fails = self.books.any_number().is_multiple_of(8);
        let pointer = self.any();
        match (self.books.any_number() % 12, pointer) {
            (0, Some(pointer)) => {
                let call = self.call(Role::Reallocate, SizeRule::First, size.max(1), 0, pointer);
                let result = if fails { 0 } else { self.fresh() };
                self.run(&call, result);
                if !fails {
                    self.held.remove(&pointer);
                    self.held.insert(result, size.max(1));
                }
            }
            (1, Some(pointer)) => {
                // Half of what would be taken on top.
                let call = self.call(Role::ResizeInPlace, SizeRule::Sum, size, 9000, pointer);
                let result = if fails { size.saturating_sub(1) } else { size + 4500 };
                self.run(&call, result);
                if result >= size {
                    self.held.insert(pointer, result);
                }
            }
            (2..6, Some(pointer)) => {
                let call = self.call(Role::Free, SizeRule::First, 0, 0, pointer);
                ledger::free(Some(&mut self.thread), &mut self.books, OWNER, &call);
                self.held.remove(&pointer);
            }
            _ => {
                let call = self.call(Role::Allocate, SizeRule::First, size, 0, 0);
                let result = if fails { 0 } else { self.fresh() };
                self.run(&call, result);
                if !fails {
                    self.held.insert(result, size);
                }
            }
        }
    }

    /// Bytes and blocks that the recorded ones stand for.
    fn estimate(&self) -> (f64, f64) {
        let weights = self
            .books
            .blocks
            .values()
            .map(|block| self.books.sampling.weight(block.size_bytes, block.born_ns));
        weights.fold((0.0, 0.0), |(bytes, count), weight| {
            let blocks = weight.count as f64 / f64::from(1 << COUNT_SHIFT);
            (bytes + weight.bytes as f64, count + blocks)
        })
    }
}

#[test]
fn what_is_recorded_is_there_with_its_size() {
    let mut program = Program::new(512, 1);
    for _ in 0..20_000 {
        program.step();
    }
    for (key, block) in &program.books.blocks {
        assert_eq!(key.owner, OWNER);
        assert_eq!(program.held.get(&key.address), Some(&block.size_bytes), "{key:?}");
    }
    let recorded = program.books.blocks.len();
    assert!(recorded > 100 && recorded < program.held.len() / 2, "{recorded}");
    assert!(program.unseen > 1000 && program.unwatched > 1000);
    assert_eq!(program.books.losses, BTreeMap::new());
}

#[test]
fn every_way_to_a_block_is_estimated_without_bias() {
    const RUNS: u64 = 300;
    let (mut bytes, mut count, mut true_bytes, mut true_count) = (0.0, 0.0, 0.0, 0.0);
    for seed in 0..RUNS {
        let mut program = Program::new(4096, seed << 40);
        for _ in 0..600 {
            program.step();
        }
        let (estimated_bytes, estimated_count) = program.estimate();
        (bytes, count) = (bytes + estimated_bytes, count + estimated_count);
        true_bytes += program.held.values().sum::<u64>() as f64;
        true_count += program.held.len() as f64;
    }
    // The standard errors are 0.5 and 2.5 %.
    assert!((bytes / true_bytes - 1.0).abs() < 0.02, "{}", bytes / true_bytes);
    assert!((count / true_count - 1.0).abs() < 0.1, "{}", count / true_count);
}

#[test]
fn a_release_of_a_block_that_was_not_chosen_is_nothing_to_speak_of() {
    let mut program = Program::new(1 << 20, 3);
    for _ in 0..1000 {
        program.step();
    }
    assert!(program.books.tallies.is_empty(), "{:?}", program.books.tallies);
    assert!(!program.books.blocks.contains_key(&BlockKey { owner: OWNER, address: 1 }));
}

/// Sampling begins while calls are in flight and blocks are there.
#[test]
fn blocks_from_before_the_samples_stand_for_themselves() {
    const RUNS: u64 = 300;
    const STEPS: u64 = 300;
    let (mut bytes, mut count, mut true_bytes, mut true_count) = (0.0, 0.0, 0.0, 0.0);
    for seed in 0..RUNS {
        let mut program = Program::with(Sampling::NONE, seed << 40);
        for _ in 0..STEPS {
            program.step();
        }
        assert_eq!(program.books.blocks.len(), program.held.len());

        // Begins before, ends after.
        let call = program.call(Role::Allocate, SizeRule::First, 10, 0, 0);
        begin(&mut program.thread, &mut program.books, &call);
        program.books.sampling = Sampling { interval_bytes: 4096, since_ns: program.now_ns + 100 };
        let address = program.fresh();
        let birth = ledger::leave(&mut program.thread, &mut program.books, STACK, address);
        let birth = birth.expect("every block was recorded when it began");
        ledger::born(&mut program.books, &birth, StackId(7), program.now_ns + 200);
        program.held.insert(address, 10);
        let block = program.books.blocks[&BlockKey { owner: OWNER, address }];
        assert_eq!(program.books.weight(&block), Weight::one(10));

        for _ in 0..STEPS {
            program.step();
        }
        let (estimated_bytes, estimated_count) = program.estimate();
        (bytes, count) = (bytes + estimated_bytes, count + estimated_count);
        true_bytes += program.held.values().sum::<u64>() as f64;
        true_count += program.held.len() as f64;
        // What the sites have is what the blocks stand for, to the last bit.
        let weights: Vec<Weight> =
            program.books.blocks.values().map(|block| program.books.weight(block)).collect();
        let live = weights
            .iter()
            .fold((0, 0), |(bytes, count), weight| (bytes + weight.bytes, count + weight.count));
        assert_eq!(program.books.live().into_values().collect::<Vec<_>>(), [live]);
        program.books.assert_filter_is_exact();
    }
    assert!((bytes / true_bytes - 1.0).abs() < 0.02, "{}", bytes / true_bytes);
    assert!((count / true_count - 1.0).abs() < 0.1, "{}", count / true_count);
}
