//! The survey of an x86-64 function.
//!
//! Assumptions, which hold for what compilers emit:
//! - An indirect jump lands outside of the function's first basic block (jump tables lead to later
//!   blocks), and so does any branch from a part of the function that its symbol does not cover,
//!   unless that part is given along.
//! - Arguments arrive by the System V calling convention.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register,
};
use leakbpf_common::abi::RegisterSlot;

use super::{Arguments, Cost, Fallback, Refusal, Site, Survey, TRACKED_ARGUMENTS, TailJump};
use kernel::Treatment;

pub mod flow;
pub mod kernel;

/// Longest function that is looked at; jemalloc's `mallocx` has 10 kB.
pub const MAX_FUNCTION_BYTES: u64 = 64 << 10;

/// Longest straight line that is walked, in instructions.
const MAX_STEPS: usize = 64;

/// Order of the general registers in their encodings, which is iced's order, as words of
/// `struct pt_regs` (arch/x86/include/asm/ptrace.h): rax rcx rdx rbx rsp rbp rsi rdi r8 … r15.
const SLOTS: [RegisterSlot; 16] = {
    let words = [10, 11, 12, 5, 19, 4, 13, 14, 9, 8, 7, 6, 3, 2, 1, 0];
    let mut slots = [RegisterSlot::NONE; 16];
    let mut i = 0;
    while i < slots.len() {
        slots[i] = RegisterSlot(words[i]);
        i += 1;
    }
    slots
};

/// Where the calling convention passes integers: rdi rsi rdx rcx r8 r9, as indices of [`SLOTS`].
const ARGUMENT_REGISTERS: [usize; TRACKED_ARGUMENTS] = [7, 6, 2, 1, 8, 9];

/// A function as its file has it.
#[derive(Debug, Clone, Copy)]
pub struct FunctionCode<'a> {
    pub svma: u64,
    /// From the entry on; shorter than `size_bytes` only when the file ends.
    pub bytes: &'a [u8],
    /// As the symbol states it; 0 if it does not.
    pub size_bytes: u64,
    /// Parts that the compiler moved elsewhere (`malloc.cold`), with their addresses.
    pub cold: &'a [(u64, &'a [u8])],
}

/// Walks the straight line from the function's entry.
pub fn survey(function: FunctionCode<'_>) -> Result<Survey, Refusal> {
    let mut walk = Walk::new();
    let mut first = Step::decode(function, 0).ok_or(if function.bytes.is_empty() {
        Refusal::NoCode
    } else {
        Refusal::Undecodable
    })?;
    while first.treatment == Treatment::Rewritten {
        // It changes nothing: the next one is as good an entry.
        first = Step::decode(function, first.end()).ok_or(Refusal::Rewritten)?;
    }
    let entry_cost = match first.treatment {
        Treatment::Refused => return Err(Refusal::Unprobable),
        Treatment::Emulated => Cost::Emulated,
        Treatment::Rewritten | Treatment::SingleStepped => Cost::SingleStepped,
    };
    let mut survey = Survey {
        entry: walk.site(first.offset, entry_cost),
        sites: Vec::new(),
        obstacle: None,
        tail_jump: None,
    };
    let mut limit = match lowest_branch_target(function) {
        Ok(limit) => limit,
        Err(obstacle) => {
            survey.obstacle = Some(obstacle);
            0
        }
    };
    if limit == 0 {
        survey.obstacle.get_or_insert(Fallback::BranchToEntry);
    }
    if first.offset > 0 && first.offset >= limit {
        return Err(Refusal::Rewritten);
    }

    let mut step = Some(first);
    for _ in 0..MAX_STEPS {
        let Some(current) = step else { break };
        if current.treatment == Treatment::Emulated {
            if current.offset < limit {
                survey.sites.push(walk.site(current.offset, Cost::Emulated));
            } else if survey.sites.is_empty() {
                survey.obstacle.get_or_insert(Fallback::BranchInto);
            }
        }
        if current.instruction.flow_control() != FlowControl::Next {
            if current.instruction.is_jmp_short_or_near() {
                survey.tail_jump = Some(TailJump {
                    target_svma: current.instruction.near_branch_target(),
                    passes: ARGUMENT_REGISTERS.map(|register| walk.holds[register]),
                });
            }
            break;
        }
        if !walk.run(&current.instruction) {
            break;
        }
        step = Step::decode(function, current.end());
        // A site must not come after what other threads can already act on.
        if current.instruction.has_lock_prefix() || current.instruction.mnemonic() == Mnemonic::Xchg
        {
            limit = 0;
        }
    }
    Ok(survey)
}

/// No instruction of the architecture is longer, in bytes.
pub const LONGEST_INSTRUCTION: usize = 15;

/// Whether the kernel takes a probe on the first instruction of this code, and no process comes to harm.
pub fn may_be_probed(code: &[u8]) -> bool {
    let function = FunctionCode { svma: 0, bytes: code, size_bytes: 0, cold: &[] };
    Step::decode(function, 0).is_some_and(|step| {
        matches!(step.treatment, Treatment::Emulated | Treatment::SingleStepped)
    })
}

struct Step {
    offset: u64,
    instruction: Instruction,
    treatment: Treatment,
}

impl Step {
    fn decode(function: FunctionCode<'_>, offset: u64) -> Option<Self> {
        let rest = function.bytes.get(usize::try_from(offset).ok()?..)?;
        let svma = function.svma.wrapping_add(offset);
        let mut decoder = Decoder::with_ip(64, rest, svma, DecoderOptions::NONE);
        let instruction = decoder.can_decode().then(|| decoder.decode())?;
        if instruction.is_invalid() {
            return None;
        }
        let treatment = kernel::treatment(rest.get(..instruction.len())?);
        Some(Self { offset, instruction, treatment })
    }

    /// Where the next one begins.
    fn end(&self) -> u64 {
        self.offset + self.instruction.len() as u64
    }
}

/// The smallest offset in the function that a direct branch leads to, from the function itself or
/// from its cold parts; `u64::MAX` if there is none.
fn lowest_branch_target(function: FunctionCode<'_>) -> Result<u64, Fallback> {
    if function.size_bytes == 0 {
        return Err(Fallback::SizeUnknown);
    }
    let body = usize::try_from(function.size_bytes)
        .ok()
        .filter(|_| function.size_bytes <= MAX_FUNCTION_BYTES)
        .and_then(|size| function.bytes.get(..size))
        .ok_or(Fallback::SizeImplausible)?;
    let mut lowest = u64::MAX;
    let parts = std::iter::once((function.svma, body)).chain(function.cold.iter().copied());
    for (svma, bytes) in parts {
        for instruction in &mut Decoder::with_ip(64, bytes, svma, DecoderOptions::NONE) {
            if instruction.is_invalid() {
                return Err(Fallback::Undecodable);
            }
            // Also `loop`, `jrcxz`, `xbegin`, and calls: a function may call itself.
            let target = match instruction.op0_kind() {
                OpKind::NearBranch64 if !instruction.is_call_near() => {
                    instruction.near_branch_target()
                }
                _ => continue,
            };
            let offset = target.wrapping_sub(function.svma);
            if offset < function.size_bytes {
                lowest = lowest.min(offset);
            }
        }
    }
    Ok(lowest)
}

/// What is known between two instructions.
struct Walk {
    /// By register: which argument it holds, all 64 bits of it.
    holds: [Option<u8>; 16],
    stack_distance: u16,
    info: InstructionInfoFactory,
}

impl Walk {
    fn new() -> Self {
        let mut holds = [None; 16];
        for (argument, register) in (0..).zip(ARGUMENT_REGISTERS) {
            holds[register] = Some(argument);
        }
        Self { holds, stack_distance: 0, info: InstructionInfoFactory::new() }
    }

    fn arguments(&self) -> Arguments {
        let mut arguments = [RegisterSlot::NONE; TRACKED_ARGUMENTS];
        for (argument, (home, slot)) in
            (0..).zip(ARGUMENT_REGISTERS.into_iter().zip(&mut arguments))
        {
            let register = if self.holds[home] == Some(argument) {
                Some(home)
            } else {
                self.holds.iter().position(|&held| held == Some(argument))
            };
            if let Some(register) = register {
                *slot = SLOTS[register];
            }
        }
        arguments
    }

    fn site(&self, offset: u64, cost: Cost) -> Site {
        Site { offset, stack_distance: self.stack_distance, arguments: self.arguments(), cost }
    }

    /// Takes the instruction's effects into account. False if the stack pointer is unknown after.
    fn run(&mut self, instruction: &Instruction) -> bool {
        let Some(distance) = distance_after(self.stack_distance, instruction) else {
            return false;
        };
        let copied = copied_argument(instruction, &self.holds);
        let info = self.info.info(instruction);
        let moved = distance != self.stack_distance;
        for used in info.used_registers() {
            if !writes(used.access()) {
                continue;
            }
            match general_index(used.register()) {
                // `push`, `sub` and the like, whose effect is known.
                Some(4) if moved => {}
                Some(4) => return false,
                // A shorter write leaves something else than the argument, too.
                Some(register) => self.holds[register] = None,
                None => {}
            }
        }
        if let Some((register, argument)) = copied {
            self.holds[register] = Some(argument);
        }
        self.stack_distance = distance;
        true
    }
}

/// A copy between 64-bit registers: destination, and the argument that is there after.
fn copied_argument(instruction: &Instruction, holds: &[Option<u8>; 16]) -> Option<(usize, u8)> {
    let is_copy = matches!(instruction.code(), Code::Mov_r64_rm64 | Code::Mov_rm64_r64)
        && instruction.op0_kind() == OpKind::Register
        && instruction.op1_kind() == OpKind::Register;
    let destination = general_index(instruction.op0_register()).filter(|_| is_copy)?;
    let source = general_index(instruction.op1_register())?;
    Some((destination, (*holds.get(source)?)?))
}

/// `None` when it cannot be told, or when the stack pointer rises above its value at entry.
fn distance_after(distance: u16, instruction: &Instruction) -> Option<u16> {
    let distance = i64::from(distance);
    let on_stack_pointer =
        instruction.op0_kind() == OpKind::Register && instruction.op0_register() == Register::RSP;
    let immediate = || instruction.try_immediate(1).ok().map(|immediate| immediate.cast_signed());
    let after = match instruction.mnemonic() {
        Mnemonic::Sub if on_stack_pointer => distance.checked_add(immediate()?)?,
        Mnemonic::Add if on_stack_pointer => distance.checked_sub(immediate()?)?,
        Mnemonic::Lea if on_stack_pointer => {
            let plain = instruction.memory_base() == Register::RSP
                && instruction.memory_index() == Register::None;
            let displacement = instruction.memory_displacement64().cast_signed();
            distance.checked_sub(plain.then_some(displacement)?)?
        }
        // `pop %rsp`: the stack pointer is what was popped.
        Mnemonic::Pop if on_stack_pointer => return None,
        _ => distance - i64::from(instruction.stack_pointer_increment()),
    };
    u16::try_from(after).ok()
}

fn writes(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

/// Index in [`SLOTS`] of the general register that this is a part of.
fn general_index(register: Register) -> Option<usize> {
    let full = register.full_register();
    full.is_gpr64().then(|| full.number())
}

#[cfg(test)]
#[path = "x86_64/tests.rs"]
mod tests;
