//! JSON, schema 1: docs/json.md describes every field.

use std::collections::BTreeMap;
use std::io::{self, Write};

use leakbpf_common::abi::Loss;
use serde::{Serialize, Serializer};

use super::{ReportOptions, names, ranked};
use crate::profile::estimate::{CONFIDENCE_PERCENT, Interval};
use crate::profile::{Block, Counters, Mode, Profile, Site, SiteId};

/// Raised when a field changes its meaning or goes away, not when one is added.
pub const SCHEMA: u32 = 1;

pub fn write(profile: &Profile, options: &ReportOptions, out: &mut dyn Write) -> io::Result<()> {
    let mut listed = ranked(profile, options.sort);
    let site_count = listed.len();
    listed.truncate(options.top.unwrap_or(usize::MAX));
    let document = Document { profile, options, listed: &listed, site_count };
    serde_json::to_writer(&mut *out, &document).map_err(io::Error::from)?;
    out.write_all(b"\n")
}

struct Document<'a> {
    profile: &'a Profile,
    options: &'a ReportOptions,
    listed: &'a [(SiteId, &'a Site)],
    site_count: usize,
}

#[derive(Serialize)]
struct Head<'a, S: Serialize, B: Serialize> {
    schema: u32,
    leakbpf: &'static str,
    mode: &'static str,
    finished: bool,
    started_unix_ns: u64,
    duration_ns: u64,
    kernel: &'a str,
    hostname: &'a str,
    filter: Filter,
    #[serde(skip_serializing_if = "Option::is_none")]
    estimate: Option<Estimate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    windows: Option<Windows>,
    #[serde(skip_serializing_if = "Option::is_none")]
    page_interval: Option<u32>,
    cost: Cost,
    processes: Vec<Process<'a>>,
    totals: Totals,
    allocator_totals: Totals,
    stacks: BTreeMap<&'static str, u64>,
    losses: BTreeMap<&'a str, u64>,
    events: Vec<Event<'a>>,
    site_count: usize,
    sites: S,
    #[serde(skip_serializing_if = "Option::is_none")]
    blocks: Option<B>,
}

/// How the numbers came to be, where they are no exact ones.
#[derive(Serialize)]
struct Estimate {
    unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    one_in: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sample_interval_bytes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sampled_since_ns: Option<u64>,
    confidence_percent: u32,
}

/// The windows in which every call was counted, and what survived them.
#[derive(Serialize)]
struct Windows {
    count: u32,
    open_ns: u64,
    survival_ns: u64,
    survivors: Totals,
}

#[derive(Serialize)]
struct Cost {
    #[serde(skip_serializing_if = "Option::is_none")]
    max_overhead_percent: Option<f64>,
    overhead_percent: Option<f64>,
    target_cpu_ns: u64,
    spent_ns: u64,
    probe_hits: u64,
    agent_cpu_ns: u64,
    agent_peak_rss_bytes: u64,
}

#[derive(Serialize)]
struct Filter {
    min_age_ns: u64,
    min_size_bytes: u64,
}

#[derive(Serialize)]
struct Process<'a> {
    pid: u32,
    parent_pid: Option<u32>,
    start_time: u64,
    comm: &'a str,
    exe: &'a str,
    cmdline: &'a str,
    cgroup: &'a str,
    end: Option<&'a str>,
}

#[derive(Serialize)]
struct Totals {
    live_bytes: u64,
    live_count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    live_bytes_interval: Option<[u64; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    live_count_interval: Option<[u64; 2]>,
    allocated_bytes: u64,
    allocated_count: u64,
    freed_bytes: u64,
    freed_count: u64,
}

impl Totals {
    fn of(counters: &Counters, interval: Option<Interval>) -> Self {
        Self {
            live_bytes: counters.live_bytes,
            live_count: counters.live_count,
            live_bytes_interval: interval.map(|it| it.bytes.into()),
            live_count_interval: interval.map(|it| it.count.into()),
            allocated_bytes: counters.allocated_bytes,
            allocated_count: counters.allocated_count,
            freed_bytes: counters.freed_bytes,
            freed_count: counters.freed_count,
        }
    }
}

#[derive(Serialize)]
struct Event<'a> {
    at_ns: u64,
    pid: Option<u32>,
    text: &'a str,
}

#[derive(Serialize)]
struct SiteEntry<'a> {
    pid: Option<u32>,
    process: usize,
    kind: &'static str,
    #[serde(flatten)]
    counters: Totals,
    oldest_age_ns: Option<u64>,
    youngest_age_ns: Option<u64>,
    stack_outcome: &'static str,
    frames: Vec<FrameEntry<'a>>,
}

#[derive(Serialize)]
struct FrameEntry<'a> {
    function: Option<&'a str>,
    module: Option<&'a str>,
    build_id: Option<&'a str>,
    offset: u64,
    address: u64,
    file: Option<&'a str>,
    line: Option<u32>,
    inlined: bool,
}

#[derive(Serialize)]
struct BlockEntry {
    pid: Option<u32>,
    process: usize,
    address: u64,
    size: u64,
    age_ns: u64,
    site: usize,
}

/// Serialises what an iterator yields, as it comes.
struct Sequence<F>(F);

impl<F, I> Serialize for Sequence<F>
where
    F: Fn() -> I,
    I: Iterator<Item: Serialize>,
{
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
}

impl Serialize for Document<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { profile, options, listed, site_count } = self;
        let mut positions = vec![None; profile.sites.len()];
        for (position, (id, _)) in listed.iter().enumerate() {
            if let Some(slot) = positions.get_mut(id.0) {
                *slot = Some(position);
            }
        }
        let positions = &positions;
        let totals = profile.totals();
        let blocks = options.with_blocks.then_some(Sequence(move || {
            profile.blocks.iter().filter_map(move |block| {
                let site = positions.get(block.site.0).copied().flatten()?;
                Some(block_entry(profile, block, site))
            })
        }));
        let mut losses: BTreeMap<&str, u64> =
            Loss::ALL.into_iter().map(|loss| (loss.name(), 0)).collect();
        losses.extend(profile.losses.iter().map(|(name, count)| (name.as_str(), *count)));
        Head {
            schema: SCHEMA,
            leakbpf: env!("CARGO_PKG_VERSION"),
            mode: profile.mode.name(),
            finished: profile.finished,
            started_unix_ns: profile.started_unix_ns,
            duration_ns: profile.duration_ns,
            kernel: &profile.kernel,
            hostname: &profile.hostname,
            filter: Filter {
                min_age_ns: options.filter_in(profile.mode).min_age_ns,
                min_size_bytes: options.filter_in(profile.mode).min_size_bytes,
            },
            estimate: match profile.mode {
                Mode::Exact => None,
                Mode::Windows => Some(Estimate {
                    unit: "survived",
                    one_in: None,
                    sample_interval_bytes: None,
                    sampled_since_ns: None,
                    confidence_percent: CONFIDENCE_PERCENT,
                }),
                Mode::Pages { one_in } => Some(Estimate {
                    unit: "resident",
                    one_in: Some(one_in),
                    sample_interval_bytes: None,
                    sampled_since_ns: None,
                    confidence_percent: CONFIDENCE_PERCENT,
                }),
                Mode::Sample { interval_bytes, since_ns } => Some(Estimate {
                    unit: "estimated",
                    one_in: None,
                    sample_interval_bytes: Some(interval_bytes),
                    sampled_since_ns: Some(since_ns),
                    confidence_percent: CONFIDENCE_PERCENT,
                }),
            },
            windows: profile.windows.map(|windows| Windows {
                count: windows.count,
                open_ns: windows.open_ns,
                survival_ns: windows.survival_ns(),
                survivors: Totals::of(&profile.survivor_totals(), profile.survivors_interval()),
            }),
            page_interval: profile.page_interval,
            cost: Cost {
                max_overhead_percent: profile.cost.limit_ppm.map(|ppm| f64::from(ppm) / 1e4),
                overhead_percent: profile.cost.share().map(|share| share * 100.0),
                target_cpu_ns: profile.cost.target_cpu_ns,
                spent_ns: profile.cost.spent_ns,
                probe_hits: profile.cost.hits,
                agent_cpu_ns: profile.cost.agent_cpu_ns,
                agent_peak_rss_bytes: profile.cost.agent_peak_rss_bytes,
            },
            processes: profile.processes.iter().map(process_entry).collect(),
            totals: Totals::of(&totals, profile.totals_interval()),
            allocator_totals: Totals::of(&profile.allocator_totals(), None),
            stacks: profile
                .stacks()
                .into_iter()
                .map(|(outcome, count)| (outcome.name(), count))
                .collect(),
            losses,
            events: profile
                .events
                .iter()
                .map(|event| Event { at_ns: event.at_ns, pid: event.pid, text: &event.text })
                .collect(),
            site_count: *site_count,
            sites: Sequence(|| listed.iter().map(|(_, site)| site_entry(profile, site))),
            blocks,
        }
        .serialize(serializer)
    }
}

fn process_entry(process: &crate::profile::Process) -> Process<'_> {
    Process {
        pid: process.pid,
        parent_pid: process.parent_pid,
        start_time: process.start_time,
        comm: &process.comm,
        exe: &process.exe,
        cmdline: &process.cmdline,
        cgroup: &process.cgroup,
        end: process.end.as_deref(),
    }
}

fn site_entry<'a>(profile: &'a Profile, site: &'a Site) -> SiteEntry<'a> {
    SiteEntry {
        pid: profile.process(site.process).map(|process| process.pid),
        process: site.process.0,
        kind: site.kind.name(),
        counters: Totals::of(&site.counters, profile.site_interval(site)),
        oldest_age_ns: site.oldest_age_ns,
        youngest_age_ns: site.youngest_age_ns,
        stack_outcome: site.outcome.name(),
        frames: site
            .frames
            .iter()
            .flat_map(|frame| {
                let module = names::module(profile, frame);
                names::frame_lines(frame).map(move |line| {
                    let symbol = match line {
                        names::Line::Function { symbol, .. } => Some(symbol),
                        _ => None,
                    };
                    FrameEntry {
                        function: symbol.map(|symbol| symbol.function.as_str()),
                        module: module.map(|module| module.path.as_str()),
                        build_id: module.and_then(|module| module.build_id.as_deref()),
                        offset: frame.offset,
                        address: frame.address,
                        file: symbol.and_then(|symbol| symbol.file.as_deref()),
                        line: symbol.and_then(|symbol| symbol.line),
                        inlined: symbol.is_some_and(|symbol| symbol.inlined),
                    }
                })
            })
            .collect(),
    }
}

fn block_entry(profile: &Profile, block: &Block, site: usize) -> BlockEntry {
    BlockEntry {
        pid: profile.process(block.process).map(|process| process.pid),
        process: block.process.0,
        address: block.address,
        size: block.size_bytes,
        age_ns: block.age_ns,
        site,
    }
}
