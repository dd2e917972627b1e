use super::*;

const MS: u64 = 1_000_000;

/// Processes that run on some processors and whose probes cost something while they are in place.
struct Simulation {
    budget: Budget,
    now: Reading,
    /// When the steps came.
    steps: Vec<(u64, Step)>,
    open_ns: u64,
    placing: Duration,
    /// What sampling makes of the cost, where it can be had; and what is left of the cost now.
    sampling: Option<f64>,
    price: f64,
    /// What looking at page faults costs, as a multiple of the processes' own time.
    faults: f64,
}

/// How processes behave for a time.
#[derive(Clone, Copy)]
struct Load {
    ms: u64,
    /// Processors that they use.
    processors: f64,
    /// What probes cost, as a multiple of the processes' own time.
    price: f64,
}

impl Simulation {
    fn new(share: f64) -> Self {
        let now = Reading::default();
        let budget = Budget::new(share, None, now);
        Self {
            budget,
            now,
            steps: Vec::new(),
            open_ns: 0,
            placing: Duration::ZERO,
            sampling: None,
            price: 1.0,
            faults: 0.0,
        }
    }

    fn run(&mut self, load: Load) {
        let end = self.now.at_ns + load.ms * MS;
        while self.now.at_ns < end {
            let tick = self.budget.look_again_after(self.now).as_nanos() as u64;
            let busy = tick as f64 * load.processors;
            let price = load.price * self.price;
            // The processes' time is as long with probes; they only get less done in it.
            let of_probes = if self.budget.is_open() { price } else { 0.0 };
            let each = busy / (1.0 + of_probes + self.faults);
            let (spent, on_faults) = ((of_probes + self.faults) * each, self.faults * each);
            if self.budget.is_open() {
                self.open_ns += tick;
            }
            self.now.at_ns += tick;
            self.now.target_cpu_ns += busy as u64;
            self.now.spent_ns += spent as u64;
            self.now.spent_on_faults_ns += on_faults as u64;
            let step = self.budget.decide(self.now, || self.sampling);
            match step {
                Step::Stay => continue,
                Step::Open => {
                    self.price = 1.0;
                    self.budget.opened(self.now, self.placing);
                }
                Step::Sample => {
                    self.price = self.sampling.expect("it was offered");
                    self.budget.begin_sampling(self.now);
                }
                Step::Close => self.budget.closed(self.now),
                Step::StopPages => {
                    self.faults = 0.0;
                    self.budget.stopped_pages();
                }
            }
            self.steps.push((self.now.at_ns, step));
        }
    }

    fn share(&self) -> f64 {
        let own = self.now.target_cpu_ns - self.now.spent_ns;
        self.now.spent_ns as f64 / own as f64
    }
}

#[test]
fn probes_that_cost_less_than_the_share_stay() {
    let mut simulation = Simulation::new(0.01);
    simulation.run(Load { ms: 60_000, processors: 1.0, price: 0.008 });
    assert_eq!(simulation.steps, []);
    assert!(simulation.share() < 0.0085);
}

#[test]
fn nothing_costs_an_idle_process_anything() {
    let mut simulation = Simulation::new(0.01);
    simulation.run(Load { ms: 600_000, processors: 0.0, price: 5.0 });
    assert_eq!((simulation.now.spent_ns, simulation.steps.len()), (0, 0));
}

#[test]
fn a_process_that_hardly_works_may_cost_a_thousandth_of_a_processor() {
    let mut simulation = Simulation::new(0.01);
    simulation.run(Load { ms: 60_000, processors: 0.002, price: 0.8 });
    assert_eq!(simulation.steps, []);
    let mut simulation = Simulation::new(0.01);
    simulation.run(Load { ms: 60_000, processors: 0.02, price: 0.8 });
    let share = simulation.now.spent_ns as f64 / simulation.now.at_ns as f64;
    assert!(simulation.steps.len() > 1 && share < 0.0011, "{share}");
}

#[test]
fn a_server_whose_probes_cost_five_times_its_time_is_seen_through_windows() {
    let mut simulation = Simulation::new(0.01);
    simulation.run(Load { ms: 60_000, processors: 1.0, price: 5.0 });
    assert!(simulation.share() <= 0.0105, "{}", simulation.share());
    assert!(simulation.share() >= 0.006, "credit is used: {}", simulation.share());
    let windows = simulation.steps.iter().filter(|(_, step)| *step == Step::Close).count();
    assert!((6..60).contains(&windows), "{windows} windows");
    assert!(simulation.open_ns / windows as u64 >= 60 * MS, "long enough to see something");
}

#[test]
fn a_storm_is_answered_at_once() {
    let mut simulation = Simulation::new(0.01);
    simulation.run(Load { ms: 1000, processors: 64.0, price: 100.0 });
    let &(at_ns, step) = simulation.steps.first().expect("a step");
    assert_eq!(step, Step::Close);
    assert!(at_ns <= 20 * MS, "{at_ns}");
    // And after a calm, in which credit has been saved.
    let mut simulation = Simulation::new(0.01);
    simulation.run(Load { ms: 100_000, processors: 1.0, price: 0.001 });
    assert_eq!(simulation.steps, []);
    let began = simulation.now.at_ns;
    simulation.run(Load { ms: 2000, processors: 2.0, price: 100.0 });
    let &(at_ns, step) = simulation.steps.first().expect("a step");
    assert_eq!(step, Step::Close);
    assert!(at_ns - began <= 150 * MS, "{}", at_ns - began);
}

/// Loads that change every minute for an hour.
#[test]
fn the_share_holds_whatever_the_load_does() {
    let mut state = 11u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as f64 / f64::from(1u32 << 31)
    };
    for share in [0.005, 0.01, 0.05] {
        let mut simulation = Simulation::new(share);
        simulation.sampling = Some(0.65);
        for _ in 0..60 {
            let before = simulation.now;
            let processors = [0.01, 0.3, 1.0, 2.0, 16.0][(random() * 5.0) as usize];
            let price = [0.0, 0.005, 0.05, 0.5, 5.0][(random() * 5.0) as usize];
            simulation.run(Load { ms: 60_000, processors, price });
            assert!(
                simulation.share() < share + 0.005,
                "{} of {share} after {processors} processors, {price}",
                simulation.share()
            );
            // What was saved in a calm minute may be spent in the next one, but no more.
            let spent = (simulation.now.spent_ns - before.spent_ns) as f64;
            let own = (simulation.now.target_cpu_ns - before.target_cpu_ns) as f64 - spent;
            let saved = share * 16.0 * CONTROL_PERIOD.as_nanos() as f64;
            let own = own.max(LEAST_USE * 60e9);
            assert!(spent <= (share + 0.005) * own + saved, "{spent} of {own}");
        }
    }
}

#[test]
fn probes_come_back_to_stay_when_the_load_allows_it() {
    let mut simulation = Simulation::new(0.01);
    simulation.run(Load { ms: 60_000, processors: 1.0, price: 5.0 });
    simulation.run(Load { ms: 120_000, processors: 1.0, price: 0.002 });
    assert!(simulation.budget.is_open());
    let &(at_ns, _) = simulation.steps.last().expect("a step");
    assert!(at_ns < 80_000 * MS, "{at_ns}");
}

#[test]
fn a_window_has_an_end_where_one_is_asked_for() {
    let longest = Duration::from_millis(500);
    let mut simulation = Simulation::new(0.5);
    simulation.budget = Budget::new(0.5, Some(longest), Reading::default());
    simulation.run(Load { ms: 10_000, processors: 1.0, price: 0.01 });
    let closes = simulation.steps.iter().filter(|(_, step)| *step == Step::Close).count();
    assert!((14..=20).contains(&closes), "{closes}");
}

#[test]
fn slow_placing_makes_for_longer_windows() {
    let run = |placing_ms| {
        let mut simulation = Simulation::new(0.01);
        simulation.placing = Duration::from_millis(placing_ms);
        simulation.run(Load { ms: 300_000, processors: 1.0, price: 1.0 });
        let windows = simulation.steps.iter().filter(|(_, step)| *step == Step::Close).count();
        simulation.open_ns / windows as u64
    };
    assert!(run(50) > 3 * run(1), "{} {}", run(50), run(1));
}

#[test]
fn blocks_are_sampled_where_that_makes_the_probes_cheap_enough() {
    let mut simulation = Simulation::new(0.01);
    simulation.sampling = Some(0.65);
    simulation.run(Load { ms: 600_000, processors: 1.0, price: 0.012 });
    let steps: Vec<Step> = simulation.steps.iter().map(|(_, step)| *step).collect();
    assert_eq!(steps, [Step::Sample]);
    assert!(simulation.share() < 0.0085, "{}", simulation.share());
    // From then on there is nothing cheaper but windows.
    simulation.run(Load { ms: 60_000, processors: 1.0, price: 0.5 });
    assert!(simulation.steps[1..].iter().all(|(_, step)| *step != Step::Sample));
    assert_eq!(simulation.steps[1].1, Step::Close);
    assert!(simulation.share() < 0.015, "{}", simulation.share());
}

#[test]
fn blocks_are_not_sampled_where_that_is_not_enough() {
    for price in [0.03, 0.5, 20.0] {
        let mut simulation = Simulation::new(0.01);
        simulation.sampling = Some(0.65);
        simulation.run(Load { ms: 20_000, processors: 0.5, price: 0.001 });
        simulation.run(Load { ms: 20_000, processors: 0.5, price });
        let first = simulation.steps.first().expect("a step");
        assert_eq!(first.1, Step::Close, "{price}");
    }
}

#[test]
fn the_pauses_of_a_busy_process_earn_nothing() {
    let mut simulation = Simulation::new(0.01);
    for _ in 0..300 {
        simulation.run(Load { ms: 500, processors: 0.3, price: 5.0 });
        simulation.run(Load { ms: 500, processors: 0.0, price: 5.0 });
    }
    assert!(simulation.share() < 0.0097, "{}", simulation.share());
}

#[test]
fn page_faults_that_alone_cost_more_than_the_share_are_looked_at_no_more() {
    let mut simulation = Simulation::new(0.01);
    simulation.faults = 0.15;
    simulation.run(Load { ms: 60_000, processors: 1.0, price: 0.002 });
    // What probes cost is little, and they stay.
    let [(at_ns, Step::StopPages)] = simulation.steps[..] else { panic!("{:?}", simulation.steps) };
    assert!(at_ns < 200 * MS, "{at_ns}");
    assert!(simulation.share() < 0.01, "{}", simulation.share());
}

#[test]
fn page_faults_that_fit_are_looked_at_whatever_the_probes_cost() {
    let mut simulation = Simulation::new(0.01);
    simulation.faults = 0.004;
    simulation.run(Load { ms: 120_000, processors: 1.0, price: 0.4 });
    assert!(simulation.steps.iter().all(|(_, step)| *step != Step::StopPages));
    assert!(simulation.steps.iter().any(|(_, step)| *step == Step::Open));
    assert!(simulation.share() < 0.0105, "{}", simulation.share());
}
