//! Reports: pure functions of a [`Profile`], one format a file.
//!
//! All of them count the same memory: what the program asked for
//! ([`SiteKind::belongs_to_totals`](crate::profile::SiteKind::belongs_to_totals)). Where a stack or
//! a name is missing, a frame in brackets takes its place, so that the totals of all formats agree.

use std::cmp::Reverse;
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;

use crate::profile::{BlockFilter, Mode, Profile, Site, SiteId};

mod file;
pub mod folded;
pub mod json;
mod names;
pub use names::printable;
pub use units::{bytes, duration};
pub mod pprof;
pub mod svg;
#[cfg(test)]
mod tests;
pub mod text;
mod units;

pub use file::{FileError, ReportFile};

/// What a report is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    Text,
    Json,
    Svg,
    Folded,
    Pprof,
}

/// The name of a format that there is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no format is called {0:?}: choose text, json, svg, folded or pprof")]
pub struct UnknownFormat(pub String);

impl Format {
    pub const ALL: [Self; 5] = [Self::Text, Self::Json, Self::Svg, Self::Folded, Self::Pprof];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
            Self::Svg => "svg",
            Self::Folded => "folded",
            Self::Pprof => "pprof",
        }
    }

    /// The format that a file name asks for; `None` means a recording.
    pub fn from_path(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        [
            (".svg", Self::Svg),
            (".pb.gz", Self::Pprof),
            (".pprof", Self::Pprof),
            (".json", Self::Json),
            (".folded", Self::Folded),
            (".txt", Self::Text),
        ]
        .into_iter()
        .find_map(|(suffix, format)| name.ends_with(suffix).then_some(format))
    }
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        Self::ALL
            .into_iter()
            .find(|format| format.name() == name)
            .ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

/// What the sites are ranked by, largest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sort {
    /// Live bytes.
    #[default]
    Bytes,
    /// Live blocks.
    Count,
    /// Age of the oldest live block.
    Age,
}

/// How a report is to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReportOptions {
    /// How many sites to list, in [`Format::Text`] and [`Format::Json`]. The other formats always
    /// hold all, because their widths and sums would be wrong otherwise.
    pub top: Option<usize>,
    pub sort: Sort,
    /// What the profile was restricted to, so that the report can say so.
    pub filter: BlockFilter,
    /// List the blocks of [`Profile::blocks`] in [`Format::Json`] and [`Format::Text`].
    pub with_blocks: bool,
    /// Use terminal colours in [`Format::Text`].
    pub color: bool,
    /// Columns of the terminal, which long names are fitted to. Without it they are never cut.
    pub width: Option<usize>,
}

impl ReportOptions {
    /// What a profile of this mode was restricted to: estimates from windows are no list of blocks.
    pub fn filter_in(&self, mode: Mode) -> BlockFilter {
        match mode {
            Mode::Windows => BlockFilter::default(),
            _ => self.filter,
        }
    }
}

/// Writes `profile` to `out`. Fails only when `out` does.
pub fn write(
    format: Format,
    profile: &Profile,
    options: &ReportOptions,
    out: &mut dyn Write,
) -> io::Result<()> {
    match format {
        Format::Text => text::write(profile, options, out),
        Format::Json => json::write(profile, options, out),
        Format::Svg => svg::write(profile, options, out),
        Format::Folded => folded::write(profile, options, out),
        Format::Pprof => pprof::write(profile, options, out),
    }
}

/// Sites in the order of `sort`, those that belong to the totals first.
fn ranked(profile: &Profile, sort: Sort) -> Vec<(SiteId, &Site)> {
    let mut sites: Vec<_> =
        profile.sites.iter().enumerate().map(|(index, site)| (SiteId(index), site)).collect();
    sites.sort_by_key(|(_, site)| {
        let counters = &site.counters;
        let bytes = (counters.live_bytes, counters.live_count);
        let rank = match sort {
            Sort::Bytes => (bytes.0, bytes.1, 0),
            Sort::Count => (bytes.1, bytes.0, 0),
            Sort::Age => {
                (site.oldest_age_ns.map_or(0, |age| age.saturating_add(1)), bytes.0, bytes.1)
            }
        };
        (!profile.mode.counts(site.kind), Reverse(rank))
    });
    sites
}
