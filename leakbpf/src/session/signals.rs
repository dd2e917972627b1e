//! Signals that end a session or are passed on to a program.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::sys::signal::Signal;
use tokio::signal::unix::SignalKind;

pub struct Signals {
    streams: Vec<(Signal, tokio::signal::unix::Signal)>,
}

impl Signals {
    pub fn new() -> io::Result<Self> {
        let wanted = [
            (Signal::SIGINT, SignalKind::interrupt()),
            (Signal::SIGTERM, SignalKind::terminate()),
            (Signal::SIGHUP, SignalKind::hangup()),
            (Signal::SIGQUIT, SignalKind::quit()),
            (Signal::SIGUSR1, SignalKind::user_defined1()),
            (Signal::SIGUSR2, SignalKind::user_defined2()),
        ];
        let streams = wanted
            .into_iter()
            .map(|(signal, kind)| Ok((signal, tokio::signal::unix::signal(kind)?)))
            .collect::<io::Result<_>>()?;
        Ok(Self { streams })
    }

    /// A flag that the next signal sets, also while nobody waits for one.
    pub fn raise_flag(&self) -> io::Result<Arc<AtomicBool>> {
        let flag = Arc::new(AtomicBool::new(false));
        let ends = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
        for signal in ends {
            let flag = Arc::clone(&flag);
            // SAFETY: storing an atomic is all that the handler does, which is async-signal-safe.
            unsafe {
                signal_hook_registry::register(signal as i32, move || {
                    flag.store(true, Ordering::Relaxed);
                })
            }?;
        }
        Ok(flag)
    }

    pub async fn next(&mut self) -> Signal {
        std::future::poll_fn(|context| {
            for (signal, stream) in &mut self.streams {
                if stream.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(*signal);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}
