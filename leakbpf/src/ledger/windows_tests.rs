use super::*;
use crate::profile::estimate::Interval;

const MS: u64 = 1_000_000;

fn window(opened_ms: u64, length_ms: u64) -> Window {
    Window { opened_ns: opened_ms * MS, closed_ns: (opened_ms + length_ms) * MS }
}

fn survived(bytes: u64, count: u64) -> Seen {
    Seen {
        survived_bytes: bytes,
        survived_count: count,
        allocated_bytes: bytes * 4,
        allocated_count: count * 4,
    }
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
