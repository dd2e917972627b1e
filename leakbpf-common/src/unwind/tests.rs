extern crate std;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

const STACK: u64 = 0x7fff_0000;

/// A stack of words from [`STACK`] on.
fn words(stack: &[u64]) -> impl Fn(u64) -> Option<u64> {
    move |address| {
        let into = address.checked_sub(STACK)?;
        assert_eq!(into % 8, 0, "words are aligned");
        stack.get((into / 8) as usize).copied()
    }
}

fn at(sp: u64, bp: u64) -> Registers {
    Registers { ip: 0x1000, sp, bp, after_call: 1 }
}

fn caller(ip: u64, sp: u64, bp: u64) -> Step {
    Step::Frame(Registers { ip, sp, bp, after_call: 1 })
}

#[test]
fn at_a_functions_entry_the_return_address_is_the_top_word() {
    let registers = Registers { after_call: 0, ..at(STACK, 7) };
    assert_eq!(registers.lookup_ip(), 0x1000);
    assert_eq!(step(&Rule::ENTRY, &registers, words(&[0x2000])), caller(0x2000, STACK + 8, 7));
}

#[test]
fn a_frame_relative_to_the_stack_pointer_restores_the_saved_frame_pointer() {
    let rule = Rule { cfa: cfa::SP, bp: bp::AT_CFA, a: 24, bp_offset: -16, ..Rule::default() };
    let stack = [1, 0xb0, 0x2000];
    assert_eq!(step(&rule, &at(STACK, 5), words(&stack)), caller(0x2000, STACK + 24, 0xb0));
}

#[test]
fn a_frame_relative_to_the_frame_pointer_ignores_what_alloca_did() {
    let rule = Rule { cfa: cfa::BP, bp: bp::AT_CFA, a: 16, bp_offset: -16, ..Rule::default() };
    let stack = [1, 2, 3, 0xb0, 0x2000];
    assert_eq!(
        step(&rule, &at(STACK, STACK + 24), words(&stack)),
        caller(0x2000, STACK + 40, 0xb0)
    );
}

#[test]
fn a_realigned_frame_finds_its_address_and_frame_pointer_through_the_frame_pointer() {
    // -8(%rbp) holds the frame address, (%rbp) the caller's frame pointer.
    let rule = Rule { cfa: cfa::AT_BP, bp: bp::AT_BP, a: -8, ..Rule::default() };
    let stack = [STACK + 56, 0xb0, 0, 0, 0, 0, 0x2000];
    assert_eq!(step(&rule, &at(STACK, STACK + 8), words(&stack)), caller(0x2000, STACK + 56, 0xb0));
}

#[test]
fn a_frame_address_stored_at_the_stack_pointer_is_read_there() {
    let rule = Rule { cfa: cfa::AT_SP, a: 8, b: 16, ..Rule::default() };
    let stack = [0, STACK + 8, 0x2000];
    assert_eq!(step(&rule, &at(STACK, 5), words(&stack)), caller(0x2000, STACK + 24, 5));
}

#[test]
fn a_plt_entry_counts_the_word_that_it_has_pushed() {
    let rule = Rule { cfa: cfa::PLT, a: 8, b: 11, ..Rule::default() };
    let stack = [0x2000, 0x3000];
    for (byte, expected) in [(0, (0x2000, 8)), (10, (0x2000, 8)), (11, (0x3000, 16))] {
        let registers = Registers { ip: 0x1000 + byte, ..at(STACK, 5) };
        let (ip, bytes) = expected;
        assert_eq!(step(&rule, &registers, words(&stack)), caller(ip, STACK + bytes, 5));
    }
}

#[test]
fn the_frame_below_a_signal_is_exact_and_may_be_on_another_stack() {
    let mut stack = [0; 22];
    (stack[15], stack[20], stack[21]) = (0xb0, 0x100, 0x2000);
    let expected = Registers { ip: 0x2000, sp: 0x100, bp: 0xb0, after_call: 0 };
    assert_eq!(step(&Rule::SIGNAL, &at(STACK, 5), words(&stack)), Step::Frame(expected));
    assert_eq!(expected.lookup_ip(), 0x2000);
}

#[test]
fn code_without_rows_is_walked_by_its_frame_pointer() {
    let stack = [0, 0xb0, 0x2000];
    let registers = at(STACK, STACK + 8);
    assert_eq!(
        step(&Rule::FRAME_POINTER, &registers, words(&stack)),
        caller(0x2000, STACK + 24, 0xb0)
    );
}

#[test]
fn a_frame_pointer_off_the_stack_stops_the_walk() {
    for bp in [STACK - 8, STACK + 1, STACK + FRAME_POINTER_REACH_BYTES + 8, 1, u64::MAX] {
        assert_eq!(
            step(&Rule::FRAME_POINTER, &at(STACK, bp), words(&[])),
            Step::Stop(Outcome::NoFramePointer)
        );
    }
}

#[test]
fn the_walk_ends_at_the_first_frame() {
    let none = words(&[]);
    assert_eq!(step(&Rule::END, &at(STACK, 5), &none), Step::End);
    assert_eq!(step(&Rule::FRAME_POINTER, &at(STACK, 0), &none), Step::End);
    assert_eq!(step(&Rule::ENTRY, &at(STACK, 5), words(&[0])), Step::End);
}

#[test]
fn a_frame_pointer_that_nobody_saved_is_not_used() {
    let lost = Rule { bp: bp::UNKNOWN, ..Rule::ENTRY };
    let Step::Frame(registers) = step(&lost, &at(STACK, STACK), words(&[0x2000, 0, 0])) else {
        panic!("the frame itself is known");
    };
    for kind in [cfa::FRAME_POINTER, cfa::BP, cfa::AT_BP] {
        let rule = Rule { cfa: kind, a: 16, ..Rule::default() };
        let next = step(&rule, &registers, words(&[0, 0, 0]));
        assert!(matches!(next, Step::Stop(_)), "{kind}: {next:?}");
    }
}

#[test]
fn a_saved_frame_pointer_that_cannot_be_read_costs_only_those_who_need_it() {
    let rule = Rule { bp: bp::AT_BP, ..Rule::ENTRY };
    let Step::Frame(registers) = step(&rule, &at(STACK, 0), words(&[0x2000, 0x3000])) else {
        panic!("the frame itself is known");
    };
    assert_eq!(registers.ip, 0x2000);
    assert!(matches!(step(&Rule::ENTRY, &registers, words(&[0, 0x3000])), Step::Frame(_)));
    let needs_it = Rule { cfa: cfa::BP, a: 16, ..Rule::default() };
    assert!(matches!(step(&needs_it, &registers, words(&[0, 0x3000])), Step::Stop(_)));
}

#[test]
fn a_frame_that_does_not_grow_stops_the_walk() {
    let rule = Rule { a: 0, ..Rule::ENTRY };
    assert_eq!(step(&rule, &at(STACK, 5), words(&[0x2000])), Step::Stop(Outcome::StackNotGrowing));
}

#[test]
fn what_cannot_be_read_or_followed_is_said() {
    let none = words(&[]);
    assert_eq!(step(&Rule::ENTRY, &at(STACK, 5), &none), Step::Stop(Outcome::Unreadable));
    assert_eq!(step(&Rule::SIGNAL, &at(STACK, 5), &none), Step::Stop(Outcome::Unreadable));
    assert_eq!(
        step(&Rule::UNSUPPORTED, &at(STACK, 5), &none),
        Step::Stop(Outcome::UnsupportedRule)
    );
    let unknown = Rule { cfa: 200, ..Rule::default() };
    assert_eq!(step(&unknown, &at(STACK, 5), &none), Step::Stop(Outcome::UnsupportedRule));
}

#[test]
fn a_row_that_cannot_be_read_is_told_from_a_missing_one() {
    let page = Page::new(0, 2);
    assert_eq!(find_rule(page, 5, |_| None), None);
    assert_eq!(find_rule(Page::default(), 5, |_| None), Some(FRAME_POINTER_RULE));
}

proptest! {
    #[test]
    fn the_row_that_holds_is_found_in_a_full_page(
        pcs in proptest::collection::btree_set(0u32..257, 0..=257),
        pc in 0u32..257,
        first in 0u32..1000,
    ) {
        let rows: Vec<Row> = pcs.iter().map(|&pc| Row { pc, rule: pc + 1 }).collect();
        let page = Page::new(first, first + rows.len() as u32);
        let found = find_rule(page, pc, |index| rows.get((index - first) as usize).copied());
        let expected = pcs.range(..=pc).next_back().map_or(FRAME_POINTER_RULE, |pc| pc + 1);
        prop_assert_eq!(found, Some(expected));
    }

    #[test]
    fn no_rule_and_no_stack_make_a_step_panic(
        (cfa, bp, a, b, bp_offset) in (0u8..12, 0u8..5, any::<i32>(), any::<i32>(), any::<i32>()),
        (ip, sp, bp_register, word) in any::<(u64, u64, u64, u64)>(),
    ) {
        let rule = Rule { cfa, bp, pad: 0, a, b, bp_offset };
        let registers = Registers { ip, sp, bp: bp_register, after_call: 1 };
        if let Step::Frame(next) = step(&rule, &registers, |address| Some(word ^ address)) {
            prop_assert!(next.sp > sp || cfa == cfa::SIGNAL);
        }
    }
}
