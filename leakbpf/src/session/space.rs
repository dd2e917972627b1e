//! One address space over time: which code was at an address when a stack was taken there.

use std::{collections::VecDeque, ops::RangeInclusive};

use crate::{
    process::maps::{Backing, FileId, Maps},
    profile::StackOutcome,
};
use leakbpf_common::abi::{FramePlace, FrameWord, Outcome};

/// Address lists kept of one process. Each `dlopen` and `dlclose` makes two to four; a stack may have
/// been taken several of them ago.
const KEPT: usize = 64;

/// What an address belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A mapped file, and the offset in it.
    File { id: FileId, file_offset: u64 },
    /// The kernel's own page of code; offset from its beginning.
    Vdso { offset: u64 },
    /// A module by its number, and the offset in it: the kernel side knew it when it walked the
    /// stack.
    Module { number: u32, offset: u32 },
    /// Executable memory without a file: code made at run time.
    Anonymous,
}

/// What a list of mappings shows at an address.
#[derive(Debug, Clone, PartialEq, Eq)]
enum At {
    Code(Place),
    /// The kernel's trampolines for return probes.
    Trampoline,
}

impl At {
    fn is_module(&self) -> bool {
        !matches!(self, Self::Code(Place::Anonymous) | Self::Trampoline)
    }
}

fn at(maps: &Maps, avma: u64) -> Option<At> {
    let mapping = maps.find(avma)?;
    let offset = avma.checked_sub(mapping.start_avma)?;
    let place = match &mapping.backing {
        Backing::File { id, .. } => {
            Place::File { id: *id, file_offset: mapping.file_offset.checked_add(offset)? }
        }
        Backing::Special(name) if name == "[vdso]" => Place::Vdso { offset },
        Backing::Special(name) if name == "[uprobes]" => return Some(At::Trampoline),
        Backing::Special(_) | Backing::Anonymous => Place::Anonymous,
    };
    mapping.permissions.execute.then_some(At::Code(place))
}

/// A stack whose frames have been checked against the address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedStack {
    /// With their addresses, where these are known.
    pub frames: Vec<(Option<u64>, Place)>,
    pub outcome: StackOutcome,
}

/// Lists of mappings, each from the moment that the libraries changed.
#[derive(Debug, Clone, Default)]
pub struct Space {
    /// Rising by epoch.
    lists: VecDeque<List>,
}

/// Mappings that were read between two library epochs.
#[derive(Debug, Clone)]
struct List {
    first: u32,
    last: u32,
    maps: Maps,
}

impl List {
    /// Whether it shows what was at an address when code ran there. From one library's code to that
    /// of another in its place, the loader tells three times or more: before it takes the one away,
    /// after it, and when the other is mapped. (A fourth time before the other's code runs.)
    fn is_of(&self, library_epoch: u32) -> bool {
        self.last.saturating_sub(library_epoch) < 2 && library_epoch.saturating_sub(self.first) < 3
    }
}

impl Space {
    pub fn new(library_epoch: u32, maps: Maps) -> Self {
        let mut space = Self::default();
        space.learn(library_epoch..=library_epoch, maps);
        space
    }

    /// Adds a list, with the library epochs before and after it was read.
    pub fn learn(&mut self, epochs: RangeInclusive<u32>, maps: Maps) {
        if maps.is_empty() {
            return;
        }
        let (first, last) = epochs.into_inner();
        // A list is read some time after the change that it is to show: two of one epoch can
        // differ, and both were true.
        let after = self.lists.partition_point(|list| list.first <= first);
        let list = List { first, last, maps };
        let same =
            |other: &List| (other.first, other.last, &other.maps) == (first, last, &list.maps);
        if !after.checked_sub(1).and_then(|before| self.lists.get(before)).is_some_and(same) {
            self.lists.insert(after, list);
        }
        if self.lists.len() > KEPT {
            self.lists.pop_front();
        }
    }

    pub fn epoch(&self) -> Option<u32> {
        self.lists.back().map(|list| list.first)
    }

    /// The newest list.
    pub fn maps(&self) -> Option<&Maps> {
        self.lists.back().map(|list| &list.maps)
    }

    /// Whether a list of this epoch or a later one is known and knows every frame.
    pub fn covers(&self, library_epoch: u32, frames: &[FrameWord]) -> bool {
        frames.iter().all(|frame| match frame.place() {
            FramePlace::Module { .. } => true,
            FramePlace::Address(avma) => {
                self.epoch().is_some_and(|epoch| epoch >= library_epoch)
                    && self.place(library_epoch, avma).is_some()
            }
        })
    }

    /// Where a byte of a file lay: `None` stands for the vDSO.
    pub fn avma(&self, library_epoch: u32, file: Option<FileId>, offset: u64) -> Option<u64> {
        self.in_order(library_epoch).flat_map(|list| list.maps.iter()).find_map(|mapping| {
            let begin = match &mapping.backing {
                Backing::File { id, .. } if Some(*id) == file => mapping.file_offset,
                Backing::Special(name) if file.is_none() && name == "[vdso]" => 0,
                _ => return None,
            };
            let avma = mapping.start_avma.checked_add(offset.checked_sub(begin)?)?;
            (mapping.permissions.execute && mapping.contains(avma)).then_some(avma)
        })
    }

    /// First the list of a stack's own time, then later ones, then earlier ones: a list can be read
    /// only after the change that it shows.
    fn in_order(&self, library_epoch: u32) -> impl Iterator<Item = &List> {
        let later = self.lists.iter().filter(move |list| list.first >= library_epoch);
        let earlier = self.lists.iter().rev().filter(move |list| list.first < library_epoch);
        later.chain(earlier)
    }

    /// What was at an address when a stack was taken. `None` when nothing was, and when it may have
    /// been another library than the ones that are known to have been there.
    fn place(&self, library_epoch: u32, avma: u64) -> Option<At> {
        let mut lists = self.in_order(library_epoch).filter(|list| list.is_of(library_epoch));
        if let Some(at) = lists.find_map(|list| at(&list.maps, avma)) {
            return Some(at);
        }
        // Lists before and after could both show what comes back again and again.
        let seen: Vec<_> = self.lists.iter().map(|list| at(&list.maps, avma)).collect();
        let anywhere = seen.iter().flatten().next()?;
        let everywhere = seen.iter().all(|at| at.as_ref() == Some(anywhere));
        let nameless = !seen.iter().flatten().any(At::is_module);
        (everywhere || nameless).then(|| anywhere.clone())
    }

    /// Gives each frame its place. A frame that points to no code ends the stack: a frame pointer
    /// was not one. The first frame is always right and is kept even when its library is gone.
    pub fn place_stack(
        &self,
        library_epoch: u32,
        outcome: Outcome,
        frames: &[FrameWord],
    ) -> PlacedStack {
        let mut placed = Vec::with_capacity(frames.len());
        for (depth, frame) in frames.iter().enumerate() {
            let avma = match frame.place() {
                FramePlace::Address(avma) => avma,
                FramePlace::Module { number, offset } => {
                    placed.push((None, Place::Module { number, offset }));
                    continue;
                }
            };
            match self.place(library_epoch, avma) {
                Some(At::Trampoline) => {
                    return PlacedStack { frames: placed, outcome: StackOutcome::Trampoline };
                }
                Some(At::Code(place)) => placed.push((Some(avma), place)),
                None if depth == 0 => placed.push((Some(avma), Place::Anonymous)),
                None => {
                    return PlacedStack { frames: placed, outcome: StackOutcome::BadAddress };
                }
            }
        }
        let outcome = match outcome {
            Outcome::Complete => StackOutcome::Complete,
            Outcome::Truncated => StackOutcome::Truncated,
            Outcome::NoFramePointer => StackOutcome::NoFramePointer,
            Outcome::Unreadable => StackOutcome::Unreadable,
            Outcome::Lost => StackOutcome::Lost,
            Outcome::NoRow => StackOutcome::NoRow,
            Outcome::BadAddress => StackOutcome::BadAddress,
            Outcome::Trampoline => StackOutcome::Trampoline,
            Outcome::StackNotGrowing => StackOutcome::StackNotGrowing,
            Outcome::UnsupportedRule => StackOutcome::UnsupportedRule,
        };
        PlacedStack { frames: placed, outcome }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &[u8] = b"\
1000-2000 r-xp 00000000 08:01 11 /usr/bin/a\n\
2000-3000 rw-p 00000000 00:00 0 \n\
5000-6000 r-xp 00003000 08:01 12 /usr/lib/b.so\n\
7000-8000 --xp 00000000 00:00 0 [uprobes]\n";
    const AFTER: &[u8] = b"\
1000-2000 r-xp 00000000 08:01 11 /usr/bin/a\n\
5000-6000 r-xp 00000000 08:01 13 /usr/lib/c.so\n";

    fn space() -> Space {
        let mut space = Space::new(1, Maps::parse(BEFORE).expect("valid"));
        space.learn(2..=2, Maps::parse(AFTER).expect("valid"));
        space
    }

    fn words<const N: usize>(addresses: [u64; N]) -> [FrameWord; N] {
        addresses.map(FrameWord)
    }

    #[test]
    fn a_frame_that_names_its_module_needs_no_list() {
        let place = FramePlace::Module { number: 3, offset: 0x5010 };
        let frames = [FrameWord::of(place), FrameWord(0x1010)];
        assert!(Space::default().covers(9, &frames[..1]));
        let stack = space().place_stack(9, Outcome::Complete, &frames);
        assert_eq!(stack.frames[0], (None, Place::Module { number: 3, offset: 0x5010 }));
        assert_eq!(inode(&stack, 1), 11);
    }

    #[test]
    fn a_byte_of_a_file_lies_where_it_lay_at_the_stacks_time() {
        let file =
            |inode| match &space().maps().expect("a list").find(0x1000).expect("mapped").backing {
                Backing::File { id, .. } => Some(FileId { inode, ..*id }),
                other => panic!("no file: {other:?}"),
            };
        assert_eq!(space().avma(1, file(12), 0x3010), Some(0x5010));
        assert_eq!(space().avma(2, file(13), 0x10), Some(0x5010));
        assert_eq!(space().avma(2, file(13), 0x1010), None);
        assert_eq!(space().avma(2, file(14), 0x10), None);
    }

    fn inode(stack: &PlacedStack, frame: usize) -> u64 {
        match &stack.frames[frame].1 {
            Place::File { id, .. } => id.inode,
            other => panic!("no file: {other:?}"),
        }
    }

    #[test]
    fn the_same_address_is_another_library_after_a_dlclose() {
        let before = space().place_stack(1, Outcome::Complete, &words([0x5010]));
        let after = space().place_stack(2, Outcome::Complete, &words([0x5010]));
        assert_eq!((inode(&before, 0), inode(&after, 0)), (12, 13));
        assert_eq!(
            before.frames[0].1,
            Place::File {
                id: match before.frames[0].1 {
                    Place::File { id, .. } => id,
                    _ => unreachable!(),
                },
                file_offset: 0x3010
            }
        );
    }

    #[test]
    fn a_frame_that_is_not_code_ends_the_stack() {
        let stack = space().place_stack(1, Outcome::Complete, &words([0x1010, 0x2010, 0x1020]));
        assert_eq!(stack.frames.len(), 1);
        assert_eq!(stack.outcome, StackOutcome::BadAddress);
    }

    #[test]
    fn a_foreign_return_probe_ends_the_stack() {
        let stack = space().place_stack(1, Outcome::Complete, &words([0x1010, 0x7000, 0x1020]));
        assert_eq!((stack.frames.len(), stack.outcome), (1, StackOutcome::Trampoline));
    }

    #[test]
    fn the_immediate_caller_is_kept_whatever_it_is() {
        let stack = space().place_stack(1, Outcome::NoFramePointer, &words([0x9999]));
        assert_eq!(stack.frames, [(Some(0x9999), Place::Anonymous)]);
        assert_eq!(stack.outcome, StackOutcome::NoFramePointer);
    }

    #[test]
    fn a_library_that_may_have_taken_anothers_place_is_not_named() {
        let mut space = Space::new(0, Maps::parse(BEFORE).expect("valid"));
        space.learn(8..=8, Maps::parse(AFTER).expect("valid"));
        // The program is in both lists, the library's place is another's in the second one.
        let stack = space.place_stack(4, Outcome::Complete, &words([0x1010, 0x5010]));
        assert_eq!((stack.frames.len(), stack.outcome), (1, StackOutcome::BadAddress));
        let near = |epoch| space.place_stack(epoch, Outcome::Complete, &words([0x1010, 0x5010]));
        assert_eq!((inode(&near(2), 1), inode(&near(7), 1)), (12, 13));
        assert_eq!([near(3), near(6)].map(|stack| stack.frames.len()), [1, 1]);
        space.learn(4..=5, Maps::parse(BEFORE).expect("valid"));
        let stack = space.place_stack(4, Outcome::Complete, &words([0x1010, 0x5010]));
        assert_eq!(inode(&stack, 1), 12);
    }
}
