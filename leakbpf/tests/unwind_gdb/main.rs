//! Our stacks against gdb's, on stopped processes: same addresses, same order.
//!
//! Where code has no rows (what V8 compiles), gdb guesses from the instructions and we follow the
//! frame pointer: from there on, the two are not compared.

mod gdb;
mod target;
mod walk;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use leakbpf::process::Pid;
use leakbpf_common::abi::Outcome;

use gdb::{Gdb, Thread};
use target::Target;
use walk::{Modules, Stack, walk};

/// Moments at which each program must have been compared.
const POINTS: usize = 100;

/// Stops in one round of `targets/frames.c`.
const FRAME_KINDS: usize = 12;

/// Stacks compared, by result.
#[derive(Default)]
struct Tally {
    /// Moments at which all threads were compared.
    points: usize,
    /// Same frames up to the thread's first.
    identical: usize,
    frames: usize,
    /// Same frames up to code without rows.
    until_rowless: usize,
    /// Same frames up to a row that needs a register that is not followed.
    until_unsupported: usize,
    /// Same frames up to an address outside of code, which gdb lists: while an exception is thrown,
    /// libgcc rewrites the stack that it runs on.
    until_bad_address: usize,
    deepest: usize,
    outcomes: BTreeMap<Outcome, usize>,
    /// Functions whose frames were found by rows, as gdb names them.
    by_rows: BTreeSet<String>,
    /// Functions of the identical stacks, as gdb names them.
    functions: Vec<Vec<String>>,
    different: Vec<String>,
}

impl Tally {
    fn add(&mut self, stack: &Stack, thread: &Thread) {
        let theirs: Vec<u64> = thread.frames.iter().map(|frame| frame.0).collect();
        let ours = &stack.addresses;
        self.deepest = self.deepest.max(ours.len());
        let frames = thread.frames.iter().zip(ours).take(stack.by_rows);
        self.by_rows.extend(frames.filter(|(a, b)| a.0 == **b).map(|(frame, _)| frame.1.clone()));
        *self.outcomes.entry(stack.outcome).or_default() += 1;
        let same_start = |count: usize| ours.get(..count) == theirs.get(..count);
        if stack.met_rowless && same_start(stack.by_rows) {
            self.until_rowless += 1;
        } else if stack.outcome == Outcome::UnsupportedRule && same_start(ours.len()) {
            self.until_unsupported += 1;
        } else if stack.bad_address.is_some()
            && same_start(ours.len())
            && theirs.get(ours.len()) == stack.bad_address.as_ref()
        {
            self.until_bad_address += 1;
        } else if stack.outcome == Outcome::Complete && *ours == theirs {
            self.identical += 1;
            self.frames += ours.len();
            self.functions.push(thread.frames.iter().map(|frame| frame.1.clone()).collect());
        } else {
            self.different.push(difference(stack, thread));
        }
    }

    fn stacks(&self) -> usize {
        self.identical
            + self.until_rowless
            + self.until_unsupported
            + self.until_bad_address
            + self.different.len()
    }

    /// Identical stacks that lead from a function whose name contains the first word through one
    /// that is named as the second.
    fn identical_through(&self, inner: &str, outer: &str) -> usize {
        let leads = |functions: &&Vec<String>| {
            let position = functions.iter().position(|name| name == outer);
            position.is_some_and(|outer| functions[..outer].iter().any(|f| f.contains(inner)))
        };
        self.functions.iter().filter(leads).count()
    }

    /// Every stack is as gdb has it.
    #[track_caller]
    fn assert_agreement(&self) {
        assert!(self.points >= POINTS, "compared at {} points of {POINTS}", self.points);
        if let Some(first) = self.different.first() {
            panic!("{self}; the first that differs:\n{first}");
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} points, {} stacks: {} identical ({} frames, deepest {}), {} until code without rows, \
             {} until an unsupported row, {} until a bad address, {} different; outcomes {:?}",
            self.points,
            self.stacks(),
            self.identical,
            self.frames,
            self.deepest,
            self.until_rowless,
            self.until_unsupported,
            self.until_bad_address,
            self.different.len(),
            self.outcomes
        )
    }
}

/// Both stacks, side by side from where they part.
fn difference(stack: &Stack, thread: &Thread) -> String {
    let mut text = format!("outcome {:?}, {} frames by rows\n", stack.outcome, stack.by_rows);
    for index in 0..stack.addresses.len().max(thread.frames.len()) {
        let ours = stack.addresses.get(index).map_or("-".to_owned(), |ip| format!("{ip:#x}"));
        let theirs = thread.frames.get(index);
        let theirs = theirs.map_or("-".to_owned(), |(ip, name)| format!("{ip:#x} {name}"));
        text.push_str(&format!("{index:4} {ours:18} {theirs}\n"));
    }
    text
}

/// A process, gdb on it, and the comparison so far.
struct Comparison {
    // Dropped first: a traced process can be reaped only when its tracer has let go.
    gdb: Gdb,
    target: Target,
    modules: Modules,
    tally: Tally,
}

impl Comparison {
    fn of(target: Target) -> Self {
        let (gdb, threads) = Gdb::attach(target.pid());
        let mut comparison =
            Self { target, gdb, modules: Modules::default(), tally: Tally::default() };
        comparison.compare(&threads);
        comparison
    }

    fn compare(&mut self, threads: &[Thread]) {
        assert!(!threads.is_empty(), "gdb sees the process's threads");
        self.tally.points += 1;
        for thread in threads {
            let pid = Pid(self.target.pid());
            let stack = walk(pid, &mut self.modules, thread.registers);
            self.tally.add(&stack, thread);
        }
    }

    /// Compares at stops that the program makes by itself.
    fn at_stops(&mut self, count: usize) {
        for _ in 0..count {
            self.gdb.go();
            let threads = self.gdb.point();
            self.compare(&threads);
        }
    }

    /// Compares at whatever moments the process is at.
    fn at_random(&mut self, count: usize) {
        for _ in 0..count {
            self.gdb.go();
            self.target.run_a_while_and_stop();
            let threads = self.gdb.point();
            self.compare(&threads);
        }
    }

    fn at_each_instruction(&mut self, count: usize) {
        for _ in 0..count {
            let threads = self.gdb.step();
            self.compare(&threads);
        }
    }

    fn conclude(self, name: &str) -> Tally {
        eprintln!("{name}: {}", self.tally);
        self.tally.assert_agreement();
        self.tally
    }
}

#[test]
fn every_kind_of_frame_that_c_makes_is_unwound_as_gdb_does() {
    let options = ["-O2", "-fomit-frame-pointer", "-pthread"];
    let mut comparison = Comparison::of(Target::compile("gcc", "frames.c", &options));
    comparison.target.send_line();
    comparison.at_stops(10 * FRAME_KINDS);
    let tally = comparison.conclude("C at its stops");
    assert_eq!(tally.identical, tally.stacks());
    assert!(tally.deepest > 40);
}

#[test]
fn an_allocation_inside_a_signal_handler_is_unwound_as_gdb_does() {
    let options = ["-O2", "-fomit-frame-pointer", "-pthread", "-Wl,-z,now"];
    let mut comparison = Comparison::of(Target::compile("gcc", "frames.c", &options));
    comparison.target.send_line();
    comparison.at_stops(1);
    comparison.at_each_instruction(400);
    let tally = comparison.conclude("C in a signal handler");
    assert_eq!(tally.identical, tally.stacks(), "{tally}");
    let points = tally.identical_through("malloc", "on_signal_allocates");
    assert!(points >= POINTS, "{points} points in malloc, called by a signal handler");
}

#[test]
fn every_instruction_of_a_c_program_is_unwound_as_gdb_does() {
    let options = ["-O2", "-fomit-frame-pointer", "-pthread", "-Wl,-z,lazy"];
    let mut comparison = Comparison::of(Target::compile("gcc", "frames.c", &options));
    comparison.target.send_line();
    comparison.at_each_instruction(100);
    for _ in 0..9 * FRAME_KINDS {
        comparison.at_stops(1);
        comparison.at_each_instruction(100);
    }
    let tally = comparison.conclude("C by instruction");
    for function in ["with_alloca", "with_huge_frame", "with_alignment", "compare", "on_signal"] {
        let points = tally.identical_through("", function);
        assert!(points >= POINTS, "{points} points below {function}");
    }
    // The lazy resolver keeps its frame in rbx.
    assert!(tally.until_unsupported * 5 < tally.stacks(), "{tally}");
}

#[test]
fn signal_frames_of_a_c_library_without_call_frame_information_are_found() {
    let options = ["-static", "-O2", "-fomit-frame-pointer", "-pthread"];
    let mut comparison = Comparison::of(Target::compile("musl-gcc", "frames.c", &options));
    comparison.target.send_line();
    comparison.at_stops(9 * FRAME_KINDS);
    let tally = comparison.conclude("C with musl");
    // It lies below the frames of a handler and of musl's signal return.
    assert!(tally.by_rows.contains("reads_first"), "{:?}", tally.by_rows);
}

#[test]
fn cpp_with_exceptions_and_threads_is_unwound_as_gdb_does() {
    let target = Target::compile("g++", "throws.cpp", &["-O2", "-fomit-frame-pointer", "-pthread"]);
    let mut comparison = Comparison::of(target);
    comparison.at_random(POINTS);
    let tally = comparison.conclude("C++");
    assert!(tally.identical * 100 >= tally.stacks() * 99, "{tally}");
}

#[test]
fn a_rust_program_is_unwound_as_gdb_does() {
    let mut comparison = Comparison::of(Target::rust());
    comparison.at_random(POINTS);
    let tally = comparison.conclude("Rust");
    assert_eq!(tally.identical, tally.stacks(), "{tally}");
}

#[test]
fn python_is_unwound_as_gdb_does() {
    let program = "
import re, json
def f(n):
    if n == 0:
        return len(sorted(range(9), key=lambda x: re.sub('1', lambda m: 'a', str(x))))
    return f(n - 1) + len(json.dumps({'a': [n]}))
while True:
    f(20)
";
    let mut comparison =
        Comparison::of(Target::run("/usr/bin/python3", &["-c", program], "python3"));
    comparison.at_random(POINTS);
    let tally = comparison.conclude("python3");
    assert_eq!(tally.identical, tally.stacks(), "{tally}");
}

#[test]
fn perl_is_unwound_as_gdb_does() {
    let program = "sub f { my $n = shift; return $n ? f($n - 1) . 'x' : join '', sort { $a cmp $b } \
                   map { s/1/2/r } 1..20 } f(10) while 1";
    let mut comparison = Comparison::of(Target::run("/usr/bin/perl", &["-e", program], "perl"));
    comparison.at_random(POINTS);
    let tally = comparison.conclude("perl");
    assert_eq!(tally.identical, tally.stacks(), "{tally}");
}

#[test]
fn redis_is_unwound_as_gdb_does() {
    let mut comparison = Comparison::of(Target::redis());
    comparison.at_random(POINTS);
    let tally = comparison.conclude("redis-server");
    assert!(tally.identical * 100 >= tally.stacks() * 99, "{tally}");
}

#[test]
fn nginx_is_unwound_as_gdb_does() {
    let mut comparison = Comparison::of(Target::nginx());
    comparison.at_random(POINTS);
    let tally = comparison.conclude("nginx");
    assert!(tally.identical * 100 >= tally.stacks() * 99, "{tally}");
}

#[test]
fn node_is_unwound_as_gdb_does_up_to_the_first_compiled_frame() {
    let program = "
const zlib = require('zlib');
function f(n) { return n ? f(n - 1) + 1 : JSON.stringify([...Array(50).keys()].sort()).length }
setInterval(() => { for (let i = 0; i < 2000; i++) f(20); zlib.deflateSync(Buffer.alloc(99999)) }, 0);
";
    let mut comparison = Comparison::of(Target::run("node", &["-e", program], "nodejs"));
    comparison.at_random(POINTS);
    let tally = comparison.conclude("node");
    assert!(tally.identical >= POINTS && tally.until_rowless >= POINTS / 2, "{tally}");
}
