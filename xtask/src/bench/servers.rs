//! Servers under load: requests a second and processor time a request, with and without leakbpf.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::agent::{Agent, Tracer};
use super::program;
use super::table::{Samples, Table, figure, ratio};
use crate::shell;

/// One kind of load on one server.
struct Case {
    name: &'static str,
    server: Server,
    /// Requests in a row before an answer is awaited.
    pipeline: u32,
    requests: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Server {
    Redis,
    Memcached,
}

const CASES: [Case; 3] = [
    Case { name: "redis SET", server: Server::Redis, pipeline: 1, requests: 150_000 },
    Case {
        name: "redis SET, pipelined by 16",
        server: Server::Redis,
        pipeline: 16,
        requests: 600_000,
    },
    Case {
        name: "memcached, 1 set to 9 get",
        server: Server::Memcached,
        pipeline: 1,
        requests: 150_000,
    },
];

const TRACERS: [(Tracer, &str); 2] = [(Tracer::Exact, ""), (Tracer::Pages, ", `--mode pages`")];

/// One run of a load.
struct Load {
    requests_per_second: f64,
    cpu_us_per_request: f64,
}

#[derive(Default)]
struct Loads {
    requests_per_second: Samples,
    cpu_us_per_request: Samples,
}

impl Loads {
    fn push(&mut self, load: &Load) {
        self.requests_per_second.push(load.requests_per_second);
        self.cpu_us_per_request.push(load.cpu_us_per_request);
    }
}

pub fn run(rounds: usize) -> Result<String> {
    let mut table = Table::new(&[
        "",
        "requests/s untraced",
        "traced",
        "of untraced",
        "µs CPU a request untraced",
        "traced",
        "of untraced",
    ]);
    for case in &CASES {
        let running = Running::start(case.server)?;
        let mut untraced = Loads::default();
        let mut traced = TRACERS.map(|(tracer, what)| (tracer, what, Loads::default()));
        // Fills the key space, so that both see the same mix of new and replaced values.
        running.load(case)?;
        for round in 0..rounds {
            eprintln!("servers: {}, round {} of {rounds}", case.name, round + 1);
            untraced.push(&running.load(case)?);
            for (tracer, _, traced) in &mut traced {
                let agent = Agent::attach(*tracer, running.pid(), &[])?;
                traced.push(&running.load(case)?);
                agent.stop()?;
            }
        }
        for (_, what, traced) in &traced {
            let rates = [&untraced, traced].map(|loads| loads.requests_per_second.median());
            let times = [&untraced, traced].map(|loads| loads.cpu_us_per_request.median());
            table.row(
                &format!("{}{what}", case.name),
                &[
                    figure(rates[0]),
                    figure(rates[1]),
                    ratio(rates[1], rates[0]),
                    figure(times[0]),
                    figure(times[1]),
                    ratio(times[1], times[0]),
                ],
            );
        }
    }
    Ok(table.text().to_owned())
}

struct Running {
    process: Child,
    socket: PathBuf,
}

impl Running {
    fn start(server: Server) -> Result<Self> {
        // Socket paths are limited to 107 bytes, so not below the workspace.
        let socket =
            std::env::temp_dir().join(format!("leakbpf-bench-{}.sock", std::process::id()));
        let _ = fs::remove_file(&socket);
        let mut command = match server {
            Server::Redis => {
                let mut command = Command::new("redis-server");
                command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]);
                command.arg(&socket);
                command
            }
            Server::Memcached => {
                let mut command = Command::new("memcached");
                command.args(["-u", "root", "-t", "2", "-s"]).arg(&socket);
                command
            }
        };
        command.current_dir(program::folder()?);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let running = Self { process, socket };
        let begin = Instant::now();
        while UnixStream::connect(&running.socket).is_err() {
            if begin.elapsed() > Duration::from_secs(10) {
                bail!("{command:?} does not answer");
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(running)
    }

    fn pid(&self) -> u32 {
        self.process.id()
    }

    fn load(&self, case: &Case) -> Result<Load> {
        let before = cpu_seconds(self.pid())?;
        let requests_per_second = match case.server {
            Server::Redis => redis_benchmark(&self.socket, case)?,
            Server::Memcached => memcached_load(&self.socket, case)?,
        };
        let cpu_seconds = cpu_seconds(self.pid())? - before;
        Ok(Load {
            requests_per_second,
            cpu_us_per_request: cpu_seconds * 1e6 / f64::from(case.requests),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

fn redis_benchmark(socket: &Path, case: &Case) -> Result<f64> {
    let output = shell::output(
        Command::new("redis-benchmark")
            .args(["-t", "set", "-c", "20", "-r", "100000", "-d", "64", "--csv", "-s"])
            .arg(socket)
            .args(["-P", &case.pipeline.to_string(), "-n", &case.requests.to_string()]),
    )?;
    let rate = output
        .lines()
        .find_map(|line| line.strip_prefix("\"SET\",\"")?.split('"').next()?.parse().ok());
    rate.with_context(|| format!("redis-benchmark's output: {output}"))
}

/// Two connections that each wait for every answer.
fn memcached_load(socket: &Path, case: &Case) -> Result<f64> {
    const CONNECTIONS: u32 = 2;
    let begin = Instant::now();
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..CONNECTIONS)
            .map(|seed| {
                scope.spawn(move || memcached_connection(socket, seed, case.requests / CONNECTIONS))
            })
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<()>>| {
            thread.join().unwrap_or_else(|_| bail!("a loader thread panicked"))
        };
        threads.into_iter().map(join).collect()
    });
    let seconds = begin.elapsed().as_secs_f64();
    results.into_iter().collect::<Result<()>>()?;
    Ok(f64::from(case.requests) / seconds)
}

fn memcached_connection(socket: &Path, seed: u32, requests: u32) -> Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    let mut answers = BufReader::new(stream.try_clone()?);
    let value = "v".repeat(64);
    let mut line = String::new();
    let mut random = u64::from(seed) + 1;
    for i in 0..requests {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let key = (random >> 33) % 100_000;
        let (request, last) = match i % 10 {
            0 => (format!("set k{key} 0 0 64\r\n{value}\r\n"), "STORED"),
            _ => (format!("get k{key}\r\n"), "END"),
        };
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
    }
    Ok(())
}

/// User and system time of all threads, from fields 14 and 15 of `/proc/PID/stat` (see proc(5)).
fn cpu_seconds(pid: u32) -> Result<f64> {
    // sysconf(_SC_CLK_TCK); the kernel's USER_HZ is 100 on every architecture of ours.
    const TICKS_PER_SECOND: f64 = 100.0;
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // The name, in brackets, may hold spaces and brackets.
    let (_, fields) = stat.rsplit_once(") ").with_context(|| path.clone())?;
    let mut fields = fields.split(' ').skip(11).map_while(|field| field.parse::<f64>().ok());
    match (fields.next(), fields.next()) {
        (Some(user), Some(system)) => Ok((user + system) / TICKS_PER_SECOND),
        _ => bail!("{path} has too few fields"),
    }
}
