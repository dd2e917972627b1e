//! What the session costs the processes that it watches, and itself.

use std::time::Duration;

use super::{
    SessionError, budget::Reading, calibration, clock::monotonic_ns, config::Method, watch::Watch,
};
use crate::{process::cpu_time, profile};

/// What a page fault costs whose page is not chosen: docs/overhead.md has the measurement.
const FAULT_IN_TRAPS: f64 = 0.1;

/// What a hit costs beyond its trap and its program, as a share of those: both run from cold caches there,
/// and what the processor had learned of the program's code and data is gone afterwards. It differs from
/// program to program (docs/overhead.md has the measurements); this is what the larger ones suffer, so that
/// the smaller ones pay less than is said.
const BEYOND: f64 = 1.2;

/// What the program takes at a call whose block is not chosen: docs/benchmarks.md has the measurement.
const UNCHOSEN_IN_TRAPS: f64 = 0.2;

/// With shorter ones most blocks are chosen.
const LEAST_SAMPLE_INTERVAL: u32 = 4096;

pub struct Meter {
    /// What a probe costs without what its program does.
    trap: Duration,
    page_interval: Option<u32>,
    /// Returns at which no program ran, as far as they are looked at already; and how many of those were
    /// traps all the same.
    let_go: u64,
    trapped: u64,
}

impl Meter {
    pub fn new(method: Method) -> Self {
        Self {
            trap: calibration::USUAL_TRAP,
            page_interval: method.page_interval(),
            let_go: 0,
            trapped: 0,
        }
    }

    pub fn calibrate(&mut self, trap: Duration) {
        self.trap = trap;
    }

    /// What was used since the session began.
    pub fn read(&mut self, watch: &mut Watch) -> Result<Reading, SessionError> {
        let on_hits = self.spent_on_hits_ns(watch)?;
        let on_faults = self.spent_on_faults_ns(watch)?;
        Ok(Reading {
            at_ns: monotonic_ns(),
            target_cpu_ns: nanoseconds(watch.cpu_time()),
            spent_ns: (on_hits + on_faults) as u64,
            spent_on_faults_ns: on_faults as u64,
        })
    }

    fn spent_on_hits_ns(&mut self, watch: &Watch) -> Result<f64, SessionError> {
        let trap = self.trap.as_nanos() as f64;
        let cost = watch.kernel.cost()?;
        if watch.probes_side_by_side() {
            self.trapped += cost.returns_let_go.saturating_sub(self.let_go);
        }
        self.let_go = cost.returns_let_go;
        let program = cost.hits.mean_ns().unwrap_or_default();
        let on_hits = cost.hits.count as f64 * (trap + program) + self.trapped as f64 * trap;
        Ok(on_hits * (1.0 + BEYOND))
    }

    fn spent_on_faults_ns(&self, watch: &Watch) -> Result<f64, SessionError> {
        let Some(one_in) = self.page_interval else { return Ok(0.0) };
        let cost = watch.kernel.cost()?;
        let faults = cost.faults as f64 * f64::from(one_in);
        let touch = cost.touches.mean_ns().unwrap_or_default();
        let trap = self.trap.as_nanos() as f64;
        Ok((faults * FAULT_IN_TRAPS * trap + cost.touches.count as f64 * touch) * (1.0 + BEYOND))
    }

    /// What would be left of the cost up to `now` if blocks were sampled; none when that would not spare much.
    pub fn left_by_sampling(
        &self,
        interval_bytes: u32,
        now: Reading,
        watch: &Watch,
    ) -> Option<f64> {
        if interval_bytes < LEAST_SAMPLE_INTERVAL {
            return None;
        }
        let trap = self.trap.as_nanos() as f64;
        let cost = watch.kernel.cost().ok()?;
        let program = cost.hits.mean_ns()?;
        let gone = cost.optional_returns as f64;
        let left = cost.hits.count as f64 - gone;
        let of_return = if watch.probes_side_by_side() { program } else { program + trap };
        let spared = (program - trap * UNCHOSEN_IN_TRAPS) * left + of_return * gone;
        let spared = spared * (1.0 + BEYOND);
        Some(1.0 - spared / now.spent_ns as f64)
    }

    /// For a profile.
    pub fn cost(
        &mut self,
        watch: &mut Watch,
        method: Method,
    ) -> Result<profile::Cost, SessionError> {
        let reading = self.read(watch)?;
        let (agent_cpu, agent_peak_rss_bytes) = cpu_time::own();
        Ok(profile::Cost {
            limit_ppm: method.limit().map(|limit| limit.ppm),
            target_cpu_ns: reading.target_cpu_ns,
            hits: watch.kernel.cost()?.hits.count,
            spent_ns: reading.spent_ns,
            agent_cpu_ns: nanoseconds(agent_cpu),
            agent_peak_rss_bytes,
        })
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
