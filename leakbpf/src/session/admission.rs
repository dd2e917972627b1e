//! Whether a session may watch the processes that it is asked to.

use super::{SessionError, config::Method};
use crate::{
    preflight::{self, host::HostFacts},
    process::{
        Pid,
        select::{Selector, select},
        target,
    },
};

/// Whether probes in every process would harm one that runs.
pub fn bystanders(host: &HostFacts) -> Result<Vec<preflight::Check>, SessionError> {
    let judge = |facts| preflight::target::judge_bystander(&facts, host);
    let observed =
        select(&Selector::All)?.into_iter().filter_map(|pid| target::observe(pid, false).ok());
    Ok(observed.flat_map(judge).collect())
}

/// Checks each process; of several found by name or group, those that can't be traced are left out
/// with a word.
pub fn admit(
    pids: Vec<Pid>,
    selector: &Selector,
    host: &HostFacts,
    method: Method,
) -> Result<Vec<Pid>, SessionError> {
    let mut admitted = Vec::new();
    let mut refused = None;
    for pid in pids {
        let checks = match target::observe(pid, false) {
            Ok(facts) if method.probes() => preflight::target::judge(&facts, host),
            Ok(facts) => preflight::target::judge_for_pages(&facts),
            Err(error) if matches!(selector, Selector::Pids(_)) => return Err(error.into()),
            Err(_) => continue,
        };
        match (preflight::Report { checks }).refuse_failures() {
            Ok(()) => admitted.push(pid),
            Err(refusal) if matches!(selector, Selector::Pids(_)) => return Err(refusal.into()),
            Err(refusal) => {
                if !matches!(selector, Selector::All) {
                    eprintln!("leakbpf: left out {pid}: {refusal}");
                }
                refused = Some(refusal);
            }
        }
    }
    match (admitted.is_empty(), refused) {
        (true, Some(refusal)) => Err(refusal.into()),
        _ => Ok(admitted),
    }
}
