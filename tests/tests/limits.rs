//! What happens at the limits: maps that fill, many blocks, filters.

use leakbpf_tests::{Allocator, Leakbpf, Profile, Target, c_program, heap_difference};

#[test]
fn a_full_block_map_is_reported_and_keeps_only_true_blocks() {
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    let session =
        Leakbpf::record().pid(target.pid()).argument("--max-blocks").argument("1000").start();
    let attached_ns = session.attached_ns();
    target.run("many 5000 100");
    target.run("churn 5000");
    let books = target.books();
    let profile = session.stop();
    assert!(profile.losses["blocks_full"] > 0, "{:?}", profile.losses);
    let difference = heap_difference(&profile, target.pid(), &books, attached_ns, false);
    assert!(difference.extra.is_empty() && difference.resized.is_empty(), "{difference}");
    let kept = profile.heap_blocks(target.pid()).len();
    assert!(kept >= 900, "the map has room for 1000, {kept} are there");
    let unrecorded = difference.missing.len() as u64;
    assert!(profile.losses["blocks_full"] >= unrecorded, "{unrecorded}: {:?}", profile.losses);
    profile.assert_consistent();
}

#[test]
fn the_oldest_blocks_stay_when_the_map_is_full() {
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    let session =
        Leakbpf::record().pid(target.pid()).argument("--max-blocks").argument("1000").start();
    target.run("many 500 111");
    target.run("many 5000 222");
    let profile = session.stop();
    let blocks = profile.heap_blocks(target.pid());
    assert_eq!(blocks.values().filter(|block| block.size == 111).count(), 500);
}

#[test]
fn a_hundred_thousand_blocks_are_all_there() {
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    target.run("many 100000 48");
    target.run("churn 1000");
    let books = target.books();
    let profile = session.stop();
    leakbpf_tests::assert_heap_equals(&profile, target.pid(), &books, attached_ns);
}

#[test]
fn blocks_below_the_size_filter_are_left_out_and_no_others() {
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    let session =
        Leakbpf::record().pid(target.pid()).argument("--min-size").argument("1000").start();
    target.run("many 30 999");
    target.run("many 20 1000");
    let profile = session.stop();
    let sizes: Vec<u64> =
        profile.heap_blocks(target.pid()).values().map(|block| block.size).collect();
    assert_eq!(sizes, [1000; 20]);
}

#[test]
fn blocks_below_the_age_filter_are_left_out() {
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).argument("--min-age").argument("1h").start();
    target.run("many 30 999");
    let profile = session.stop();
    assert!(profile.heap_blocks(target.pid()).is_empty());
}

/// A filter is for the eyes of whoever records: the file is for all questions.
#[test]
fn a_recording_has_all_blocks_whatever_filter_it_was_made_with() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("x.leak");
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    let mut session = Leakbpf::record()
        .pid(target.pid())
        .argument("--min-size")
        .argument("1000")
        .output(&file)
        .start();
    target.run("many 30 999");
    target.run("many 20 1000");
    session.signal(libc::SIGINT);
    assert!(session.wait().success(), "{}", session.stderr());
    let printed = session.stdout();
    assert!(printed.contains("only blocks of 1000 B and more"), "{printed}");
    assert!(printed.contains("20,000 bytes in 20 blocks"), "{printed}");
    let report = |arguments: &[&str]| {
        let mut command = leakbpf_tests::leakbpf_command();
        command.args(["report", "--format", "json"]).arg(&file).args(arguments);
        let output = command.output().expect("it starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Profile::parse(&String::from_utf8(output.stdout).expect("text"))
    };
    assert_eq!(report(&[]).totals.live_bytes, 30 * 999 + 20 * 1000);
    assert_eq!(report(&["--min-size", "1000"]).totals.live_bytes, 20 * 1000);
}

#[test]
fn ages_are_those_of_the_books() {
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).start();
    target.run("many 50 640");
    let books = target.books();
    let before_ns = leakbpf_tests::monotonic_ns();
    let profile = session.stop();
    let after_ns = leakbpf_tests::monotonic_ns();
    for block in profile.heap_blocks(target.pid()).values() {
        let known = &books.blocks[&block.address];
        let (least, most) = (before_ns - known.born_ns, after_ns - known.begun_ns);
        assert!(
            (least..=most).contains(&block.age_ns),
            "{} ns old, between {least} and {most} expected",
            block.age_ns
        );
    }
}
