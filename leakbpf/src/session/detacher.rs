//! Taking probes away without waiting for it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::probe::attach::Link;

/// A thread that takes probes away, one after the other. Dropping it waits for the last one.
#[derive(Default)]
pub struct Detacher {
    thread: Option<(std::sync::mpsc::Sender<Vec<Link>>, std::thread::JoinHandle<()>)>,
    pending: Arc<AtomicUsize>,
}

impl Detacher {
    pub fn pending(&self) -> usize {
        self.pending.load(Ordering::Relaxed)
    }

    pub fn detach(&mut self, links: Vec<Link>) {
        if links.is_empty() {
            return;
        }
        self.pending.fetch_add(links.len(), Ordering::Relaxed);
        let pending = &self.pending;
        let (sender, _) = self.thread.get_or_insert_with(|| {
            let (sender, receiver) = std::sync::mpsc::channel::<Vec<Link>>();
            let pending = pending.clone();
            let thread = std::thread::spawn(move || {
                for link in receiver.into_iter().flatten() {
                    drop(link);
                    pending.fetch_sub(1, Ordering::Relaxed);
                }
            });
            (sender, thread)
        });
        // It receives until it is dropped.
        let _ = sender.send(links);
    }
}

impl Drop for Detacher {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.thread.take() {
            drop(sender);
            // It only closes descriptors, and has nothing to say.
            let _ = thread.join();
        }
    }
}
