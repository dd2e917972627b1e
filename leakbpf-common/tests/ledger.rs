//! The accounting rules against a simulated program that knows what it holds.

#[path = "ledger/books.rs"]
mod books;
#[path = "ledger/program.rs"]
mod program;
#[path = "ledger/rules.rs"]
mod rules;
#[path = "ledger/sampled.rs"]
mod sampled;

use proptest::prelude::*;

use program::{Action, Request, Shape, World};

fn shape() -> impl Strategy<Value = Shape> {
    prop_oneof![
        4 => Just(Shape::Malloc),
        1 => Just(Shape::Calloc),
        1 => Just(Shape::CallocOverflow),
        1 => Just(Shape::PosixMemalign),
        4 => Just(Shape::Realloc),
        1 => Just(Shape::ReallocZero),
        1 => Just(Shape::ReallocNull),
        1 => Just(Shape::Reallocarray),
        1 => Just(Shape::ReallocarrayOverflow),
        1 => Just(Shape::Reallocf),
        2 => Just(Shape::Xallocx),
        5 => Just(Shape::Free),
        1 => Just(Shape::FreeNull),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    let thread = 0..program::THREADS * 2;
    let begin = (thread.clone(), shape(), 1..5000u64, any::<prop::sample::Index>(), 0..100_000u64)
        .prop_map(|(thread, shape, size, pick, gap)| {
            Action::Begin(thread, Request { shape, size, pick, gap: gap & !7 })
        });
    let on_signal_stack = (thread.clone(), shape(), 1..5000u64, any::<prop::sample::Index>())
        .prop_map(|(thread, shape, size, pick)| {
            Action::Signal(thread, Request { shape, size, pick, gap: 0 })
        });
    prop_oneof![
        12 => begin,
        20 => (thread.clone(), prop::bool::weighted(0.7))
            .prop_map(|(thread, succeeds)| Action::Advance(thread, succeeds)),
        4 => (thread.clone(), 8..200_000u64, any::<bool>())
            .prop_map(|(thread, gap, free)| Action::Nested(thread, gap & !7, free)),
        3 => thread.clone().prop_map(Action::TailCall),
        1 => on_signal_stack,
        2 => (thread.clone(), 0..4096u64, any::<prop::sample::Index>())
            .prop_map(|(thread, gap, pick)| Action::Jump(thread, gap & !7, pick)),
        1 => thread.clone().prop_map(Action::Die),
        1 => (thread, any::<prop::sample::Index>())
            .prop_map(|(thread, pick)| Action::UnseenFree(thread, pick)),
        1 => Just(Action::Fork),
    ]
}

fn run(capacity: usize, attached_late: bool, actions: Vec<Action>) {
    let mut world = World::new(capacity, attached_late);
    for action in &actions {
        world.act(action);
        world.check();
    }
    world.finish();
    world.check();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_books_hold_exactly_what_the_program_holds(
        attached_late in any::<bool>(),
        actions in prop::collection::vec(action(), 1..150),
    ) {
        run(usize::MAX, attached_late, actions);
    }

    #[test]
    fn a_full_block_map_is_exact_about_what_it_left_out(
        capacity in 0..6usize,
        actions in prop::collection::vec(action(), 1..150),
    ) {
        run(capacity, false, actions);
    }
}
