//! Flame graph of the live bytes, by inferno.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::str::FromStr;

use inferno::flamegraph::color::{Color, PaletteMap, StrokeColor};
use inferno::flamegraph::{self, Direction, Options, Palette, TextTruncateDirection};

use super::{ReportOptions, Sort, names, ranked, units};
use crate::profile::{Mode, Profile, Site};

/// Frames narrower than one in so many of the whole are not drawn: they would be half a pixel wide,
/// and browsers are slow with many. Their bytes stay in their callers.
const NARROWEST: u64 = 2_000;

/// Frames further from the root than this stay in their callers. The agent records 127 frames; more
/// lines are inlined functions, or a file made to be endless.
const DEPTH_MAX: usize = 1024;

/// Beyond so many different places in the tree, the sites with the fewest bytes stay in their callers.
const NODES_MAX: usize = 1 << 19;

/// Pixels from one frame to the next.
const FRAME_HEIGHT: usize = 17;

/// Writes one self-contained SVG: search, zoom, and bytes and blocks of every frame on hover.
/// Siblings are sorted by width, so the largest holder of memory stands leftmost.
pub fn write(profile: &Profile, options: &ReportOptions, out: &mut dyn Write) -> io::Result<()> {
    let tree = Tree::new(profile);
    let layout = tree.layout();
    let mut palette = PaletteMap::default();
    for name in &tree.names {
        palette.insert(name.label.clone(), color(name));
    }
    // As inferno calls the root.
    palette.insert(String::new(), Color { r: 170, g: 215, b: 190 });
    let mut inferno_options = Options::default();
    inferno_options.title = title(profile);
    inferno_options.subtitle = Some(subtitle(profile, options));
    // Only its background: every name has a colour of its own.
    inferno_options.colors = Palette::from_str("mem").unwrap_or_default();
    inferno_options.stroke_color = StrokeColor::from_str("#eef6ee").unwrap_or(StrokeColor::None);
    inferno_options.palette_map = Some(&mut palette);
    inferno_options.deterministic = true;
    inferno_options.count_name = "bytes".to_owned();
    inferno_options.name_type = String::new();
    inferno_options.frame_height = FRAME_HEIGHT;
    inferno_options.min_width = 0.0;
    inferno_options.text_truncate_direction = TextTruncateDirection::Right;
    // Keeps the order of the lines, which it reads from the last to the first.
    inferno_options.flame_chart = true;
    // The root on top: deep stacks are longer than a screen, and the root is where to begin.
    inferno_options.direction = Direction::Inverted;
    let mut svg = Vec::new();
    let lines = layout.lines.iter().rev().map(String::as_str);
    flamegraph::from_lines(&mut inferno_options, lines, &mut svg)?;
    let svg = String::from_utf8(svg).map_err(io::Error::other)?;
    retitle(&svg, &tree, &layout, out)
}

/// Greens and blues as of old for memory: the module gives the hue, the function the shade, so that
/// a library stands out as a block. What stands for something missing is grey.
fn color(name: &Name) -> Color {
    if name.label.starts_with('[') {
        return Color { r: 200, g: 200, b: 200 };
    }
    let shade = (crc32fast::hash(name.label.as_bytes()) % 48) as u8;
    let hue = match &name.module {
        Some(module) => (crc32fast::hash(module.as_bytes()) % 100) as u8,
        None => 50,
    };
    Color { r: 90 + shade, g: 230 - hue / 2 - shade / 3, b: 90 + hue + shade }
}

fn title(profile: &Profile) -> String {
    let who = match profile.processes.as_slice() {
        [] => "no process".to_owned(),
        [process] => format!("{} (pid {})", names::printable(&process.comm), process.pid),
        [first, rest @ ..] => {
            format!("{} (pid {}) and {} more", names::printable(&first.comm), first.pid, rest.len())
        }
    };
    let after = units::duration(profile.duration_ns);
    match profile.mode {
        Mode::Exact => format!("{who}: live memory after {after} (exact)"),
        Mode::Windows => format!("{who}: live memory after {after} (estimated from windows)"),
        Mode::Sample { interval_bytes, .. } => format!(
            "{who}: live memory after {after} (sampled every {})",
            units::bytes(interval_bytes.into())
        ),
        Mode::Pages { one_in: 1 } => {
            format!("{who}: resident memory by first touch after {after} (every page)")
        }
        Mode::Pages { one_in } => {
            format!("{who}: resident memory by first touch after {after} (1 in {one_in} pages)")
        }
    }
}

fn subtitle(profile: &Profile, options: &ReportOptions) -> String {
    let totals = profile.totals();
    let mut text = format!(
        "{}{} in {}, since {}",
        units::bytes(totals.live_bytes),
        profile.totals_interval().map(names::interval).unwrap_or_default(),
        units::count(totals.live_count, profile.mode.noun()),
        units::time(profile.started_unix_ns)
    );
    if !profile.hostname.is_empty() {
        let _ = write!(text, " on {}", names::printable(&profile.hostname));
    }
    let filter = options.filter_in(profile.mode);
    if filter.min_age_ns > 0 {
        let _ = write!(text, ", older than {}", units::duration(filter.min_age_ns));
    }
    if filter.min_size_bytes > 0 {
        let _ = write!(
            text,
            ", {}s of {} and more",
            profile.mode.noun(),
            units::bytes(filter.min_size_bytes)
        );
    }
    let losses = profile.losses.values().fold(0, |sum: u64, count| sum.saturating_add(*count));
    if losses > 0 {
        let _ = write!(text, " — INCOMPLETE: {} losses", units::exact(losses));
    }
    text
}

/// The stacks, merged from their outermost frames inwards.
struct Tree {
    names: Vec<Name>,
    /// The first is [`ROOT`].
    nodes: Vec<Node>,
    /// What is counted.
    noun: &'static str,
}

/// Index of the root in [`Tree::nodes`].
const ROOT: usize = 0;

struct Node {
    /// Index in [`Tree::names`].
    name: usize,
    bytes: u64,
    count: u64,
    children: Vec<usize>,
}

struct Name {
    /// As inferno is given it.
    label: String,
    /// As hovering shows it.
    full: String,
    /// The first that the name was met in; the same function rarely lies in two.
    module: Option<String>,
}

impl Tree {
    fn new(profile: &Profile) -> Self {
        let mut growing = Growing {
            tree: Self { names: Vec::new(), nodes: Vec::new(), noun: profile.mode.noun() },
            name_ids: HashMap::new(),
            label_ids: HashMap::new(),
            node_ids: HashMap::new(),
        };
        let all = growing.name("all", None);
        growing.tree.nodes.push(Node::new(all));
        // The largest first, should there be too many.
        for (_, site) in ranked(profile, Sort::Bytes) {
            if profile.mode.counts(site.kind) {
                growing.add(profile, site);
            }
        }
        if growing.tree.nodes[ROOT].bytes == 0 {
            let nothing = growing.name("[no live bytes]", None);
            growing.tree.nodes.truncate(1);
            growing.tree.nodes[ROOT].children = vec![1];
            growing.tree.nodes.push(Node::new(nothing));
        }
        let mut tree = growing.tree;
        for index in 0..tree.nodes.len() {
            let mut children = std::mem::take(&mut tree.nodes[index].children);
            let rank = |child: &usize| Reverse(tree.nodes[*child].bytes);
            let label = |child: &usize| &tree.names[tree.nodes[*child].name].label;
            children.sort_by(|a, b| rank(a).cmp(&rank(b)).then_with(|| label(a).cmp(label(b))));
            tree.nodes[index].children = children;
        }
        tree
    }

    fn label(&self, node: usize) -> &str {
        &self.names[self.nodes[node].name].label
    }

    fn layout(&self) -> Layout {
        let total = self.nodes[ROOT].bytes;
        let mut layout = Layout { lines: Vec::new(), nodes: HashMap::new() };
        if total == 0 {
            // inferno draws nothing that has no width.
            layout.lines.push(format!("{} 1", self.label(1)));
            layout.nodes.extend([((0, 0), ROOT), ((1, 0), 1)]);
            return layout;
        }
        // Processes are always drawn: what is left out must stay in some caller.
        let drawn = |node: usize| {
            self.nodes[node].children.iter().copied().filter(move |child| {
                let scaled = u128::from(self.nodes[*child].bytes) * u128::from(NARROWEST);
                node == ROOT && scaled > 0 || scaled >= u128::from(total)
            })
        };
        // Stacks of hostile recordings are as deep as their authors like: no recursion.
        let mut start = 0;
        let mut path: Vec<usize> = Vec::new();
        let mut open: Vec<Step> = vec![Step::Enter(ROOT)];
        while let Some(step) = open.pop() {
            match step {
                Step::Enter(node) => {
                    layout.nodes.insert((path.len(), start), node);
                    path.push(node);
                    open.push(Step::Leave(node));
                    let first = open.len();
                    open.extend(drawn(node).map(Step::Enter));
                    open[first..].reverse();
                }
                Step::Leave(node) => {
                    let inner: u64 = drawn(node).map(|child| self.nodes[child].bytes).sum();
                    let own = self.nodes[node].bytes - inner;
                    if own > 0 {
                        let labels = path.iter().skip(1).map(|node| self.label(*node));
                        let labels: Vec<&str> = labels.collect();
                        layout.lines.push(format!("{} {own}", labels.join(";")));
                        start += own;
                    }
                    path.pop();
                }
            }
        }
        layout
    }

    /// What hovering shows. The last parentheses are what inferno's script takes off again to
    /// label the frame, so there must be no others in them.
    fn hover(&self, node: usize, whole_bytes: u64) -> String {
        let Node { name, bytes, count, .. } = &self.nodes[node];
        let Name { full, module, .. } = &self.names[*name];
        let mut text = format!(
            "{} ({} bytes in {}, {}",
            names::printable(full),
            units::exact(*bytes),
            units::count(*count, self.noun),
            units::percent(*bytes, whole_bytes)
        );
        if let Some(module) = module {
            let _ = write!(text, ", {}", names::printable(module).replace('(', "["));
        }
        text.push(')');
        text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
    }
}

/// A name as inferno can be given it: it trims, and takes numbers behind a space for counts.
fn label(name: &str) -> String {
    match names::folded(name).trim() {
        "" => "[no\u{a0}name]".to_owned(),
        text => text.replace(' ', "\u{a0}"),
    }
}

enum Step {
    Enter(usize),
    Leave(usize),
}

/// The tree as lines, and where inferno will draw its nodes.
struct Layout {
    lines: Vec<String>,
    /// By depth and bytes left of it.
    nodes: HashMap<(usize, u64), usize>,
}

impl Node {
    fn new(name: usize) -> Self {
        Self { name, bytes: 0, count: 0, children: Vec::new() }
    }

    fn count_in(&mut self, bytes: u64, count: u64) {
        self.bytes += bytes;
        self.count = self.count.saturating_add(count);
    }
}

/// A tree that stacks are being added to.
struct Growing {
    tree: Tree,
    /// By full name.
    name_ids: HashMap<String, usize>,
    /// By label: what inferno cannot tell apart must be one node.
    label_ids: HashMap<String, usize>,
    /// By parent and name.
    node_ids: HashMap<(usize, usize), usize>,
}

impl Growing {
    fn add(&mut self, profile: &Profile, site: &Site) {
        let counters = &site.counters;
        // Widths are sums. Should they not fit, the last ones are cut and not the process ended.
        let bytes = counters.live_bytes.min(u64::MAX - self.tree.nodes[ROOT].bytes);
        if bytes == 0 && counters.live_count == 0 {
            return;
        }
        let lines: Vec<names::Line> = names::lines(site).collect();
        let outermost = lines.get(lines.len().saturating_sub(DEPTH_MAX)..).unwrap_or_default();
        let mut path: Vec<usize> = outermost
            .iter()
            .map(|line| {
                let module = match line {
                    names::Line::Function { frame, .. } => names::module(profile, frame),
                    names::Line::Mark(_) | names::Line::Unnamed(_) => None,
                };
                let module = module.map(|module| names::base_name(&module.path));
                self.name(&line.name(profile), module)
            })
            .collect();
        path.push(self.name(&names::process_name(profile.process(site.process)), None));
        let mut at = ROOT;
        self.tree.nodes[at].count_in(bytes, counters.live_count);
        for name in path.into_iter().rev() {
            let next = self.tree.nodes.len();
            let is_full = next >= NODES_MAX && at != ROOT;
            if is_full && !self.node_ids.contains_key(&(at, name)) {
                break;
            }
            let node = *self.node_ids.entry((at, name)).or_insert(next);
            if node == next {
                self.tree.nodes.push(Node::new(name));
                self.tree.nodes[at].children.push(node);
            }
            self.tree.nodes[node].count_in(bytes, counters.live_count);
            at = node;
        }
    }

    fn name(&mut self, full: &str, module: Option<&str>) -> usize {
        if let Some(id) = self.name_ids.get(full) {
            return *id;
        }
        let label = label(full);
        let next = self.tree.names.len();
        let id = *self.label_ids.entry(label.clone()).or_insert(next);
        self.name_ids.insert(full.to_owned(), id);
        if id == next {
            let (full, module) = (full.to_owned(), module.map(str::to_owned));
            self.tree.names.push(Name { label, full, module });
        }
        id
    }
}

/// Copies what inferno drew, with blocks and module in the titles of the frames: inferno knows only
/// one number a frame.
fn retitle(svg: &str, tree: &Tree, layout: &Layout, out: &mut dyn Write) -> io::Result<()> {
    let Some(begin) = svg.find("<svg id=\"frames\"") else {
        return out.write_all(svg.as_bytes());
    };
    let (head, frames) = svg.split_at(begin);
    let root_y = frames.split("<rect ").filter_map(|rect| attribute(rect, "y")).min();
    out.write_all(head.as_bytes())?;
    let mut pieces = frames.split("<title>");
    out.write_all(pieces.next().unwrap_or_default().as_bytes())?;
    for piece in pieces {
        let (old, rest) = piece.split_once("</title>").unwrap_or((piece, ""));
        let node = || {
            let y = attribute(rest, "y")?;
            let depth = y.checked_sub(root_y?)? / FRAME_HEIGHT as u64;
            layout.nodes.get(&(usize::try_from(depth).ok()?, attribute(rest, "fg:x")?)).copied()
        };
        let hover = node().map(|node| tree.hover(node, tree.nodes[ROOT].bytes));
        write!(out, "<title>{}</title>{rest}", hover.as_deref().unwrap_or(old))?;
    }
    Ok(())
}

/// The number in an attribute of the first element of `markup`.
fn attribute(markup: &str, name: &str) -> Option<u64> {
    let element = markup.split('>').next()?;
    let (_, value) = element.split_once(&format!(" {name}=\""))?;
    value.split('"').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::{ProcessId, samples};

    /// Sites that share one endless stack, each of a process of its own.
    fn endless(processes: usize, frames: usize) -> Profile {
        let mut profile = samples::server();
        let site = profile.sites[0].clone();
        let frames: Vec<_> = site.frames.iter().cycle().take(frames).cloned().collect();
        let frames: std::sync::Arc<[_]> = frames.into();
        let process = profile.processes[0].clone();
        profile.processes = (0..processes as u32)
            .map(|pid| crate::profile::Process { pid, ..process.clone() })
            .collect();
        profile.sites = (0..processes)
            .map(|id| Site { process: ProcessId(id), frames: frames.clone(), ..site.clone() })
            .collect();
        profile
    }

    #[test]
    fn stacks_deeper_than_anybody_looks_are_cut_and_keep_their_bytes() {
        let profile = endless(3, 50_000);
        let tree = Tree::new(&profile);
        assert!(tree.nodes.len() <= 1 + 3 * (DEPTH_MAX + 1), "{} nodes", tree.nodes.len());
        assert_eq!(tree.nodes[ROOT].bytes, profile.totals().live_bytes);
        let mut svg = Vec::new();
        write(&profile, &ReportOptions::default(), &mut svg).unwrap();
        assert!(svg.len() < 2 << 20, "{} bytes", svg.len());
    }

    #[test]
    fn what_does_not_fit_the_tree_stays_in_its_process() {
        let profile = endless(600, 1000);
        let tree = Tree::new(&profile);
        assert!(tree.nodes.len() <= NODES_MAX + 600, "{} nodes", tree.nodes.len());
        let root = &tree.nodes[ROOT];
        assert_eq!(root.children.len(), 600);
        let sum: u64 = root.children.iter().map(|child| tree.nodes[*child].bytes).sum();
        assert_eq!((sum, root.bytes), (root.bytes, profile.totals().live_bytes));
    }
}
