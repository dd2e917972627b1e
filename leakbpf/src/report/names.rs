//! The frames of a site as every format names them.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::units;
use crate::profile::estimate::{CONFIDENCE_PERCENT, Interval};
use crate::profile::{Frame, Mode, Module, Process, Profile, Site, SiteKind, StackOutcome, Symbol};

/// One line of a stack: an inlined function has a line of its own.
#[derive(Debug, Clone, Copy)]
pub enum Line<'a> {
    /// In brackets: stands where a frame would be.
    Mark(&'static str),
    Function {
        frame: &'a Frame,
        symbol: &'a Symbol,
    },
    /// A frame that nothing names.
    Unnamed(&'a Frame),
}

impl<'a> Line<'a> {
    /// As the profile has it: may hold any character.
    pub fn name(&self, profile: &'a Profile) -> Cow<'a, str> {
        match self {
            Self::Mark(mark) => Cow::Borrowed(mark),
            Self::Function { symbol, .. } => Cow::Borrowed(&symbol.function),
            Self::Unnamed(frame) => Cow::Owned(match module(profile, frame) {
                Some(module) => format!("{}+{:#x}", base_name(&module.path), frame.offset),
                None => format!("[unknown] {:#x}", frame.address),
            }),
        }
    }
}

/// The lines of a site's stack, innermost first: the kind of memory when it is not the heap, the
/// frames, and what is missing.
pub fn lines<'a>(site: &'a Site) -> impl Iterator<Item = Line<'a>> {
    let kind = kind_mark(site.kind).map(Line::Mark);
    let gap = match gap_mark(site.outcome) {
        None if site.frames.is_empty() => Some("[no frames]"),
        gap => gap,
    };
    kind.into_iter().chain(site.frames.iter().flat_map(frame_lines)).chain(gap.map(Line::Mark))
}

/// The lines of one frame, innermost first.
pub fn frame_lines(frame: &Frame) -> impl Iterator<Item = Line<'_>> {
    let unnamed = frame.symbols.is_empty().then_some(Line::Unnamed(frame));
    let functions = frame.symbols.iter().map(move |symbol| Line::Function { frame, symbol });
    functions.chain(unnamed)
}

pub fn module<'a>(profile: &'a Profile, frame: &Frame) -> Option<&'a Module> {
    frame.module.and_then(|id| profile.module(id))
}

/// What the numbers mean where they are no exact ones.
pub fn estimate_note(mode: Mode) -> Option<String> {
    Some(match mode {
        Mode::Exact => return None,
        Mode::Sample { interval_bytes, since_ns } => {
            let interval = units::bytes(interval_bytes.into());
            let since = match since_ns {
                0 => String::new(),
                _ => format!(" since {} after the begin", units::duration(since_ns)),
            };
            format!(
                "blocks are sampled{since}, one every {interval} on average: heap numbers are \
                 estimates"
            )
        }
        Mode::Windows => {
            "estimated from what outlived short windows of time and was not seen to be \
                          released in later ones"
                .to_owned()
        }
        Mode::Pages { one_in: 1 } => {
            "resident anonymous memory by the code that touched each page first".to_owned()
        }
        Mode::Pages { one_in } => format!(
            "resident anonymous memory by the code that touched each page first; estimated from 1 \
             in {one_in} pages"
        ),
    })
}

/// Behind an estimate.
pub fn interval(interval: Interval) -> String {
    let (low, high) = interval.bytes;
    match low == high {
        true => String::new(),
        false => {
            format!("  ({CONFIDENCE_PERCENT}%: {} to {})", units::bytes(low), units::bytes(high))
        }
    }
}

const fn kind_mark(kind: SiteKind) -> Option<&'static str> {
    match kind {
        SiteKind::Heap | SiteKind::Resident | SiteKind::Survivor => None,
        SiteKind::Mapping => Some("[mapping]"),
        SiteKind::ThreadStack => Some("[thread stack]"),
        SiteKind::AllocatorMapping => Some("[allocator mapping]"),
    }
}

const fn gap_mark(outcome: StackOutcome) -> Option<&'static str> {
    match outcome {
        StackOutcome::Complete => None,
        StackOutcome::Truncated => Some("[truncated]"),
        StackOutcome::NoFramePointer => Some("[no frame pointer]"),
        StackOutcome::Unreadable => Some("[unreadable stack]"),
        StackOutcome::BadAddress => Some("[bad return address]"),
        StackOutcome::Trampoline => Some("[return probe]"),
        StackOutcome::Lost => Some("[lost]"),
        StackOutcome::NoRow => Some("[no unwind rows]"),
        StackOutcome::StackNotGrowing => Some("[stack not growing]"),
        StackOutcome::UnsupportedRule => Some("[unsupported unwind rule]"),
    }
}

pub fn base_name(path: &str) -> &str {
    path.rsplit('/').find(|part| !part.is_empty()).unwrap_or(path)
}

/// The root frame of a process: `comm-pid`, as perf's scripts write it.
pub fn process_name(process: Option<&Process>) -> String {
    match process {
        Some(process) => format!("{}-{}", process.comm, process.pid),
        None => "[unknown process]".to_owned(),
    }
}

/// Makes a name harmless: programs choose their own names, and one with an escape sequence would
/// command the reader's terminal, one that reverses the direction of text would lie.
pub fn printable(name: &str) -> Cow<'_, str> {
    if !name.chars().any(is_harmful) {
        return Cow::Borrowed(name);
    }
    let mut clean = String::with_capacity(name.len() + 8);
    for character in name.chars() {
        if is_harmful(character) {
            // Writing to a String cannot fail.
            let _ = write!(clean, "{}", character.escape_unicode());
        } else {
            clean.push(character);
        }
    }
    Cow::Owned(clean)
}

fn is_harmful(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{fffe}' | '\u{ffff}')
}

/// A name as a part of a folded line, where `;` separates: perf's scripts put `:` in its place.
pub fn folded(name: &str) -> String {
    printable(name).replace(';', ":")
}
