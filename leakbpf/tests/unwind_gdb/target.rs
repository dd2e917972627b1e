//! The processes whose stacks are compared: our own children, so that no privilege is needed.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

/// How long a server may take until it listens.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Target {
    child: Child,
    /// What keeps it busy, and what ends that.
    clients: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
    _directory: TempDir,
    turns: u64,
}

impl Target {
    /// Compiles a program of `targets` and starts it.
    pub fn compile(compiler: &str, source: &str, options: &[&str]) -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let program = directory.path().join("program");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/unwind_gdb/targets");
        let status = Command::new(compiler)
            .args(options)
            .arg(path.join(source))
            .arg("-o")
            .arg(&program)
            .status()
            .unwrap_or_else(|error| {
                panic!("{compiler}: {error}; to install it: apt-get install g++ musl-tools")
            });
        assert!(status.success(), "{source} compiles");
        Self::start(Command::new(program), directory, "g++")
    }

    pub fn run(program: &str, arguments: &[&str], package: &str) -> Self {
        let mut command = Command::new(program);
        command.args(arguments);
        Self::start(command, TempDir::new().expect("temporary directory"), package)
    }

    pub fn rust() -> Self {
        Self::run(env!("CARGO_BIN_EXE_leakbpf"), &["demo-target"], "cargo")
    }

    /// redis-server, kept busy by a script that runs inside it and by commands from outside.
    pub fn redis() -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let socket = directory.path().join("socket");
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--save", "", "--unixsocket"]).arg(&socket);
        let mut target = Self::start(command, directory, "redis-server");
        wait_until(|| UnixStream::connect(&socket).is_ok());
        target.keep_busy(move || {
            let Ok(mut stream) = UnixStream::connect(&socket) else { return };
            let script = "for i=1,50 do redis.call('set', 'k'..i, string.rep('v', i*10)) end \
                          return cjson.encode({1,2,{a='b'}})";
            let request = format!("EVAL \"{script}\" 0\r\nSORT nothing\r\nDEBUG JMAP\r\n");
            if stream.write_all(request.as_bytes()).is_ok() {
                let _ = stream.read(&mut [0; 4096]);
            }
        });
        target
    }

    /// One nginx process, kept busy by requests.
    pub fn nginx() -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let port = free_port();
        let path = directory.path().display();
        let configuration = format!(
            "daemon off; master_process off; pid {path}/pid; error_log /dev/null;
             events {{}}
             http {{
                 access_log {path}/access;
                 client_body_temp_path {path}; proxy_temp_path {path}; fastcgi_temp_path {path};
                 uwsgi_temp_path {path}; scgi_temp_path {path};
                 server {{ listen 127.0.0.1:{port}; root {path}; autoindex on; gzip on; gzip_types *; }}
             }}"
        );
        let file = directory.path().join("nginx.conf");
        std::fs::write(&file, configuration).expect("temporary file");
        let mut command = Command::new("/usr/sbin/nginx");
        command.arg("-c").arg(&file);
        let mut target = Self::start(command, directory, "nginx");
        let address = ("127.0.0.1", port);
        wait_until(|| TcpStream::connect(address).is_ok());
        target.keep_busy(move || {
            let Ok(mut stream) = TcpStream::connect(address) else { return };
            let request = "GET / HTTP/1.0\r\nAccept-Encoding: gzip\r\n\r\n";
            if stream.write_all(request.as_bytes()).is_ok() {
                let _ = stream.read_to_end(&mut Vec::new());
            }
        });
        target
    }

    fn start(mut command: Command, directory: TempDir, package: &str) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: prctl is async-signal-safe and takes plain numbers.
        unsafe {
            command.pre_exec(|| {
                // gdb is our child as well, not the target's parent: where the Yama module lets
                // only parents trace, this is what permits it. Elsewhere it fails, rightly.
                libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY);
                Ok(())
            });
        }
        let child = command.spawn().unwrap_or_else(|error| {
            let program = command.get_program().display();
            panic!("{program}: {error}; to install it: apt-get install {package}")
        });
        Self { child, clients: None, _directory: directory, turns: 0 }
    }

    /// Repeats `request` from another thread for as long as the target lives.
    fn keep_busy(&mut self, request: impl Fn() + Send + 'static) {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                request();
            }
        });
        self.clients = Some((stop, thread));
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn send_line(&mut self) {
        self.child.stdin.as_mut().expect("piped").write_all(b"\n").expect("the target reads");
    }

    /// Stops the process, which gdb has let go, at a moment that nobody has chosen.
    pub fn run_a_while_and_stop(&mut self) {
        self.turns += 1;
        std::thread::sleep(Duration::from_micros(2000 + self.turns * 7919 % 5000));
        kill(Pid::from_raw(self.pid() as i32), Signal::SIGWINCH).expect("the target lives");
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some((stop, _)) = &self.clients {
            stop.store(true, Ordering::Relaxed);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some((_, thread)) = self.clients.take() {
            let _ = thread.join();
        }
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port()
}

/// Waits for a server to answer.
fn wait_until(ready: impl Fn() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < PATIENCE, "the server does not answer");
        std::thread::yield_now();
    }
}
