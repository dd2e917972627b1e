//! Where a report and the books differ, block by block.

use std::fmt;

use crate::books::{Books, Event, KnownBlock};
use crate::profile::{Block, Profile};

/// Differences shown in full; the rest is counted.
const SHOWN: usize = 12;

/// Every block that is in only one of the two, or in both with different sizes.
#[derive(Debug, Default)]
pub struct Difference {
    pub missing: Vec<KnownBlock>,
    /// With the stack that the report gives it.
    pub extra: Vec<(Block, String)>,
    pub resized: Vec<(KnownBlock, Block)>,
    attached_ns: u64,
    events: Vec<Event>,
}

/// Compares a process's heap blocks with the books. Blocks that the C library and its loader
/// allocate for themselves are not in a program's own books: `runtime_known` says whether they are
/// in these.
pub fn heap_difference(
    profile: &Profile,
    pid: u32,
    books: &Books,
    attached_ns: u64,
    runtime_known: bool,
) -> Difference {
    let reported = profile.heap_blocks(pid);
    let mut difference =
        Difference { attached_ns, events: books.events.clone(), ..Difference::default() };
    for known in books.blocks.values().filter(|block| block.begun_ns >= attached_ns) {
        match reported.get(&known.address) {
            None => difference.missing.push(*known),
            Some(block) if block.size != known.size_bytes => {
                difference.resized.push((*known, *block));
            }
            Some(_) => {}
        }
    }
    for block in reported.values() {
        let known = books.blocks.get(&block.address);
        // Began before the probes were complete, and may have ended after.
        if known.is_some_and(|known| known.born_ns >= attached_ns) {
            continue;
        }
        let site = profile.site(block);
        if known.is_none() && !runtime_known && site.is_the_runtimes_own() {
            continue;
        }
        difference.extra.push((*block, site.describe()));
    }
    difference
}

/// No block more, none less, no other size; no losses; and a report that agrees with itself.
pub fn assert_heap_equals(profile: &Profile, pid: u32, books: &Books, attached_ns: u64) {
    check(profile, pid, books, attached_ns, false);
}

impl Profile {
    /// As [`assert_heap_equals`], against books that also know the C library's own blocks.
    pub fn assert_heap_equals_oracle(&self, pid: u32, books: &Books, attached_ns: u64) {
        check(self, pid, books, attached_ns, true);
    }
}

fn check(profile: &Profile, pid: u32, books: &Books, attached_ns: u64, runtime_known: bool) {
    let difference = heap_difference(profile, pid, books, attached_ns, runtime_known);
    let expected = books.blocks.values().filter(|block| block.begun_ns >= attached_ns).count();
    assert!(
        difference.is_empty(),
        "process {pid}: report and books differ in {} of {expected} blocks\n{difference}\
         losses: {:?}",
        difference.len(),
        profile.losses
    );
    profile.assert_no_losses();
    profile.assert_consistent();
}

impl Difference {
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn len(&self) -> usize {
        self.missing.len() + self.extra.len() + self.resized.len()
    }

    /// Milliseconds after the attach, which is what matters to whoever reads it.
    fn when(&self, time_ns: u64) -> String {
        let apart = time_ns as i128 - self.attached_ns as i128;
        format!("{:+.3} ms", apart as f64 / 1e6)
    }

    fn history(&self, formatter: &mut fmt::Formatter<'_>, address: u64) -> fmt::Result {
        let events: Vec<&Event> =
            self.events.iter().filter(|event| event.address == address).collect();
        for event in events.iter().skip(events.len().saturating_sub(4)) {
            writeln!(
                formatter,
                "      {:?} {} bytes at {} by thread {}",
                event.kind,
                event.size_bytes,
                self.when(event.begun_ns),
                event.tid
            )?;
        }
        if events.is_empty() {
            writeln!(formatter, "      the books have no event of it")?;
        }
        Ok(())
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "(times are relative to the attach)")?;
        for block in self.missing.iter().take(SHOWN) {
            writeln!(
                formatter,
                "  missing {:#x}: {} bytes, born {}",
                block.address,
                block.size_bytes,
                self.when(block.born_ns)
            )?;
            self.history(formatter, block.address)?;
        }
        for (block, stack) in self.extra.iter().take(SHOWN) {
            writeln!(
                formatter,
                "  extra {:#x}: {} bytes, {:.3} ms old: {stack}",
                block.address,
                block.size,
                block.age_ns as f64 / 1e6
            )?;
            self.history(formatter, block.address)?;
        }
        for (known, block) in self.resized.iter().take(SHOWN) {
            writeln!(
                formatter,
                "  size of {:#x}: {} bytes reported, {} in the books",
                block.address, block.size, known.size_bytes
            )?;
            self.history(formatter, block.address)?;
        }
        let shown = [self.missing.len(), self.extra.len(), self.resized.len()];
        let hidden: usize = shown.iter().map(|count| count.saturating_sub(SHOWN)).sum();
        if hidden > 0 {
            writeln!(formatter, "  and {hidden} more")?;
        }
        Ok(())
    }
}
