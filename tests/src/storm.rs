//! Attaching and detaching in the middle of a storm: the target writes down when each call began
//! and ended (`tests/targets/storm.c`), and only calls that overlap the instant are excused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::books::{Event, EventKind};
use crate::profile::Profile;

const HEAD_BYTES: usize = 16;
const EVENT_BYTES: usize = 40;
/// A call that has not ended.
const NEVER: u64 = u64::MAX;

/// One block from birth to death.
#[derive(Debug, Clone, Copy)]
struct Life {
    size_bytes: u64,
    birth: (u64, u64),
    death: (u64, u64),
}

/// Every block that ever was, by address, in order.
#[derive(Debug)]
pub struct StormLog(BTreeMap<u64, Vec<Life>>);

impl StormLog {
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let word = |at: usize| -> u64 {
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
        };
        let count = word(0) as usize;
        assert!(
            HEAD_BYTES + count * EVENT_BYTES <= bytes.len(),
            "{}: the storm outgrew its log",
            path.display()
        );
        let mut events: Vec<Event> = (0..count)
            .map(|index| {
                let at = HEAD_BYTES + index * EVENT_BYTES;
                Event {
                    kind: if word(at + 32) as u32 == 1 {
                        EventKind::Born
                    } else {
                        EventKind::Freed
                    },
                    address: word(at),
                    size_bytes: word(at + 8),
                    begun_ns: word(at + 16),
                    ended_ns: word(at + 24),
                    tid: 0,
                }
            })
            .collect();
        // A block's birth ends before its release begins, and that before the next one's birth
        // ends.
        events.sort_unstable_by_key(|event| match event.kind {
            EventKind::Born => (event.ended_ns, 1),
            _ => (event.begun_ns, 0),
        });
        let mut lives: BTreeMap<u64, Vec<Life>> = BTreeMap::new();
        for event in events {
            let of_address = lives.entry(event.address).or_default();
            match event.kind {
                EventKind::Born => of_address.push(Life {
                    size_bytes: event.size_bytes,
                    birth: (event.begun_ns, event.ended_ns),
                    death: (NEVER, NEVER),
                }),
                _ => {
                    let life = of_address.last_mut().expect("a freed block was born");
                    assert_eq!(life.death.0, NEVER, "{:#x} freed twice", event.address);
                    life.death = (event.begun_ns, event.ended_ns);
                }
            }
        }
        Self(lives)
    }

    pub fn blocks_ever(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }
}

/// There must be an instant between the two times at which the report was the truth: every block
/// that was alive then, and born after the attach, with its size; nothing else. Calls in flight at
/// the instant may count or not.
pub fn assert_storm_explained(
    profile: &Profile,
    pid: u32,
    log: &StormLog,
    attached_ns: u64,
    (stopped_ns, ended_ns): (u64, u64),
) {
    let reported = profile.heap_blocks(pid);
    // Every contradiction holds for a time span: (span, what).
    let mut contradictions: Vec<(u64, u64, String)> = Vec::new();
    for (address, block) in &reported {
        let mut free_from = stopped_ns;
        for life in log.0.get(address).map_or(&[][..], Vec::as_slice) {
            if life.death.1 < stopped_ns || life.birth.0 > ended_ns {
                continue;
            }
            if life.birth.0 > free_from {
                let what = format!("extra {address:#x} ({} bytes)", block.size);
                contradictions.push((free_from, life.birth.0, what));
            }
            if life.size_bytes != block.size {
                let what = format!(
                    "size of {address:#x}: {} reported, {} in the log",
                    block.size, life.size_bytes
                );
                contradictions.push((life.birth.1, life.death.0, what));
            }
            free_from = life.death.1;
        }
        if free_from < ended_ns {
            let what = format!(
                "extra {address:#x}, {} bytes, {} ns old: {}",
                block.size,
                block.age_ns,
                profile.site(block).describe()
            );
            contradictions.push((free_from, ended_ns, what));
        }
    }
    for (address, lives) in &log.0 {
        if reported.contains_key(address) {
            continue;
        }
        for life in lives.iter().filter(|life| life.birth.0 >= attached_ns) {
            let what = format!("missing {address:#x} ({} bytes)", life.size_bytes);
            contradictions.push((life.birth.1, life.death.0, what));
        }
    }
    contradictions.retain(|(from, to, _)| *to > stopped_ns && *from < ended_ns && from < to);

    // The instant with the fewest contradictions: a sweep over their ends.
    let mut steps: Vec<(u64, i64)> = vec![(stopped_ns, 0), (ended_ns, 0)];
    for (from, to, _) in &contradictions {
        steps.push(((*from).max(stopped_ns), 1));
        steps.push(((*to).min(ended_ns), -1));
    }
    steps.sort_unstable();
    let (mut open, mut best) = (0, (i64::MAX, stopped_ns));
    for (index, (time_ns, step)) in steps.iter().enumerate() {
        open += step;
        let is_last_of_instant = steps.get(index + 1).is_none_or(|next| next.0 != *time_ns);
        if is_last_of_instant && *time_ns < ended_ns && open < best.0 {
            best = (open, *time_ns);
        }
    }
    let at = best.1;
    let shown: Vec<&str> = contradictions
        .iter()
        .filter(|(from, to, _)| *from <= at && at < *to)
        .map(|(.., what)| what.as_str())
        .take(12)
        .collect();
    assert!(
        best.0 == 0,
        "no instant explains the report of {} blocks; {} contradictions at the best one, \
         {:.3} ms after the stop:\n  {}",
        reported.len(),
        best.0,
        (at - stopped_ns) as f64 / 1e6,
        shown.join("\n  ")
    );
    assert!(!reported.is_empty(), "the storm left nothing: the test shows nothing");
}
