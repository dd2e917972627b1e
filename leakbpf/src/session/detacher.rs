//! Taking probes away without waiting for it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::probe::attach::Link;

/// A thread that takes probes away. Dropping it waits for the last one.
#[derive(Default)]
pub struct Detacher {
    thread: Option<Thread>,
    pending: Arc<AtomicUsize>,
}

impl Detacher {
    /// How often something is still to be closed: links that close at the same time count once.
    pub fn pending(&self) -> usize {
        self.pending.load(Ordering::Acquire)
    }

    pub fn detach(&mut self, links: Vec<Link>) {
        if links.is_empty() {
            return;
        }
        let batches = batches(links);
        self.pending.fetch_add(batches.len(), Ordering::AcqRel);
        if self.thread.is_none() {
            self.thread = start(Arc::clone(&self.pending)).ok();
        }
        match &self.thread {
            // It receives until it is dropped.
            Some((sender, _)) => drop(sender.send(batches)),
            // The machine has no thread to give: then it takes its time here.
            None => take_away(batches, &self.pending),
        }
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

/// Links that are closed at the same time.
type Batch = Vec<Link>;

type Thread = (std::sync::mpsc::Sender<Vec<Batch>>, std::thread::JoinHandle<()>);

fn start(pending: Arc<AtomicUsize>) -> std::io::Result<Thread> {
    let (sender, receiver) = std::sync::mpsc::channel::<Vec<Batch>>();
    let work = move || receiver.into_iter().for_each(|batches| take_away(batches, &pending));
    Ok((sender, std::thread::Builder::new().name("detacher".to_owned()).spawn(work)?))
}

/// Most links of a batch.
const AT_ONCE: usize = 16;

/// In the order in which they are closed. What was placed last goes first: without its beginning, a return
/// counts nothing.
fn batches(mut links: Vec<Link>) -> Vec<Batch> {
    let mut batches = Vec::new();
    while let Some(last) = links.pop() {
        let mut batch = vec![last];
        while batch[0].closes_with_others() && batch.len() < AT_ONCE {
            match links.pop_if(|link| link.closes_with_others()) {
                Some(link) => batch.push(link),
                None => break,
            }
        }
        batches.push(batch);
    }
    batches
}

fn take_away(batches: Vec<Batch>, pending: &AtomicUsize) {
    for batch in batches {
        close(batch);
        pending.fetch_sub(1, Ordering::AcqRel);
    }
}

fn close(links: Batch) {
    if links.len() == 1 {
        return drop(links);
    }
    std::thread::scope(|scope| {
        for link in links {
            // Without a thread to spare, it is closed right here, with what would have run.
            let _ = std::thread::Builder::new().spawn_scoped(scope, move || drop(link));
        }
    });
}
