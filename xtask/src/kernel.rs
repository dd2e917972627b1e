//! The ledger under another kernel: a program that knows its own truth runs in a virtual machine with
//! leakbpf attached, and both are compared: every block where all are counted, the estimate where
//! some are.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::shell;

/// Kernels of a full run. 7 is the newest 7.x that Debian has.
pub const ALL: [&str; 5] = ["5.10", "6.1", "6.12", "6.18", "7"];

/// Older kernels may be refused, in one line.
const OLDEST_SUPPORTED: (u32, u32) = (6, 1);

/// Gives some programs a private stack for each CPU (kernel/bpf/verifier.c, `bpf_enable_priv_stack`).
const PRIVATE_STACKS: (u32, u32) = (6, 13);

/// Programs on uprobes, named as the kernel cuts them. They are preempted, so a private stack would be
/// written over and crash the kernel.
const PREEMPTED: [&str; 5] =
    ["alloc_enter", "alloc_exit", "alloc_leave", "free_enter", "libraries_chang"];

/// The program that uprobe sessions add when blocks are sampled, and the first kernel with them.
const OF_SESSIONS: &str = "alloc_call";
const SESSIONS: (u32, u32) = (6, 13);

/// Blocks of at least so many bytes are always chosen: 16 of the intervals of xtask/smoke/guest.sh.
const CERTAIN_BYTES: u64 = 16 << 10;

/// A guest must not be wrong once in twenty: half intervals either way, of 1.96 standard deviations each.
const INTERVALS: u64 = 2;

/// The sessions of a guest, in this order (xtask/smoke/guest.sh).
const MODES: [&str; 2] = ["exact", "sample"];

/// Time limit of a guest, in seconds.
const GUEST_SECONDS: u32 = 420;

/// What the guest runs, copied to where each guest can see it.
pub struct Smoke {
    folder: PathBuf,
}

impl Smoke {
    /// Builds the agent and the programs.
    pub fn build() -> Result<Self> {
        let root = shell::root();
        shell::run(shell::cargo().args(["build", "--release", "-p", "leakbpf"]))?;
        let folder = root.join("target/smoke");
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        // Guests read files slowly, and most of the agent is its own debug information.
        let agent = root.join("target/release/leakbpf");
        shell::run(Command::new("strip").arg(&agent).arg("-o").arg(folder.join("leakbpf")))?;
        for program in ["blocks", "stacks"] {
            shell::run(
                Command::new("gcc")
                    .args(["-O1", "-g", "-static", "-fno-omit-frame-pointer", "-o"])
                    .arg(folder.join(program))
                    .arg(root.join("xtask/smoke").join(program).with_extension("c")),
            )?;
        }
        fs::copy(root.join("xtask/smoke/guest.sh"), folder.join("guest.sh"))?;
        Ok(Self { folder })
    }

    /// Prints a line with the verdict.
    ///
    /// # Errors
    /// The guest did not run, or the ledger differs from the truth.
    pub fn run(&self, kernel: &str) -> Result<()> {
        let started = Instant::now();
        let output = self.guest(kernel)?;
        let guest = Guest::parse(&output).with_context(|| format!("kernel {kernel}: {output}"))?;
        let verdict = guest.verdict()?;
        let seconds = started.elapsed().as_secs();
        println!("kernel {}: {verdict} ({seconds} s)", guest.kernel);
        Ok(())
    }

    fn guest(&self, kernel: &str) -> Result<String> {
        let output = Command::new(shell::root().join("xtask/vm-run"))
            .args(["-t", &GUEST_SECONDS.to_string(), "-r"])
            .arg(&self.folder)
            .arg(kernel)
            .arg("--")
            .arg(self.folder.join("guest.sh"))
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("cannot start xtask/vm-run")?;
        if !output.status.success() {
            bail!(
                "the guest with kernel {kernel} failed ({}); \
                 look with: xtask/vm-run -v -r {} {kernel} -- {}",
                output.status,
                self.folder.display(),
                self.folder.join("guest.sh").display(),
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// What a guest printed.
#[derive(Default)]
struct Guest {
    kernel: String,
    runs: Vec<Run>,
}

/// What it printed of one session.
#[derive(Default)]
struct Run {
    mode: String,
    status: i32,
    /// Size in bytes by address.
    truth: BTreeMap<u64, u64>,
    truth_is_complete: bool,
    /// `private` or `kernel`, by the program's name.
    stacks: BTreeMap<String, String>,
    messages: String,
    report: String,
}

impl Guest {
    fn parse(output: &str) -> Result<Self> {
        let mut guest = Self::default();
        let mut section = "";
        for line in output.lines() {
            if let Some(heading) = line.strip_prefix("=== ") {
                let (name, value) = heading.split_once(' ').unwrap_or((heading, ""));
                section = name;
                match name {
                    "kernel" => guest.kernel = value.to_owned(),
                    "session" => guest.runs.push(Run::of(value)),
                    "status" => guest.run()?.status = value.parse().context("exit status")?,
                    _ => {}
                }
            } else if !matches!(section, "" | "kernel") {
                guest.run()?.take(section, line)?;
            }
        }
        if guest.kernel.is_empty() || guest.runs.len() != MODES.len() {
            bail!("the guest did not print its results");
        }
        Ok(guest)
    }

    fn run(&mut self) -> Result<&mut Run> {
        self.runs.last_mut().context("a section before the first session")
    }

    /// Of all sessions, or what is wrong with the first that is.
    fn verdict(&self) -> Result<String> {
        let mut verdicts = Vec::new();
        for (run, mode) in self.runs.iter().zip(MODES) {
            let verdict = run.verdict(mode, version(&self.kernel)).with_context(|| {
                format!("kernel {}, {mode}: the agent said: {}", self.kernel, run.messages.trim())
            })?;
            if !verdicts.contains(&verdict) {
                verdicts.push(verdict);
            }
        }
        Ok(verdicts.join("; "))
    }
}

impl Run {
    fn of(mode: &str) -> Self {
        Self { mode: mode.to_owned(), ..Self::default() }
    }

    fn take(&mut self, section: &str, line: &str) -> Result<()> {
        match section {
            "truth" | "stacks" if line.is_empty() => {}
            "truth" if line == "end" => self.truth_is_complete = true,
            "truth" => {
                let (address, size) = line.split_once(' ').context("truth")?;
                self.truth.insert(address.parse()?, size.parse()?);
            }
            "stacks" => {
                let (program, stack) = line.split_once(' ').context("stacks")?;
                // A program can be loaded twice, for the two kinds of links.
                let known = self.stacks.entry(program.to_owned()).or_default();
                if known != "private" {
                    *known = stack.to_owned();
                }
            }
            "messages" => {
                self.messages.push_str(line);
                self.messages.push('\n');
            }
            "report" => self.report.push_str(line),
            _ => {}
        }
        Ok(())
    }

    fn verdict(&self, mode: &str, kernel: (u32, u32)) -> Result<String> {
        if self.mode != mode {
            bail!("this is a session in mode {:?}", self.mode);
        }
        if self.status == 2 && kernel < OLDEST_SUPPORTED {
            let mut lines = self.messages.lines();
            match (lines.next(), lines.next()) {
                (Some(line), None) => return Ok(format!("refused in one line: {line}")),
                _ => bail!("a refusal must be exactly one line"),
            }
        }
        if self.status != 0 {
            bail!("leakbpf ended with status {}", self.status);
        }
        if !self.truth_is_complete || self.truth.is_empty() {
            bail!("the program did not tell its truth");
        }
        let sessions = mode == "sample" && kernel >= SESSIONS;
        self.check_stacks(sessions.then_some(OF_SESSIONS), kernel)?;
        let report: Value = serde_json::from_str(&self.report).context("leakbpf's JSON")?;
        let losses = report["losses"].as_object().context("losses in leakbpf's JSON")?;
        for (name, count) in losses {
            if count != 0 {
                bail!("loss counter {name} is {count}");
            }
        }
        match mode {
            "exact" => self.compare_all(&report),
            _ => self.compare_estimate(&report),
        }
    }

    /// Every block, and no other.
    fn compare_all(&self, report: &Value) -> Result<String> {
        let blocks = heap_blocks(report)?;
        let missing = self.truth.iter().filter(|&(a, s)| blocks.get(a) != Some(s)).count();
        let excess = self.untrue(&blocks);
        if missing + excess > 0 {
            bail!(
                "of {} blocks {missing} are missing or of wrong size, {excess} do not exist",
                self.truth.len(),
            );
        }
        Ok(format!("exact, {} of {} blocks, no losses", blocks.len(), self.truth.len()))
    }

    /// Some blocks, none that is not there, and the truth near what they say of all.
    fn compare_estimate(&self, report: &Value) -> Result<String> {
        let blocks = heap_blocks(report)?;
        let untrue = self.untrue(&blocks);
        if untrue > 0 || blocks.is_empty() {
            bail!("of {} sampled blocks, {untrue} do not exist", blocks.len());
        }
        let certain = |&(address, size): &(&u64, &u64)| {
            *size >= CERTAIN_BYTES && !blocks.contains_key(address)
        };
        let missing = self.truth.iter().filter(certain).count();
        if missing > 0 {
            bail!("{missing} blocks of {CERTAIN_BYTES} bytes and more were not chosen");
        }
        if blocks.len() == self.truth.len() {
            bail!("all {} blocks were recorded: nothing was sampled", blocks.len());
        }
        for (unit, truth) in
            [("count", self.truth.len() as u64), ("bytes", self.truth.values().sum())]
        {
            let total = |name: String| &report["totals"][name];
            let estimate = total(format!("live_{unit}")).as_u64().context("an estimate")?;
            let interval = total(format!("live_{unit}_interval"));
            let end = |index: usize| interval[index].as_u64().context("an interval");
            let (below, above) = (estimate.abs_diff(end(0)?), estimate.abs_diff(end(1)?));
            let low = estimate.saturating_sub(INTERVALS * below);
            let high = estimate + INTERVALS * above;
            if !(low..=high).contains(&truth) {
                bail!("{unit}: estimated {estimate} ({interval}), in truth {truth}");
            }
        }
        Ok(format!("estimated from {} of {} blocks", blocks.len(), self.truth.len()))
    }

    /// How many of them the program does not hold.
    fn untrue(&self, blocks: &BTreeMap<u64, u64>) -> usize {
        blocks.iter().filter(|&(a, s)| self.truth.get(a) != Some(s)).count()
    }

    /// `added` is a program that this session needs besides.
    fn check_stacks(&self, added: Option<&str>, kernel: (u32, u32)) -> Result<()> {
        for program in PREEMPTED.into_iter().chain(added) {
            match self.stacks.get(program).map(String::as_str) {
                Some("kernel") => {}
                Some(stack) => bail!(
                    "{program} runs on a {stack} stack, with which a kernel with preemption crashes"
                ),
                None => bail!("the guest does not tell which stack {program} runs on"),
            }
        }
        // The others do have one, or the check is blind.
        let recognized = self.stacks.values().any(|stack| stack == "private");
        if !recognized && kernel >= PRIVATE_STACKS {
            bail!("xtask/smoke/stacks.c recognizes no private stack on this kernel");
        }
        Ok(())
    }
}

/// Major and minor version of a release.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Size in bytes by address, without the mappings that are sites of their own.
fn heap_blocks(report: &Value) -> Result<BTreeMap<u64, u64>> {
    let sites = report["sites"].as_array().context("sites in leakbpf's JSON")?;
    let mut blocks = BTreeMap::new();
    for block in report["blocks"].as_array().context("blocks in leakbpf's JSON")? {
        let site = block["site"].as_u64().and_then(|site| sites.get(usize::try_from(site).ok()?));
        let kind = site.and_then(|site| site["kind"].as_str()).unwrap_or("heap");
        if kind == "heap" {
            let number =
                |name: &str| block[name].as_u64().with_context(|| format!("blocks[].{name}"));
            blocks.insert(number("address")?, number("size")?);
        }
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{"losses":{"blocks_full":0},
        "totals":{"live_count":2,"live_count_interval":[1,3],"live_bytes":80,"live_bytes_interval":[70,90]},
        "sites":[{"kind":"heap"},{"kind":"mapping"}],
        "blocks":[{"address":16,"size":5,"site":0},{"address":4096,"size":8192,"site":1}]}"#;

    fn run(mode: &str, status: i32, truth: &str, messages: &str) -> Run {
        run_with_stacks(mode, status, truth, messages, PREEMPTED.map(|name| (name, "kernel")))
    }

    fn run_with_stacks<'a>(
        mode: &str,
        status: i32,
        truth: &str,
        messages: &str,
        stacks: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Run {
        let stacks: Vec<String> =
            stacks.into_iter().map(|(program, stack)| format!("{program} {stack}")).collect();
        let stacks = stacks.join("\n");
        let session = format!(
            "=== session {mode}\n=== status {status}\n=== truth\n{truth}\n=== stacks\n{stacks}\n=== messages\n{messages}\n=== report\n{REPORT}"
        );
        let guest = Guest::parse(&format!("=== kernel 6.1.0-9-amd64\n{session}\n{session}\n"));
        guest.expect("well-formed").runs.remove(1)
    }

    #[test]
    fn equal_blocks_are_exact_and_mappings_do_not_count() {
        let verdict = run("exact", 0, "16 5\nend", "").verdict("exact", (6, 1)).expect("exact");
        assert_eq!(verdict, "exact, 1 of 1 blocks, no losses");
    }

    #[test]
    fn a_block_of_another_size_is_red() {
        assert!(run("exact", 0, "16 6\nend", "").verdict("exact", (6, 1)).is_err());
        assert!(run("sample", 0, "16 6\n32 70\nend", "").verdict("sample", (6, 1)).is_err());
    }

    #[test]
    fn an_estimate_is_near_the_truth() {
        let verdict = |truth: &str| run("sample", 0, truth, "").verdict("sample", (6, 1));
        assert_eq!(verdict("16 5\n32 70\nend").expect("near"), "estimated from 1 of 2 blocks");
        assert!(verdict("16 5\n32 500\nend").is_err(), "bytes");
        assert!(verdict("16 5\n32 10\n48 15\n64 10\n80 20\n96 20\nend").is_err(), "count");
        assert!(verdict("16 5\nend").is_err(), "every block");
        assert!(verdict("16 5\n32 16384\nend").is_err(), "a large one is missing");
    }

    #[test]
    fn a_session_of_another_mode_is_red() {
        assert!(run("exact", 0, "16 5\nend", "").verdict("sample", (6, 1)).is_err());
    }

    #[test]
    fn a_program_that_did_not_finish_is_red() {
        assert!(run("exact", 0, "16 5", "").verdict("exact", (6, 1)).is_err());
    }

    #[test]
    fn only_old_kernels_may_be_refused_and_only_in_one_line() {
        let refused = |messages: &str, kernel: &str| {
            run("exact", 2, "", messages).verdict("exact", version(kernel))
        };
        assert!(refused("leakbpf: too old", "5.10.0-9-amd64").is_ok());
        assert!(refused("leakbpf: too old\nstack trace", "5.10.0-9-amd64").is_err());
        assert!(refused("leakbpf: too old", "6.12.0").is_err());
    }

    #[test]
    fn a_probe_on_a_private_stack_is_red() {
        let stacks = |of_enter, of_others| {
            let mut stacks = PREEMPTED.map(|name| (name, "kernel")).to_vec();
            stacks[0].1 = of_enter;
            stacks.push(("task_new", of_others));
            stacks
        };
        let verdict = |kernel: (u32, u32), stacks: Vec<(&str, &str)>| {
            run_with_stacks("exact", 0, "16 5\nend", "", stacks).verdict("exact", kernel)
        };
        assert!(verdict((7, 3), stacks("kernel", "private")).is_ok());
        assert!(verdict((7, 3), stacks("private", "private")).is_err());
        assert!(verdict((7, 3), Vec::new()).is_err());
        // Since 6.13, a look that finds none anywhere is blind.
        assert!(verdict((7, 3), stacks("kernel", "kernel")).is_err());
        assert!(verdict((6, 12), stacks("kernel", "kernel")).is_ok());
    }

    #[test]
    fn sampling_without_sessions_is_red_where_there_are_some() {
        let verdict = |kernel: (u32, u32), sessions: bool| {
            let mut stacks = PREEMPTED.map(|name| (name, "kernel")).to_vec();
            stacks.push(("task_new", "private"));
            stacks.extend(sessions.then_some((OF_SESSIONS, "kernel")));
            run_with_stacks("sample", 0, "16 5\n32 70\nend", "", stacks).verdict("sample", kernel)
        };
        assert!(verdict((6, 12), false).is_ok());
        assert!(verdict((6, 13), false).is_err());
        assert!(verdict((6, 13), true).is_ok());
    }
}
