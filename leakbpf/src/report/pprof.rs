//! pprof: a gzipped `perftools.profiles.Profile`, for `go tool pprof` and everything that reads it.
//!
//! Source of the message and its rules: google/pprof, proto/profile.proto.

use std::collections::HashMap;
use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message;

use super::{ReportOptions, names, units};
use leakbpf_common::pages::PAGE_BYTES;

use crate::profile::{Frame, Mode, ModuleId, Process, Profile, Site, Symbol};

mod proto;

/// The values of each sample, in this order. The last is the one that pprof shows unless asked.
pub const SAMPLE_TYPES: [(&str, &str); 4] = [
    ("alloc_objects", "count"),
    ("alloc_space", "bytes"),
    ("inuse_objects", "count"),
    ("inuse_space", "bytes"),
];

/// One sample a site, whatever it holds; allocators' own mappings are left out, as in the totals.
pub fn write(profile: &Profile, options: &ReportOptions, out: &mut dyn Write) -> io::Result<()> {
    let message = message(profile, options).encode_to_vec();
    let mut gzip = GzEncoder::new(out, Compression::fast());
    gzip.write_all(&message)?;
    gzip.finish()?;
    Ok(())
}

fn message(profile: &Profile, options: &ReportOptions) -> proto::Profile {
    let mut tables = Tables::new(profile);
    let samples: Vec<_> = profile
        .sites
        .iter()
        .filter(|site| profile.mode.counts(site.kind))
        .map(|site| tables.sample(profile, site))
        .collect();
    let sample_type = SAMPLE_TYPES
        .into_iter()
        .map(|(kind, unit)| proto::ValueType {
            r#type: tables.strings.id(kind),
            unit: tables.strings.id(unit),
        })
        .collect();
    let comment = comments(profile, options).iter().map(|line| tables.strings.id(line)).collect();
    proto::Profile {
        sample_type,
        sample: samples,
        mapping: mappings(profile, &mut tables),
        location: tables.locations,
        function: tables.functions,
        time_nanos: signed(profile.started_unix_ns),
        duration_nanos: signed(profile.duration_ns),
        period_type: Some(proto::ValueType {
            r#type: tables.strings.id("space"),
            unit: tables.strings.id("bytes"),
        }),
        // Every byte is counted, or so many stand behind each page that is seen.
        period: match profile.mode {
            Mode::Exact | Mode::Windows => 1,
            Mode::Pages { one_in } => i64::from(one_in) * PAGE_BYTES as i64,
            Mode::Sample { interval_bytes, .. } => interval_bytes.into(),
        },
        comment,
        default_sample_type: tables.strings.id("inuse_space"),
        string_table: tables.strings.table,
        ..proto::Profile::default()
    }
}

fn comments(profile: &Profile, options: &ReportOptions) -> Vec<String> {
    let mut comments = vec![format!(
        "leakbpf {}, mode {}, host {}, kernel {}",
        env!("CARGO_PKG_VERSION"),
        profile.mode.name(),
        profile.hostname,
        profile.kernel
    )];
    if let Some(note) = names::estimate_note(profile.mode) {
        let interval = profile.totals_interval().map(names::interval).unwrap_or_default();
        let alloc = match profile.mode {
            Mode::Pages { .. } => "; alloc: touched",
            Mode::Exact | Mode::Sample { .. } | Mode::Windows => "",
        };
        comments.push(format!("inuse: {note}{interval}{alloc}"));
    }
    let filter = options.filter_in(profile.mode);
    if !filter.keeps_all() {
        comments.push(format!(
            "inuse: only blocks of {} bytes and more, and {} and older",
            filter.min_size_bytes,
            units::duration(filter.min_age_ns)
        ));
    }
    for (name, count) in profile.losses.iter().filter(|(_, count)| **count > 0) {
        comments.push(format!("lost: {name} {count}"));
    }
    comments
}

/// pprof calls the first mapping the main program.
fn mappings(profile: &Profile, tables: &mut Tables) -> Vec<proto::Mapping> {
    let main = profile.processes.first().map(|process| process.exe.as_str());
    let mut mappings: Vec<_> = (1..)
        .zip(&profile.modules)
        .map(|(id, module)| {
            let (start, end, offset) = module.mapping.unwrap_or_default();
            proto::Mapping {
                id,
                memory_start: start,
                memory_limit: end,
                file_offset: offset,
                filename: tables.strings.id(&module.path),
                build_id: tables.strings.id(module.build_id.as_deref().unwrap_or_default()),
                has_functions: true,
                has_filenames: true,
                has_line_numbers: true,
                has_inline_frames: true,
            }
        })
        .collect();
    if let Some(first) =
        profile.modules.iter().position(|module| Some(module.path.as_str()) == main)
    {
        mappings.swap(0, first);
    }
    mappings
}

/// Everything that samples refer to by number.
struct Tables<'a> {
    strings: Strings,
    functions: Vec<proto::Function>,
    function_ids: HashMap<(i64, i64), u64>,
    locations: Vec<proto::Location>,
    frame_ids: HashMap<(u64, Option<ModuleId>, &'a [Symbol]), u64>,
    mark_ids: HashMap<&'static str, u64>,
    /// Label values of the processes.
    labels: Vec<ProcessLabels>,
    key_pid: i64,
    key_comm: i64,
    key_kind: i64,
}

#[derive(Clone, Copy)]
struct ProcessLabels {
    pid: i64,
    comm: i64,
}

impl<'a> Tables<'a> {
    fn new(profile: &Profile) -> Self {
        let mut strings = Strings::new();
        let labels = |process: &Process| (i64::from(process.pid), process.comm.clone());
        let labels: Vec<_> = profile.processes.iter().map(labels).collect();
        let labels = labels
            .into_iter()
            .map(|(pid, comm)| ProcessLabels { pid, comm: strings.id(&comm) })
            .collect();
        Self {
            key_pid: strings.id("pid"),
            key_comm: strings.id("comm"),
            key_kind: strings.id("kind"),
            strings,
            functions: Vec::new(),
            function_ids: HashMap::new(),
            locations: Vec::new(),
            frame_ids: HashMap::new(),
            mark_ids: HashMap::new(),
            labels,
        }
    }

    fn sample(&mut self, profile: &Profile, site: &'a Site) -> proto::Sample {
        let mut location_id = Vec::with_capacity(site.frames.len() + 1);
        let mut last: Option<*const Frame> = None;
        for line in names::lines(site) {
            match line {
                names::Line::Mark(mark) => location_id.push(self.mark(mark)),
                names::Line::Function { frame, .. } | names::Line::Unnamed(frame) => {
                    // The inlined lines of one frame are one location.
                    if last.replace(frame) != Some(frame) {
                        location_id.push(self.frame(profile, frame));
                    }
                }
            }
        }
        let counters = &site.counters;
        let mut label = Vec::with_capacity(3);
        if let Some(labels) = self.labels.get(site.process.0) {
            label.push(proto::Label {
                key: self.key_pid,
                num: labels.pid,
                ..proto::Label::default()
            });
            label.push(proto::Label {
                key: self.key_comm,
                str: labels.comm,
                ..proto::Label::default()
            });
        }
        label.push(proto::Label {
            key: self.key_kind,
            str: self.strings.id(site.kind.name()),
            ..proto::Label::default()
        });
        proto::Sample {
            location_id,
            value: vec![
                signed(counters.allocated_count),
                signed(counters.allocated_bytes),
                signed(counters.live_count),
                signed(counters.live_bytes),
            ],
            label,
        }
    }

    fn mark(&mut self, mark: &'static str) -> u64 {
        if let Some(id) = self.mark_ids.get(mark) {
            return *id;
        }
        let function_id = self.function(mark, "");
        let line = proto::Line { function_id, line: 0 };
        let id = self.locate(0, 0, vec![line]);
        self.mark_ids.insert(mark, id);
        id
    }

    fn frame(&mut self, profile: &Profile, frame: &'a Frame) -> u64 {
        let key = (frame.address, frame.module, &*frame.symbols);
        if let Some(id) = self.frame_ids.get(&key) {
            return *id;
        }
        let mut lines: Vec<_> = frame
            .symbols
            .iter()
            .map(|symbol| proto::Line {
                function_id: self
                    .function(&symbol.function, symbol.file.as_deref().unwrap_or_default()),
                line: symbol.line.map(i64::from).unwrap_or_default(),
            })
            .collect();
        if lines.is_empty() {
            let name = names::Line::Unnamed(frame).name(profile).into_owned();
            lines.push(proto::Line { function_id: self.function(&name, ""), line: 0 });
        }
        let mapping = frame.module.filter(|module| module.0 < profile.modules.len());
        let mapping_id = mapping.map_or(0, |module| module.0 as u64 + 1);
        let id = self.locate(mapping_id, frame.address, lines);
        self.frame_ids.insert(key, id);
        id
    }

    fn locate(&mut self, mapping_id: u64, address: u64, line: Vec<proto::Line>) -> u64 {
        let id = self.locations.len() as u64 + 1;
        self.locations.push(proto::Location { id, mapping_id, address, line, is_folded: false });
        id
    }

    fn function(&mut self, name: &str, file: &str) -> u64 {
        let key = (self.strings.id(name), self.strings.id(file));
        let next = self.functions.len() as u64 + 1;
        let id = *self.function_ids.entry(key).or_insert(next);
        if id == next {
            self.functions.push(proto::Function {
                id,
                name: key.0,
                system_name: key.0,
                filename: key.1,
                start_line: 0,
            });
        }
        id
    }
}

/// The string table; the first string is empty.
struct Strings {
    table: Vec<String>,
    ids: HashMap<String, i64>,
}

impl Strings {
    fn new() -> Self {
        Self { table: vec![String::new()], ids: HashMap::from([(String::new(), 0)]) }
    }

    fn id(&mut self, text: &str) -> i64 {
        if let Some(id) = self.ids.get(text) {
            return *id;
        }
        let id = self.table.len() as i64;
        self.table.push(text.to_owned());
        self.ids.insert(text.to_owned(), id);
        id
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;
    use crate::profile::samples;

    fn decoded(profile: &Profile) -> proto::Profile {
        let mut file = Vec::new();
        write(profile, &ReportOptions::default(), &mut file).unwrap();
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(file.as_slice()).read_to_end(&mut bytes).unwrap();
        proto::Profile::decode(bytes.as_slice()).unwrap()
    }

    proptest! {
        #[test]
        fn what_pprof_reads_adds_up_and_every_reference_leads_somewhere(
            profile in samples::any_profile()
        ) {
            let message = decoded(&profile);
            let sum = |value: usize| -> i64 {
                message.sample.iter().map(|sample| sample.value[value]).sum()
            };
            let totals = profile.totals();
            prop_assert_eq!(sum(0), signed(totals.allocated_count));
            prop_assert_eq!(sum(1), signed(totals.allocated_bytes));
            // Each site has left out a fraction of a block at most.
            let fractions = match profile.mode {
                Mode::Sample { .. } => signed(profile.sites.len() as u64),
                _ => 0,
            };
            let left_out = signed(totals.live_count) - sum(2);
            prop_assert!((0..=fractions).contains(&left_out), "{left_out}");
            prop_assert_eq!(sum(3), signed(totals.live_bytes));
            for sample in &message.sample {
                prop_assert!(!sample.location_id.is_empty());
                for id in &sample.location_id {
                    prop_assert_eq!(message.location[*id as usize - 1].id, *id);
                }
            }
            for location in &message.location {
                prop_assert!(
                    location.mapping_id == 0
                        || message.mapping.iter().any(|mapping| mapping.id == location.mapping_id)
                );
                for line in &location.line {
                    let function = &message.function[line.function_id as usize - 1];
                    prop_assert!((function.name as usize) < message.string_table.len());
                }
            }
        }
    }

    #[test]
    fn inlined_functions_are_lines_of_one_location_innermost_first() {
        let message = decoded(&samples::server());
        let name = |id: u64| {
            message.string_table[message.function[id as usize - 1].name as usize].as_str()
        };
        let inlined = message.location.iter().find(|location| location.line.len() > 1).unwrap();
        let names: Vec<_> = inlined.line.iter().map(|line| name(line.function_id)).collect();
        assert_eq!(names, ["buffer_new", "connection_accept"]);
    }
}
