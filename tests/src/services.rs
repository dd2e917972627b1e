//! Real programs that nobody here wrote: started on a port of their own, killed when the test ends.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::build::Program;

/// A server that listens on a local port.
#[derive(Debug)]
pub struct Service {
    child: Child,
    port: u16,
}

/// A port that nobody listens on at the moment.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free local port");
    listener.local_addr().expect("a bound socket has an address").port()
}

impl Service {
    /// Starts the command and waits until the port answers.
    pub fn start(command: &mut Command, port: u16) -> Self {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let mut service = Self { child, port };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if let Ok(Some(status)) = service.child.try_wait() {
                panic!("{command:?} ended with {status}");
            }
            assert!(Instant::now() < deadline, "{command:?} does not listen on {port}");
            thread::park_timeout(Duration::from_millis(5));
        }
        service
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("the service listens");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout can be set");
        stream
    }

    /// Sends a request and reads until the answer contains `end`.
    pub fn ask(stream: &mut TcpStream, request: &[u8], end: &str) -> String {
        stream.write_all(request).expect("the service reads");
        let mut answer = Vec::new();
        let mut buffer = [0; 65536];
        while !String::from_utf8_lossy(&answer).contains(end) {
            match stream.read(&mut buffer).expect("the service answers") {
                0 => break,
                count => answer.extend_from_slice(&buffer[..count]),
            }
        }
        String::from_utf8_lossy(&answer).into_owned()
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the child was not waited for, so its process id is still its own.
        let result = unsafe { libc::kill(self.pid() as i32, signal) };
        assert_eq!(result, 0, "kill: {}", std::io::Error::last_os_error());
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `LD_PRELOAD` for a command that is not one of our targets.
impl Program {
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        let preload: Vec<String> =
            self.preload.iter().map(|path| path.display().to_string()).collect();
        if !preload.is_empty() {
            command.env("LD_PRELOAD", preload.join(":"));
        }
        command
    }
}
