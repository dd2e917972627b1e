//! Where calls and jumps lead.

use std::collections::BTreeSet;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpKind, Register,
};

/// Most instructions that are looked at in one function; `operator new` has a dozen.
const MAX_INSTRUCTIONS: usize = 512;

/// The slot of the global offset table that an import stub (`.plt`, `.plt.sec`) jumps through.
pub fn import_slot(stub: &[u8], svma: u64) -> Option<u64> {
    let mut decoder = Decoder::with_ip(64, stub, svma, DecoderOptions::NONE);
    let mut next = || decoder.can_decode().then(|| decoder.decode());
    let mut instruction = next()?;
    if instruction.mnemonic() == Mnemonic::Endbr64 {
        instruction = next()?;
    }
    let is_stub = instruction.is_jmp_near_indirect() && instruction.is_ip_rel_memory_operand();
    is_stub.then(|| instruction.ip_rel_memory_address())
}

/// What a call or jump leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// The function that is looked for.
    Goal,
    /// Never comes back (`__cxa_throw`, `abort`).
    End,
    Other,
}

/// Whether every path from the entry at `svma` either calls or jumps to the goal, or ends without
/// returning, or (if `null_is_failure`) returns NULL. `code` gives the bytes from an address on.
pub fn every_path_reaches<'a>(
    svma: u64,
    code: &dyn Fn(u64) -> &'a [u8],
    destination: &dyn Fn(u64) -> Destination,
    null_is_failure: bool,
) -> bool {
    let mut visited = BTreeSet::new();
    let mut open = vec![svma];
    let mut reached = false;
    let mut info = InstructionInfoFactory::new();
    while let Some(start) = open.pop() {
        let mut returns_null = false;
        let mut decoder = Decoder::with_ip(64, code(start), start, DecoderOptions::NONE);
        loop {
            if !visited.insert(decoder.ip()) {
                break;
            }
            if visited.len() > MAX_INSTRUCTIONS || !decoder.can_decode() {
                return false;
            }
            let instruction = decoder.decode();
            returns_null =
                is_zeroed(&instruction) || returns_null && keeps_result(&instruction, &mut info);
            match instruction.flow_control() {
                FlowControl::Next | FlowControl::IndirectCall => {}
                FlowControl::Call => match direct_target(&instruction).map(destination) {
                    Some(Destination::Goal) => {
                        reached = true;
                        break;
                    }
                    Some(Destination::End) => break,
                    Some(Destination::Other) => {}
                    None => return false,
                },
                FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                    let Some(target) = direct_target(&instruction) else {
                        return false;
                    };
                    match destination(target) {
                        Destination::Goal => reached = true,
                        Destination::End => {}
                        Destination::Other => open.push(target),
                    }
                    if instruction.flow_control() == FlowControl::UnconditionalBranch {
                        break;
                    }
                }
                FlowControl::Return if returns_null && null_is_failure => break,
                // `ud2` after a call that does not return.
                FlowControl::Exception => break,
                _ => return false,
            }
        }
    }
    reached
}

/// Most instructions and return instructions of a function, with all that it ends in a jump to.
const MAX_EXIT_INSTRUCTIONS: usize = 4096;
const MAX_EXITS: usize = 32;

/// Where a jump out of a straight line goes on, as far as a function's own end is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Onward {
    /// More code of the same call.
    Code(u64),
    /// A function that is followed on its own.
    Elsewhere,
    /// Never comes back.
    Nowhere,
    Unknown,
}

/// The return instructions that a call of the function at `svma` can end with, also those of the
/// functions that it ends in a jump to. None when they cannot all be known. A call that never
/// returns without being known to may add some of the next function's, which do no harm: a return
/// is told by its stack pointer.
pub fn exits<'a>(
    svma: u64,
    code: &dyn Fn(u64) -> &'a [u8],
    onward: &dyn Fn(u64) -> Onward,
) -> Option<BTreeSet<u64>> {
    let mut visited = BTreeSet::new();
    let mut open = vec![svma];
    let mut exits = BTreeSet::new();
    while let Some(start) = open.pop() {
        let mut decoder = Decoder::with_ip(64, code(start), start, DecoderOptions::NONE);
        while visited.insert(decoder.ip()) {
            if visited.len() > MAX_EXIT_INSTRUCTIONS || !decoder.can_decode() {
                return None;
            }
            let instruction = decoder.decode();
            match instruction.flow_control() {
                FlowControl::Next | FlowControl::IndirectCall => {}
                FlowControl::Call => match direct_target(&instruction).map(onward) {
                    Some(Onward::Nowhere) => break,
                    Some(_) => {}
                    None => return None,
                },
                FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                    match direct_target(&instruction).map(onward) {
                        Some(Onward::Code(target)) => open.push(target),
                        Some(Onward::Elsewhere | Onward::Nowhere) => {}
                        Some(Onward::Unknown) | None => return None,
                    }
                    if instruction.flow_control() == FlowControl::UnconditionalBranch {
                        break;
                    }
                }
                FlowControl::Return => {
                    exits.insert(instruction.ip());
                    if exits.len() > MAX_EXITS {
                        return None;
                    }
                    break;
                }
                FlowControl::Exception => break,
                _ => return None,
            }
        }
    }
    (!exits.is_empty()).then_some(exits)
}

fn direct_target(instruction: &Instruction) -> Option<u64> {
    (instruction.op0_kind() == OpKind::NearBranch64).then(|| instruction.near_branch_target())
}

/// `xor %eax,%eax`.
fn is_zeroed(instruction: &Instruction) -> bool {
    matches!(instruction.code(), Code::Xor_r32_rm32 | Code::Xor_rm32_r32)
        && instruction.op0_register() == Register::EAX
        && instruction.op1_register() == Register::EAX
}

fn keeps_result(instruction: &Instruction, info: &mut InstructionInfoFactory) -> bool {
    !matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
        && info.info(instruction).used_registers().iter().all(|used| {
            used.register().full_register() != Register::RAX || !super::writes(used.access())
        })
}
