//! `cargo xtask bench overhead`: processor time of a unit of work with and without leakbpf.
//!
//! The machine's speed drifts by more than what is to be found. So slices are short, and a quarter
//! of them in turn are untraced, traced, traced, untraced: a drift that is even over the four
//! cancels out. Between those come fours of which none is traced and which are computed the same
//! way: what they differ by is noise. Other work on the machine only ever adds to a slice's time
//! (caches, the other hyperthread), so the least of all slices of a kind are compared as well.

use std::time::Duration;

use anyhow::Result;

use super::table::{Samples, Table, figure, signed};
use super::tools::Attached;
use super::workloads::{Running, Slice, Workload};

/// What fours of slices gave.
#[derive(Default)]
struct Fours {
    cpu_us_per_unit: Samples,
    /// How much more the middle two took than the outer two.
    more_percent: Samples,
    /// Of each of the outer two and of the middle two.
    outer_slices: Samples,
    middle_slices: Samples,
    agent_percent: Samples,
    /// Of the middle two's 99th percentile to that of the outer two.
    p99_more_percent: Samples,
}

impl Fours {
    fn more_by_least(&self) -> Option<f64> {
        Some((self.middle_slices.min()? / self.outer_slices.min()? - 1.0) * 100.0)
    }
}

pub fn run(
    workloads: &[&Workload],
    rounds: usize,
    span: Duration,
    arguments: &[String],
) -> Result<String> {
    let mut text = format!(
        "`leakbpf record {}`, {rounds} rounds of slices of {} s:\n\n",
        arguments.join(" "),
        span.as_secs_f64(),
    );
    let mut table = Table::new(&[
        "",
        "µs CPU a unit untraced",
        "more when traced, %",
        "least to most",
        "by the least slices",
        "noise: more when not, %",
        "least to most",
        "by the least slices",
        "p99 more, %",
        "agent, % of a CPU",
    ]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    for workload in workloads {
        let mut running = Running::start(workload, &Default::default())?;
        let (mut traced, mut untraced) = (Fours::default(), Fours::default());
        for round in 0..rounds {
            eprintln!("overhead: {}, round {} of {rounds}", workload.name, round + 1);
            four(&mut running, span, None, &mut untraced)?;
            four(&mut running, span, Some(&arguments), &mut traced)?;
        }
        table.row(
            &format!("{}, a {}", workload.title, workload.unit),
            &[
                figure(untraced.cpu_us_per_unit.median()),
                signed(traced.more_percent.median()),
                range(&traced.more_percent),
                signed(traced.more_by_least()),
                signed(untraced.more_percent.median()),
                range(&untraced.more_percent),
                signed(untraced.more_by_least()),
                signed(traced.p99_more_percent.median()),
                figure(traced.agent_percent.median()),
            ],
        );
    }
    text.push_str(table.text());
    Ok(text)
}

fn four(
    running: &mut Running,
    span: Duration,
    arguments: Option<&[&str]>,
    fours: &mut Fours,
) -> Result<()> {
    let first = running.measure(span)?;
    let agent = arguments.map(|words| Attached::leakbpf(running.group(), words)).transpose()?;
    let agent_seconds = |agent: &Option<Attached>| -> Result<f64> {
        let seconds = agent.as_ref().map(Attached::cpu_seconds).transpose()?;
        Ok(seconds.flatten().unwrap_or_default())
    };
    let before = agent_seconds(&agent)?;
    let middle = [running.measure(span)?, running.measure(span)?];
    let spent = agent_seconds(&agent)? - before;
    if let Some(agent) = agent {
        agent.stop()?;
    }
    let outer = [first, running.measure(span)?];
    for (slices, samples) in
        [(&outer, &mut fours.outer_slices), (&middle, &mut fours.middle_slices)]
    {
        slices.iter().for_each(|slice| samples.push(slice.cpu_us_per_unit()));
    }
    fours.cpu_us_per_unit.push(cpu_us_per_unit(&outer));
    fours.more_percent.push((cpu_us_per_unit(&middle) / cpu_us_per_unit(&outer) - 1.0) * 100.0);
    let seconds: f64 = middle.iter().map(|slice| slice.seconds).sum();
    fours.agent_percent.push(spent / seconds * 100.0);
    if let (Some(middle), Some(outer)) = (p99_us(&middle), p99_us(&outer)) {
        fours.p99_more_percent.push((middle / outer - 1.0) * 100.0);
    }
    Ok(())
}

fn cpu_us_per_unit(slices: &[Slice; 2]) -> f64 {
    let seconds: f64 = slices.iter().map(|slice| slice.cpu_seconds).sum();
    let units: f64 = slices.iter().map(|slice| slice.units).sum();
    seconds * 1e6 / units
}

fn p99_us(slices: &[Slice; 2]) -> Option<f64> {
    let [first, second] = slices;
    Some((first.p99_us? + second.p99_us?) / 2.0)
}

fn range(samples: &Samples) -> String {
    format!("{} to {}", signed(samples.min()), signed(samples.max()))
}
