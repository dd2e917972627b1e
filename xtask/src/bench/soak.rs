//! `cargo xtask bench soak`: whether the budget holds for long, under a load that changes.
//!
//! One of two servers is watched ([`super::twins`]). How much they differ by themselves is measured before
//! leakbpf attaches, and after it is gone.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::table::{Samples, Table, figure, signed};
use super::twins::{Pair, Twins, more};
use super::workloads::Workload;

/// How much of the time there is a load, minute by minute, in turn; and which, where the workload has
/// more than one.
const LEVELS: [(f64, usize); 6] = [(1.0, 0), (0.3, 0), (1.0, 1), (0.05, 0), (0.5, 1), (0.0, 0)];

/// Different loads among the levels.
const KINDS: usize = 2;

/// A load level's time.
const MINUTE: Duration = Duration::from_secs(60);

/// Each kind of load for a while, with nobody watching.
fn compare(pair: &mut Pair, minutes: u32, into: &mut [Twins; KINDS]) -> Result<()> {
    for turn in 0..minutes as usize {
        let kind = turn % KINDS;
        let twins = pair.run((1.0, kind), MINUTE)?;
        eprintln!("soak: nobody watched, kind {}: {:?}", kind + 1, twins.ratio());
        into.get_mut(kind).context("a kind")?.add(&twins);
    }
    Ok(())
}

/// Runs for `minutes` watched, and for `unwatched_minutes` before and after.
pub fn run(
    workload: &Workload,
    minutes: u32,
    unwatched_minutes: u32,
    arguments: &[String],
) -> Result<String> {
    ensure!(
        minutes > 0 && unwatched_minutes as usize >= KINDS,
        "at least one minute watched, and one of each of the {KINDS} kinds of load that is not"
    );
    let mut pair = Pair::start(workload)?;
    let mut unwatched = [Twins::default(); KINDS];
    eprintln!("soak: {}", workload.name);
    compare(&mut pair, unwatched_minutes, &mut unwatched)?;

    let watching = pair.watch(arguments)?;
    let mut by_minute = Vec::new();
    for minute in 0..minutes {
        let number = minute as usize % LEVELS.len();
        let twins = pair.run(LEVELS[number], MINUTE)?;
        eprintln!("soak: minute {} of {minutes}: {:?}", minute + 1, twins.ratio());
        by_minute.push((number, twins));
    }
    let report = watching.stop()?;
    compare(&mut pair, unwatched_minutes, &mut unwatched)?;

    let tables = tables(&by_minute, &unwatched);
    Ok(format!(
        "{}, `leakbpf record {}`, {minutes} minutes, and {unwatched_minutes} before and after with nobody \
         watched:\n\n{tables}\n{}\n",
        workload.title,
        arguments.join(" "),
        said(&report)
    ))
}

fn tables(by_minute: &[(usize, Twins)], unwatched: &[Twins; KINDS]) -> String {
    let mut table = Table::new(&[
        "load",
        "minutes",
        "µs CPU a unit, not watched",
        "more when watched, %",
        "least minute",
        "median",
        "most",
    ]);
    // Each level weighs what it takes of the processor.
    let (mut taken, mut expected) = (0.0, 0.0);
    for (number, (share, kind)) in LEVELS.iter().enumerate() {
        let minutes: Vec<&Twins> =
            by_minute.iter().filter(|(n, _)| *n == number).map(|(_, twins)| twins).collect();
        let (mut all, mut each) = (Twins::default(), Samples::default());
        for twins in &minutes {
            all.add(twins);
            more(twins, &unwatched[*kind]).into_iter().for_each(|percent| each.push(percent));
        }
        if let (Some(ratio), Some(own)) = (all.ratio(), unwatched[*kind].ratio()) {
            taken += all.other.cpu_seconds / all.other.units * all.watched.units * ratio;
            expected += all.other.cpu_seconds / all.other.units * all.watched.units * own;
        } else {
            taken += all.watched.cpu_seconds;
            expected += all.other.cpu_seconds;
        }
        table.row(
            &format!("{:.0} % of the time, kind {}", share * 100.0, kind + 1),
            &[
                minutes.len().to_string(),
                figure(
                    (all.other.units > 0.0).then(|| all.other.cpu_seconds * 1e6 / all.other.units),
                ),
                signed(more(&all, &unwatched[*kind])),
                signed(each.min()),
                signed(each.median()),
                signed(each.max()),
            ],
        );
    }
    format!("{}\nIn all: {:+.2} %.", table.text(), (taken / expected - 1.0) * 100.0)
}

/// What leakbpf itself said.
fn said(report: &Value) -> String {
    let cost = &report["cost"];
    let number = |name: &str| figure(cost[name].as_f64());
    format!(
        "leakbpf's own estimate: {} %; {} hits; mode at the end: {}.",
        number("overhead_percent"),
        number("probe_hits"),
        report["mode"].as_str().unwrap_or("?"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::twins::Sum;
    use super::*;

    #[test]
    fn the_whole_is_weighed_by_processor_time() {
        let twins = |units, watched, other| Twins {
            watched: Sum { units, cpu_seconds: watched },
            other: Sum { units, cpu_seconds: other },
        };
        let unwatched = [twins(1.0, 1.0, 1.0); KINDS];
        // 2 % of 99 seconds and 100 % of one.
        let minutes = [(0, twins(99.0, 99.0 * 1.02, 99.0)), (1, twins(1.0, 2.0, 1.0))];
        let text = tables(&minutes, &unwatched);
        assert!(text.contains("In all: +2.98 %."), "{text}");
        assert!(text.contains("| 0 % of the time, kind 1 | 0 | – | – | – | – | – |"), "{text}");
    }
}
