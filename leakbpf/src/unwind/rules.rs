//! What a row of call frame information means for rsp, rbp and the return address.

use std::collections::HashMap;

use gimli::{
    CfaRule, Encoding, EndianSlice, LittleEndian, Operation, Register, RegisterRule,
    UnwindExpression, UnwindSection, UnwindTableRow, X86_64,
};
use leakbpf_common::unwind::{Rule, bp, cfa};

use super::functions::Storage;

type Reader<'data> = EndianSlice<'data, LittleEndian>;

/// The longest expression that is recognised, the PLT's, has this many operations.
const EXPRESSION_MAX: usize = 8;

/// Bytes from the stack pointer to the interrupted rip in a signal's frame.
const SIGNAL_RIP_OFFSET: i64 = 168;

/// Each rule once; [`Rule::FRAME_POINTER`] comes first.
#[derive(Debug)]
pub(super) struct Dictionary {
    rules: Vec<Rule>,
    indices: HashMap<Rule, u32>,
    last: (Rule, u32),
}

impl Dictionary {
    pub fn new() -> Self {
        let first = (Rule::FRAME_POINTER, 0);
        Self { rules: vec![first.0], indices: HashMap::from([first]), last: first }
    }

    pub fn index(&mut self, rule: Rule) -> u32 {
        if self.last.0 != rule {
            let next = self.rules.len() as u32;
            let index = *self.indices.entry(rule).or_insert(next);
            if index == next {
                self.rules.push(rule);
            }
            self.last = (rule, index);
        }
        self.last.1
    }

    pub fn len(&self) -> usize {
        self.rules.len()
    }

    pub fn into_rules(self) -> Vec<Rule> {
        self.rules
    }
}

/// The rule that a row states.
pub(super) fn rule<'data, S: UnwindSection<Reader<'data>>>(
    section: &S,
    encoding: Encoding,
    row: &UnwindTableRow<usize, Storage>,
) -> Rule {
    match row.register(X86_64::RA) {
        Some(RegisterRule::Undefined) => return Rule::END,
        // The C library's `__restore_rt`: the kernel's signal frame, register by register.
        Some(RegisterRule::Expression(expression)) => {
            let ops = operations(section, encoding, &expression);
            return match ops.as_slice() {
                [Op::Register(X86_64::RSP, SIGNAL_RIP_OFFSET)] => Rule::SIGNAL,
                _ => Rule::UNSUPPORTED,
            };
        }
        Some(RegisterRule::Offset(-8)) => {}
        _ => return Rule::UNSUPPORTED,
    }
    let frame = match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => by_register(*register, *offset),
        CfaRule::Expression(expression) => {
            by_expression(&operations(section, encoding, expression))
        }
    };
    let Some(mut rule) = frame else {
        return Rule::UNSUPPORTED;
    };
    let saved = match row.register(X86_64::RBP) {
        // rbp is the callee's to preserve: what no row mentions is untouched.
        None | Some(RegisterRule::SameValue) => Some((bp::SAME, 0)),
        Some(RegisterRule::Offset(offset)) => Some((bp::AT_CFA, offset)),
        Some(RegisterRule::Expression(expression)) => {
            match operations(section, encoding, &expression).as_slice() {
                [Op::Register(X86_64::RBP, offset)] => Some((bp::AT_BP, *offset)),
                _ => None,
            }
        }
        _ => None,
    };
    let saved = saved.and_then(|(kind, offset)| Some((kind, i32::try_from(offset).ok()?)));
    (rule.bp, rule.bp_offset) = saved.unwrap_or((bp::UNKNOWN, 0));
    rule
}

fn by_register(register: Register, offset: i64) -> Option<Rule> {
    let kind = match register {
        X86_64::RSP => cfa::SP,
        X86_64::RBP => cfa::BP,
        _ => return None,
    };
    Some(Rule { cfa: kind, a: i32::try_from(offset).ok()?, ..Rule::default() })
}

fn by_expression(operations: &[Op]) -> Option<Rule> {
    match *operations {
        [Op::Register(register, offset)] => by_register(register, offset),
        [Op::Register(register, offset), Op::Deref] => stored(register, offset, 0),
        [Op::Register(register, offset), Op::Deref, Op::Add(b)] => stored(register, offset, b),
        // GNU ld, elf_x86_64_eh_frame_lazy_plt in bfd/elfxx-x86.c.
        [
            Op::Register(X86_64::RSP, a),
            Op::Register(X86_64::RA, 0),
            Op::Constant(15),
            Op::And,
            Op::Constant(b @ 0..=15),
            Op::AtLeast,
            Op::Constant(3),
            Op::ShiftLeftAdd,
        ] => Some(Rule {
            cfa: cfa::PLT,
            a: i32::try_from(a).ok()?,
            b: i32::try_from(b).ok()?,
            ..Rule::default()
        }),
        _ => None,
    }
}

fn stored(register: Register, a: i64, b: i64) -> Option<Rule> {
    let kind = match register {
        X86_64::RSP => cfa::AT_SP,
        X86_64::RBP => cfa::AT_BP,
        _ => return None,
    };
    Some(Rule {
        cfa: kind,
        a: i32::try_from(a).ok()?,
        b: i32::try_from(b).ok()?,
        ..Rule::default()
    })
}

/// The few DWARF operations that real frame expressions are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    /// Register plus offset.
    Register(Register, i64),
    Deref,
    Add(i64),
    Constant(u64),
    And,
    AtLeast,
    /// `DW_OP_shl, DW_OP_plus`.
    ShiftLeftAdd,
}

/// The operations of an expression; none when it has others, or too many.
fn operations<'data, S: UnwindSection<Reader<'data>>>(
    section: &S,
    encoding: Encoding,
    expression: &UnwindExpression<usize>,
) -> Vec<Op> {
    recognised(section, encoding, expression).unwrap_or_default()
}

fn recognised<'data, S: UnwindSection<Reader<'data>>>(
    section: &S,
    encoding: Encoding,
    expression: &UnwindExpression<usize>,
) -> Option<Vec<Op>> {
    let mut iterator = expression.get(section).ok()?.operations(encoding);
    let mut found = Vec::new();
    while let Some(operation) = iterator.next().ok()? {
        let op = match operation {
            Operation::RegisterOffset { register, offset, base_type } if base_type.0 == 0 => {
                Op::Register(register, offset)
            }
            Operation::Deref { size: 8, space: false, base_type } if base_type.0 == 0 => Op::Deref,
            Operation::PlusConstant { value } => Op::Add(i64::try_from(value).ok()?),
            Operation::UnsignedConstant { value } => Op::Constant(value),
            Operation::And => Op::And,
            Operation::Ge => Op::AtLeast,
            Operation::Shl => {
                matches!(iterator.next(), Ok(Some(Operation::Plus))).then_some(Op::ShiftLeftAdd)?
            }
            _ => return None,
        };
        if found.len() == EXPRESSION_MAX {
            return None;
        }
        found.push(op);
    }
    Some(found)
}
