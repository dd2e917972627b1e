//! Hand-written functions, each with a trap. The comments are their disassembly.

use leakbpf_common::abi::RegisterSlot;
use proptest::prelude::*;

use super::super::{Plan, Site};
use super::*;

const RBX: RegisterSlot = RegisterSlot(5);
const RSI: RegisterSlot = RegisterSlot(13);
const RDI: RegisterSlot = RegisterSlot(14);

const SVMA: u64 = 0x1000;

fn function(bytes: &[u8]) -> FunctionCode<'_> {
    FunctionCode { svma: SVMA, bytes, size_bytes: bytes.len() as u64, cold: &[] }
}

/// As for `malloc`: argument 0, and a return probe.
fn malloc_plan(bytes: &[u8]) -> Plan {
    survey(function(bytes)).expect("can be probed").plan(&[0], true)
}

/// As for `free`: argument 0, no return probe.
fn free_plan(bytes: &[u8]) -> Plan {
    survey(function(bytes)).expect("can be probed").plan(&[0], false)
}

fn assert_at_entry(plan: Plan, cost: Cost, fallback: Fallback) {
    assert_eq!((plan.enter.offset, plan.enter.cost), (0, cost));
    assert_eq!(plan.enter.arguments.map(|slot| slot.0), [14, 13, 12, 11, 9, 8]);
    assert_eq!(plan.fallback, Some(fallback));
}

#[test]
fn a_push_at_the_entry_serves_both_probes() {
    let plan = malloc_plan(&[
        0x55, // push %rbp
        0xc3, // ret
    ]);
    assert_eq!(plan.leave, Some(plan.enter));
    assert_eq!((plan.enter.offset, plan.cost(), plan.fallback), (0, Cost::Emulated, None));
    assert_eq!(plan.to_string(), "+0x0, emulated");
}

#[test]
fn the_first_conditional_jump_is_taken_when_the_entry_would_be_single_stepped() {
    let plan = free_plan(&[
        0x48, 0x85, 0xff, // test %rdi,%rdi
        0x74, 0x01, // je 6
        0x53, // push %rbx
        0xc3, // ret
    ]);
    assert_eq!((plan.enter.offset, plan.enter.arguments[0]), (3, RDI));
    assert_eq!((plan.leave, plan.cost()), (None, Cost::Emulated));
}

#[test]
fn endbr64_is_stepped_over() {
    let plan = malloc_plan(&[
        0xf3, 0x0f, 0x1e, 0xfa, // endbr64
        0x41, 0x54, // push %r12
        0xc3, // ret
    ]);
    assert_eq!((plan.enter.offset, plan.leave.map(|leave| leave.offset)), (4, Some(4)));
}

#[test]
fn a_branch_back_to_the_entry_is_reported() {
    let code = [
        0x53, // push %rbx
        0xff, 0xcf, // dec %edi
        0x75, 0xfb, // jne 0
        0xc3, // ret
    ];
    assert_at_entry(malloc_plan(&code), Cost::Emulated, Fallback::BranchToEntry);
}

#[test]
fn a_site_that_a_branch_leads_to_is_not_taken() {
    let code = [
        0x48, 0x83, 0xff, 0x00, // cmp $0,%rdi
        0x53, // push %rbx
        0x48, 0xff, 0xcf, // dec %rdi
        0x75, 0xfa, // jne 4
        0x5b, // pop %rbx
        0xc3, // ret
    ];
    assert_at_entry(malloc_plan(&code), Cost::SingleStepped, Fallback::BranchInto);
}

#[test]
fn a_branch_from_a_cold_part_counts_as_well() {
    let code = [
        0x48, 0x83, 0xff, 0x00, // cmp $0,%rdi
        0x74, 0x7a, // je cold
        0xc3, // ret
    ];
    assert_eq!(free_plan(&code).enter.offset, 4);
    let cold = [
        0xe9, 0x7f, 0xff, 0xff, 0xff, // jmp 4
    ];
    let cold: [(u64, &[u8]); 1] = [(SVMA + 0x80, &cold)];
    let survey = survey(FunctionCode { cold: &cold, ..function(&code) }).expect("probable");
    assert_at_entry(survey.plan(&[0], false), Cost::SingleStepped, Fallback::BranchInto);
}

#[test]
fn an_argument_that_is_overwritten_is_gone() {
    let code = [
        0xbf, 0x00, 0x00, 0x00, 0x00, // mov $0,%edi
        0x53, // push %rbx
        0xc3, // ret
    ];
    assert_at_entry(free_plan(&code), Cost::SingleStepped, Fallback::ArgumentsLost);
    // A return probe alone could have the push, but the size needs the entry: one trap for both.
    assert_at_entry(malloc_plan(&code), Cost::SingleStepped, Fallback::ArgumentsLost);
}

#[test]
fn an_argument_is_followed_through_64_bit_moves_only() {
    let moved = free_plan(&[
        0x48, 0x89, 0xfe, // mov %rdi,%rsi
        0x48, 0x89, 0xf3, // mov %rsi,%rbx
        0x31, 0xff, // xor %edi,%edi
        0x40, 0xb6, 0x01, // mov $1,%sil
        0x55, // push %rbp
        0xc3, // ret
    ]);
    assert_eq!((moved.enter.offset, moved.enter.arguments[0]), (11, RBX));
    let halved = [
        0x89, 0xfe, // mov %edi,%esi
        0x31, 0xff, // xor %edi,%edi
        0x53, // push %rbx
        0xc3, // ret
    ];
    assert_at_entry(free_plan(&halved), Cost::SingleStepped, Fallback::ArgumentsLost);
}

#[test]
fn exchanged_and_popped_registers_hold_no_argument() {
    let code = [
        0x6a, 0x00, // push $0
        0x5f, // pop %rdi
        0x53, // push %rbx
        0xc3, // ret
    ];
    assert_at_entry(free_plan(&code), Cost::SingleStepped, Fallback::ArgumentsLost);
}

#[test]
fn mimalloc_moves_its_size_before_the_first_branch() {
    let plan = malloc_plan(&[
        0x48, 0x8b, 0x05, 0x49, 0xb4, 0x00, 0x00, // mov 0xb449(%rip),%rax
        0x48, 0x89, 0xfe, // mov %rdi,%rsi
        0x64, 0x48, 0x8b, 0x38, // mov %fs:(%rax),%rdi
        0x48, 0x81, 0xfe, 0x00, 0x04, 0x00, 0x00, // cmp $0x400,%rsi
        0x77, 0x01, // ja 24
        0xc3, // ret
        0xc3, // ret
    ]);
    assert_eq!((plan.enter.offset, plan.enter.arguments[0]), (0x15, RSI));
    assert_eq!(plan.leave, Some(plan.enter));
}

#[test]
fn a_moved_stack_pointer_leaves_the_entry_to_the_return_probe() {
    let code = [
        0x48, 0x83, 0xec, 0x18, // sub $0x18,%rsp
        0x48, 0x8d, 0x64, 0x24, 0x08, // lea 8(%rsp),%rsp
        0x48, 0x85, 0xff, // test %rdi,%rdi
        0x74, 0x00, // je 14
        0xc3, // ret
    ];
    assert_at_entry(malloc_plan(&code), Cost::SingleStepped, Fallback::StackMoved);
    let free = free_plan(&code).enter;
    assert_eq!((free.offset, free.stack_distance), (12, 0x10));
    // The same with `push $imm`, which the kernel does not emulate.
    let pushed = [
        0x6a, 0x00, // push $0
        0x48, 0x85, 0xff, // test %rdi,%rdi
        0x74, 0x00, // je 7
        0x58, // pop %rax
        0xc3, // ret
    ];
    assert_at_entry(malloc_plan(&pushed), Cost::SingleStepped, Fallback::StackMoved);
    assert_eq!(free_plan(&pushed).enter.stack_distance, 8);
}

#[test]
fn an_unknown_stack_pointer_ends_the_walk() {
    for realign in [
        &[0x48, 0x83, 0xe4, 0xf0][..], // and $-16,%rsp
        &[0x48, 0x89, 0xec],           // mov %rbp,%rsp
        &[0x5c],                       // pop %rsp
        &[0xc9],                       // leave
        &[0x58],                       // pop %rax, above the return address
    ] {
        let code = [realign, &[0x53, 0xc3]].concat(); // push %rbx; ret
        assert_at_entry(free_plan(&code), Cost::SingleStepped, Fallback::NothingEmulated);
    }
}

#[test]
fn a_call_may_be_a_site_but_nothing_behind_it() {
    let first = malloc_plan(&[
        0xe8, 0x10, 0x00, 0x00, 0x00, // call 21
        0xc3, // ret
    ]);
    assert_eq!((first.enter.offset, first.cost()), (0, Cost::Emulated));
    let indirect = [
        0x48, 0x89, 0xfb, // mov %rdi,%rbx
        0xff, 0xd0, // call *%rax
        0x53, // push %rbx
        0xc3, // ret
    ];
    assert_at_entry(free_plan(&indirect), Cost::SingleStepped, Fallback::NothingEmulated);
}

#[test]
fn nothing_is_taken_behind_a_locked_instruction() {
    let code = [
        0x31, 0xc0, // xor %eax,%eax
        0xf0, 0x48, 0x0f, 0xb1, 0x3e, // lock cmpxchg %rdi,(%rsi)
        0x74, 0x00, // je 9
        0xc3, // ret
    ];
    assert_eq!(free_plan(&code).enter.offset, 0);
}

#[test]
fn a_jrcxz_is_a_branch_that_the_kernel_does_not_emulate() {
    let code = [
        0x48, 0x89, 0xf9, // mov %rdi,%rcx
        0xe3, 0x01, // jrcxz 6
        0x53, // push %rbx
        0xc3, // ret
    ];
    assert_at_entry(free_plan(&code), Cost::SingleStepped, Fallback::NothingEmulated);
}

const LONG_NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00]; // nopl 0x0(%rax,%rax,1)

#[test]
fn no_probe_is_on_a_long_nop() {
    let plan = |rest: &[u8]| {
        let code = [&LONG_NOP, rest].concat();
        survey(function(&code)).map(|survey| survey.plan(&[0], true))
    };
    let pushes = plan(&[0x53, 0xc3]).expect("probable");
    assert_eq!((pushes.enter.offset, pushes.cost(), pushes.fallback), (5, Cost::Emulated, None));
    let sub_rsp = [0x48, 0x83, 0xec, 0x18, 0xc3];
    let plain = plan(&sub_rsp).expect("probable");
    assert_eq!((plain.enter.offset, plain.cost()), (5, Cost::SingleStepped));
    assert_eq!(plain.leave.map(|leave| leave.offset), Some(5));
    assert_eq!(plan(&[&LONG_NOP[..], &sub_rsp].concat()).expect("probable").enter.offset, 10);
    // There, a hit need not be a call.
    let loops = [0x53, 0xeb, 0xfd]; // push %rbx; jmp 5
    assert_eq!(plan(&loops).expect_err("none is left"), Refusal::Rewritten);
    assert_eq!(plan(&[]).expect_err("none is left"), Refusal::Rewritten);
    let unsized_code = FunctionCode { size_bytes: 0, ..function(&LONG_NOP) };
    assert_eq!(survey(unsized_code), Err(Refusal::Rewritten));
    let inside = [&[0x48, 0x85, 0xff][..], &LONG_NOP, &[0x53, 0xc3]].concat();
    let inside = survey(function(&inside)).expect("probable").plan(&[0], true);
    assert_eq!((inside.enter.offset, inside.cost()), (8, Cost::Emulated));
}

#[test]
fn a_function_without_a_size_is_probed_at_its_entry() {
    for (code, cost) in [
        (&[0x53, 0xc3][..], Cost::Emulated),
        (&[0x48, 0x85, 0xff, 0x74, 0x00, 0xc3], Cost::SingleStepped),
    ] {
        let survey = survey(FunctionCode { size_bytes: 0, ..function(code) });
        let plan = survey.expect("probable").plan(&[0], false);
        assert_at_entry(plan, cost, Fallback::SizeUnknown);
    }
}

#[test]
fn a_function_that_ends_before_its_size_is_probed_at_its_entry() {
    let code = [
        0x48, 0x85, 0xff, // test %rdi,%rdi
        0x74, 0x00, // je 5
    ];
    for size_bytes in [6, MAX_FUNCTION_BYTES + 1, u64::MAX] {
        let survey = survey(FunctionCode { size_bytes, ..function(&code) });
        let plan = survey.expect("probable").plan(&[0], false);
        assert_at_entry(plan, Cost::SingleStepped, Fallback::SizeImplausible);
    }
}

#[test]
fn data_inside_of_a_function_leaves_the_entry() {
    let code = [
        0x48, 0x85, 0xff, // test %rdi,%rdi
        0x74, 0x02, // je 7
        0xc3, // ret
        0x06, // (bad)
        0xc3, // ret
    ];
    assert_at_entry(free_plan(&code), Cost::SingleStepped, Fallback::Undecodable);
}

#[test]
fn what_the_kernel_would_not_probe_is_refused() {
    for (code, refusal) in [
        (&[][..], Refusal::NoCode),
        (&[0x06, 0x06], Refusal::Undecodable), // (bad)
        (&[0x48, 0x83], Refusal::Undecodable), // cut off
        (&[0xf0, 0x48, 0x0f, 0xb1, 0x0e, 0xc3], Refusal::Unprobable), // lock cmpxchg
        (&[0xcc, 0xc3], Refusal::Unprobable),  // int3
    ] {
        assert_eq!(survey(function(code)), Err(refusal), "{code:x?}");
    }
}

#[test]
fn a_function_that_only_jumps_tells_where_to_and_with_what() {
    let survey = survey(function(&[
        0x48, 0x89, 0xfe, // mov %rdi,%rsi
        0xbf, 0x00, 0x10, 0x00, 0x00, // mov $0x1000,%edi
        0xe9, 0x10, 0x00, 0x00, 0x00, // jmp 1d
    ]));
    let jump = survey.expect("probable").tail_jump.expect("jumps");
    assert_eq!(jump.target_svma, SVMA + 0x1d);
    assert_eq!(jump.passes, [None, Some(0), Some(2), Some(3), Some(4), Some(5)]);
}

#[test]
fn a_wrapper_is_recognised_only_if_each_path_calls_what_it_wraps() {
    let reaches = |code: &[u8], null_is_failure| {
        let at = |svma: u64| {
            usize::try_from(svma - SVMA).ok().and_then(|at| code.get(at..)).unwrap_or_default()
        };
        let destination = |svma| match svma - SVMA {
            0x100 => flow::Destination::Goal,
            0x200 => flow::Destination::End,
            _ => flow::Destination::Other,
        };
        flow::every_path_reaches(SVMA, &at, &destination, null_is_failure)
    };
    let or_fails = [
        0x48, 0x89, 0xf0, // mov %rsi,%rax
        0x48, 0xf7, 0xe2, // mul %rdx
        0x70, 0x05, // jo d
        0xe9, 0xf3, 0x00, 0x00, 0x00, // jmp 100
        0x31, 0xc0, // xor %eax,%eax
        0xc3, // ret
    ];
    assert!(reaches(&or_fails, true));
    assert!(!reaches(&or_fails, false));
    let own_fast_path = [
        0x48, 0x85, 0xff, // test %rdi,%rdi
        0x74, 0x04, // je 9
        0x48, 0x8b, 0x07, // mov (%rdi),%rax
        0xc3, // ret
        0xe9, 0xf2, 0x00, 0x00, 0x00, // jmp 100
    ];
    assert!(!reaches(&own_fast_path, true));
    let throws = [
        0xe8, 0xfb, 0x00, 0x00, 0x00, // call 100
        0xc3, // ret
    ];
    assert!(reaches(&throws, true));
    let never_calls = [
        0xe8, 0xfb, 0x01, 0x00, 0x00, // call 200
    ];
    assert!(!reaches(&never_calls, true));
}

#[test]
fn an_import_stub_names_its_slot() {
    let slot = |stub: &[u8]| flow::import_slot(stub, 0x9000);
    // jmp *0x1000(%rip)
    assert_eq!(slot(&[0xff, 0x25, 0x00, 0x10, 0x00, 0x00]), Some(0xa006));
    // endbr64; bnd jmp *0x1000(%rip)
    let with_ibt = [0xf3, 0x0f, 0x1e, 0xfa, 0xf2, 0xff, 0x25, 0x00, 0x10, 0x00, 0x00];
    assert_eq!(slot(&with_ibt), Some(0xa00b));
    // jmp *%rax
    assert_eq!(slot(&[0xff, 0xe0]), None);
    assert_eq!(slot(&[]), None);
}

fn check(site: &Site, code: &[u8]) {
    let at = usize::try_from(site.offset).expect("small");
    let mut decoder = Decoder::with_ip(64, &code[at..], 0, DecoderOptions::NONE);
    let length = decoder.decode().len();
    assert_eq!(kernel::treatment(&code[at..at + length]), Treatment::Emulated);
    assert_eq!(site.cost, Cost::Emulated);
    assert!(site.arguments.iter().all(|slot| slot.0 <= 14 || *slot == RegisterSlot::NONE));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_yield_a_refusal_or_sites_that_the_kernel_emulates(
        code in prop::collection::vec(any::<u8>(), 0..200),
        size_bytes in prop_oneof![Just(None), any::<u64>().prop_map(Some)],
        svma in any::<u64>(),
    ) {
        let cold: [(u64, &[u8]); 1] = [(svma.wrapping_add(400), &code)];
        let function = FunctionCode {
            svma,
            bytes: &code,
            size_bytes: size_bytes.unwrap_or(code.len() as u64),
            cold: &cold,
        };
        if let Ok(survey) = survey(function) {
            for site in &survey.sites {
                check(site, &code);
            }
            let plan = survey.plan(&[0, 1, 9], true);
            prop_assert!(plan.leave.is_some_and(|leave| leave.stack_distance == 0));
            for site in [Some(plan.enter), plan.leave].into_iter().flatten() {
                let at = usize::try_from(site.offset).expect("small");
                prop_assert!(may_be_probed(&code[at..]));
            }
        }
        flow::import_slot(&code, svma);
        flow::every_path_reaches(svma, &|_| &code, &|_| flow::Destination::Other, true);
    }
}
