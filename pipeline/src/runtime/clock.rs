//! The times of one source: stamps of receipt, event times, the watermark, and idleness.

use arrow::array::{AsArray, Int64Array, RecordBatch};
use arrow::datatypes::TimestampMicrosecondType;
use tokio::time::Instant;
use tracing::warn;

use super::edge::Message;
use crate::batch::Times;
use crate::error::{Error, Result};
use crate::graph::EventTime;
use crate::state::{StateReader, StateWriter};
use crate::time::now_us;

/// While the wall clock is behind what was given out, time goes on slower by one part in so many: rates over it are that
/// much too high, and an hour is caught up in three days.
const SLEW: i64 = 64;

/// A wall clock that is behind by more is told.
const SET_BACK_US: i64 = 1_000_000;

/// Event time, lateness and idleness of one source.
#[derive(Debug)]
pub(crate) struct SourceClock {
    pub(crate) event_time: Option<EventTime>,
    /// Newest event time, `i64::MIN` if none.
    pub(crate) newest_us: i64,
    /// Newest time of receipt; the wall clock may be set back, this is not.
    ingest_us: i64,
    /// When the wall clock was last ahead of it, and what it said: while it is not, time goes on from here.
    anchor: (Instant, i64),
    /// Whether it was told that the wall clock was set back.
    told_set_back: bool,
    /// Last watermark given out.
    watermark_us: i64,
    /// The last row or (re)connect: idleness counts from here. Not by the wall clock, which may jump.
    active: Instant,
    connected: bool,
    unwanted: bool,
    /// Whether the consumers were told that no row is to be waited for.
    told_idle: bool,
}

impl SourceClock {
    pub(crate) fn new(event_time: Option<EventTime>) -> Self {
        Self {
            event_time,
            newest_us: i64::MIN,
            ingest_us: i64::MIN,
            anchor: (Instant::now(), i64::MIN),
            told_set_back: false,
            watermark_us: i64::MIN,
            active: Instant::now(),
            connected: false,
            unwanted: false,
            told_idle: false,
        }
    }

    pub(crate) fn set_connected(&mut self, connected: bool) {
        self.connected = connected;
        self.unwanted = false;
        self.active = Instant::now();
    }

    pub(crate) fn set_unwanted(&mut self) {
        self.unwanted = true;
    }

    /// The time of receipt of what arrives now.
    pub(crate) fn stamp(&mut self) -> i64 {
        self.unwanted = false;
        self.receipt(now_us(), Instant::now())
    }

    /// What is taken in now was received at `ingest_us`, in an earlier run.
    pub(crate) fn stamped(&mut self, ingest_us: i64) {
        if ingest_us > self.ingest_us {
            self.ingest_us = ingest_us;
            self.anchor = (Instant::now(), ingest_us);
        }
    }

    /// The time of receipt at `now`, when the wall clock says `wall_us`. One that was set back neither sets this back nor stops it,
    /// for windows must go on closing: it goes on a little slower, until the wall clock has caught up.
    fn receipt(&mut self, wall_us: i64, now: Instant) -> i64 {
        let (since, at_us) = self.anchor;
        let elapsed_us = i64::try_from(now.duration_since(since).as_micros()).unwrap_or(i64::MAX);
        let slewed_us = at_us.saturating_add(elapsed_us - elapsed_us / SLEW).max(self.ingest_us);
        if wall_us >= slewed_us {
            self.anchor = (now, wall_us);
            self.told_set_back = false;
        } else if slewed_us - wall_us > SET_BACK_US && !self.told_set_back {
            self.told_set_back = true;
            let seconds = (slewed_us - wall_us) / 1_000_000;
            warn!(
                "the clock of this machine was set back by {seconds} s; times of receipt go on from where they were, slower \
                 by 1 in {SLEW}, until it has caught up"
            );
        }
        self.ingest_us = wall_us.max(slewed_us);
        self.ingest_us
    }

    /// What arrived was not empty, as an idle poll is.
    pub(crate) fn row_came(&mut self) {
        self.active = Instant::now();
    }

    /// The times of rows received at `ingest_us`; their event times move the clock.
    pub(crate) fn times(&mut self, rows: &RecordBatch, ingest_us: i64) -> Result<Times> {
        let count = rows.num_rows();
        let Some(event_time) = self.event_time else {
            let times = Times::constant(ingest_us, ingest_us, self.newest_us, count);
            self.newest_us = self.newest_us.max(ingest_us);
            return Ok(times);
        };
        let column = rows.column(event_time.column);
        let column = column
            .as_primitive_opt::<TimestampMicrosecondType>()
            .ok_or_else(|| Error::internal("an event time that is no timestamp"))?;
        let mut watermarks = Vec::with_capacity(count);
        for &event_us in column.values() {
            watermarks.push(self.trailing());
            self.newest_us = self.newest_us.max(event_us);
        }
        Ok(Times {
            event_us: Int64Array::new(column.values().clone(), None),
            ingest_us: Int64Array::from_value(ingest_us, count),
            watermark_us: Int64Array::from(watermarks),
        })
    }

    /// The watermark that follows from the newest event time.
    fn trailing(&self) -> i64 {
        let lateness = self.event_time.map_or(0, |event_time| event_time.lateness_us);
        if self.newest_us == i64::MIN { i64::MIN } else { self.newest_us.saturating_sub(lateness) }
    }

    /// The watermark, if it has moved since the last call.
    pub(crate) fn advanced(&mut self) -> Option<i64> {
        let watermark = self.trailing();
        (watermark > self.watermark_us).then(|| {
            self.watermark_us = watermark;
            watermark
        })
    }

    /// What time alone does: over the time of receipt it moves the watermark; over event time it makes a
    /// source idle that is connected, has nothing queued and got no row for long, and tells when that is over.
    pub(crate) fn tick(&mut self, nothing_queued: bool) -> Option<Message> {
        let Some(event_time) = self.event_time else {
            if !nothing_queued {
                return None;
            }
            self.newest_us = self.newest_us.max(self.receipt(now_us(), Instant::now()));
            return self.advanced().map(Message::Watermark);
        };
        let quiet_us = i64::try_from(self.active.elapsed().as_micros()).unwrap_or(i64::MAX);
        let idle = self.unwanted || (self.connected && nothing_queued && quiet_us >= event_time.idle_us);
        if !idle {
            let was_idle = std::mem::take(&mut self.told_idle);
            return was_idle.then_some(Message::Watermark(self.watermark_us));
        }
        self.told_idle = true;
        // Without any row there is no event time to go on from: i64::MIN still says that this input holds nothing back.
        let on = if self.newest_us == i64::MIN { i64::MIN } else { self.trailing().saturating_add(quiet_us) };
        Some(Message::Idle(on))
    }

    pub(crate) fn snapshot(&self, state: &mut StateWriter) {
        state.i64(self.newest_us);
        state.i64(self.ingest_us);
        state.i64(self.watermark_us);
    }

    pub(crate) fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        self.newest_us = state.i64()?;
        self.stamped(state.i64()?);
        self.watermark_us = state.i64()?;
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod testing {
    use std::sync::Arc;

    use arrow::array::TimestampMicrosecondArray;

    use super::*;
    use crate::schema::{FieldType, schema_of};

    /// A clock over the only column, 10 us late at most and idle at once.
    pub(in crate::runtime) fn event_clock() -> SourceClock {
        SourceClock::new(Some(EventTime { column: 0, lateness_us: 10, idle_us: 0 }))
    }

    /// Rows of one column, their event time.
    pub(in crate::runtime) fn rows(event_us: &[i64]) -> RecordBatch {
        let column = TimestampMicrosecondArray::from(event_us.to_vec()).with_timezone("UTC");
        let schema = schema_of([("ts", FieldType::Timestamp(None))]);
        RecordBatch::try_new(schema, vec![Arc::new(column)]).expect("rows")
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{event_clock, rows};
    use super::*;

    const MIN: i64 = i64::MIN;

    fn watermarks(clock: &mut SourceClock, event_us: &[i64]) -> Vec<i64> {
        let times = clock.times(&rows(event_us), 7).expect("times");
        assert_eq!(times.event_us.values(), event_us);
        assert!(times.ingest_us.values().iter().all(|ingest| *ingest == 7));
        times.watermark_us.values().to_vec()
    }

    #[test]
    fn each_row_meets_the_newest_time_before_it_less_the_lateness_however_batches_are_cut() {
        for (event_us, expected) in [
            (vec![100, 105, 95, 120, 120, 110], vec![MIN, 90, 95, 95, 110, 110]),
            (vec![-5, 0, -100], vec![MIN, -15, -10]),
            (vec![MIN + 3, 50], vec![MIN, MIN]),
            (vec![i64::MAX, 0], vec![MIN, i64::MAX - 10]),
        ] {
            for size in 1..=event_us.len() {
                let mut clock = event_clock();
                let cut: Vec<i64> = event_us.chunks(size).flat_map(|part| watermarks(&mut clock, part)).collect();
                assert_eq!(cut, expected, "{event_us:?} in batches of {size}");
            }
        }
    }

    #[test]
    fn a_watermark_is_given_out_once_and_only_forward() {
        let mut clock = event_clock();
        assert_eq!(clock.advanced(), None, "no row, no watermark");
        for (event_us, expected) in [(100, Some(90)), (100, None), (50, None), (101, Some(91))] {
            watermarks(&mut clock, &[event_us]);
            assert_eq!(clock.advanced(), expected, "after {event_us}");
            assert_eq!(clock.advanced(), None);
        }
    }

    #[test]
    fn over_the_time_of_receipt_no_tick_makes_a_later_row_late() {
        let mut clock = SourceClock::new(None);
        for round in 0..100 {
            let given = match clock.tick(true) {
                Some(Message::Watermark(time)) => time,
                None => clock.watermark_us,
                other => panic!("a tick without event time gave {other:?}"),
            };
            let ingest_us = clock.stamp();
            let times = clock.times(&rows(&[0, 0]), ingest_us).expect("times");
            assert_eq!(times.event_us.values(), &[ingest_us, ingest_us], "round {round}");
            for watermark in times.watermark_us.values() {
                assert!(ingest_us >= given && ingest_us >= *watermark, "round {round}: a row before the watermark");
            }
        }
        assert!(clock.tick(false).is_none(), "rows that wait were received before now");
    }

    #[test]
    fn a_wall_clock_set_back_neither_sets_the_time_of_receipt_back_nor_stops_it() {
        const SECOND: i64 = 1_000_000;
        const HOUR: i64 = 3600 * SECOND;
        let (start, began) = (now_us(), Instant::now());
        let after = |seconds: u64| began + std::time::Duration::from_secs(seconds);
        let mut clock = SourceClock::new(None);
        assert_eq!(clock.receipt(start, began), start);
        // Time goes on, slower by one part in 64.
        for seconds in 1..=640 {
            let passed = i64::try_from(seconds).expect("a number") * SECOND;
            let at = clock.receipt(start - HOUR + passed, after(seconds));
            assert_eq!(at, start + passed - passed / 64, "after {seconds} s");
        }
        assert!(clock.told_set_back);
        // After a restart too.
        let mut state = StateWriter::default();
        clock.snapshot(&mut state);
        let mut restored = SourceClock::new(None);
        restored.restore(&mut StateReader::new(&state.finish())).expect("a state");
        let (restarted, from) = restored.anchor;
        assert_eq!(from, clock.ingest_us);
        let at = restored.receipt(start - HOUR + 700 * SECOND, restarted + std::time::Duration::from_secs(64));
        assert_eq!(at, from + 63 * SECOND);
        // The wall clock has caught up.
        assert_eq!(clock.receipt(start + HOUR, after(641)), start + HOUR);
        assert!(!clock.told_set_back);
        assert_eq!(clock.receipt(start + HOUR + SECOND, after(642)), start + HOUR + SECOND);
    }

    #[test]
    fn a_source_is_idle_only_if_connected_and_quiet_or_if_nobody_wants_it() {
        /// An hour: longer than this test runs.
        const LONG: i64 = 3_600_000_000;
        for (connected, unwanted, idle_us, nothing_queued, idle) in [
            (true, false, 0, true, true),
            (true, false, 0, false, false),
            (true, false, LONG, true, false),
            (false, false, 0, true, false),
            (false, true, LONG, true, true),
        ] {
            let mut clock = SourceClock::new(Some(EventTime { column: 0, lateness_us: 10, idle_us }));
            clock.set_connected(connected);
            if unwanted {
                clock.set_unwanted();
            }
            let case =
                format!("connected {connected}, unwanted {unwanted}, {idle_us} us, queue empty {nothing_queued}");
            let told = clock.tick(nothing_queued);
            assert_eq!(told.is_some(), idle, "{case}");
            // Before the first row there is no time to go on from.
            assert!(told.is_none_or(|message| matches!(message, Message::Idle(MIN))), "{case}");
        }
    }

    #[test]
    fn an_idle_source_goes_on_from_its_watermark_and_a_row_ends_that() {
        let mut clock = event_clock();
        clock.set_unwanted();
        watermarks(&mut clock, &[100]);
        let Some(Message::Idle(on)) = clock.tick(true) else { panic!("not idle") };
        assert!(on >= 90, "{on}");
        clock.stamp();
        let given = clock.watermark_us;
        assert!(matches!(clock.tick(true), Some(Message::Watermark(time)) if time == given), "wanted again");
        assert!(clock.tick(true).is_none(), "and not connected");
    }

    #[test]
    fn a_restored_clock_gives_the_same_watermarks() {
        for event_time in [None, Some(EventTime { column: 0, lateness_us: 10, idle_us: 0 })] {
            let mut clock = SourceClock::new(event_time);
            clock.times(&rows(&[100, 90]), 1_000).expect("times");
            clock.stamp();
            clock.advanced();
            let mut state = StateWriter::default();
            clock.snapshot(&mut state);
            let state = state.finish();
            let mut restored = SourceClock::new(event_time);
            let mut reader = StateReader::new(&state);
            restored.restore(&mut reader).expect("a state");
            assert!(reader.is_empty());
            assert_eq!(restored.advanced(), None, "given out before");
            let rows = rows(&[95, 200, 150]);
            let (one, other) = (clock.times(&rows, 2_000), restored.times(&rows, 2_000));
            let (one, other) = (one.expect("times"), other.expect("times"));
            assert_eq!(one.watermark_us, other.watermark_us);
            assert_eq!(clock.advanced(), restored.advanced());
        }
    }

    #[test]
    fn a_poll_without_rows_is_no_row() {
        let mut clock = event_clock();
        clock.set_connected(true);
        let active = clock.active;
        clock.stamp();
        assert_eq!(clock.active, active);
        clock.row_came();
        assert!(clock.active >= active);
    }

    #[test]
    fn a_connection_that_breaks_while_idle_is_waited_for_again() {
        let mut clock = event_clock();
        clock.set_connected(true);
        watermarks(&mut clock, &[100]);
        clock.advanced();
        assert!(matches!(clock.tick(true), Some(Message::Idle(_))));
        clock.set_connected(false);
        assert!(matches!(clock.tick(true), Some(Message::Watermark(90))), "the idle time is taken back");
        assert!(clock.tick(true).is_none());
    }
}
