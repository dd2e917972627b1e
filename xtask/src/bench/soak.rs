//! `cargo xtask bench soak`: whether the budget holds for long, under a load that changes.
//!
//! Two servers of a kind take turns under the same load, half a second each: one is watched, its twin
//! is not. So whatever the machine does meets both, and what the watched one takes more for a unit is what
//! leakbpf costs. How much the two differ by themselves is measured before leakbpf attaches, and after
//! it is gone.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::agent::{Agent, Tracer};
use super::program;
use super::table::{Samples, Table, figure};
use super::workloads::{Running, Workload};

/// How much of the time there is a load, minute by minute, in turn; and which, where the workload has
/// more than one.
const LEVELS: [(f64, usize); 6] = [(1.0, 0), (0.3, 0), (1.0, 1), (0.05, 0), (0.5, 1), (0.0, 0)];

/// Different loads among the levels.
const KINDS: usize = 2;

/// A load level's time.
const MINUTE: Duration = Duration::from_secs(60);

/// In each of them both twins have their turn: shorter than what the machine's speed drifts in.
const CYCLE: Duration = Duration::from_secs(1);

/// What one of the twins did and took.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    units: f64,
    cpu_seconds: f64,
}

/// Of both, watched and not.
#[derive(Debug, Clone, Copy, Default)]
struct Twins {
    watched: Sum,
    other: Sum,
}

impl Twins {
    fn add(&mut self, more: &Self) {
        for (sum, more) in [(&mut self.watched, &more.watched), (&mut self.other, &more.other)] {
            sum.units += more.units;
            sum.cpu_seconds += more.cpu_seconds;
        }
    }

    /// Processor time of a unit, of the watched one to that of the other; `None` without a load.
    fn ratio(&self) -> Option<f64> {
        let per_unit = |sum: &Sum| sum.cpu_seconds / sum.units;
        (self.watched.units > 0.0 && self.other.units > 0.0)
            .then(|| per_unit(&self.watched) / per_unit(&self.other))
    }
}

struct Soak {
    watched: Running,
    other: Running,
    /// Which of the two is the first in the next cycle.
    turn: bool,
}

impl Soak {
    /// A load level for some time.
    fn run(&mut self, level: (f64, usize), span: Duration) -> Result<Twins> {
        let (share, kind) = level;
        self.watched.choose(kind);
        self.other.choose(kind);
        let burst = CYCLE.mul_f64(share / 2.0);
        let before = (self.watched.cpu_seconds()?, self.other.cpu_seconds()?);
        let mut twins = Twins::default();
        let begin = Instant::now();
        let mut cycles = 0;
        while begin.elapsed() < span {
            if !burst.is_zero() {
                for watched in [self.turn, !self.turn] {
                    let (running, sum) = if watched {
                        (&mut self.watched, &mut twins.watched)
                    } else {
                        (&mut self.other, &mut twins.other)
                    };
                    sum.units += running.measure(burst)?.units;
                }
                self.turn = !self.turn;
            }
            cycles += 1;
            thread::sleep((CYCLE * cycles).saturating_sub(begin.elapsed()));
        }
        twins.watched.cpu_seconds = self.watched.cpu_seconds()? - before.0;
        twins.other.cpu_seconds = self.other.cpu_seconds()? - before.1;
        Ok(twins)
    }

    /// Each kind of load for a while, with nobody watching.
    fn compare(&mut self, minutes: u32, into: &mut [Twins; KINDS]) -> Result<()> {
        for turn in 0..minutes as usize {
            let kind = turn % KINDS;
            let twins = self.run((1.0, kind), MINUTE)?;
            eprintln!("soak: nobody watched, kind {}: {:?}", kind + 1, twins.ratio());
            into.get_mut(kind).context("a kind")?.add(&twins);
        }
        Ok(())
    }
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
    let mut soak = Soak {
        watched: Running::start(workload, &Default::default())?,
        other: Running::start(workload, &Default::default())?,
        turn: true,
    };
    let mut unwatched = [Twins::default(); KINDS];
    eprintln!("soak: {}", workload.name);
    soak.compare(unwatched_minutes, &mut unwatched)?;

    let file = program::folder()?.join(format!("soak-{}.json", workload.name));
    let _ = fs::remove_file(&file);
    let output = file.to_string_lossy().into_owned();
    let mut words = ["-q", "-o", &output].to_vec();
    words.extend(arguments.iter().map(String::as_str));
    let agent = Agent::attach_to_group(Tracer::Record, soak.watched.group(), &words)?;
    let mut by_minute = Vec::new();
    for minute in 0..minutes {
        let number = minute as usize % LEVELS.len();
        let twins = soak.run(LEVELS[number], MINUTE)?;
        eprintln!("soak: minute {} of {minutes}: {:?}", minute + 1, twins.ratio());
        by_minute.push((number, twins));
    }
    agent.stop()?;
    soak.compare(unwatched_minutes, &mut unwatched)?;

    let text = fs::read_to_string(&file).with_context(|| format!("read {output}"))?;
    let report: Value = serde_json::from_str(&text).with_context(|| format!("parse {output}"))?;
    let tables = tables(&by_minute, &unwatched);
    Ok(format!(
        "{}, `leakbpf record {}`, {minutes} minutes, and {unwatched_minutes} before and after with nobody \
         watched:\n\n{tables}\n{}\n",
        workload.title,
        arguments.join(" "),
        said(&report)
    ))
}

/// How much more the watched one took, in percent, beyond what the two differ by.
fn more(twins: &Twins, unwatched: &Twins) -> Option<f64> {
    Some((twins.ratio()? / unwatched.ratio()? - 1.0) * 100.0)
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
        let signed =
            |value: Option<f64>| value.map_or_else(|| figure(None), |value| format!("{value:+.2}"));
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
    use super::*;

    #[test]
    fn what_the_twins_differ_by_themselves_is_no_cost() {
        let twins = |watched, other| Twins {
            watched: Sum { units: 10.0, cpu_seconds: watched },
            other: Sum { units: 20.0, cpu_seconds: other },
        };
        let percent = more(&twins(1.01 * 1.1, 2.0), &twins(1.1, 2.0)).expect("both have units");
        assert!((percent - 1.0).abs() < 1e-9, "{percent}");
        assert_eq!(more(&Twins::default(), &twins(1.0, 1.0)), None);
    }

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
