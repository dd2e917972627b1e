//! Where in a function to put its probes, so that a hit costs one trap and not a single-step.
//!
//! A uprobe replaces an instruction by a trap. After the trap the kernel emulates the instruction
//! if it is one of few kinds, and otherwise runs a copy of it under single-step, which costs a
//! second exception (30 times as much on a virtual machine). So the planner walks the straight line
//! from a function's entry and takes the first instruction that the kernel emulates, as long as
//! what a probe needs can still be found there. Bytes in, sites out; one file per architecture
//! makes the [`Survey`], and [`Survey::plan`] chooses.

use std::fmt;

use leakbpf_common::abi::RegisterSlot;

pub mod x86_64;

/// Arguments that the calling convention passes in registers and that sites keep track of.
pub const TRACKED_ARGUMENTS: usize = 6;

/// Where the arguments are, by their number.
pub type Arguments = [RegisterSlot; TRACKED_ARGUMENTS];

/// What a hit costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cost {
    /// One trap.
    Emulated,
    /// Two exceptions.
    SingleStepped,
}

/// An instruction that each call of the function runs exactly once, before anything else can
/// happen to the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// From the function's entry, in bytes.
    pub offset: u64,
    /// Stack pointer at the function's entry minus stack pointer here, in bytes.
    pub stack_distance: u16,
    /// [`RegisterSlot::NONE`] for an argument that is no longer in a register.
    pub arguments: Arguments,
    pub cost: Cost,
}

/// Why no better site than the entry could be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Fallback {
    #[error("the symbol table does not say how long the function is")]
    SizeUnknown,
    #[error("the function is longer than its file or than any allocator's")]
    SizeImplausible,
    #[error("an instruction cannot be decoded")]
    Undecodable,
    #[error("a branch leads back to the entry, so a hit need not be a call")]
    BranchToEntry,
    #[error("a branch leads to before the first instruction that the kernel emulates")]
    BranchInto,
    #[error("the first basic block has no instruction that the kernel emulates")]
    NothingEmulated,
    #[error("the arguments are gone where the first emulated instruction is")]
    ArgumentsLost,
    #[error("the return address is not on top of the stack at any emulated instruction")]
    StackMoved,
}

/// Why a function cannot be probed at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Refusal {
    #[error("its code is not in the file")]
    NoCode,
    #[error("its first instruction cannot be decoded")]
    Undecodable,
    #[error("the kernel does not probe its first instruction")]
    Unprobable,
    #[error(
        "a probe on its first instruction could crash forked children, and there is no other place"
    )]
    Rewritten,
}

/// A function's probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub enter: Site,
    /// Where the return address is replaced; the same instruction as `enter` when one trap can
    /// serve both.
    pub leave: Option<Site>,
    /// Set when the probes are at the entry for want of a better site. The entry itself may be
    /// cheap: see [`Site::cost`].
    pub fallback: Option<Fallback>,
}

impl Plan {
    /// The dearer of the two sites.
    pub fn cost(&self) -> Cost {
        self.leave.map_or(self.enter.cost, |leave| leave.cost.max(self.enter.cost))
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cost = match self.cost() {
            Cost::Emulated => "emulated",
            Cost::SingleStepped => "single-stepped",
        };
        write!(f, "+{:#x}", self.enter.offset)?;
        if let Some(leave) = self.leave.filter(|leave| leave.offset != self.enter.offset) {
            write!(f, ", return +{:#x}", leave.offset)?;
        }
        write!(f, ", {cost}")?;
        match self.fallback {
            Some(fallback) => write!(f, ": {fallback}"),
            None => Ok(()),
        }
    }
}

/// How a straight line of code goes on somewhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TailJump {
    pub target_svma: u64,
    /// By argument of the target: which of this function's arguments it is.
    pub passes: [Option<u8>; TRACKED_ARGUMENTS],
}

/// What one architecture's decoder found on the straight line from a function's entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    pub entry: Site,
    /// The instructions that the kernel emulates, in order. None is reached but by falling
    /// through from the entry.
    pub sites: Vec<Site>,
    /// Why `sites` ends early, or is empty.
    pub obstacle: Option<Fallback>,
    /// Set when every call runs straight into another function.
    pub tail_jump: Option<TailJump>,
}

impl Survey {
    /// Chooses the sites for a function whose probe reads `arguments` (numbers, from 0) and, if
    /// `needs_return`, replaces the return address.
    pub fn plan(&self, arguments: &[u8], needs_return: bool) -> Plan {
        let known = |site: &&Site| {
            arguments.iter().all(|&argument| {
                site.arguments
                    .get(usize::from(argument))
                    .is_some_and(|&slot| slot != RegisterSlot::NONE)
            })
        };
        let unmoved = |site: &&Site| site.stack_distance == 0;

        let enter = self.sites.iter().find(known).copied();
        if !needs_return {
            return match enter {
                Some(enter) => Plan { enter, leave: None, fallback: None },
                None => self.at_entry(false, self.lacking(Fallback::ArgumentsLost)),
            };
        }
        // One trap serves both probes when they share an instruction.
        if let Some(&both) = self.sites.iter().filter(known).find(unmoved) {
            return Plan { enter: both, leave: Some(both), fallback: None };
        }
        match (enter, self.sites.iter().find(unmoved).copied()) {
            (Some(enter), Some(leave)) => Plan { enter, leave: Some(leave), fallback: None },
            // A single-step at the entry serves both; an emulated site beside it only adds a trap.
            (Some(_), None) => self.at_entry(true, self.lacking(Fallback::StackMoved)),
            (None, _) => self.at_entry(true, self.lacking(Fallback::ArgumentsLost)),
        }
    }

    fn lacking(&self, otherwise: Fallback) -> Fallback {
        match self.obstacle {
            Some(obstacle) => obstacle,
            None if self.sites.is_empty() => Fallback::NothingEmulated,
            None => otherwise,
        }
    }

    fn at_entry(&self, needs_return: bool, fallback: Fallback) -> Plan {
        Plan {
            enter: self.entry,
            leave: needs_return.then_some(self.entry),
            fallback: Some(fallback),
        }
    }
}
