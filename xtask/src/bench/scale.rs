//! Start-up, and what a million live blocks cost.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use super::agent::{self, Agent, Tracer};
use super::program::{self, Program};
use super::table::{Samples, Table, figure};

const BLOCKS: u64 = 1_000_000;
const SITES: [u64; 2] = [16, 10_000];
const MB: f64 = 1e6;

pub fn run(rounds: usize) -> Result<String> {
    let mut text = attach(rounds)?;
    text.push('\n');
    text.push_str(&scale(rounds)?);
    Ok(text)
}

fn attach(rounds: usize) -> Result<String> {
    let path = program::build("pair")?;
    let (mut agents_own, mut from_outside, mut stop) =
        (Samples::default(), Samples::default(), Samples::default());
    let mut program = Program::start(&path, &[], None)?;
    program.order(1, 0)?;
    for round in 0..rounds * 2 {
        eprintln!("attach: round {} of {}", round + 1, rounds * 2);
        let agent = Agent::attach(Tracer::Exact, program.pid(), &[])?;
        agents_own.push(agent.attach_ms.context("leakbpf did not say how long attaching took")?);
        from_outside.push(agent.seen_ms);
        stop.push(agent.stop()?.0.as_secs_f64() * 1e3);
    }
    let mut table = Table::new(&["a glibc process, in milliseconds", "min", "median"]);
    for (name, samples) in [
        ("start of leakbpf until all probes count, as it says", &agents_own),
        ("the same, as seen from outside", &from_outside),
        ("Ctrl-C until detached, reported and ended", &stop),
    ] {
        table.row(name, &[figure(samples.min()), figure(samples.median())]);
    }
    Ok(table.text().to_owned())
}

/// Medians of several runs.
#[derive(Default)]
struct Scale {
    peak_mb: Samples,
    maps_mb: Samples,
    final_report_s: Samples,
    report_s: Samples,
    blocks_report_s: Samples,
    recording_mb: Samples,
}

fn scale(rounds: usize) -> Result<String> {
    let path = program::build("hold")?;
    let mut columns = Vec::new();
    for sites in SITES {
        let mut measured = Scale::default();
        for round in 0..rounds.div_ceil(2) {
            eprintln!("scale: {BLOCKS} blocks, {sites} sites, round {}", round + 1);
            measure(&path, sites, &mut measured)?;
        }
        columns.push(measured);
    }
    let mut table = Table::new(&["1,000,000 live blocks", "16 sites", "10,000 sites"]);
    let row = |name: &str, of: fn(&Scale) -> &Samples, table: &mut Table| {
        let figures: Vec<String> =
            columns.iter().map(|column| figure(of(column).median())).collect();
        table.row(name, &figures);
    };
    row("agent's largest resident set, MB", |s| &s.peak_mb, &mut table);
    row("BPF maps, MB", |s| &s.maps_mb, &mut table);
    row("Ctrl-C until walked, recorded, detached and ended, s", |s| &s.final_report_s, &mut table);
    row("the recording, MB", |s| &s.recording_mb, &mut table);
    row("report of the recording as JSON, s", |s| &s.report_s, &mut table);
    row("the same with every block, s", |s| &s.blocks_report_s, &mut table);
    Ok(table.text().to_owned())
}

fn measure(path: &std::path::Path, sites: u64, measured: &mut Scale) -> Result<()> {
    let recording = program::folder()?.join("scale.lbpf");
    let recording_text = recording.to_string_lossy();
    let _ = std::fs::remove_file(&recording);
    let mut program = Program::start(path, &[], None)?;
    let agent = Agent::attach(Tracer::Exact, program.pid(), &["-o", &recording_text])?;
    program.order(BLOCKS, sites)?;
    measured.maps_mb.push(agent.map_bytes()? as f64 / MB);
    let (final_report, peak_bytes) = agent.stop()?;
    measured.final_report_s.push(final_report.as_secs_f64());
    measured.peak_mb.push(peak_bytes as f64 / MB);
    let size = std::fs::metadata(&recording).context("the recording")?.len();
    measured.recording_mb.push(size as f64 / MB);
    measured.report_s.push(report_seconds(&recording_text, &[])?);
    measured.blocks_report_s.push(report_seconds(&recording_text, &["--blocks"])?);
    Ok(())
}

fn report_seconds(recording: &str, arguments: &[&str]) -> Result<f64> {
    let output = program::folder()?.join("scale.json");
    let begin = Instant::now();
    crate::shell::output(
        Command::new(agent::binary())
            .args(["report", recording, "--format", "json", "-o"])
            .arg(output)
            .args(arguments),
    )?;
    Ok(begin.elapsed().as_secs_f64())
}
