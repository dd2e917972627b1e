//! Two servers of a kind under the same load at the same time, on one processor: one is watched, its twin
//! is not. So whatever the machine does meets both within milliseconds, and what the watched one takes more
//! for a unit is what leakbpf costs, beyond what the two differ by themselves.
//!
//! `cargo xtask bench twins` measures that over sessions under full load, between times as long in which
//! nobody watches.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::agent::{Agent, Tracer};
use super::program;
use super::table::{Samples, Table, figure, signed};
use super::workloads::{Running, Workload};

/// A share of each is load; connections stay for so long.
const CYCLE: Duration = Duration::from_secs(10);

/// What one of the twins did and took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum {
    pub units: f64,
    pub cpu_seconds: f64,
}

/// Of both, watched and not.
#[derive(Debug, Clone, Copy, Default)]
pub struct Twins {
    pub watched: Sum,
    pub other: Sum,
}

impl Twins {
    pub fn add(&mut self, more: &Self) {
        for (sum, more) in [(&mut self.watched, &more.watched), (&mut self.other, &more.other)] {
            sum.units += more.units;
            sum.cpu_seconds += more.cpu_seconds;
        }
    }

    /// Processor time of a unit, of the watched one to that of the other; `None` without a load.
    pub fn ratio(&self) -> Option<f64> {
        let per_unit = |sum: &Sum| sum.cpu_seconds / sum.units;
        (self.watched.units > 0.0 && self.other.units > 0.0)
            .then(|| per_unit(&self.watched) / per_unit(&self.other))
    }
}

/// The two servers.
pub struct Pair {
    name: &'static str,
    watched: Running,
    other: Running,
}

impl Pair {
    pub fn start(workload: &Workload) -> Result<Self> {
        Ok(Self {
            name: workload.name,
            watched: Running::start(workload, &Default::default())?,
            other: Running::start(workload, &Default::default())?,
        })
    }

    /// A load of such a kind for such a share of the time.
    pub fn run(&mut self, (share, kind): (f64, usize), span: Duration) -> Result<Twins> {
        self.watched.choose(kind);
        self.other.choose(kind);
        let burst = CYCLE.mul_f64(share);
        let before = (self.watched.cpu_seconds()?, self.other.cpu_seconds()?);
        let mut twins = Twins::default();
        let begin = Instant::now();
        let mut cycles = 0;
        while begin.elapsed() < span {
            if !burst.is_zero() {
                let (watched, other) = thread::scope(|scope| {
                    let other = scope.spawn(|| self.other.measure(burst));
                    (self.watched.measure(burst), other.join())
                });
                let Ok(other) = other else { bail!("the loader panicked") };
                twins.watched.units += watched?.units;
                twins.other.units += other?.units;
            }
            cycles += 1;
            thread::sleep((CYCLE * cycles).saturating_sub(begin.elapsed()));
        }
        twins.watched.cpu_seconds = self.watched.cpu_seconds()? - before.0;
        twins.other.cpu_seconds = self.other.cpu_seconds()? - before.1;
        Ok(twins)
    }

    /// leakbpf attaches to one of them.
    pub fn watch(&self, arguments: &[String]) -> Result<Watching> {
        let file = program::folder()?.join(format!("twins-{}.json", self.name));
        let _ = fs::remove_file(&file);
        let output = file.to_string_lossy().into_owned();
        let mut words = ["-q", "-o", &output].to_vec();
        words.extend(arguments.iter().map(String::as_str));
        let agent = Agent::attach_to_group(Tracer::Record, self.watched.group(), &words)?;
        Ok(Watching { agent, file })
    }
}

/// While leakbpf watches.
pub struct Watching {
    agent: Agent,
    file: PathBuf,
}

impl Watching {
    /// Its report.
    pub fn stop(self) -> Result<Value> {
        self.agent.stop()?;
        let name = self.file.display();
        let text = fs::read_to_string(&self.file).with_context(|| format!("read {name}"))?;
        serde_json::from_str(&text).with_context(|| format!("parse {name}"))
    }
}

/// How much more the watched one took, in percent, beyond what the two differ by.
pub fn more(twins: &Twins, unwatched: &Twins) -> Option<f64> {
    Some((twins.ratio()? / unwatched.ratio()? - 1.0) * 100.0)
}

/// One row for each of the workloads.
pub fn run(
    workloads: &[&'static Workload],
    rounds: u32,
    seconds: u32,
    arguments: &[String],
) -> Result<String> {
    ensure!(rounds > 0 && seconds > 0, "at least one round of one second");
    let mut table = Table::new(&[
        "",
        "µs CPU a unit, not watched",
        "more when watched, %: median",
        "least",
        "most",
        "noise: the same of unwatched ones, %: median",
        "least",
        "most",
        "leakbpf's own estimate, %: median",
        "modes at the end",
    ]);
    for workload in workloads {
        table.row(workload.title, &row(workload, rounds, seconds, arguments)?);
    }
    Ok(format!(
        "`leakbpf record {}`, {rounds} sessions of {seconds} s, and as long with nobody watching before, \
         between and after them:\n\n{}",
        arguments.join(" "),
        table.text()
    ))
}

fn row(
    workload: &Workload,
    rounds: u32,
    seconds: u32,
    arguments: &[String],
) -> Result<Vec<String>> {
    const FULL: (f64, usize) = (1.0, 0);
    let span = Duration::from_secs(seconds.into());
    let mut pair = Pair::start(workload)?;
    let (mut cost, mut estimates, mut modes) = (Samples::default(), Samples::default(), Vec::new());
    let mut other = Sum::default();
    let mut unwatched = vec![pair.run(FULL, span)?];
    for round in 1..=rounds {
        let watching = pair.watch(arguments)?;
        let watched = pair.run(FULL, span)?;
        let report = watching.stop()?;
        let after = pair.run(FULL, span)?;

        let before = unwatched.last().context("one before")?;
        let percent = more(&watched, &sum(before, &after)).context("it had no load")?;
        cost.push(percent);
        let estimate = report["cost"]["overhead_percent"].as_f64();
        estimate.into_iter().for_each(|percent| estimates.push(percent));
        let mode = report["mode"].as_str().unwrap_or("?").to_owned();
        eprintln!("twins: {}, round {round}: {percent:+.2} %, {mode}", workload.name);
        if !modes.contains(&mode) {
            modes.push(mode);
        }
        other.units += watched.other.units;
        other.cpu_seconds += watched.other.cpu_seconds;
        unwatched.push(after);
    }
    let noise = noise(&unwatched);
    Ok(vec![
        figure(Some(other.cpu_seconds * 1e6 / other.units)),
        signed(cost.median()),
        signed(cost.min()),
        signed(cost.max()),
        signed(noise.median()),
        signed(noise.min()),
        signed(noise.max()),
        figure(estimates.median()),
        modes.join(", "),
    ])
}

/// What [`more`] gives for those that nobody watched, each against its two neighbours.
fn noise(unwatched: &[Twins]) -> Samples {
    let mut noise = Samples::default();
    for three in unwatched.windows(3) {
        more(&three[1], &sum(&three[0], &three[2])).into_iter().for_each(|it| noise.push(it));
    }
    noise
}

fn sum(one: &Twins, other: &Twins) -> Twins {
    let mut sum = *one;
    sum.add(other);
    sum
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
    fn an_even_drift_is_no_noise() {
        let at = |ratio: f64| Twins {
            watched: Sum { units: 1.0, cpu_seconds: ratio },
            other: Sum { units: 1.0, cpu_seconds: 1.0 },
        };
        let noise = noise(&[at(1.0), at(1.1), at(1.2), at(1.0)]);
        assert!(noise.min().expect("two").abs() < 1e-9);
        assert!((noise.max().expect("two") - 100.0 * (1.2 / 1.05 - 1.0)).abs() < 1e-9);
    }
}
