//! When probes may be in place, so that they cost no more than a share of the processes' own time.
//!
//! Processor time of the watched processes earns credit, what the probes cost spends it. While there is
//! credit, the probes stay. When it is used up, blocks are sampled, if that is cheap enough; else the
//! probes go, until there is enough for a window that is worth placing them. When page faults alone cost
//! more than is earned, they are looked at no more. A process that allocates little never uses up its
//! credit, and its probes stay for good. Credit that is not used is kept for [`CONTROL_PERIOD`] only: over such a time, no storm
//! after a calm can cost more than twice the share, and over longer times the share holds.
//!
//! Pure: readings in, steps out.

use std::time::Duration;

/// See above.
pub const CONTROL_PERIOD: Duration = Duration::from_secs(10);

/// What a session may spend before anything is earned: some time has to be spent to learn what the
/// probes cost.
const FIRST_CREDIT_NS: f64 = 5e6;

/// Windows are as far apart as this, where that makes them neither too short nor too long.
const CYCLE_NS: f64 = 4e9;

/// Shortest window that is planned, and longest.
const SHORTEST_NS: f64 = 80e6;
const LONGEST_NS: f64 = 5e9;

/// A window is at least so many times as long as placing the probes takes of the agent's time.
const WINDOW_TO_PLACING: f64 = 10.0;

/// So much of the share is spent; the rest is for windows that cost more than was expected.
const EARNED: f64 = 0.9;

/// When a window costs more than was expected, so much of what was expected may be spent on credit
/// for it to reach its length.
const OVERDRAFT: f64 = 0.25;

/// Processors that the processes count as using, at the least.
const LEAST_USE: f64 = 0.1;

/// Time after which e times less is made of what a window has cost.
const FORGETTING_NS: f64 = 120e9;

/// Whether samples are cheap enough is judged by the load of such a time.
const MOMENTS_NS: f64 = 1e9;

/// What a session that has just become cheaper may spend at first, as a time of earning: what it had is
/// used up, and the first moment must not end it.
const FRESH_CREDIT_NS: f64 = 1e9;

/// Least credit that opens a window.
const LEAST_CREDIT_NS: f64 = 1e6;

/// What was measured up to a moment, since the session began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reading {
    pub at_ns: u64,
    /// Processor time of the watched processes, `spent_ns` included.
    pub target_cpu_ns: u64,
    /// What the session has cost them.
    pub spent_ns: u64,
    /// Of that, what it takes to look at page faults.
    pub spent_on_faults_ns: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Stay,
    /// Record some of the blocks only.
    Sample,
    /// Place the probes.
    Open,
    /// Take them away.
    Close,
    /// Look at page faults no more.
    StopPages,
}

pub struct Budget {
    /// Of the processes' own time.
    share: f64,
    /// Windows that could stay open end after this time all the same.
    longest_window: Option<Duration>,
    open: bool,
    /// Blocks are sampled, or were.
    sampled: bool,
    credit_ns: f64,
    last: Reading,
    /// When the probes were placed.
    opened: Reading,
    /// Own processor time of the processes per time, lately.
    own_rate: f64,
    /// Own time of the processes and what the probes cost, per time, in the last moments.
    own_now: f64,
    cost_now: f64,
    /// Of that, what page faults cost.
    faults_now: f64,
    /// What probes cost per time while they are in place, in the last window; less and less is made
    /// of that while they are not, since loads change.
    spending_rate: f64,
    /// What placing the probes takes of the agent's time.
    placing_ns: f64,
    /// How long the window that is open was meant to be, and how far below zero credit may go for it.
    planned_ns: f64,
    overdraft_ns: f64,
}

impl Budget {
    /// The probes are in place. `share` is of the processes' own processor time.
    pub fn new(share: f64, longest_window: Option<Duration>, now: Reading) -> Self {
        Self {
            share,
            longest_window,
            open: true,
            sampled: false,
            credit_ns: FIRST_CREDIT_NS,
            last: now,
            opened: now,
            own_rate: 0.0,
            own_now: 0.0,
            cost_now: 0.0,
            faults_now: 0.0,
            spending_rate: 0.0,
            placing_ns: 0.0,
            planned_ns: 0.0,
            overdraft_ns: 0.0,
        }
    }

    pub fn is_open(&self) -> bool {
        self.open
    }

    /// The probes are in place since `now`; placing them took so much of the agent's processor time.
    pub fn opened(&mut self, now: Reading, placing: Duration) {
        self.take_in(now);
        (self.planned_ns, self.overdraft_ns) = (self.window_ns(), OVERDRAFT * self.enough_ns());
        self.placing_ns = placing.as_nanos() as f64;
        self.open = true;
        self.opened = now;
    }

    /// The probes are gone since `now`.
    pub fn closed(&mut self, now: Reading) {
        self.take_in(now);
        self.open = false;
        let time = now.at_ns.saturating_sub(self.opened.at_ns);
        let spent = now.spent_ns.saturating_sub(self.opened.spent_ns);
        if time > 0 {
            self.spending_rate = spent as f64 / time as f64;
        }
    }

    /// Blocks are sampled since `now`.
    pub fn begin_sampling(&mut self, now: Reading) {
        self.take_in(now);
        self.sampled = true;
        self.credit_ns = self.earning_rate() * FRESH_CREDIT_NS;
    }

    /// Page faults are looked at no more.
    pub fn stopped_pages(&mut self) {
        self.cost_now -= self.faults_now;
        self.faults_now = 0.0;
        // What they have used up must not end what the probes alone can afford.
        self.credit_ns = self.credit_ns.max(self.earning_rate() * FRESH_CREDIT_NS);
    }

    /// What to do now. `left` tells what would be left of the cost if blocks were sampled; none when
    /// they can't be.
    pub fn decide(&mut self, now: Reading, left: impl FnOnce() -> Option<f64>) -> Step {
        self.take_in(now);
        if self.open {
            let open_for = Duration::from_nanos(now.at_ns.saturating_sub(self.opened.at_ns));
            let over = self.longest_window.is_some_and(|longest| open_for >= longest);
            let short = (open_for.as_nanos() as f64) < self.planned_ns;
            let least = if short { -self.overdraft_ns } else { 0.0 };
            if self.credit_ns >= least && !over {
                return Step::Stay;
            }
            if !over && self.faults_are_dear() {
                return Step::StopPages;
            }
            if self.sampled || over {
                return Step::Close;
            }
            let fits = left().is_some_and(|left| self.cost_now * left <= self.earned_now());
            return if fits { Step::Sample } else { Step::Close };
        }
        if self.credit_ns >= self.enough_ns() {
            Step::Open
        } else if self.credit_ns < 0.0 && self.faults_are_dear() {
            Step::StopPages
        } else {
            Step::Stay
        }
    }

    /// They cost more than is earned, whatever becomes of the probes.
    fn faults_are_dear(&self) -> bool {
        self.faults_now > self.earned_now()
    }

    /// What is earned per time, in the last moments.
    fn earned_now(&self) -> f64 {
        let added = (LEAST_USE - self.own_rate).max(0.0);
        EARNED * self.share * (self.own_now + added)
    }

    /// When to look again.
    pub fn look_again_after(&self, now: Reading) -> Duration {
        let open_for = Duration::from_nanos(now.at_ns.saturating_sub(self.opened.at_ns));
        match (self.open, open_for < Duration::from_millis(200)) {
            (true, true) => Duration::from_millis(10),
            (true, false) => Duration::from_millis(50),
            (false, _) => Duration::from_millis(100),
        }
    }

    fn take_in(&mut self, now: Reading) {
        let time = now.at_ns.saturating_sub(self.last.at_ns) as f64;
        let spent = now.spent_ns.saturating_sub(self.last.spent_ns) as f64;
        let target = now.target_cpu_ns.saturating_sub(self.last.target_cpu_ns) as f64;
        // What the probes cost is estimated, the processes' time is not.
        let own = (target - spent).max(0.0);
        // Over some time: the pauses of a process that is busy are no reason to spend more.
        let added = (LEAST_USE - self.own_rate).max(0.0) * time;
        self.credit_ns += EARNED * self.share * (own + added) - spent;
        if time > 0.0 {
            let period = CONTROL_PERIOD.as_nanos() as f64;
            let weight = 1.0 - (-time / period).exp();
            self.own_rate += weight * (own / time - self.own_rate);
            let weight = 1.0 - (-time / MOMENTS_NS).exp();
            self.own_now += weight * (own / time - self.own_now);
            self.cost_now += weight * (spent / time - self.cost_now);
            let faults = now.spent_on_faults_ns.saturating_sub(self.last.spent_on_faults_ns) as f64;
            self.faults_now += weight * (faults / time - self.faults_now);
            if !self.open {
                self.spending_rate *= (-time / FORGETTING_NS).exp();
            }
        }
        self.last = now;
        self.credit_ns = self.credit_ns.min(self.most_ns());
    }

    /// Most credit that is kept.
    fn most_ns(&self) -> f64 {
        let earned = self.earning_rate() * CONTROL_PERIOD.as_nanos() as f64;
        earned.max(self.enough_ns()).max(FIRST_CREDIT_NS)
    }

    /// The credit that a window needs which is worth placing the probes.
    fn enough_ns(&self) -> f64 {
        let rate = (self.spending_rate - self.earning_rate()).max(0.0);
        (rate * self.window_ns()).max(LEAST_CREDIT_NS)
    }

    /// How long a window is to be.
    fn window_ns(&self) -> f64 {
        let open_share = if self.spending_rate > 0.0 {
            (self.earning_rate() / self.spending_rate).min(1.0)
        } else {
            1.0
        };
        let shortest = SHORTEST_NS.max(WINDOW_TO_PLACING * self.placing_ns);
        (open_share * CYCLE_NS).clamp(shortest, LONGEST_NS.max(shortest))
    }

    fn earning_rate(&self) -> f64 {
        EARNED * self.share * self.own_rate.max(LEAST_USE)
    }
}

#[cfg(test)]
#[path = "budget_tests.rs"]
mod tests;
