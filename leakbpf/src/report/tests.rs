use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::profile::{Profile, SiteKind, samples};

fn rendered(format: Format, profile: &Profile, options: &ReportOptions) -> Vec<u8> {
    let mut out = Vec::new();
    write(format, profile, options, &mut out).unwrap();
    out
}

fn text(format: Format, profile: &Profile, options: &ReportOptions) -> String {
    String::from_utf8(rendered(format, profile, options)).unwrap()
}

/// Compares with a checked-in file; `UPDATE_GOLDEN=1 cargo test` writes it.
fn assert_golden(name: &str, actual: &str) {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/report/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        expected == actual,
        "{} differs; if that is meant, run UPDATE_GOLDEN=1 cargo test -p leakbpf report\n{actual}",
        path.display()
    );
}

fn with_blocks() -> ReportOptions {
    ReportOptions { with_blocks: true, ..ReportOptions::default() }
}

#[test]
fn the_table_is_as_checked_in() {
    let options = ReportOptions::default();
    assert_golden("server.txt", &text(Format::Text, &samples::server(), &options));
    assert_golden("server-blocks.txt", &text(Format::Text, &samples::server(), &with_blocks()));
    assert_golden("sampled.txt", &text(Format::Text, &samples::sampled(), &options));
    assert_golden("pages.txt", &text(Format::Text, &samples::pages(), &options));
    assert_golden("auto.txt", &text(Format::Text, &samples::auto(), &options));
    assert_golden("mostly-pages.txt", &text(Format::Text, &samples::mostly_pages(), &options));
    assert_golden("windows.txt", &text(Format::Text, &samples::windows(), &options));
    assert_golden("hostile.txt", &text(Format::Text, &samples::hostile(), &options));
    assert_golden("empty.txt", &text(Format::Text, &samples::empty(), &options));
    let terminal = ReportOptions { color: true, width: Some(60), top: Some(2), ..options };
    assert_golden("terminal.txt", &text(Format::Text, &samples::hostile(), &terminal));
}

#[test]
fn json_is_as_checked_in() {
    let pretty = |profile: &Profile, options: &ReportOptions| {
        let json = text(Format::Json, profile, options);
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        serde_json::to_string_pretty(&value).unwrap().replace(env!("CARGO_PKG_VERSION"), "VERSION")
    };
    assert_golden("server.json", &pretty(&samples::server(), &with_blocks()));
    assert_golden("sampled.json", &pretty(&samples::sampled(), &with_blocks()));
    assert_golden("pages.json", &pretty(&samples::pages(), &with_blocks()));
    assert_golden("auto.json", &pretty(&samples::auto(), &with_blocks()));
    assert_golden("empty.json", &pretty(&samples::empty(), &ReportOptions::default()));
}

#[test]
fn folded_stacks_are_as_checked_in() {
    let options = ReportOptions::default();
    assert_golden("server.folded", &text(Format::Folded, &samples::server(), &options));
    assert_golden("hostile.folded", &text(Format::Folded, &samples::hostile(), &options));
}

#[test]
fn the_flame_graph_is_as_checked_in() {
    let drawn = |profile: &Profile| {
        let svg = text(Format::Svg, profile, &ReportOptions::default());
        // The script and the style are inferno's.
        let frames = svg.split("<svg id=\"frames\"").nth(1).unwrap().to_owned();
        frames.replace("<g>", "\n<g>")
    };
    assert_golden("server.svg-frames", &drawn(&samples::server()));
    assert_golden("hostile.svg-frames", &drawn(&samples::hostile()));
    assert_golden("empty.svg-frames", &drawn(&samples::empty()));
}

#[test]
fn an_estimate_says_what_it_is_in_every_format_that_has_a_head() {
    let options = ReportOptions::default();
    let svg = text(Format::Svg, &samples::pages(), &options);
    let title = "server (pid 4321): resident memory by first touch after 30.0 s (1 in 16 pages)";
    assert!(svg.contains(title), "{svg}");
    let interval = "  (95%: ";
    for format in [Format::Text, Format::Svg] {
        assert!(text(format, &samples::pages(), &options).contains(interval), "{format:?}");
        assert!(!text(format, &samples::server(), &options).contains(interval), "{format:?}");
    }
}

#[test]
fn hovering_shows_bytes_blocks_and_module() {
    let svg = text(Format::Svg, &samples::server(), &ReportOptions::default());
    assert!(
        svg.contains(
            "<title>connection_accept (8,388,608 bytes in 2 blocks, 46.9%, server)</title>"
        ),
        "{svg}"
    );
    assert!(svg.contains("<title>all (17,897,482 bytes in 8 blocks, 100.0%)</title>"), "{svg}");
}

/// Bytes that the reader's terminal, a line-based tool or an XML parser would act on.
fn is_printable(text: &str) -> bool {
    text.chars().all(|character| character == '\n' || !character.is_control())
}

proptest! {
    #[test]
    fn no_name_commands_the_reader(profile in samples::any_profile()) {
        for format in [Format::Text, Format::Folded] {
            let options = with_blocks();
            prop_assert!(is_printable(&text(format, &profile, &options)), "{:?}", format);
        }
        let svg = text(Format::Svg, &profile, &ReportOptions::default());
        let frames = svg.split("<svg id=\"frames\"").nth(1).unwrap();
        prop_assert!(is_printable(frames));
        const TAGS: [&str; 8] =
            ["g>", "/g>", "title>", "/title>", "rect ", "text ", "/text>", "/svg>"];
        let foreign = frames.split('<').skip(1).find(|tag| !TAGS.iter().any(|known| tag.starts_with(known)));
        prop_assert_eq!(foreign, None);
    }

    #[test]
    fn all_formats_add_up_to_the_same(profile in samples::any_profile()) {
        let options = with_blocks();
        let live_bytes = profile.totals().live_bytes;

        let folded = text(Format::Folded, &profile, &options);
        let sum: u64 = folded
            .lines()
            .map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
            .sum();
        prop_assert_eq!(sum, live_bytes);

        let json: serde_json::Value =
            serde_json::from_str(&text(Format::Json, &profile, &options)).unwrap();
        prop_assert_eq!(json["totals"]["live_bytes"].as_u64(), Some(live_bytes));
        let listed: u64 = json["sites"].as_array().unwrap().iter()
            .filter(|site| {
                let kind = SiteKind::ALL.into_iter().find(|kind| site["kind"] == kind.name());
                kind.is_some_and(|kind| profile.mode.counts(kind))
            })
            .map(|site| site["live_bytes"].as_u64().unwrap())
            .sum();
        prop_assert_eq!(listed, live_bytes);
        for block in json["blocks"].as_array().unwrap() {
            let site = &json["sites"][block["site"].as_u64().unwrap() as usize];
            prop_assert_eq!(&site["process"], &block["process"]);
        }

        let svg = text(Format::Svg, &profile, &options);
        let root = format!("<title>all ({} bytes in ", units::exact(live_bytes));
        prop_assert!(svg.contains(&root), "{} in {}", root, svg);
        if live_bytes > 0 {
            let width = format!("total_samples=\"{live_bytes}\"");
            prop_assert!(svg.contains(&width));
        }

        let table = text(Format::Text, &profile, &options);
        let total = format!("{} bytes in {}", units::exact(live_bytes), units::count(profile.totals().live_count, profile.mode.noun()));
        prop_assert!(table.contains(&total));
    }

    #[test]
    fn every_visible_frame_of_the_flame_graph_has_its_blocks(profile in samples::any_profile()) {
        let svg = text(Format::Svg, &profile, &ReportOptions::default());
        let frames = svg.split("<svg id=\"frames\"").nth(1).unwrap();
        for title in frames.split("<title>").skip(1) {
            let title = title.split("</title>").next().unwrap();
            let noun = format!(" {}", profile.mode.noun());
            prop_assert!(title.contains(" bytes in ") && title.contains(&noun), "{}", title);
        }
    }
}

#[test]
fn sums_that_fit_no_register_do_not_end_the_report() {
    let mut profile = samples::server();
    for site in &mut profile.sites {
        site.counters.live_bytes = u64::MAX - 3;
        site.counters.live_count = u64::MAX;
        site.counters.allocated_bytes = u64::MAX;
        site.oldest_age_ns = Some(u64::MAX);
        site.youngest_age_ns = Some(0);
    }
    profile.duration_ns = u64::MAX;
    profile.started_unix_ns = u64::MAX;
    for format in Format::ALL {
        for sort in [Sort::Bytes, Sort::Count, Sort::Age] {
            let options = ReportOptions { sort, ..with_blocks() };
            assert!(!rendered(format, &profile, &options).is_empty());
        }
    }
}

#[test]
fn sites_are_ranked_as_asked_and_allocators_come_last() {
    let profile = samples::server();
    let order = |sort| ranked(&profile, sort).iter().map(|(id, _)| id.0).collect::<Vec<_>>();
    assert_eq!(order(Sort::Bytes), [5, 1, 0, 4, 2, 7, 3, 6]);
    assert_eq!(order(Sort::Count), [1, 2, 5, 0, 4, 7, 3, 6]);
    assert_eq!(order(Sort::Age), [1, 5, 2, 4, 0, 7, 3, 6]);
}

#[test]
fn top_shortens_the_list_and_says_what_it_left_out() {
    let options = ReportOptions { top: Some(1), ..with_blocks() };
    let table = text(Format::Text, &samples::server(), &options);
    assert!(
        table.contains("… and 5 more sites with 9.06 MiB (53.1%) in 7 blocks: --top 6 lists them"),
        "{table}"
    );
    let json: serde_json::Value =
        serde_json::from_str(&text(Format::Json, &samples::server(), &options)).unwrap();
    assert_eq!(json["sites"].as_array().unwrap().len(), 1);
    assert_eq!(json["site_count"], 8);
    assert_eq!(json["blocks"].as_array().unwrap().len(), 1);
}

#[test]
fn file_names_choose_formats() {
    let format = |name: &str| Format::from_path(Path::new(name));
    assert_eq!(format("/tmp/x.SVG"), Some(Format::Svg));
    assert_eq!(format("x.pb.gz"), Some(Format::Pprof));
    assert_eq!(format("x.json"), Some(Format::Json));
    assert_eq!(format("x.folded"), Some(Format::Folded));
    assert_eq!(format("x.txt"), Some(Format::Text));
    assert_eq!(format("x.leakbpf"), None);
    assert_eq!(format("svg"), None);
    assert_eq!("pprof".parse(), Ok(Format::Pprof));
    let error = "html".parse::<Format>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "no format is called \"html\": choose text, json, svg, folded or pprof"
    );
}

/// Names of all members of all objects.
fn members<'a>(value: &'a serde_json::Value, into: &mut std::collections::BTreeSet<&'a str>) {
    match value {
        serde_json::Value::Object(object) => {
            for (name, value) in object {
                into.insert(name);
                members(value, into);
            }
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| members(value, into)),
        _ => {}
    }
}

#[test]
fn every_json_field_is_documented() {
    let mut json: serde_json::Value =
        serde_json::from_str(&text(Format::Json, &samples::auto(), &with_blocks())).unwrap();
    // Losses are named by what was lost.
    json["losses"] = serde_json::Value::Object(serde_json::Map::new());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/json.md");
    let manual = std::fs::read_to_string(path).unwrap();
    let mut names = std::collections::BTreeSet::new();
    members(&json, &mut names);
    let is_missing = |name: &&str| {
        !manual.split('`').any(|quoted| {
            quoted.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == *name)
        })
    };
    assert_eq!(names.into_iter().filter(is_missing).collect::<Vec<_>>(), Vec::<&str>::new());
}
