//! The line that shows progress while nothing else is printed.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use crate::{probe::kernel::Counts, report::ReportOptions};

/// One line on the standard error, rewritten in place; nothing when that is no terminal.
pub struct Progress {
    terminal: bool,
    hits: u64,
    at: Instant,
}

impl Progress {
    pub fn new() -> Self {
        Self { terminal: io::stderr().is_terminal(), hits: 0, at: Instant::now() }
    }

    pub fn shown(&self) -> bool {
        self.terminal
    }

    pub fn show(&mut self, elapsed: Duration, live_bytes: u64, hits: u64, counts: &Counts) {
        let seconds = self.at.elapsed().as_secs_f64().max(0.001);
        let rate = hits.saturating_sub(self.hits) as f64 / seconds;
        self.hits = hits;
        self.at = Instant::now();
        let lost: u64 = counts.losses.iter().sum();
        let _ = write!(
            io::stderr(),
            "\r\x1b[K{:>4} s  {:.1} MiB live  {rate:.0} events/s  {lost} lost  (Ctrl-C stops)",
            elapsed.as_secs(),
            live_bytes as f64 / (1 << 20) as f64,
        );
    }

    pub fn clear(&self) {
        if self.terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// Whether the terminal's Ctrl-C goes to this process and to the programs that it starts: it does
/// when their group is the terminal's foreground group, whatever the standard input is.
pub fn in_foreground() -> bool {
    let Ok(terminal) = std::fs::File::open("/dev/tty") else { return false };
    nix::unistd::tcgetpgrp(&terminal).is_ok_and(|group| group == nix::unistd::getpgrp())
}

/// Colours and width of the standard output.
pub fn options() -> ReportOptions {
    let terminal = io::stdout().is_terminal();
    ReportOptions {
        color: terminal && std::env::var_os("NO_COLOR").is_none(),
        ..ReportOptions::default()
    }
}
