//! `--mode sample`: estimates from chosen blocks, against programs that know their own truth.

use leakbpf_tests::{Allocator, Leakbpf, Profile, Target, c_program, kernel_version};

/// What a program does while its blocks are sampled; its report, and the bytes and blocks that it
/// holds by its own books.
fn sampled(program: &str, interval: &str, commands: &[&str]) -> (Profile, u64, u64) {
    sampled_on(Allocator::Glibc, program, interval, commands)
}

fn sampled_on(
    allocator: Allocator,
    program: &str,
    interval: &str,
    commands: &[&str],
) -> (Profile, u64, u64) {
    let mut target = Target::start(&c_program(program, allocator));
    let session = Leakbpf::record()
        .pid(target.pid())
        .argument("--mode=sample")
        .argument(format!("--sample-interval={interval}"))
        .start();
    let attached_ns = session.attached_ns();
    for command in commands {
        target.run(command);
    }
    let books = target.books().since(attached_ns);
    let profile = session.stop();
    assert_eq!(profile.mode, "sample");
    let estimate = profile.estimate.as_ref().expect("an estimate");
    assert_eq!((estimate.unit.as_str(), estimate.one_in), ("estimated", None));
    profile.assert_no_losses();
    let bytes = books.blocks.values().map(|block| block.size_bytes).sum();
    (profile, bytes, books.blocks.len() as u64)
}

/// Five standard deviations either way: wrong once in two million runs.
fn assert_near(what: &str, estimate: u64, truth: u64, interval: Option<[u64; 2]>) {
    let [low, high] = interval.expect("an estimate says how far it can be off");
    assert!(low <= estimate && estimate <= high, "{what}: {estimate} not in {low}..{high}");
    let deviation = (high - low) as f64 / 2.0 / 1.96;
    let off = (estimate as f64 - truth as f64).abs();
    assert!(off <= 5.0 * deviation + 1.0, "{what}: {estimate}, truth {truth}, 95% {low}..{high}");
    assert!(deviation < 0.25 * truth as f64, "{what}: too rough to show anything: {low}..{high}");
}

fn assert_totals(profile: &Profile, bytes: u64, count: u64) {
    let totals = &profile.totals;
    assert_near("bytes", totals.live_bytes, bytes, totals.live_bytes_interval);
    assert_near("count", totals.live_count, count, totals.live_count_interval);
}

#[test]
fn what_a_site_holds_is_estimated() {
    let (profile, bytes, count) = sampled("heap", "16KiB", &["many 20000 5000", "many 50000 40"]);
    assert!(count >= 70_000);
    assert_totals(&profile, bytes, count);
    // One line of the program makes them all.
    let site = profile.sites.first().expect("a site");
    let counters = &site.counters;
    assert_near("bytes of it", counters.live_bytes, 102_000_000, counters.live_bytes_interval);
    assert_near("count of it", counters.live_count, 70_000, counters.live_count_interval);
    assert!(site.frames.iter().any(|frame| frame.function.as_deref() == Some("many")));
}

#[test]
fn releases_and_reallocations_are_estimated_without_bias() {
    // So short an interval that many small blocks are chosen, and all forms of realloc with them.
    let commands = ["basic", "reallocs", "posix", "aligned", "churn", "churn", "many 300 100"];
    let (profile, bytes, count) = sampled("heap", "512", &commands);
    assert_totals(&profile, bytes, count);
    let totals = &profile.totals;
    assert!(totals.freed_count > 1000, "{totals:?}");
    assert!(totals.allocated_bytes.abs_diff(totals.freed_bytes + totals.live_bytes) < 1000);
}

#[test]
fn large_blocks_are_always_in() {
    let (profile, bytes, count) = sampled("heap", "4KiB", &["many 500 65536"]);
    let site = profile.sites.first().expect("a site");
    assert_eq!((site.counters.live_bytes, site.counters.live_count), (500 * 65536, 500));
    // Smaller ones may have been left out.
    let [low, high] = site.counters.live_bytes_interval.expect("an interval");
    assert!(low == 500 * 65536 && high < low + 4 * 4096, "{low}..{high}");
    assert!(bytes >= 500 * 65536 && count >= 500);
}

#[test]
fn most_small_blocks_are_left_out() {
    let (profile, ..) = sampled("heap", "512KiB", &["many 100000 64"]);
    assert!(profile.blocks.len() < 1000, "{} of 100,000 blocks", profile.blocks.len());
    assert!(profile.blocks.len() > 50, "{} of 100,000 blocks", profile.blocks.len());
}

#[test]
fn a_call_that_is_not_chosen_pays_no_return_probe_and_is_chosen_once() {
    const CALLS: u64 = 100_000;
    let has_sessions = kernel_version() >= (6, 13);
    for (allocator, calls_no_other) in [
        (Allocator::Glibc, true),
        (Allocator::GlibcStatic, true),
        (Allocator::JemallocPreloaded, true),
        (Allocator::TcmallocLinked, true),
        (Allocator::MimallocPreloaded, false),
        (Allocator::Musl, false),
    ] {
        let command = format!("many {CALLS} 64");
        let (profile, bytes, count) = sampled_on(allocator, "heap", "64KiB", &[&command]);
        // A call inside of another one that was chosen for itself would show twice.
        assert_totals(&profile, bytes, count);
        let hits = profile.cost.probe_hits as f64 / CALLS as f64;
        let expected = if calls_no_other && has_sessions { 1.0 } else { 2.0 };
        assert!((hits - expected).abs() < 0.2, "{allocator:?}: {hits} probes a call");
    }
}
