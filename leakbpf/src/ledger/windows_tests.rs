use super::*;
use crate::profile::estimate::Interval;

const MS: u64 = 1_000_000;

fn window(opened_ms: u64, length_ms: u64) -> Window {
    Window {
        since_ns: opened_ms.saturating_sub(900) * MS,
        opened_ns: opened_ms * MS,
        closed_ns: (opened_ms + length_ms) * MS,
    }
}

fn survived(bytes: u64, count: u64) -> Seen {
    let counters = Counters {
        live_bytes: bytes,
        live_count: count,
        allocated_bytes: bytes * 4,
        allocated_count: count * 4,
        ..Counters::default()
    };
    Seen { counters, ..Seen::default() }
}

#[test]
fn what_survives_is_scaled_from_the_first_halves_to_the_session() {
    let mut windows = Windows::default();
    windows.add(window(0, 100), [("leak", survived(500, 5))]);
    windows.add(window(1000, 100), [("leak", survived(500, 5))]);
    let estimates: Vec<_> = windows.estimates(10_000 * MS).collect();
    let [(_, leak)] = estimates.as_slice() else { panic!("{estimates:?}") };
    // 1,000 bytes in 100 ms of 10 s.
    assert_eq!((leak.live_bytes, leak.live_count), (100_000, 1000));
    // 4,000 bytes in 200 ms of 10 s.
    assert_eq!((leak.allocated_bytes, leak.allocated_count), (200_000, 2000));
    assert_eq!(leak.freed_bytes, 100_000);
    assert_eq!(leak.spread.bytes_variance, 0.0, "all windows are the same");
}

#[test]
fn windows_of_different_lengths_with_the_same_rate_do_not_differ() {
    let mut windows = Windows::default();
    for length in [20, 100, 40] {
        windows.add(window(0, length), [((), survived(length * 10, length))]);
    }
    let (_, site) = windows.estimates(16_000 * MS).next().expect("one");
    assert_eq!(site.live_bytes, 320_000);
    assert!(site.spread.bytes_variance < 1.0, "{:?}", site.spread);
}

#[test]
fn one_window_has_no_interval() {
    let mut windows = Windows::default();
    windows.add(window(0, 20), [((), survived(100, 1))]);
    let (_, site) = windows.estimates(1000 * MS).next().expect("one");
    assert_eq!(Interval::of_windows(&site, windows.facts(1000 * MS).count), None);
}

#[test]
fn a_session_that_was_one_window_is_not_scaled_beyond_itself() {
    let mut windows = Windows::default();
    windows.add(window(0, 1000), [((), survived(700, 7))]);
    let (_, site) = windows.estimates(1000 * MS).next().expect("one");
    assert_eq!((site.live_bytes, site.allocated_bytes), (1400, 2800));
}

/// Windows of a program whose rate changes from window to window; the interval for the rate over
/// all time has to hold the truth as often as it says.
#[test]
fn an_interval_of_windows_holds_the_truth_as_often_as_it_says() {
    let mut state = 7u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as f64 / f64::from(1u32 << 31)
    };
    const SESSION_MS: u64 = 100_000;
    for count in [5, 20, 60] {
        let mut held = 0;
        const RUNS: u32 = 2000;
        for _ in 0..RUNS {
            let mut windows = Windows::default();
            for _ in 0..count {
                let length = 20 + (random() * 80.0) as u64;
                // The sum of several evenly distributed numbers: a mean of 1.
                let load: f64 = (0..6).map(|_| random()).sum::<f64>() / 3.0;
                let bytes = (length as f64 / 2.0 * 1000.0 * load) as u64;
                windows.add(window(0, length), [((), survived(bytes, bytes / 100))]);
            }
            let (_, site) = windows.estimates(SESSION_MS * MS).next().expect("one");
            let interval = Interval::of_windows(&site, count).expect("several");
            let truth = 1000 * SESSION_MS;
            held += u32::from((interval.bytes.0..=interval.bytes.1).contains(&truth));
        }
        let share = f64::from(held) / f64::from(RUNS);
        assert!((0.92..=0.975).contains(&share), "{count} windows: {share}");
    }
}

#[test]
fn what_is_seen_to_go_later_is_not_there_at_the_end() {
    let mut windows = Windows::default();
    let sites = |kept: u64| {
        let leak = Seen { kept_count: kept, ..survived(1000, 10) };
        // A hundredth of it goes in each window, which is a tenth of the time: a tenth in all.
        let slow = Seen { gone_count: kept / 100, ..leak };
        // All of it has gone before the next window; a tenth is seen in it.
        let fast = Seen { gone_count: kept / 10, ..leak };
        [("leak", leak), ("slow", slow), ("fast", fast)]
    };
    for turn in 0..10u64 {
        windows.add(window(900 + turn * 1000, 100), sites(turn * 1000));
    }
    let estimates: HashMap<_, _> = windows.estimates(10_000 * MS).collect();
    // 10,000 bytes in 500 ms of 10 s.
    assert_eq!(estimates["leak"].live_bytes, 200_000);
    let slow = estimates["slow"].live_bytes as f64 / 200_000.0;
    // 1 + 0.9 + 0.9² + …, of ten.
    assert!((slow - 0.651).abs() < 0.002, "{slow}");
    assert_eq!(estimates["fast"].live_bytes, 20_000, "the youngest tenth");
    let facts = windows.facts(10_000 * MS);
    let sum: u64 = estimates.values().map(|it| it.live_bytes).sum();
    assert!(sum > 350_000 && facts.bytes_variance > 0.0);
}

/// Programs that keep some blocks for a while and others for good, in a random world: at the end, the
/// interval has to hold what is really there.
#[test]
fn an_interval_holds_what_is_there_at_the_end() {
    let mut state = 99u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as f64 + 0.5) / f64::from(1u32 << 31)
    };
    const RUNS: u32 = 200;
    const END_MS: f64 = 60_000.0;
    for mean_life_ms in [20_000.0, f64::INFINITY] {
        let mut held = 0;
        for _ in 0..RUNS {
            let opened: Vec<f64> = (0..12).map(|n| 4000.0 + 5000.0 * f64::from(n)).collect();
            let length = 200.0;
            let mut windows = Windows::default();
            let mut seen = vec![Seen::default(); opened.len()];
            let mut there = 0u64;
            // A block every 5 ms or so.
            let mut now = 0.0;
            while now < END_MS {
                now += -random().ln() * 5.0;
                let gone = now - random().ln() * mean_life_ms;
                there += u64::from(gone > END_MS && now < END_MS);
                let made = opened.iter().position(|at| now >= *at && now < at + length / 2.0);
                let Some(made) = made.filter(|made| gone > opened[*made] + length) else {
                    continue;
                };
                seen[made].counters.live_count += 1;
                seen[made].counters.live_bytes += 100;
                for later in made + 1..opened.len() {
                    let (from, to) = (opened[later], opened[later] + length);
                    // One that went between windows is taken for one that is there, and its address
                    // is not handed out again.
                    seen[later].kept_count += u64::from(gone > from);
                    seen[later].gone_count += u64::from(gone > from && gone <= to);
                }
            }
            for (at, seen) in opened.iter().zip(&seen) {
                let ns = |ms: f64| (ms * MS as f64) as u64;
                let window = Window {
                    since_ns: ns(at - 5000.0 + length),
                    opened_ns: ns(*at),
                    closed_ns: ns(at + length),
                };
                windows.add(window, [((), *seen)]);
            }
            let (_, site) = windows.estimates((END_MS * MS as f64) as u64).next().expect("one");
            let interval = Interval::of_windows(&site, windows.count()).expect("several");
            held += u32::from((interval.count.0..=interval.count.1).contains(&there));
        }
        let share = f64::from(held) / f64::from(RUNS);
        assert!(share >= 0.92, "{mean_life_ms}: {share}");
    }
}

/// A long first window whose blocks were sampled, then short ones that add nothing to it.
#[test]
fn what_samples_do_not_know_is_in_the_interval() {
    let site = |variance: f64| {
        let mut windows = Windows::default();
        let mut first = survived(50_000, 500);
        first.counters.spread.bytes_variance = variance;
        windows.add(window(0, 60_000), [((), first)]);
        for number in 0..3 {
            windows.add(window(61_000 + 1000 * number, 100), [((), survived(83, 1))]);
        }
        let (_, site) = windows.estimates(65_000 * MS).next().expect("one");
        (site, windows.facts(65_000 * MS))
    };
    let (known, _) = site(0.0);
    let (sampled, facts) = site(50_000.0 * 50_000.0);
    assert!(known.spread.bytes_variance.sqrt() < 0.1 * known.live_bytes as f64);
    // The one block that was chosen: as large as the estimate, and scaled like it.
    for variance in [sampled.spread.bytes_variance, facts.bytes_variance] {
        let deviation = variance.sqrt() / sampled.live_bytes as f64;
        assert!((0.95..1.1).contains(&deviation), "{deviation}");
    }
}
