//! The exact ledger under another kernel: a program that knows its own truth runs in a virtual
//! machine with leakbpf attached, and both are compared block by block.

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

/// Time limit of a guest, in seconds.
const GUEST_SECONDS: u32 = 240;

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
        let run = Run::parse(&output).with_context(|| format!("kernel {kernel}: {output}"))?;
        let verdict = run.verdict().with_context(|| {
            format!("kernel {}: the agent said: {}", run.kernel, run.messages.trim())
        })?;
        let seconds = started.elapsed().as_secs();
        println!("kernel {}: {verdict} ({seconds} s)", run.kernel);
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

/// What one guest printed.
#[derive(Default)]
struct Run {
    kernel: String,
    status: i32,
    /// Size in bytes by address.
    truth: BTreeMap<u64, u64>,
    truth_is_complete: bool,
    /// `private` or `kernel`, by the program's name.
    stacks: BTreeMap<String, String>,
    messages: String,
    report: String,
}

impl Run {
    fn parse(output: &str) -> Result<Self> {
        let mut run = Self::default();
        let mut section = "";
        for line in output.lines() {
            if let Some(heading) = line.strip_prefix("=== ") {
                let (name, value) = heading.split_once(' ').unwrap_or((heading, ""));
                section = name;
                match name {
                    "kernel" => run.kernel = value.to_owned(),
                    "status" => run.status = value.parse().context("exit status")?,
                    _ => {}
                }
                continue;
            }
            match section {
                "truth" if line.is_empty() => {}
                "truth" if line == "end" => run.truth_is_complete = true,
                "truth" => {
                    let (address, size) = line.split_once(' ').context("truth")?;
                    run.truth.insert(address.parse()?, size.parse()?);
                }
                "stacks" if line.is_empty() => {}
                "stacks" => {
                    let (program, stack) = line.split_once(' ').context("stacks")?;
                    // A program can be loaded twice, for the two kinds of links.
                    let known = run.stacks.entry(program.to_owned()).or_default();
                    if known != "private" {
                        *known = stack.to_owned();
                    }
                }
                "messages" => {
                    run.messages.push_str(line);
                    run.messages.push('\n');
                }
                "report" => run.report.push_str(line),
                _ => {}
            }
        }
        if run.kernel.is_empty() {
            bail!("the guest printed no result");
        }
        Ok(run)
    }

    fn verdict(&self) -> Result<String> {
        if self.status == 2 && self.is_older_than(OLDEST_SUPPORTED) {
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
        self.check_stacks()?;
        let report: Value = serde_json::from_str(&self.report).context("leakbpf's JSON")?;
        let blocks = heap_blocks(&report)?;
        let missing = self.truth.iter().filter(|&(a, s)| blocks.get(a) != Some(s)).count();
        let excess = blocks.iter().filter(|&(a, s)| self.truth.get(a) != Some(s)).count();
        if missing + excess > 0 {
            bail!(
                "of {} blocks {missing} are missing or of wrong size, {excess} do not exist",
                self.truth.len(),
            );
        }
        let losses = report["losses"].as_object().context("losses in leakbpf's JSON")?;
        for (name, count) in losses {
            if count != 0 {
                bail!("loss counter {name} is {count}");
            }
        }
        Ok(format!("exact, {} of {} blocks, no losses", blocks.len(), self.truth.len()))
    }

    fn check_stacks(&self) -> Result<()> {
        for program in PREEMPTED {
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
        if !recognized && !self.is_older_than(PRIVATE_STACKS) {
            bail!("xtask/smoke/stacks.c recognizes no private stack on this kernel");
        }
        Ok(())
    }

    fn is_older_than(&self, release: (u32, u32)) -> bool {
        let mut numbers = self.kernel.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < release
    }
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

    const REPORT: &str = r#"{"losses":{"blocks_full":0},"sites":[{"kind":"heap"},{"kind":"mapping"}],
        "blocks":[{"address":16,"size":5,"site":0},{"address":4096,"size":8192,"site":1}]}"#;

    fn run(status: i32, kernel: &str, truth: &str, messages: &str) -> Run {
        run_with_stacks(status, kernel, truth, messages, PREEMPTED.map(|name| (name, "kernel")))
    }

    fn run_with_stacks<'a>(
        status: i32,
        kernel: &str,
        truth: &str,
        messages: &str,
        stacks: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Run {
        let stacks: Vec<String> =
            stacks.into_iter().map(|(program, stack)| format!("{program} {stack}")).collect();
        let stacks = stacks.join("\n");
        Run::parse(&format!(
            "=== kernel {kernel}\n=== status {status}\n=== truth\n{truth}\n=== stacks\n{stacks}\n=== messages\n{messages}\n=== report\n{REPORT}"
        ))
        .expect("a well-formed run")
    }

    #[test]
    fn equal_blocks_are_exact_and_mappings_do_not_count() {
        let verdict = run(0, "6.1.0-9-amd64", "16 5\nend", "").verdict().expect("exact");
        assert_eq!(verdict, "exact, 1 of 1 blocks, no losses");
    }

    #[test]
    fn a_block_of_another_size_is_red() {
        assert!(run(0, "6.1.0", "16 6\nend", "").verdict().is_err());
    }

    #[test]
    fn a_program_that_did_not_finish_is_red() {
        assert!(run(0, "6.1.0", "16 5", "").verdict().is_err());
    }

    #[test]
    fn only_old_kernels_may_be_refused_and_only_in_one_line() {
        assert!(run(2, "5.10.0", "", "leakbpf: too old").verdict().is_ok());
        assert!(run(2, "5.10.0", "", "leakbpf: too old\nstack trace").verdict().is_err());
        assert!(run(2, "6.12.0", "", "leakbpf: too old").verdict().is_err());
    }

    #[test]
    fn a_probe_on_a_private_stack_is_red() {
        let stacks = |of_enter, of_others| {
            let mut stacks = PREEMPTED.map(|name| (name, "kernel")).to_vec();
            stacks[0].1 = of_enter;
            stacks.push(("task_new", of_others));
            stacks
        };
        let verdict = |kernel: &str, stacks: Vec<(&str, &str)>| {
            run_with_stacks(0, kernel, "16 5\nend", "", stacks).verdict()
        };
        assert!(verdict("7.3.4", stacks("kernel", "private")).is_ok());
        assert!(verdict("7.3.4", stacks("private", "private")).is_err());
        assert!(verdict("7.3.4", Vec::new()).is_err());
        // Since 6.13, a look that finds none anywhere is blind.
        assert!(verdict("7.3.4", stacks("kernel", "kernel")).is_err());
        assert!(verdict("6.12.9", stacks("kernel", "kernel")).is_ok());
    }
}
