//! What a pair of malloc and free costs.

use std::path::Path;

use anyhow::Result;

use super::agent::{Agent, Tracer};
use super::program::{self, Program};
use super::table::{Samples, Table, figure, ratio};

/// Callers above the loop in the variant with a deep stack.
const DEEP: u64 = 30;

/// How long one measurement should take, in nanoseconds.
const SPAN_NS: f64 = 0.2e9;

const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
const ALLOCATORS: [(&str, Option<&str>); 4] = [
    ("glibc", None),
    ("jemalloc", Some("libjemalloc.so.2")),
    ("tcmalloc", Some("libtcmalloc_minimal.so.4")),
    ("mimalloc", Some("libmimalloc.so.2")),
];

/// Nanoseconds a pair.
#[derive(Default)]
struct Costs {
    untraced: Samples,
    floor: Samples,
    unchosen_floor: Samples,
    naive: Samples,
    exact: Samples,
    exact_deep: Samples,
    sample: Samples,
}

/// Measures everything `rounds` times, in turn.
pub fn run(rounds: usize) -> Result<String> {
    let path = program::build("pair")?;
    let mut costs: Vec<Costs> = ALLOCATORS.iter().map(|_| Costs::default()).collect();
    let mut heaptrack = [Samples::default(), Samples::default()];
    let mut valgrind = [Samples::default(), Samples::default()];
    let recording = program::folder()?.join("heaptrack").to_string_lossy().into_owned();
    for round in 0..rounds {
        eprintln!("pair: round {} of {rounds}", round + 1);
        for ((_, library), costs) in ALLOCATORS.iter().zip(&mut costs) {
            measure(&path, *library, costs)?;
        }
        wrapped(&path, &["heaptrack", "--raw", "-o", &recording], &mut heaptrack)?;
        wrapped(&path, &["valgrind", "-q"], &mut valgrind)?;
    }

    let mut text = String::from("A pair on glibc, in nanoseconds:\n\n");
    let Some(glibc) = costs.first() else {
        return Ok(text);
    };
    let mut table = Table::new(&["", "min", "median", "of untraced", "of the floor"]);
    let deep = format!("leakbpf exact, {DEEP} callers more");
    let [heaptrack, heaptrack_deep] = &heaptrack;
    let [valgrind, valgrind_deep] = &valgrind;
    let heaptrack_deep_name = format!("heaptrack, {DEEP} callers more");
    let valgrind_deep_name = format!("valgrind, {DEEP} callers more");
    for (name, samples) in [
        ("untraced", &glibc.untraced),
        ("floor: empty programs at leakbpf's sites", &glibc.floor),
        ("leakbpf exact", &glibc.exact),
        (deep.as_str(), &glibc.exact_deep),
        ("floor of a pair that is not chosen", &glibc.unchosen_floor),
        ("leakbpf sample, every 512 KiB", &glibc.sample),
        ("empty programs at the functions' first instructions", &glibc.naive),
        ("heaptrack", heaptrack),
        (heaptrack_deep_name.as_str(), heaptrack_deep),
        ("valgrind", valgrind),
        (valgrind_deep_name.as_str(), valgrind_deep),
    ] {
        table.row(
            name,
            &[
                figure(samples.min()),
                figure(samples.median()),
                ratio(samples.min(), glibc.untraced.min()),
                ratio(samples.min(), glibc.floor.min()),
            ],
        );
    }
    text.push_str(table.text());
    let of_its_own = ratio(glibc.sample.min(), glibc.unchosen_floor.min());
    text.push_str(&format!("\n`sample` is {of_its_own} of its own floor.\n"));

    text.push_str("\nA pair on each allocator (minimum, nanoseconds):\n\n");
    let mut table = Table::new(&[
        "",
        "untraced",
        "floor",
        "leakbpf exact",
        "exact of floor",
        "floor, not chosen",
        "leakbpf sample",
        "sample of that floor",
        "first instructions, empty",
        "that of exact",
    ]);
    for ((name, _), costs) in ALLOCATORS.iter().zip(&costs) {
        table.row(
            name,
            &[
                figure(costs.untraced.min()),
                figure(costs.floor.min()),
                figure(costs.exact.min()),
                ratio(costs.exact.min(), costs.floor.min()),
                figure(costs.unchosen_floor.min()),
                figure(costs.sample.min()),
                ratio(costs.sample.min(), costs.unchosen_floor.min()),
                figure(costs.naive.min()),
                ratio(costs.naive.min(), costs.exact.min()),
            ],
        );
    }
    text.push_str(table.text());
    Ok(text)
}

fn measure(path: &Path, library: Option<&str>, costs: &mut Costs) -> Result<()> {
    let preload = library.map(|library| format!("{LIBRARIES}/{library}"));
    let variable = preload.as_deref().map(|library| ("LD_PRELOAD", library));
    let mut program = Program::start(path, &[], variable)?;
    costs.untraced.push(pair_ns(&mut program, 0)?);
    for (tracer, samples) in [
        (Tracer::Floor, &mut costs.floor),
        (Tracer::UnchosenFloor, &mut costs.unchosen_floor),
        (Tracer::Naive, &mut costs.naive),
    ] {
        let agent = Agent::attach(tracer, program.pid(), &[])?;
        samples.push(pair_ns(&mut program, 0)?);
        agent.stop()?;
    }
    let agent = Agent::attach(Tracer::Exact, program.pid(), &[])?;
    costs.exact.push(pair_ns(&mut program, 0)?);
    costs.exact_deep.push(pair_ns(&mut program, DEEP)?);
    agent.stop()?;
    let agent = Agent::attach(Tracer::Record, program.pid(), &["--mode", "sample"])?;
    costs.sample.push(pair_ns(&mut program, 0)?);
    agent.stop()?;
    costs.untraced.push(pair_ns(&mut program, 0)?);
    Ok(())
}

fn wrapped(path: &Path, wrapper: &[&str], [shallow, deep]: &mut [Samples; 2]) -> Result<()> {
    let mut program = Program::start(path, wrapper, None)?;
    shallow.push(pair_ns(&mut program, 0)?);
    deep.push(pair_ns(&mut program, DEEP)?);
    Ok(())
}

/// Nanoseconds a pair, over as many pairs as take about [`SPAN_NS`].
pub fn pair_ns(program: &mut Program, depth: u64) -> Result<f64> {
    const WARM_UP: u64 = 2000;
    program.order(WARM_UP, depth)?;
    let estimate = program.order(WARM_UP, depth)? / WARM_UP as f64;
    let count = (SPAN_NS / estimate.max(1.0)).max(WARM_UP as f64) as u64;
    Ok(program.order(count, depth)? / count as f64)
}
