//! `cargo xtask bench compare`: the same work, untraced and under each tool, in turn.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;

use super::table::{Samples, Table, figure, ratio};
use super::tools::{self, Tool, Way};
use super::workloads::{Running, Slice, Workload};

#[derive(Default)]
struct Column {
    cpu_us_per_unit: Samples,
    units_per_second: Samples,
    p99_us: Samples,
    /// Of one processor's time.
    agent_percent: Samples,
    /// Why there is no more.
    failure: Option<String>,
}

impl Column {
    fn push(&mut self, slice: &Slice, agent_seconds: Option<f64>) {
        self.cpu_us_per_unit.push(slice.cpu_us_per_unit());
        self.units_per_second.push(slice.units_per_second());
        if let Some(p99_us) = slice.p99_us {
            self.p99_us.push(p99_us);
        }
        if let Some(seconds) = agent_seconds {
            self.agent_percent.push(seconds / slice.seconds * 100.0);
        }
    }
}

pub fn run(workloads: &[&Workload], rounds: usize, span: Duration) -> Result<String> {
    let mut text = format!("{}\n", tools::versions());
    let mut failures = Failures::default();
    for workload in workloads {
        text.push('\n');
        text.push_str(&table(workload, rounds, span, &mut failures)?);
    }
    if !failures.0.is_empty() {
        text.push_str("\nNot measured:\n\n");
    }
    for (what, workloads) in failures.0 {
        let _ = writeln!(text, "- {what} ({})", workloads.join(", "));
    }
    Ok(text)
}

/// Which tool could not, and why, with the workloads.
#[derive(Default)]
struct Failures(Vec<(String, Vec<&'static str>)>);

impl Failures {
    fn push(&mut self, what: String, workload: &'static str) {
        match self.0.iter_mut().find(|(known, _)| *known == what) {
            Some((_, workloads)) => workloads.push(workload),
            None => self.0.push((what, [workload].to_vec())),
        }
    }
}

fn table(
    workload: &Workload,
    rounds: usize,
    span: Duration,
    failures: &mut Failures,
) -> Result<String> {
    let mut columns = tools::ALL.map(|tool| (tool, Column::default()));
    let mut running = Running::start(workload, &tools::Tool::Nothing.dress())?;
    for round in 0..rounds {
        eprintln!("compare: {}, round {} of {rounds}", workload.name, round + 1);
        for (tool, column) in &mut columns {
            if column.failure.is_some() {
                continue;
            }
            let measured = match tool.way(workload) {
                Way::Attach => under(*tool, &mut running, span),
                Way::Start => Running::start(workload, &tool.dress())
                    .and_then(|mut dressed| under(*tool, &mut dressed, span)),
                Way::Never(reason) => Err(anyhow::anyhow!(reason)),
            };
            match measured {
                Ok((slice, agent_seconds)) => column.push(&slice, agent_seconds),
                Err(error) => column.failure = Some(format!("{error:#}")),
            }
        }
    }

    let unit = workload.unit;
    let mut table = Table::new(&[
        workload.title,
        &format!("µs CPU a {unit}"),
        "of untraced",
        &format!("{unit}s/s"),
        "of untraced",
        "p99, µs",
        "agent, % of a CPU",
    ]);
    let [(_, untraced), ..] = &columns;
    let (cpu, rate) = (untraced.cpu_us_per_unit.median(), untraced.units_per_second.median());
    for (tool, column) in &columns {
        if let Some(failure) = &column.failure {
            failures.push(format!("{}: {failure}", tool.title()), workload.name);
        }
        let (own_cpu, own_rate) =
            (column.cpu_us_per_unit.median(), column.units_per_second.median());
        if own_cpu.is_none() {
            continue;
        }
        table.row(
            tool.title(),
            &[
                figure(own_cpu),
                ratio(own_cpu, cpu),
                figure(own_rate),
                ratio(own_rate, rate),
                figure(column.p99_us.median()),
                figure(column.agent_percent.median()),
            ],
        );
    }
    Ok(table.text().to_owned())
}

/// A slice under the tool, and what the tool's own process took meanwhile.
fn under(tool: Tool, running: &mut Running, span: Duration) -> Result<(Slice, Option<f64>)> {
    let attached = tool.attach(running.group())?;
    let before = attached.cpu_seconds()?;
    let slice = running.measure(span)?;
    let after = attached.cpu_seconds()?;
    attached.stop()?;
    Ok((slice, after.zip(before).map(|(after, before)| after - before)))
}
