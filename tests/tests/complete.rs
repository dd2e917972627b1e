//! How many stacks of real programs are complete, while they work.

use std::io::Write;
use std::net::TcpStream;
use std::process::Command;

use leakbpf_tests::{
    Leakbpf, Profile, Service, Site, require_program,
    servers::{memcached, nginx, redis},
};

/// Allocations and mappings with a complete stack must be at least this share of all.
const COMPLETE_PERCENT: u64 = 99;

fn assert_complete(profile: &Profile, at_least: u64) {
    let count = |sites: &mut dyn Iterator<Item = &Site>| -> u64 {
        sites.map(|site| site.counters.allocated_count).sum()
    };
    let all = count(&mut profile.sites.iter());
    let complete = count(&mut profile.sites.iter().filter(|site| site.is_complete()));
    eprintln!("{complete} of {all} stacks are complete");
    assert!(all >= at_least, "only {all} allocations");
    assert!(
        complete * 100 >= all * COMPLETE_PERCENT,
        "{complete} of {all}:{}",
        worst(profile, |it| !it.is_complete())
    );
}

/// The broken stacks with the most allocations.
fn worst(profile: &Profile, is_broken: impl Fn(&&Site) -> bool) -> String {
    let mut broken: Vec<_> = profile.sites.iter().filter(is_broken).collect();
    broken.sort_by_key(|site| std::cmp::Reverse(site.counters.allocated_count));
    let lines = broken.iter().take(8).map(|site| {
        let (count, outcome) = (site.counters.allocated_count, &site.stack_outcome);
        format!("\n  {count} {}, {outcome}: {}", site.kind, site.describe())
    });
    lines.collect()
}

/// A program that the agent starts.
fn record(arguments: &[&str]) -> Profile {
    Leakbpf::record().command(arguments.iter().copied()).spawn().report()
}

fn program(name: &str, package: &str) -> String {
    require_program(name, package).to_str().expect("a path in UTF-8").to_owned()
}

#[test]
fn redis_under_load() {
    let directory = tempfile::tempdir().expect("a directory");
    let (mut command, port) = redis(directory.path());
    let service = Service::start(&mut command, port);
    let session = Leakbpf::record().pid(service.pid()).start();
    let load = Command::new(require_program("redis-benchmark", "redis-tools"))
        .args(["-p", &port.to_string(), "-q", "-n", "3000", "-r", "1000", "-d", "100"])
        .args(["-t", "set,get,lpush,sadd,hset,zadd,lrange_100,mset"])
        .output()
        .expect("redis-benchmark runs");
    assert!(load.status.success());
    assert_complete(&session.stop(), 10_000);
}

#[test]
fn memcached_under_load() {
    let (mut command, port) = memcached();
    let service = Service::start(&mut command, port);
    let session = Leakbpf::record().pid(service.pid()).start();
    for round in 0..60 {
        let mut streams: Vec<TcpStream> = (0..20).map(|_| service.connect()).collect();
        for (index, stream) in streams.iter_mut().enumerate() {
            let value = "m".repeat(40 * index);
            let set = format!("set k{round}_{index} 0 0 {}\r\n{value}\r\n", value.len());
            assert_eq!(Service::ask(stream, set.as_bytes(), "\r\n"), "STORED\r\n");
            Service::ask(stream, format!("get k{round}_{index}\r\n").as_bytes(), "END\r\n");
        }
        Service::ask(&mut streams[0], b"stats slabs\r\n", "END\r\n");
    }
    assert_complete(&session.stop(), 200);
}

#[test]
fn nginx_under_load() {
    let directory = tempfile::tempdir().expect("a directory");
    let (mut command, port) = nginx(directory.path());
    let service = Service::start(&mut command, port);
    let session = Leakbpf::record().pid(service.pid()).start();
    for _ in 0..1000 {
        let mut stream = service.connect();
        let request = b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
        assert!(Service::ask(&mut stream, request, "hello").contains("hello"));
    }
    assert_complete(&session.stop(), 3000);
}

/// Long enough that the libraries that it loads on the way weigh little: a library's rows are there
/// some milliseconds after it.
#[test]
fn python_at_work() {
    let script = "import json, re, decimal, collections\n\
        for i in range(3000):\n  json.loads(json.dumps({'a': list(range(50)), 'b': 'x' * 600}))\n  \
        re.compile('(a|b)*c%d' % i).match('ab' * 50)\n  decimal.Decimal(i).sqrt()\n  \
        sorted([str(n) for n in range(200)], key=lambda s: s[::-1])";
    assert_complete(&record(&[&program("/usr/bin/python3", "python3"), "-c", script]), 5000);
}

#[test]
fn perl_at_work() {
    let script = "my %h; for my $i (1..20000) { $h{\"key$i\"} = [$i, \"x\" x ($i % 300)]; } \
        my @s = sort { $a cmp $b } keys %h; my $n = 0; \
        for (@s) { $n++ if /(\\d+)5$/; my $t = sprintf('%s-%d', $_, $n); } print \"$n\\n\";";
    assert_complete(&record(&[&program("perl", "perl"), "-e", script]), 5000);
}

#[test]
fn sqlite_at_work() {
    let script = "CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT, value REAL);\n\
        WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 20000)\n\
        INSERT INTO t SELECT n, hex(randomblob(20)), n * 1.5 FROM c;\n\
        CREATE INDEX i ON t(name);\n\
        SELECT count(*), avg(value) FROM t WHERE name LIKE '%AB%' GROUP BY substr(name, 1, 2);\n\
        SELECT group_concat(name) FROM (SELECT name FROM t ORDER BY value DESC LIMIT 500);\n";
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(script.as_bytes()).expect("a written file");
    let init = file.path().to_str().expect("a path in UTF-8");
    let sqlite = program("sqlite3", "sqlite3");
    assert_complete(&record(&[&sqlite, "-batch", "-init", init, ":memory:", ""]), 2000);
}

/// Whether a stack was walked as far as code that a run-time system's compiler made: at run time,
/// or when the program was built (V8's `Builtins_`, in node's own file). Such code has no rows, and
/// keeps other things than return addresses where a frame pointer would lead to them.
fn leads_to_jit(site: &Site) -> bool {
    site.frames.iter().any(|frame| frame.module.is_none()) || site.has_function("Builtins_")
}

/// A stack may stop at code made at run time, not before. Deeper ones than the frame limit say so,
/// and a library's constructors may run before its table is there: one stack in a thousand, on a
/// machine that other tests keep busy.
fn assert_complete_up_to_jit(profile: &Profile, at_least: u64) {
    let all: u64 = profile.sites.iter().map(|site| site.counters.allocated_count).sum();
    assert!(all >= at_least, "only {all} allocations");
    let mut early = 0;
    let mut truncated = 0;
    let stops_early = |site: &&Site| !site.is_complete() && !leads_to_jit(site);
    for site in profile.sites.iter().filter(stops_early) {
        match &*site.stack_outcome {
            "truncated" => truncated += site.counters.allocated_count,
            _ => early += site.counters.allocated_count,
        }
    }
    eprintln!(
        "{early} of {all} stacks stop before code made at run time, {truncated} at the limit of \
         frames:{}",
        worst(profile, stops_early)
    );
    assert!(early * 1000 <= all, "{early} of {all} stacks stop early");
    assert!(truncated * 1000 <= all, "{truncated} of {all} are too deep");
}

#[test]
fn node_up_to_code_made_at_run_time() {
    let script = "let kept = []; function leakyHandler(n) { kept.push(Buffer.alloc(20000 + n)); }\n\
        for (let i = 0; i < 1500; i++) leakyHandler(i % 7);";
    let directory = tempfile::tempdir().expect("a directory");
    // V8 writes a log of its own as well.
    let log = format!("--logfile={}/v8.log", directory.path().display());
    let node = program("node", "nodejs");
    let [names, all] = ["--perf-basic-prof", "--interpreted-frames-native-stack"];
    let profile = record(&[&node, names, all, "--no-logfile-per-isolate", &log, "-e", script]);
    assert_complete_up_to_jit(&profile, 1500);
    assert!(profile.names_function("leakyHandler"), "no name from the perf map");
}

#[test]
fn java_up_to_code_made_at_run_time() {
    let directory = tempfile::tempdir().expect("a directory");
    let source = directory.path().join("Work.java");
    let text = "import java.util.*; import java.nio.*; public class Work {\n\
        public static void main(String[] a) { List<ByteBuffer> kept = new ArrayList<>();\n\
        for (int i = 0; i < 2000; i++) kept.add(ByteBuffer.allocateDirect(5000 + i));\n\
        System.out.println(kept.size()); } }";
    std::fs::write(&source, text).expect("a written file");
    let source = source.to_str().expect("a path in UTF-8");
    let java = program("java", "default-jre-headless");
    assert_complete_up_to_jit(&record(&[&java, "-Xmx256m", source]), 10_000);
}
