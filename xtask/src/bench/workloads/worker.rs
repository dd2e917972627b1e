//! Programs that take orders on standard input: milliseconds in, units of work out.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Kind, Load, Place, Shape, Work, Workload, reap, text};
use crate::bench::program;
use crate::shell;

pub const PAIR: Workload = Workload {
    name: "pair",
    title: "`malloc(64)` and `free`, one thread",
    unit: "pair",
    kind: Kind::Loop,
    shape: Shape::OneProcess,
    begin: |place| pairs(place, "1"),
};

/// Both threads share one processor, so that this shows what threads cost and no scaling.
pub const PAIR2: Workload = Workload {
    name: "pair-2-threads",
    title: "`malloc(64)` and `free`, two threads",
    unit: "pair",
    kind: Kind::Loop,
    shape: Shape::OneProcess,
    begin: |place| pairs(place, "2"),
};

/// `xtask/bench/interpret.py`.
pub const PYTHON: Workload = Workload {
    name: "python",
    title: "python3, parsing and compiling its library",
    unit: "run",
    kind: Kind::Job,
    shape: Shape::OneProcess,
    begin: |place| {
        let script = text(&shell::root().join("xtask/bench/interpret.py"));
        begin(place, &place.dressed(&["/usr/bin/python3", &script]))
    },
};

/// The compiler proper on one preprocessed file of some 8,000 lines of C.
pub const COMPILE: Workload = Workload {
    name: "compile",
    title: "gcc's `cc1 -O1` on stb_image",
    unit: "compilation",
    kind: Kind::Job,
    shape: Shape::Forks,
    begin: compile,
};

struct Worker {
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

fn begin(place: &Place, words: &[String]) -> Result<Box<dyn Load>> {
    let mut command = place.command(words);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start {words:?}"))?;
    let orders = child.stdin.take().context("standard input")?;
    let answers = BufReader::new(child.stdout.take().context("standard output")?);
    reap(child);
    Ok(Box::new(Worker { orders, answers }))
}

fn pairs(place: &Place, threads: &str) -> Result<Box<dyn Load>> {
    let program = program::build("pairs")?;
    begin(place, &place.dressed(&[&text(&program), threads]))
}

fn compile(place: &Place) -> Result<Box<dyn Load>> {
    let (source, input) = (place.folder.join("source.c"), place.folder.join("source.i"));
    fs::write(&source, "#define STB_IMAGE_IMPLEMENTATION\n#include <stb/stb_image.h>\n")?;
    shell::output(Command::new("gcc").args(["-O1", "-E", "-o"]).arg(&input).arg(&source))?;
    let compiler = shell::output(Command::new("gcc").arg("-print-prog-name=cc1"))?;
    let script = text(&shell::root().join("xtask/bench/repeat.py"));
    let mut words = ["/usr/bin/python3".to_owned(), script].to_vec();
    words.extend(place.dressed(&[
        &compiler,
        "-quiet",
        "-O1",
        "-fpreprocessed",
        &text(&input),
        "-o",
        "/dev/null",
    ]));
    begin(place, &words)
}

impl Load for Worker {
    fn run(&mut self, span: Duration) -> Result<Work> {
        // In one piece: a program that reads half a line would take it for two orders.
        self.orders.write_all(format!("{}\n", span.as_millis()).as_bytes())?;
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the program ended without an answer");
        }
        let units: f64 = line.trim_end().parse().with_context(|| format!("an answer: {line}"))?;
        if units < 1.0 {
            bail!("the program did nothing");
        }
        Ok(Work { units, p99_us: None })
    }
}
