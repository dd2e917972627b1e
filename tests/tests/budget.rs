//! `--mode auto` and `--mode windows`: what is counted when the probes may only cost so much.
//!
//! The program under test says itself how much processor time it used for how many requests: what a
//! session costs is seen from there, not only from what leakbpf says of itself.

use std::thread;
use std::time::Duration;

use leakbpf_tests::{
    Allocator, Leakbpf, Profile, Session, Site, Target, c_program, leakbpf_command,
};

/// What `serve` of `tests/targets/service.c` says.
struct Served {
    requests: f64,
    cpu_ns: f64,
    leaked_blocks: u64,
}

fn served(said: &[String]) -> Served {
    let numbers: Vec<u64> = said
        .first()
        .expect("a line")
        .split(' ')
        .map(|word| word.parse().expect("a number"))
        .collect();
    Served { requests: numbers[0] as f64, cpu_ns: numbers[1] as f64, leaked_blocks: numbers[2] }
}

fn service() -> Target {
    Target::start(&c_program("service", Allocator::Glibc))
}

fn watch(target: &Target, arguments: &[&str]) -> Session {
    let mut leakbpf = Leakbpf::record().pid(target.pid());
    for argument in arguments {
        leakbpf = leakbpf.argument(*argument);
    }
    leakbpf.start()
}

fn is_of(site: &Site, function: &str) -> bool {
    site.frames.iter().any(|frame| frame.function.as_deref() == Some(function))
}

fn sites<'a>(profile: &'a Profile, kind: &'a str) -> impl Iterator<Item = &'a Site> {
    profile.sites.iter().filter(move |site| site.kind == kind && site.counters.live_bytes > 0)
}

#[test]
fn a_quiet_process_is_counted_exactly_from_begin_to_end() {
    let mut target = service();
    let session = watch(&target, &["--mode", "auto"]);
    let Served { leaked_blocks, .. } = served(&target.run("serve 4000 20 100000"));
    let profile = session.stop();
    assert_eq!(profile.mode, "exact", "{:?}", profile.events);
    assert!(profile.windows.is_none() && profile.estimate.is_none());
    let leak = sites(&profile, "heap").next().expect("a site");
    assert!(is_of(leak, "leak_one"), "{}", leak.describe());
    assert_eq!(leak.counters.live_count, leaked_blocks);
    assert_eq!(leak.counters.live_bytes, leaked_blocks * 1024);
    profile.assert_no_losses();
}

/// A server whose probes cost a quarter of its time, and that leaks 1 MiB a second.
#[test]
fn a_busy_process_pays_no_more_than_the_limit_and_its_leak_is_named() {
    let mut target = service();
    let untraced = served(&target.run("serve 3000 0 0"));
    let session = watch(&target, &["--mode", "auto", "--max-overhead", "2%"]);
    let traced = served(&target.run("serve 40000 1024 0"));
    let profile = session.stop();

    assert_eq!(profile.mode, "windows", "{:?}", profile.events);
    assert_eq!(profile.cost.max_overhead_percent, Some(2.0));
    let overhead = profile.cost.overhead_percent.expect("it worked");
    // A machine that is busy with other tests may keep the agent from its decisions.
    assert!(overhead < 3.0, "{overhead} % where 2 % is the limit");
    // And by the program's own account, as far as the machine lets it be seen.
    let cost = traced.cpu_ns / traced.requests / (untraced.cpu_ns / untraced.requests);
    assert!(cost < 1.35, "{cost} times the time a request");
    let said: Vec<&str> = profile.events.iter().map(|event| event.text.as_str()).collect();
    assert!(
        said.iter().any(|text| text.starts_with("every allocation was counted for")),
        "{said:?}"
    );

    let first = sites(&profile, "resident").next().expect("a site");
    assert!(is_of(first, "leak_one"), "{}", first.describe());
    let leaked = traced.leaked_blocks * 1024;
    let off = first.counters.live_bytes.abs_diff(leaked) as f64 / leaked as f64;
    assert!(off < 0.2, "{} of {leaked}", first.counters.live_bytes);

    let windows = profile.windows.as_ref().expect("windows");
    assert!(windows.count >= 3, "{windows:?}");
    let survivor = profile.sites.first().expect("a site");
    assert!(survivor.kind == "survivor" && is_of(survivor, "leak_one"), "{}", survivor.describe());
    let [low, high] = survivor.counters.live_bytes_interval.expect("several windows");
    // Far beyond 95 %: the test must not fail once in twenty.
    let width = high - low;
    assert!(
        low.saturating_sub(width) <= leaked && leaked <= high + width,
        "{low}..{high}: {leaked}"
    );
    let released = sites(&profile, "survivor").find(|site| is_of(site, "answer"));
    let kept = |site: &Site| site.counters.live_bytes as f64 / site.counters.allocated_bytes as f64;
    assert!(released.is_none_or(|site| kept(site) < 0.2 * kept(survivor)), "{released:?}");
    assert_eq!(profile.losses["frees_missed"], 0, "those between windows are no loss");
}

/// A limit between what it costs to count every block and what samples cost.
#[test]
fn blocks_are_sampled_where_counting_them_all_costs_too_much() {
    const LEAKED_BLOCKS_A_SECOND: u64 = 8192;
    let mut target = service();
    let serve = |target: &mut Target, ms: u64| {
        served(&target.run(&format!("serve {ms} {LEAKED_BLOCKS_A_SECOND} 0 30")))
    };
    // A limit that nothing reaches: every block is counted.
    let session = watch(&target, &["--mode", "auto", "--max-overhead", "100%"]);
    serve(&mut target, 2000);
    let all = session.stop();
    assert_eq!(all.mode, "exact");
    let all = all.cost.overhead_percent.expect("it worked");

    // Between that and what samples cost, which is some two fifths of it here, and three where the
    // kernel has no uprobe sessions.
    let limit_percent = all * 0.75;
    let limit = format!("{limit_percent:.2}%");
    let arguments = ["--mode", "auto", "--max-overhead", &limit, "--sample-interval", "16KiB"];
    let session = watch(&target, &arguments);
    let leaked = serve(&mut target, 8000).leaked_blocks;
    let profile = session.stop();
    let said: Vec<&str> = profile.events.iter().map(|event| event.text.as_str()).collect();
    assert_eq!(profile.mode, "sample", "{said:?}, all: {all} %");
    assert!(
        said.iter().any(|text| text.contains("from here on one block every 16.0 KiB is recorded")),
        "{said:?}"
    );
    profile.assert_no_losses();
    let leak = sites(&profile, "heap").next().expect("a site");
    assert!(is_of(leak, "leak_one"), "{}", leak.describe());
    let [low, high] = leak.counters.live_bytes_interval.expect("samples");
    // Far beyond 95 %: the test must not fail once in twenty.
    let (width, leaked_bytes) = (high - low, leaked * 1024);
    assert!(
        low.saturating_sub(width) <= leaked_bytes && leaked_bytes <= high + width,
        "{low}..{high}: {leaked_bytes}"
    );
    assert!(width < leaked_bytes / 4, "{width} of {leaked_bytes}");
    // One in 16 of them, but all from before.
    let recorded = profile.blocks.iter().filter(|block| block.size == 1024).count() as u64;
    assert!((leaked / 24..leaked / 2).contains(&recorded), "{recorded} of {leaked}");
    let through = leak.counters.allocated_bytes - leak.counters.freed_bytes;
    assert_eq!(through, leak.counters.live_bytes, "{}", leak.describe());
    let overhead = profile.cost.overhead_percent.expect("it worked");
    assert!(overhead < 1.1 * limit_percent, "{overhead} % where {limit_percent} % is the limit");
}

#[test]
fn page_faults_that_alone_cost_too_much_are_looked_at_no_more() {
    let mut target = Target::start(&c_program("pages", Allocator::Glibc));
    target.run("keeps 64");
    let session = watch(&target, &["--mode", "auto"]);
    target.run("keeps 32");
    for _ in 0..40 {
        target.run("churns 64");
    }
    let profile = session.stop();
    let said: Vec<&str> = profile.events.iter().map(|event| event.text.as_str()).collect();
    let stopped = |text: &&&str| text.starts_with("looking at page faults alone costs");
    assert_eq!(said.iter().filter(stopped).count(), 1, "{said:?}");
    // Looked at from begin to end, they cost a tenth.
    let overhead = profile.cost.overhead_percent.expect("it worked");
    assert!(overhead < 1.5, "{overhead} % where 1 % is the limit");
}

#[test]
fn a_storm_has_few_probes_to_fight() {
    let mut target = service();
    let pairs = |said: Vec<String>| said[0].parse::<f64>().expect("a number");
    let untraced = pairs(target.run("storm 2000 2"));
    let session = watch(&target, &["--mode", "auto"]);
    let traced = pairs(target.run("storm 8000 2"));
    let profile = session.stop();
    assert_ne!(profile.mode, "exact");
    // All probes in place would leave it a hundredth; the first windows have to be paid off.
    assert!(traced / 4.0 > 0.5 * untraced, "{} of {untraced} pairs", traced / 4.0);
}

const COUNTED_AGAIN: &str = "every allocation is counted again";

#[test]
fn probes_are_gone_between_windows_and_come_back_when_they_cost_nothing() {
    let mut target = service();
    let session = watch(&target, &["--mode", "auto", "--max-overhead", "10%"]);
    target.run("storm 1000 1");
    // The debt of the storm is paid off, sooner or later, then the leak is all there is.
    let mut leaked = 0;
    for _ in 0..20 {
        leaked += served(&target.run("serve 5000 100 5000")).leaked_blocks;
        if session.stdout().contains(COUNTED_AGAIN) {
            break;
        }
    }
    let profile = session.stop();
    let said: Vec<&str> = profile.events.iter().map(|event| event.text.as_str()).collect();
    assert!(said.iter().any(|text| text.contains(COUNTED_AGAIN)), "{said:?}");
    assert_ne!(profile.mode, "exact");
    let leak = sites(&profile, "survivor").next().expect("a survivor");
    assert!(is_of(leak, "leak_one"), "{}", leak.describe());
    let estimate = leak.counters.live_count;
    assert!(estimate > leaked / 2 && estimate < leaked * 2, "{estimate} of {leaked}");
}

#[test]
fn windows_alone_tell_what_survives_them() {
    let mut target = service();
    let session = watch(&target, &["--mode", "windows", "--max-overhead", "10%"]);
    let leaked = served(&target.run("serve 15000 512 0")).leaked_blocks;
    let profile = session.stop();
    assert_eq!(profile.mode, "windows");
    assert_eq!(profile.estimate.as_ref().expect("an estimate").unit, "survived");
    let first = sites(&profile, "survivor").next().expect("a site");
    assert!(is_of(first, "leak_one"), "{}", first.describe());
    let [low, high] = first.counters.live_count_interval.expect("several windows");
    let width = high - low;
    assert!(
        low.saturating_sub(width) <= leaked && leaked <= high + width,
        "{low}..{high}: {leaked}"
    );
    assert!(sites(&profile, "resident").next().is_none());
    let sum: u64 = sites(&profile, "survivor").map(|site| site.counters.live_bytes).sum();
    assert_eq!(profile.totals.live_bytes, sum);
}

#[test]
fn the_agent_rests_while_the_process_does() {
    let target = service();
    let session = watch(&target, &["--mode", "auto", "--interval", "1h"]);
    thread::sleep(Duration::from_secs(1));
    let cpu = || session.cpu_time();
    let before = cpu();
    thread::sleep(Duration::from_secs(5));
    let used = cpu() - before;
    drop(session.stop());
    assert!(used < Duration::from_millis(250), "{used:?} in 5 s: a twentieth of a processor");
}

#[test]
fn a_limit_belongs_to_a_mode_that_keeps_it() {
    let output = leakbpf_command()
        .args(["record", "-p", "1", "--mode", "exact", "--max-overhead", "1%"])
        .output()
        .expect("leakbpf starts");
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("--max-overhead"), "{said}");
}

/// Nothing but probes on allocators would see a heap of a language of its own.
#[test]
fn memory_that_is_no_allocators_stands_beside_exact_blocks() {
    let mut target = Target::start(&c_program("pages", Allocator::Glibc));
    let session = watch(&target, &["--mode", "auto"]);
    target.run("keeps 16");
    let profile = session.stop();
    assert_eq!(profile.mode, "exact");
    let resident: u64 = sites(&profile, "resident").map(|site| site.counters.live_bytes).sum();
    assert!(resident.abs_diff(16 << 20) < 4 << 20, "{resident}");
    let site = sites(&profile, "resident").next().expect("a site");
    let [low, high] = site.counters.live_bytes_interval.expect("an estimate");
    assert!(low < site.counters.live_bytes && site.counters.live_bytes < high);
    let counted: u64 = profile
        .sites
        .iter()
        .filter(|site| matches!(site.kind.as_str(), "heap" | "mapping" | "thread_stack"))
        .map(|site| site.counters.live_bytes)
        .sum();
    assert_eq!(profile.totals.live_bytes, counted, "resident pages are beside the totals");
}
