//! The table: for people, on a terminal or in a ticket.

use std::io::{self, Write};

use super::names::Line;
use super::{ReportOptions, names, ranked, units};
use crate::profile::estimate::{CONFIDENCE_PERCENT, Interval};
use crate::profile::{self, Counters, Mode, Process, Profile, Site, SiteId, SiteKind};

/// Sites listed unless [`ReportOptions::top`] says otherwise.
pub const DEFAULT_TOP: usize = 10;

/// Of a deep stack the lines next to the allocation and those next to `main` say most.
const INNER_LINES: usize = 24;
const OUTER_LINES: usize = 4;

/// Resident memory of so much more than half again what blocks explain is worth a look: memory that
/// is not an allocator's (a garbage collector's, say).
const UNEXPLAINED_BYTES: u64 = 4 << 20;

/// Narrower terminals than this get lines that wrap.
const NARROWEST: usize = 40;

pub fn write(profile: &Profile, options: &ReportOptions, out: &mut dyn Write) -> io::Result<()> {
    let totals = profile.totals();
    let style = Style { color: options.color };
    write_head(profile, options, &totals, &style, out)?;
    let sites = ranked(profile, options.sort);
    let (user, beside): (Vec<_>, Vec<_>) = sites
        .into_iter()
        .filter(|(_, site)| site.counters.live_count > 0 || site.counters.live_bytes > 0)
        .partition(|(_, site)| profile.mode.counts(site.kind));
    let of_kind = |kind| beside.iter().copied().filter(move |(_, site)| site.kind == kind);
    let survivors: Vec<_> = of_kind(SiteKind::Survivor).collect();
    let resident: Vec<_> = of_kind(SiteKind::Resident).collect();
    let allocator: Vec<_> = of_kind(SiteKind::AllocatorMapping).collect();
    let top = options.top.unwrap_or(DEFAULT_TOP);
    let table = Table { profile, options, style: &style };
    if user.is_empty() {
        writeln!(out, "\nNothing is live.")?;
    }
    table.write_sites(&user, top, totals.live_bytes, out)?;
    if !allocator.is_empty() {
        let held = profile.allocator_totals();
        let heading = format!(
            "Held by allocators from the kernel, not added above: {} in {}",
            units::bytes(held.live_bytes),
            units::count(held.live_count, "mapping"),
        );
        writeln!(out, "\n{}", style.bold(&heading))?;
        table.write_sites(&allocator, top.min(3), held.live_bytes, out)?;
    }
    let pages = profile.resident_totals();
    let unexplained = pages.live_bytes.saturating_sub(totals.live_bytes);
    let worth_a_look = (totals.live_bytes / 2).saturating_add(UNEXPLAINED_BYTES);
    let beside = profile.mode == Mode::Windows || unexplained > worth_a_look;
    if beside && !resident.is_empty() {
        let more =
            if profile.mode == Mode::Windows { "" } else { ", and more than the blocks explain" };
        let heading = format!(
            "Resident memory by who touched it first, not added above{more}: {} in {}",
            units::bytes(pages.live_bytes),
            units::count(pages.live_count, "page"),
        );
        writeln!(out, "\n{}", style.bold(&heading))?;
        table.write_sites(&resident, top.min(3), pages.live_bytes, out)?;
    }
    if let Some(windows) = profile.windows.filter(|_| profile.mode != Mode::Windows) {
        let survived = profile.survivor_totals();
        let heading = format!(
            "Outlived windows of time, not added above: {}{} in {}",
            rate(survived.live_bytes, profile),
            profile.survivors_interval().map(|it| rates(it, profile)).unwrap_or_default(),
            windows_in_words(&windows)
        );
        writeln!(out, "\n{}", style.bold(&heading))?;
        if survivors.is_empty() {
            writeln!(out, "\nNothing did.")?;
        }
        table.write_sites(&survivors, top.min(3), survived.live_bytes, out)?;
    }
    write_events(profile, out)
}

fn windows_in_words(windows: &profile::Windows) -> String {
    format!(
        "{}, {} in all; a block that lived {} outlived one",
        units::count(windows.count.into(), "window"),
        units::duration(windows.open_ns),
        units::duration(windows.survival_ns())
    )
}

/// Bytes of the whole session, per second.
fn rate(bytes: u64, profile: &Profile) -> String {
    let seconds = profile.duration_ns as f64 / 1e9;
    let per_second = if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 };
    format!("{}/s", units::bytes(per_second.round() as u64))
}

fn rates(interval: Interval, profile: &Profile) -> String {
    let (low, high) = interval.bytes;
    let [low, high] = [low, high].map(|bytes| rate(bytes, profile));
    format!(" ({CONFIDENCE_PERCENT}%: {low} to {high})")
}

/// What the session cost those who were watched, and itself.
fn write_cost(profile: &Profile, out: &mut dyn Write) -> io::Result<()> {
    let cost = &profile.cost;
    let own = format!(
        "leakbpf itself {} of processor time, at most {} resident",
        units::duration(cost.agent_cpu_ns),
        units::bytes(cost.agent_peak_rss_bytes)
    );
    match cost.share() {
        Some(share) => {
            let limit = cost.limit_ppm.map(|ppm| format!(" (limit {} %)", f64::from(ppm) / 1e4));
            writeln!(
                out,
                "cost      {:>8.2} %  of the processes' own time, estimated{}; {own}",
                share * 100.0,
                limit.unwrap_or_default()
            )
        }
        None if cost.agent_cpu_ns > 0 => writeln!(out, "cost      {own}"),
        None => Ok(()),
    }
}

fn write_head(
    profile: &Profile,
    options: &ReportOptions,
    totals: &Counters,
    style: &Style,
    out: &mut dyn Write,
) -> io::Result<()> {
    let processes = match profile.processes.as_slice() {
        [] => "no process".to_owned(),
        [process] => describe(process),
        many => format!("{} processes", many.len()),
    };
    writeln!(out, "{}", style.bold(&processes))?;
    write!(
        out,
        "{}{} since {}, mode {}",
        units::duration(profile.duration_ns),
        if profile.finished { "" } else { " so far," },
        units::time(profile.started_unix_ns),
        profile.mode.name()
    )?;
    if !profile.hostname.is_empty() {
        write!(out, ", {}", names::printable(&profile.hostname))?;
    }
    if !profile.kernel.is_empty() {
        write!(out, ", kernel {}", names::printable(&profile.kernel))?;
    }
    writeln!(out)?;
    let noun = profile.mode.noun();
    let filter = options.filter_in(profile.mode);
    if filter.min_age_ns > 0 {
        let age = units::duration(filter.min_age_ns);
        writeln!(out, "live: only {noun}s of {age} and older")?;
    }
    if filter.min_size_bytes > 0 {
        let size = units::bytes(filter.min_size_bytes);
        writeln!(out, "live: only {noun}s of {size} and more")?;
    }
    if filter != options.filter {
        writeln!(out, "live: of all ages and sizes; estimates from windows list no blocks")?;
    }
    if let Some(note) = names::estimate_note(profile.mode) {
        writeln!(out, "{note}")?;
    }
    let [live, allocated, freed] = match profile.mode {
        Mode::Exact | Mode::Sample { .. } => ["live", "allocated", "freed"],
        Mode::Windows => ["live", "allocated", "freed"],
        Mode::Pages { .. } => ["resident", "touched", "released"],
    };
    let rows = [
        (live, totals.live_bytes, totals.live_count),
        (allocated, totals.allocated_bytes, totals.allocated_count),
        (freed, totals.freed_bytes, totals.freed_count),
    ];
    for (name, bytes, count) in rows {
        let row = format!(
            "{name:<9} {:>10}  {:>17} bytes in {}",
            units::bytes(bytes),
            units::exact(bytes),
            units::count(count, noun)
        );
        let row = if name == live { style.bold(&row) } else { row };
        let error = profile.totals_interval().filter(|_| name == live);
        writeln!(out, "{row}{}", error.map(names::interval).unwrap_or_default())?;
        if name == live {
            write_ended(profile, out)?;
        }
    }
    if let Some(windows) = profile.windows.filter(|_| profile.mode == Mode::Windows) {
        writeln!(out, "windows   {}", windows_in_words(&windows))?;
    }
    write_stacks(profile, out)?;
    write_cost(profile, out)?;
    let losses: Vec<_> = profile.losses.iter().filter(|(_, count)| **count > 0).collect();
    if !losses.is_empty() {
        let losses: Vec<_> = losses
            .into_iter()
            .map(|(name, count)| format!("{} {}", names::printable(name), units::exact(*count)))
            .collect();
        let warning = format!("INCOMPLETE: not everything was seen: {}", losses.join(", "));
        writeln!(out, "{}", style.alarm(&warning))?;
    }
    if profile.processes.len() > 1 {
        write_processes(profile, style, out)?;
    }
    Ok(())
}

/// How many stacks are complete, and what keeps the others from it.
fn write_stacks(profile: &Profile, out: &mut dyn Write) -> io::Result<()> {
    let stacks = profile.stacks();
    let all: u64 = stacks.values().fold(0, |sum, count| sum.saturating_add(*count));
    if all == 0 {
        return Ok(());
    }
    let (mut complete, mut rest) = (0, String::new());
    for (outcome, &count) in &stacks {
        match outcome.gap() {
            None => complete = count,
            Some(_) if count == 0 => {}
            Some(_) => rest.push_str(&format!(", {} {}", outcome.name(), units::exact(count))),
        }
    }
    writeln!(out, "stacks    {:>10}  complete{rest}", units::percent(complete, all))
}

/// What processes held when they ended is their final state, not memory that is in use: while
/// others live, the two must not be taken for one.
fn write_ended(profile: &Profile, out: &mut dyn Write) -> io::Result<()> {
    let ended = |site: &Site| profile.process(site.process).is_some_and(|it| it.end.is_some());
    let mut sum = Counters::default();
    let sites = profile.sites.iter().filter(|site| profile.mode.counts(site.kind));
    sites.filter(|site| ended(site)).for_each(|site| sum.add(&site.counters));
    if sum.live_count > 0 && profile.processes.iter().any(|process| process.end.is_none()) {
        writeln!(
            out,
            "  of it   {:>10}  {:>17} bytes in {} when their processes ended",
            units::bytes(sum.live_bytes),
            units::exact(sum.live_bytes),
            units::count(sum.live_count, profile.mode.noun())
        )?;
    }
    Ok(())
}

fn write_processes(profile: &Profile, style: &Style, out: &mut dyn Write) -> io::Result<()> {
    let mut sums = vec![Counters::default(); profile.processes.len()];
    for site in profile.sites.iter().filter(|site| profile.mode.counts(site.kind)) {
        if let Some(sum) = sums.get_mut(site.process.0) {
            sum.add(&site.counters);
        }
    }
    let mut rows: Vec<_> = profile.processes.iter().zip(sums).collect();
    rows.sort_by_key(|(_, sum)| std::cmp::Reverse((sum.live_bytes, sum.live_count)));
    let hidden = rows.len().saturating_sub(DEFAULT_TOP);
    writeln!(out, "\n{}", style.bold("Processes"))?;
    for (process, sum) in rows.iter().take(DEFAULT_TOP) {
        writeln!(
            out,
            "{:>10}  {:>14}  {}",
            units::bytes(sum.live_bytes),
            units::count(sum.live_count, profile.mode.noun()),
            describe(process)
        )?;
    }
    if hidden > 0 {
        writeln!(out, "            … and {hidden} more")?;
    }
    Ok(())
}

fn describe(process: &Process) -> String {
    let mut text = format!("{} (pid {})", names::printable(&process.comm), process.pid);
    if !process.exe.is_empty() {
        text.push(' ');
        text.push_str(&names::printable(&process.exe));
    }
    if let Some(end) = &process.end {
        text.push_str(", ");
        text.push_str(&names::printable(end));
    }
    text
}

fn write_events(profile: &Profile, out: &mut dyn Write) -> io::Result<()> {
    /// The newest ones; the rest are in the other formats.
    const SHOWN: usize = 20;
    let Some(first) = profile.events.len().checked_sub(1) else {
        return Ok(());
    };
    let hidden = (first + 1).saturating_sub(SHOWN);
    writeln!(out, "\nEvents")?;
    if hidden > 0 {
        writeln!(out, "            … {hidden} earlier")?;
    }
    for event in profile.events.iter().skip(hidden) {
        let pid = event.pid.map(|pid| format!("pid {pid}: ")).unwrap_or_default();
        let text = names::printable(&event.text);
        writeln!(out, "{:>10}  {pid}{text}", units::duration(event.at_ns))?;
    }
    Ok(())
}

/// What is counted at a site.
const fn noun(kind: SiteKind) -> &'static str {
    match kind {
        SiteKind::Heap | SiteKind::Survivor => "block",
        SiteKind::Resident => "page",
        SiteKind::Mapping | SiteKind::ThreadStack | SiteKind::AllocatorMapping => "mapping",
    }
}

struct Table<'a> {
    profile: &'a Profile,
    options: &'a ReportOptions,
    style: &'a Style,
}

impl Table<'_> {
    fn write_sites(
        &self,
        sites: &[(SiteId, &Site)],
        top: usize,
        whole_bytes: u64,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        for (rank, (id, site)) in (1..).zip(sites.iter().take(top)) {
            writeln!(out)?;
            self.write_site(rank, *id, site, whole_bytes, out)?;
        }
        let rest = sites.get(top..).unwrap_or_default();
        if !rest.is_empty() {
            let mut sum = Counters::default();
            let mut noun_of_all = rest.first().map_or("block", |(_, site)| noun(site.kind));
            for (_, site) in rest {
                sum.add(&site.counters);
                if noun(site.kind) != noun_of_all {
                    noun_of_all = self.profile.mode.noun();
                }
            }
            writeln!(
                out,
                "\n… and {} with {} ({}) in {}: --top {} lists them",
                units::count(rest.len() as u64, "more site"),
                units::bytes(sum.live_bytes),
                units::percent(sum.live_bytes, whole_bytes),
                units::count(sum.live_count, noun_of_all),
                sites.len()
            )?;
        }
        Ok(())
    }

    fn write_site(
        &self,
        rank: usize,
        id: SiteId,
        site: &Site,
        whole_bytes: u64,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        let counters = &site.counters;
        let noun = noun(site.kind);
        let head = format!(
            "#{rank:<3} {:>10}  {:>6}  {} bytes in {}",
            units::bytes(counters.live_bytes),
            units::percent(counters.live_bytes, whole_bytes),
            units::exact(counters.live_bytes),
            units::count(counters.live_count, noun)
        );
        write!(out, "{}", self.style.bold(&head))?;
        let interval = self.profile.site_interval(site).filter(|it| it.bytes.0 != it.bytes.1);
        match interval {
            Some(interval) => write!(out, "{}", names::interval(interval))?,
            None => write!(out, "  {}", site.kind.name().replace('_', " "))?,
        }
        if self.profile.processes.len() > 1 {
            let process = names::process_name(self.profile.process(site.process));
            write!(out, "  {}", names::printable(&process))?;
        }
        writeln!(out)?;
        write!(out, "     ")?;
        if site.kind == SiteKind::Survivor {
            let error = interval.map(|it| rates(it, self.profile)).unwrap_or_default();
            writeln!(
                out,
                "grows by {}{error}, of {} that it allocates",
                rate(counters.live_bytes, self.profile),
                rate(counters.allocated_bytes, self.profile)
            )?;
            self.write_stack(site, out)?;
            return Ok(());
        }
        match (site.oldest_age_ns, site.youngest_age_ns) {
            (Some(oldest), Some(youngest)) if oldest != youngest => {
                write!(out, "age {} to {}", units::duration(youngest), units::duration(oldest))?
            }
            (Some(age), _) | (_, Some(age)) => write!(out, "age {}", units::duration(age))?,
            (None, None) => write!(out, "age unknown")?,
        }
        writeln!(
            out,
            "; {} {} in {}, {} {} in {}",
            if site.kind == SiteKind::Resident { "touched" } else { "allocated" },
            units::bytes(counters.allocated_bytes),
            units::exact(counters.allocated_count),
            if site.kind == SiteKind::Resident { "released" } else { "freed" },
            units::bytes(counters.freed_bytes),
            units::exact(counters.freed_count)
        )?;
        self.write_stack(site, out)?;
        if self.options.with_blocks {
            self.write_blocks(id, out)?;
        }
        Ok(())
    }

    fn write_stack(&self, site: &Site, out: &mut dyn Write) -> io::Result<()> {
        let mut lines: Vec<_> = site.frames.iter().flat_map(names::frame_lines).collect();
        // How a collection of Rust's library gets its memory is noise: its outermost function says
        // what was called.
        let inside = lines.iter().take_while(|line| in_rusts_library(line)).count();
        if inside > 2 {
            lines.drain(..inside - 1);
            let note = format!("      … {} functions of Rust's library, called by", inside - 1);
            writeln!(out, "{}", self.style.faint(&note))?;
        }
        let hidden = lines.len().saturating_sub(INNER_LINES + OUTER_LINES);
        // A gap of one line would take as much room as the line.
        let hidden = if hidden > 1 { hidden } else { 0 };
        for (index, line) in lines.iter().enumerate() {
            if hidden > 0 && index == INNER_LINES {
                let note = format!("      … {hidden} more frames (--format json has them)");
                writeln!(out, "{}", self.style.faint(&note))?;
            }
            if hidden == 0 || index < INNER_LINES || index >= INNER_LINES + hidden {
                self.write_line(line, out)?;
            }
        }
        if let Some(gap) = site.outcome.gap() {
            let missing = if lines.is_empty() { "no stack" } else { "further callers are missing" };
            let note = format!("      … {missing}: {gap}");
            writeln!(out, "{}", self.style.faint(&note))?;
        }
        Ok(())
    }

    fn write_line(&self, line: &Line<'_>, out: &mut dyn Write) -> io::Result<()> {
        const INDENT: usize = 6;
        let name = line.name(self.profile);
        let name = names::printable(&name);
        let mut place = String::new();
        if let Line::Function { frame, symbol } = line {
            if let Some(file) = &symbol.file {
                place.push_str("  ");
                place.push_str(&names::printable(file));
                if let Some(number) = symbol.line {
                    place.push_str(&format!(":{number}"));
                }
            }
            if let Some(module) = names::module(self.profile, frame) {
                place
                    .push_str(&format!("  ({})", names::printable(names::base_name(&module.path))));
            }
            if symbol.inlined {
                place.push_str("  [inlined]");
            }
        }
        let name = match self.options.width {
            Some(width) if width >= NARROWEST => {
                // The place may take half of the line, or all that a short name leaves.
                let room = width - INDENT;
                let place_width = place.chars().count();
                if name.chars().count() + place_width > room {
                    let left = room.saturating_sub(name.chars().count());
                    place = shortened(&place, left.max(room / 2));
                }
                shortened(&name, room - place.chars().count())
            }
            _ => name.into_owned(),
        };
        writeln!(out, "{:INDENT$}{name}{}", "", self.style.faint(&place))
    }

    /// The oldest blocks of a site: what leaks is old.
    fn write_blocks(&self, id: SiteId, out: &mut dyn Write) -> io::Result<()> {
        const SHOWN: usize = 10;
        let mut blocks: Vec<_> =
            self.profile.blocks.iter().filter(|block| block.site == id).collect();
        blocks.sort_by_key(|block| std::cmp::Reverse((block.age_ns, block.size_bytes)));
        for block in blocks.iter().take(SHOWN) {
            writeln!(
                out,
                "      {:#018x}  {:>12} bytes  age {}",
                block.address,
                units::exact(block.size_bytes),
                units::duration(block.age_ns)
            )?;
        }
        if let Some(more) = blocks.len().checked_sub(SHOWN + 1) {
            let note = format!(
                "      … {} (--format json has them)",
                units::count(more as u64 + 1, "younger block")
            );
            writeln!(out, "{}", self.style.faint(&note))?;
        }
        Ok(())
    }
}

/// Whether a line belongs to the crates of Rust's library that collections and boxes come from. The
/// compiler records their sources under `/rustc/COMMIT/library/`.
fn in_rusts_library(line: &Line<'_>) -> bool {
    let Line::Function { symbol, .. } = line else { return false };
    match &symbol.file {
        Some(file) => ["/library/alloc/src/", "/library/core/src/"]
            .iter()
            .any(|folder| file.starts_with("/rustc/") && file.contains(folder)),
        None => ["alloc::", "<alloc::", "core::", "<core::", "__rustc::__rust_", "__rust_"]
            .iter()
            .any(|crate_name| symbol.function.starts_with(crate_name)),
    }
}

/// Fits a text into `width` columns by leaving out its middle: the beginning of a C++ name is its
/// namespace, the end its function.
fn shortened(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width || width < 5 {
        return text.to_owned();
    }
    let head = (width - 1) / 2;
    let tail = width - 1 - head;
    let begin: String = text.chars().take(head).collect();
    let end: String = text.chars().skip(length - tail).collect();
    format!("{begin}…{end}")
}

/// Terminal attributes, or none.
struct Style {
    color: bool,
}

impl Style {
    fn bold(&self, text: &str) -> String {
        self.wrap("1", text)
    }

    fn faint(&self, text: &str) -> String {
        self.wrap("2", text)
    }

    fn alarm(&self, text: &str) -> String {
        self.wrap("1;31", text)
    }

    fn wrap(&self, attributes: &str, text: &str) -> String {
        if self.color && !text.is_empty() {
            format!("\x1b[{attributes}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::{Frame, Symbol, samples};

    fn symbol(function: &str, file: &str) -> Symbol {
        Symbol {
            function: function.to_owned(),
            file: (!file.is_empty()).then(|| file.to_owned()),
            line: Some(1),
            inlined: false,
        }
    }

    fn report(symbols: &[Symbol]) -> String {
        let mut profile = samples::server();
        profile.sites.truncate(1);
        let frame = Frame { address: 1, module: None, offset: 1, symbols: symbols.into() };
        profile.sites[0].frames = [frame].into();
        let mut text = Vec::new();
        write(&profile, &ReportOptions::default(), &mut text).expect("memory");
        String::from_utf8(text).expect("text")
    }

    #[test]
    fn the_inside_of_a_rust_collection_is_one_line() {
        let text = report(&[
            symbol("<alloc::raw_vec::RawVecInner>::try_allocate_in", ""),
            symbol("with_capacity_in", "/rustc/5980/library/alloc/src/raw_vec/mod.rs"),
            symbol("from_elem<u8>", "/rustc/5980/library/alloc/src/vec/mod.rs"),
            symbol("keep_one_of_many", "src/main.rs"),
            symbol("with_capacity_in", "/rustc/5980/library/alloc/src/raw_vec/mod.rs"),
        ]);
        assert!(!text.contains("try_allocate_in"), "{text}");
        assert!(text.contains("2 functions of Rust's library"), "{text}");
        assert!(text.contains("from_elem<u8>") && text.contains("keep_one_of_many"), "{text}");
        assert_eq!(text.matches("with_capacity_in").count(), 1, "only the beginning is folded");
    }

    #[test]
    fn a_users_own_alloc_is_not_rusts() {
        let symbols =
            ["one", "two", "three"].map(|name| symbol(name, "/src/library/alloc/src/x.rs"));
        let text = report(&symbols);
        assert!(text.contains("one") && !text.contains("Rust's library"), "{text}");
    }

    #[test]
    fn what_ended_processes_held_is_told_apart_while_others_live() {
        let mut profile = samples::server();
        let said = |profile: &Profile| {
            let mut text = Vec::new();
            write(profile, &ReportOptions::default(), &mut text).expect("memory");
            String::from_utf8(text).expect("text").contains("when their processes ended")
        };
        for process in &mut profile.processes {
            process.end = None;
        }
        assert!(!said(&profile));
        profile.processes[0].end = Some("exited".to_owned());
        let mut other = profile.processes[0].clone();
        other.end = None;
        profile.processes.push(other);
        assert!(said(&profile));
        for process in &mut profile.processes {
            process.end = Some("exited".to_owned());
        }
        assert!(!said(&profile));
    }
}
