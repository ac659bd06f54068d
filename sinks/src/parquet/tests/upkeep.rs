//! Merging and removing, and going back to an older checkpoint.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow::array::new_null_array;
use arrow::datatypes::DataType;
use pipeline::history::files::SWAP_FOLDER;
use pipeline::plugin::Upkept;

use super::*;
use crate::parquet::aside::ASIDE_FOLDER;

const HOUR_US: i64 = 3_600_000_000;

/// Half past an hour, `hours` after noon.
fn at(hours: i64) -> i64 {
    parse_us("2026-11-20T12:30:00Z").expect("a time") + hours * HOUR_US
}

/// Writes rows and publishes them as one file with checkpoint `checkpoint`; every other one is gone.
fn publish(sink: &mut ParquetSink, checkpoint: u64, at_us: i64, rows: impl IntoIterator<Item = i64>) -> Vec<u8> {
    sink.write_at(0, &batch(rows), checkpoint, at_us).expect("written");
    let mut state = StateWriter::default();
    sink.prepare_at(checkpoint, false, at_us, &mut state).expect("prepared");
    sink.commit(checkpoint, checkpoint).expect("committed");
    state.finish()
}

/// A checkpoint without rows, after which all that was published is settled.
fn settle(sink: &mut ParquetSink, checkpoint: u64) -> Vec<u8> {
    let state = prepare(sink, checkpoint, false);
    sink.commit(checkpoint, checkpoint).expect("committed");
    state
}

/// The upkeep, which keeps replaced files for no time.
fn upkeep(sink: &ParquetSink) -> HistoryUpkeep {
    HistoryUpkeep { grace: std::time::Duration::ZERO, ..sink.history_upkeep() }
}

/// Works until there is nothing to do; the sum of what was done.
fn work(upkeep: &HistoryUpkeep, now_us: i64) -> Result<Upkept> {
    let mut sum = Upkept::default();
    loop {
        let done = upkeep.step(now_us)?;
        sum.merged_files += done.merged_files;
        sum.merged_hours += done.merged_hours;
        sum.expired_hours += done.expired_hours;
        sum.files = done.files;
        if !done.more {
            // What was replaced last is removed by the step after.
            upkeep.step(now_us)?;
            return Ok(sum);
        }
    }
}

impl House {
    /// Names of the published files.
    fn names(&self) -> Vec<String> {
        let name = |path: PathBuf| path.file_name().expect("a name").to_str().expect("UTF-8").to_owned();
        self.files("load").into_iter().map(name).collect()
    }

    /// Every file and folder below one that is beside the tables.
    fn beside(&self, folder: &str) -> Vec<PathBuf> {
        let (mut found, mut open) = (Vec::new(), vec![self.root().join(folder)]);
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten() {
                let path = entry.expect("an entry").path();
                found.push(path.clone());
                open.push(path);
            }
        }
        found.sort();
        found
    }

    fn swapped_files(&self) -> Vec<PathBuf> {
        self.beside(SWAP_FOLDER).into_iter().filter(|path| path.is_file()).collect()
    }
}

#[test]
fn the_files_of_closed_hours_are_merged_and_the_rows_stay_as_they_are() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    for checkpoint in 1..=10 {
        // Two rows a file, in another order than their numbers.
        let n = checkpoint as i64;
        publish(&mut sink, checkpoint, at(n / 5), [100 - n, 200 - n]);
    }
    settle(&mut sink, 11);
    let before = house.published("load");
    let history = house.history();
    let sql = "SELECT count(*) AS c, sum(n) AS s, min(dt) AS d, max(hh) AS h FROM load";
    let answer = query(&history, sql);
    let keeper = HistoryUpkeep { grace: std::time::Duration::from_secs(3600), ..sink.history_upkeep() };
    let done = work(&keeper, at(2)).expect("merged");
    assert_eq!(done, Upkept { files: 3, merged_files: 9, merged_hours: 2, ..Upkept::default() });
    // The third hour has not passed.
    let names = ["history-compacted-1-4-0.parquet", "history-compacted-5-9-0.parquet", "history-10-0.parquet"]
        .map(String::from);
    assert_eq!(house.names(), names);
    assert_eq!((house.published("load"), query(&history, sql)), (before, answer));
    let merged = SerializedFileReader::new(fs::File::open(&house.files("load")[1]).expect("a file")).expect("a footer");
    let facts = file::facts_of(merged.metadata()).expect("facts");
    assert_eq!((facts.first_batch, facts.last_batch, facts.event_min_us, facts.event_max_us), (5, 9, 91, 195));
    assert!(merged.metadata().row_group(0).column(0).statistics().is_some(), "event time and the rest prune");
    // Whoever has listed the old files, or just one folder of them, has not lost them yet.
    let kept = house.swapped_files();
    assert_eq!((kept.len(), kept[0].file_name().expect("a name").to_str()), (9, Some("history-1-0.parquet")));
    drop(keeper);
    let keeper = upkeep(&sink);
    assert_eq!(work(&keeper, at(2)).expect("nothing to do"), Upkept { files: 3, ..Upkept::default() });
    // The next hour closes.
    publish(&mut sink, 12, at(2), [1000]);
    publish(&mut sink, 13, at(2), [1001]);
    settle(&mut sink, 14);
    assert_eq!(work(&keeper, at(3)).expect("merged").merged_files, 3);
    assert_eq!(house.names()[2], "history-compacted-10-13-0.parquet");
    // A start removes what is left beside the tables.
    drop(sink);
    let sink = house.start(None);
    assert_eq!((house.swapped_files(), house.names().len()), (vec![], 3));
    assert_eq!(sink.shared.files.load(Relaxed), 3);
}

#[test]
fn replaced_files_go_when_their_time_is_over() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    for checkpoint in 1..=3 {
        publish(&mut sink, checkpoint, at(0), [checkpoint as i64]);
    }
    settle(&mut sink, 4);
    let keeper = upkeep(&sink);
    assert!(keeper.step(at(1)).expect("merged").more);
    assert_eq!(house.swapped_files().len(), 3);
    assert!(!keeper.step(at(1)).expect("done").more);
    assert_eq!((house.swapped_files(), house.published("load")), (vec![], vec![1, 2, 3]));
}

#[test]
fn an_hour_waits_until_no_kept_checkpoint_can_make_its_files_again() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    for checkpoint in 1..=3 {
        publish(&mut sink, checkpoint, at(0), [checkpoint as i64]);
    }
    let keeper = upkeep(&sink);
    let merged = |keeper: &HistoryUpkeep| work(keeper, at(1)).expect("no failure").merged_files;
    let commit = |sink: &mut ParquetSink, checkpoint, oldest_kept| {
        let state = prepare(sink, checkpoint, false);
        sink.commit(checkpoint, oldest_kept).expect("committed");
        state
    };
    // Checkpoint 3 names the last file as one to publish: a start from it would miss it.
    commit(&mut sink, 4, 3);
    assert_eq!(merged(&keeper), 0);
    commit(&mut sink, 5, 3);
    // A file that is named for that hour and not published yet; then a start from before the commit.
    sink.write_at(0, &batch([4]), 6, at(0)).expect("written");
    let mut promised = StateWriter::default();
    sink.prepare_at(6, false, at(0), &mut promised).expect("prepared");
    sink.shared.ledger().forget_before(6);
    assert_eq!(merged(&keeper), 0);
    let promised = promised.finish();
    let sink = house.start(Some((6, &promised)));
    // What older checkpoints name is not known before they are gone.
    for oldest_kept in [0, 4, 5, 6] {
        sink.shared.ledger().forget_before(oldest_kept);
        assert_eq!(merged(&upkeep(&sink)), 0);
    }
    let mut sink = house.start(Some((6, &promised)));
    settle(&mut sink, 7);
    assert_eq!(merged(&upkeep(&sink)), 4);
    assert_eq!(house.published("load"), [1, 2, 3, 4]);
}

#[test]
fn a_merged_hour_that_grows_again_is_merged_again_under_new_names() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    let keeper = upkeep(&sink);
    let mut checkpoint = 0;
    let mut all_names = Vec::new();
    for round in 0..4 {
        // A clock that was set back.
        for _ in 0..3 {
            checkpoint += 1;
            publish(&mut sink, checkpoint, at(0), [checkpoint as i64]);
        }
        checkpoint += 1;
        settle(&mut sink, checkpoint);
        work(&keeper, at(1 + round)).expect("merged");
        all_names.extend(house.names());
    }
    let expected = ["1-3-0", "1-7-1", "1-11-2", "1-15-3"].map(|name| format!("history-compacted-{name}.parquet"));
    assert_eq!(all_names, expected);
    assert_eq!(house.published("load"), (1..=15).filter(|n| n % 4 > 0).collect::<Vec<_>>());
}

#[test]
fn large_hours_become_several_files_and_other_columns_another_one() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    for checkpoint in 1..=4 {
        publish(&mut sink, checkpoint, at(0), [checkpoint as i64]);
    }
    let state = settle(&mut sink, 5);
    house.inputs.clear();
    let schema = schema_of([("n", FieldType::Int), ("added", FieldType::Float)]);
    house.input("load", Arc::clone(&schema));
    let mut sink = house.start(Some((5, &state)));
    for checkpoint in 6..=9 {
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from(vec![checkpoint])),
            Arc::new(arrow::array::Float64Array::from(vec![0.5 * checkpoint as f64])),
        ];
        sink.write_at(0, &batch_of(&schema, columns, &[checkpoint]), 6, at(0)).expect("written");
        sink.prepare_at(checkpoint as u64, false, at(0), &mut StateWriter::default()).expect("prepared");
        sink.commit(checkpoint as u64, 6).expect("committed");
    }
    settle(&mut sink, 10);
    let sql = "SELECT n, added FROM load ORDER BY n";
    let before = query(&house.history(), sql);
    assert_eq!(work(&upkeep(&sink), at(1)).expect("merged").merged_files, 8);
    assert_eq!(house.names(), ["history-compacted-1-4-0.parquet", "history-compacted-6-9-1.parquet"]);
    assert_eq!(query(&house.history(), sql), before);
    for checkpoint in 11..=30 {
        let columns: Vec<ArrayRef> =
            vec![Arc::new(Int64Array::from(vec![checkpoint])), new_null_array(&DataType::Float64, 1)];
        sink.write_at(0, &batch_of(&schema, columns, &[checkpoint]), 6, at(1)).expect("written");
        sink.prepare_at(checkpoint as u64, false, at(1), &mut StateWriter::default()).expect("prepared");
        sink.commit(checkpoint as u64, 11).expect("committed");
    }
    settle(&mut sink, 31);
    let size = fs::metadata(&house.files("load")[2]).expect("a file").len();
    let keeper = HistoryUpkeep { target_bytes: 8 * size, ..upkeep(&sink) };
    let files = work(&keeper, at(2)).expect("merged").files;
    assert!((3..=9).contains(&files), "{files}");
    assert_eq!(house.published("load"), [1, 2, 3, 4, 6, 7, 8, 9].into_iter().chain(11..=30).collect::<Vec<_>>());
}

#[test]
fn hours_with_other_files_or_damaged_ones_are_left_and_the_others_are_merged() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    for checkpoint in 1..=12 {
        publish(&mut sink, checkpoint, at(checkpoint as i64 % 4), [checkpoint as i64]);
    }
    settle(&mut sink, 13);
    let hour = |hours| house.root().join("load").join(hour_folder(at(hours)));
    fs::write(hour(0).join("note.txt"), "not ours").expect("a file");
    let torn = hour(1).join("history-5-0.parquet");
    let whole = fs::read(&torn).expect("a file");
    fs::write(&torn, &whole[..whole.len() - 1]).expect("torn");
    let keeper = upkeep(&sink);
    for _ in 0..2 {
        let mut merged = 0;
        let error = loop {
            match keeper.step(at(4)) {
                Ok(done) => merged += done.merged_hours,
                Err(error) => break error,
            }
        };
        assert!(error.to_string().starts_with(&format!("cannot read {}", torn.display())), "{error}");
        assert_eq!((house.swapped_files(), house.names().len()), (vec![], 3 + 3 + 1 + 1), "after {merged}");
    }
    fs::write(&torn, &whole).expect("mended");
    assert_eq!(work(&keeper, at(4)).expect("merged").merged_hours, 1);
    assert_eq!(house.published("load").len(), 12);
}

#[test]
fn a_full_disk_is_waited_for() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    for checkpoint in 1..=4 {
        publish(&mut sink, checkpoint, at(0), [checkpoint as i64]);
    }
    settle(&mut sink, 5);
    let built = house.root().join(SWAP_FOLDER).join("load").join(hour_folder(at(0)));
    let full = AtomicBool::new(true);
    let keeper = HistoryUpkeep {
        crash_point: Box::new(move || {
            if full.swap(false, SeqCst) {
                std::os::unix::fs::symlink("/dev/full", built.join("part")).expect("a link");
            }
        }),
        ..upkeep(&sink)
    };
    assert_eq!(work(&keeper, at(1)).expect("no failure").merged_hours, 0);
    assert_eq!((house.swapped_files(), house.names().len()), (vec![], 4));
    assert_eq!(work(&keeper, at(1)).expect("waits").merged_hours, 0);
    assert_eq!(work(&keeper, at(1) + 60_000_000).expect("merged").merged_hours, 1);
    assert_eq!(house.published("load"), [1, 2, 3, 4]);
}

#[test]
fn where_folders_cannot_be_exchanged_nothing_is_merged() {
    let mut house = House::at_once();
    let elsewhere = TempDir::new_in("/dev/shm").expect("another file system");
    fs::create_dir_all(house.root()).expect("a folder");
    std::os::unix::fs::symlink(elsewhere.path(), house.root().join("load")).expect("a link");
    let mut sink = house.try_start().expect("a sink");
    sink.restore(0, None).expect("restored");
    // Staged files lie beside the table, so they are put there by hand.
    let mut other = House::at_once();
    let mut there = other.start(None);
    for checkpoint in 1..=4 {
        publish(&mut there, checkpoint, at(0), [checkpoint as i64]);
    }
    let folder = house.root().join("load").join(hour_folder(at(0)));
    fs::create_dir_all(&folder).expect("a folder");
    for path in other.files("load") {
        fs::copy(&path, folder.join(path.file_name().expect("a name"))).expect("copied");
    }
    settle(&mut sink, 5);
    let keeper = upkeep(&sink);
    for _ in 0..2 {
        assert_eq!(work(&keeper, at(1)).expect("no failure").merged_hours, 0);
        assert_eq!((house.swapped_files(), house.published("load")), (vec![], vec![1, 2, 3, 4]));
    }
}

/// Of a checkpoint that names no file and has no rows.
fn empty_state() -> Vec<u8> {
    let mut state = StateWriter::default();
    crate::parquet::state::write(&mut state, 0, &[], &[]).expect("a state");
    state.finish()
}

/// Six files in two hours, merged or removed.
fn six_files(keep: bool) -> (House, Vec<u8>) {
    let mut house = House::at_once();
    house.config.keep = keep.then(|| At::nowhere(Duration::from_secs(3600)));
    let mut sink = house.start(None);
    for checkpoint in 1..=6 {
        publish(&mut sink, checkpoint, at(checkpoint as i64 / 4), [checkpoint as i64]);
    }
    let state = settle(&mut sink, 7);
    (house, state)
}

#[test]
fn a_crash_at_any_point_of_merging_or_removing_leaves_the_history_whole() {
    for keep in [false, true] {
        // Seen by other readers: everything, or without hours that are too old.
        let may_be = |found: &[i64]| match keep {
            false => *found == [1, 2, 3, 4, 5, 6],
            true => *found == [1, 2, 3, 4, 5, 6] || *found == [4, 5, 6],
        };
        let mut crashes = 0;
        loop {
            let (mut house, state) = six_files(keep);
            let mut sink = house.start(Some((7, &state)));
            let state = settle(&mut sink, 8);
            let left = AtomicUsize::new(crashes);
            let crash_point = Box::new(move || {
                let left = left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
                assert!(left.is_ok(), "a crash");
            });
            let keeper = HistoryUpkeep { crash_point, ..upkeep(&sink) };
            let crashed = catch_unwind(AssertUnwindSafe(|| work(&keeper, at(2)).map(|_| ()))).is_err();
            assert!(may_be(&house.published("load")), "{crashes}: {:?}", house.published("load"));
            drop((keeper, sink));
            let mut sink = house.start(Some((8, &state)));
            assert!(may_be(&house.published("load")), "{crashes}: {:?}", house.published("load"));
            assert_eq!(house.beside(SWAP_FOLDER).iter().filter(|path| path.is_file()).count(), 0, "{crashes}");
            settle(&mut sink, 9);
            work(&upkeep(&sink), at(2)).expect("merged");
            let expected = if keep { vec![4, 5, 6] } else { vec![1, 2, 3, 4, 5, 6] };
            assert_eq!((house.published("load"), house.swapped_files()), (expected, vec![]), "{crashes}");
            assert_eq!(house.names().len(), if keep { 1 } else { 2 });
            if !crashed {
                break;
            }
            crashes += 1;
        }
        assert!(crashes >= 10, "{crashes} points");
    }
}

#[test]
fn hours_that_are_too_old_are_removed_whole() {
    let mut house = House::at_once();
    house.config.keep = Some(At::nowhere(Duration::from_secs(2 * 3600)));
    let mut sink = house.start(None);
    for checkpoint in 1..=30 {
        publish(&mut sink, checkpoint, at(checkpoint as i64), [checkpoint as i64]);
    }
    let keeper = upkeep(&sink);
    assert_eq!(work(&keeper, at(30)).expect("nothing is settled").expired_hours, 29 - 2);
    // The hour of checkpoint 28 ended an hour and a half ago, that of 27 two and a half.
    assert_eq!(house.published("load"), [28, 29, 30]);
    let days = fs::read_dir(house.root().join("load")).expect("days").count();
    assert_eq!((days, house.swapped_files()), (1, vec![]));
    assert_eq!(work(&keeper, at(1000)).expect("removed").expired_hours, 2);
    // Checkpoint 30 may be gone on from: it names its file.
    assert_eq!(house.published("load"), [30]);
    settle(&mut sink, 31);
    let done = work(&keeper, at(1000)).expect("removed");
    assert_eq!((done.expired_hours, done.files, house.published("load")), (1, 0, vec![]));
}

#[test]
fn going_back_to_an_older_checkpoint_moves_newer_files_aside() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    let mut states = Vec::new();
    for checkpoint in 1..=5 {
        states.push(publish(&mut sink, checkpoint, at(checkpoint as i64 / 5), [checkpoint as i64]));
    }
    drop(sink);
    let aside = |house: &House| -> Vec<PathBuf> {
        house.beside(ASIDE_FOLDER).into_iter().filter(|path| path.is_file()).collect()
    };
    let place = |house: &House, hours, name: &str| {
        house.root().join(ASIDE_FOLDER).join("load").join(hour_folder(at(hours))).join(name)
    };
    for again in 0..2 {
        // The third file is named by its checkpoint.
        let mut sink = house.start(Some((3, &states[2])));
        assert_eq!(house.published("load"), [1, 2, 3]);
        let moved = aside(&house);
        assert!(moved.contains(&place(&house, 0, "history-4-0.parquet.aside")), "{moved:?}");
        assert!(moved.contains(&place(&house, 1, "history-5-0.parquet.aside")), "{moved:?}");
        assert_eq!((moved.len(), sink.shared.files.load(Relaxed)), (2 + 2 * again, 3));
        for checkpoint in 4..=5 {
            publish(&mut sink, checkpoint, at(checkpoint as i64 / 5), [checkpoint as i64]);
        }
        assert_eq!(house.published("load"), [1, 2, 3, 4, 5]);
    }
    // Files of other sinks, and of pipelines that are not in the file, are not ours.
    fs::rename(house.root().join("load"), house.root().join("gone")).expect("renamed");
    house.start(Some((1, &empty_state())));
    assert_eq!((house.files("gone").len(), aside(&house).len()), (5, 4));
    // A run that starts anew takes nothing back, nor does one that goes on from it.
    fs::rename(house.root().join("gone"), house.root().join("load")).expect("renamed");
    let mut sink = house.start(None);
    let state = publish(&mut sink, 2, at(9), [20]);
    drop(sink);
    house.start(Some((2, &state)));
    assert_eq!((house.published("load"), aside(&house).len()), (vec![1, 2, 3, 4, 5, 20], 4));
}

#[test]
fn a_merged_file_from_both_sides_of_the_checkpoint_stops_the_start() {
    let (mut house, _) = six_files(false);
    let mut sink = house.start(None);
    let state = settle(&mut sink, 8);
    work(&upkeep(&sink), at(2)).expect("merged");
    // A state folder out of a backup.
    let old = empty_state();
    let mut sink = house.try_start().expect("a sink");
    let error = sink.restore(5, Some(&mut StateReader::new(&old))).expect_err("half of it would come again");
    assert_eq!(error.retry, Retry::Never);
    assert!(
        error.to_string().contains("history-compacted-4-6-0.parquet has rows from before and from after"),
        "{error}"
    );
    assert_eq!(house.published("load"), [1, 2, 3, 4, 5, 6]);
    house.start(Some((8, &state)));
}

/// A small generator of numbers, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[test]
fn a_crash_back_to_any_kept_checkpoint_beside_merging_keeps_every_row_once() {
    for seed in 1..=60 {
        let mut random = Random(seed * 7919);
        let mut house = if seed % 3 == 0 { House::new(Duration::from_secs(1800), 128 << 20) } else { House::at_once() };
        let mut sink = house.start(None);
        // Number to state and the row to go on from, as the state folder has them.
        let mut kept: BTreeMap<u64, (Vec<u8>, i64)> = BTreeMap::new();
        let (mut checkpoint, mut next, mut now) = (0, 1, at(0));
        let mut keeper = upkeep(&sink);
        for _ in 0..60 {
            now += random.below(HOUR_US as u64 / 2) as i64;
            match random.below(12) {
                0 if !kept.is_empty() => {
                    // The newest ones are damaged, or none is.
                    for _ in 0..random.below(kept.len() as u64) {
                        kept.pop_last();
                    }
                    let (number, (state, row)) = kept.last_key_value().expect("one");
                    sink = house.start(Some((*number, state)));
                    (next, keeper) = (*row, upkeep(&sink));
                    checkpoint = checkpoint.max(*number);
                }
                1..=3 => drop(work(&keeper, now).expect("no failure")),
                step => {
                    for _ in 0..random.below(3) {
                        sink.write_at(0, &batch(next..next + 2), next as u64, now).expect("written");
                        next += 2;
                    }
                    checkpoint += 1;
                    let mut state = StateWriter::default();
                    sink.prepare_at(checkpoint, false, now, &mut state).expect("prepared");
                    // Some are never written, others not committed.
                    if step == 4 {
                        continue;
                    }
                    kept.insert(checkpoint, (state.finish(), next));
                    while kept.len() > 3 {
                        kept.pop_first();
                    }
                    if step != 5 {
                        let oldest = *kept.first_key_value().expect("one").0;
                        sink.commit(checkpoint, oldest).expect("committed");
                    }
                }
            }
        }
        checkpoint += 1;
        let mut state = StateWriter::default();
        sink.prepare_at(checkpoint, true, now, &mut state).expect("prepared");
        sink.commit(checkpoint, checkpoint).expect("committed");
        settle(&mut sink, checkpoint + 1);
        work(&keeper, now + 2 * HOUR_US).expect("merged");
        let mut found = house.published("load");
        found.sort_unstable();
        assert_eq!(found, (1..next).collect::<Vec<_>>(), "seed {seed}");
        let hours = files::hours(&house.root().join("load")).expect("hours");
        assert!(hours.iter().all(|hour| hour.files().expect("files").len() <= 2), "seed {seed}");
        assert_eq!((house.staged(), house.swapped_files()), (vec![], vec![]), "seed {seed}");
    }
}

/// Reads as DuckDB does: lists all files of the glob first, then opens each. An error is no count.
fn count_by_glob(table: &Path) -> std::result::Result<(usize, i64), String> {
    let (mut paths, mut open) = (Vec::new(), vec![table.to_owned()]);
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).map_err(|e| e.to_string())? {
            let path = entry.map_err(|e| e.to_string())?.path();
            if path.extension().is_some_and(|extension| extension == "parquet") {
                paths.push(path);
            } else {
                open.push(path);
            }
        }
    }
    let (mut rows, mut sum) = (0, 0);
    for path in paths {
        let file = fs::File::open(&path).map_err(|e| e.to_string())?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| e.to_string())?;
        for batch in reader.build().map_err(|e| e.to_string())? {
            let batch = batch.map_err(|e| e.to_string())?;
            rows += batch.num_rows();
            sum += batch["n"].as_primitive::<Int64Type>().values().iter().sum::<i64>();
        }
    }
    Ok((rows, sum))
}

/// Publishes a file without rows.
fn add_empty_file(sink: &ParquetSink, number: u64, at_us: i64) {
    let facts = Facts { first_batch: 1, last_batch: 1, event_min_us: 0, event_max_us: 0, since_us: 0 };
    let rows = RecordBatch::new_empty(Arc::clone(&sink.inputs[0].schema));
    let staged = sink.stage_folder().join("empty.part");
    file::write(&staged, &[rows], file::footer("history", "load", facts)).expect("written");
    let name = FileName::published(number, 0).write("history");
    fs::rename(staged, sink.root.join("load").join(hour_folder(at_us)).join(name)).expect("published");
}

#[test]
fn readers_beside_merging_count_every_row_once_or_fail() {
    const HOURS: i64 = 25;
    const FILES: i64 = 5;
    let rows = HOURS * FILES;
    let mut house = House::at_once();
    let mut sink = house.start(None);
    for n in 0..rows {
        publish(&mut sink, n as u64 + 1, at(n / FILES), [n]);
    }
    settle(&mut sink, rows as u64 + 1);
    let (history, table) = (house.history(), house.root().join("load"));
    let expected = (rows as usize, rows * (rows - 1) / 2);
    let merging = std::thread::spawn(move || {
        let (mut merged, mut checkpoint) = (0, rows as u64 + 2);
        // Over and over: an hour that grows is merged again. Each time the upkeep is a new one, which keeps what is
        // replaced, but not what another one has replaced.
        for _ in 0..4 {
            let keeper = HistoryUpkeep { grace: std::time::Duration::from_secs(3600), ..sink.history_upkeep() };
            merged += work(&keeper, at(HOURS + 1)).expect("merged").merged_hours;
            for hour in (0..HOURS).flat_map(|hour| [hour; 2]) {
                add_empty_file(&sink, checkpoint, at(hour));
                checkpoint += 1;
            }
            settle(&mut sink, checkpoint);
        }
        merged
    });
    let globbing = std::thread::spawn({
        let table = table.clone();
        move || {
            let (mut counts, mut failures) = (0, 0);
            loop {
                match count_by_glob(&table) {
                    Ok(found) => {
                        assert_eq!(found, expected);
                        counts += 1;
                    }
                    Err(_) => failures += 1,
                }
                if counts >= 5 && counts + failures >= 60 {
                    return (counts, failures);
                }
            }
        }
    });
    let done = Arc::new(AtomicBool::new(false));
    let looking = std::thread::spawn({
        let hours: Vec<_> = files::hours(&table).expect("hours").into_iter().map(|hour| hour.path).collect();
        let done = Arc::clone(&done);
        move || {
            while !done.load(SeqCst) {
                assert!(hours.iter().all(|hour| hour.is_dir()), "an hour was away for a moment");
            }
        }
    });
    let answer = format!("c,s\n{},{}\n", expected.0, expected.1);
    let mut queries = 0;
    while !merging.is_finished() || queries == 0 {
        assert_eq!(query(&history, "SELECT count(*) AS c, sum(n) AS s FROM load"), answer);
        queries += 1;
    }
    assert_eq!(merging.join().expect("merged"), 4 * HOURS as u64);
    done.store(true, SeqCst);
    looking.join().expect("always there");
    let (counts, failures) = globbing.join().expect("counted");
    assert_eq!(count_by_glob(&table), Ok(expected), "{queries} queries, {counts} counts, {failures} failures");
}
