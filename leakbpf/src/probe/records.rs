//! What comes through the ring buffer.

use leakbpf_common::abi::{
    EndedRecord, ExecRecord, ForkRecord, FrameWord, LibrariesRecord, MAX_FRAMES, MappingRecord,
    Outcome, Owner, PageRecord, RecordHead, RecordKind, StackId, StackRecord, UnmappedRecord,
};

/// A stack whose site is new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewStack {
    pub head: RecordHead,
    pub stack: StackId,
    pub library_epoch: u32,
    pub outcome: Outcome,
    /// Innermost first.
    pub frames: Vec<FrameWord>,
}

/// One record of the ring buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    Stack(NewStack),
    Mapping(MappingRecord),
    Fork(ForkRecord),
    Exec(ExecRecord),
    /// Libraries came or went.
    Libraries(LibrariesRecord),
    /// A process was met for the first time.
    Seen(LibrariesRecord),
    /// A process has code that the kernel side does not know.
    Unmapped(UnmappedRecord),
    /// The thread that a process's probes hung on; others may go on.
    CarrierEnded(RecordHead),
    /// A chosen page was touched.
    Page(PageRecord),
    /// A process has ended.
    Ended(EndedRecord),
}

/// Words of a record, in order.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn u32(&mut self) -> Option<u32> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_ne_bytes(*word))
    }

    fn u64(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_ne_bytes(*word))
    }

    fn head(&mut self) -> Option<RecordHead> {
        Some(RecordHead {
            kind: self.u32()?,
            tid: self.u32()?,
            owner: Owner(self.u64()?),
            time_ns: self.u64()?,
        })
    }
}

impl Record {
    /// `None` when the bytes are no record of this version.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut words = Words(bytes);
        let head = words.head()?;
        const STACK: u32 = RecordKind::Stack as u32;
        const MAPPING: u32 = RecordKind::Mapping as u32;
        const FORK: u32 = RecordKind::Fork as u32;
        const EXEC: u32 = RecordKind::Exec as u32;
        const LIBRARIES: u32 = RecordKind::Libraries as u32;
        const SEEN: u32 = RecordKind::Seen as u32;
        const UNMAPPED: u32 = RecordKind::Unmapped as u32;
        const CARRIER_ENDED: u32 = RecordKind::CarrierEnded as u32;
        const PAGE: u32 = RecordKind::Page as u32;
        const ENDED: u32 = RecordKind::Ended as u32;
        Some(match head.kind {
            STACK => {
                let stack = StackId(words.u64()?);
                let library_epoch = words.u32()?;
                let outcome = Outcome::from_u32(words.u32()?)?;
                let count = usize::try_from(words.u64()?).ok()?;
                if count > MAX_FRAMES {
                    return None;
                }
                let frames =
                    (0..count).map(|_| words.u64().map(FrameWord)).collect::<Option<_>>()?;
                Self::Stack(NewStack { head, stack, library_epoch, outcome, frames })
            }
            MAPPING => Self::Mapping(MappingRecord {
                head,
                change: words.u32()?,
                inside_allocator: words.u32()?,
                address: words.u64()?,
                length_bytes: words.u64()?,
                flags: words.u64()?,
                result: words.u64()? as i64,
                stack: StackId(words.u64()?),
            }),
            FORK => Self::Fork(ForkRecord {
                head,
                child: Owner(words.u64()?),
                child_tgid: words.u32()?,
                flags: words.u32()?,
            }),
            EXEC => Self::Exec(ExecRecord {
                head,
                old: Owner(words.u64()?),
                old_flags: words.u32()?,
                old_tid: words.u32()?,
            }),
            LIBRARIES | SEEN => {
                let record = LibrariesRecord { head, library_epoch: words.u32()?, pad: 0 };
                if head.kind == SEEN { Self::Seen(record) } else { Self::Libraries(record) }
            }
            UNMAPPED => Self::Unmapped(UnmappedRecord {
                head,
                library_epoch: words.u32()?,
                pad: words.u32()?,
                address: words.u64()?,
            }),
            CARRIER_ENDED => Self::CarrierEnded(head),
            PAGE => {
                Self::Page(PageRecord { head, address: words.u64()?, stack: StackId(words.u64()?) })
            }
            ENDED => Self::Ended(EndedRecord { head, cpu_ns: words.u64()? }),
            _ => return None,
        })
    }
}

const _: () = assert!(std::mem::offset_of!(StackRecord, frames) == 48);

#[cfg(test)]
mod tests {
    use leakbpf_common::abi::FramePlace;

    use super::*;

    fn bytes(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn a_stack_has_as_many_frames_as_it_says() {
        let record = bytes(&[1 | 7 << 32, 9, 100, 5, 3 | 1 << 32, 2, 0xaa, 0xbb]);
        let Some(Record::Stack(stack)) = Record::parse(&record) else { panic!("no stack") };
        assert_eq!(stack.frames, [FrameWord(0xaa), FrameWord(0xbb)]);
        assert_eq!((stack.library_epoch, stack.outcome), (3, Outcome::Truncated));
        assert_eq!(stack.head.tid, 7);
    }

    #[test]
    fn a_frame_below_a_signal_is_told_from_a_return_address() {
        let record = bytes(&[1 | 7 << 32, 9, 100, 5, 3 | 1 << 32, 2, 0xaa, 0xbb | 1 << 63]);
        let Some(Record::Stack(stack)) = Record::parse(&record) else { panic!("no stack") };
        let places = stack.frames.iter().map(|frame| (frame.place(), frame.is_interrupted()));
        let at = |avma, interrupted| (FramePlace::Address(avma), interrupted);
        assert_eq!(places.collect::<Vec<_>>(), [at(0xaa, false), at(0xbb, true)]);
    }

    #[test]
    fn a_short_or_unknown_record_is_refused() {
        let record = bytes(&[1, 9, 100, 5, 3, 2, 0xaa]);
        assert_eq!(Record::parse(&record), None);
        assert_eq!(Record::parse(&record[..11]), None);
        assert_eq!(Record::parse(&bytes(&[77, 0, 0])), None);
        assert_eq!(Record::parse(&bytes(&[1, 9, 100, 5, 3, u64::MAX])), None);
    }
}
