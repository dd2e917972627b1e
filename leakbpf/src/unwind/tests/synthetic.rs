//! Call frame programs made to measure, and the rows that must come of them.

use gimli::{
    Register, X86_64,
    write::{CallFrameInstruction as Cfi, Expression},
};
use leakbpf_common::unwind::{Rule, bp, cfa};
use proptest::prelude::*;

use super::assert_sound;
use super::fixture::{CODE, CODE_BYTES, Function, eh_frame, elf, elf_of_code, table, usual};
use crate::unwind::{Origin, Table};

fn sp(a: i32) -> Rule {
    Rule { cfa: cfa::SP, a, ..Rule::default() }
}

/// `register + offset`, or what is stored there.
fn location(register: Register, offset: i64, deref: bool) -> Expression {
    let mut expression = Expression::new();
    expression.op_breg(register, offset);
    if deref {
        expression.op_deref();
    }
    expression
}

/// The rule of a function that consists of one row.
fn rule_of(instructions: Vec<Cfi>) -> Rule {
    let instructions = instructions.into_iter().map(|instruction| (0, instruction)).collect();
    table(vec![(CODE, 32, instructions)]).rule(CODE + 8)
}

#[test]
fn a_function_that_saves_rbp_and_makes_room_has_a_row_for_each_step() {
    let table = table(vec![(
        CODE,
        0x40,
        vec![
            (1, Cfi::CfaOffset(16)),
            (1, Cfi::Offset(X86_64::RBP, -16)),
            (8, Cfi::CfaOffset(500_016)),
            (0x3f, Cfi::CfaOffset(8)),
            (0x3f, Cfi::SameValue(X86_64::RBP)),
        ],
    )]);
    let saved = |a| Rule { bp: bp::AT_CFA, bp_offset: -16, ..sp(a) };
    assert_eq!(table.stats.origins, [Origin::EhFrameSegment]);
    assert_eq!(table.base_svma, CODE);
    for (offset, rule) in [
        (0, sp(8)),
        (1, saved(16)),
        (7, saved(16)),
        (8, saved(500_016)),
        (0x3e, saved(500_016)),
        (0x3f, sp(8)),
        (0x40, Rule::FRAME_POINTER),
    ] {
        assert_eq!(table.rule(CODE + offset), rule, "at {offset:#x}");
    }
    assert_eq!(table.rule(CODE - 1), Rule::FRAME_POINTER);
    assert_eq!(table.rule(u64::MAX), Rule::FRAME_POINTER);
}

#[test]
fn neighbours_with_one_rule_and_padding_between_them_are_one_row() {
    let leaf = |start, length| (CODE + start, length, vec![]);
    let table = table(vec![leaf(0, 0x11), leaf(0x20, 0x10), leaf(0x40, 0x10)]);
    let rows: Vec<_> = table.rows.iter().map(|row| row.pc).collect();
    assert_eq!(rows, [0, 0x30, 0x40, 0x50], "15 bytes are padding, 16 are code without rows");
    assert_eq!(table.rule(CODE + 0x1f), sp(8));
    assert_eq!(table.rule(CODE + 0x30), Rule::FRAME_POINTER);
}

#[test]
fn functions_may_come_in_any_order_and_the_first_to_begin_wins() {
    let table = table(vec![
        (CODE + 0x80, 0x20, vec![(0, Cfi::CfaOffset(32))]),
        (CODE, 0x20, vec![(0, Cfi::CfaOffset(16))]),
        (CODE + 0x10, 0x20, vec![(0, Cfi::CfaOffset(24))]),
        (CODE + 0x18, 4, vec![(0, Cfi::CfaOffset(48))]),
        (CODE + 0x80, 0x10, vec![(0, Cfi::CfaOffset(40))]),
    ]);
    for (offset, rule) in [
        (0, sp(16)),
        (0x1f, sp(16)),
        (0x20, sp(24)),
        (0x2f, sp(24)),
        (0x80, sp(32)),
        (0x8f, sp(32)),
    ] {
        assert_eq!(table.rule(CODE + offset), rule, "at {offset:#x}");
    }
    assert_eq!(table.stats.overlapping, 3);
}

#[test]
fn a_frame_may_hang_on_rbp() {
    assert_eq!(
        rule_of(vec![Cfi::Cfa(X86_64::RBP, 16), Cfi::Offset(X86_64::RBP, -16)]),
        Rule { cfa: cfa::BP, a: 16, bp: bp::AT_CFA, bp_offset: -16, ..Rule::default() }
    );
}

#[test]
fn a_realigned_frame_has_its_address_and_rbp_in_memory() {
    let instructions = vec![
        Cfi::CfaExpression(location(X86_64::RBP, -16, true)),
        Cfi::Expression(X86_64::RBP, location(X86_64::RBP, 0, false)),
    ];
    assert_eq!(
        rule_of(instructions),
        Rule { cfa: cfa::AT_BP, a: -16, bp: bp::AT_BP, ..Rule::default() }
    );
    let mut stored = location(X86_64::RSP, 40, true);
    stored.op_plus_uconst(8);
    assert_eq!(
        rule_of(vec![Cfi::CfaExpression(stored)]),
        Rule { cfa: cfa::AT_SP, a: 40, b: 8, ..Rule::default() }
    );
}

#[test]
fn a_lazy_plt_entry_is_recognised_with_and_without_endbr64() {
    for threshold in [11, 9] {
        let mut plt = Expression::new();
        plt.op_breg(X86_64::RSP, 8);
        plt.op_breg(X86_64::RA, 0);
        plt.op_constu(15);
        plt.op(gimli::DW_OP_and);
        plt.op_constu(threshold as u64);
        plt.op(gimli::DW_OP_ge);
        plt.op_constu(3);
        plt.op(gimli::DW_OP_shl);
        plt.op(gimli::DW_OP_plus);
        assert_eq!(
            rule_of(vec![Cfi::CfaExpression(plt)]),
            Rule { cfa: cfa::PLT, a: 8, b: threshold, ..Rule::default() }
        );
    }
}

#[test]
fn an_undefined_return_address_is_the_end_of_the_stack() {
    assert_eq!(rule_of(vec![Cfi::Undefined(X86_64::RA)]), Rule::END);
}

#[test]
fn a_return_address_in_the_kernels_signal_frame_is_recognised() {
    let rip = location(X86_64::RSP, 168, false);
    assert_eq!(rule_of(vec![Cfi::Expression(X86_64::RA, rip)]), Rule::SIGNAL);
    let elsewhere = location(X86_64::RSP, 176, false);
    assert_eq!(rule_of(vec![Cfi::Expression(X86_64::RA, elsewhere)]), Rule::UNSUPPORTED);
}

#[test]
fn what_is_not_followed_is_said_and_counted() {
    let unsupported: [Vec<Cfi>; 6] = [
        vec![Cfi::Cfa(X86_64::R10, 0)],
        vec![Cfi::CfaExpression(location(X86_64::RBX, 0, true))],
        vec![Cfi::CfaExpression(Expression::new())],
        vec![Cfi::Register(X86_64::RA, X86_64::RDI)],
        vec![Cfi::Offset(X86_64::RA, -16)],
        vec![Cfi::SameValue(X86_64::RA)],
    ];
    for instructions in unsupported {
        let name = format!("{instructions:?}");
        assert_eq!(rule_of(instructions), Rule::UNSUPPORTED, "{name}");
    }
    let table = table(vec![(CODE, 32, vec![(4, Cfi::Cfa(X86_64::R10, 0))])]);
    assert_eq!(table.stats.unsupported_rows, 1);
    let lost = Rule { bp: bp::UNKNOWN, ..sp(8) };
    assert_eq!(rule_of(vec![Cfi::Undefined(X86_64::RBP)]), lost);
    assert_eq!(rule_of(vec![Cfi::Register(X86_64::RBP, X86_64::RAX)]), lost);
}

#[test]
fn a_broken_program_costs_the_rest_of_its_function_alone() {
    let table = table(vec![
        (CODE, 0x20, vec![(4, Cfi::CfaOffset(16)), (8, Cfi::RestoreState)]),
        (CODE + 0x20, 0x20, vec![]),
    ]);
    assert_eq!(table.rule(CODE), sp(8));
    assert_eq!(table.rule(CODE + 4), sp(16));
    assert_eq!(table.rule(CODE + 8), Rule::UNSUPPORTED);
    assert_eq!(table.rule(CODE + 0x20), sp(8));
    assert_eq!(table.stats.damaged_entries, 1);
}

#[test]
fn functions_outside_of_code_are_left_out() {
    let table = table(vec![
        (0, 0x20, vec![]),
        (CODE + CODE_BYTES, 0x20, vec![]),
        (u64::MAX - 4, 0x20, vec![]),
        (CODE + 0x10, 0, vec![]),
        (CODE + CODE_BYTES - 0x10, 0x20, vec![]),
    ]);
    assert_eq!((table.stats.outside_code, table.stats.functions), (4, 1));
    assert_eq!(table.rule(CODE + CODE_BYTES - 1), sp(8));
    assert_eq!(table.rows.last().map(|row| u64::from(row.pc)), Some(CODE_BYTES));
}

#[test]
fn a_signal_return_without_rows_is_found_by_its_code() {
    let mut code = vec![0x90; CODE_BYTES as usize];
    let sigreturn = [0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05];
    code[0x123..0x12c].copy_from_slice(&sigreturn);
    // Inside of a function with rows it is something else.
    code[0x20..0x29].copy_from_slice(&sigreturn);
    let frames = eh_frame(usual(), vec![(CODE, 0x80, vec![])]);
    let table = Table::of_bytes(&elf_of_code(&code, &frames)).unwrap();
    assert_sound(&table);
    assert_eq!(table.rule(CODE + 0x20), sp(8));
    assert_eq!(table.rule(CODE + 0x121), Rule::FRAME_POINTER);
    for offset in [0x122, 0x123, 0x12b] {
        assert_eq!(table.rule(CODE + offset), Rule::SIGNAL, "at {offset:#x}");
    }
    assert_eq!(table.rule(CODE + 0x12c), Rule::FRAME_POINTER);
}

#[test]
fn a_file_without_call_frame_information_has_an_empty_table() {
    let table = Table::of_bytes(&elf(&[0; 4])).unwrap();
    assert_sound(&table);
    assert_eq!((table.rows.len(), table.pages.len()), (0, 0));
    assert_eq!(table.rule(CODE), Rule::FRAME_POINTER);
}

/// One function: where it begins, its length, and the CFA offset from each of its bytes on.
fn functions() -> impl Strategy<Value = Vec<Function>> {
    let steps = proptest::collection::btree_map(0u32..80, (1i32..6).prop_map(|n| n * 8), 0..6);
    let function = (0u64..1500, 1u32..80, steps).prop_map(|(start, length, steps)| {
        let steps = steps.into_iter().filter(|step| step.0 < length);
        let steps = steps.map(|(offset, cfa)| (offset, Cfi::CfaOffset(cfa))).collect();
        (CODE + start, length, steps)
    });
    proptest::collection::vec(function, 0..30)
}

proptest! {
    #[test]
    fn the_rule_of_each_byte_is_what_a_map_of_bytes_says(functions in functions()) {
        let table = table(functions.clone());
        let mut sorted = functions;
        sorted.sort_by_key(|function| function.0);
        let mut bytes = vec![None; 2000];
        let mut covered = 0;
        for (start, length, steps) in sorted {
            let mut offset_at = 8;
            for into in 0..length {
                for step in &steps {
                    if let (at, Cfi::CfaOffset(offset)) = step && *at == into {
                        offset_at = *offset;
                    }
                }
                let at = (start - CODE) as usize + into as usize;
                if at >= covered {
                    bytes[at] = Some(sp(offset_at));
                }
            }
            covered = covered.max((start - CODE) as usize + length as usize);
        }
        // Up to 15 bytes of padding between functions belong to the one before.
        let mut gap = None;
        for at in 0..bytes.len() {
            match (gap, bytes[at]) {
                (None, None) if at > 0 && bytes[at - 1].is_some() => gap = Some(at),
                (Some(from), Some(_)) => {
                    if at - from < 16 {
                        let before: Option<Rule> = bytes[from - 1];
                        bytes[from..at].fill(before);
                    }
                    gap = None;
                }
                _ => {}
            }
        }
        for (at, expected) in bytes.iter().enumerate() {
            let expected = expected.unwrap_or(Rule::FRAME_POINTER);
            prop_assert_eq!(table.rule(CODE + at as u64), expected, "at {:#x}", at);
        }
    }
}
