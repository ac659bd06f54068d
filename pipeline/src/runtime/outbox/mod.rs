//! The bounded outbox before a database or broker: rows on disk until the other side has them.
//!
//! Rows wait in memory. A checkpoint writes those that it finds to a [`Log`], so that it needs no network, and names in
//! its state how far each input was delivered: after a crash the log holds the rest. Beyond some memory the rows are
//! in the log alone and are read back when their turn comes.
//!
//! Each input numbers its rows, and a row keeps its number through restarts and losses. Where the other side keeps the number of the last row it has ([exactly once]), only
//! rows of a durable checkpoint are delivered: a crash gives back the same rows under the same numbers. To others rows go
//! at once, and again after a crash.
//!
//! [exactly once]: crate::plugin::OutboxSink::is_exactly_once

mod delivery;
mod kept;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow::array::{Array, RecordBatch, RecordBatchOptions, new_null_array};
use arrow::compute::concat_batches;
use arrow::datatypes::{FieldRef, SchemaRef};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

pub(crate) use delivery::DeliveryTask;
pub(crate) use kept::Kept;
use kept::Told;

use super::hold::{Held, Hold};
use super::{blocking, is_true};
use crate::batch::BATCH_ROWS_MAX;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::log::{Cursor, Durability, Log, LogOptions};
use crate::plugin::{BatchLimits, SinkInput};
use crate::state::{StateReader, StateWriter};
use crate::status::lock;
use crate::time::now_us;

/// Most bytes of rows that wait for the other side; then the graph is held back.
const OUTBOX_BYTES_MAX: usize = 1 << 30;

/// Bytes of waiting rows that are kept in memory although they are in the log.
const MEMORY_BYTES_MAX: usize = 32 << 20;

/// Bytes of rows that wait in memory alone; beyond, they go to the log before the checkpoint asks for it.
const UNWRITTEN_BYTES_MAX: usize = 32 << 20;

/// Bytes that one write to the log takes; what waits longer is written in several.
const WRITE_BYTES_MAX: usize = 32 << 20;

/// Bytes of one record of the log, at which no more rows join it: it is read back as a whole.
const RECORD_BYTES_MAX: usize = 1 << 20;

/// Bytes of a segment of the log; a whole one is removed at a time.
const SEGMENT_BYTES: u64 = 16 << 20;

/// The only kind of record in the log.
const ROWS: u8 = 0;

/// The layout of the state in a checkpoint. Smaller numbers than any first word of the layout before it, a clock.
const STATE_VERSION: u64 = 2;

/// After a stop was asked for, rows are delivered for this long; the rest stays in the outbox.
const DRAIN: Duration = Duration::from_secs(5);

/// Rows on their way to one sink.
pub(crate) struct Outbox {
    limits: BatchLimits,
    /// Whether only rows of a durable checkpoint are delivered.
    exactly_once: bool,
    bytes_max: usize,
    inner: Mutex<Inner>,
    changed: Notify,
    room: Notify,
    empty: Notify,
    /// Whether a stop was asked for.
    hurried: watch::Sender<bool>,
    /// Whether the sink has failed in a way that waiting does not mend.
    failing: watch::Sender<bool>,
    /// Holds the sources back.
    hold: Hold,
}

struct Inner {
    log: Log,
    inputs: Vec<SinkInput>,
    waiting: Vec<Waiting>,
    /// What is being delivered; its rows are still among those that wait.
    in_flight: Option<Delivery>,
    /// Bytes of all rows that wait.
    bytes: usize,
    /// Of these, bytes in memory, and bytes that are not in the log.
    memory: usize,
    unwritten: usize,
    draining: bool,
    /// While it is full and sends its rows only after a checkpoint.
    held: Option<Held>,
    /// Of each checkpoint that is not durable yet: the record after its last one.
    ends: VecDeque<(u64, u64)>,
    /// Of each checkpoint that is kept: the first record that it needs.
    needed: VecDeque<(u64, u64)>,
}

/// Rows of one input.
struct Waiting {
    entries: VecDeque<Entry>,
    rows: usize,
    /// Rows at the front that may be delivered.
    ready: usize,
    /// Number of the row that comes next.
    next: u64,
    /// Number of the first row of this run, and whether it goes on from a checkpoint.
    start: u64,
    restored: bool,
    /// Reads back the rows that are in the log alone, in their order.
    cursor: Option<Cursor>,
}

/// Rows that came together.
struct Entry {
    /// `None`: in the log alone.
    rows: Option<RecordBatch>,
    /// Number of the first row left.
    first: u64,
    /// Rows left, and those before them that are delivered already.
    count: usize,
    skip: usize,
    /// What the rows left count for: taken off again to the byte, so that nothing adds up over time.
    bytes: usize,
    since: Instant,
    /// Where they are in the log.
    lsn: Option<u64>,
}

/// Rows that are being delivered; a repeated delivery has the same id and the same rows.
#[derive(Clone)]
struct Delivery {
    input: usize,
    /// Number of the row after the last one.
    id: u64,
    rows: RecordBatch,
}

impl Outbox {
    /// Opens the outbox in `folder`, without the rows that are in it: [`Self::restore`] follows if a checkpoint names some. Those
    /// that none names stay until the log is trimmed: an older checkpoint may.
    pub(crate) fn open(
        limits: BatchLimits,
        exactly_once: bool,
        inputs: Vec<SinkInput>,
        disk: Arc<dyn Disk>,
        folder: &Path,
        durability: Durability,
        hold: Hold,
    ) -> Result<Self> {
        let options = LogOptions { segment_bytes: SEGMENT_BYTES, durability };
        let (log, _) = Log::open(disk, folder, options)?;
        // Numbers grow through restarts, so that a sink that remembers the last one never takes a new row for a repeated one.
        let next = u64::try_from(now_us()).unwrap_or(1);
        let waiting = || Waiting {
            entries: VecDeque::new(),
            rows: 0,
            ready: 0,
            next,
            start: next,
            restored: false,
            cursor: None,
        };
        let waiting = inputs.iter().map(|_| waiting()).collect();
        let inner = Inner {
            log,
            inputs,
            waiting,
            in_flight: None,
            bytes: 0,
            memory: 0,
            unwritten: 0,
            draining: false,
            held: None,
            ends: VecDeque::new(),
            needed: VecDeque::new(),
        };
        Ok(Self {
            limits,
            exactly_once,
            bytes_max: OUTBOX_BYTES_MAX,
            inner: Mutex::new(inner),
            changed: Notify::new(),
            room: Notify::new(),
            empty: Notify::new(),
            hurried: watch::Sender::new(false),
            failing: watch::Sender::new(false),
            hold,
        })
    }

    /// Adds rows; waits while the outbox is full. Not at a stop: then the rows on their way stand before the last
    /// barrier, and are few. Cancel safe: dropped while it waits, it has added nothing.
    pub(crate) async fn put(&self, input: usize, rows: &RecordBatch) {
        if rows.num_rows() == 0 {
            return;
        }
        loop {
            let room = self.room.notified();
            {
                let mut inner = lock(&self.inner);
                // Without rows to deliver there would never be room: the checkpoint that makes them ready comes behind these.
                // The sources are held back then, so that only the few rows on their way come before it.
                let is_full = inner.bytes >= self.bytes_max && inner.waiting.iter().any(|waiting| waiting.ready > 0);
                if !is_full || *self.hurried.borrow() {
                    inner.add(input, rows.clone(), !self.exactly_once);
                    self.hold_back(&mut inner);
                    if inner.unwritten > UNWRITTEN_BYTES_MAX {
                        // If the disk is full the checkpoint says so.
                        let _ = blocking(|| inner.write());
                    }
                    break;
                }
            }
            room.await;
        }
        self.changed.notify_one();
    }

    /// Holds the sources back while it is full of rows that all wait for a checkpoint, or lets go of them: else it would grow
    /// for as long as none can be written.
    fn hold_back(&self, inner: &mut Inner) {
        if inner.bytes < self.bytes_max || inner.waiting.iter().any(|waiting| waiting.ready > 0) {
            inner.held = None;
        } else if inner.held.is_none() {
            debug!("`{}` is full of rows that no checkpoint has yet", inner.log.folder().display());
            inner.held = Some(self.hold.hold());
        }
    }

    /// Whether only rows of a durable checkpoint are delivered.
    pub(crate) fn is_exactly_once(&self) -> bool {
        self.exactly_once
    }

    /// A stop was asked for: whoever waits for the other side does so for a few seconds more at most.
    pub(crate) fn hurry(&self) {
        self.hurried.send_replace(true);
        self.room.notify_waiters();
    }

    /// How many pipelines write here.
    fn inputs(&self) -> usize {
        lock(&self.inner).waiting.len()
    }

    /// Rows that are not delivered yet.
    pub(crate) fn rows(&self) -> usize {
        lock(&self.inner).waiting.iter().map(|waiting| waiting.rows).sum()
    }

    /// Delivers what waits, at once and for as long as it takes, unless the sink has failed or a stop was asked for.
    pub(crate) async fn drain(&self) {
        lock(&self.inner).draining = true;
        self.changed.notify_one();
        let emptied = async {
            loop {
                let empty = self.empty.notified();
                if lock(&self.inner).is_empty() {
                    return;
                }
                empty.await;
            }
        };
        let (mut hurried, mut failing) = (self.hurried.subscribe(), self.failing.subscribe());
        let too_late = async {
            is_true(&mut hurried).await;
            sleep(DRAIN).await;
        };
        tokio::select! {
            biased;
            () = emptied => {}
            () = is_true(&mut failing) => {}
            () = too_late => {}
        }
    }

    /// Puts all rows on the disk, and into `state` where they are and how far they are delivered.
    pub(crate) fn prepare(&self, checkpoint: u64, state: &mut StateWriter) -> Result<()> {
        let mut inner = lock(&self.inner);
        inner.write()?;
        let end = inner.log.committed_lsn();
        state.u64(STATE_VERSION);
        state.u64(end);
        state.u64(inner.waiting.len() as u64);
        let mut needed = end;
        for (input, waiting) in inner.inputs.iter().zip(&inner.waiting) {
            let front = waiting.entries.front();
            let first = front.and_then(|entry| entry.lsn).unwrap_or(end);
            needed = needed.min(first);
            state.str(&input.metric);
            state.u64(waiting.next);
            state.u64(first);
            state.u64(front.map_or(0, |entry| entry.skip) as u64);
        }
        inner.ends.push_back((checkpoint, end));
        inner.needed.push_back((checkpoint, needed));
        Ok(())
    }

    /// The checkpoint is durable: its rows may be delivered. What only checkpoints before `oldest_kept` needed goes.
    pub(crate) fn commit(&self, checkpoint: u64, oldest_kept: u64) -> Result<()> {
        let mut inner = lock(&self.inner);
        let mut end = None;
        while let Some((_, at)) = inner.ends.pop_front_if(|(number, _)| *number <= checkpoint) {
            end = Some(at);
        }
        if let Some(end) = end {
            inner.waiting.iter_mut().for_each(|waiting| waiting.make_ready(end));
            self.hold_back(&mut inner);
        }
        let mut needed = None;
        while let Some((_, at)) = inner.needed.pop_front_if(|(number, _)| *number <= oldest_kept) {
            needed = Some(at);
        }
        let trimmed = match needed {
            Some(at) => inner.log.trim(at),
            None => Ok(()),
        };
        drop(inner);
        self.changed.notify_one();
        trimmed
    }

    /// Takes over the state of checkpoint `checkpoint`, which is durable.
    pub(crate) fn restore(&self, checkpoint: u64, state: &[u8]) -> Result<()> {
        let mut inner = lock(&self.inner);
        let Some(kept) = Kept::read(state)? else {
            let first = inner.log.first_lsn();
            inner.log.truncate(first)?;
            return inner.restore_first_version(state, !self.exactly_once);
        };
        let end = kept.end;
        for from in &kept.froms {
            if let Some(input) = inner.inputs.iter().position(|input| input.metric == from.metric) {
                let waiting = &mut inner.waiting[input];
                (waiting.next, waiting.start, waiting.restored) = (from.next, from.next, true);
            }
        }
        inner.read_log(&kept)?;
        inner.needed.push_back((checkpoint, kept.needed()));
        inner.waiting.iter_mut().for_each(|waiting| waiting.make_ready(end));
        Ok(())
    }

    /// Whether rows of this run would be taken for others: the other side has the rows of an input before number `last`.
    fn check_numbers(&self, input: usize, last: u64) -> Result<()> {
        let inner = lock(&self.inner);
        let (metric, waiting) = (&inner.inputs[input].metric, &inner.waiting[input]);
        if last <= waiting.start {
            return Ok(());
        }
        let known = last - waiting.start;
        if waiting.restored {
            warn!(
                "`{metric}`: the other side has {known} rows more than the checkpoint that this run goes on from: the next \
                 {known} rows are taken for these. They are the same if one source gives its rows again in the same order"
            );
            return Ok(());
        }
        Err(Error::outside(format!(
            "`{metric}`: the other side has rows up to number {last}, but this run begins with {}: the clock was set \
             back, and its rows would be taken for repeated ones. Set the clock right and start with `pipeline run --fresh`",
            waiting.start
        )))
    }

    /// The next delivery, if one is due; else when to look again.
    fn next(&self) -> Result<std::result::Result<Delivery, Option<Instant>>> {
        let mut inner = lock(&self.inner);
        if let Some(delivery) = &inner.in_flight {
            return Ok(Ok(delivery.clone()));
        }
        let now = Instant::now();
        let draining = inner.draining;
        let limits = self.limits;
        // The longest waiting first, so that no input starves behind one that is always full.
        let due = |waiting: &Waiting| {
            let since = waiting.entries.front().filter(|_| waiting.ready > 0)?.since;
            Some(if draining || waiting.ready >= limits.rows { since } else { since + limits.every })
        };
        let first = inner.waiting.iter().enumerate().filter_map(|(input, w)| Some((due(w)?, input))).min();
        match first {
            Some((at, input)) if at <= now => {
                let (first, rows) = blocking(|| inner.front(input, limits.rows))?;
                let delivery = Delivery { input, id: first + rows.num_rows() as u64, rows };
                inner.in_flight = Some(delivery.clone());
                Ok(Ok(delivery))
            }
            other => Ok(Err(other.map(|(at, _)| at))),
        }
    }

    /// Waits for the next delivery.
    async fn due(&self) -> Result<Delivery> {
        loop {
            let changed = self.changed.notified();
            match self.next()? {
                Ok(delivery) => return Ok(delivery),
                Err(Some(at)) => tokio::select! {
                    () = changed => {}
                    () = tokio::time::sleep_until(at) => {}
                },
                Err(None) => changed.await,
            }
        }
    }

    fn done(&self, delivery: &Delivery) {
        let mut inner = lock(&self.inner);
        inner.in_flight = None;
        inner.take(delivery.input, delivery.rows.num_rows());
        self.hold_back(&mut inner);
        if inner.is_empty() {
            self.empty.notify_waiters();
        }
        drop(inner);
        self.room.notify_waiters();
    }
}

impl Inner {
    /// The input that rows of an earlier run still fit, if there is one.
    fn input_of(&self, metric: &str, rows: &RecordBatch) -> Option<usize> {
        let fits = |input: &SinkInput| input.metric == metric && adapted(rows, &input.shape.schema).is_some();
        self.inputs.iter().position(fits)
    }

    fn add(&mut self, input: usize, rows: RecordBatch, ready: bool) {
        let bytes = size(&rows);
        self.bytes += bytes;
        self.memory += bytes;
        self.unwritten += bytes;
        let count = rows.num_rows();
        let waiting = &mut self.waiting[input];
        let (rows, since) = (Some(rows), Instant::now());
        waiting.entries.push_back(Entry { rows, first: waiting.next, count, skip: 0, bytes, since, lsn: None });
        waiting.rows += count;
        waiting.ready += if ready { count } else { 0 };
        waiting.next += count as u64;
    }

    /// All rows are delivered, or wait for a checkpoint.
    fn is_empty(&self) -> bool {
        self.in_flight.is_none() && self.waiting.iter().all(|waiting| waiting.ready == 0)
    }

    /// Writes all rows that are not in the log yet, and makes them durable.
    fn write(&mut self) -> Result<()> {
        for (input, waiting) in self.inputs.iter().zip(&mut self.waiting) {
            waiting.join()?;
            for entry in waiting.entries.iter_mut().skip_while(|entry| entry.lsn.is_some()) {
                // Before anything is added: on a full disk what was buffered stays.
                if self.log.buffered_bytes() >= WRITE_BYTES_MAX {
                    self.log.commit(Vec::new)?;
                }
                let Some(rows) = &entry.rows else { continue };
                let told = Told { metric: &input.metric, first: entry.first, count: entry.count as u64 };
                let mut payload = StateWriter::default();
                payload.batches(std::slice::from_ref(rows))?;
                entry.lsn = Some(self.log.append(ROWS, now_us(), &told.write(), &payload.finish()));
                self.unwritten -= entry.bytes;
            }
        }
        self.log.commit(Vec::new)?;
        self.spill();
        Ok(())
    }

    /// Forgets rows that are in the log while too much is in memory, the newest first: their turn comes last.
    fn spill(&mut self) {
        for waiting in &mut self.waiting {
            for entry in waiting.entries.iter_mut().rev() {
                if self.memory <= MEMORY_BYTES_MAX {
                    return;
                }
                if entry.lsn.is_some() && entry.rows.take().is_some() {
                    self.memory -= entry.bytes;
                }
            }
        }
    }

    /// At most `rows_max` rows from the front of an input, as one batch, and the number of the first. They follow each other
    /// without a gap, and stay where they are.
    fn front(&mut self, input: usize, rows_max: usize) -> Result<(u64, RecordBatch)> {
        let waiting = &mut self.waiting[input];
        let mut parts = Vec::new();
        let mut wanted = rows_max.max(1).min(waiting.ready);
        let first = waiting.entries.front().map_or(waiting.next, |entry| entry.first);
        let mut next = first;
        for entry in &mut waiting.entries {
            if wanted == 0 || entry.first != next {
                break;
            }
            let rows = match &entry.rows {
                Some(rows) => rows.clone(),
                None => {
                    let rows = read(&self.log, &mut waiting.cursor, entry)?;
                    let rows = adapted(&rows, &self.inputs[input].shape.schema).unwrap_or(rows);
                    self.memory += entry.bytes;
                    entry.rows.insert(rows).clone()
                }
            };
            let count = entry.count.min(wanted);
            parts.push(rows.slice(0, count));
            wanted -= count;
            next += count as u64;
        }
        let some = parts.first().ok_or_else(|| Error::internal("nothing to deliver"))?;
        Ok((first, concat_batches(some.schema_ref(), &parts)?))
    }

    /// Removes rows from the front of an input: the other side has them.
    fn take(&mut self, input: usize, mut count: usize) {
        let waiting = &mut self.waiting[input];
        waiting.rows -= count;
        waiting.ready -= count;
        while count > 0
            && let Some(entry) = waiting.entries.front_mut()
        {
            let taken = count.min(entry.count);
            let bytes = if taken == entry.count { entry.bytes } else { entry.bytes * taken / entry.count };
            self.bytes -= bytes;
            self.memory -= if entry.rows.is_some() { bytes } else { 0 };
            self.unwritten -= if entry.lsn.is_none() { bytes } else { 0 };
            count -= taken;
            if taken == entry.count {
                waiting.entries.pop_front();
                continue;
            }
            entry.rows = entry.rows.as_ref().map(|rows| rows.slice(taken, entry.count - taken));
            entry.count -= taken;
            entry.first += taken as u64;
            entry.skip += taken;
            entry.bytes -= bytes;
        }
    }

    /// Finds the rows that a checkpoint names in the log, which ended at `end` then; what came later goes.
    fn read_log(&mut self, kept: &Kept) -> Result<()> {
        let end = kept.end;
        let folder = self.log.folder().display().to_string();
        if self.log.next_lsn() < end {
            let here = self.log.next_lsn();
            warn!("{folder}: records {here} to {} are gone: rows that waited for delivery are lost", end - 1);
            self.log.pass_over(end)?;
        }
        self.log.truncate(end)?;
        let from = kept.needed();
        if from < self.log.first_lsn() {
            let here = self.log.first_lsn();
            warn!("{folder}: records {from} to {} are gone: rows that waited for delivery are lost", here - 1);
        }
        let mut cursor = self.log.records_from(from.max(self.log.first_lsn()))?;
        let mut lost = Lost::default();
        while let Some(record) = cursor.read()? {
            let Told { metric, first, count } = Told::of(&record)?;
            let (skip, count) = kept.waiting(&record, metric, count);
            let first = first + skip;
            if count == 0 {
                continue;
            }
            let [skip, count] = [skip, count].map(|rows| usize::try_from(rows).unwrap_or(usize::MAX));
            let rows = StateReader::new(&record.payload).batches()?;
            let Some(input) = rows.first().and_then(|rows| self.input_of(metric, rows)) else {
                lost.add(metric, count);
                continue;
            };
            let bytes = rows.iter().map(size).sum();
            self.bytes += bytes;
            let waiting = &mut self.waiting[input];
            waiting.rows += count;
            let lsn = Some(record.lsn);
            waiting.entries.push_back(Entry { rows: None, first, count, skip, bytes, since: Instant::now(), lsn });
        }
        Ok(())
    }

    /// The layout before there was a log: all rows in the state.
    fn restore_first_version(&mut self, state: &[u8], ready: bool) -> Result<()> {
        let mut state = StateReader::new(state);
        state.u64()?;
        let mut lost = Lost::default();
        let mut take = |inner: &mut Self, metric: &str, batches: Vec<RecordBatch>| {
            for rows in batches {
                match inner.input_of(metric, &rows) {
                    Some(input) => {
                        let rows = adapted(&rows, &inner.inputs[input].shape.schema).unwrap_or(rows);
                        inner.add(input, rows, ready);
                    }
                    None => lost.add(metric, rows.num_rows()),
                }
            }
        };
        if state.bool()? {
            let metric = state.str()?;
            state.u64()?;
            take(self, metric, state.batches()?);
        }
        for _ in 0..state.count()? {
            let metric = state.str()?;
            take(self, metric, state.batches()?);
        }
        Ok(())
    }
}

/// Rows of an earlier run with the columns that their pipeline has now: by name, and null where they have none. `None` if a
/// column has another type.
fn adapted(rows: &RecordBatch, schema: &SchemaRef) -> Option<RecordBatch> {
    let column = |field: &FieldRef| match rows.column_by_name(field.name()) {
        Some(column) => (column.data_type() == field.data_type()).then(|| Arc::clone(column)),
        None => field.is_nullable().then(|| new_null_array(field.data_type(), rows.num_rows())),
    };
    let columns = schema.fields().iter().map(column).collect::<Option<Vec<_>>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options).ok()
}

/// Rows of an earlier run that fit no input, by metric. Says so in the end.
#[derive(Default)]
struct Lost(BTreeMap<String, usize>);

impl Lost {
    fn add(&mut self, metric: &str, rows: usize) {
        *self.0.entry(metric.to_owned()).or_default() += rows;
    }
}

impl Drop for Lost {
    fn drop(&mut self) {
        for (metric, rows) in &self.0 {
            warn!(
                "`{metric}` goes elsewhere now, or a column has another type: {rows} of its rows, which waited for delivery, are lost"
            );
        }
    }
}

impl Waiting {
    /// Joins small entries that are not in the log yet, so that a record of it is worth its header. What is in flight
    /// is the front, and stays it.
    fn join(&mut self) -> Result<()> {
        let written = self.entries.iter().take_while(|entry| entry.lsn.is_some()).count();
        let mut open = self.entries.split_off(written);
        while let Some(mut entry) = open.pop_front() {
            let mut parts: Vec<RecordBatch> = entry.rows.take().into_iter().collect();
            while let Some(next) = open.pop_front_if(|next| {
                entry.bytes + next.bytes <= RECORD_BYTES_MAX && entry.count + next.count <= BATCH_ROWS_MAX
            }) {
                entry.bytes += next.bytes;
                entry.count += next.count;
                parts.extend(next.rows);
            }
            let first = parts.first().ok_or_else(|| Error::internal("an entry without rows"))?;
            entry.rows =
                Some(if parts.len() == 1 { first.clone() } else { concat_batches(first.schema_ref(), &parts)? });
            entry.skip = 0;
            self.entries.push_back(entry);
        }
        Ok(())
    }

    /// Rows in records before `end` may be delivered.
    fn make_ready(&mut self, end: u64) {
        let is_ready = |entry: &&Entry| entry.lsn.is_some_and(|lsn| lsn < end);
        let ready = self.entries.iter().take_while(is_ready).map(|entry| entry.count).sum();
        self.ready = self.ready.max(ready);
    }
}

/// The rows of an entry that is in the log alone. `cursor` goes on from the entry before: a new one would have to look for
/// the place.
fn read(log: &Log, cursor: &mut Option<Cursor>, entry: &Entry) -> Result<RecordBatch> {
    let gone = || Error::internal("rows of the outbox are gone");
    let lsn = entry.lsn.ok_or_else(gone)?;
    let cursor = match cursor {
        Some(cursor) if cursor.lsn() <= lsn => cursor,
        other => other.insert(log.records_from(lsn)?),
    };
    loop {
        let record = cursor.read()?.ok_or_else(gone)?;
        if record.lsn == lsn {
            let batches = StateReader::new(&record.payload).batches()?;
            return Ok(batches.first().ok_or_else(gone)?.slice(entry.skip, entry.count));
        }
    }
}

/// Memory of rows; slices count in proportion.
fn size(rows: &RecordBatch) -> usize {
    rows.columns().iter().map(|column| column.to_data().get_slice_memory_size().unwrap_or(0)).sum()
}
