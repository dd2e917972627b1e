//! redis-server (jemalloc) under redis-benchmark: 20 connections, 64-byte values, 100,000 keys.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Kind, Load, Place, Shape, Work, Workload, loader, text};
use crate::shell;

pub const REDIS: Workload = Workload {
    name: "redis",
    title: "redis SET",
    unit: "request",
    kind: Kind::Server,
    shape: Shape::OneProcess,
    begin: |place| begin(place, "1"),
};

pub const PIPELINED: Workload = Workload {
    name: "redis-pipelined",
    title: "redis SET, pipelined by 16",
    unit: "request",
    kind: Kind::Server,
    shape: Shape::OneProcess,
    begin: |place| begin(place, "16"),
};

struct Redis {
    socket: PathBuf,
    /// Requests in a row before an answer is awaited.
    pipeline: &'static str,
}

fn begin(place: &Place, pipeline: &'static str) -> Result<Box<dyn Load>> {
    let socket = place.folder.join("redis");
    let words = place.dressed(&[
        "redis-server",
        "--port",
        "0",
        "--save",
        "",
        "--appendonly",
        "no",
        "--unixsocket",
        &text(&socket),
    ]);
    place.serve(&words, || UnixStream::connect(&socket).is_ok())?;
    Ok(Box::new(Redis { socket, pipeline }))
}

impl Load for Redis {
    /// redis-benchmark takes a number of requests and no time: it is asked for what fits, again and
    /// again.
    fn run(&mut self, span: Duration) -> Result<Work> {
        const FIRST: f64 = 3000.0;
        const LONGEST: Duration = Duration::from_secs(2);
        let begin = Instant::now();
        let (mut units, mut count) = (0.0, FIRST);
        loop {
            let (rate, p99_us) = self.requests(count as u64)?;
            units += count;
            let rest = span.saturating_sub(begin.elapsed()).min(LONGEST);
            count = (rate * rest.as_secs_f64()).floor();
            if count < FIRST {
                return Ok(Work { units, p99_us: Some(p99_us) });
            }
        }
    }

    fn choose(&mut self, kind: usize) {
        self.pipeline = if kind == 0 { "1" } else { "16" };
    }
}

impl Redis {
    /// Returns the requests a second, and the longest time of 99 in 100, in microseconds.
    fn requests(&self, count: u64) -> Result<(f64, f64)> {
        let output = shell::output(
            loader("redis-benchmark")
                .args(["-t", "set", "-c", "20", "-r", "100000", "-d", "64", "--csv", "-s"])
                .arg(&self.socket)
                .args(["-P", self.pipeline, "-n", &count.to_string()]),
        )?;
        parse(&output).with_context(|| format!("redis-benchmark's output: {output}"))
    }
}

/// Of `"test","rps","avg…","min…","p50…","p95…","p99…","max…"`.
fn parse(output: &str) -> Option<(f64, f64)> {
    let line = output.lines().find(|line| line.starts_with("\"SET\""))?;
    let mut fields = line.split(',').map(|field| field.trim_matches('"').parse::<f64>());
    let rate = fields.nth(1)?.ok()?;
    let p99_ms = fields.nth(4)?.ok()?;
    Some((rate, p99_ms * 1e3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_p99_come_from_the_line_of_the_test() {
        let output = "\"test\",\"rps\"\n\"SET\",\"120.50\",\"1\",\"2\",\"3\",\"4\",\"0.5\",\"6\"\n";
        assert_eq!(parse(output), Some((120.5, 500.0)));
        assert_eq!(parse(""), None);
    }
}
