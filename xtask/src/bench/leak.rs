//! `cargo xtask bench leak`: whether a report names a leak that was planted into a server.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::agent::{Agent, Tracer};
use super::program;
use super::table::Table;
use super::workloads::{Dress, Running, Workload};
use crate::shell;

/// The function of `tests/targets/planted.c` that leaks.
const CULPRIT: &str = "planted_leak";

/// Sites of a report that are told of.
const SHOWN: usize = 5;

/// Before attaching: what a server sets up at first is no leak.
const SETTLING: Duration = Duration::from_secs(5);

const MIB: f64 = 1048576.0;

/// What a report says of the leak.
#[derive(Debug, Default, PartialEq)]
struct Verdict {
    /// Place of the first site that has the culprit on its stack; 1 is the first.
    rank: Option<usize>,
    rank_bytes: u64,
    /// Of all sites that have it.
    planted_bytes: u64,
    planted_sites: usize,
    total_bytes: u64,
    /// Bytes and functions, innermost first.
    first: Vec<(u64, String)>,
}

pub fn run(
    workloads: &[&Workload],
    modes: &[String],
    span: Duration,
    rate_bytes: u64,
    further: &[String],
) -> Result<String> {
    let library = build()?;
    let mut text = format!(
        "{} s, a leak of {:.2} MiB/s in each process that serves{}:\n\n",
        span.as_secs(),
        rate_bytes as f64 / MIB,
        further.iter().map(|word| format!(", `{word}`")).collect::<String>(),
    );
    let mut table = Table::new(&[
        "",
        "rank of the leak",
        "MiB of that site",
        "MiB of the leak's sites",
        "how many",
        "MiB of all",
    ]);
    let mut details = String::new();
    let cases = workloads.iter().flat_map(|workload| modes.iter().map(move |m| (workload, m)));
    for (workload, mode) in cases {
        eprintln!("leak: {}, {mode}", workload.name);
        let mut arguments = ["--mode".to_owned(), mode.clone()].to_vec();
        arguments.extend(further.iter().cloned());
        let dress = Dress {
            preload: Some(library.clone()),
            environment: [("LEAK_RATE_BYTES".to_owned(), rate_bytes.to_string())].to_vec(),
            ..Dress::default()
        };
        let report = report(workload, &dress, span, &arguments)?;
        let verdict = judge(&report).context("the report is not as docs/json.md says")?;
        let mib = |bytes: u64| format!("{:.1}", bytes as f64 / MIB);
        table.row(
            &format!("{}, `{mode}`", workload.title),
            &[
                verdict.rank.map_or_else(|| "none".to_owned(), |rank| rank.to_string()),
                mib(verdict.rank_bytes),
                mib(verdict.planted_bytes),
                verdict.planted_sites.to_string(),
                mib(verdict.total_bytes),
            ],
        );
        let _ = writeln!(details, "\n{}, {mode}:", workload.title);
        for (bytes, functions) in &verdict.first {
            let _ = writeln!(details, "  {:>7} MiB  {functions}", mib(*bytes));
        }
    }
    eprintln!("{details}");
    text.push_str(table.text());
    Ok(text)
}

fn build() -> Result<PathBuf> {
    let library = program::folder()?.join("planted.so");
    shell::run(
        Command::new("gcc")
            .args(["-O2", "-g", "-Wall", "-fPIC", "-shared", "-D_GNU_SOURCE", "-o"])
            .arg(&library)
            .arg(shell::root().join("tests/targets/planted.c")),
    )?;
    Ok(library)
}

fn report(
    workload: &Workload,
    dress: &Dress,
    span: Duration,
    arguments: &[String],
) -> Result<Value> {
    /// For attaching and for the report.
    const MARGIN: Duration = Duration::from_secs(10);
    let file = program::folder()?.join(format!("leak-{}.json", workload.name));
    let _ = fs::remove_file(&file);
    let mut running = Running::start(workload, dress)?;
    let seconds = span.as_secs().to_string();
    running.under_load(SETTLING + span + MARGIN, |group| {
        std::thread::sleep(SETTLING);
        let output = file.to_string_lossy();
        let mut words = ["-q", "-d", &seconds, "-o", &output].to_vec();
        words.extend(arguments.iter().map(String::as_str));
        let agent = Agent::attach_to_group(Tracer::Record, group, &words)?;
        agent.finish(span + 6 * MARGIN)
    })?;
    read(&file)
}

fn read(file: &Path) -> Result<Value> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parse {}", file.display()))
}

fn judge(report: &Value) -> Option<Verdict> {
    let mut verdict =
        Verdict { total_bytes: report["totals"]["live_bytes"].as_u64()?, ..Verdict::default() };
    for (place, site) in report["sites"].as_array()?.iter().enumerate() {
        let bytes = site["live_bytes"].as_u64()?;
        let functions: Vec<&str> = site["frames"]
            .as_array()?
            .iter()
            .map(|frame| frame["function"].as_str().unwrap_or("?"))
            .collect();
        if functions.contains(&CULPRIT) {
            verdict.planted_bytes += bytes;
            verdict.planted_sites += 1;
            if verdict.rank.is_none() {
                verdict.rank = Some(place + 1);
                verdict.rank_bytes = bytes;
            }
        }
        if place < SHOWN {
            let outcome = site["stack_outcome"].as_str().unwrap_or_default();
            let line = format!("{} ({outcome}, pid {})", functions.join(" < "), site["pid"]);
            verdict.first.push((bytes, line));
        }
    }
    Some(verdict)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leak_is_found_where_it_is() {
        let site = |bytes: u64, function: &str| {
            serde_json::json!({"live_bytes": bytes, "pid": 1, "stack_outcome": "complete",
                "frames": [{"function": "malloc"}, {"function": function}, {"function": null}]})
        };
        let report = serde_json::json!({"totals": {"live_bytes": 16},
            "sites": [site(9, "other"), site(4, CULPRIT), site(3, CULPRIT)]});
        let verdict = judge(&report).expect("a report");
        assert_eq!((verdict.rank, verdict.rank_bytes), (Some(2), 4));
        assert_eq!((verdict.planted_bytes, verdict.planted_sites), (7, 2));
        assert_eq!(verdict.first.len(), 3);
        assert!(judge(&serde_json::json!({})).is_none());
    }
}
