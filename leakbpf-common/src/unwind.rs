//! One step of a stack walk without frame pointers, and the tables that it needs.
//!
//! A module's call frame information is compiled to [`Row`]s, sorted by address, each naming one of
//! few [`Rule`]s; a page index says which rows belong to each [`PAGE_BYTES`] of code. The kernel side
//! and the host's tests run the same functions, with different ways to read a row and a word.
//!
//! Only x86-64's rsp and rbp are followed: in 440 libraries, 99.9 % of all frame addresses are
//! rsp + n or rbp + n.

use crate::abi::Outcome;

/// From this address up to the next row's, one rule holds.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Row {
    /// Bytes after the table's base address.
    pub pc: u32,
    /// Index into the rule dictionary.
    pub rule: u32,
}

const _: () = assert!(size_of::<Row>() == 8);

/// Code bytes for each entry of the page index.
pub const PAGE_BYTES: u32 = 256;
pub const PAGE_SHIFT: u32 = PAGE_BYTES.trailing_zeros();

/// Most rows that one page can have: one for each byte, and the one that holds at its start.
pub const PAGE_ROWS_MAX: u32 = PAGE_BYTES + 1;

/// Bisections that find a row among [`PAGE_ROWS_MAX`].
pub const SEARCH_STEPS: u32 = 9;

const _: () = assert!(PAGE_ROWS_MAX < 1 << SEARCH_STEPS);

/// An entry of the page index: the rows that hold somewhere in the page.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Page(pub u64);

impl Page {
    pub const fn new(first: u32, end: u32) -> Self {
        Self((end as u64) << 32 | first as u64)
    }
    pub const fn first(self) -> u32 {
        self.0 as u32
    }
    /// Exclusive.
    pub const fn end(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// How the frame address (CFA: the stack pointer before the call) is found. Values of [`Rule::cfa`].
pub mod cfa {
    /// No row: follow the frame pointer. `cfa = bp + 16; ip = *(bp + 8); bp = *bp`.
    pub const FRAME_POINTER: u8 = 0;
    /// The thread's first frame: nobody called it.
    pub const END: u8 = 1;
    /// `cfa = sp + a`
    pub const SP: u8 = 2;
    /// `cfa = bp + a`
    pub const BP: u8 = 3;
    /// `cfa = *(sp + a) + b`
    pub const AT_SP: u8 = 4;
    /// `cfa = *(bp + a) + b`
    pub const AT_BP: u8 = 5;
    /// A lazy PLT entry pushes a word at byte `b` of its 16:
    /// `cfa = sp + a + ((ip & 15) >= b) * 8`
    pub const PLT: u8 = 6;
    /// The kernel's `struct ucontext` at `sp` holds every register of the frame that a signal
    /// interrupted.
    pub const SIGNAL: u8 = 7;
    /// There is a row, but it needs what is not followed.
    pub const UNSUPPORTED: u8 = 8;
}

/// How the caller's frame pointer is found. Values of [`Rule::bp`].
pub mod bp {
    /// It is still in the register.
    pub const SAME: u8 = 0;
    /// `bp = *(cfa + bp_offset)`
    pub const AT_CFA: u8 = 1;
    /// `bp = *(bp + bp_offset)`
    pub const AT_BP: u8 = 2;
    /// Nothing says where it is.
    pub const UNKNOWN: u8 = 3;
}

/// How to get from a frame to its caller. The return address is at `cfa - 8`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Rule {
    /// One of [`cfa`].
    pub cfa: u8,
    /// One of [`bp`].
    pub bp: u8,
    pub pad: u16,
    /// In bytes. Real ones reach half a megabyte.
    pub a: i32,
    pub b: i32,
    pub bp_offset: i32,
}

const _: () = assert!(size_of::<Rule>() == 16);

impl Rule {
    pub const FRAME_POINTER: Self = Self::of(cfa::FRAME_POINTER);
    pub const END: Self = Self::of(cfa::END);
    pub const SIGNAL: Self = Self::of(cfa::SIGNAL);
    pub const UNSUPPORTED: Self = Self::of(cfa::UNSUPPORTED);
    /// At a function's first instruction, whatever its rows say: the return address is at `*sp`.
    pub const ENTRY: Self = Self { a: 8, ..Self::of(cfa::SP) };

    const fn of(cfa: u8) -> Self {
        Self { cfa, bp: bp::SAME, pad: 0, a: 0, b: 0, bp_offset: 0 }
    }
}

/// Index of [`Rule::FRAME_POINTER`] in every rule dictionary: what holds where there is no row.
pub const FRAME_POINTER_RULE: u32 = 0;

/// What is followed from frame to frame.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Registers {
    pub ip: u64,
    pub sp: u64,
    pub bp: u64,
    /// 1 when `ip` is a return address: the call, whose row is wanted, lies before it and may be
    /// the last instruction of its function. 0 where the frame was interrupted: the stack's first,
    /// and those below a signal.
    pub after_call: u64,
}

impl Registers {
    /// The address whose row holds.
    #[inline(always)]
    pub const fn lookup_ip(&self) -> u64 {
        self.ip.wrapping_sub(self.after_call)
    }
}

/// Where a step leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The caller. Its `ip` is unchecked: the next lookup tells whether it lies in a mapping.
    Frame(Registers),
    /// There is no caller: the stack is complete.
    End,
    Stop(Outcome),
}

/// A frame can be no larger than this when only its frame pointer vouches for it: beyond, the
/// register holds some other value. The usual limit of a thread's stack.
pub const FRAME_POINTER_REACH_BYTES: u64 = 8 << 20;

/// The frame pointer where nothing says where it was saved: no address is near it, so that every
/// rule that needs it fails.
const UNKNOWN_BP: u64 = u64::MAX - 0xffff_ffff;

// Offsets in `struct ucontext` (arch/x86/include/uapi/asm/ucontext.h, sigcontext.h).
const UCONTEXT_RBP: u64 = 120;
const UCONTEXT_RSP: u64 = 160;
const UCONTEXT_RIP: u64 = 168;

/// The index of the rule that holds at `pc`, among the rows of its page. `None` when a row cannot
/// be read.
#[inline(always)]
pub fn find_rule(page: Page, pc: u32, mut row: impl FnMut(u32) -> Option<Row>) -> Option<u32> {
    let mut found = FRAME_POINTER_RULE;
    let mut low = page.first();
    let mut high = page.end();
    let mut turn = 0;
    while turn < SEARCH_STEPS && low < high {
        turn += 1;
        let middle = low + ((high - low) >> 1);
        let candidate = row(middle)?;
        if candidate.pc <= pc {
            found = candidate.rule;
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    Some(found)
}

#[inline(always)]
fn offset(base: u64, bytes: i32) -> u64 {
    base.wrapping_add(bytes as i64 as u64)
}

/// From a frame to its caller. `read` reads a word of the stack.
#[inline(always)]
pub fn step(rule: &Rule, registers: &Registers, mut read: impl FnMut(u64) -> Option<u64>) -> Step {
    let Registers { ip, sp, bp, .. } = *registers;
    let frame_address = match rule.cfa {
        cfa::SP => offset(sp, rule.a),
        cfa::BP => offset(bp, rule.a),
        cfa::AT_SP | cfa::AT_BP => {
            let base = if rule.cfa == cfa::AT_SP { sp } else { bp };
            let Some(word) = read(offset(base, rule.a)) else {
                return Step::Stop(Outcome::Unreadable);
            };
            offset(word, rule.b)
        }
        cfa::PLT => {
            let pushed = if ip & 15 >= rule.b as u64 { 8 } else { 0 };
            offset(sp, rule.a).wrapping_add(pushed)
        }
        cfa::FRAME_POINTER => {
            // System V ABI, 3.4.1: the deepest frame is marked by a frame pointer of zero.
            if bp == 0 {
                return Step::End;
            }
            if bp & 7 != 0 || bp < sp || bp - sp > FRAME_POINTER_REACH_BYTES {
                return Step::Stop(Outcome::NoFramePointer);
            }
            bp.wrapping_add(16)
        }
        cfa::SIGNAL => return interrupted(sp, read),
        cfa::END => return Step::End,
        _ => return Step::Stop(Outcome::UnsupportedRule),
    };
    if frame_address <= sp {
        return Step::Stop(Outcome::StackNotGrowing);
    }
    // One read serves all: 0 and 1 are no addresses.
    let saved_at = match rule.bp {
        _ if rule.cfa == cfa::FRAME_POINTER => bp,
        bp::SAME => 0,
        bp::AT_CFA => offset(frame_address, rule.bp_offset),
        bp::AT_BP => offset(bp, rule.bp_offset),
        _ => 1,
    };
    // Not fatal: few callers need it, and in epilogues of realigned frames compilers state it wrong.
    let bp = match saved_at {
        0 => bp,
        1 => UNKNOWN_BP,
        _ => match read(saved_at) {
            Some(saved) => saved,
            None => UNKNOWN_BP,
        },
    };
    let Some(ip) = read(frame_address.wrapping_sub(8)) else {
        return Step::Stop(Outcome::Unreadable);
    };
    // Coroutines and hand-made threads begin so; no code lies at 0.
    if ip == 0 {
        return Step::End;
    }
    Step::Frame(Registers { ip, sp: frame_address, bp, after_call: 1 })
}

/// The frame that a signal interrupted: it may be on another stack, and its `ip` is exact.
#[inline(always)]
fn interrupted(sp: u64, mut read: impl FnMut(u64) -> Option<u64>) -> Step {
    // One after the other: of a failed read whose value is merely carried on, the compiler leaves a
    // register unset, which the kernel's verifier refuses.
    let Some(bp) = read(sp.wrapping_add(UCONTEXT_RBP)) else {
        return Step::Stop(Outcome::Unreadable);
    };
    let Some(caller_sp) = read(sp.wrapping_add(UCONTEXT_RSP)) else {
        return Step::Stop(Outcome::Unreadable);
    };
    let Some(ip) = read(sp.wrapping_add(UCONTEXT_RIP)) else {
        return Step::Stop(Outcome::Unreadable);
    };
    Step::Frame(Registers { ip, sp: caller_sp, bp, after_call: 0 })
}

#[cfg(test)]
mod tests;
