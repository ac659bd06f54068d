use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use ::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use arrow::array::{ArrayRef, AsArray, Int64Array, StringArray};
use arrow::datatypes::{Int64Type, Schema};
use pipeline::batch::Times;
use pipeline::config::{Position, Problems};
use pipeline::error::{Blame, Retry};
use pipeline::history::output;
use pipeline::history::{History, Limits, Table};
use pipeline::http::Routes;
use pipeline::live::Live;
use pipeline::plugin::StreamShape;
use pipeline::schema::{FieldType, schema_of};
use pipeline::time::parse_us;
use tempfile::TempDir;

use super::*;

mod upkeep;

const DAY_US: i64 = 86_400_000_000;

fn now() -> i64 {
    parse_us("2026-11-20T12:59:59Z").expect("a time")
}

fn columns() -> SchemaRef {
    schema_of([("n", FieldType::Int), ("note", FieldType::Json)])
}

/// One row per number; event time is the number in microseconds.
fn batch(numbers: impl IntoIterator<Item = i64>) -> Batch {
    let numbers: Vec<i64> = numbers.into_iter().collect();
    let notes = StringArray::from_iter_values(numbers.iter().map(|n| format!("[{n}]")));
    let columns: Vec<ArrayRef> = vec![Arc::new(Int64Array::from(numbers.clone())), Arc::new(notes)];
    batch_of(&super::tests::columns(), columns, &numbers)
}

fn batch_of(schema: &SchemaRef, columns: Vec<ArrayRef>, times: &[i64]) -> Batch {
    let rows = RecordBatch::try_new(Arc::clone(schema), columns).expect("rows");
    let times = Times { event_us: Int64Array::from(times.to_vec()), ..Times::constant(0, 7, 0, times.len()) };
    Batch::new(rows, times, Stage::Final).expect("a batch")
}

/// A folder with its history, and what a running graph gives its sink.
struct House {
    scratch: TempDir,
    config: ParquetConfig,
    inputs: Vec<SinkInput>,
    tails: Vec<HistoryTail>,
}

impl House {
    fn new(roll: Duration, roll_size: u64) -> Self {
        let config = ParquetConfig {
            path: At::nowhere("history".into()),
            roll,
            roll_size: At::nowhere(ByteSize(roll_size)),
            keep: None,
        };
        let mut house =
            Self { scratch: TempDir::new().expect("a folder"), config, inputs: Vec::new(), tails: Vec::new() };
        house.input("load", columns());
        house
    }

    /// Publishes at every checkpoint.
    fn at_once() -> Self {
        Self::new(Duration::from_ms(0), 128 << 20)
    }

    /// Publishes nothing before the end.
    fn patient() -> Self {
        Self::new(Duration::from_secs(86_400), 128 << 20)
    }

    fn input(&mut self, metric: &str, schema: SchemaRef) {
        let shape = StreamShape { schema, keys: Vec::new(), windowed: false };
        self.inputs.push(SinkInput { metric: metric.into(), shape });
    }

    /// Starts a process: tails are empty, the sink is new.
    fn try_start(&mut self) -> Result<ParquetSink> {
        self.tails = self.inputs.iter().map(|_| HistoryTail::default()).collect();
        let cx = SinkContext {
            name: "history".into(),
            inputs: self.inputs.clone(),
            folder: self.scratch.path().to_owned(),
            routes: Routes::default(),
            live: Arc::new(Live::new("epoch".into(), Arc::default(), [])),
            tails: self.tails.clone(),
        };
        ParquetSink::new(&self.config, cx)
    }

    /// Starts a process that takes over a checkpoint.
    fn start(&mut self, checkpoint: Option<(u64, &[u8])>) -> ParquetSink {
        let mut sink = self.try_start().expect("a sink");
        let mut state = checkpoint.map(|(_, state)| StateReader::new(state));
        sink.restore(checkpoint.map_or(0, |(number, _)| number), state.as_mut()).expect("restored");
        assert!(state.is_none_or(|state| state.is_empty()), "unread state");
        sink
    }

    fn root(&self) -> PathBuf {
        self.scratch.path().join("history")
    }

    fn files(&self, metric: &str) -> Vec<PathBuf> {
        let files = files::list(&self.root().join(metric)).expect("a listing");
        files.into_iter().map(|file| file.path).collect()
    }

    /// Column `n` of all published files, in the order of files and rows.
    fn published(&self, metric: &str) -> Vec<i64> {
        self.files(metric).iter().flat_map(|path| numbers(path)).collect()
    }

    fn staged(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root().join(STAGE_FOLDER)).expect("the stage folder");
        entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
    }

    fn waiting(&self) -> usize {
        self.tails
            .iter()
            .map(|tail| tail.read().expect("a tail").iter().map(RecordBatch::num_rows).sum::<usize>())
            .sum()
    }

    fn history(&self) -> History {
        let table = |(input, tail): (&SinkInput, &HistoryTail)| Table {
            name: input.metric.clone(),
            sink: "history".into(),
            folder: self.root(),
            schema: Arc::clone(&input.shape.schema),
            tail: Some(Arc::clone(tail)),
        };
        History::new(self.inputs.iter().zip(&self.tails).map(table).collect()).expect("threads")
    }
}

fn numbers(path: &Path) -> Vec<i64> {
    let file = fs::File::open(path).expect("a file");
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).expect("a footer").build().expect("a reader");
    reader.flat_map(|rows| rows.expect("rows")["n"].as_primitive::<Int64Type>().values().to_vec()).collect()
}

fn prepare(sink: &mut ParquetSink, checkpoint: u64, end: bool) -> Vec<u8> {
    let mut state = StateWriter::default();
    sink.prepare_at(checkpoint, end, now(), &mut state).expect("prepared");
    state.finish()
}

/// As `write`, at the time of [`now`].
fn write(sink: &mut ParquetSink, input: usize, batch: &Batch, number: u64) -> Result<()> {
    sink.write_at(input, batch, number, now())
}

fn query(history: &History, sql: &str) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    output::csv(&runtime.block_on(history.query(sql, &Limits::default())).expect("rows"))
}

#[test]
fn rows_are_visible_to_queries_at_once_and_to_others_after_the_commit() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    let history = house.history();
    let count = "SELECT count(*) AS c, sum(n) AS s FROM load";
    write(&mut sink, 0, &batch([1, 2]), 1).expect("written");
    assert_eq!(query(&history, count), "c,s\n2,3\n");
    prepare(&mut sink, 1, false);
    assert_eq!((house.published("load"), query(&history, count)), (vec![], "c,s\n2,3\n".into()));
    write(&mut sink, 0, &batch([3]), 2).expect("written");
    sink.publish(1).expect("committed");
    sink.publish(1).expect("committed again");
    assert_eq!((house.published("load"), house.waiting()), (vec![1, 2], 1));
    assert_eq!(query(&history, count), "c,s\n3,6\n");
    let sql = "SELECT n, note, event_time, ingest_time FROM load WHERE n = 1";
    let expected = "n,note,event_time,ingest_time\n1,[1],1970-01-01T00:00:00.000001Z,1970-01-01T00:00:00.000007Z\n";
    assert_eq!(query(&history, sql), expected);
    let path = house.root().join("load/dt=2026-11-20/hh=12/history-1-0.parquet");
    assert_eq!(house.files("load"), [path]);
}

#[test]
fn a_file_tells_where_its_rows_come_from_and_keeps_their_types() {
    let mut house = House::patient();
    let mut sink = house.start(None);
    for number in 3..6 {
        write(&mut sink, 0, &batch([number, number * 10]), number as u64).expect("written");
    }
    prepare(&mut sink, 9, true);
    sink.publish(9).expect("committed");
    let path = &house.files("load")[0];
    let reader = SerializedFileReader::new(fs::File::open(path).expect("a file")).expect("a footer");
    let metadata = reader.metadata().file_metadata().key_value_metadata().expect("metadata").clone();
    let value = |key: &str| metadata.iter().find(|m| m.key == format!("tailwater.{key}")).and_then(|m| m.value.clone());
    for (key, expected) in [
        ("pipeline", "load"),
        ("sink", "history"),
        ("first_batch", "3"),
        ("last_batch", "5"),
        ("event_time_min", "1970-01-01T00:00:00.000003Z"),
        ("event_time_max", "1970-01-01T00:00:00.000050Z"),
        ("version", env!("CARGO_PKG_VERSION")),
    ] {
        assert_eq!(value(key).as_deref(), Some(expected), "{key}");
    }
    let schema = files::schema_of_file(path).expect("a schema");
    assert_eq!(schema.fields(), with_hidden_columns(&columns()).fields());
}

#[test]
fn rows_wait_for_roll_or_for_roll_size() {
    let mut house = House::new(Duration::from_secs(60), 1024);
    let mut sink = house.start(None);
    sink.write_at(0, &batch([1]), 1, now() - 59_000_000).expect("written");
    let waiting = prepare(&mut sink, 1, false);
    sink.publish(1).expect("committed");
    assert_eq!(house.published("load"), [] as [i64; 0]);
    // The wait counts through a restart.
    let mut sink = house.start(Some((1, &waiting)));
    let mut state = StateWriter::default();
    sink.prepare_at(2, false, now() + 1_000_000, &mut state).expect("prepared");
    sink.publish(2).expect("committed");
    assert_eq!(house.published("load"), [1]);
    // A clock that was set back holds nothing back.
    sink.write_at(0, &batch([2]), 2, now() + DAY_US).expect("written");
    prepare(&mut sink, 3, false);
    sink.publish(3).expect("committed");
    // The first one was published a second later, in the next hour.
    assert_eq!(house.published("load"), [2, 1]);
    // By size, without waiting for a checkpoint: the file is staged when the next batch comes.
    sink.write_at(0, &batch(3..100), 3, now()).expect("written");
    assert_eq!(house.staged(), [] as [String; 0]);
    sink.write_at(0, &batch([100]), 4, now()).expect("written");
    assert_eq!(house.staged().len(), 1);
    prepare(&mut sink, 4, false);
    sink.publish(4).expect("committed");
    let mut found = house.published("load");
    found.sort_unstable();
    assert_eq!((found, house.waiting()), ((1..100).collect(), 1));
}

#[test]
fn small_batches_are_joined_in_memory_and_in_the_checkpoint() {
    let mut house = House::patient();
    let mut sink = house.start(None);
    for number in 0..1000 {
        write(&mut sink, 0, &batch([number]), number as u64).expect("written");
    }
    assert!(sink.inputs[0].open.batches.len() <= 10, "{}", sink.inputs[0].open.batches.len());
    assert_eq!(
        (house.waiting(), house.tails[0].read().expect("a tail").len()),
        (1000, sink.inputs[0].open.batches.len())
    );
    let state = prepare(&mut sink, 1, false);
    let mut sink = house.start(Some((1, &state)));
    prepare(&mut sink, 2, true);
    sink.publish(2).expect("committed");
    assert_eq!((house.published("load"), house.waiting()), ((0..1000).collect(), 0));
}

#[test]
fn a_partial_result_is_not_kept() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    let settled = batch([1]);
    let partial = Batch::new(settled.rows().clone(), settled.times().clone(), Stage::Partial).expect("a batch");
    write(&mut sink, 0, &partial, 1).expect("passed over");
    write(&mut sink, 0, &settled, 2).expect("written");
    prepare(&mut sink, 1, false);
    sink.publish(1).expect("committed");
    assert_eq!(house.published("load"), [1]);
}

/// One step of the engine that a crash may follow.
#[derive(Clone, Copy)]
enum Step {
    Write,
    Prepare {
        end: bool,
    },
    /// The checkpoint's manifest is renamed into place.
    Durable,
    Commit,
}

/// Rows that a run writes at least.
const ROWS: i64 = 30;

/// Writes rows 1 to [`ROWS`] in batches over some checkpoints, crashing before the steps `crashes` (counted over the
/// whole run), each time starting anew from the newest durable checkpoint.
fn run_with_crashes(house: &mut House, crashes: &[usize]) -> usize {
    let round = [Step::Write, Step::Write, Step::Prepare { end: false }, Step::Write, Step::Durable, Step::Commit];
    let last = [Step::Prepare { end: true }, Step::Durable, Step::Commit];
    let rows_of_a_write = 5;
    let (mut sink, mut done) = (house.start(None), 0);
    let (mut next_row, mut checkpoint) = (1, 0);
    // Number, state, and the row to go on from.
    let mut durable: Option<(u64, Vec<u8>, i64)> = None;
    let mut prepared = None;
    let mut ending = false;
    let mut plan = round.iter();
    loop {
        let step = match plan.next() {
            Some(step) => *step,
            None if ending => return done,
            None => {
                ending = next_row > ROWS;
                plan = if ending { last.iter() } else { round.iter() };
                continue;
            }
        };
        if crashes.contains(&done) {
            drop(sink);
            sink = house.start(durable.as_ref().map(|(number, state, _)| (*number, state.as_slice())));
            next_row = durable.as_ref().map_or(1, |(.., row)| *row);
            checkpoint = durable.as_ref().map_or(0, |(number, ..)| *number);
            (prepared, ending, plan) = (None, false, round.iter());
            done += 1;
            continue;
        }
        done += 1;
        match step {
            Step::Write => {
                write(&mut sink, 0, &batch(next_row..next_row + rows_of_a_write), next_row as u64).expect("written");
                next_row += rows_of_a_write;
            }
            Step::Prepare { end } => {
                checkpoint += 1;
                prepared = Some((checkpoint, prepare(&mut sink, checkpoint, end), next_row));
            }
            Step::Durable => durable = prepared.take(),
            Step::Commit => sink.publish(checkpoint).expect("committed"),
        }
    }
}

/// Every single crash, and every crash with a second one soon after it.
fn survives_every_crash(new: fn() -> House) {
    let steps = run_with_crashes(&mut new(), &[]);
    let single = (0..steps).map(|first| vec![first]);
    let double = (0..steps).flat_map(|first| [1, 2, 5].map(|later| vec![first, first + later]));
    for crashes in single.chain(double) {
        let mut house = new();
        run_with_crashes(&mut house, &crashes);
        let mut found = house.published("load");
        found.sort_unstable();
        // A crash at the end may come after more rows were promised.
        let last = *found.last().expect("rows");
        assert!(last >= ROWS, "crashes before steps {crashes:?}: {last}");
        assert_eq!(found, (1..=last).collect::<Vec<_>>(), "crashes before steps {crashes:?}");
        assert_eq!((house.staged(), house.waiting()), (vec![], 0), "crashes before steps {crashes:?}");
    }
}

#[test]
fn a_crash_at_any_step_publishes_every_row_once_at_every_checkpoint() {
    survives_every_crash(House::at_once);
}

#[test]
fn a_crash_at_any_step_publishes_every_row_once_at_the_end() {
    survives_every_crash(House::patient);
}

#[test]
fn a_crash_at_any_step_publishes_every_row_once_by_size() {
    survives_every_crash(|| House::new(Duration::from_secs(86_400), 300));
}

#[test]
fn a_commit_that_broke_off_between_two_files_is_finished() {
    for renamed in 0..=2 {
        let mut house = House::at_once();
        house.input("other", columns());
        let mut sink = house.start(None);
        write(&mut sink, 0, &batch([1]), 1).expect("written");
        write(&mut sink, 1, &batch([2]), 1).expect("written");
        let state = prepare(&mut sink, 1, false);
        for staged in &sink.staged[..renamed] {
            let target = house.root().join(&staged.target.as_ref().expect("a target").path);
            fs::create_dir_all(target.parent().expect("a parent")).expect("folders");
            fs::rename(house.root().join(STAGE_FOLDER).join(&staged.stage), target).expect("renamed");
        }
        drop(sink);
        house.start(Some((1, &state)));
        assert_eq!((house.published("load"), house.published("other")), (vec![1], vec![2]), "{renamed} renamed");
        assert_eq!(house.staged(), [] as [String; 0]);
    }
}

#[test]
fn a_staged_file_that_is_gone_stops_the_sink() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    write(&mut sink, 0, &batch([1]), 1).expect("written");
    let state = prepare(&mut sink, 1, false);
    fs::remove_dir_all(house.root()).expect("removed");
    let mut sink = house.try_start().expect("a sink");
    let error = sink.restore(1, Some(&mut StateReader::new(&state))).expect_err("nothing to publish");
    assert_eq!((error.blame, error.retry), (Blame::Outside, Retry::Never));
    assert!(error.to_string().contains("history-load-0.part"), "{error}");
}

#[test]
fn a_disk_that_takes_nothing_loses_no_row() {
    let mut house = House::new(Duration::from_ms(0), 1024);
    let mut sink = house.start(None);
    write(&mut sink, 0, &batch(1..100), 1).expect("written");
    let stage = house.root().join(STAGE_FOLDER);
    fs::remove_dir(&stage).expect("removed");
    fs::write(&stage, "no folder").expect("a file in the way");
    let error = sink.prepare(1, false, &mut StateWriter::default()).expect_err("no disk");
    assert_eq!((error.blame, error.retry), (Blame::Outside, Retry::BackOff), "{error}");
    assert!(error.to_string().starts_with("cannot write ") && error.to_string().contains(".stage/"), "{error}");
    // Full: the batch is not taken, and may be written again.
    write(&mut sink, 0, &batch([100]), 2).expect_err("no room");
    assert_eq!(house.waiting(), 99);
    fs::remove_file(&stage).expect("removed");
    fs::create_dir(&stage).expect("a folder");
    write(&mut sink, 0, &batch([100]), 2).expect("written");
    prepare(&mut sink, 2, true);
    sink.publish(2).expect("committed");
    assert_eq!(house.published("load"), (1..=100).collect::<Vec<_>>());
}

#[test]
fn a_run_that_counts_checkpoints_from_one_again_adds_files() {
    let mut house = House::at_once();
    for run in 0..3 {
        let mut sink = house.start(None);
        write(&mut sink, 0, &batch([run]), 1).expect("written");
        prepare(&mut sink, 1, true);
        sink.publish(1).expect("committed");
    }
    assert_eq!(house.published("load"), [0, 1, 2]);
}

#[test]
fn stale_staged_files_of_this_sink_alone_are_removed() {
    let mut house = House::at_once();
    house.start(None);
    for name in ["history-load-7.part", "history_2-load-0.part", "other-load-0.part"] {
        fs::write(house.root().join(STAGE_FOLDER).join(name), "torn").expect("a file");
    }
    house.start(None);
    let mut left = house.staged();
    left.sort();
    assert_eq!(left, ["history_2-load-0.part", "other-load-0.part"]);
}

#[test]
fn waiting_rows_survive_a_change_of_the_graph() {
    let mut house = House::patient();
    house.input("gone", columns());
    let mut sink = house.start(None);
    write(&mut sink, 0, &batch([1, 2]), 1).expect("written");
    write(&mut sink, 1, &batch([3]), 1).expect("written");
    let state = prepare(&mut sink, 1, false);
    // `load` loses a column and wins another; `gone` goes.
    house.inputs.clear();
    let schema = schema_of([("n", FieldType::Int), ("added", FieldType::String)]);
    house.input("load", Arc::clone(&schema));
    let mut sink = house.start(Some((1, &state)));
    let history = house.history();
    assert_eq!(query(&history, "SELECT n, added FROM load ORDER BY n"), "n,added\n1,\n2,\n");
    let columns: Vec<ArrayRef> = vec![Arc::new(Int64Array::from(vec![4])), Arc::new(StringArray::from(vec!["x"]))];
    write(&mut sink, 0, &batch_of(&schema, columns, &[4]), 2).expect("written");
    prepare(&mut sink, 2, false);
    sink.publish(2).expect("committed");
    assert_eq!((house.published("load"), house.published("gone"), house.waiting()), (vec![1, 2], vec![3], 1));
    assert_eq!(query(&history, "SELECT n, added FROM load ORDER BY n"), "n,added\n1,\n2,\n4,x\n");
}

#[test]
fn a_changed_type_is_refused_and_a_changed_set_of_columns_is_not() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    write(&mut sink, 0, &batch([1]), 1).expect("written");
    prepare(&mut sink, 1, false);
    sink.publish(1).expect("committed");
    house.inputs.clear();
    house.input("load", schema_of([("note", FieldType::Json), ("added", FieldType::Float)]));
    house.try_start().expect("columns may come and go");
    house.inputs.clear();
    house.input("load", schema_of([("n", FieldType::Float)]));
    let error = house.try_start().err().expect("a changed type");
    assert_eq!(error.blame, Blame::User);
    let text = error.to_string();
    for part in ["column `n` of pipeline `load` is float now and int in its history", "such as `n_float`"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_query_beside_the_publishing_thread_sees_every_row_once() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    let history = house.history();
    let done = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let done = Arc::clone(&done);
        move || {
            let (mut next, mut checkpoint) = (1, 0);
            // Few enough files that the queries beside it stay quick on a busy machine.
            while !done.load(SeqCst) && checkpoint < 200 {
                for size in [1, 3, 2] {
                    write(&mut sink, 0, &batch(next..next + size), next as u64).expect("written");
                    next += size;
                }
                checkpoint += 1;
                prepare(&mut sink, checkpoint, false);
                sink.publish(checkpoint).expect("committed");
            }
            next - 1
        }
    });
    let mut before = 0;
    for _ in 0..25 {
        let text = query(&history, "SELECT count(*) AS c, coalesce(sum(n), 0) AS s FROM load");
        let (count, sum) = text.lines().nth(1).and_then(|line| line.split_once(',')).expect("a row");
        let (count, sum): (i64, i64) = (count.parse().expect("a count"), sum.parse().expect("a sum"));
        assert_eq!(sum, count * (count + 1) / 2, "rows 1 to {count}");
        assert!(count >= before, "{count} after {before}");
        before = count;
    }
    done.store(true, SeqCst);
    let last = writer.join().expect("the writer");
    assert_eq!(house.published("load").len() as i64, last);
}

#[test]
fn a_file_appears_and_its_rows_leave_the_tail_in_one_lock() {
    let mut house = House::at_once();
    let mut sink = house.start(None);
    let written = Arc::new(AtomicUsize::new(0));
    let writer = std::thread::spawn({
        let written = Arc::clone(&written);
        move || {
            for checkpoint in 1..=200 {
                // Counted before it can be seen, so that the count is never too low.
                written.store(checkpoint, SeqCst);
                write(&mut sink, 0, &batch([0]), checkpoint as u64).expect("written");
                prepare(&mut sink, checkpoint as u64, false);
                sink.publish(checkpoint as u64).expect("committed");
            }
        }
    });
    // Every file and every batch holds one row.
    while !writer.is_finished() {
        let tail = house.tails[0].read().expect("a tail");
        let least = written.load(SeqCst).saturating_sub(1);
        let seen = house.files("load").len() + tail.len();
        drop(tail);
        let most = written.load(SeqCst);
        assert!((least..=most).contains(&seen), "{seen} rows of {least} to {most}");
    }
    writer.join().expect("the writer");
    assert_eq!(house.files("load").len(), 200);
}

#[test]
fn rows_beyond_the_memory_bound_are_left_to_the_disk() {
    let mut house = House::patient();
    let mut sink = house.start(None);
    write(&mut sink, 0, &batch(0..10), 1).expect("written");
    sink.stage(0).expect("staged");
    write(&mut sink, 0, &batch(10..20), 2).expect("written");
    assert_eq!(house.waiting(), 20);
    sink.make_room(MEMORY_BYTES_MAX).expect("room");
    assert_eq!((house.staged().len(), house.waiting()), (2, 0));
    write(&mut sink, 0, &batch([20]), 3).expect("written");
    prepare(&mut sink, 1, false);
    sink.publish(1).expect("committed");
    assert_eq!((house.published("load"), house.waiting()), ((0..20).collect(), 1));
}

#[test]
fn columns_that_a_history_file_cannot_have_are_refused() {
    let interval = arrow::datatypes::DataType::Interval(arrow::datatypes::IntervalUnit::MonthDayNano);
    let schema = Schema::new(vec![
        FieldType::Int.field("n"),
        FieldType::Int.field("dt"),
        FieldType::Int.field("HH"),
        arrow::datatypes::Field::new("span", interval, true),
    ]);
    let house = House::at_once();
    let mut problems = Problems::default();
    let mut cx = CheckContext::new(&mut problems, "sink history", Position { line: 3, column: 5 }, Path::new("/yaml"));
    let shape = house.config.check(&house.inputs, &mut cx).expect("a shape");
    assert_eq!(shape.history, Some(PathBuf::from("/yaml/history")));
    assert!(shape.takes_revised && !shape.live && shape.mounts.is_empty());
    let shape = StreamShape { schema: Arc::new(schema), keys: Vec::new(), windowed: false };
    assert!(house.config.check(&[SinkInput { metric: "load".into(), shape }], &mut cx).is_none());
    let text = problems.render("p.yaml");
    for column in ["dt", "HH", "span"] {
        assert!(text.contains(&format!("column `{column}`")), "{column}: {text}");
    }
    assert!(text.starts_with("p.yaml:3:5: error: sink history: "), "{text}");
}

#[test]
fn history_is_not_kept_for_less_than_a_row_waits() {
    let mut house = House::at_once();
    house.config.roll = Duration::from_secs(60);
    for (keep, right) in [(59, false), (60, true), (30 * 86_400, true)] {
        let at = Position { line: 4, column: 9 };
        house.config.keep = Some(At { position: at, verbatim: false, value: Duration::from_secs(keep) });
        let mut problems = Problems::default();
        let mut cx = CheckContext::new(&mut problems, "sink history", Position::default(), Path::new("/yaml"));
        assert_eq!(house.config.check(&house.inputs, &mut cx).is_some(), right, "{keep} s");
        let text = problems.render("p.yaml");
        let told = text.starts_with("p.yaml:4:9: error: sink history: `keep` (59s) is shorter than `roll` (1m)");
        assert_eq!(told, !right, "{text}");
    }
}

#[test]
fn a_state_of_the_format_before_is_read() {
    let mut house = House::patient();
    let mut sink = house.start(None);
    write(&mut sink, 0, &batch([1, 2]), 1).expect("written");
    let state = prepare(&mut sink, 1, false);
    // The version was followed by the staged files.
    let before = [&1u64.to_le_bytes(), &state[16..]].concat();
    assert_eq!(&state[..16], [2u64.to_le_bytes(), 0u64.to_le_bytes()].concat());
    house.start(Some((1, &before)));
    assert_eq!(house.waiting(), 2);
}

#[test]
fn the_example_and_the_defaults_are_as_documented() {
    let text = format!("{}\n", ParquetConfig::EXAMPLE.replace("roll: 10s\n", "").replace("type: parquet\n", ""));
    let node = pipeline::config::tree::parse(&text).expect("YAML");
    let mut problems = Problems::default();
    let mut cx = CheckContext::new(&mut problems, "sink history", Position::default(), Path::new("/"));
    let config: ParquetConfig = pipeline::config::deserialize::read(&node, &mut cx).expect("a configuration");
    assert_eq!(
        (config.path.as_str(), config.roll, config.roll_size.value, config.keep.is_none()),
        ("history", Duration::from_secs(60), ByteSize(128 << 20), true)
    );
}
