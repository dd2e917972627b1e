//! gdb as the oracle: it stops the process, and says what its stacks are.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::Duration,
};

use leakbpf_common::unwind::Registers;

/// gdb needs seconds to read the symbols of a large program; a minute means that it hangs.
const PATIENCE: Duration = Duration::from_secs(90);

/// One thread as gdb sees it.
pub struct Thread {
    pub registers: Registers,
    /// Address and function, innermost first.
    pub frames: Vec<(u64, String)>,
}

pub struct Gdb {
    child: Child,
    commands: ChildStdin,
    lines: Receiver<String>,
}

impl Gdb {
    /// Attaches to a process and returns its stacks of that moment.
    pub fn attach(pid: u32) -> (Self, Vec<Thread>) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/unwind_gdb/frames.py");
        let mut child = Command::new("gdb")
            .args(["-q", "-nx", "-batch", "-p", &pid.to_string(), "-x"])
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("gdb runs; to install it: apt-get install gdb");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let commands = child.stdin.take().expect("piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(line) = line.strip_prefix("@ ")
                    && sender.send(line.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let mut gdb = Self { child, commands, lines };
        let threads = gdb.point();
        (gdb, threads)
    }

    /// Lets the process run; [`Gdb::point`] waits for its next stop.
    pub fn go(&mut self) {
        self.commands.write_all(b"continue\n").expect("gdb lives");
    }

    /// Runs one instruction of the thread that stopped last.
    pub fn step(&mut self) -> Vec<Thread> {
        self.commands.write_all(b"step\n").expect("gdb lives");
        self.point()
    }

    /// The stacks at the next stop.
    pub fn point(&mut self) -> Vec<Thread> {
        let mut threads = Vec::<Thread>::new();
        loop {
            let line = match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => panic!("gdb says nothing for {PATIENCE:?}"),
                Err(RecvTimeoutError::Disconnected) => panic!("gdb ended"),
            };
            let words: Vec<_> = line.split_whitespace().collect();
            let number = |index: usize| words[index].parse::<u64>().expect("a number from gdb");
            match words[0] {
                "thread" => threads.push(Thread {
                    registers: Registers {
                        ip: number(2),
                        sp: number(3),
                        bp: number(4),
                        after_call: 0,
                    },
                    frames: Vec::new(),
                }),
                // A return address of 0 ends the stack; gdb lists it.
                "frame" if words[1] == "0" => {}
                "frame" => {
                    let name = words[2..].join(" ");
                    threads.last_mut().expect("a thread").frames.push((number(1), name));
                }
                "end" => return threads,
                _ => panic!("gdb: {line}"),
            }
        }
    }
}

impl Drop for Gdb {
    fn drop(&mut self) {
        // The process may be gone, and gdb with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
