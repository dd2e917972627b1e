//! Real programs that nobody here wrote, and allocators as real programs link them.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::TcpStream;
use std::process::Command;

use leakbpf_tests::{
    Books, Leakbpf, Profile, Program, Service, Session, Target, c_library, monotonic_ns,
    require_program, rust_program,
    servers::{memcached, nginx, redis},
};

/// The service on the preloaded oracle. Its books are `DIRECTORY/oracle.PID`.
fn with_oracle(command: &mut Command, directory: &tempfile::TempDir) {
    command.env("LD_PRELOAD", c_library("oracle"));
    command.env("ORACLE_FILE", directory.path().join("oracle"));
}

fn oracle_books(directory: &tempfile::TempDir, pid: u32) -> Books {
    Books::read(&directory.path().join(format!("oracle.{pid}")))
}

/// Stops the program, so that books and report are of one moment, takes the books, and ends the
/// session.
fn books_and_report(
    service: &Service,
    directory: &tempfile::TempDir,
    session: Session,
) -> (Books, Profile) {
    service.signal(libc::SIGSTOP);
    let books = oracle_books(directory, service.pid());
    let profile = session.stop();
    service.signal(libc::SIGCONT);
    (books, profile)
}

fn redis_command(stream: &mut TcpStream, line: &str) -> String {
    Service::ask(stream, format!("{line}\r\n").as_bytes(), "\r\n")
}

fn redis_used_memory(stream: &mut TcpStream) -> u64 {
    let answer = Service::ask(stream, b"INFO memory\r\n", "mem_clients_slaves");
    let line = answer.lines().find_map(|line| line.strip_prefix("used_memory:"));
    line.and_then(|number| number.trim().parse().ok()).expect("used_memory in INFO memory")
}

#[test]
fn redis_grows_by_what_it_says_itself() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (mut command, port) = redis(directory.path());
    let service = Service::start(&mut command, port);
    let mut stream = service.connect();
    redis_command(&mut stream, "PING");
    let session = Leakbpf::record().pid(service.pid()).start();
    let before = redis_used_memory(&mut stream);
    assert!(
        redis_command(&mut stream, "DEBUG POPULATE 20000 key 200").starts_with("+OK")
            || populate(&mut stream, 20000)
    );
    let after = redis_used_memory(&mut stream);
    let profile = session.stop();
    let grown = after - before;
    let live = profile.live_heap_bytes(service.pid());
    // Redis counts usable sizes (size classes: up to a quarter more), we count requested ones.
    assert!(
        live <= grown && live * 5 >= grown * 4,
        "redis grew by {grown} bytes by its own count, {live} reported"
    );
    profile.assert_no_losses();
    profile.assert_consistent();
    let functions = ["zmalloc", "sdsnewlen", "_sdsnewlen", "createEmbeddedString", "dictAdd"];
    assert!(
        functions.iter().any(|function| profile.names_function(function)),
        "redis's own function names: {}",
        largest(&profile)
    );
}

/// `DEBUG` may be disabled: the same with plain commands.
fn populate(stream: &mut TcpStream, keys: u32) -> bool {
    let value = "v".repeat(200);
    (0..keys).all(|key| redis_command(stream, &format!("SET key:{key} {value}")).starts_with("+OK"))
}

/// The five largest sites, for whoever reads a failure.
fn largest(profile: &Profile) -> String {
    let mut sites: Vec<_> = profile.sites.iter().collect();
    sites.sort_by_key(|site| std::cmp::Reverse(site.counters.live_bytes));
    let lines = sites.iter().take(5);
    lines
        .map(|site| format!("\n  {} bytes: {}", site.counters.live_bytes, site.describe()))
        .collect()
}

#[test]
fn redis_is_exact_by_the_oracle() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (mut command, port) = redis(directory.path());
    with_oracle(&mut command, &directory);
    let service = Service::start(&mut command, port);
    let mut stream = service.connect();
    redis_command(&mut stream, "PING");
    let session = Leakbpf::record().pid(service.pid()).start();
    let attached_ns = session.attached_ns();
    assert!(populate(&mut stream, 3000));
    for index in 0..500 {
        redis_command(&mut stream, &format!("LPUSH list{} {}", index % 7, "x".repeat(index)));
        redis_command(&mut stream, &format!("HSET hash{} field{index} {index}", index % 5));
        redis_command(&mut stream, &format!("DEL key:{index}"));
    }
    let (books, profile) = books_and_report(&service, &directory, session);
    assert!(books.clone().since(attached_ns).blocks.len() > 2000);
    profile.assert_heap_equals_oracle(service.pid(), &books, attached_ns);
}

#[test]
fn memcached_is_exact_by_the_oracle() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (mut command, port) = memcached();
    with_oracle(&mut command, &directory);
    let service = Service::start(&mut command, port);
    let session = Leakbpf::record().pid(service.pid()).start();
    let attached_ns = session.attached_ns();
    // Each connection has buffers of its own; items come in slabs.
    let mut streams: Vec<TcpStream> = (0..60).map(|_| service.connect()).collect();
    for (index, stream) in streams.iter_mut().enumerate() {
        for key in 0..40 {
            let value = "m".repeat(key * 50);
            let set = format!("set k{index}_{key} 0 0 {}\r\n{value}\r\n", value.len());
            assert_eq!(Service::ask(stream, set.as_bytes(), "\r\n"), "STORED\r\n");
        }
    }
    let (books, profile) = books_and_report(&service, &directory, session);
    assert!(books.clone().since(attached_ns).blocks.len() > 20);
    profile.assert_heap_equals_oracle(service.pid(), &books, attached_ns);
    // Debian's is stripped, so its functions have no names; the module must be right.
    assert!(largest(&profile).contains("(memcached)"), "{}", largest(&profile));
}

#[test]
fn nginx_is_exact_by_the_oracle() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (mut command, port) = nginx(directory.path());
    with_oracle(&mut command, &directory);
    let service = Service::start(&mut command, port);
    let session = Leakbpf::record().pid(service.pid()).start();
    let attached_ns = session.attached_ns();
    // Half of the connections stay open in the middle of a request.
    let mut open = Vec::new();
    for index in 0..200 {
        let mut stream = service.connect();
        let request = "GET / HTTP/1.1\r\nHost: test\r\n";
        if index % 2 == 0 {
            let whole = format!("{request}Connection: close\r\n\r\n");
            let answer = Service::ask(&mut stream, whole.as_bytes(), "hello");
            assert!(answer.contains("hello"), "{answer}");
            // The server closes: its blocks are freed before the test goes on.
            let _ = stream.read(&mut [0; 64]);
        } else {
            let whole = format!("{request}\r\n");
            assert!(Service::ask(&mut stream, whole.as_bytes(), "hello").contains("hello"));
            open.push(stream);
        }
    }
    let (books, profile) = books_and_report(&service, &directory, session);
    assert!(books.clone().since(attached_ns).blocks.len() > 50);
    profile.assert_heap_equals_oracle(service.pid(), &books, attached_ns);
    assert!(
        profile.names_function("ngx_") || largest(&profile).contains("(nginx)"),
        "the caller is nginx: {}",
        largest(&profile)
    );
}

/// An interpreter that answers lines of its language as our own targets answer commands.
fn interpreter(program: &str, package: &str, arguments: &[&str]) -> Target {
    let program = Program { path: require_program(program, package), preload: Vec::new() };
    Target::start_with(&program, &[c_library("oracle")], arguments)
}

#[test]
fn python_is_exact_by_the_oracle() {
    let script = "import sys\nkept = []\nprint('ready', flush=True)\n\
        for line in sys.stdin:\n  exec(line)\n  print('done', flush=True)";
    let mut python = interpreter("python3", "python3", &["-S", "-u", "-c", script]);
    let session = Leakbpf::record().pid(python.pid()).start();
    let attached_ns = session.attached_ns();
    python.run("kept.append([str(i) * 5 for i in range(20000)])");
    python.run("kept.append({i: [i] for i in range(5000)})");
    python.run("import json, decimal; kept.append(json.loads('[1, 2, {\"a\": 3.5}]' ))");
    python.run("del kept[1]");
    python.wait_until_asleep();
    let books = python.oracle_books();
    let profile = session.stop();
    assert!(books.clone().since(attached_ns).blocks.len() > 20000);
    profile.assert_heap_equals_oracle(python.pid(), &books, attached_ns);
    assert!(largest(&profile).contains("python3"), "{}", largest(&profile));
}

#[test]
fn node_is_exact_by_the_oracle() {
    let script = "let kept = []; console.log('ready');\
        require('readline').createInterface({input: process.stdin}).on('line', line => {\
          eval(line); console.log('done'); });";
    let mut node = interpreter("node", "nodejs", &["-e", script]);
    node.run("kept.push(Buffer.alloc(1 << 20))");
    let session = Leakbpf::record().pid(node.pid()).start();
    let attached_ns = session.attached_ns();
    node.run("for (let i = 0; i < 200; i++) kept.push(Buffer.alloc(100000 + i))");
    node.run("kept.push(require('zlib').deflateSync('x'.repeat(1000000)))");
    let pid = node.pid();
    node.wait_until_asleep();
    node.signal(libc::SIGSTOP);
    let books = node.oracle_books();
    let profile = session.stop();
    node.signal(libc::SIGCONT);
    assert!(books.clone().since(attached_ns).blocks.len() > 150);
    profile.assert_heap_equals_oracle(pid, &books, attached_ns);
}

/// A Rust program says its blocks itself.
fn assert_rust_is_exact(name: &str) {
    let mut target = Target::start(&rust_program(name));
    let started_ns = monotonic_ns();
    let session = Leakbpf::record().pid(target.pid()).start();
    target.run("forms");
    target.run("vectors");
    let said = target.run("tell");
    let profile = session.stop();
    let own: BTreeMap<u64, u64> = said
        .iter()
        .filter_map(|line| {
            let (address, size) = line.strip_prefix("block ")?.split_once(' ')?;
            Some((u64::from_str_radix(address, 16).ok()?, size.parse().ok()?))
        })
        .collect();
    assert!(own.len() > 1000);
    let books = Books::of_sizes(&own, started_ns);
    profile.assert_heap_equals_oracle(target.pid(), &books, started_ns);
    assert!(profile.names_function("forms"), "{}", largest(&profile));
}

#[test]
fn a_rust_program_with_jemalloc_is_exact() {
    assert_rust_is_exact("with_jemalloc");
}

#[test]
fn a_rust_program_with_mimalloc_is_exact() {
    assert_rust_is_exact("with_mimalloc");
}

#[test]
fn a_rust_program_on_the_c_library_is_exact() {
    assert_rust_is_exact("with_system");
}

#[test]
fn a_stripped_static_program_says_that_it_has_no_allocator() {
    let program: Program = leakbpf_tests::c_program("heap", leakbpf_tests::Allocator::MuslStatic);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let stripped = directory.path().join("stripped");
    let status = Command::new(require_program("strip", "binutils"))
        .arg("-o")
        .arg(&stripped)
        .arg(&program.path)
        .status()
        .expect("strip starts");
    assert!(status.success());
    let mut target = Target::start(&Program { path: stripped, preload: Vec::new() });
    let mut session = Leakbpf::record().pid(target.pid()).argument("-d").argument("1s").spawn();
    let status = session.wait();
    let said = session.stderr();
    assert!(said.contains("no allocator"), "{status}: {said}");
    assert!(said.contains("stripped"), "it names what it looked at: {said}");
    assert!(target.is_alive());
}
