//! memcached (glibc) under two connections that each wait for every answer: as many sets as gets, of
//! values of 64 to 2047 bytes, more of them than fit.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Kind, Load, Place, Shape, Work, Workload, loader, text};
use crate::shell;

pub const MEMCACHED: Workload = Workload {
    name: "memcached",
    title: "memcached, 1 set to 1 get",
    unit: "request",
    kind: Kind::Server,
    shape: Shape::OneProcess,
    begin,
};

struct Memcached {
    socket: PathBuf,
}

fn begin(place: &Place) -> Result<Box<dyn Load>> {
    let socket = place.folder.join("memcached");
    let words =
        place.dressed(&["memcached", "-u", "root", "-t", "2", "-m", "64", "-s", &text(&socket)]);
    place.serve(&words, || UnixStream::connect(&socket).is_ok())?;
    Ok(Box::new(Memcached { socket }))
}

impl Load for Memcached {
    fn run(&mut self, span: Duration) -> Result<Work> {
        // In a process of its own, which stays on the loader's processor.
        let own = std::env::current_exe().context("the path of this program")?;
        let output = shell::output(
            loader(&text(&own))
                .args(["bench", "load-memcached"])
                .arg(&self.socket)
                .arg(span.as_millis().to_string()),
        )?;
        let mut numbers = output.split(' ').map_while(|number| number.parse::<f64>().ok());
        match (numbers.next(), numbers.next()) {
            (Some(units), Some(p99_us)) => Ok(Work { units, p99_us: Some(p99_us) }),
            _ => bail!("the load's output: {output}"),
        }
    }
}

/// Loads the server behind the socket, and prints the number of requests and the longest time of 99
/// in 100 of them, in microseconds.
pub fn load_until(socket: &Path, span: Duration) -> Result<()> {
    const CONNECTIONS: u64 = 2;
    let end = Instant::now() + span;
    let results: Vec<Result<Vec<u32>>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..CONNECTIONS)
            .map(|number| scope.spawn(move || connection(socket, number, end)))
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<Vec<u32>>>| {
            thread.join().unwrap_or_else(|_| bail!("a loader thread panicked"))
        };
        threads.into_iter().map(join).collect()
    });
    let mut times_ns = results.into_iter().collect::<Result<Vec<_>>>()?.concat();
    let place = times_ns.len().saturating_sub(1) * 99 / 100;
    let (_, &mut p99_ns, _) = times_ns.select_nth_unstable(place);
    println!("{} {}", times_ns.len(), f64::from(p99_ns) / 1e3);
    Ok(())
}

/// Returns the nanoseconds of each request, at least one.
fn connection(socket: &Path, number: u64, end: Instant) -> Result<Vec<u32>> {
    const KEYS: u64 = 100_000;
    let mut stream = UnixStream::connect(socket)?;
    let mut answers = BufReader::new(stream.try_clone()?);
    let values = "v".repeat(2048);
    let (mut request, mut line) = (String::new(), String::new());
    // Not always the same requests: the keys of one load would all be there in the next.
    let seed = std::time::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_nanos() as u64);
    let mut random = seed ^ number;
    let mut times_ns = Vec::new();
    loop {
        use std::fmt::Write as _;
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let key = (random >> 33) % KEYS;
        request.clear();
        let last = if (random >> 62) & 1 == 0 {
            let value = &values[..64 + (random >> 40) as usize % 1984];
            write!(request, "set k{key} 0 0 {}\r\n{value}\r\n", value.len())?;
            "STORED"
        } else {
            write!(request, "get k{key}\r\n")?;
            "END"
        };
        let begin = Instant::now();
        if begin >= end && !times_ns.is_empty() {
            return Ok(times_ns);
        }
        stream.write_all(request.as_bytes())?;
        loop {
            line.clear();
            if answers.read_line(&mut line)? == 0 {
                bail!("memcached closed the connection");
            }
            if line.trim_end() == last {
                break;
            }
            if line.contains("ERROR") {
                bail!("memcached said {}", line.trim_end());
            }
        }
        times_ns.push(u32::try_from(begin.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
}
