use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rusqlite::Connection;

use super::*;
use crate::profile::{Block, BlockFilter, Frame, Profile, samples};
use crate::report::{self, Format, ReportOptions};

fn facts(profile: &Profile) -> SessionFacts {
    SessionFacts {
        started_unix_ns: profile.started_unix_ns,
        kernel: profile.kernel.clone(),
        hostname: profile.hostname.clone(),
    }
}

fn recorded(path: &Path, profile: &Profile) {
    let writer = Writer::create(path, &facts(profile)).unwrap();
    writer.finish(profile, profile.blocks.iter().copied()).unwrap();
}

fn loaded(path: &Path) -> Result<Profile, ReadError> {
    Reader::open(path)?.profile(LoadOptions { with_blocks: true, ..LoadOptions::default() })
}

fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// What follows must be an error that names the file, and no panic, whatever the file holds.
fn read_everything(path: &Path) {
    match loaded(path) {
        Ok(profile) => {
            let options = ReportOptions { with_blocks: true, ..ReportOptions::default() };
            for format in Format::ALL {
                report::write(format, &profile, &options, &mut std::io::sink()).unwrap();
            }
        }
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains(path.to_str().unwrap()), "{message}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_profile_comes_back_as_it_was(profile in samples::any_profile()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.leakbpf");
        recorded(&path, &profile);
        prop_assert_eq!(loaded(&path).unwrap(), profile);
        prop_assert_eq!(names_in(directory.path()), ["x.leakbpf"]);
    }

    #[test]
    fn intervals_before_do_not_change_the_end(
        before in samples::any_profile(),
        profile in samples::any_profile(),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.leakbpf");
        // Earlier snapshots hold a part of what the last one holds, with other numbers.
        let mut early = profile.clone();
        early.finished = false;
        early.sites.truncate(before.sites.len());
        for (site, other) in early.sites.iter_mut().zip(&before.sites) {
            site.counters = other.counters;
            site.oldest_age_ns = other.oldest_age_ns;
        }
        early.losses = before.losses;
        early.events.truncate(1);
        let mut writer = Writer::create(&path, &facts(&profile)).unwrap();
        writer.snapshot(&early).unwrap();
        writer.snapshot(&early).unwrap();
        writer.finish(&profile, profile.blocks.iter().copied()).unwrap();
        prop_assert_eq!(loaded(&path).unwrap(), profile);
    }

    #[test]
    fn restricting_at_load_equals_restricting_the_profile(
        mut profile in samples::any_profile(),
        min_age_ns in 0..1_u64 << 50,
        min_size_bytes in 0..1_u64 << 40,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.leakbpf");
        recorded(&path, &profile);
        let filter = BlockFilter { min_age_ns, min_size_bytes };
        let options = LoadOptions { with_blocks: false, filter };
        let restricted = Reader::open(&path).unwrap().profile(options).unwrap();
        let blocks = std::mem::take(&mut profile.blocks);
        profile.restrict(filter, blocks);
        prop_assert_eq!(restricted, profile);
    }

    #[test]
    fn a_flipped_byte_is_an_error_or_another_profile(at in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.leakbpf");
        recorded(&path, &samples::server());
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        fs::write(&path, bytes).unwrap();
        read_everything(&path);
    }
}

#[test]
fn a_mode_that_estimates_needs_to_say_of_how_many() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.leakbpf");
    let wrong = |profile: &Profile, key: &str, values: &[&str]| {
        let statements = values
            .iter()
            .map(|value| format!("UPDATE meta SET value = '{value}' WHERE key = '{key}'"))
            .chain([format!("DELETE FROM meta WHERE key = '{key}'")]);
        for sql in statements {
            let _ = fs::remove_file(&path);
            recorded(&path, profile);
            assert_eq!(loaded(&path).unwrap(), *profile);
            assert_eq!(Connection::open(&path).unwrap().execute(&sql, []).unwrap(), 1);
            assert!(matches!(loaded(&path), Err(ReadError::Damaged { .. })), "{sql}");
        }
    };
    wrong(&samples::pages(), "one_in", &["0", "many"]);
    wrong(&samples::sampled(), "sample_interval_bytes", &["0", "many"]);
    wrong(&samples::sampled(), "sampled_since_ns", &["-1", "long"]);
}

#[test]
fn windows_and_costs_come_back_as_they_were_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.leakbpf");
    for profile in [samples::auto(), samples::windows()] {
        let _ = fs::remove_file(&path);
        recorded(&path, &profile);
        assert_eq!(loaded(&path).unwrap(), profile);
    }
    let change = |sql: &str| Connection::open(&path).unwrap().execute(sql, []).unwrap();
    for sql in [
        "UPDATE meta SET value = 'NaN' WHERE key = 'survived_bytes_variance'",
        "UPDATE meta SET value = '-1' WHERE key = 'survived_bytes_variance'",
        "UPDATE meta SET value = 'inf' WHERE key = 'survived_bytes_variance'",
        "UPDATE meta SET value = '-1' WHERE key = 'windows'",
        "UPDATE meta SET value = 'much' WHERE key = 'spent_ns'",
    ] {
        assert_eq!(change(sql), 1);
        assert!(matches!(loaded(&path), Err(ReadError::Damaged { .. })), "{sql}");
        fs::remove_file(&path).unwrap();
        recorded(&path, &samples::windows());
    }
}

/// `auto` shows blocks until they cost too much, then pages.
#[test]
fn the_mode_is_that_of_the_last_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.leakbpf");
    let mut writer = Writer::create(&path, &facts(&samples::server())).unwrap();
    writer.snapshot(&samples::server()).unwrap();
    writer.finish(&samples::auto(), Vec::new()).unwrap();
    assert_eq!(loaded(&path).unwrap().mode, samples::auto().mode);
}

#[test]
fn a_recording_cut_anywhere_is_an_error_that_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.leakbpf");
    recorded(&path, &samples::server());
    let bytes = fs::read(&path).unwrap();
    for length in (0..bytes.len()).step_by(509).chain([1, 16, 99, 100, bytes.len() - 1]) {
        fs::write(&path, &bytes[..length]).unwrap();
        let error = loaded(&path).expect_err("a part is not the whole").to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn random_bytes_behind_a_good_head_do_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.leakbpf");
    recorded(&path, &samples::server());
    let good = fs::read(&path).unwrap();
    let mut state: u64 = 0x2545_f491_4f6c_dd1d;
    for round in 0..200 {
        let mut bytes = good.clone();
        for _ in 0..1 << (round % 8) {
            // xorshift64*: the same damage in every run.
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let random = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
            let at = 100 + (random as usize >> 8) % (bytes.len() - 100);
            bytes[at] = random as u8;
        }
        fs::write(&path, bytes).unwrap();
        read_everything(&path);
    }
}

#[test]
fn what_is_no_recording_is_called_by_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    assert!(matches!(loaded(&path), Err(ReadError::Open { .. })));
    assert!(matches!(loaded(directory.path()), Err(ReadError::Directory { .. })));
    assert!(matches!(loaded(Path::new("/dev/null")), Err(ReadError::NotAFile { .. })));
    fs::write(&path, "").unwrap();
    assert!(matches!(loaded(&path), Err(ReadError::Empty { .. })));
    fs::write(&path, "{\"schema\": 1}").unwrap();
    assert!(matches!(loaded(&path), Err(ReadError::NotARecording { .. })));
    fs::remove_file(&path).unwrap();
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE meta (key, value)").unwrap();
    assert!(matches!(loaded(&path), Err(ReadError::NotARecording { .. })));
}

#[test]
fn a_recording_of_another_version_names_both_versions() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    recorded(&path, &samples::server());
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 9).unwrap();
    let error = loaded(&path).unwrap_err();
    assert!(matches!(error, ReadError::OtherVersion { found: 9, .. }));
    assert!(error.to_string().contains("format 9, and this leakbpf reads format 3"), "{error}");
}

#[test]
fn a_view_in_the_place_of_a_table_is_never_run() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    recorded(&path, &samples::server());
    Connection::open(&path)
        .unwrap()
        .execute_batch(
            "DROP TABLE block;
             CREATE VIEW block AS WITH RECURSIVE forever(n) AS
               (SELECT 1 UNION ALL SELECT n FROM forever) SELECT n, n, n, n FROM forever;",
        )
        .unwrap();
    let error = loaded(&path).unwrap_err();
    assert!(matches!(error, ReadError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("table block is not as it was made"), "{error}");
}

#[test]
fn numbers_that_lead_nowhere_are_damage() {
    for damage in [
        "UPDATE site SET process_id = 99",
        "UPDATE site SET stack_id = -1",
        "UPDATE site SET kind = 'shelf'",
        "UPDATE stack SET outcome = ''",
        "UPDATE stack_frame SET frame_id = 0",
        "UPDATE frame SET module_id = 9223372036854775807",
        "UPDATE frame SET symbol_list_id = 77 WHERE symbol_list_id IS NOT NULL",
        "UPDATE site_counters SET live_bytes = -1",
        "UPDATE site_counters SET live_bytes = 'many'",
        "UPDATE block SET site_id = 1000",
        "UPDATE block SET size_bytes = 1.5",
        "DELETE FROM frame WHERE id = 2",
        "DELETE FROM symbol WHERE position = 0",
        "DELETE FROM site_counters",
        "UPDATE process SET pid = -5",
        "UPDATE process SET comm = x'ff' WHERE id = 1",
        "DELETE FROM meta",
        "UPDATE meta SET value = 'guess' WHERE key = 'mode'",
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        recorded(&path, &samples::server());
        let database = Connection::open(&path).unwrap();
        database.pragma_update(None, "foreign_keys", false).unwrap();
        database.execute_batch(damage).unwrap();
        drop(database);
        let result = loaded(&path);
        assert!(matches!(result, Err(ReadError::Damaged { .. })), "{damage}: {result:?}");
    }
}

#[test]
fn a_writer_dropped_half_way_leaves_its_snapshots_under_another_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.leakbpf");
    let mut profile = samples::server();
    profile.finished = false;
    profile.blocks.clear();
    let mut writer = Writer::create(&path, &facts(&profile)).unwrap();
    writer.snapshot(&profile).unwrap();
    let partial = writer.partial_path().to_owned();
    drop(writer);
    assert!(!path.exists());
    let reader = Reader::open(&partial).unwrap();
    assert_eq!(reader.profile(LoadOptions::default()).unwrap(), profile);
    let filter = BlockFilter { min_age_ns: 1, min_size_bytes: 0 };
    let error = reader.profile(LoadOptions { with_blocks: false, filter }).unwrap_err();
    assert!(matches!(error, ReadError::NoBlocks { .. }), "{error}");
}

#[test]
fn a_session_can_be_read_while_it_runs_and_after_it_was_killed_in_the_middle_of_a_write() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.leakbpf");
    let killed = directory.path().join("killed");
    let mut profile = samples::server();
    let blocks = std::mem::take(&mut profile.blocks);
    profile.finished = false;
    let mut writer = Writer::create(&path, &facts(&profile)).unwrap();
    writer.snapshot(&profile).unwrap();
    let partial = writer.partial_path().to_owned();
    let during = blocks.iter().copied().cycle().take(200_000).enumerate().map(|(index, block)| {
        if index == 199_999 {
            assert_eq!(
                Reader::open(&partial).unwrap().profile(LoadOptions::default()).unwrap(),
                profile
            );
            // What a kill leaves is what is in the files at that moment.
            fs::create_dir(&killed).unwrap();
            for name in names_in(directory.path()) {
                let from = directory.path().join(&name);
                if from.is_file() {
                    fs::copy(&from, killed.join(&name)).unwrap();
                }
            }
        }
        block
    });
    let mut end = profile.clone();
    end.finished = true;
    writer.finish(&end, during).unwrap();
    assert_eq!(Reader::open(&path).unwrap().profile(LoadOptions::default()).unwrap(), end);

    let log = killed.join("x.leakbpf.partial-wal");
    assert!(fs::metadata(&log).unwrap().len() > 1 << 20, "the kill was to hit a write");
    let left = killed.join("x.leakbpf.partial");
    assert_eq!(Reader::open(&left).unwrap().profile(LoadOptions::default()).unwrap(), profile);
    for companion in names_in(&killed).iter().filter(|name| !name.ends_with(".partial")) {
        fs::remove_file(killed.join(companion)).unwrap();
    }
    assert_eq!(Reader::open(&left).unwrap().profile(LoadOptions::default()).unwrap(), profile);
}

#[test]
fn what_an_earlier_session_left_is_not_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    let profile = samples::server();
    // As after kill -9.
    std::mem::forget(Writer::create(&path, &facts(&profile)).unwrap());
    recorded(&path, &profile);
    let left = names_in(directory.path());
    assert!(left.contains(&"x".to_owned()) && left.contains(&"x.partial".to_owned()), "{left:?}");
    assert!(matches!(
        Reader::open(&directory.path().join("x.partial")).unwrap().profile(LoadOptions::default()),
        Err(ReadError::NoSnapshot { .. })
    ));
    assert_eq!(loaded(&path).unwrap(), profile);
}

#[test]
fn a_place_that_cannot_be_written_to_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let facts = facts(&samples::empty());
    let result = Writer::create(directory.path(), &facts);
    assert!(matches!(result, Err(WriteError::Directory { .. })));
    let path = directory.path().join("no/such/x");
    let Err(error) = Writer::create(&path, &facts) else { panic!("there is no such directory") };
    assert!(error.to_string().contains("no/such/x"), "{error}");
    assert!(matches!(Writer::create(Path::new("/proc/x"), &facts), Err(WriteError::Create { .. })));
}

#[test]
fn sites_that_a_later_snapshot_lists_no_more_are_gone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    let profile = samples::server();
    let mut writer = Writer::create(&path, &facts(&profile)).unwrap();
    writer.snapshot(&profile).unwrap();
    let mut end = profile.clone();
    end.sites.remove(0);
    end.blocks.clear();
    writer.finish(&end, std::iter::empty()).unwrap();
    assert_eq!(loaded(&path).unwrap().sites, end.sites);
}

#[test]
fn a_frame_that_gets_better_names_stays_the_frame_of_its_sites() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    let end = samples::server();
    let mut before = end.clone();
    for site in &mut before.sites {
        let nameless = |frame: &Frame| Frame { symbols: [].into(), ..frame.clone() };
        site.frames = site.frames.iter().map(nameless).collect();
    }
    let mut writer = Writer::create(&path, &facts(&end)).unwrap();
    writer.snapshot(&before).unwrap();
    writer.finish(&end, end.blocks.iter().copied()).unwrap();
    assert_eq!(loaded(&path).unwrap(), end);
    let database = Connection::open(&path).unwrap();
    let sites: i64 = database.query_row("SELECT count(*) FROM site", [], |row| row.get(0)).unwrap();
    assert_eq!(sites, end.sites.len() as i64);
}

#[test]
fn equal_sites_are_counted_together() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    let mut profile = samples::server();
    profile.sites.push(profile.sites[1].clone());
    recorded(&path, &profile);
    let back = loaded(&path).unwrap();
    assert_eq!(back.sites.len(), profile.sites.len() - 1);
    assert_eq!(back.totals(), profile.totals());
}

#[test]
fn blocks_are_taken_one_by_one() {
    struct Counted<'a>(&'a std::cell::Cell<u64>, u64);
    impl Iterator for Counted<'_> {
        type Item = Block;
        fn next(&mut self) -> Option<Block> {
            self.0.set(self.0.get() + 1);
            self.1 = self.1.checked_sub(1)?;
            Some(Block { address: self.1, ..samples::server().blocks[0] })
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("x");
    let profile = samples::server();
    let calls = std::cell::Cell::new(0);
    let writer = Writer::create(&path, &facts(&profile)).unwrap();
    writer.finish(&profile, Counted(&calls, 1000)).unwrap();
    assert_eq!(calls.get(), 1001);
    assert_eq!(loaded(&path).unwrap().blocks.len(), 1000);
}

/// The comments of the schema are the manual of those who query with `sqlite3`.
#[test]
fn the_schema_in_the_file_explains_itself() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    recorded(&path, &samples::server());
    let database = Connection::open(&path).unwrap();
    let sql: String = database
        .query_row("SELECT sql FROM sqlite_schema WHERE name = 'site_counters'", [], |row| {
            row.get(0)
        })
        .unwrap();
    assert!(sql.contains("-- Only what changed since the snapshot before"), "{sql}");
    let found: i64 = database
        .query_row(
            "SELECT count(*) FROM block JOIN site ON site.id = block.site_id
             JOIN process ON process.id = site.process_id WHERE pid = 4400",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(found, 5);
}

/// Pages 4096 bytes long, whose 600 cells are all the same one: a child page.
fn interior_page(child: u32) -> Vec<u8> {
    const CELLS: u16 = 600;
    const CELL_AT: u16 = 4096 - 8;
    // "B-tree Pages" in SQLite's description of its file format.
    let mut page = vec![0x05, 0, 0];
    page.extend(CELLS.to_be_bytes());
    page.extend(CELL_AT.to_be_bytes());
    page.push(0);
    page.extend(child.to_be_bytes());
    page.extend((0..CELLS).flat_map(|_| CELL_AT.to_be_bytes()));
    page.resize(usize::from(CELL_AT), 0);
    page.extend(child.to_be_bytes());
    page.extend([0x01, 0, 0, 0]);
    page
}

#[test]
fn a_small_file_that_claims_billions_of_blocks_is_not_counted_to_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    recorded(&path, &samples::server());
    let root: u32 = Connection::open(&path)
        .unwrap()
        .query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'block'", [], |row| row.get(0))
        .unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let last = (bytes.len() / 4096) as u32;
    let root_at = (root as usize - 1) * 4096;
    let leaf = bytes[root_at..root_at + 4096].to_vec();
    bytes[root_at..root_at + 4096].copy_from_slice(&interior_page(last + 1));
    bytes.extend(interior_page(last + 2));
    bytes.extend(interior_page(last + 3));
    bytes.extend(leaf);
    bytes[28..32].copy_from_slice(&(last + 3).to_be_bytes());
    fs::write(&path, bytes).unwrap();
    let error = loaded(&path).unwrap_err();
    assert!(error.to_string().contains("table block: more rows than fit the file"), "{error}");
}

#[test]
fn a_device_is_not_replaced_by_a_recording() {
    let profile = samples::server();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("null");
    std::os::unix::fs::symlink("/dev/null", &path).unwrap();
    let Err(error) = Writer::create(&path, &facts(&profile)) else {
        panic!("made");
    };
    assert!(error.to_string().contains("not a regular file"), "{error}");
    assert_eq!(names_in(directory.path()), ["null"]);
}

#[test]
fn a_session_that_never_began_leaves_no_file() {
    let profile = samples::server();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    drop(Writer::create(&path, &facts(&profile)).unwrap());
    assert!(names_in(directory.path()).is_empty());
    let mut writer = Writer::create(&path, &facts(&profile)).unwrap();
    writer.snapshot(&profile).unwrap();
    drop(writer);
    assert_eq!(names_in(directory.path()), ["x.partial"]);
}

/// Small files whose reports would fill any disk: one long or often repeated thing that each of many
/// rows refers to.
#[test]
fn rows_that_share_what_is_long_are_refused_before_a_report_unfolds_them() {
    let numbers = |count: u32| {
        format!("WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {count})")
    };
    let emptied = "BEGIN; DELETE FROM process; DELETE FROM module; DELETE FROM site;";
    let long = "hex(zeroblob(500000))";
    let frames = "INSERT INTO frame VALUES (1, 1, 1, 1, NULL);
        INSERT INTO stack VALUES (1, 'complete');";
    let process = "INSERT INTO process VALUES (1, 1, NULL, 1, 'x', '', '', '', NULL);";
    let module = "INSERT INTO module VALUES (1, 'm', NULL, NULL, NULL, NULL);";
    let site = "INSERT INTO site VALUES (1, 1, 1, 'heap');";
    let cases = [
        (
            "the name of a module",
            format!(
                "INSERT INTO module VALUES (1, {long}, NULL, NULL, NULL, NULL); {process} {frames}
                {} INSERT INTO stack_frame SELECT 1, i, 1 FROM n; {site}",
                numbers(10_000)
            ),
        ),
        (
            "inlined functions without a name",
            format!(
                "{module} {process} {frames} UPDATE frame SET symbol_list_id = 1;
                {} INSERT INTO symbol SELECT 1, i, '', NULL, NULL, 1 FROM n;
                {} INSERT INTO stack_frame SELECT 1, i, 1 FROM n; {site}",
                numbers(10_000),
                numbers(15_000)
            ),
        ),
        (
            "the name of a process",
            format!(
                "{module} INSERT INTO process VALUES (1, 1, NULL, 1, {long}, '', '', '', NULL);
                {frames} {} INSERT INTO site SELECT i + 1, 1, 1, 'heap' FROM n;",
                numbers(10_000)
            ),
        ),
    ];
    for (what, sql) in cases {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.leakbpf");
        recorded(&path, &samples::empty());
        Connection::open(&path)
            .unwrap()
            .execute_batch(&format!("{emptied} {sql} COMMIT;"))
            .unwrap();
        assert!(fs::metadata(&path).unwrap().len() < 4 << 20, "{what}");
        let error = loaded(&path).expect_err(what).to_string();
        assert!(error.contains("unfold without end"), "{what}: {error}");
    }
}
