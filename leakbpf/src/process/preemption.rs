//! Whether the kernel takes the processor away from its own code.

use std::fs::{self, File};
use std::io::Read as _;

use flate2::read::GzDecoder;

/// Of a kernel's configuration that is read.
const MOST_BYTES: u64 = 4 << 20;

/// What a kernel says of its preemption model, as far as it does.
#[derive(Debug, Default)]
struct Facts {
    /// `/proc/version`
    version: String,
    /// What debugfs lists: all models, the one in force in parentheses.
    models: Option<String>,
    /// `/proc/cmdline`
    command_line: String,
    /// `/proc/config.gz`, or the file that distributions install.
    configuration: Option<String>,
}

/// Where the kernel does not say, it may.
pub fn kernel_preempts() -> bool {
    preempts(&Facts {
        version: fs::read_to_string("/proc/version").unwrap_or_default(),
        models: fs::read_to_string("/sys/kernel/debug/sched/preempt").ok(),
        command_line: fs::read_to_string("/proc/cmdline").unwrap_or_default(),
        configuration: configuration(),
    })
}

fn configuration() -> Option<String> {
    let mut text = String::new();
    if let Ok(file) = File::open("/proc/config.gz") {
        GzDecoder::new(file).take(MOST_BYTES).read_to_string(&mut text).ok()?;
    } else {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
        let file = File::open(format!("/boot/config-{}", release.trim_end())).ok()?;
        file.take(MOST_BYTES).read_to_string(&mut text).ok()?;
    }
    Some(text)
}

/// The version has `PREEMPT`, `PREEMPT_RT` or `PREEMPT_DYNAMIC` (init/Makefile), and some have the model
/// in force (`PREEMPT(lazy)`). A dynamic one is that of the command line, or else the configuration's,
/// until somebody changes it through debugfs (kernel/sched/core.c, `preempt_dynamic_init`); newer kernels
/// have no models that do not preempt, and no options for them.
fn preempts(facts: &Facts) -> bool {
    let calm = |model: &str| matches!(model, "none" | "voluntary");
    let Some(word) = facts.version.split_whitespace().find(|word| word.starts_with("PREEMPT"))
    else {
        return false;
    };
    if let Some(model) = in_parentheses(word).or_else(|| in_parentheses(facts.models.as_ref()?)) {
        return !calm(model);
    }
    if word != "PREEMPT_DYNAMIC" {
        return true;
    }
    let configuration = facts.configuration.as_deref().unwrap_or_default();
    if !configuration.contains("CONFIG_PREEMPT_NONE") {
        return true;
    }
    let asked = |word: &'_ str| word.strip_prefix("preempt=").map(calm);
    if let Some(calm) = facts.command_line.split_whitespace().filter_map(asked).next_back() {
        return !calm;
    }
    let calm = ["CONFIG_PREEMPT_NONE=y", "CONFIG_PREEMPT_VOLUNTARY=y"];
    !configuration.lines().any(|line| calm.contains(&line))
}

fn in_parentheses(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('(')?;
    Some(rest.split_once(')')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(model: &str) -> Facts {
        let version = format!("Linux version 7.3.4 (gcc) #1 SMP {model} Debian 7.3");
        Facts { version, ..Facts::default() }
    }

    #[test]
    fn the_version_says_it() {
        let says = |model: &str| preempts(&facts(model));
        assert!(says("PREEMPT(lazy)") && says("PREEMPT(full)"));
        assert!(!says("PREEMPT(none)") && !says("PREEMPT(voluntary)"));
        assert!(says("PREEMPT_DYNAMIC") && says("PREEMPT") && says("PREEMPT_RT"));
        assert!(!says(""));
    }

    #[test]
    fn debugfs_says_what_is_in_force() {
        let says = |models: &str| {
            let models = Some(models.to_owned());
            let configuration = Some("CONFIG_PREEMPT_NONE=y\n".to_owned());
            preempts(&Facts { models, configuration, ..facts("PREEMPT_DYNAMIC") })
        };
        assert!(!says("none (voluntary) full"));
        assert!(says("none voluntary (full)"));
    }

    #[test]
    fn a_dynamic_model_is_the_configurations_unless_the_command_line_has_another() {
        let says = |configuration: &str, command_line: &str, model: &str| {
            let configuration = Some(configuration.to_owned());
            let command_line = command_line.to_owned();
            preempts(&Facts { configuration, command_line, ..facts(model) })
        };
        let none = "CONFIG_PREEMPT_NONE=y\n# CONFIG_PREEMPT is not set\nCONFIG_PREEMPT_DYNAMIC=y\n";
        let lazy = "# CONFIG_PREEMPT_NONE is not set\nCONFIG_PREEMPT_LAZY=y\n";
        assert!(!says(none, "quiet", "PREEMPT_DYNAMIC"));
        assert!(says(lazy, "quiet", "PREEMPT_DYNAMIC"));
        assert!(says(none, "preempt=full quiet", "PREEMPT_DYNAMIC"));
        assert!(!says(lazy, "preempt=full preempt=none", "PREEMPT_DYNAMIC"));
        assert!(says("CONFIG_PREEMPT_LAZY=y\n", "preempt=none", "PREEMPT_DYNAMIC"));
        assert!(says(none, "", "PREEMPT_RT"));
    }
}
