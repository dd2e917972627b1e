//! Profiles for tests.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use super::estimate::Spread;
use super::*;
use leakbpf_common::abi::Loss;

const SECOND: u64 = 1_000_000_000;

fn process(pid: u32, comm: &str) -> Process {
    Process {
        pid,
        parent_pid: Some(1),
        start_time: 8_123_456,
        comm: comm.to_owned(),
        exe: format!("/usr/bin/{comm}"),
        cmdline: format!("/usr/bin/{comm} --port 8080"),
        cgroup: format!("/system.slice/{comm}.service"),
        end: None,
    }
}

fn symbol(function: &str, place: Option<(&str, u32)>, inlined: bool) -> Symbol {
    Symbol {
        function: function.to_owned(),
        file: place.map(|(file, _)| file.to_owned()),
        line: place.map(|(_, line)| line),
        inlined,
    }
}

fn frame(address: u64, module: usize, offset: u64, symbols: Vec<Symbol>) -> Frame {
    Frame { address, module: Some(ModuleId(module)), offset, symbols: symbols.into() }
}

fn counters(live: (u64, u64), freed: (u64, u64)) -> Counters {
    Counters {
        live_bytes: live.0,
        live_count: live.1,
        allocated_bytes: live.0 + freed.0,
        allocated_count: live.1 + freed.1,
        freed_bytes: freed.0,
        freed_count: freed.1,
        spread: Spread::default(),
    }
}

/// A server and its worker: inlined frames, a stripped library, an incomplete stack, every kind of
/// memory, two blocks a site in the table of blocks at most, and no losses.
pub fn server() -> Profile {
    let main = || {
        frame(0x55d0_0000_1200, 0, 0x1200, vec![symbol("main", Some(("src/main.c", 88)), false)])
    };
    let start =
        || frame(0x7f00_0002_7c8a, 1, 0x27c8a, vec![symbol("__libc_start_main", None, false)]);
    let accept = frame(
        0x55d0_0000_1450,
        0,
        0x1450,
        vec![
            symbol("buffer_new", Some(("src/buffer.h", 17)), true),
            symbol("connection_accept", Some(("src/connection.c", 131)), false),
        ],
    );
    let stripped = frame(0x7f10_0000_0f00, 2, 0xf00, vec![]);
    let map = frame(0x7f00_0011_a2b0, 1, 0x11a2b0, vec![symbol("mmap64", None, false)]);
    let template = frame(
        0x55d0_0000_1990,
        0,
        0x1990,
        vec![symbol(
            "std::map<int, char [8], std::less<int>; Alloc>::operator[](int const&) 3",
            Some(("src/cache.cc", 7)),
            false,
        )],
    );
    let site =
        |process, kind, counters, ages: Option<(u64, u64)>, outcome, frames: Vec<Frame>| Site {
            process: ProcessId(process),
            kind,
            counters,
            oldest_age_ns: ages.map(|(oldest, _)| oldest),
            youngest_age_ns: ages.map(|(_, youngest)| youngest),
            outcome,
            frames: frames.into(),
        };
    let sites = vec![
        site(
            0,
            SiteKind::Heap,
            counters((1_048_576, 1), (4096, 4)),
            Some((2 * SECOND, 2 * SECOND)),
            StackOutcome::Complete,
            vec![template, main(), start()],
        ),
        site(
            0,
            SiteKind::Heap,
            counters((8_388_608, 2), (1_000_000, 904)),
            Some((29 * SECOND, SECOND / 2)),
            StackOutcome::Complete,
            vec![accept.clone(), main(), start()],
        ),
        site(
            1,
            SiteKind::Heap,
            counters((2048, 2), (0, 0)),
            Some((25 * SECOND, 24 * SECOND)),
            StackOutcome::NoFramePointer,
            vec![stripped, accept],
        ),
        site(
            0,
            SiteKind::Heap,
            counters((0, 0), (123_456, 12)),
            None,
            StackOutcome::Complete,
            vec![main(), start()],
        ),
        site(
            1,
            SiteKind::Mapping,
            counters((65_536, 1), (0, 0)),
            Some((12 * SECOND, 12 * SECOND)),
            StackOutcome::Complete,
            vec![map.clone(), main(), start()],
        ),
        site(
            1,
            SiteKind::ThreadStack,
            counters((8_392_704, 1), (0, 0)),
            Some((28 * SECOND, 28 * SECOND)),
            StackOutcome::Truncated,
            vec![map.clone()],
        ),
        site(
            0,
            SiteKind::AllocatorMapping,
            counters((134_217_728, 2), (0, 0)),
            Some((30 * SECOND, 20 * SECOND)),
            StackOutcome::Complete,
            vec![map, main(), start()],
        ),
        site(
            1,
            SiteKind::Heap,
            counters((10, 1), (0, 0)),
            Some((SECOND, SECOND)),
            StackOutcome::Lost,
            vec![],
        ),
    ];
    let block = |site: usize, process, address, size_bytes, age_ns| Block {
        process: ProcessId(process),
        site: SiteId(site),
        address,
        size_bytes,
        age_ns,
    };
    Profile {
        mode: Mode::Exact,
        finished: true,
        started_unix_ns: 1_785_600_000 * SECOND,
        duration_ns: 30 * SECOND,
        kernel: "6.12.0".to_owned(),
        hostname: "web-1".to_owned(),
        processes: vec![process(4321, "server"), process(4400, "worker")],
        modules: vec![
            Module {
                path: "/usr/bin/server".to_owned(),
                build_id: Some("5d41402abc4b2a76b9719d911017c592".to_owned()),
                mapping: Some((0x55d0_0000_1000, 0x55d0_0000_9000, 0x1000)),
            },
            Module {
                path: "/usr/lib/x86_64-linux-gnu/libc.so.6".to_owned(),
                build_id: Some("7d793037a0760186574b0282f2f435e7".to_owned()),
                mapping: Some((0x7f00_0002_6000, 0x7f00_0018_0000, 0x26000)),
            },
            Module {
                path: "/opt/vendor/libstripped.so".to_owned(),
                build_id: None,
                mapping: Some((0x7f10_0000_0000, 0x7f10_0000_2000, 0)),
            },
        ],
        sites,
        blocks: vec![
            block(0, 0, 0x55d1_0000_0010, 1_048_576, 2 * SECOND),
            block(1, 0, 0x55d1_0100_0010, 8_388_000, 29 * SECOND),
            block(1, 0, 0x55d1_0200_0010, 608, SECOND / 2),
            block(2, 1, 0x55d1_0000_0010, 1024, 25 * SECOND),
            block(2, 1, 0x55d1_0000_0410, 1024, 24 * SECOND),
            block(4, 1, 0x7f20_0000_0000, 65_536, 12 * SECOND),
            block(5, 1, 0x7f30_0000_0000, 8_392_704, 28 * SECOND),
            block(6, 0, 0x7f40_0000_0000, 67_108_864, 30 * SECOND),
            block(6, 0, 0x7f50_0000_0000, 67_108_864, 20 * SECOND),
            block(7, 1, 0x55d1_0000_0810, 10, SECOND),
        ],
        losses: Loss::ALL.into_iter().map(|loss| (loss.name().to_owned(), 0)).collect(),
        events: vec![Event {
            at_ns: 3 * SECOND,
            pid: Some(4400),
            text: "forked from 4321".to_owned(),
        }],
        windows: None,
        page_interval: None,
        cost: Cost {
            limit_ppm: None,
            target_cpu_ns: 20 * SECOND,
            hits: 1_234_567,
            spent_ns: 2 * SECOND,
            agent_cpu_ns: SECOND / 4,
            agent_peak_rss_bytes: 40 << 20,
        },
    }
}

/// Resident pages, and what survived windows: what `auto` gives of a busy process.
pub fn auto() -> Profile {
    let mut profile = pages();
    let mut survivors = server().sites;
    survivors.truncate(2);
    for (site, (bytes, count, variance)) in
        survivors.iter_mut().zip([(31_457_280, 30_720, 4e12), (4096, 4, 0.0)])
    {
        site.kind = SiteKind::Survivor;
        site.oldest_age_ns = None;
        site.youngest_age_ns = None;
        site.counters = counters((bytes, count), (bytes / 2, count / 2));
        site.counters.spread.bytes_variance = variance;
        site.counters.spread.count_variance = variance / 1e6;
    }
    profile.sites.extend(survivors);
    profile.windows = Some(Windows {
        count: 7,
        open_ns: SECOND / 2,
        early_ns: SECOND / 4,
        bytes_variance: 4e12,
        count_variance: 4e6,
    });
    profile.cost.limit_ppm = Some(10_000);
    profile.cost.spent_ns = SECOND / 5;
    profile
}

/// A process that was counted exactly while pages were looked at: most of its memory is not its
/// allocator's.
pub fn mostly_pages() -> Profile {
    let mut profile = server();
    profile.processes.truncate(1);
    profile.sites.retain(|site| site.process == ProcessId(0));
    profile.blocks.clear();
    profile.sites.extend(pages().sites);
    profile.page_interval = Some(16);
    profile.cost.limit_ppm = Some(10_000);
    profile
}

/// What survived windows, alone.
pub fn windows() -> Profile {
    let mut profile = auto();
    profile.mode = Mode::Windows;
    profile.blocks.clear();
    profile
}

/// One page in 16 of a process was looked at: small pages, huge ones, and a site with little.
pub fn pages() -> Profile {
    let mut profile = server();
    profile.mode = Mode::Pages { one_in: 16 };
    profile.page_interval = Some(16);
    profile.processes.truncate(1);
    profile.sites.retain(|site| site.process == ProcessId(0) && site.kind == SiteKind::Heap);
    profile.blocks.clear();
    let live = [(1500, 0, 20), (40, 30, 0), (1, 0, 0)];
    for (index, (site, (small, huge, freed))) in profile.sites.iter_mut().zip(live).enumerate() {
        site.kind = SiteKind::Resident;
        let bytes = small * 4096 + huge * (2 << 20);
        let sum = counters((bytes, small + huge), (freed * 4096, freed)).times(16);
        (site.counters, site.oldest_age_ns, site.youngest_age_ns) =
            (sum, Some(9 * SECOND), Some(SECOND));
        profile.blocks.push(Block {
            process: ProcessId(0),
            site: SiteId(index),
            address: 0x7f60_0000_0000 + 4096 * index as u64,
            size_bytes: 4096,
            age_ns: 9 * SECOND,
        });
    }
    profile
}

/// Blocks of a process were sampled: a site with many small ones, one with large ones, which are all
/// there, and mappings, which are counted.
pub fn sampled() -> Profile {
    let mut profile = server();
    let since_ns = profile.duration_ns - 20 * SECOND;
    profile.mode = Mode::Sample { interval_bytes: 512 << 10, since_ns };
    profile.processes.truncate(1);
    profile.sites.retain(|site| site.process == ProcessId(0));
    profile.blocks.clear();
    let live = [(0..40).map(|n| 100 + 10 * n).collect(), vec![16 << 20; 3]];
    let heap = profile.sites.iter_mut().filter(|site| site.kind == SiteKind::Heap);
    for (site, sizes) in heap.zip::<[Vec<u64>; 2]>(live) {
        site.clear_live();
        for (n, size_bytes) in sizes.into_iter().enumerate() {
            site.count_live(size_bytes, (n as u64 + 1) * SECOND, profile.mode, profile.duration_ns);
        }
        site.counters.allocated_bytes = site.counters.live_bytes + 5_000_000;
        site.counters.allocated_count = site.counters.live_count + 900;
        (site.counters.freed_bytes, site.counters.freed_count) = (5_000_000, 900);
    }
    profile
}

/// One process, whose names attack the reader and whose session lost events.
pub fn hostile() -> Profile {
    let mut profile = server();
    profile.finished = false;
    profile.processes.truncate(1);
    profile.processes[0].comm = "# a;b 1\n2\x1b]0;owned\x07".to_owned();
    profile.processes[0].exe = "/tmp/\u{202e}cod.exe\x1b[2J".to_owned();
    profile.modules[0].path = "/tmp/(evil)\r<script>.so".to_owned();
    profile.sites.retain(|site| site.process == ProcessId(0));
    profile.blocks.clear();
    let site = &mut profile.sites[0];
    let mut frames = site.frames.to_vec();
    frames[0].symbols =
        vec![symbol("x\x1b[31m;<b>&\"y\"</b> 12 34", Some(("a\nb.c", 1)), false)].into();
    frames.push(Frame {
        address: 0xdead,
        module: Some(ModuleId(99)),
        offset: 0,
        symbols: [].into(),
    });
    site.frames = frames.into();
    profile.losses.insert("blocks_full".to_owned(), 1234);
    profile.events[0].text = "\x1b[1;1Hnothing to see".to_owned();
    profile
}

/// A session in which nothing was allocated.
pub fn empty() -> Profile {
    let mut profile = server();
    profile.processes.truncate(1);
    profile.sites.clear();
    profile.blocks.clear();
    profile.events.clear();
    profile
}

fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z]{1,8}".boxed(),
        "[ -~]{0,12}".boxed(),
        any::<String>().boxed(),
        select(vec![
            "a b 1",
            "x;y",
            "# ",
            "\x1b[2J",
            "[lost]",
            "-",
            "--",
            "operator new(unsigned long)"
        ])
        .prop_map(str::to_owned)
        .boxed(),
    ]
}

prop_compose! {
    fn any_process(index: u32)(
        comm in any_text(),
        exe in any_text(),
        cgroup in any_text(),
        parent_pid in option::of(any::<u32>()),
        start_time in 0..u64::MAX >> 1,
        end in option::of(any_text()),
    ) -> Process {
        // Two lives of one process each.
        Process {
            pid: 100 + index / 2, parent_pid, start_time: start_time * u64::from(index > 3), comm,
            cmdline: exe.clone(), exe, cgroup, end,
        }
    }
}

prop_compose! {
    fn any_module(index: usize)(
        path in any_text(),
        build_id in option::of("[0-9a-f]{40}"),
        mapping in option::of(any::<(u64, u64, u64)>()),
    ) -> Module {
        Module { path: format!("{path}{index}"), build_id, mapping }
    }
}

prop_compose! {
    fn any_symbol()(
        function in any_text(),
        file in option::of(any_text()),
        line in option::of(any::<u32>()),
        inlined in any::<bool>(),
    ) -> Symbol {
        Symbol { function, file, line, inlined }
    }
}

fn any_frame(modules: usize) -> impl Strategy<Value = Frame> {
    (any::<u64>(), option::of(0..modules.max(1)), any::<u64>(), vec(any_symbol(), 0..3)).prop_map(
        move |(address, module, offset, symbols)| Frame {
            address,
            module: module.filter(|_| modules > 0).map(ModuleId),
            offset,
            symbols: symbols.into(),
        },
    )
}

/// Frames come from a pool, as they do in life.
fn any_site(
    frames: Vec<Frame>,
    processes: usize,
) -> impl Strategy<Value = (Site, Vec<(u64, u64)>)> {
    (
        0..processes,
        select(SiteKind::ALL.to_vec()),
        select(StackOutcome::ALL.to_vec()),
        vec(select(frames), 0..6),
        vec((prop_oneof![0..1_u64 << 20, 0..1_u64 << 40], 0..1_u64 << 50), 0..5),
        any::<(u32, u32)>(),
    )
        .prop_map(|(process, kind, outcome, frames, blocks, (freed_bytes, freed_count))| {
            let mut site = Site {
                process: ProcessId(process),
                kind,
                counters: Counters::default(),
                oldest_age_ns: None,
                youngest_age_ns: None,
                outcome,
                frames: frames.into(),
            };
            for (size_bytes, age_ns) in &blocks {
                site.count_live(*size_bytes, *age_ns, Mode::Exact, 0);
            }
            let live = site.counters;
            site.counters = counters(
                (live.live_bytes, live.live_count),
                (freed_bytes.into(), freed_count.into()),
            );
            (site, blocks)
        })
}

/// A profile that holds together: no two modules or sites are the same, and the blocks are those
/// that the sites count.
pub fn any_profile() -> impl Strategy<Value = Profile> {
    let processes =
        (1..5_u32).prop_flat_map(|count| (0..count).map(any_process).collect::<Vec<_>>());
    let modules =
        (0..4_usize).prop_flat_map(|count| (0..count).map(any_module).collect::<Vec<_>>());
    (processes, modules)
        .prop_flat_map(|(processes, modules)| {
            let frames = vec(any_frame(modules.len()), 1..8);
            (Just(processes), Just(modules), frames)
        })
        .prop_flat_map(|(processes, modules, frames)| {
            let sites = vec(any_site(frames, processes.len()), 0..12);
            (Just(processes), Just(modules), sites)
        })
        .prop_flat_map(|(processes, modules, sites)| {
            let events = vec((0..1_u64 << 40, option::of(any::<u32>()), any_text()), 0..3);
            let losses = vec(0..3_u64, Loss::ALL.len());
            let mode = prop_oneof![
                Just(Mode::Exact),
                (1..1000_u32).prop_map(|one_in| Mode::Pages { one_in }),
                // Put to the session's end below: since so long ago.
                (1..1u32 << 26, 0..1_u64 << 50).prop_map(|(interval_bytes, since_ns)| {
                    Mode::Sample { interval_bytes, since_ns }
                }),
            ];
            let facts = (0..1_u64 << 60, 0..1_u64 << 60, any_text(), any_text(), mode);
            (Just(processes), Just(modules), Just(sites), events, losses, facts)
        })
        .prop_map(|(processes, modules, sites, events, losses, facts)| {
            let mut facts = facts;
            if let Mode::Sample { since_ns, .. } = &mut facts.4 {
                *since_ns = facts.1.saturating_sub(*since_ns);
            }
            let mut distinct: Vec<(Site, Vec<(u64, u64)>)> = Vec::new();
            for (site, blocks) in sites {
                let is_twin = |other: &Site| {
                    (other.process, other.kind, other.outcome, &other.frames)
                        == (site.process, site.kind, site.outcome, &site.frames)
                };
                if !distinct.iter().any(|(other, _)| is_twin(other)) {
                    distinct.push((site, blocks));
                }
            }
            for (site, ages) in &mut distinct {
                let Counters { freed_bytes, freed_count, .. } = site.counters;
                site.clear_live();
                for (size_bytes, age_ns) in ages {
                    site.count_live(*size_bytes, *age_ns, facts.4, facts.1);
                }
                site.counters.allocated_bytes = site.counters.live_bytes + freed_bytes;
                site.counters.allocated_count = site.counters.live_count + freed_count;
            }
            let mut blocks = Vec::new();
            for (index, (site, ages)) in distinct.iter().enumerate() {
                for (size_bytes, age_ns) in ages {
                    blocks.push(Block {
                        process: site.process,
                        site: SiteId(index),
                        address: (blocks.len() as u64) << 52 | 0x10,
                        size_bytes: *size_bytes,
                        age_ns: *age_ns,
                    });
                }
            }
            Profile {
                mode: facts.4,
                finished: true,
                started_unix_ns: facts.0,
                duration_ns: facts.1,
                kernel: facts.2,
                hostname: facts.3,
                processes,
                modules,
                sites: distinct.into_iter().map(|(site, _)| site).collect(),
                blocks,
                losses: Loss::ALL
                    .into_iter()
                    .zip(losses)
                    .map(|(loss, count)| (loss.name().to_owned(), count))
                    .collect(),
                events: events
                    .into_iter()
                    .map(|(at_ns, pid, text)| Event { at_ns, pid, text })
                    .collect(),
                windows: None,
                page_interval: None,
                cost: Cost { spent_ns: facts.1 / 3, target_cpu_ns: facts.1, ..Cost::default() },
            }
        })
}
